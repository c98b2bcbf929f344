"""The sum of two marked numbers, hundreds of steps back (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016)."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data import synthetic
from jaxlstm.training.models.build import network
from jaxlstm.training.models.sequence_regressor import Readout
from jaxlstm.training.tasks.task import OF_LANGUAGE, OF_SERIES, Task

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
UNUSED = ("data", *OF_LANGUAGE, *OF_SERIES)
VALIDATED = 500  # sequences that are never trained on


def make(options: Options) -> Task:
    """Sequences of ``--window`` steps, drawn anew for every batch."""
    if options.window < 2:
        raise ValueError(f"--window must be at least 2 for --task adding, got {options.window}")
    model = Readout(network(options, 2, remember=options.window), 1, options.dropout)
    held_out = synthetic.adding(np.random.default_rng((options.seed, 0)), options.window, VALIDATED)

    def batches(start: int) -> Iterator[synthetic.Adding]:
        while True:
            start += 1  # each batch has a generator of its own, so that any position is as near as the first
            yield synthetic.adding(np.random.default_rng((options.seed, start)), options.window, options.batch)

    def loss(params: Any, carry: Any, batch: synthetic.Adding, key: Array) -> tuple[Array, tuple[Array, Any]]:
        error = model(params, batch.inputs, key=key)[..., 0] - batch.targets
        value = jnp.mean(error**2)
        return value, (value, carry)

    score = jax.jit(lambda params: jnp.mean((model(params, held_out.inputs)[..., 0] - held_out.targets) ** 2))
    return Task(
        about=f"the sum of two numbers among {options.window:,}; always answering 1 costs "
        f"{synthetic.ADDING_BASELINE:.3f}",
        title=f"adding over {options.window:,} steps: {options.cell}",
        unit="mean squared error",
        counted="sequences",
        per_step=options.batch,
        evaluated=VALIDATED,
        say=lambda value: f"{value:.5f} squared error",
        init=model.init,
        carry=lambda params: None,
        batches=batches,
        loss=loss,
        lstm=model.lstm,
        reads=lambda params, carry, batch: (batch.inputs, None),
        evaluate=lambda params: {"loss": float(score(params))},
    )
