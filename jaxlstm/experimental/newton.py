r"""Parallel-in-time backend: Newton's method on the whole trajectory, with a parallel scan per iteration.

The unknowns are the states ``s_t = (h_t, c_t)`` of all steps. Linearized around the current iterate, the recurrence
``s_t = F_t(s_{t-1})`` gives the correction from its residual (Lim et al. 2024, DEER)::

    r_t = F_t(s_{t-1}) - s_t
    d_t = r_t + J_t d_{t-1}         J_t = dF_t / ds_{t-1}, solved by `jax.lax.associative_scan`
    s_t <- s_t + d_t                computed as F_t(s_{t-1}) + (d_t - r_t)

In this form a step whose previous state is exact becomes exact too, for any ``J``. Each iteration therefore solves at
least one more step, and T iterations solve all. So ``J`` may be approximate: one block per hidden unit (Gonzalez et al.
2024; Danieli et al. 2025), damped, or ignored if a product of Jacobians overflows. With diagonal recurrent weights a
block per unit is exact.

The derivative at the solution is another linear recurrence, and so is its transpose. Both are solved by the same
iterations, so gradients, forward mode and second derivatives are exact. F is `jaxlstm.recurrence.step` and J comes from
`jax.jvp`. With ``remat`` only first derivatives work.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.experimental.newton_jacobian import (
    MODES,
    ModeName,
    StepConfig,
    StepInputs,
    StepParams,
    solve_linear_recurrence,
    step_all,
)
from jaxlstm.params import State
from jaxlstm.primitives.pytrees import tree_flip, tree_index, tree_stack
from jaxlstm.recurrence.chunked_scan import scan_in_chunks
from jaxlstm.recurrence.context import Direction, Results, ScanContext, refuse_gradient_clip
from jaxlstm.recurrence.masking import shift_state
from jaxlstm.recurrence.step import project_inputs, require_form

TOLERANCE_ULPS = 32  # allowed residual in units in the last place: the rounding of a sum over a few hundred units
NARROW_TOLERANCE_ULPS = 1 / 8  # the same for a dtype narrower than the sums: rounding h to it errs by up to 1/2


@dataclass(frozen=True)
class Newton:
    """The backend with options: ``jaxlstm.LSTM(..., implementation=Newton(mode="diagonal"))``.

    Args:
      mode: the Jacobian of a step. ``"full"`` is exact, with ``(P + H)^2`` numbers per step and row: few iterations,
        for small H. ``"diagonal"`` is one 2x2 block per hidden unit, ``4 H`` numbers: more iterations, for any H, but
        not with a projection or layer normalization. It is exact for a cell with diagonal recurrent weights.
      max_iterations: limit of the number of iterations; T are always enough.
      damping: in [0, 1): scales the Jacobian by ``1 - damping``, for networks in which small differences grow.
      tolerance: largest accepted residual of a step, relative to the largest magnitude in the state before or after
        it. None for 32 units in the last place of the state, or 1/8 of one of a narrower ``dtype`` of matrix products.
        The same holds for derivatives.
      on_failure: what follows if some steps are unsolved after ``max_iterations``: ``"sequential"`` takes the remaining
        steps one after the other; ``"raise"`` raises a `RuntimeError`, which JAX wraps, while the program runs.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    mode: ModeName = "full"
    max_iterations: int = 64
    damping: float = 0.0
    tolerance: float | None = None
    on_failure: Literal["sequential", "raise"] = "sequential"

    def __post_init__(self) -> None:
        validation.choice("mode", self.mode, MODES)
        validation.choice("on_failure", self.on_failure, ("sequential", "raise"))
        object.__setattr__(self, "max_iterations", validation.positive_int("max_iterations", self.max_iterations))
        object.__setattr__(self, "damping", validation.rate("damping", self.damping))
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", validation.positive_number("tolerance", self.tolerance))

    def __call__(self, cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
        """Runs the directions of a layer side by side; see `jaxlstm.recurrence.context`.

        Raises:
          ValueError: while tracing, for a layer that the mode does not support, and within `jax.shard_map`.
        """
        outputs, states, _ = solve_directions(self, cell, directions, context)
        return outputs, states


run = Newton()  # the backend named "newton"


class SolverStats(NamedTuple):
    """Work of the solver in one layer, for each direction."""

    iterations: Int[Array, " D"]  # with ``remat``, the largest number of all chunks
    residual: Float[Array, " D"]  # largest residual of a step after the last iteration, relative as in `Newton`
    sequential_steps: Int[Array, " D"]  # steps left unsolved by the iterations and taken one after the other


def solve_directions(
    options: Newton, cell: Cell, directions: tuple[Direction, ...], context: ScanContext
) -> tuple[list[Array], list[State], SolverStats]:
    """Runs the directions of a layer side by side, and reports the work of the solver.

    Returns:
      outputs ``(T, B, P)`` and final state of each direction as any backend does, and the statistics.

    Raises:
      ValueError: while tracing, for a layer that the mode does not support, and within `jax.shard_map`.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError("implementation='newton' does not run within jax.shard_map; use 'fused' or 'scan'")
    refuse_gradient_clip("implementation='newton'", context)
    require_form("implementation='newton'", cell, directions[0].weights, several_states=False, diagonal=True)
    MODES[options.mode].check(directions[0].weights)
    config = NewtonConfig(options, StepConfig(cell, context.rates, context.dtype))
    outputs, states, stats = jax.vmap(partial(_solve_direction, config, context))(tree_stack(directions))
    stats = SolverStats(stats.iterations.max(1), stats.residual.max(1), stats.sequential_steps.sum(1))
    return list(outputs), [tree_index(states, d) for d in range(len(directions))], stats


class NewtonConfig(NamedTuple):
    """Static options of the solver."""

    options: Newton
    step: StepConfig


class IterationResult(NamedTuple):
    """Outcome of the iterations."""

    iterations: Array  # ()
    residual: Array  # (), the largest of all steps
    num_solved: Array  # (), leading steps within the tolerance


def _solve_direction(
    config: NewtonConfig, context: ScanContext, direction: Direction
) -> tuple[Array, State, SolverStats]:
    """Runs one direction; returns its outputs, final state and statistics per step ``(T,)``."""
    params = StepParams(direction.weights, direction.restart_state)

    def solve(state: State, inputs: Any) -> tuple[State, tuple[Array, SolverStats]]:
        xs, *rest = inputs
        z_x = project_inputs(direction.weights, xs, context.dtype, context.accum_dtype)
        states, result = _solve_trajectory(config, params, StepInputs(z_x, *rest), state)
        return tree_index(states, -1), (states.h, _stats_per_step(result, len(xs)))

    inputs = (direction.xs, direction.step_mask, direction.restarts, direction.masks)
    if context.remat is None:
        state, (outputs, stats) = solve(direction.state, inputs)
    else:
        state, (outputs, stats) = scan_in_chunks(jax.checkpoint(solve), direction.state, inputs, size=context.remat)
    return outputs, state, stats


def _stats_per_step(result: IterationResult, num_steps: int) -> SolverStats:
    """Repeats the statistics for each step, so that chunks of time can be concatenated."""
    unsolved = jnp.arange(num_steps, dtype=jnp.int32) >= result.num_solved.astype(jnp.int32)
    iterations, residual = (jnp.broadcast_to(a, (num_steps,)) for a in (result.iterations, result.residual))
    return SolverStats(iterations.astype(jnp.int32), residual, unsolved.astype(jnp.int32))


# The trajectory and its derivative


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve_trajectory(
    config: NewtonConfig, params: StepParams, inputs: StepInputs, init_state: State
) -> tuple[State, IterationResult]:
    """Returns the state after every step, ``(T, B, .)``, from ``init_state (B, .)``.

    The integers of the result are floats: the float0 tangents of integers have no sharding, which meshes require.
    """
    options, num_steps = config.options, len(inputs.z_x)
    step_fn = partial(step_all, config.step, params)
    jacobian = partial(MODES[options.mode].jacobian, config.step, params, inputs)
    guess = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_steps, *a.shape)), init_state)
    states, result = _iterate(config, step_fn, jacobian, inputs, init_state, guess)
    first = result.num_solved
    if options.on_failure == "raise":
        check = partial(_check_solved, options.max_iterations, num_steps)
        first = jax.pure_callback(check, jax.ShapeDtypeStruct((), jnp.int32), first, vmap_method="expand_dims")
    states = _step_sequentially(step_fn, inputs, init_state, states, first)
    return states, jax.tree.map(lambda a: a.astype(init_state.h.dtype), result)


def _check_solved(max_iterations: int, num_steps: int, num_solved: Array) -> np.ndarray:
    """Returns ``num_solved``, or raises an error if steps are unsolved; runs on the host."""
    counts = np.asarray(num_solved)
    if np.any(counts < num_steps):
        raise RuntimeError(
            f"Newton's method solved {counts.min()} of {num_steps} steps in max_iterations={max_iterations}; "
            "increase max_iterations, or use on_failure='sequential'"
        )
    return counts


@_solve_trajectory.defjvp
def _solve_trajectory_jvp(config: NewtonConfig, primals: Any, tangents: Any) -> Any:
    """Solves ``ds_t = b_t + J_t ds_{t-1}``; ``b_t`` is the tangent of ``F_t`` with constant states."""
    params, inputs, init_state = primals
    states, result = _solve_trajectory(config, *primals)

    def step_from_constants(params: StepParams, inputs: StepInputs, init_state: State) -> State:
        return step_all(config.step, params, inputs, shift_state(init_state, states))

    b = jax.jvp(step_from_constants, primals, tangents)[1]
    d_states = _solve_tangents(config, params, inputs, shift_state(init_state, states), b)
    return (states, result), (d_states, jax.tree.map(jnp.zeros_like, result))


def _solve_tangents(
    config: NewtonConfig, params: StepParams, inputs: StepInputs, prev_states: State, b: State
) -> State:
    """Solves ``d_t = b_t + J_t d_{t-1}`` with the exact Jacobian, by the same iterations; finishes sequentially."""
    mode = MODES[config.options.mode]
    undamped = config._replace(options=replace(config.options, damping=0.0))
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a[0]), b)

    def jvp(point: tuple[StepInputs, State], d: State) -> State:
        inputs, state = point
        return jax.jvp(partial(step_all, config.step, params, inputs), (state,), (d,))[1]

    def vjp(point: tuple[StepInputs, State], d: State) -> State:
        inputs, state = point
        return jax.vjp(partial(step_all, config.step, params, inputs), state)[1](d)[0]

    def solve(linear_fn: Callable[..., State], points: tuple[StepInputs, State], jacobians: Array, b: State) -> State:
        def step_fn(steps: Any, d: State) -> State:
            points, b = steps
            return jax.tree.map(jnp.add, linear_fn(points, d), b)

        guess = jax.tree.map(jnp.zeros_like, b)
        d, result = _iterate(undamped, step_fn, lambda _: jacobians, (points, b), zeros, guess)
        return _step_sequentially(step_fn, (points, b), zeros, d, result.num_solved)

    points = (inputs, prev_states)
    jacobian = partial(mode.jacobian, config.step, params, inputs, prev_states)

    def solve_forward(_: Any, b: State) -> State:
        return solve(jvp, points, jacobian(), b)

    def solve_transpose(_: Any, b: State) -> State:
        # d_t = b_t + J_{t+1}^T d_{t+1}: the same recurrence backward in time, with the Jacobian of the next step.
        jacobians = mode.transpose(_flip_next(jacobian()))
        return tree_flip(solve(vjp, _flip_next(points), jacobians, tree_flip(b)))

    def residual(d: State) -> State:
        return jax.tree.map(jnp.subtract, d, jvp(points, shift_state(zeros, d)))

    return lax.custom_linear_solve(residual, b, solve_forward, solve_transpose)


def _flip_next(tree: Any) -> Any:
    """Reverses time after moving every step one earlier."""
    return tree_flip(jax.tree.map(lambda a: jnp.roll(a, -1, 0), tree))


# The iterations

# (inputs, previous states) -> states: any number of steps at once, each from its own previous state. The inputs are a
# tree of arrays with a leading time axis, states are (T, B, .).
StepFn = Callable[[Any, State], State]


def _iterate(
    config: NewtonConfig,
    step_fn: StepFn,
    jacobian: Callable[[State], Array],
    inputs: Any,
    init_state: State,
    guess: State,
) -> tuple[State, IterationResult]:
    """Iterates until all steps are within the tolerance or the limit is reached.

    Args:
      config: static options.
      step_fn: the recurrence.
      jacobian: its Jacobians by the previous states ``(T, B, .)``.
      inputs: first argument of ``step_fn``.
      init_state: state before the first step, ``(B, .)``.
      guess: states after each step ``(T, B, .)`` to begin with.
    """
    options, num_steps, dtype = config.options, len(guess.h), init_state.h.dtype
    mode, tolerance = MODES[options.mode], _resolve_tolerance(config, dtype)

    def evaluate(states: State, n: Array) -> tuple[State, State, Array, Array]:
        prev_states = shift_state(init_state, states)
        new_states = step_fn(inputs, prev_states)
        return states, new_states, _relative_residual(new_states, states, prev_states), n

    def iterate(carry: tuple[State, State, Array, Array]) -> tuple[State, State, Array, Array]:
        states, new_states, _, n = carry
        r = jax.tree.map(jnp.subtract, new_states, states)
        jacobians = jacobian(shift_state(init_state, states)) * jnp.asarray(1 - options.damping, dtype)
        d = solve_linear_recurrence(mode, jacobians, r)
        states = jax.tree.map(lambda new, d, r: jnp.where(jnp.isfinite(d), new + (d - r), new), new_states, d, r)
        return evaluate(states, n + 1)

    def is_unsolved(carry: tuple[State, State, Array, Array]) -> Array:
        _, _, residual, n = carry
        return ~(residual <= tolerance).all() & (n < min(options.max_iterations, num_steps))

    init = evaluate(guess, jnp.zeros((), jnp.int32))
    states, _, residual, n = lax.while_loop(is_unsolved, iterate, init)
    num_solved = jnp.cumprod((residual <= tolerance).astype(jnp.int32)).sum(dtype=jnp.int32)
    return states, IterationResult(n, residual.max(), num_solved)


def _resolve_tolerance(config: NewtonConfig, accum_dtype: jnp.dtype) -> float:
    """Returns the tolerance of the options, or the default for the dtypes."""
    if config.options.tolerance is not None:
        return config.options.tolerance
    wide, narrow = float(jnp.finfo(accum_dtype).eps), float(jnp.finfo(config.step.dtype).eps)
    return max(TOLERANCE_ULPS * wide, NARROW_TOLERANCE_ULPS * narrow)


def _relative_residual(new_states: State, states: State, prev_states: State) -> Float[Array, " T"]:
    """Returns the residual of each step relative to its largest h or c; the largest of all rows."""

    def of_array(new: Array, now: Array, prev: Array) -> Float[Array, " T"]:
        error, new_size, prev_size = (jnp.abs(a).max(-1, initial=0) for a in (new - now, new, prev))
        relative = jnp.where(error == 0, 0, error / jnp.maximum(new_size, prev_size))
        return relative.max(-1, initial=0)

    of_arrays = jax.tree.leaves(jax.tree.map(of_array, new_states, states, prev_states))
    return jnp.stack(of_arrays).max(0)


def _step_sequentially(step_fn: StepFn, inputs: Any, init_state: State, states: State, first: Array) -> State:
    """Returns ``states`` with those from step ``first`` on computed one after the other."""

    def slice_at(tree: Any, t: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, keepdims=True), tree)

    def take_step(carry: tuple[State, State, Array]) -> tuple[State, State, Array]:
        states, state, t = carry
        new_state = step_fn(slice_at(inputs, t), state)
        states = jax.tree.map(lambda all, new: lax.dynamic_update_index_in_dim(all, new[0], t, 0), states, new_state)
        return states, new_state, t + 1

    prev_state = slice_at(shift_state(init_state, states), first)  # unused if no step is left
    return lax.while_loop(lambda carry: carry[2] < len(states.h), take_step, (states, prev_state, first))[0]
