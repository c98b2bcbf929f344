"""Rollouts and replays of recurrent policies: resets in the right place, burn-in, and a check.

A rollout records, for each step t, the observation, the action, and ``dones[t]``: whether the transition of step t
ended the episode. An environment with automatic resets then returns the first observation of the next episode, which
the policy reads at step t + 1. The state therefore restarts before step t + 1, not before step t:

    step t               0      1      2      3      4      5
    episode              A      A      A      B      B      B
    dones[t]             False  False  True   False  False  True       the last step of an episode
    resets[t]            first  False  False  True   False  False      the first step of an episode

`jaxlstm.LSTM` takes ``resets``. Passing ``dones`` in their place erases the memory one step early, at the last step of
each episode, which may need it most, and lets the last step of one episode leak into the next. Training goes on
without an error, so call `check_replay` before the first update.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jaxlstm import validation
from jaxlstm.network import RecurrentNetwork
from jaxlstm.params import Params, State


def resets_from_dones(dones: Bool[ArrayLike, "T *batch"], first: Bool[ArrayLike, "*batch"]) -> Bool[Array, "T *batch"]:
    """Marks the first step of each episode, given the last steps.

    The usual mistake is ``resets=dones``: it marks the last step of each episode.

        dones  = [False, False, True,  False]
        resets = [first, False, False, True ]

    Across rollouts, ``first`` of the next rollout is ``dones[-1]`` of this one.

    Args:
      dones: whether the transition of step t ended the episode, by termination or truncation, so that step t + 1
        reads the first observation of another episode.
      first: whether step 0 is the first step of an episode: True at the start of training, then the last ``dones`` of
        the previous rollout. A single bool holds for every environment.

    Returns:
      ``resets`` for a call of `jaxlstm.LSTM`, of the shape of ``dones``.

    Raises:
      ValueError, TypeError: for a wrong shape or dtype.
    """
    dones = validation.array("dones", dones, jnp.bool_)
    if dones.ndim == 0:
        raise ValueError("dones must have shape (T, *batch), got []")
    first = validation.array("first", first, jnp.bool_)
    if first.shape not in ((), dones.shape[1:]):
        raise ValueError(
            f"first must have shape {list(dones.shape[1:])}, one value per environment of dones {list(dones.shape)}, "
            f"or be a single bool; got {list(first.shape)}"
        )
    first = jnp.broadcast_to(first, dones.shape[1:])
    return jnp.concatenate([first[None], dones])[: dones.shape[0]]


def replay(
    lstm: RecurrentNetwork,
    params: Params,
    xs: Float[ArrayLike, "T *batch_and_features"],
    dones: Bool[ArrayLike, "T *batch"],
    state0: State,
    *,
    first: Bool[ArrayLike, "*batch"] = False,
) -> tuple[Float[Array, "T *batch_and_outputs"], State]:
    """Recomputes the outputs of a rollout in one call, for the loss of recurrent PPO and its relatives.

    Equals this loop, up to rounding, but runs the compiled backend of the network:

        state, reset = state0, first
        for t in range(T):
            state, ys[t] = lstm.step(params, state, xs[t], reset=reset)
            reset = dones[t]

    Args:
      lstm: the network of the policy; not bidirectional.
      params: its parameters, used in the rollout or newer.
      xs: inputs of the network ``(T, *batch, I)``, in the order of the rollout.
      dones: whether the transition of step t ended the episode ``(T, *batch)``.
      state0: the state that the rollout started from, before any reset at step 0.
      first: whether step 0 is the first step of an episode, as in `resets_from_dones`. With the default False,
        ``state0`` must be the initial state in environments whose step 0 begins an episode.

    Returns:
      ``(ys, state)``: outputs ``(T, *batch, P)``, and the state after the last step. If ``dones[-1]`` is True, this
      state belongs to an episode that has ended: pass it on together with ``first=dones[-1]``.

    Raises:
      ValueError, TypeError: for a wrong shape, size, dtype or type, or a bidirectional network.
    """
    xs, dones = _check_rollout("replay", lstm, xs, dones)
    return lstm(params, xs, state0, resets=resets_from_dones(dones, first))


def burn_in(
    lstm: RecurrentNetwork,
    params: Params,
    xs: Float[ArrayLike, "T *batch_and_features"],
    dones: Bool[ArrayLike, "T *batch"],
    state0: State,
    steps: int,
    *,
    first: Bool[ArrayLike, "*batch"] = False,
) -> tuple[Float[Array, "T-steps *batch_and_outputs"], State]:
    """Replays a stored sequence whose first steps only warm up the state, as in R2D2 (Kapturowski et al. 2019).

    A state in a replay buffer was computed by older parameters. The first ``steps`` steps bring it up to date without
    a gradient; the outputs and the loss are of the steps after them:

        ys, _ = burn_in(lstm, params, xs, dones, state0, 40)                  # of steps 40 to T - 1
        target_ys, _ = burn_in(lstm, target_params, xs, dones, state0, 40)    # each network warms up its own state

    The usual mistake is to restart at the boundary, or to forget an episode that ended at step ``steps - 1``. Here the
    part after it starts with ``first=dones[steps - 1]``.

    Args:
      lstm: the network; not bidirectional.
      params: its present parameters.
      xs: inputs of the network ``(T, *batch, I)``. Layers in front of the network get no gradient from the first
        ``steps`` steps either.
      dones: whether the transition of step t ended the episode ``(T, *batch)``.
      state0: the stored state of step 0, or the initial state.
      steps: number of burn-in steps, 0 to T - 1.
      first: whether step 0 is the first step of an episode, as in `replay`.

    Returns:
      ``(ys, state)``: outputs ``(T - steps, *batch, P)`` of the steps after the burn-in, and the state after the last
      step.

    Raises:
      ValueError, TypeError: for a wrong shape, size, dtype or type, or a bidirectional network.
    """
    xs, dones = _check_rollout("burn_in", lstm, xs, dones)
    steps = validation.int_at_least("steps", steps, 0)
    if steps >= xs.shape[0]:
        raise ValueError(f"steps must be less than the number of steps of xs, {xs.shape[0]}, got {steps}")
    if steps == 0:
        return replay(lstm, params, xs, dones, state0, first=first)
    # Stop the gradient at the inputs of the first part, so that nothing is saved for its backward pass.
    frozen_params, frozen_xs, frozen_state = jax.lax.stop_gradient((params, xs[:steps], state0))
    _, state = replay(lstm, frozen_params, frozen_xs, dones[:steps], frozen_state, first=first)
    return replay(lstm, params, xs[steps:], dones[steps:], state, first=dones[steps - 1])


def check_replay(
    rollout: Float[ArrayLike, "T *batch_and_outputs"],
    replayed: Float[ArrayLike, "T *batch_and_outputs"],
    dones: Bool[ArrayLike, "T *batch"],
    *,
    tolerance: float | None = None,
) -> None:
    """Raises an error if a rollout and its replay by the same parameters differ, and names the first difference.

    Compares outputs of the network, logits, values or log-probabilities. Call it before the first update, with the
    arrays that the loss uses. Outputs and values show differences best: log-probabilities of a new policy hardly
    depend on the state if its last layer starts near zero. The usual mistake, in the loss:

        ys, _ = lstm(params, xs, state0, resets=dones)                # wrong: restarts at the last step of an episode
        ys, _ = rl.replay(lstm, params, xs, dones, state0)            # right: restarts at the first
        rl.check_replay(rollout_ys, ys, dones)

    Args:
      rollout: values recorded step by step in the rollout ``(T, *batch, ...)``.
      replayed: the same values recomputed ``(T, *batch, ...)``.
      dones: whether the transition of step t ended the episode ``(T, *batch)``; gives the axes of the environments,
        and the likely cause.
      tolerance: largest difference, relative to values above 1 and absolute below; None for the square root of the
        machine epsilon of the narrower dtype, 3e-4 in float32. Use 1e-2 for products in TF32.

    Raises:
      ValueError: if the arrays differ anywhere, with the first step and the first environment that differ there, or
        for a wrong shape, or a negative tolerance.
      TypeError: for a wrong dtype, or traced arrays: call it outside of `jax.jit`.
    """
    for name, value in (("rollout", rollout), ("replayed", replayed), ("dones", dones)):
        if isinstance(value, Tracer):
            raise TypeError(f"{name} must be a concrete array, got a traced one; call check_replay outside of jax.jit")
    ended = np.asarray(validation.array("dones", dones, jnp.bool_))
    a = validation.array("rollout", rollout, jnp.floating)
    b = validation.array("replayed", replayed, jnp.floating, a.shape, " (the shape of rollout has to be the same)")
    if ended.ndim == 0 or a.shape[: ended.ndim] != ended.shape:
        raise ValueError(
            f"rollout and replayed must have the shape of dones, (T, *batch), and any further axes; got "
            f"{list(a.shape)} and dones {list(ended.shape)}"
        )
    eps = float(max(jnp.finfo(a.dtype).eps, jnp.finfo(b.dtype).eps))
    bound = eps**0.5 if tolerance is None else validation.number("tolerance", tolerance)
    if bound < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    x, y = (np.asarray(values, np.float64).reshape(*ended.shape, math.prod(a.shape[ended.ndim :])) for values in (a, b))
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.isfinite(x) & (np.abs(x - y) <= bound * np.maximum(1, np.abs(x)))
    differs = ~((x == y) | near | (np.isnan(x) & np.isnan(y)))
    if differs.any():
        raise ValueError(_first_difference(x, y, differs, ended, bound))


def _check_rollout(function: str, lstm: RecurrentNetwork, xs: ArrayLike, dones: ArrayLike) -> tuple[Array, Array]:
    """Returns inputs and dones as arrays of matching shapes."""
    validation.instance("lstm", lstm, RecurrentNetwork, "a jaxlstm.LSTM or jaxlstm.ConvLSTM")
    if lstm.bidirectional:
        raise ValueError(f"{function} does not support bidirectional=True: a policy does not see later steps")
    features = lstm.feature_shape(lstm.input_size)
    xs = validation.inputs("xs", xs, features, "T, *batch")
    shape = xs.shape[: xs.ndim - len(features)]
    return xs, validation.array("dones", dones, jnp.bool_, shape, f" (xs has shape {list(xs.shape)})")


def _first_difference(x: np.ndarray, y: np.ndarray, differs: np.ndarray, ended: np.ndarray, bound: float) -> str:
    """Describes the first step and environment that differ, and the likely cause there."""
    step, *environment, place = (int(n) for n in np.argwhere(differs)[0])
    here = tuple(environment)
    where = f"step {step}" + (f" of environment {environment[0] if len(here) == 1 else here}" if here else "")
    at = (step, *here, place)
    number = int(differs.any(-1).sum())
    if step == 0:
        cause = (
            "they start from different states, or one of them resets at step 0: compare state0 and first, "
            "and reset with resets_from_dones(dones, first)"
        )
    elif ended[(step, *here)] and not ended[(step - 1, *here)]:
        cause = (
            "this is the last step of an episode, so one of them resets there, a step early; "
            "reset with resets_from_dones(dones, first), not with dones"
        )
    elif ended[(step - 1, *here)]:
        cause = (
            "this is the first step of an episode, so one of them does not reset there; "
            "reset with resets_from_dones(dones, first)"
        )
    else:
        cause = "no episode starts or ends there, so inputs, parameters or a reset differ"
    return (
        f"rollout and replay differ first at {where}: {x[at]:.6g} and {y[at]:.6g}, expected equal within "
        f"{bound:.1g} ({number} of {ended.size} steps differ); {cause}"
    )
