"""One compiled training step: its state, gradients, averaged parameters and metrics."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxlstm.params import Layer

# (params, carry, batch, key) -> (minimized loss, (reported loss, recurrent state after the batch))
Loss = Callable[[Any, Any, Any, Array], tuple[Array, tuple[Array, Any]]]


class Average(NamedTuple):
    """Mean of the parameters since averaging started; until then the parameters themselves."""

    params: Any  # same structure as the model's
    steps: Array  # (), int: steps in the mean, 0 until averaging starts
    started: Array  # (), bool


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Any
    opt_state: optax.ApplyIfFiniteState
    carry: Any  # recurrent state after the last batch, (L, B, .); None for tasks with independent batches
    key: Array  # PRNG key of the following steps
    average: Average | None = None  # for averaged SGD

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and to save."""
        return self.params if self.average is None else self.average.params


class StepMetrics(NamedTuple):
    """Metrics of one step."""

    loss: Array  # (), as reported by the loss function
    skipped: Array  # (), int: steps so far with a non-finite loss or gradient; they changed nothing
    consecutive_skipped: Array  # (), int: how many of them came last
    gradient_norms: dict[str, Array]  # before clipping: of each recurrent layer, and of each other array


Step = Callable[[TrainState, Any, ArrayLike], tuple[TrainState, StepMetrics]]


def init_train_state(
    params: Any, optimizer: optax.GradientTransformation, carry: Any, key: Array, *, averaged: bool = False
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: initial parameters.
      optimizer: the optimizer of the steps.
      carry: recurrent state before the first batch; None for tasks with independent batches.
      key: PRNG key of the steps.
      averaged: whether the state holds an average of the parameters.
    """
    average = Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    opt_state: Any = optimizer.init(params)
    return TrainState(params, opt_state, carry, key, average if averaged else None)


def maybe_start_averaging(state: TrainState, valid_losses: Sequence[float], *, patience: int = 5) -> TrainState:
    """Returns ``state``, with averaging started if validation stopped improving.

    The criterion is non-monotonic triggering (Merity, Keskar & Socher 2018): the last loss is worse than the best one
    from more than ``patience`` validations ago.

    Args:
      state: the state.
      valid_losses: validation losses so far, in order.
      patience: number of recent validations left out of the comparison.
    """
    if state.average is None or len(valid_losses) <= patience:
        return state
    if valid_losses[-1] <= min(valid_losses[: -patience - 1], default=math.inf):
        return state
    started = jax.device_put(np.ones((), bool), state.average.started.sharding)
    return state._replace(average=state.average._replace(started=started))


def _update_average(average: Average | None, params: Any) -> Average | None:
    """Adds the parameters to the mean once averaging started; until then replaces it by them."""
    if average is None:
        return None
    steps = average.steps + average.started.astype(jnp.int32)
    weight = 1.0 / jnp.maximum(steps, 1)  # 1 before averaging starts and at its first step
    old_mean: Any = average.params
    mean: Any = optax.incremental_update(params, old_mean, weight)
    return Average(mean, steps, average.started)


def make_step(loss: Loss, optimizer: optax.GradientTransformationExtraArgs, state_sharding: Any = None) -> Step:
    """Returns one compiled step of training that donates its state.

    If the loss or its gradient is not finite, only the key advances: parameters, optimizer state, average and
    recurrent state stay unchanged, and the step is counted.

    Args:
      loss: ``(params, carry, batch, key) -> (minimized loss, (reported loss, new carry))``.
      optimizer: from `jaxlstm.training.optimizer.make_optimizer`.
      state_sharding: sharding of every array of the state, before and after the step. Left to the compiler, some arrays
        change theirs at the first step: the second step is then compiled again, and a run resumed with the original
        shardings adds floats in another order. None for a single device.

    Returns:
      ``step(state, batch, progress) -> (state, metrics)``; ``progress`` in [0, 1] sets the learning rate.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=(state_sharding, None))
    def step(state: TrainState, batch: Any, progress: ArrayLike) -> tuple[TrainState, StepMetrics]:
        key, k_step = jax.random.split(state.key)
        # The carried state is not differentiated: backpropagation is truncated at the edge of the batch.
        loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
        (total, (value, carry)), gradient = loss_and_gradient(state.params, state.carry, batch, k_step)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(total), g, jnp.nan), gradient)
        opt_state: Any
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, progress=progress)
        params = optax.apply_updates(state.params, updates)
        carry, average = jax.tree.map(
            lambda new, old: jnp.where(opt_state.last_finite, new, old),
            (carry, _update_average(state.average, params)),
            (state.carry, state.average),
        )
        metrics = StepMetrics(value, opt_state.total_notfinite, opt_state.notfinite_count, layer_norms(gradient))
        return TrainState(params, opt_state, carry, key, average), metrics

    return step


def layer_norms(gradient: Any) -> dict[str, Array]:
    """Returns the Euclidean norm of each `jaxlstm.Layer` and of each array outside of one, by path."""
    parts = jax.tree.leaves_with_path(gradient, is_leaf=lambda part: isinstance(part, Layer))
    return {jax.tree_util.keystr(path, simple=True, separator="."): optax.tree.norm(part) for path, part in parts}


def prefetch(batches: Iterator[Any], place: Callable[[Any], Any] = jax.device_put, num_ahead: int = 2) -> Iterator[Any]:
    """Yields the batches, transferred to the devices ahead of their use.

    Args:
      batches: iterator of host arrays.
      place: puts one batch on the devices; it may return before the transfer is done.
      num_ahead: number of batches transferred ahead.
    """
    placed = collections.deque(place(batch) for batch in itertools.islice(batches, num_ahead))
    while placed:
        batch = placed.popleft()
        placed.extend(place(batch) for batch in itertools.islice(batches, 1))
        yield batch
