"""Backends of the recurrence over time, and everything they share.

`jaxlstm.recurrence.context` has the contract of a backend, `jaxlstm.recurrence.masking` handles lengths, masks, resets
and direction for all of them, and `jaxlstm.recurrence.backends` is the table of their names.
"""

import importlib
from typing import Any

from jaxlstm.recurrence.backends import BACKENDS as BACKENDS
from jaxlstm.recurrence.backends import EXPERIMENTAL as EXPERIMENTAL
from jaxlstm.recurrence.backends import MULTILAYER_BACKENDS as MULTILAYER_BACKENDS
from jaxlstm.recurrence.backends import Implementation as Implementation
from jaxlstm.recurrence.selection import BackendChoice as BackendChoice
from jaxlstm.recurrence.selection import explain as explain


def __getattr__(name: str) -> Any:
    """Imports a backend when it is first used, such as ``jaxlstm.recurrence.fused.Fused``."""
    if name in BACKENDS and name not in EXPERIMENTAL:
        return importlib.import_module(f"jaxlstm.recurrence.{name}")
    raise AttributeError(f"module 'jaxlstm.recurrence' has no attribute {name!r}")
