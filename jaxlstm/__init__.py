"""The LSTM for JAX: pure functions, a compiled scan, and gate equations that read like the paper."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlstm import cells as cells
from jaxlstm.cells import Cell as Cell
from jaxlstm.conv_lstm import ConvLSTM as ConvLSTM
from jaxlstm.lstm import LSTM as LSTM
from jaxlstm.outputs import last_outputs as last_outputs
from jaxlstm.params import Layer as Layer
from jaxlstm.params import Norm as Norm
from jaxlstm.params import Params as Params
from jaxlstm.params import State as State
from jaxlstm.params import Weights as Weights

if TYPE_CHECKING:
    from jaxlstm import activation_regularization as activation_regularization
    from jaxlstm import diagnostics as diagnostics
    from jaxlstm import experimental as experimental
    from jaxlstm import export as export
    from jaxlstm import flax as flax
    from jaxlstm import initializers as initializers
    from jaxlstm import interop as interop
    from jaxlstm import packing as packing
    from jaxlstm import recurrence as recurrence
    from jaxlstm import training as training

__version__ = "0.1.0"

__all__ = ["LSTM", "Cell", "ConvLSTM", "Layer", "Norm", "Params", "State", "Weights", "cells", "last_outputs"]
_SUBMODULES = (
    *("activation_regularization", "diagnostics", "experimental", "export", "flax", "initializers", "interop"),
    *("packing", "recurrence", "training"),
)


def __getattr__(name: str) -> Any:
    """Imports a submodule when it is first used."""
    if name in _SUBMODULES:
        try:
            return importlib.import_module(f"jaxlstm.{name}")
        except ImportError as error:  # an optional package is missing: `hasattr` and `help` still work
            raise AttributeError(str(error)) from None
    raise AttributeError(f"module 'jaxlstm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted([*__all__, *_SUBMODULES, "__version__"])
