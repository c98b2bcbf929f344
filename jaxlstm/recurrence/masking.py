"""One layer over time: lengths, masks, resets, direction and carry, the same for every implementation."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm.cells import Cell
from jaxlstm.params import Layer, Size, State
from jaxlstm.recurrence import Implementation, runs
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.scan import along_batch
from jaxlstm.recurrence.selection import choose


def steps_taken(
    num_steps: Size, lengths: Int[Array, "*batch"] | None, mask: Bool[Array, "T *batch"] | None
) -> Bool[Array, "T *batch"] | None:
    """Which steps are taken, ``(T, *batch)``: those before the length and under the mask. None means all."""
    if lengths is None:
        return mask
    step = jnp.arange(num_steps, dtype=lengths.dtype).reshape(num_steps, *[1] * lengths.ndim)
    within = step < lengths[None]
    return within if mask is None else within & mask


def laid_out_like(xs: Float[Array, "T *batch_and_inputs"], state: State) -> State:
    """A state ``(., *batch, *units)`` laid out over devices as the batch of ``xs`` is: `jax.lax.scan` insists on it."""
    if xs.shape[0] == 0:
        return state
    row = jnp.zeros_like(xs[0, ..., :1])
    return jax.tree.map(lambda a: a + jnp.broadcast_to(row.astype(a.dtype), a.shape), state)


def varying_like(arguments: Any, state: State) -> State:
    """A state that, within `jax.shard_map`, varies over every axis that an argument does: again for `jax.lax.scan`."""
    if not any(jax.typeof(a).sharding.mesh.manual_axes for a in jax.tree.leaves((arguments, state))):
        return state

    def zero(a: Array) -> Array:
        return jnp.zeros_like(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, shape=())

    zeros = [zero(a) for a in jax.tree.leaves(arguments)]
    return jax.tree.map(lambda a: sum((z.astype(a.dtype) for z in zeros), a), state)


def run(
    cell: Cell,
    layer: Layer | tuple[Layer, ...],
    xs: Float[Array, "T *batch I"],
    state: State,
    how: How,
    implementation: Implementation | None,
) -> tuple[Float[Array, "T *batch DP"], State]:
    """One layer over time.

    A step that the mask leaves out does not exist: its input is never read, its output is zero, the state passes it
    unchanged and a reset marked on it has no effect.

    Args:
      cell: the cell.
      layer: its weights, in one direction or two; layers for an implementation that takes several (`OF_LAYERS`).
      xs: inputs.
      state: initial state of this layer, h ``(D, *batch, P)`` and c ``(D, *batch, H)``.
      how: the rest, with ``*batch`` for B in its arrays.
      implementation: a name in the tables of `jaxlstm.recurrence`, one with options, or None for what
        `jaxlstm.recurrence.selection` takes.

    Returns:
      outputs and the state after the last step taken.
    """
    if xs.shape[0] == 0:
        return no_steps(state, how.dtype)
    over_rows = partial(runs(implementation or choose(jax.default_backend())), cell, layer)
    return steps_that_exist(over_rows, xs, state, how, batch_axes=xs.ndim - 2)


def no_steps(state: State, dtype: DTypeLike) -> tuple[Float[Array, "0 *batch_and_outputs"], State]:
    """What a recurrence over a sequence without steps returns: no outputs, and the state as it was."""
    directions, *axes, size = state.h.shape
    return jnp.zeros((0, *axes, directions * size), dtype), state


def steps_that_exist(
    over_rows: Callable[[Array, State, How], tuple[Any, State]],
    xs: Float[Array, "T *batch_and_inputs"],
    state: State,
    how: How,
    *,
    batch_axes: int,
) -> tuple[Any, State]:
    """A recurrence over the steps that the mask leaves in, with any number of batch axes in front of its units.

    Args:
      over_rows: ``(xs, state, how) -> (outputs, state)`` with one batch axis; the outputs are a tree of arrays
        ``(T, B, ...)``. It holds the state where the mask is False, and is free to put out anything there.
      xs: inputs, ``(T, *batch, *inputs)``, T at least 1.
      state: initial state, ``(D, *batch, *units)``.
      how: the rest, with ``*batch`` for B in its arrays.
      batch_axes: how many axes the batch has.

    Returns:
      outputs ``(T, *batch, ...)``, zero where the mask is False, and the last state.
    """
    batch = xs.shape[1 : 1 + batch_axes]
    mask = how.mask
    if mask is not None:
        xs = jnp.where(along_batch(mask, xs), xs, 0)
        how = how._replace(resets=None if how.resets is None else how.resets & mask)

    def fold(a: Array, axis: int = 1) -> Array:
        return a.reshape(*a.shape[:axis], math.prod(batch), *a.shape[axis + batch_axes :])

    def unfold(a: Array) -> Array:
        return a.reshape(a.shape[0], *batch, *a.shape[2:])

    xs, state, mask_of_rows, resets = jax.tree.map(fold, (xs, state, mask, how.resets))
    noise = jax.tree.map(partial(fold, axis=2), how.noise)
    lengths = None if how.lengths is None else how.lengths.ravel()
    how = how._replace(mask=mask_of_rows, resets=resets, noise=noise, lengths=lengths)
    outputs, last = over_rows(xs, state, how)
    outputs = jax.tree.map(unfold, outputs)
    if mask is not None:
        outputs = jax.tree.map(lambda a: jnp.where(along_batch(mask, a), a, 0), outputs)
    return outputs, jax.tree.map(unfold, last)
