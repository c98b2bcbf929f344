"""A network as a dynamical system: fixed points with their linearization, and Lyapunov exponents."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm import validation
from jaxlstm.diagnostics.trace import check_args
from jaxlstm.params import Params, State
from jaxlstm.rnn import RNN

INITIAL_DAMPING = 1e-3  # of Levenberg-Marquardt; it adapts from there
DAMPING_FACTOR = 4.0  # by which the damping falls after a step that reduced the speed, and rises after another one


class FixedPoints(NamedTuple):
    """States that a step with a constant input leaves (nearly) unchanged; N starts, S numbers in a state."""

    states: State  # h (L, N, P) and c (L, N, H), as the state of a call
    speed: Array  # (N,), half of the squared change by a step: 0 at a fixed point, small at a slow point
    jacobian: Array  # (N, S, S), of a step at the state; numbers in the order of h and c, each by layer
    eigenvalues: np.ndarray  # (N, S) complex, of the Jacobian, in descending order of magnitude

    @property
    def time_constants(self) -> np.ndarray:
        """The steps ``1 / |ln |eigenvalue||`` in which a mode decays, or grows, by a factor e: ``(N, S)``."""
        with np.errstate(divide="ignore"):
            return 1 / np.abs(np.log(np.abs(self.eigenvalues)))


def fixed_points(
    lstm: RNN, params: Params, x: Float[ArrayLike, " I"], starts: State, *, num_iterations: int = 100
) -> FixedPoints:
    """Searches for fixed and slow points of the step with a constant input, and linearizes the network around them.

    From each start, half of the squared change of the state by a step is minimized (Sussillo & Barak 2013), by the
    Levenberg-Marquardt method. A result is a fixed point if its ``speed`` is about 0; otherwise it is a local minimum,
    near which the state moves slowly. Several starts may end at one point. Memory and time of an iteration are those
    of a Jacobian for each start, which has S² numbers.

    Args:
      lstm: the network; unidirectional.
      params: from ``lstm.init``.
      x: the constant input.
      starts: states to start from, with one batch axis: h ``(L, N, P)`` and c ``(L, N, H)``, for example states of a
        call on real inputs. They must be finite; the initial state of ``"slstm"`` is not.
      num_iterations: number of iterations.

    Raises:
      ValueError, TypeError: as ``lstm.step`` does, and for starts without one batch axis or that are not finite.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    num_iterations = validation.positive_int("num_iterations", num_iterations)
    validation.instance("starts", starts, State, "a jaxlstm.State with one batch axis")
    if starts.h.ndim != 3:
        raise ValueError(f"starts must have one batch axis, h (L, N, P), got h {list(starts.h.shape)}")
    lstm.step(params, starts, jnp.broadcast_to(jnp.asarray(x), (starts.h.shape[1], *jnp.shape(x))))  # checks them
    for a in jax.tree.leaves(starts):
        if not np.isfinite(a).all():
            raise ValueError("starts must be finite; use states after a step or more")
    states, speed, jacobian = _search(lstm, params, jnp.asarray(x), starts, num_iterations)
    eigenvalues = np.linalg.eigvals(np.asarray(jacobian, np.float64))
    order = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")
    return FixedPoints(states, speed, jacobian, np.take_along_axis(eigenvalues, order, -1))


