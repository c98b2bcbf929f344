"""Training a language model: the optimiser, one compiled step, evaluation, checkpoints."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import regularisers
from jaxlstm.data import evaluation_windows
from jaxlstm.language_model import LanguageModel, LanguageModelParams
from jaxlstm.types import State

SCHEDULE_TICKS = 10_000  # a run, however long and whatever bounds it, is this long to the schedule


class Average(NamedTuple):
    """The mean of the parameters since averaging began; until then the parameters themselves."""

    params: LanguageModelParams
    steps: Array  # int, in the mean; 0 until averaging begins
    began: Array  # bool


class TrainState(NamedTuple):
    """All that a step changes."""

    params: LanguageModelParams
    opt_state: optax.OptState
    carry: State  # the recurrent state after the last window, (L, B, .)
    key: Array  # PRNG key of the steps to come
    average: Average | None = None  # of the parameters over steps, for averaged SGD

    @property
    def trained(self) -> LanguageModelParams:
        """The parameters to evaluate and to keep."""
        return self.params if self.average is None else self.average.params


Step = Callable[[TrainState, ArrayLike, ArrayLike, ArrayLike, ArrayLike], tuple[TrainState, Array]]


def optimizer(
    learning_rate: float, *, warmup: float, weight_decay: float, clip: float, kind: str = "adamw"
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD behind clipping by global norm, over the progress of the run.

    AdamW warms up and decays by a cosine. SGD, which is for averaging (Merity, Keskar & Socher 2018), warms up and
    stays. The schedule counts in ticks of progress, passed to each update as ``progress``, not in updates: so the same
    schedule serves a run bounded by steps and one bounded by the clock.

    Args:
      learning_rate: the peak.
      warmup: share of the run in which the rate rises from 0 to its peak.
      weight_decay: decoupled, on matrices only.
      clip: largest global norm of a gradient.
      kind: ``"adamw"`` or ``"asgd"``.
    """
    ticks = round(warmup * SCHEDULE_TICKS)
    if kind == "asgd":
        schedule = optax.warmup_constant_schedule(0.0, learning_rate, max(ticks, 1))  # 0 would mean a rate of 0
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, ticks, SCHEDULE_TICKS, end_value=0.01 * learning_rate
        )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def scale(updates: Any, state: Any, params: Any = None, *, progress: ArrayLike = 0.0, **_: Any) -> tuple[Any, Any]:
        del params
        rate = schedule(jnp.asarray(progress) * SCHEDULE_TICKS)
        return jax.tree.map(lambda u: -jnp.asarray(rate, u.dtype) * u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.identity() if kind == "asgd" else optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scale),
    )


def start(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    batch: int,
    key: Array,
    *,
    averaged: bool = False,
) -> TrainState:
    """The state before the first step, for ``batch`` streams; ``averaged`` makes room for an average of parameters."""
    k_init, k_steps = jax.random.split(key)
    params: Any = model.init(k_init)
    average = Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    carry = model.lstm.initial_state((batch,), params.lstm)
    return TrainState(params, optimizer.init(params), carry, k_steps, average if averaged else None)


def begin_average(state: TrainState, losses: Sequence[float], *, patience: int = 5) -> TrainState:
    """``state``, averaging from here on if validation has stopped getting better.

    That is non-monotonic triggering (Merity, Keskar & Socher 2018): the last of the ``losses`` is worse than the best
    of those more than ``patience`` validations ago.
    """
    if state.average is None or len(losses) <= patience or losses[-1] <= min(losses[: -patience - 1], default=math.inf):
        return state
    return state._replace(average=state.average._replace(began=jnp.ones((), bool)))


