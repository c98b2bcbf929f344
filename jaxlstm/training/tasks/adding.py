"""The adding task: the sum of two marked numbers (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data import synthetic
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks.task import Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "hidden": 64,
    "dropout": 0.0,
    "window": 400,
    "batch": 50,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "max_steps": 1000,
    "valid_every": 250,
}
UNUSED = unused_options("window")
NUM_VALIDATION = 500  # sequences held out from training


def make(options: Options) -> Task:
    """Returns the adding task over ``--window`` steps; every batch is new."""
    if options.window < 2:
        raise ValueError(f"--window must be at least 2 for --task adding, got {options.window}")
    model = SequenceRegressor(build_lstm(options, 2, longest_dependency=options.window), 1, options.dropout)

    def draw_batch(number: int, batch_size: int) -> synthetic.AddingBatch:
        # A generator per batch: a resumed run draws the next batch without drawing those before it.
        return synthetic.adding(np.random.default_rng((options.seed, number)), options.window, batch_size)

    validation = draw_batch(0, NUM_VALIDATION)

    def batches(start: int) -> Iterator[synthetic.AddingBatch]:
        for number in itertools.count(start + 1):
            yield draw_batch(number, options.batch)

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: synthetic.AddingBatch, key: Array) -> Any:
            value = mean_squared_error(replace(model, lstm=lstm), params, batch, key)
            return value, (value, carry)

        return loss

    validation_loss = jax.jit(lambda params: mean_squared_error(model, params, validation))
    return Task(
        description=f"the sum of two numbers among {options.window:,}; always answering 1 costs "
        f"{synthetic.ADDING_BASELINE:.3f}",
        title=f"adding over {options.window:,} steps: {options.cell}",
        loss_unit="mean squared error",
        unit_name="sequences",
        units_per_step=options.batch,
        validation_units=NUM_VALIDATION,
        format_loss=lambda value: f"{value:.5f} squared error",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, batch: (batch.inputs, None),
        evaluate=lambda params: {"loss": float(validation_loss(params))},
    )


def mean_squared_error(
    model: SequenceRegressor, params: Any, batch: synthetic.AddingBatch, key: Array | None = None
) -> Array:
    """Returns the mean squared error of a batch; ``key`` turns dropout on."""
    return jnp.mean((model(params, batch.inputs, key=key)[..., 0] - batch.targets) ** 2)
