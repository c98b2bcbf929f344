r"""All steps at once: Newton's method on the whole trajectory, each of its linear recurrences by a parallel scan.

The unknown is the state ``s_t = (h_t, c_t)`` of every step. Around a guess the recurrence ``s_t = F_t(s_{t-1})`` is
linear, and what a guess lacks follows from its residual (Lim et al. 2024, DEER)::

    r_t = F_t(s_{t-1}) - s_t
    d_t = r_t + J_t d_{t-1}         J_t = dF_t / ds_{t-1}, solved by `jax.lax.associative_scan`
    s_t <- s_t + d_t                written as F_t(s_{t-1}) + (d_t - r_t)

As it is written, a step whose predecessor is right comes out as ``F_t`` of it, whatever ``J`` is. So an iteration
makes at least one more step exact, T of them all, and ``J`` may be less than the Jacobian: its blocks of one unit each
(Gonzalez et al. 2024; Danieli et al. 2025), a damped one, or none at all where a matvec of Jacobians overflows.

The derivative at the solution is one more linear recurrence, and so is its transpose: both are solved in the same way,
so gradients, forward mode and second derivatives are exact. What F is, `jaxlstm.step` says; J is taken by `jax.jvp`.
With ``remat`` there are first derivatives only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import Layer, State, Weights
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.recurrence import chunked_scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.scan import along_batch, restart
from jaxlstm.recurrence.step import advance, input_part, slabs, step

UNITS_IN_THE_LAST_PLACE = 32  # by which a solved step may miss: what rounding leaves of a sum over a few hundred units
OF_NARROW_OPERANDS = 1 / 8  # the same, of a dtype narrower than the sums': rounding h to it is off by up to 1/2


@dataclass(frozen=True)
class Newton:
    """``implementation="newton"`` with options: ``jaxlstm.LSTM(..., implementation=Newton(mode="diagonal"))``.

    Args:
      mode: ``"full"``, the whole Jacobian of a step, ``(P + H)^2`` numbers for each step and row: few iterations, for
        small H. ``"diagonal"``, the 2x2 block of each unit alone, ``4 H`` numbers: more iterations, any H; not for a
        projection or layer normalisation, which have no such block.
      max_iterations: after which the method has failed. T of them are always enough.
      damping: in [0, 1): the Jacobian is scaled by ``1 - damping``, which tames networks in which small differences
        grow.
      tolerance: by how much a step may miss the equations, relative to the largest number in the state before or after
        it; None for 32 units in the last place, or 1/8 of one of a narrower ``dtype`` that h is rounded to. The same
        holds for a derivative and its equations.
      otherwise: what happens when ``max_iterations`` did not do: ``"sequential"`` takes the steps after the last one
        that is solved one by one, ``"raise"`` raises a `RuntimeError` (JAX wraps it) while the program runs.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    mode: str = "full"
    max_iterations: int = 64
    damping: float = 0.0
    tolerance: float | None = None
    otherwise: str = "sequential"

    def __post_init__(self) -> None:
        validation.choice("mode", self.mode, MODES)
        validation.choice("otherwise", self.otherwise, ("sequential", "raise"))
        object.__setattr__(self, "max_iterations", validation.positive_int("max_iterations", self.max_iterations))
        object.__setattr__(self, "damping", validation.rate("damping", self.damping))
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", validation.number("tolerance", self.tolerance))
            if self.tolerance <= 0:
                raise ValueError(f"tolerance must be above 0, got {self.tolerance}")


class Effort(NamedTuple):
    """What a solution took, for each direction."""

    iterations: Int[Array, " D"]  # with ``remat``, of the chunk that took most
    residual: Float[Array, " D"]  # by how much the worst step missed when the iterations ended, as in `Newton`
    sequential: Int[Array, " D"]  # steps taken one by one, because the iterations did not do


class Moment(NamedTuple):
    """What a step reads besides the weights and the state; each with a leading axis of time where there are many."""

    z_x: Array  # (T, B, G*H)
    taken: Array | None  # (T, B) bool: where False the state is held
    fresh: Array | None  # (T, B) bool: where True the state starts anew before the step
    noise: RegularizerMasks  # (T, B, .)


class Ended(NamedTuple):
    """Where iterations ended."""

    iterations: Array  # ()
    residual: Array  # ()
    solved: Array  # (), leading steps within the tolerance


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    options: Newton
    rates: RegularizerRates
    dtype: jnp.dtype