def _averaged(average: Average | None, params: Any) -> Average | None:
    """The average, with one more step in it once it has begun."""
    if average is None:
        return None
    steps = average.steps + average.began.astype(jnp.int32)
    share = 1.0 / jnp.maximum(steps, 1)  # 1 before it begins and at its first step: the parameters themselves
    before: Any = average.params
    mean: Any = optax.incremental_update(params, before, share)
    return Average(mean, steps, average.began)


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    activation: float = 0.0,
    temporal_activation: float = 0.0,
) -> Step:
    """One step of truncated backpropagation through time, compiled, its state donated.

    Args:
      model: the model.
      optimizer: of its parameters.
      activation: weight of `jaxlstm.regularisers.activation`, of the dropped outputs.
      temporal_activation: weight of `jaxlstm.regularisers.temporal_activation`, of the outputs before they are dropped.

    Returns:
      ``step(state, inputs, targets, first, progress) -> (state, loss)`` with int ``inputs`` and ``targets`` ``(T, B)``;
      ``first`` says that the streams begin here, so the carried state is dropped; ``progress`` in [0, 1] sets the
      learning rate; ``loss`` in nats per token, without the weighted terms.
    """

    def loss(params: LanguageModelParams, carry: State, inputs: ArrayLike, targets: ArrayLike, key: Array):
        ys, dropped, carry = model.outputs(params, inputs, carry, key=key)
        logits = model.logits(params, dropped)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        total = nats
        if activation:
            total += activation * regularisers.activation(dropped)
        if temporal_activation:
            total += temporal_activation * regularisers.temporal_activation(ys)
        return total, (nats, carry)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, inputs: ArrayLike, targets: ArrayLike, first: ArrayLike, progress: ArrayLike):
        key, k_step = jax.random.split(state.key)
        # The carried state is an argument, not differentiated: the gradient stops at the window's edge.
        carry = jax.tree.map(lambda a: jnp.where(first, 0, a), state.carry)
        slope = jax.grad(loss, has_aux=True)
        gradient, (value, carry) = slope(state.params, carry, inputs, targets, k_step)
        params: Any = state.params
        updates, opt_state = optimizer.update(gradient, state.opt_state, params, progress=progress)
        params = optax.apply_updates(params, updates)
        return TrainState(params, opt_state, carry, key, _averaged(state.average, params)), value

    return step


@partial(jax.jit, static_argnums=0)
def _score(
    model: LanguageModel,
    params: LanguageModelParams,
    state: State,
    inputs: Int[ArrayLike, "T B"],
    targets: Int[ArrayLike, "T B"],
    counted: Bool[ArrayLike, "T B"],
    resets: Bool[ArrayLike, "T B"],
) -> tuple[Float[Array, ""], State]:
    logits, state = model(params, inputs, state, resets=resets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(counted, losses, 0).sum(), state


def evaluate(
    model: LanguageModel, params: LanguageModelParams, ids: np.ndarray, *, batch: int = 32, window: int = 128
) -> float:
    """Loss in nats per token over all of ``ids`` but the first, each predicted once; see `evaluation_windows`."""
    state = model.lstm.initial_state((batch,))
    total = 0.0
    for part in evaluation_windows(ids, batch, window):
        nats, state = _score(model, params, state, *part)
        total += float(nats)
    return total / (len(ids) - 1)


def save_params(path: Path, params: LanguageModelParams) -> None:
    """Write parameters to a file, whole or not at all (MessagePack, by Flax)."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(flax.serialization.to_bytes(params))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_params(path: Path, model: LanguageModel) -> LanguageModelParams:
    """The parameters in a file that `save_params` wrote.

    Raises:
      ValueError: if the file is missing or damaged, or holds the parameters of another model.
    """
    expected = jax.eval_shape(model.init, jax.random.key(0))
    try:
        params: Any = flax.serialization.from_bytes(expected, path.read_bytes())
    except OSError as error:
        raise ValueError(f"no checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # MessagePack and Flax raise many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or of another model: {reason}") from None
    for (name, wanted), leaf in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(params)):
        if leaf.shape != wanted.shape:
            name = jax.tree_util.keystr(name, simple=True, separator=".")
            raise ValueError(f"{path} is of another model: {name} has shape {leaf.shape}, expected {wanted.shape}")
    return params
