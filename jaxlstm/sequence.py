"""One layer over time: lengths, masks, resets, direction and carry, the same for every implementation."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlstm.cells import Cell
from jaxlstm.recurrence import DEFAULT, IMPLEMENTATIONS
from jaxlstm.recurrence.how import How
from jaxlstm.types import Layer, State


def steps_taken(
    num_steps: int, lengths: Int[Array, "*batch"] | None, mask: Bool[Array, "T *batch"] | None
) -> Bool[Array, "T *batch"] | None:
    """Which steps are taken, ``(T, *batch)``: those before the length and under the mask. None means all."""
    if lengths is None:
        return mask
    step = jnp.arange(num_steps, dtype=lengths.dtype).reshape(num_steps, *[1] * lengths.ndim)
    within = step < lengths[None]
    return within if mask is None else within & mask


def run(
    cell: Cell,
    layer: Layer,
    xs: Float[Array, "T *batch I"],
    state: State,
    how: How,
    implementation: str | None,
) -> tuple[Float[Array, "T *batch DP"], State]:
    """One layer over time.

    A step that the mask leaves out does not exist: its input is never read, its output is zero, the state passes it
    unchanged and a reset marked on it has no effect.

    Args:
      cell: the cell.
      layer: its weights, in one direction or two.
      xs: inputs.
      state: initial state of this layer, h ``(D, *batch, P)`` and c ``(D, *batch, H)``.
      how: the rest, with ``*batch`` for B in its arrays.
      implementation: a name in `jaxlstm.recurrence.IMPLEMENTATIONS`, None for the default.

    Returns:
      outputs and the state after the last step taken.
    """
    num_steps, *batch, _ = xs.shape
    if num_steps == 0:
        return jnp.zeros((0, *batch, len(layer.directions) * state.h.shape[-1]), how.dtype), state
    mask = how.mask
    if mask is not None:
        xs = jnp.where(mask[..., None], xs, 0)
        how = how._replace(resets=None if how.resets is None else how.resets & mask)
    ys, last = IMPLEMENTATIONS[implementation or DEFAULT](
        cell,
        layer,
        _one_batch_axis(xs, 1, batch),
        jax.tree.map(lambda a: _one_batch_axis(a, 1, batch), state),
        how._replace(
            mask=None if mask is None else _one_batch_axis(mask, 1, batch),
            resets=None if how.resets is None else _one_batch_axis(how.resets, 1, batch),
            noise=jax.tree.map(lambda a: _one_batch_axis(a, 2, batch), how.noise),
        ),
    )
    ys = ys.reshape(num_steps, *batch, ys.shape[-1])
    if mask is not None:
        ys = jnp.where(mask[..., None], ys, 0)
    return ys, jax.tree.map(lambda a: a.reshape(a.shape[0], *batch, a.shape[-1]), last)


def _one_batch_axis(a: Array, axis: int, batch: list[int]) -> Array:
    """``a`` with the batch axes, which begin at ``axis``, folded into one."""
    return a.reshape(*a.shape[:axis], math.prod(batch), *a.shape[axis + len(batch) :])
