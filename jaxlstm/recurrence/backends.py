"""The table of backends. To add one, name its function here and give it a line in `jaxlstm.recurrence.selection`.

A backend is loaded when it is first used.
"""

import importlib
from typing import Any, Literal

from jaxlstm.recurrence.context import Backend

ImplementationName = Literal["scan", "fused", "tensor_parallel", "associative", "newton", "pallas", "cudnn"]
Implementation = ImplementationName | Backend  # a name, or a hashable callable such as a backend with options

# "module:function"; the signature is in `jaxlstm.recurrence.context`.
BACKENDS = {
    "scan": "jaxlstm.recurrence.scan:run",
    "fused": "jaxlstm.recurrence.fused:run",
    "tensor_parallel": "jaxlstm.recurrence.tensor_parallel:run",
    "associative": "jaxlstm.experimental.associative:run",
    "newton": "jaxlstm.experimental.newton:run",
    "pallas": "jaxlstm.experimental.pallas.api:run",
}
# Backends that run a whole stack of layers with unequal lengths in one call:
# run_stack(cell, layers, xs, state, inputs, context, reverse) -> (ys, state), with one batch axis.
MULTILAYER_BACKENDS = {"cudnn": "jaxlstm.experimental.cudnn:run_stack"}
# Classes of backends with options, frozen dataclasses whose fields are JSON values; their instances are backends.
OPTION_CLASSES = {
    "Scan": "jaxlstm.recurrence.scan:Scan",
    "Fused": "jaxlstm.recurrence.fused:Fused",
    "Newton": "jaxlstm.experimental.newton:Newton",
}
NAMES = (*BACKENDS, *MULTILAYER_BACKENDS)
EXPERIMENTAL = ("associative", "newton", "pallas", "cudnn")  # not shown to pay off on the hardware they are for


def get_backend(implementation: Implementation) -> Backend:
    """Returns a backend by its name; a callable is returned unchanged."""
    return load(BACKENDS[implementation]) if isinstance(implementation, str) else implementation


def load(path: str) -> Any:
    """Imports the object that ``"module:name"`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
