"""Compares a vanilla RNN with LSTMs on the adding task: learning curves and gradient norms through time."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from jaxlstm.diagnostics.gradient_flow import gradient_flow
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params
from jaxlstm.training.data import synthetic

CHUNK = 50  # most updates per compiled loop; their mean error is one point of a learning curve
MIN_POINTS = 20  # of a learning curve, if there are as many updates


class AdderParams(NamedTuple):
    """The parameters of an LSTM and a linear layer that maps its last output to one number."""

    lstm: Params
    w_out: Array  # (H,)
    b_out: Array  # ()


class TrainingResult(NamedTuple):
    """The learning curve of one network and its gradients before and after training.

    A gradient norm is the norm of the gradient of the loss with respect to the state after each step. Its elementwise
    part passes from step to step along c alone, not through ``W_h``.
    """

    gradient_norms_before: np.ndarray  # (T,) before training
    gradient_norms_after: np.ndarray  # (T,) after training
    updates: np.ndarray  # (N,) number of updates at each point of the learning curve
    errors: np.ndarray  # (N,) mean squared training error; every batch is new
    params_before: AdderParams
    params_after: AdderParams
    elementwise_norms_before: np.ndarray  # (T,) before training
    elementwise_norms_after: np.ndarray  # (T,) after training


def compared_networks(hidden_size: int) -> dict[str, tuple[LSTM, float]]:
    """Returns the compared networks and their learning rates, by the names in the figures.

    The vanilla RNN does not learn the task over 100 steps at any of the rates 1e-4, 3e-4, 1e-3, 2e-3 and 5e-3; above
    1e-3 its units also saturate.
    """
    return {
        "vanilla RNN": (LSTM(2, hidden_size, cell="rnn"), 1e-3),
        "LSTM, forget bias 0": (LSTM(2, hidden_size, forget_bias=0.0), 5e-3),
        "LSTM, forget bias 1": (LSTM(2, hidden_size), 5e-3),
    }


def init_params(lstm: LSTM, key: Array) -> AdderParams:
    """Returns initial parameters; the linear layer's weights are normal with standard deviation 1/sqrt(H)."""
    h = lstm.output_size
    w_out = jax.random.normal(jax.random.fold_in(key, 1), (h,), jnp.float32) * h**-0.5
    return AdderParams(lstm.init(key), w_out, jnp.zeros((), jnp.float32))


def mean_squared_error(
    params: AdderParams, ys: Float[Array, "T B H"], targets: Float[Array | np.ndarray, " B"]
) -> Float[Array, ""]:
    """Returns the error of the sums predicted from the last output."""
    return ((ys[-1] @ params.w_out + params.b_out - targets) ** 2).mean()


def train_network(
    lstm: LSTM,
    *,
    steps: int,
    updates: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_progress: Callable[[int, float], Any] = lambda updates, error: None,
) -> TrainingResult:
    """Trains on the adding task with Adam, and computes the gradient norms through time before and after.

    Args:
      lstm: the network.
      steps: length of a sequence, T.
      updates: number of updates.
      batch_size: sequences per update.
      learning_rate: learning rate of Adam; gradients are clipped to a global norm of 1.
      seed: seed of weights and data; every network trains on the same data.
      on_progress: called after each chunk with the number of updates so far and the error.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    params_before = init_params(lstm, jax.random.key(seed))
    params: Any = params_before  # the types of Optax do not include NamedTuples
    rng = np.random.default_rng(seed)
    opt_state: Any = optimizer.init(params)
    errors, ends = [], chunk_ends(updates)
    for start, end in itertools.pairwise((0, *ends)):
        batches = [synthetic.adding(rng, steps, batch_size) for _ in range(end - start)]
        stacked = synthetic.AddingBatch(*map(np.stack, zip(*batches)))
        params, opt_state, error = _train_chunk(lstm, optimizer, params, opt_state, stacked)
        errors.append(float(error))
        on_progress(end, errors[-1])
    probe = synthetic.adding(np.random.default_rng(seed + 1), steps, 32)
    norms_before, elementwise_before = gradient_norms(lstm, params_before, probe)
    norms_after, elementwise_after = gradient_norms(lstm, params, probe)
    return TrainingResult(
        gradient_norms_before=norms_before,
        gradient_norms_after=norms_after,
        updates=np.array(ends),
        errors=np.array(errors),
        params_before=params_before,
        params_after=params,
        elementwise_norms_before=elementwise_before,
        elementwise_norms_after=elementwise_after,
    )


def chunk_ends(updates: int) -> list[int]:
    """Returns the number of updates after each compiled loop: the points of a learning curve."""
    size = max(1, min(CHUNK, updates // MIN_POINTS))
    return [*range(size, updates, size), updates]


@partial(jax.jit, static_argnums=(0, 1))
def _train_chunk(
    lstm: LSTM,
    optimizer: optax.GradientTransformationExtraArgs,
    params: Any,
    opt_state: Any,
    batches: synthetic.AddingBatch,
) -> tuple[Any, Any, Array]:
    """Trains on one batch after the other; returns parameters, optimizer state and the mean error."""

    def loss(params: AdderParams, batch: synthetic.AddingBatch) -> Array:
        ys, _ = lstm(params.lstm, batch.inputs)
        return mean_squared_error(params, ys, batch.targets)

    def update(carry: tuple[Any, Any], batch: synthetic.AddingBatch) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = carry
        error, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), error

    (params, opt_state), errors = jax.lax.scan(update, (params, opt_state), batches)
    return params, opt_state, errors.mean()


def gradient_norms(lstm: LSTM, params: AdderParams, batch: synthetic.AddingBatch) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradient norms of the loss with respect to the state after each step, ``(T,)``, mean over the batch.

    The state is c, or h for a cell without c. The second array has the norms of the elementwise part of the gradient.
    """

    @jax.jit
    def norms(params: AdderParams) -> list[Array]:
        flow = gradient_flow(
            lstm,
            params.lstm,
            batch.inputs,
            lambda ys: mean_squared_error(params, ys, batch.targets),
            jacobian=None,
        )
        layers = (flow.layers[0].forward, flow.elementwise[0].forward)
        return [(layer.h if layer.c is None else layer.c).mean(1) for layer in layers]

    total, elementwise = norms(params)
    return np.asarray(total), np.asarray(elementwise)


def format_summary(results: Mapping[str, TrainingResult], steps: int) -> str:
    """Returns a line per network with its final error and the share of the gradient that reaches the first step."""
    updates = max(int(result.updates[-1]) for result in results.values())
    lines = [
        f"After {updates:,} updates on the adding task over {steps} steps"
        f" (always answering 1 has a mean squared error of {synthetic.ADDING_BASELINE:.3f}):"
    ]
    for name, result in results.items():
        (before, along_before), (after, along_after) = (
            (norms[0] / norms[-1], elementwise[0] / norms[-1])
            for norms, elementwise in (
                (result.gradient_norms_before, result.elementwise_norms_before),
                (result.gradient_norms_after, result.elementwise_norms_after),
            )
        )
        lines.append(
            f"  {name}: mean squared error {result.errors[-1]:.4f}; gradient norm at the first step relative to the"
            f" last step {before:.1e} before training, {after:.1e} after, without W_h {along_before:.1e} and"
            f" {along_after:.1e}."
        )
    return "\n".join(lines)
