"""The recurrence over time, once per implementation; this table names them.

Every implementation is one function of one signature::

    run(cell, layer, xs, state, *, mask, resets, reverse, dtype, unroll, remat) -> (ys, state)

with ``xs (T, B, I)`` of at least one step, ``state`` of ``h (D, B, P)`` and ``c (D, B, H)`` in the dtype that sums are
taken in, ``mask`` and ``resets`` ``(T, B)`` bool or None, and ``ys (T, B, D*P)`` in ``dtype``. The caller has zeroed
``xs`` and cleared ``resets`` behind the mask, and zeroes ``ys`` there afterwards: an implementation has only to hold
the state.
"""

from jaxlstm.recurrence import fused, scan

IMPLEMENTATIONS = {"scan": scan.run, "fused": fused.run}
DEFAULT = "fused"