@partial(jax.jit, static_argnums=(0, 4))
def _search(lstm: RNN, params: Params, x: Array, starts: State, num_iterations: int) -> tuple[State, Array, Array]:
    """Returns the states, speeds and Jacobians of `FixedPoints`."""
    unravel = ravel_pytree(jax.tree.map(lambda a: a[:, 0], starts))[1]
    step = _flat_step(lstm, params, unravel)

    def change(s: Array) -> Array:
        return step(s, x) - s

    def iterate(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        s, damping = carry
        residual, matrix = change(s), jax.jacobian(change)(s)
        normal = matrix.T @ matrix
        proposal = s - jnp.linalg.solve(normal + damping * jnp.eye(len(s), dtype=s.dtype), matrix.T @ residual)
        is_better = _speed(change(proposal)) < _speed(residual)  # False for NaN
        damping = jnp.where(is_better, damping / DAMPING_FACTOR, damping * DAMPING_FACTOR)
        return jnp.where(is_better, proposal, s), damping

    def search(start: State) -> tuple[State, Array, Array]:
        s = ravel_pytree(start)[0]
        s, _ = lax.fori_loop(0, num_iterations, iterate, (s, jnp.asarray(INITIAL_DAMPING, s.dtype)))
        return unravel(s), _speed(change(s)), jax.jacobian(step)(s, x)

    return jax.vmap(search, in_axes=1, out_axes=(1, 0, 0))(starts)


def _speed(change: Array) -> Array:
    return 0.5 * (change * change).sum()


def _flat_step(lstm: RNN, params: Params, unravel: Callable[[Array], State]) -> Callable[[Array, Array], Array]:
    """Returns the step from the numbers in a state to those in the next one."""
    return lambda s, x: ravel_pytree(lstm.step(params, unravel(s), x)[0])[0]


def lyapunov_exponents(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T I"],
    state: State | None = None,
    *,
    num_exponents: int | None = None,
    warmup: int = 0,
    seed: int = 0,
) -> Array:
    """Computes the Lyapunov exponents of the state along a sequence: mean logarithmic growth rates of perturbations.

    The largest exponent is the rate at which two nearby states separate, in nats per step: above 0 they diverge
    (chaos), below 0 the network forgets its initial state. The QR method (Benettin et al. 1980; for recurrent networks
    Engelken, Wolf & Abbott 2023) multiplies k directions by the Jacobian of each step and orthogonalizes them. The
    exponents of the gradient are the same: they tell whether it vanishes or explodes over long spans.

    Args:
      lstm: the network; unidirectional.
      params: from ``lstm.init``.
      xs: inputs of one sequence ``(T, I)``.
      state: initial state, as in the call; finite.
      num_exponents: k, number of exponents; None for all, as many as numbers in the state.
      warmup: number of first steps that are not averaged, while the directions align.
      seed: seed of the initial directions.

    Returns:
      The exponents ``(k,)``, the largest first as far as the sequence is long enough to separate them. A direction that
      a step maps to zero has the exponent minus infinity.

    Raises:
      ValueError, TypeError: as the call does, and for more than one sequence, a bidirectional network, an initial
        state that is not finite, or numbers of exponents or steps out of range.
    """
    args = check_args(lstm, params, xs, state)
    if args.xs.ndim != 2 or lstm.bidirectional:
        raise ValueError(
            f"expected one sequence (T, I) and a unidirectional network, got xs {list(args.xs.shape)} and {lstm!r}"
        )
    warmup = validation.int_at_least("warmup", warmup, 0)
    start = lstm.initial_state((), params) if args.state is None else args.state
    size = sum(a.size for a in jax.tree.leaves(start))
    count = size if num_exponents is None else validation.positive_int("num_exponents", num_exponents)
    if count > size or warmup >= len(args.xs):
        raise ValueError(
            f"num_exponents must be at most {size}, the numbers in a state, and warmup less than {len(args.xs)} steps, "
            f"got {count} and {warmup}"
        )
    if not all(np.isfinite(a).all() for a in jax.tree.leaves(start)):
        raise ValueError("the initial state must be finite; pass the state after a step or more")
    directions = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))[0]
    return _growth_rates(lstm, params, args.xs, start, jnp.asarray(directions, lstm.state_dtype), warmup)


@partial(jax.jit, static_argnums=(0, 5))
def _growth_rates(
    lstm: RNN, params: Params, xs: Array, state: State, directions: Float[Array, "S k"], warmup: int
) -> Float[Array, " k"]:
    """Returns the mean logarithms of the diagonal of R in the QR decompositions after the first ``warmup`` steps."""
    s, unravel = ravel_pytree(state)
    step = _flat_step(lstm, params, unravel)

    def grow(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        s, directions = carry
        s, tangent = jax.linearize(lambda s: step(s, x), s)
        directions, r = jnp.linalg.qr(jax.vmap(tangent, 1, 1)(directions))
        return (s, directions), jnp.log(jnp.abs(jnp.diagonal(r)))

    return lax.scan(grow, (s, directions), xs)[1][warmup:].mean(0)
