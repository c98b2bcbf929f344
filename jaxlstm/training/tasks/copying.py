"""Ten symbols to be said again after a delay (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data import synthetic
from jaxlstm.training.tasks.language import build
from jaxlstm.training.tasks.task import OF_SERIES, Task

DEFAULTS: dict[str, Any] = {
    "embedding": 10,
    "hidden": 256,
    "dropout": 0.0,
    "window": 50,
    "batch": 32,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "max_steps": 3000,
    "valid_every": 250,
}
UNUSED = ("data", "activation", "temporal_activation", *OF_SERIES)
SYMBOLS, LENGTH = 10, 10  # eight to remember, blank and the one that asks for the answer; symbols to remember
VALIDATED = 500  # sequences that are never trained on


def make(options: Options) -> Task:
    """Sequences with a delay of ``--window`` steps, drawn anew for every batch."""
    model = build(options, SYMBOLS, remember=options.window + 2 * LENGTH)
    held_out = synthetic.copying(np.random.default_rng((options.seed, 0)), options.window, VALIDATED, LENGTH)

    def batches(start: int) -> Iterator[synthetic.Copying]:
        while True:
            start += 1
            yield synthetic.copying(np.random.default_rng((options.seed, start)), options.window, options.batch, LENGTH)

    def loss(params: Any, carry: Any, batch: synthetic.Copying, key: Array) -> tuple[Array, tuple[Array, Any]]:
        logits, _ = model(params, batch.inputs, key=key)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()
        return value, (value, carry)

    @jax.jit
    def score(params: Any) -> tuple[Array, Array]:
        logits, _ = model(params, held_out.inputs)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.targets).mean()
        right = jnp.argmax(logits[-LENGTH:], -1) == held_out.targets[-LENGTH:]
        return nats, right.mean()

    def evaluate(params: Any) -> dict[str, float]:
        nats, right = score(params)
        return {"loss": float(nats), "accuracy": float(right)}

    guess = LENGTH * math.log(8) / (options.window + 2 * LENGTH)
    return Task(
        about=f"{LENGTH} symbols to be said again after {options.window:,} steps; guessing costs {guess:.4f}",
        title=f"copying after {options.window:,} steps: {options.cell}",
        unit="nats per step",
        counted="sequences",
        per_step=options.batch,
        evaluated=VALIDATED,
        say=lambda value: f"{value:.5f} nats",
        init=model.init,
        carry=lambda params: None,
        batches=batches,
        loss=loss,
        lstm=model.lstm,
        reads=lambda params, carry, batch: (params.embedding[batch.inputs], None),
        evaluate=evaluate,
    )
