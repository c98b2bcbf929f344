"""Training a language model: the optimiser, one compiled step, evaluation, checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm.data import evaluation_windows
from jaxlstm.language_model import LanguageModel, LanguageModelParams
from jaxlstm.types import State

SCHEDULE_TICKS = 10_000  # a run, however long and whatever bounds it, is this long to the schedule


class TrainState(NamedTuple):
    """All that a step changes."""

    params: LanguageModelParams
    opt_state: optax.OptState
    carry: State  # the recurrent state after the last window, (L, B, .)
    key: Array  # PRNG key of the steps to come


Step = Callable[[TrainState, ArrayLike, ArrayLike, ArrayLike, ArrayLike], tuple[TrainState, Array]]


def optimizer(
    learning_rate: float, *, warmup: float, weight_decay: float, clip: float
) -> optax.GradientTransformationExtraArgs:
    """AdamW behind clipping by global norm; warm-up and cosine decay over the progress of the run.

    Its schedule counts in ticks of progress, passed to each update as ``progress``, not in updates: so the same
    schedule serves a run bounded by steps and one bounded by the clock.

    Args:
      learning_rate: the peak.
      warmup: share of the run in which the rate rises from 0 to its peak.
      weight_decay: decoupled, on matrices only.
      clip: largest global norm of a gradient.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, round(warmup * SCHEDULE_TICKS), SCHEDULE_TICKS, end_value=0.01 * learning_rate
    )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def scale(updates: Any, state: Any, params: Any = None, *, progress: ArrayLike = 0.0, **_: Any) -> tuple[Any, Any]:
        del params
        rate = schedule(jnp.asarray(progress) * SCHEDULE_TICKS)
        return jax.tree.map(lambda u: -jnp.asarray(rate, u.dtype) * u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scale),
    )


def start(model: LanguageModel, optimizer: optax.GradientTransformation, batch: int, key: Array) -> TrainState:
    """The state before the first step, for ``batch`` streams."""
    k_init, k_steps = jax.random.split(key)
    params: Any = model.init(k_init)
    return TrainState(params, optimizer.init(params), model.lstm.initial_state((batch,)), k_steps)


def make_step(model: LanguageModel, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """One step of truncated backpropagation through time, compiled, its state donated.

    Returns:
      ``step(state, inputs, targets, first, progress) -> (state, loss)`` with int ``inputs`` and ``targets`` ``(T, B)``;
      ``first`` says that the streams begin here, so the carried state is dropped; ``progress`` in [0, 1] sets the
      learning rate; ``loss`` in nats per token.
    """

    def loss(params: LanguageModelParams, carry: State, inputs: ArrayLike, targets: ArrayLike, key: Array):
        logits, carry = model(params, inputs, carry, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), carry

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, inputs: ArrayLike, targets: ArrayLike, first: ArrayLike, progress: ArrayLike):
        key, k_step = jax.random.split(state.key)
        # The carried state is an argument, not differentiated: the gradient stops at the window's edge.
        carry = jax.tree.map(lambda a: jnp.where(first, 0, a), state.carry)
        (value, carry), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, carry, inputs, targets, k_step)
        params: Any = state.params
        updates, opt_state = optimizer.update(gradient, state.opt_state, params, progress=progress)
        params = optax.apply_updates(params, updates)
        return TrainState(params, opt_state, carry, key), value

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


class BestCheckpoint:
    """The parameters of the best step so far, in a folder: atomic, written in the background (Orbax)."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, params: LanguageModelParams) -> None:
        """Keep ``params`` in place of what was kept before."""
        self._manager.save(step, args=ocp.args.StandardSave(params))

    def restore(self, model: LanguageModel) -> LanguageModelParams:
        """The kept parameters.

        Raises:
          ValueError: if there are none, or they are damaged or of another model.
        """
        folder = self._manager.directory
        step = self._manager.latest_step()
        if step is None:
            raise ValueError(f"no checkpoint in {folder}")
        expected = jax.eval_shape(model.init, jax.random.key(0))
        try:
            params: Any = self._manager.restore(step, args=ocp.args.StandardRestore(expected))
            return params
        except Exception as error:  # Orbax raises whatever its storage layers do
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"cannot read the checkpoint of step {step} in {folder}: {reason}") from error

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
