"""Export of inference programs that run without this package (`jax.export`).

    export.save(export.sequence(lstm, params), "sequence.jax")
    export.save(export.step(lstm, params), "step.jax")

Any program that has JAX can load and call the file::

    sequence = jax.export.deserialize(bytearray(Path("sequence.jax").read_bytes()))
    ys, (h, c) = jax.jit(sequence.call)(xs)                  # any number of steps, any batch size

The file contains the weights. The program is lowered for every requested platform, with the array layout that is
fastest on the machine that exports it. JAX guarantees that a file can be loaded for six months.

`to_c` writes a step as C code instead, for programs without JAX::

    Path("lstm.c").write_text(export.to_c(lstm, params))
"""

from jaxlstm.export.c_code import to_c as to_c
from jaxlstm.export.program import PLATFORMS as PLATFORMS
from jaxlstm.export.program import save as save
from jaxlstm.export.program import sequence as sequence
from jaxlstm.export.program import step as step
