"""Lengths, masks, resets, direction of time and batch axes, once for every backend.

`scan_masked` prepares the directions of a backend and merges its results; the steps of a backend call `restart` and
`hold_skipped`.

A skipped step does not exist: its input is never read, its output is zero, the state passes it unchanged, and a reset
marked on it has no effect.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxlstm.params import Layer, Size, State
from jaxlstm.primitives.pytrees import tree_flip, tree_index, tree_stack
from jaxlstm.recurrence.context import Direction, LayerInputs, Results


def step_mask(
    num_steps: Size, lengths: Int[Array, "*batch"] | None, mask: Bool[Array, "T *batch"] | None
) -> Bool[Array, "T *batch"] | None:
    """Returns True at the steps before the length and under the mask; None if no step is skipped."""
    if lengths is None:
        return mask
    step = jnp.arange(num_steps, dtype=lengths.dtype).reshape(num_steps, *[1] * lengths.ndim)
    within = step < lengths[None]
    return within if mask is None else within & mask


def expand_to_rank(mask: Bool[Array, "*batch"], a: Array) -> Bool[Array, "*batch_and_ones"]:
    """Appends axes of size 1 to ``mask`` until it has as many axes as ``a``."""
    return jnp.expand_dims(mask, tuple(range(mask.ndim, a.ndim)))


def hold_skipped(
    mask: Array | None, new: State, old: State, expand: Callable[[Array, Array], Array] = expand_to_rank
) -> State:
    """Returns the state after a step: ``new``, or ``old`` in the rows where the step is skipped.

    Args:
      mask: ``(B,)`` bool, False where the step is skipped; None if no step is.
      new: the state that the step computed.
      old: the state before the step.
      expand: ``(mask, array)`` to the mask with the axes of the array.
    """
    if mask is None:
        return new
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a), a, b), new, old)


def restart(
    mask: Array | None,
    restart_state: State | None,
    state: State,
    expand: Callable[[Array, Array], Array] = expand_to_rank,
    expand_units: Callable[[Array], Array] = lambda v: v,
) -> State:
    """Returns ``state`` with the masked rows set to ``restart_state``, or to zeros if it is None.

    Args:
      mask: ``(B,)`` bool; None if no row restarts.
      restart_state: arrays ``(*units)``.
      state: arrays ``(B, *units)``, or with their axes in another order.
      expand: ``(mask, array)`` to the mask with the axes of the array.
      expand_units: ``(*units)`` to an array that broadcasts to the state.
    """
    if mask is None:
        return state
    if restart_state is None:
        return jax.tree.map(lambda a: jnp.where(expand(mask, a), 0, a), state)
    return jax.tree.map(
        lambda a, v: jnp.where(expand(mask, a), jnp.broadcast_to(expand_units(v), a.shape), a), state, restart_state
    )


def shift_state(initial: State, states: State) -> State:
    """Returns the state before each step, from the initial state and the states after each step ``(T, ...)``."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), initial, states)


def match_sharding(xs: Float[Array, "T *batch_and_inputs"], state: State) -> State:
    """Gives a state ``(., *batch, *units)`` the sharding of the batch of ``xs``; `jax.lax.scan` requires it."""
    if xs.shape[0] == 0:
        return state
    row = jnp.zeros_like(xs[0, ..., :1])
    return jax.tree.map(lambda a: a + jnp.broadcast_to(row.astype(a.dtype), a.shape), state)


def match_vma(args: Any, state: State) -> State:
    """Makes a state within `jax.shard_map` vary over every mesh axis that an argument varies over.

    Their varying manual axes (vma) must agree; `jax.lax.scan` requires it.
    """
    if not any(jax.typeof(a).sharding.mesh.manual_axes for a in jax.tree.leaves((args, state))):
        return state

    def zero(a: Array) -> Array:
        return jnp.zeros_like(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, shape=())

    zeros = [zero(a) for a in jax.tree.leaves(args)]
    return jax.tree.map(lambda a: sum((z.astype(a.dtype) for z in zeros), a), state)


def empty_sequence(state: State, dtype: DTypeLike) -> tuple[Float[Array, "0 *batch_and_outputs"], State]:
    """Returns the result of a recurrence over no steps: no outputs, and the state unchanged."""
    directions, *axes, size = state.h.shape
    return jnp.zeros((0, *axes, directions * size), dtype), state


def concat_directions(dtype: DTypeLike) -> Callable[[Sequence[Array]], Array]:
    """Returns a function that concatenates the outputs of all directions along the last axis and casts them."""
    # Cast after the loop: inside it XLA:CPU rewrites the whole bfloat16 array every step.
    return lambda outputs: jnp.concatenate(outputs, axis=-1).astype(dtype)


