"""The copying task: repeat ten symbols after a delay (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data import synthetic
from jaxlstm.training.tasks.language import build_language_model
from jaxlstm.training.tasks.task import Task, unused_options
from jaxlstm.training.train_step import Loss

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
UNUSED = unused_options("window", "embedding", "softmax")
NUM_SYMBOLS = 10  # eight to repeat, the blank and the cue
LENGTH = 10  # symbols to repeat
NUM_VALIDATION = 500  # sequences held out from training


def make(options: Options) -> Task:
    """Returns the copying task with a delay of ``--window`` steps; every batch is new."""
    num_steps = options.window + 2 * LENGTH
    model = build_language_model(options, NUM_SYMBOLS, longest_dependency=num_steps)

    def draw_batch(number: int, batch_size: int) -> synthetic.CopyingBatch:
        return synthetic.copying(np.random.default_rng((options.seed, number)), options.window, batch_size, LENGTH)

    validation = draw_batch(0, NUM_VALIDATION)

    def batches(start: int) -> Iterator[synthetic.CopyingBatch]:
        for number in itertools.count(start + 1):
            yield draw_batch(number, options.batch)

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: synthetic.CopyingBatch, key: Array) -> Any:
            logits, _ = replace(model, lstm=lstm)(params, batch.inputs, key=key)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()
            return nats, (nats, carry)

        return loss

    @jax.jit
    def loss_and_accuracy(params: Any) -> tuple[Array, Array]:
        logits, _ = model(params, validation.inputs)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, validation.targets).mean()
        correct = jnp.argmax(logits[-LENGTH:], -1) == validation.targets[-LENGTH:]
        return nats, correct.mean()

    def evaluate(params: Any) -> dict[str, float]:
        nats, accuracy = loss_and_accuracy(params)
        return {"loss": float(nats), "accuracy": float(accuracy)}

    baseline = LENGTH * math.log(8) / num_steps
    return Task(
        description=f"{LENGTH} symbols to repeat after {options.window:,} steps; guessing costs {baseline:.4f}",
        title=f"copying after {options.window:,} steps: {options.cell}",
        loss_unit="nats per step",
        unit_name="sequences",
        units_per_step=options.batch,
        validation_units=NUM_VALIDATION,
        format_loss=lambda value: f"{value:.5f} nats",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, batch: (params.embedding[batch.inputs], None),
        evaluate=evaluate,
    )
