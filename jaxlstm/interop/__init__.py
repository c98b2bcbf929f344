"""Weights of other frameworks: ``from_X(lstm, weights)`` makes parameters of them, ``to_X(lstm, params)`` the way back.

| X           | what goes in and comes out                                                                    |
| ----------- | --------------------------------------------------------------------------------------------- |
| torch       | the ``state_dict`` of an `nn.LSTM`, or of an `nn.RNN` for ``cell="rnn"``                        |
| keras       | the list of ``get_weights()`` of `LSTM` or `Bidirectional`, or `SimpleRNN` for ``cell="rnn"``    |
| flax_nnx    | a module or its state                                                                         |
| flax_linen  | what ``init`` returns                                                                         |
| haiku       | what ``init`` returns                                                                         |
| equinox     | a cell; a list of them for several layers; pairs, forward and backward, for two directions    |
| cudnn       | the flat vector of `jax.experimental.rnn`                                                     |
| onnx        | an `onnx.ModelProto`, of which `to_onnx` makes the whole network                              |

`load_safetensors` and `save_safetensors` read and write files of PyTorch's names.

Arrays come in as NumPy's, JAX's or the framework's own. They go out as NumPy's, copied; as JAX's where they are part of
an object (flax_nnx, equinox). No framework is imported but where an object of its kind is made.

- Parameters come in ``param_dtype``. A dtype that it does not hold exactly, such as float64 for float32, is refused:
  cast the weights beforehand, or set ``param_dtype``.
- A framework's second bias is added on the way in and zero on the way out. What goes out and comes back in is the same,
  bit by bit; `to_haiku` says where a dtype does not allow it.
- An option that changes what parameters there are and that the framework does not have, such as ``layer_norm=True``, is
  refused by name. Regularisers have no parameters: their rates stay where they are, and so does zoneout, which in this
  library acts without a key too.
- A missing, superfluous or wrong array is one error that names it, what was received and what was expected.
"""

from jaxlstm.interop.cudnn import from_cudnn as from_cudnn
from jaxlstm.interop.cudnn import to_cudnn as to_cudnn
from jaxlstm.interop.equinox import from_equinox as from_equinox
from jaxlstm.interop.equinox import to_equinox as to_equinox
from jaxlstm.interop.flax_linen import from_flax_linen as from_flax_linen
from jaxlstm.interop.flax_linen import to_flax_linen as to_flax_linen
from jaxlstm.interop.flax_nnx import from_flax_nnx as from_flax_nnx
from jaxlstm.interop.flax_nnx import to_flax_nnx as to_flax_nnx
from jaxlstm.interop.haiku import from_haiku as from_haiku
from jaxlstm.interop.haiku import to_haiku as to_haiku
from jaxlstm.interop.keras import from_keras as from_keras
from jaxlstm.interop.keras import to_keras as to_keras
from jaxlstm.interop.onnx import from_onnx as from_onnx
from jaxlstm.interop.onnx import to_onnx as to_onnx
from jaxlstm.interop.safetensors import load_safetensors as load_safetensors
from jaxlstm.interop.safetensors import save_safetensors as save_safetensors
from jaxlstm.interop.torch import from_torch as from_torch
from jaxlstm.interop.torch import to_torch as to_torch
