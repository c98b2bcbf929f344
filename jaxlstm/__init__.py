"""The LSTM for JAX: pure functions, a compiled scan, and gate equations that read like the paper."""

from jaxlstm import cells as cells
from jaxlstm import initializers as initializers
from jaxlstm import interop as interop
from jaxlstm import regularisers as regularisers
from jaxlstm.cells import Cell as Cell
from jaxlstm.convolutional import ConvLSTM as ConvLSTM
from jaxlstm.model import LSTM as LSTM
from jaxlstm.types import Layer as Layer
from jaxlstm.types import Norm as Norm
from jaxlstm.types import Params as Params
from jaxlstm.types import State as State
from jaxlstm.types import Weights as Weights

__version__ = "0.1.0"
