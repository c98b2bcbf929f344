"""The LSTM for JAX: pure functions, a compiled scan, and gate equations that read like the paper."""

from jaxlstm import activation_regularization as activation_regularization
from jaxlstm import cells as cells
from jaxlstm import initializers as initializers
from jaxlstm import interop as interop
from jaxlstm.cells import Cell as Cell
from jaxlstm.conv_lstm import ConvLSTM as ConvLSTM
from jaxlstm.lstm import LSTM as LSTM
from jaxlstm.params import Layer as Layer
from jaxlstm.params import Norm as Norm
from jaxlstm.params import Params as Params
from jaxlstm.params import State as State
from jaxlstm.params import Weights as Weights

__version__ = "0.1.0"
