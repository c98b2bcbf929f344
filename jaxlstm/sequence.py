"""One layer over time: lengths, masks, resets, direction and carry, the same for every implementation."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm.cells import Cell
from jaxlstm.recurrence import DEFAULT, IMPLEMENTATIONS
from jaxlstm.recurrence.scan import along_batch
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
    over_rows = partial(
        IMPLEMENTATIONS[implementation or DEFAULT],
        cell,
        layer,
        reverse=reverse,
        dtype=dtype,
        unroll=unroll,
        remat=remat,
    )
    return steps_that_exist(over_rows, xs, state, mask=mask, resets=resets, batch_axes=xs.ndim - 2, dtype=dtype)


def steps_that_exist(
    over_rows: Callable[..., tuple[Array, State]],
    xs: Float[Array, "T *batch_and_inputs"],
    state: State,
    *,
    mask: Bool[Array, "T *batch"] | None,
    resets: Bool[Array, "T *batch"] | None,
    batch_axes: int,
    dtype: DTypeLike,
) -> tuple[Float[Array, "T *batch_and_outputs"], State]:
    """A recurrence over the steps that the mask leaves in, with any number of batch axes in front of its units.

    Args:
      over_rows: ``(xs, state, mask=, resets=) -> (ys, state)`` with one batch axis. It holds the state where the mask
        is False, and is free to return anything as outputs there.
      xs: inputs, ``(T, *batch, *inputs)``.
      state: initial state, ``(D, *batch, *units)``.
      mask: steps taken; None for all.
      resets: first steps of a new sequence; None for none.
      batch_axes: how many axes the batch has.
      dtype: of outputs.
    """
    batch = xs.shape[1 : 1 + batch_axes]
    if len(xs) == 0:
        *_, size = state.h.shape
        return jnp.zeros((0, *state.h.shape[1:-1], len(state.h) * size), dtype), state
    if mask is not None:
        xs = jnp.where(along_batch(mask, xs), xs, 0)
        resets = None if resets is None else resets & mask

    def fold(a: Array) -> Array:
        return a.reshape(len(a), math.prod(batch), *a.shape[1 + batch_axes :])

    def unfold(a: Array) -> Array:
        return a.reshape(len(a), *batch, *a.shape[2:])

    xs, state, mask_of_rows, resets = jax.tree.map(fold, (xs, state, mask, resets))
    ys, last = over_rows(xs, state, mask=mask_of_rows, resets=resets)
    ys = unfold(ys)
    if mask is not None:
        ys = jnp.where(along_batch(mask, ys), ys, 0)
    return ys, jax.tree.map(unfold, last)
