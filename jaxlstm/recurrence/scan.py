"""The reference: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import Noise
from jaxlstm.recurrence import chunks
from jaxlstm.recurrence.how import How
from jaxlstm.step import input_part, step
from jaxlstm.types import Layer, State, Weights


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`."""
    outputs, states = [], []
    for d, weights in enumerate(layer.directions):
        before, start, noise = jax.tree.map(lambda a: a[d], (state, how.start, how.noise))  # noqa: B023  (called at once)
        ys, last = _direction(cell, weights, xs, before, start, noise, how._replace(reverse=how.reverse ^ (d == 1)))
        outputs.append(ys)
        states.append(last)
    return jnp.concatenate(outputs, axis=-1), jax.tree.map(lambda *a: jnp.stack(a), *states)


def _direction(
    cell: Cell, weights: Weights, xs: Array, state: State, start: State | None, noise: Noise, how: How
) -> tuple[Array, State]:
    """One direction: ``ys (T, B, P)`` and the last state."""

    def body(before: State, now: Any) -> tuple[State, Array]:
        z_x, taken, first, noise = now
        begin = before if how.reverse else restart(first, start, before)
        after = step(cell, weights, z_x, begin, how.dtype, how.rates, noise)
        y = after.h
        if taken is not None:
            after = jax.tree.map(lambda new, old: jnp.where(taken[:, None], new, old), after, before)
        return (restart(first, start, after) if how.reverse else after), y

    def over_time(before: State, steps: Any) -> tuple[State, Array]:
        xs, *rest = steps
        z_x = input_part(weights, xs, how.dtype, state.h.dtype)
        return lax.scan(body, before, (z_x, *rest), reverse=how.reverse, unroll=how.unroll)

    steps = (xs, how.mask, how.resets, noise)
    if how.remat is None:
        last, ys = over_time(state, steps)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunks.over(jax.checkpoint(over_time), state, steps, size=how.remat, reverse=how.reverse)
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return ys.astype(how.dtype), last


def restart(rows: Array | None, start: State | None, state: State) -> State:
    """``state (B, .)`` with the marked rows of the batch at ``start (.,)``, zeros where None."""
    if rows is None:
        return state
    if start is None:
        return jax.tree.map(lambda a: jnp.where(rows[:, None], 0, a), state)
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None], jnp.broadcast_to(b, a.shape), a), state, start)
