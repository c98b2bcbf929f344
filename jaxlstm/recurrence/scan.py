"""The reference: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX itself."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import Layer, State
from jaxlstm.recurrence import chunked_scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import input_part, step


class Equations(NamedTuple):
    """The two halves of a recurrence in one direction: what waits for no step before, and the step."""

    input_part: Callable[[Array], Any]  # xs (T, B, ...) -> z_x, a tree of arrays (T, B, ...)
    step: Callable[
        [Any, State, RegularizerMasks], tuple[State, Any]
    ]  # z_x, the state before, the noise of this step -> the
    # state after, and what the step puts out: a tree of arrays (B, ...)


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`."""
    directions = [
        Equations(
            partial(input_part, weights, dtype=how.dtype, sums=state.h.dtype),
            puts_out_h(partial(step, cell, weights, dtype=how.dtype, rates=how.rates)),
        )
        for weights in layer.directions
    ]
    return side_by_side(*over_time(directions, xs, state, how), how.dtype)


def puts_out_h(step: Callable[..., State]) -> Callable[[Any, State, RegularizerMasks], tuple[State, Array]]:
    """A step of `Equations`, from one that returns the state after it."""

    def step_and_output(z_x: Any, before: State, noise: RegularizerMasks) -> tuple[State, Array]:
        after = step(z_x=z_x, before=before, noise=noise)
        return after, after.h

    return step_and_output


def side_by_side(outputs: Sequence[Array], state: State, dtype: DTypeLike) -> tuple[Array, State]:
    """The outputs of all directions one after the other along the last axis, in ``dtype``; and the state."""
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return jnp.concatenate(outputs, axis=-1).astype(dtype), state


def over_time(
    directions: Sequence[Equations], xs: Float[Array, "T B *inputs"], state: State, how: How
) -> tuple[list[Any], State]:
    """Any recurrence over time, whatever its equations and the axes of its units, one direction after the other.

    Args:
      directions: the equations of the forward direction and, where there is one, of the backward direction.
      xs: inputs.
      state: initial state, ``(D, B, *units)``.
      how: the rest; ``*units`` for H and P in its arrays.

    Returns:
      what the steps of each direction put out, with a leading axis of time, and the state after the last step taken.
    """
    outputs, states = [], []
    for d, equations in enumerate(directions):
        before, start, noise = jax.tree.map(lambda a: a[d], (state, how.start, how.noise))  # noqa: B023  (called at once)
        output, last = _direction(equations, xs, before, start, noise, how._replace(reverse=how.reverse ^ (d == 1)))
        outputs.append(output)
        states.append(last)
    return outputs, jax.tree.map(lambda *a: jnp.stack(a), *states)


def _direction(
    equations: Equations, xs: Array, state: State, start: State | None, noise: RegularizerMasks, how: How
) -> tuple[Any, State]:
    """One direction: what its steps put out, and the last state."""

    def body(before: State, now: Any) -> tuple[State, Any]:
        z_x, taken, first, noise = now
        begin = before if how.reverse else restart(first, start, before)
        after, output = equations.step(z_x, begin, noise)
        if taken is not None:
            after = jax.tree.map(lambda new, old: jnp.where(along_batch(taken, new), new, old), after, before)
        return (restart(first, start, after) if how.reverse else after), output

    def scan(before: State, steps: Any) -> tuple[State, Any]:
        xs, *rest = steps
        return lax.scan(body, before, (equations.input_part(xs), *rest), reverse=how.reverse, unroll=how.unroll)

    steps = (xs, how.mask, how.resets, noise)
    if how.remat is None:
        last, outputs = scan(state, steps)
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, outputs = chunked_scan.over(jax.checkpoint(scan), state, steps, size=how.remat, reverse=how.reverse)
    return outputs, last


def restart(rows: Array | None, start: State | None, state: State) -> State:
    """``state (B, *units)`` with the marked rows of the batch at ``start (*units)``, zeros where None."""
    if rows is None:
        return state
    if start is None:
        return jax.tree.map(lambda a: jnp.where(along_batch(rows, a), 0, a), state)
    return jax.tree.map(lambda a, b: jnp.where(along_batch(rows, a), jnp.broadcast_to(b, a.shape), a), state, start)


def along_batch(marks: Bool[Array, "*batch"], a: Array) -> Bool[Array, "*batch_and_ones"]:
    """Marks over the leading axes of ``a``, with an axis of size 1 for each of its other axes."""
    return jnp.expand_dims(marks, tuple(range(marks.ndim, a.ndim)))