def scan_masked(
    backend: Callable[[tuple[Direction, ...]], Results],
    layer: Layer,
    xs: Float[Array, "T *batch_and_inputs"],
    state: State,
    inputs: LayerInputs,
    *,
    reverse: bool,
    batch_axes: int,
    merge: Callable[[Sequence[Any]], Any],
) -> tuple[Any, State]:
    """Runs a layer by a backend that knows only directions that run forward over one batch axis.

    Args:
      backend: runs the directions, see `jaxlstm.recurrence.context`.
      layer: the weights.
      xs: inputs, ``(T, *batch, *inputs)`` with T at least 1.
      state: initial state, ``(D, *batch, *units)``.
      inputs: masks and resets.
      reverse: whether the first direction runs backward in time, and the second forward.
      batch_axes: number of batch axes.
      merge: combines the outputs of the directions, trees of arrays ``(T, B, ...)``.

    Returns:
      merged outputs ``(T, *batch, ...)``, zero at skipped steps, and the final state ``(D, *batch, *units)``.
    """
    backward = [reverse ^ (d == 1) for d in range(len(layer.directions))]
    batch = xs.shape[1 : 1 + batch_axes]
    xs, state, folded = fold_batch(xs, state, inputs, batch_axes=batch_axes)
    directions = _directions(layer, xs, state, folded, backward)
    outputs, states = backend(directions)
    if folded.resets is not None:  # backward in time, a reset at the first step restarts the returned state
        states = [
            restart(folded.resets[0], direction.restart_state, last) if back else last
            for direction, last, back in zip(directions, states, backward)
        ]
    merged = merge([tree_flip(each) if back else each for each, back in zip(outputs, backward)])
    return unfold_batch(merged, tree_stack(list(states)), inputs.step_mask, batch)


def fold_batch(
    xs: Float[Array, "T *batch_and_inputs"], state: State, inputs: LayerInputs, *, batch_axes: int
) -> tuple[Array, State, LayerInputs]:
    """Makes all batch axes one, sets inputs to zero at skipped steps, and drops the resets there.

    Args:
      xs: inputs, ``(T, *batch, *inputs)``.
      state: initial state, ``(., *batch, *units)``.
      inputs: masks and resets.
      batch_axes: number of batch axes.
    """
    step_mask, resets = inputs.step_mask, inputs.resets
    if step_mask is not None:
        xs = jnp.where(expand_to_rank(step_mask, xs), xs, 0)
        resets = None if resets is None else resets & step_mask

    def fold(a: Array, axis: int = 1) -> Array:
        batch = a.shape[axis : axis + batch_axes]
        return a.reshape(*a.shape[:axis], math.prod(batch), *a.shape[axis + batch_axes :])

    folded = inputs._replace(
        step_mask=None if step_mask is None else fold(step_mask),
        resets=None if resets is None else fold(resets),
        lengths=None if inputs.lengths is None else inputs.lengths.ravel(),
        masks=jax.tree.map(lambda a: fold(a, 2), inputs.masks),
        z_static=None if inputs.z_static is None else fold(inputs.z_static),
    )
    return fold(xs), jax.tree.map(fold, state), folded


def unfold_batch(
    outputs: Any, state: State, step_mask: Bool[Array, "T *batch"] | None, batch: tuple[Size, ...]
) -> tuple[Any, State]:
    """Inverts `fold_batch` for the results of a recurrence, and sets outputs to zero at skipped steps.

    Args:
      outputs: a tree of arrays ``(T, B, ...)``.
      state: final state ``(., B, *units)``.
      step_mask: False at skipped steps; None if there are none.
      batch: sizes of the batch axes.
    """

    def unfold(a: Array) -> Array:
        return a.reshape(a.shape[0], *batch, *a.shape[2:])

    outputs = jax.tree.map(unfold, outputs)
    if step_mask is not None:
        outputs = jax.tree.map(lambda a: jnp.where(expand_to_rank(step_mask, a), a, 0), outputs)
    return outputs, jax.tree.map(unfold, state)


def _directions(
    layer: Layer, xs: Array, state: State, inputs: LayerInputs, backward: Sequence[bool]
) -> tuple[Direction, ...]:
    """Splits a layer into its directions, those that run backward in time flipped."""
    directions = []
    for d, (weights, back) in enumerate(zip(layer.directions, backward)):
        over_time = (xs, inputs.step_mask, inputs.resets, tree_index(inputs.masks, d))
        x, step_mask, restarts, masks = tree_flip(over_time) if back else over_time
        if back and restarts is not None:  # a reset at a step is a restart before the next one
            restarts = jnp.concatenate([jnp.zeros_like(restarts[:1]), restarts[:-1]])
        initial, restart_state, z_static = tree_index((state, inputs.restart_state, inputs.z_static), d)
        directions.append(Direction(weights, x, initial, step_mask, restarts, restart_state, masks, z_static))
    return tuple(directions)
