"""The reference: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX itself."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import Noise
from jaxlstm.recurrence import chunks
from jaxlstm.recurrence.how import How
from jaxlstm.step import input_part, step
from jaxlstm.types import Layer, State


class Equations(NamedTuple):
    """The two halves of a recurrence in one direction: what waits for no step before, and the step."""

    input_part: Callable[[Array], Array]  # xs (T, B, ...) -> z_x (T, B, ...)
    step: Callable[[Array, State, Noise], State]  # z_x, the state before, the noise of this step -> the state after


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`."""
    directions = [
        Equations(
            partial(input_part, weights, dtype=how.dtype, sums=state.h.dtype),
            partial(step, cell, weights, dtype=how.dtype, rates=how.rates),
        )
        for weights in layer.directions
    ]
    return over_time(directions, xs, state, how)


def over_time(
    directions: Sequence[Equations], xs: Float[Array, "T B *inputs"], state: State, how: How
) -> tuple[Float[Array, "T B *outputs"], State]:
    """Any recurrence over time, whatever its equations and the axes of its units, one direction after the other.

    Args:
      directions: the equations of the forward direction and, where there is one, of the backward direction.
      xs: inputs.
      state: initial state, ``(D, B, *units)``.
      how: the rest; ``*units`` for H and P in its arrays.

    Returns:
      outputs, the directions one after the other along the last axis, and the state after the last step taken.
    """
    outputs, states = [], []
    for d, equations in enumerate(directions):
        before, start, noise = jax.tree.map(lambda a: a[d], (state, how.start, how.noise))  # noqa: B023  (called at once)
        ys, last = _direction(equations, xs, before, start, noise, how._replace(reverse=how.reverse ^ (d == 1)))
        outputs.append(ys)
        states.append(last)
    return jnp.concatenate(outputs, axis=-1), jax.tree.map(lambda *a: jnp.stack(a), *states)


def _direction(
    equations: Equations, xs: Array, state: State, start: State | None, noise: Noise, how: How
) -> tuple[Array, State]:
    """One direction: ``ys (T, B, *units)`` and the last state."""

    def body(before: State, now: Any) -> tuple[State, Array]:
        z_x, taken, first, noise = now
        begin = before if how.reverse else _restart(first, start, before)
        after = equations.step(z_x, begin, noise=noise)  # pyright: ignore[reportCallIssue]
        y = after.h
        if taken is not None:
            after = jax.tree.map(lambda new, old: jnp.where(along_batch(taken, new), new, old), after, before)
        return (_restart(first, start, after) if how.reverse else after), y

    def scan(before: State, steps: Any) -> tuple[State, Array]:
        xs, *rest = steps
        return lax.scan(body, before, (equations.input_part(xs), *rest), reverse=how.reverse, unroll=how.unroll)

    steps = (xs, how.mask, how.resets, noise)
    if how.remat is None:
        last, ys = scan(state, steps)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunks.over(jax.checkpoint(scan), state, steps, size=how.remat, reverse=how.reverse)
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return ys.astype(how.dtype), last


def _restart(rows: Array | None, start: State | None, state: State) -> State:
    """``state (B, *units)`` with the marked rows of the batch at ``start (*units)``, zeros where None."""
    if rows is None:
        return state
    if start is None:
        return jax.tree.map(lambda a: jnp.where(along_batch(rows, a), 0, a), state)
    return jax.tree.map(lambda a, b: jnp.where(along_batch(rows, a), jnp.broadcast_to(b, a.shape), a), state, start)


def along_batch(marks: Bool[Array, "*batch"], a: Array) -> Bool[Array, "*batch_and_ones"]:
    """Marks over the leading axes of ``a``, with an axis of size 1 for each of its other axes."""
    return jnp.expand_dims(marks, tuple(range(marks.ndim, a.ndim)))
