"""Weights of other frameworks: ``from_X(lstm, weights)`` returns parameters, ``to_X(lstm, params)`` converts them back.

| X           | weights                                                                                        |
| ----------- | ---------------------------------------------------------------------------------------------- |
| torch       | the ``state_dict`` of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, or of their cells                    |
| keras       | the list ``get_weights()`` of `LSTM`, `GRU` or `SimpleRNN`, also in a `Bidirectional`          |
| flax_nnx    | a module or its state, with cells of an LSTM or a GRU                                          |
| flax_linen  | the variables that ``init`` returns, with cells of an LSTM or a GRU                            |
| haiku       | the parameters that ``init`` returns, of `hk.LSTM` or `hk.VanillaRNN`                          |
| equinox     | an `LSTMCell` or `GRUCell`; a list for several layers; pairs (forward, backward)               |
| cudnn       | the flat vector of `jax.experimental.rnn`                                                      |
| onnx        | an `onnx.ModelProto`; `to_onnx` writes the whole network                                       |
| xlstm       | the ``state_dict`` of an `sLSTMLayer`                                                          |

The configuration says which cell the weights are of: ``cell="lstm"``, ``"gru"``, ``"rnn"`` or ``"slstm"``. Weights of
another cell and cells that a framework does not have raise an error.

`load_safetensors` and `save_safetensors` read and write files with PyTorch's names.

`from_X` accepts arrays of NumPy, JAX or the framework. `to_X` returns copies as NumPy arrays, or as JAX arrays inside
objects (flax_nnx, equinox). A framework is imported only to create its objects.

- Parameters have ``param_dtype``. A dtype that it cannot represent exactly, such as float64 in float32, raises an
  error: cast the weights first, or set ``param_dtype``.
- `from_X` adds a framework's second bias to the first where their sum is all that matters; there `to_X` sets the second
  to zero. Converting parameters to a framework and back returns them bit by bit; `to_haiku` documents its exception.
- An option that changes which parameters exist and that the framework does not have, such as ``layer_norm=True``,
  raises an error that names it. Regularizers have no parameters, so their rates are ignored. Note that in this library
  zoneout also acts without a key, by expectation.
- A missing, unexpected or wrong array raises one error with its name, the received and the expected value.
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
from jaxlstm.interop.xlstm import from_xlstm as from_xlstm
from jaxlstm.interop.xlstm import to_xlstm as to_xlstm
