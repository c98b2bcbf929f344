"""Why an LSTM learns over long spans and a vanilla network does not: the adding task, and the gradient through it."""

from collections.abc import Callable
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

CHUNK = 50  # updates compiled into one loop, and averaged into one point of a learning curve


class Adder(NamedTuple):
    """A network that reads a sequence and answers with one number."""

    network: Params
    w: Array  # (H,), from the last output
    b: Array  # ()


class Learner(NamedTuple):
    """One network on its way through the task."""

    before: np.ndarray  # (T,), the norm of the loss' gradient with respect to the state after each step, at first
    after: np.ndarray  # (T,), the same after training
    updates: np.ndarray  # (N,), at which the errors were measured
    errors: np.ndarray  # (N,), mean squared error of training, on fresh examples all the time
    params: tuple[Adder, Adder]  # before and after training


def contestants(hidden: int) -> dict[str, tuple[LSTM, float]]:
    """The networks that are compared and their learning rates, by the names that the pictures give them.

    The vanilla network learns the task over 100 steps at none of the rates 1e-4, 3e-4, 1e-3, 2e-3 and 5e-3; above 1e-3
    its units are driven into saturation besides.
    """
    return {
        "vanilla RNN": (LSTM(2, hidden, cell="rnn"), 1e-3),
        "LSTM, forget bias 0": (LSTM(2, hidden, forget_bias=0.0), 5e-3),
        "LSTM, forget bias 1": (LSTM(2, hidden), 5e-3),
    }


def answer(lstm: LSTM, params: Adder, ys: Float[Array, "T B H"]) -> Float[Array, " B"]:
    """The sum that the network believes in, from its outputs."""
    return ys[-1] @ params.w + params.b


def learn(
    lstm: LSTM,
    *,
    steps: int,
    updates: int,
    batch: int,
    learning_rate: float,
    seed: int,
    tell: Callable[[int, float], Any] = lambda updates, error: None,
) -> Learner:
    """Train on the adding task with Adam, and measure the gradient through time before and after.

    Args:
      lstm: the network.
      steps: T, the length of a sequence.
      updates: of training, each on ``batch`` fresh sequences; rounded up to whole chunks.
      batch: sequences of one update.
      learning_rate: of Adam, behind clipping by global norm at 1.
      seed: of the weights and the data; the data are the same for every network.
      tell: called after each chunk with the updates made and the error.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    w = jax.random.normal(jax.random.fold_in(key, 1), (lstm.output_size,), jnp.float32) * lstm.output_size**-0.5
    params = before = Adder(lstm.init(key), w, jnp.zeros((), jnp.float32))
    probe = synthetic.adding(np.random.default_rng(seed + 1), steps, 32)
    opt_state: Any = optimizer.init(params)  # pyright: ignore[reportArgumentType]
    errors = []
    chunks = -(-updates // CHUNK)
    for chunk in range(chunks):
        data = [synthetic.adding(rng, steps, batch) for _ in range(CHUNK)]
        params, opt_state, error = _updates(
            lstm, optimizer, params, opt_state, synthetic.Adding(*map(np.stack, zip(*data)))
        )
        errors.append(float(error))
        tell((chunk + 1) * CHUNK, errors[-1])
    return Learner(
        gradient_norms(lstm, before, probe),
        gradient_norms(lstm, params, probe),
        CHUNK * np.arange(1, chunks + 1),
        np.array(errors),
        (before, params),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _updates(lstm: LSTM, optimizer: Any, params: Adder, opt_state: Any, data: synthetic.Adding) -> Any:
    """A chunk of updates, with their mean error."""

    def error(params: Adder, inputs: Array, targets: Array) -> Array:
        return ((answer(lstm, params, lstm(params.network, inputs)[0]) - targets) ** 2).mean()

    def update(carry: Any, data: Any) -> Any:
        params, opt_state = carry
        value, gradient = jax.value_and_grad(error)(params, *data)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), value

    (params, opt_state), errors = jax.lax.scan(update, (params, opt_state), data)
    return params, opt_state, errors.mean()


def gradient_norms(lstm: LSTM, params: Adder, examples: synthetic.Adding) -> np.ndarray:
    """The norm of the loss' gradient with respect to the memory after each step, ``(T,)``, mean over the batch.

    The memory is c, or h in a network without c.
    """

    @jax.jit
    def norms(params: Adder) -> Array:
        flow = gradient_flow(
            lstm,
            params.network,
            examples.inputs,
            lambda ys: ((answer(lstm, params, ys) - examples.targets) ** 2).mean(),
            jacobian=None,
        )
        found = flow.layers[0].forward
        return (found.h if found.c is None else found.c).mean(1)

    return np.asarray(norms(params))


def sentence(learners: dict[str, Learner], steps: int) -> str:
    """What the curves show, with their numbers."""
    updates = max(int(one.updates[-1]) for one in learners.values())
    lines = [
        f"After {updates:,} updates on the adding task over {steps} steps"
        f" (always answering 1 has a mean squared error of {synthetic.ADDING_BASELINE:.3f}):"
    ]
    for name, one in learners.items():
        first, last = (float(norms[0] / norms[-1]) for norms in (one.before, one.after))
        lines.append(
            f"  {name}: mean squared error {one.errors[-1]:.4f}; of the gradient at the last step {first:.1e} reached"
            f" the first before training, {last:.1e} after."
        )
    return "\n".join(lines)
