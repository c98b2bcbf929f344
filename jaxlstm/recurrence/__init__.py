"""The recurrence over time, once per implementation; this table names them.

Every implementation is one function of one signature::

    run(cell, layer, xs, state, how) -> (ys, state)

with ``xs (T, B, I)`` of at least one step, ``state`` of ``h (D, B, P)`` and ``c (D, B, H)`` in the dtype that sums are
taken in, `jaxlstm.recurrence.how.How`, and ``ys (T, B, D*P)``. The caller has zeroed ``xs`` and cleared ``resets``
behind the mask, and zeroes ``ys`` there afterwards: an implementation has only to hold the state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlstm.recurrence import cudnn, fused, newton, pallas, scan, sharded
from jaxlstm.recurrence.choice import Choice as Choice
from jaxlstm.recurrence.choice import explain as explain
from jaxlstm.recurrence.newton import Newton as Newton

IMPLEMENTATIONS = {
    "scan": scan.run,
    "fused": fused.run,
    "newton": newton.run,
    "pallas": pallas.run,
    "cudnn": cudnn.run,
}
OF_LAYERS = ("cudnn",)  # take a tuple of layers too, with the state of all of them, where nothing is between
OVER_DEVICES = {"sharded": sharded.run}  # needs a mesh to be more than "scan"
Implementation = str | Newton  # a name, or one with options


def runs(implementation: Implementation) -> Callable[..., Any]:
    """The function behind a name in the tables, or behind options."""
    if isinstance(implementation, Newton):
        return partial(newton.run, options=implementation)
    return (IMPLEMENTATIONS | OVER_DEVICES)[implementation]