class Network(NamedTuple):
    """One direction."""

    weights: Weights
    start: State | None  # h (P,) and c (H,) from which a sequence starts at a reset; None for zeros


Steps = Any  # a tree of arrays with a leading axis of time
Many = Callable[[Steps, State], State]  # any number of steps, each from the state before it, (T, B, .)


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How, options: Newton | None = None
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, its directions side by side. The signature is that of `jaxlstm.recurrence`."""
    ys, after, _ = solve(cell, layer, xs, state, how, options)
    return ys, after


def solve(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How, options: Newton | None = None
) -> tuple[Float[Array, "T B DP"], State, Effort]:
    """What `run` returns, and what it took.

    Raises:
      ValueError: while tracing, for a layer that the mode has no blocks for, and within `jax.shard_map`.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError("implementation='newton' does not run within jax.shard_map; 'fused' and 'scan' do")
    options = Newton() if options is None else options
    MODES[options.mode].check(layer.forward)
    static = Static(cell, options, how.rates, how.dtype)
    backward = [how.reverse ^ (d == 1) for d in range(len(layer.directions))]
    weights = jax.tree.map(lambda *each: jnp.stack(each), *layer.directions)

    def in_order(a: Array, axis: int) -> Array:
        """``a`` once for each direction, in the order in which it runs."""
        if axis == 0:
            a = jnp.broadcast_to(a, (len(backward), *a.shape))
        return jnp.stack([jnp.flip(each, 0) if back else each for each, back in zip(a, backward)])

    xs, taken, fresh = jax.tree.map(partial(in_order, axis=0), (xs, how.mask, how.resets))
    if fresh is not None:  # running backward, a reset is a fresh start before the step that follows it
        late = jnp.concatenate([jnp.zeros_like(fresh[:, :1]), fresh[:, :-1]], axis=1)
        fresh = jnp.stack([b if back else a for a, b, back in zip(fresh, late, backward)])
    noise = jax.tree.map(partial(in_order, axis=1), how.noise)

    def direction(weights: Weights, start: State | None, before: State, inputs: Steps) -> tuple[State, Any]:
        def over_time(before: State, inputs: Steps) -> tuple[State, Any]:
            x, taken, fresh, noise = inputs
            z_x = input_part(weights, x, how.dtype, before.h.dtype)
            states, ended = _trajectory(static, Network(weights, start), Moment(z_x, taken, fresh, noise), before)
            return jax.tree.map(lambda a: a[-1], states), (states.h, _for_each_step(ended, len(x)))

        if how.remat is None:
            return over_time(before, inputs)
        return chunked_scan.over(jax.checkpoint(over_time), before, inputs, size=how.remat)

    after, (hs, effort) = jax.vmap(direction)(weights, how.start, state, (xs, taken, fresh, noise))
    if how.resets is not None:  # running backward, a reset on the very first step is one of the state that is returned
        first = how.resets[0]
        ends = [jax.tree.map(lambda a: a[d], (how.start, after)) for d in range(len(backward))]  # noqa: B023
        ends = [restart(first if back else None, start, end) for (start, end), back in zip(ends, backward)]
        after = jax.tree.map(lambda *each: jnp.stack(each), *ends)
    ys = jnp.concatenate([jnp.flip(h, 0) if back else h for h, back in zip(hs, backward)], axis=-1)
    effort = Effort(effort.iterations.max(1), effort.residual.max(1), effort.sequential.sum(1))
    return ys.astype(how.dtype), after, effort


def _for_each_step(ended: Ended, steps: int) -> Effort:
    """The effort of each of a number of steps, so that chunks of time go one after the other."""
    unsolved = jnp.arange(steps, dtype=jnp.int32) >= ended.solved.astype(jnp.int32)
    iterations, residual = (jnp.broadcast_to(a, (steps,)) for a in (ended.iterations, ended.residual))
    return Effort(iterations.astype(jnp.int32), residual, unsolved)


# What a step is


def _around(network: Network, now: Moment, before: State, inner: Callable[[State], State]) -> State:
    """A step between a fresh start, where one is marked, and the mask; a held step may start anew too."""
    begin = restart(now.fresh, network.start, before)
    after, taken = inner(begin), now.taken
    if taken is None:
        return after
    return jax.tree.map(lambda new, old: jnp.where(along_batch(taken, new), new, old), after, begin)


