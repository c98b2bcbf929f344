"""One layer over time: lengths, masks, resets, direction and carry, the same for every implementation."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm.cells import Cell
from jaxlstm.recurrence import DEFAULT, IMPLEMENTATIONS
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
    *,
    mask: Bool[Array, "T *batch"] | None,
    resets: Bool[Array, "T *batch"] | None,
    reverse: bool,
    dtype: DTypeLike,
    unroll: int,
    remat: int | None,
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
      mask: steps taken; None for all.
      resets: first steps of a new sequence; None for none.
      reverse: whether the forward direction runs backward in time, and the backward one forward.
      dtype: of matrix products and outputs.
      unroll: steps per iteration of the compiled loop.
      remat: steps per rematerialised chunk, None for no rematerialisation.
      implementation: a name in `jaxlstm.recurrence.IMPLEMENTATIONS`, None for the default.

    Returns:
      outputs and the state after the last step taken.
    """
    num_steps, *batch, _ = xs.shape
    if num_steps == 0:
        return jnp.zeros((0, *batch, len(layer.directions) * state.h.shape[-1]), dtype), state
    rows = math.prod(batch)
    if mask is not None:
        xs = jnp.where(mask[..., None], xs, 0)
        resets = None if resets is None else resets & mask
    ys, last = IMPLEMENTATIONS[implementation or DEFAULT](
        cell,
        layer,
        xs.reshape(num_steps, rows, xs.shape[-1]),
        jax.tree.map(lambda a: a.reshape(a.shape[0], rows, a.shape[-1]), state),
        mask=None if mask is None else mask.reshape(num_steps, rows),
        resets=None if resets is None else resets.reshape(num_steps, rows),
        reverse=reverse,
        dtype=dtype,
        unroll=unroll,
        remat=remat,
    )
    ys = ys.reshape(num_steps, *batch, ys.shape[-1])
    if mask is not None:
        ys = jnp.where(mask[..., None], ys, 0)
    return ys, jax.tree.map(lambda a: a.reshape(a.shape[0], *batch, a.shape[-1]), last)
