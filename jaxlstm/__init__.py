"""The LSTM for JAX: pure functions, a compiled scan, and gate equations that read like the paper.

Everything is imported when it is first used, so that commands start, and end on Ctrl-C, before JAX is imported.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlstm import activation_regularization as activation_regularization
    from jaxlstm import autotuning as autotuning
    from jaxlstm import cells as cells
    from jaxlstm import diagnostics as diagnostics
    from jaxlstm import experimental as experimental
    from jaxlstm import export as export
    from jaxlstm import flax as flax
    from jaxlstm import initializers as initializers
    from jaxlstm import interop as interop
    from jaxlstm import packing as packing
    from jaxlstm import recurrence as recurrence
    from jaxlstm import rl as rl
    from jaxlstm import training as training
    from jaxlstm.autotuning import Tuning as Tuning
    from jaxlstm.autotuning import autotune as autotune
    from jaxlstm.autotuning import load_tuning as load_tuning
    from jaxlstm.cells import Cell as Cell
    from jaxlstm.conv_lstm import ConvLSTM as ConvLSTM
    from jaxlstm.lstm import GRU as GRU
    from jaxlstm.lstm import LSTM as LSTM
    from jaxlstm.outputs import last_outputs as last_outputs
    from jaxlstm.params import Layer as Layer
    from jaxlstm.params import Norm as Norm
    from jaxlstm.params import Params as Params
    from jaxlstm.params import State as State
    from jaxlstm.params import Weights as Weights
    from jaxlstm.residual import ResidualStack as ResidualStack
    from jaxlstm.rnn import RNN as RNN

__version__ = "0.1.0"

_MODULES = {  # by name: the module that defines it
    "GRU": "lstm",
    "LSTM": "lstm",
    "RNN": "rnn",
    "Cell": "cells",
    "ConvLSTM": "conv_lstm",
    "Layer": "params",
    "Norm": "params",
    "Params": "params",
    "ResidualStack": "residual",
    "State": "params",
    "Tuning": "autotuning",
    "Weights": "params",
    "autotune": "autotuning",
    "last_outputs": "outputs",
    "load_tuning": "autotuning",
}
_SUBMODULES = (
    *(
        "activation_regularization",
        "autotuning",
        "cells",
        "diagnostics",
        "experimental",
        "export",
        "flax",
        "initializers",
    ),
    *("interop", "packing", "recurrence", "rl", "training"),
)
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "ConvLSTM",
    "Layer",
    "Norm",
    "Params",
    "ResidualStack",
    "State",
    "Tuning",
    "Weights",
    "autotune",
    "last_outputs",
    "load_tuning",
]


def __getattr__(name: str) -> Any:
    """Imports a name or a submodule when it is first used."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"jaxlstm.{_MODULES[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value
    if not name.startswith("_") and find_spec(f"jaxlstm.{name}") is not None:
        try:
            return importlib.import_module(f"jaxlstm.{name}")
        except ImportError as error:  # an optional package is missing: `hasattr` and `help` still work
            raise AttributeError(str(error)) from None
    raise AttributeError(f"module 'jaxlstm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names."""
    return sorted([*__all__, *_SUBMODULES, "__version__"])