def _many(static: Static, network: Network, now: Moment, before: State) -> State:
    """Any number of steps at once, each from the state before it, ``(T, B, .)``."""

    def inner(begin: State) -> State:
        return step(static.cell, network.weights, now.z_x, begin, static.dtype, static.rates, now.noise)

    return _around(network, now, before, inner)


def _shift(begin: State, states: State) -> State:
    """The state before each step, from that after each step."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), begin, states)


# Modes: of what the linear recurrence is made


class Mode(NamedTuple):
    """A kind of slopes, ``J``, and how two of them follow each other."""

    check: Callable[[Weights], None]  # refuses a layer that it has no slopes for
    slopes: Callable[[Static, Network, Moment, State], Array]
    pack: Callable[[State], Array]  # (T, B, .) as the vectors that slopes multiply
    unpack: Callable[[Array, State], State]  # the way back, to arrays like these
    times: Callable[[Array, Array], Array]  # two slopes
    apply: Callable[[Array, Array], Array]  # slopes and a vector
    transpose: Callable[[Array], Array]


def _any_layer(weights: Weights) -> None:
    """The full Jacobian is there for every layer."""


def _full_slopes(static: Static, network: Network, now: Moment, before: State) -> Float[Array, "T B S S"]:
    """The Jacobian of every step, S the size of a state, column by column."""
    size = sum(a.shape[-1] for a in jax.tree.leaves(before))

    def column(unit: Float[Array, " S"]) -> Array:
        unit = jnp.broadcast_to(unit, (*before.h.shape[:2], size))
        return _join(jax.jvp(partial(_many, static, network, now), (before,), (_split(unit, before),))[1])

    return jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=before.h.dtype))


def _join(state: State) -> Float[Array, "T B S"]:
    return jnp.concatenate(jax.tree.leaves(state), axis=-1)


def _split(vector: Float[Array, "T B S"], like: State) -> State:
    h, c = jnp.split(vector, [like.h.shape[-1]], axis=-1)
    return State(h, None if like.c is None else c)


def _matrix_times_matrix(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _matrix_times_vector(a: Array, x: Array) -> Array:
    return jnp.matmul(a, x[..., None], precision=lax.Precision.HIGHEST)[..., 0]


def _one_unit_alone(weights: Weights) -> None:
    """Whether h and c of one unit are a block of their own."""
    for what, present in (("a projection", weights.w_p), ("layer normalisation", weights.norm)):
        if present is not None:
            raise ValueError(f"Newton(mode='diagonal') has no blocks for {what}; mode='full' takes it")


def _unit_slopes(static: Static, network: Network, now: Moment, before: State) -> Float[Array, "T K K B H"]:
    """The blocks of every step, K = 2, or 1 without a cell state: each unit alone, as if the others stood still."""
    w, cell = network.weights, static.cell
    sums = before.h.dtype
    h = restart(now.fresh, network.start, before).h
    z = slabs(now.z_x + matvec(w.w_h, h, static.dtype, sums), cell.num_gates, -1)
    own = jnp.diagonal(w.w_h.reshape(cell.num_gates, *[h.shape[-1]] * 2), axis1=1, axis2=2).astype(sums)
    own = jnp.broadcast_to(own[:, None, None], z.shape)  # W_h of a unit and itself, for each gate

    def alone(before: State) -> State:
        def inner(begin: State) -> State:
            moved = z + own * jnp.broadcast_to(begin.h - h, z.shape[1:])[None]
            c, m = advance(cell, w, moved, None, begin.c, now.noise.candidate_mask, static.rates, axis=2)
            return apply_zoneout(static.rates, now.noise, State(m, c), begin)

        return _around(network, now, before, inner)

    kinds, tree = jax.tree.flatten(before)
    units = [tree.unflatten([jnp.full_like(a, i == k) for i, a in enumerate(kinds)]) for k in range(len(kinds))]
    return jnp.stack([_stack(jax.jvp(alone, (before,), (unit,))[1]) for unit in units], axis=2)


def _stack(state: State) -> Float[Array, "T K B H"]:
    return jnp.stack(jax.tree.leaves(state), axis=1)


def _unstack(vector: Float[Array, "T K B H"], like: State) -> State:
    return jax.tree.structure(like).unflatten(jnp.unstack(vector, axis=1))


def _block_times_block(a: Array, b: Array) -> Array:
    return sum(a[:, :, k, None] * b[:, None, k] for k in range(a.shape[2]))  # pyright: ignore[reportReturnType]


def _block_times_vector(a: Array, x: Array) -> Array:
    return sum(a[:, :, k] * x[:, k, None] for k in range(a.shape[2]))  # pyright: ignore[reportReturnType]


MODES = {
    "full": Mode(
        _any_layer,
        _full_slopes,
        _join,
        _split,
        _matrix_times_matrix,
        _matrix_times_vector,
        lambda slopes: jnp.swapaxes(slopes, 2, 3),
    ),
    "diagonal": Mode(
        _one_unit_alone,
        _unit_slopes,
        _stack,
        _unstack,
        _block_times_block,
        _block_times_vector,
        lambda slopes: jnp.swapaxes(slopes, 1, 2),
    ),
}


# The iteration


def _follow(mode: Mode, slopes: Array, r: State) -> State:
    """``d_t = r_t + J_t d_{t-1}`` over time, by a parallel scan."""

    def one_after_the_other(first: Any, second: Any) -> Any:
        (a, r), (b, q) = first, second
        return mode.times(b, a), mode.apply(b, r) + q

    return mode.unpack(lax.associative_scan(one_after_the_other, (slopes, mode.pack(r)))[1], r)


def _missing(after: State, states: State, before: State) -> Float[Array, " T"]:
    """By how much the worst row of each step misses the equations, in units of its largest h, or c."""

    def of(after: Array, now: Array, before: Array) -> Array:
        off, *sizes = (jnp.abs(a).max(-1, initial=0) for a in (after - now, after, before))
        share = jnp.where(off == 0, 0, off / jnp.maximum(*sizes))
        return share.max(-1, initial=0)

    worst = jax.tree.leaves(jax.tree.map(of, after, states, before))
    return jnp.stack(worst).max(0)


def _tolerance(static: Static, sums: jnp.dtype) -> float:
    """The tolerance of the options, or that of the dtypes."""
    if static.options.tolerance is not None:
        return static.options.tolerance
    wide, narrow = float(jnp.finfo(sums).eps), float(jnp.finfo(static.dtype).eps)
    return max(UNITS_IN_THE_LAST_PLACE * wide, OF_NARROW_OPERANDS * narrow)


def _iterate(
    static: Static, many: Many, slopes: Callable[[State], Array], steps: Steps, begin: State, guess: State
) -> tuple[State, Ended]:
    """The states after all of ``steps``, from ``begin``, as far as the iterations allowed solve them."""
    options, num_steps, dtype = static.options, len(guess.h), begin.h.dtype
    mode, tolerance = MODES[options.mode], _tolerance(static, dtype)

    def body(carry: Any) -> Any:
        states, after, _, n = carry
        r = jax.tree.map(jnp.subtract, after, states)
        d = _follow(mode, slopes(_shift(begin, states)) * jnp.asarray(1 - options.damping, dtype), r)
        states = jax.tree.map(lambda a, d, r: jnp.where(jnp.isfinite(d), a + (d - r), a), after, d, r)
        return look(states, n + 1)

    def look(states: State, n: Array) -> Any:
        before = _shift(begin, states)
        after = many(steps, before)
        return states, after, _missing(after, states, before), n

    def unsolved(carry: Any) -> Array:
        return ~(carry[2] <= tolerance).all() & (carry[3] < min(options.max_iterations, num_steps))

    states, _, missing, n = lax.while_loop(unsolved, body, look(guess, jnp.zeros((), jnp.int32)))
    solved = jnp.cumprod((missing <= tolerance).astype(jnp.int32)).sum(dtype=jnp.int32)
    return states, Ended(n, missing.max(), solved)


def _one_by_one(many: Many, steps: Steps, begin: State, states: State, first: Array) -> State:
    """``states`` with those from step ``first`` on taken one after the other."""

    def at(a: Array, t: Array) -> Array:
        return lax.dynamic_index_in_dim(a, t, keepdims=True)

    def body(carry: Any) -> Any:
        states, before, t = carry
        after = many(jax.tree.map(lambda a: at(a, t), steps), before)
        states = jax.tree.map(lambda all, a: lax.dynamic_update_index_in_dim(all, a[0], t, 0), states, after)
        return states, after, t + 1

    before = jax.tree.map(lambda a: at(a, first), _shift(begin, states))  # not used where no step is left
    return lax.while_loop(lambda carry: carry[2] < len(states.h), body, (states, before, first))[0]


def _raise(limit: int, num_steps: int, solved: Array) -> np.ndarray:
    """``solved``, if that is all of the steps."""
    counts = np.asarray(solved)
    if np.any(counts < num_steps):
        raise RuntimeError(
            f"Newton's method has solved {counts.min()} of {num_steps} steps in max_iterations={limit}; "
            "otherwise='sequential' would take the others one by one"
        )
    return counts


# The trajectory and its derivative


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _trajectory(static: Static, network: Network, now: Moment, begin: State) -> tuple[State, Ended]:
    """The state after every step, ``(T, B, .)``, from ``begin (B, .)``."""
    options, num_steps = static.options, len(now.z_x)
    many = partial(_many, static, network)
    slopes = partial(MODES[options.mode].slopes, static, network, now)
    guess = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_steps, *a.shape)), begin)
    states, ended = _iterate(static, many, slopes, now, begin, guess)
    first = ended.solved
    if options.otherwise == "raise":
        fail = partial(_raise, options.max_iterations, num_steps)
        first = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.int32), first, vmap_method="expand_dims")
    # Whole numbers as floats: the zero tangents of integers have no layout over devices, and `jax.shard_map` insists.
    return _one_by_one(many, now, begin, states, first), jax.tree.map(lambda a: a.astype(begin.h.dtype), ended)


@_trajectory.defjvp
def _tangent(static: Static, primals: Any, tangents: Any) -> Any:
    """``ds_t = [ dF_t of all but the state before ] + J_t ds_{t-1}`` at the solution."""
    states, ended = _trajectory(static, *primals)

    def explicit(network: Network, now: Moment, begin: State) -> State:
        return _many(static, network, now, _shift(begin, states))

    network, now, begin = primals
    d_explicit = jax.jvp(explicit, primals, tangents)[1]
    still = jax.tree.map(jnp.zeros_like, ended)
    return (states, ended), (_tangents(static, network, now, _shift(begin, states), d_explicit), still)


def _tangents(static: Static, network: Network, now: Moment, before: State, b: State) -> State:
    """``d_t = b_t + J_t d_{t-1}`` with the whole Jacobian, by the same iterations; never left unsolved."""
    mode = MODES[static.options.mode]
    undamped = static._replace(options=replace(static.options, damping=0.0))
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a[0]), b)

    def push(moments: Any, d: State) -> State:
        now, before = moments
        return jax.jvp(partial(_many, static, network, now), (before,), (d,))[1]

    def pull(moments: Any, d: State) -> State:
        now, before = moments
        return jax.vjp(partial(_many, static, network, now), before)[1](d)[0]

    def solve(linear: Many, moments: Any, slopes: Array, b: State) -> State:
        def many(steps: Any, d: State) -> State:
            return jax.tree.map(jnp.add, linear(steps[0], d), steps[1])

        steps, guess = (moments, b), jax.tree.map(jnp.zeros_like, b)
        d, ended = _iterate(undamped, many, lambda _: slopes, steps, zeros, guess)
        return _one_by_one(many, steps, zeros, d, ended.solved)

    def forward(_: Any, b: State) -> State:
        return solve(push, (now, before), mode.slopes(static, network, now, before), b)

    def backward(_: Any, b: State) -> State:
        # d_t = b_t + J_{t+1}^T d_{t+1}: the same recurrence in the other direction, with the slopes of the step after.
        def turn(tree: Any) -> Any:
            return jax.tree.map(lambda a: jnp.flip(jnp.roll(a, -1, 0), 0), tree)

        slopes = mode.transpose(turn(mode.slopes(static, network, now, before)))
        d = solve(pull, turn((now, before)), slopes, jax.tree.map(lambda a: jnp.flip(a, 0), b))
        return jax.tree.map(lambda a: jnp.flip(a, 0), d)

    def left_over(d: State) -> State:
        return jax.tree.map(jnp.subtract, d, push((now, before), _shift(zeros, d)))

    return lax.custom_linear_solve(left_over, b, forward, backward)
