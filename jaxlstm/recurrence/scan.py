"""The reference: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX itself."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm import cells
from jaxlstm.cells import Cell
from jaxlstm.recurrence import chunks
from jaxlstm.types import Layer, State


class Equations(NamedTuple):
    """The two halves of a recurrence in one direction: what waits for no step before, and the step."""

    input_part: Callable[[Array], Array]  # xs (T, B, ...) -> z_x (T, B, ...)
    step: Callable[[Array, Array, Array | None], tuple[Array, Array | None]]  # z_x, h, c -> h, c


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
    return over_time(
        [
            Equations(
                partial(cells.input_part, weights, dtype=dtype, sums=state.h.dtype),
                partial(cells.step, cell, weights, dtype=dtype),
            )
            for weights in layer.directions
        ],
        xs,
        state,
        mask=mask,
        resets=resets,
        reverse=reverse,
        dtype=dtype,
        unroll=unroll,
        remat=remat,
    )


def over_time(
    directions: Sequence[Equations],
    xs: Float[Array, "T B *inputs"],
    state: State,
    *,
    mask: Bool[Array, "T B"] | None,
    resets: Bool[Array, "T B"] | None,
    reverse: bool,
    dtype: DTypeLike,
    unroll: int,
    remat: int | None,
) -> tuple[Float[Array, "T B *outputs"], State]:
    """Any recurrence over time, whatever its equations and the axes of its units, one direction after the other.

    Args:
      directions: the equations of the forward direction and, where there is one, of the backward direction.
      xs: inputs.
      state: initial state, ``(D, B, *units)``.
      mask: steps taken; None for all. The outputs of the others mean nothing.
      resets: first steps of a new sequence; None for none.
      reverse: whether the forward direction runs backward in time, and the backward one forward.
      dtype: of outputs.
      unroll: steps per iteration of the compiled loop.
      remat: steps per rematerialised chunk, None for no rematerialisation.

    Returns:
      outputs, the directions one after the other along the last axis, and the state after the last step taken.
    """
    outputs, states = [], []
    for d, equations in enumerate(directions):
        ys, last = _direction(
            equations,
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
    equations: Equations,
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
    """One direction: ``ys (T, B, *units)`` and the last state."""

    def body(before: State, inputs: tuple[Array, Array | None, Array | None]) -> tuple[State, Array]:
        z_x, taken, first = inputs
        start = before if reverse else _zero_where(first, before)
        after = State(*equations.step(z_x, start.h, start.c))
        y = after.h
        if taken is not None:
            after = jax.tree.map(lambda new, old: jnp.where(along_batch(taken, new), new, old), after, before)
        return (_zero_where(first, after) if reverse else after), y

    def scan(before: State, steps: tuple[Array, Array | None, Array | None]) -> tuple[State, Array]:
        xs, taken, first = steps
        return lax.scan(body, before, (equations.input_part(xs), taken, first), reverse=reverse, unroll=unroll)

    if remat is None:
        last, ys = scan(state, (xs, mask, resets))
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunks.over(jax.checkpoint(scan), state, (xs, mask, resets), size=remat, reverse=reverse)
    # Rounded here and not in the loop: XLA on a CPU passes over a whole bfloat16 array to write one step into it.
    return ys.astype(dtype), last


def _zero_where(rows: Array | None, state: State) -> State:
    """``state`` with the marked rows of the batch at zero."""
    if rows is None:
        return state
    return jax.tree.map(lambda a: jnp.where(along_batch(rows, a), 0, a), state)


def along_batch(marks: Bool[Array, "*batch"], a: Array) -> Bool[Array, "*batch_and_ones"]:
    """Marks over the leading axes of ``a``, with an axis of size 1 for each of its other axes."""
    return jnp.expand_dims(marks, tuple(range(marks.ndim, a.ndim)))
