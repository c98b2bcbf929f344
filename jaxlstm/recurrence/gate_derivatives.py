r"""The derivative of the LSTM's gates, arranged by hand, so that the steps of a chunk share its costly part.

Once dz_t is known, a step of the tangents is a few products and sums per unit::

    dc_t = g_t i'_t dz_i + c_{t-1} f'_t dz_f + i_t g'_t dz_g + f_t dc_{t-1}
    dh_t = tanh(c_t) o'_t dz_o + o_t (1 - tanh(c_t)^2) dc_t

where i' is the slope of i at z_i. What stands before the tangents does not depend on them: `of` computes it for many
steps at once. What waits for the step before is `step`, and its transpose. It is the same with coupled gates, where the
candidate has 1 - f for i. The derivative of any other cell is taken of its gates in each step, by `jax.jvp`, which
does more work there.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm import cells
from jaxlstm.cells import Gates
from jaxlstm.recurrence import cpu_activations
from jaxlstm.recurrence.step import slabs


class Partials(NamedTuple):
    """What stands before the tangents. Here B stands for either order of axes."""

    z: Array  # (*T, G*H, B): of h by the last slab of z, of c by the others
    c: Array  # (*T, H, B): of c by the c before
    h: Array  # (*T, H, B): of h by c


def _lstm(i: Array, f: Array, g: Array, o: Array, c: Array, keep: Any) -> tuple[list[Array], Array, Array]:
    """The partials of ``f c + i g`` by its gates, by c, and its value."""
    return [g * keep, c, i * keep], f, f * c + i * (g * keep)


def _coupled(f: Array, g: Array, o: Array, c: Array, keep: Any) -> tuple[list[Array], Array, Array]:
    """The partials of ``f c + (1 - f) g`` by its gates, by c, and its value."""
    return [c - g * keep, (1 - f) * keep], f, f * c + (1 - f) * (g * keep)


ARRANGED = {cells.lstm: ("ssts", _lstm), cells.coupled: ("sts", _coupled)}  # of both, h = o tanh(c)


def of(gates: Gates, z: Float[Array, "T _ _"], c: Float[Array, "T _ _"], keep: Any, axis: int) -> Partials:
    """The partials of many steps.

    Args:
      gates: of those in `ARRANGED`.
      z: pre-activations, ``(T, G*H, B)`` or ``(T, B, G*H)``.
      c: the cell state before each step, ``(T, H, B)`` or ``(T, B, H)``.
      keep: a scale of the candidate, of the shape of ``c``, or 1.
      axis: of the units in the arrays of one step.
    """
    kinds, arranged = ARRANGED[gates]
    z_slabs = slabs(z, len(kinds), axis + 1)
    scale, activated = cells.scales(z_slabs, kinds), cells.sigmoid_or_tanh(z_slabs, kinds)
    slope = cells.slope(activated, scale)
    *_, o = each = jnp.unstack(activated)
    by_gates, by_c, c = arranged(*each, c, keep)
    tanh = jnp.tanh(c)
    by_z = jnp.moveaxis(slope, 0, axis + 1) * jnp.stack([*by_gates, tanh], axis + 1)
    return Partials(by_z.reshape(z.shape), by_c, o * (1 - tanh**2))


def step(p: Partials, dz: Float[Array, "_ _"], dc: Float[Array, "_ _"], axis: int) -> tuple[Array, Array]:
    """The tangents of ``(c, h)`` after one step, from those of its pre-activations and of ``c`` before it."""
    *to_c, to_h = _cut(p.z * dz, dz.shape[axis] // dc.shape[axis], axis)
    dc = sum(to_c, p.c * dc)
    return dc, to_h + p.h * dc


def _cut(dz: Array, gates: int, axis: int) -> list[Array]:
    """The slabs of ``dz``, one by one, in the way whose transpose is the quicker one on a CPU.

    Where the units lead, that is a sum of selections: XLA counts them as operations, and so shares them out over its
    threads (`jaxlstm.recurrence.cpu_activations`). Elsewhere it is one concatenation.
    """
    if axis == 1:
        return list(lax.split(dz, [dz.shape[1] // gates] * gates, axis=1))
    return cpu_activations.selected(slabs(dz, gates, axis))
