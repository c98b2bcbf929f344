"""The reference: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX itself."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm import cells
from jaxlstm.cells import Cell
from jaxlstm.recurrence import chunks
from jaxlstm.types import Layer, State, Weights


def run(
    cell: Cell,
    layer: Layer,
    xs: Float[Array, "T B I"],
    state: State,
    *,
    mask: Bool[Array, "T B"] | None,
    resets: Bool[Array, "T B"] | None,
    reverse: bool,
    dtype: DTypeLike,
    unroll: int,
    remat: int | None,
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`."""
    outputs, states = [], []
    for d, weights in enumerate(layer.directions):
        ys, last = _direction(
            cell,
            weights,
            xs,
            jax.tree.map(lambda a: a[d], state),  # noqa: B023  (called at once)
            mask,
            resets,
            reverse=reverse ^ (d == 1),
            dtype=dtype,
            unroll=unroll,
            remat=remat,
        )
        outputs.append(ys)
        states.append(last)
    return jnp.concatenate(outputs, axis=-1), jax.tree.map(lambda *a: jnp.stack(a), *states)


def _direction(
    cell: Cell,
    weights: Weights,
    xs: Array,
    state: State,
    mask: Array | None,
    resets: Array | None,
    *,
    reverse: bool,
    dtype: DTypeLike,
    unroll: int,
    remat: int | None,
) -> tuple[Array, State]:
    """One direction: ``ys (T, B, P)`` and the last state."""

    def body(before: State, inputs: tuple[Array, Array | None, Array | None]) -> tuple[State, Array]:
        z_x, taken, first = inputs
        start = before if reverse else _zero_where(first, before)
        after = State(*cells.step(cell, weights, z_x, start.h, start.c, dtype))
        y = after.h
        if taken is not None:
            after = jax.tree.map(lambda new, old: jnp.where(taken[:, None], new, old), after, before)
        return (_zero_where(first, after) if reverse else after), y

    def over_time(before: State, steps: tuple[Array, Array | None, Array | None]) -> tuple[State, Array]:
        xs, taken, first = steps
        z_x = cells.input_part(weights, xs, dtype, state.h.dtype)
        return lax.scan(body, before, (z_x, taken, first), reverse=reverse, unroll=unroll)

    if remat is None:
        last, ys = over_time(state, (xs, mask, resets))
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunks.over(jax.checkpoint(over_time), state, (xs, mask, resets), size=remat, reverse=reverse)
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return ys.astype(dtype), last


def _zero_where(rows: Array | None, state: State) -> State:
    """``state`` with the marked rows of the batch at zero."""
    if rows is None:
        return state
    return jax.tree.map(lambda a: jnp.where(rows[:, None], 0, a), state)
