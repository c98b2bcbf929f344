"""The recurrence over time, once per implementation; this table names them.

Every implementation is one function of one signature::

    run(cell, layer, xs, state, how) -> (ys, state)

with ``xs (T, B, I)`` of at least one step, ``state`` of ``h (D, B, P)`` and ``c (D, B, H)`` in the dtype that sums are
taken in, `jaxlstm.recurrence.context.How`, and ``ys (T, B, D*P)``. The caller has zeroed ``xs`` and cleared ``resets``
behind the mask, and zeroes ``ys`` there afterwards: an implementation has only to hold the state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlstm.experimental import cudnn, newton
from jaxlstm.experimental.newton import Newton as Newton
from jaxlstm.experimental.pallas import api
from jaxlstm.recurrence import fused, scan, tensor_parallel
from jaxlstm.recurrence.selection import BackendChoice as BackendChoice
from jaxlstm.recurrence.selection import explain as explain

IMPLEMENTATIONS = {
    "scan": scan.run,
    "fused": fused.run,
    "newton": newton.run,
    "pallas": api.run,
    "cudnn": cudnn.run,
}
OF_LAYERS = ("cudnn",)  # take a tuple of layers too, with the state of all of them, where nothing is between
OVER_DEVICES = {"sharded": tensor_parallel.run}  # needs a mesh to be more than "scan"
Implementation = str | Newton  # a name, or one with options


def runs(implementation: Implementation) -> Callable[..., Any]:
    """The function behind a name in the tables, or behind options."""
    if isinstance(implementation, Newton):
        return partial(newton.run, options=implementation)
    return (IMPLEMENTATIONS | OVER_DEVICES)[implementation]
