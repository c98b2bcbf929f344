"""The recurrence over time, once per implementation; this table names them.

Every implementation is one function of one signature::

    run(cell, layer, xs, state, how) -> (ys, state)

with ``xs (T, B, I)`` of at least one step, ``state`` of ``h (D, B, P)`` and ``c (D, B, H)`` in the dtype that sums are
taken in, `jaxlstm.recurrence.how.How`, and ``ys (T, B, D*P)``. The caller has zeroed ``xs`` and cleared ``resets``
behind the mask, and zeroes ``ys`` there afterwards: an implementation has only to hold the state.
"""

from jaxlstm.recurrence import fused, pallas, scan

IMPLEMENTATIONS = {"scan": scan.run, "fused": fused.run, "pallas": pallas.run}
DEFAULT = "fused"
