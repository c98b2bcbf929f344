"""Training: the optimiser, one compiled step, and the parameters in a file."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxlstm.atomic_write import atomic_write
from jaxlstm.params import Layer

BEST = "best.msgpack"  # the best parameters, in the folder of a run
SCHEDULE_TICKS = 10_000  # a run, however long and whatever bounds it, is this long to the schedule

# (params, carry, batch, key) -> (what is minimised, (what is reported, the recurrent state after the batch))
Loss = Callable[[Any, Any, Any, Array], tuple[Array, tuple[Array, Any]]]


class Average(NamedTuple):
    """The mean of the parameters since averaging began; until then the parameters themselves."""

    params: Any  # as those of the model
    steps: Array  # int, in the mean; 0 until averaging begins
    began: Array  # bool


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Any
    opt_state: optax.ApplyIfFiniteState
    carry: Any  # the recurrent state after the last batch, (L, B, .); None where batches do not go on from each other
    key: Array  # PRNG key of the steps to come
    average: Average | None = None  # of the parameters over steps, for averaged SGD

    @property
    def trained(self) -> Any:
        """The parameters to evaluate and to keep."""
        return self.params if self.average is None else self.average.params


class Outcome(NamedTuple):
    """What a step tells of itself."""

    loss: Array  # as reported by the loss function
    skipped: Array  # int: steps so far whose loss or gradient was not finite; they changed nothing
    in_a_row: Array  # int: how many of them came last
    gradient: dict[
        str, Array
    ]  # its norm before clipping: of each layer of the recurrent network, and of each other array


Step = Callable[[TrainState, Any, ArrayLike], tuple[TrainState, Outcome]]


def optimizer(
    learning_rate: float, *, warmup: float, weight_decay: float, clip: float, kind: str = "adamw"
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD behind clipping by global norm, over the progress of the run.

    AdamW warms up and decays by a cosine. SGD, which is for averaging (Merity, Keskar & Socher 2018), warms up and
    stays. The schedule counts in ticks of progress, passed to each update as ``progress``, not in updates: so the same
    schedule serves a run bounded by steps and one bounded by the clock.

    Gradients that are not finite change nothing and are counted.

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

    chain = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.identity() if kind == "asgd" else optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scale),
    )
    never = int(jnp.iinfo(jnp.int32).max)  # they are not let through, however many come in a row
    return optax.with_extra_args_support(optax.apply_if_finite(chain, max_consecutive_errors=never))


def start(
    params: Any, optimizer: optax.GradientTransformation, carry: Any, key: Array, *, averaged: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      params: initial parameters.
      optimizer: of the parameters.
      carry: recurrent state before the first batch; None where there is none to carry.
      key: PRNG key of the steps.
      averaged: whether to make room for an average of parameters.
    """
    average = Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    opt_state: Any = optimizer.init(params)
    return TrainState(params, opt_state, carry, key, average if averaged else None)


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


def make_step(loss: Loss, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """One step of training, compiled, its state donated.

    Where the loss or its gradient is not finite, only the key moves on: parameters, optimiser, average and recurrent
    state stay as they were, and the step is counted.

    Args:
      loss: ``(params, carry, batch, key) -> (what is minimised, (what is reported, carry))``.
      optimizer: as made by `optimizer`.

    Returns:
      ``step(state, batch, progress) -> (state, outcome)``; ``progress`` in [0, 1] sets the learning rate.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Any, progress: ArrayLike) -> tuple[TrainState, Outcome]:
        key, k_step = jax.random.split(state.key)
        # The carried state is an argument, not differentiated: the gradient stops at the batch's edge.
        slope = jax.value_and_grad(loss, has_aux=True)
        (total, (value, carry)), gradient = slope(state.params, state.carry, batch, k_step)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(total), g, jnp.nan), gradient)
        opt_state: Any
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, progress=progress)
        params = optax.apply_updates(state.params, updates)
        after = (carry, _averaged(state.average, params))
        carry, average = jax.tree.map(
            lambda new, old: jnp.where(opt_state.last_finite, new, old), after, (state.carry, state.average)
        )
        outcome = Outcome(value, opt_state.total_notfinite, opt_state.notfinite_count, norms(gradient))
        return TrainState(params, opt_state, carry, key, average), outcome

    return step


def norms(gradient: Any) -> dict[str, Array]:
    """The Euclidean norm of each `jaxlstm.Layer`, and of each array outside of one, by its path."""
    parts = jax.tree_util.tree_flatten_with_path(gradient, is_leaf=lambda part: isinstance(part, Layer))[0]
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): optax.tree.norm(part) for path, part in parts}


def prefetch(batches: Iterator[Any], place: Callable[[Any], Any] = jax.device_put, ahead: int = 2) -> Iterator[Any]:
    """The batches, on the devices before they are asked for.

    Args:
      batches: of host arrays.
      place: puts one on the devices; it need not wait for that.
      ahead: how many lie there before they are asked for.
    """
    waiting = collections.deque(place(batch) for batch in itertools.islice(batches, ahead))
    while waiting:
        batch = waiting.popleft()
        waiting.extend(place(batch) for batch in itertools.islice(batches, 1))
        yield batch


def save_params(path: Path, params: Any) -> None:
    """Write parameters to a file, whole or not at all (MessagePack, by Flax)."""
    with atomic_write(path) as file:
        file.write(flax.serialization.to_bytes(params))


def load_params(path: Path, init: Callable[[Array], Any]) -> Any:
    """The parameters in a file that `save_params` wrote.

    Args:
      path: of the file.
      init: makes parameters of the same structure from a PRNG key; it is not run.

    Raises:
      ValueError: if the file is missing or damaged, or holds the parameters of another model.
    """
    expected = jax.eval_shape(init, jax.random.key(0))
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
