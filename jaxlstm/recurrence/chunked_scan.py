"""Loops over time: a scan over chunks of a sequence, and the loop of a recurrence given by its equations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.export import is_symbolic_dim

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import State
from jaxlstm.primitives.clip_cotangent import clip_cotangent
from jaxlstm.recurrence.context import Direction, Results, ScanContext
from jaxlstm.recurrence.masking import hold_skipped, restart
from jaxlstm.recurrence.step import project_inputs, recurrent_step


def scan_in_chunks(run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, size: int) -> tuple[Any, Any]:
    """Computes ``run(carry, xs)`` by calls of ``run`` on chunks of the leading axis, the last of which may be shorter.

    Args:
      run: ``(carry, xs of a chunk) -> (carry, ys of the chunk)``.
      carry: the carry before the first step.
      xs: tree of arrays with a leading time axis.
      size: steps per chunk. A symbolic number of steps, of a program being exported, is one chunk: `jax.lax.scan` needs
        to know that there is at least one whole chunk.
    """
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    if is_symbolic_dim(num_steps) or size >= num_steps:
        return run(carry, xs)
    whole = num_steps - num_steps % size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), xs)
    rest = jax.tree.map(lambda a: a[whole:], xs)
    carry, ys = lax.scan(run, carry, chunks)
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if whole == num_steps:
        return carry, ys
    carry, ys_rest = run(carry, rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, ys_rest)


class ScanFns(NamedTuple):
    """The two halves of a recurrence in one direction: the part that depends on no previous step, and the step."""

    project_inputs: Callable[[Array], Any]  # xs (T, B, ...) -> z_x, a tree of arrays (T, B, ...)
    step: Callable[[Any, State, RegularizerMasks], tuple[State, Any]]  # (z_x, state, masks) of a step -> new state and
    # the outputs of the step, a tree of arrays (B, ...)


def emit_hidden(step: Callable[[Any, State, RegularizerMasks], State]) -> Callable[..., tuple[State, Array]]:
    """Makes a step of `ScanFns` from a step that returns the new state only: its output is h."""

    def step_and_output(z_x: Any, state: State, masks: RegularizerMasks) -> tuple[State, Array]:
        new_state = step(z_x, state, masks)
        return new_state, new_state.h

    return step_and_output


def layer_equations(cell: Cell, direction: Direction, context: ScanContext, mesh_axis: str | None = None) -> ScanFns:
    """Returns the equations of `jaxlstm.recurrence.step`; ``mesh_axis`` as in `recurrent_step`."""
    weights, z_static = direction.weights, direction.z_static

    def step(z_x: Array, state: State, masks: RegularizerMasks) -> State:
        return recurrent_step(cell, weights, z_x, state, context.dtype, context.rates, masks, mesh_axis, z_static)

    project = partial(project_inputs, weights, dtype=context.dtype, accum_dtype=context.accum_dtype)
    return ScanFns(project, emit_hidden(step))


def scan_directions(fns: Sequence[ScanFns], directions: Sequence[Direction], context: ScanContext) -> Results:
    """Runs directions one after the other by `jax.lax.scan`."""
    results = [_scan_direction(f, direction, context) for f, direction in zip(fns, directions)]
    return [outputs for outputs, _ in results], [state for _, state in results]


def _scan_direction(fns: ScanFns, direction: Direction, context: ScanContext) -> tuple[Any, State]:
    """Runs one direction; returns its outputs and final state."""

    def scan_step(state: State, inputs_t: Any) -> tuple[State, Any]:
        z_x, step_mask, restarts, masks = inputs_t
        state = restart(restarts, direction.restart_state, state)
        clipped = state._replace(h=clip_cotangent(state.h, context.gradient_clip))
        new_state, outputs = fns.step(z_x, clipped, masks)
        return hold_skipped(step_mask, new_state, state), outputs

    def scan(state: State, steps: Any) -> tuple[State, Any]:
        xs, *rest = steps
        return lax.scan(scan_step, state, (fns.project_inputs(xs), *rest), unroll=context.unroll)

    steps = (direction.xs, direction.step_mask, direction.restarts, direction.masks)
    if context.remat is None:
        state, outputs = scan(direction.state, steps)
    else:  # only the state is saved between chunks; the rest is recomputed for the derivative
        state, outputs = scan_in_chunks(jax.checkpoint(scan), direction.state, steps, size=context.remat)
    return outputs, state
