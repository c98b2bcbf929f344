"""Classification of strings of a regular language, longer ones than in training (Delétang et al. 2023).

The model is trained on strings of up to ``--window`` symbols and tested on longer ones of up to 256: it generalizes if
its state follows the automaton of the language. The best parameters are chosen on strings as short as in training.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data.formal_languages import LANGUAGES, Strings
from jaxlstm.training.metrics import write_json
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks.task import Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "hidden": 64,
    "dropout": 0.0,
    "window": 40,
    "batch": 128,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "max_steps": 5000,
    "valid_every": 500,
}
UNUSED = unused_options("window", "language")
MAX_TEST_LENGTH = 256
NUM_VALIDATION = 1000  # strings held out from training
NUM_TEST = 128  # strings per length
TABLE = "accuracy_by_length.json"  # in the run directory


def make(options: Options) -> Task:
    """Returns the task with strings of ``--language``; every batch is new.

    Raises:
      ValueError: if ``--window`` leaves no longer strings for the test.
    """
    language = LANGUAGES[options.language]
    train_lengths = language.lengths(1, options.window)
    test_lengths = language.lengths(options.window, MAX_TEST_LENGTH)
    is_longer = test_lengths > options.window
    if not is_longer.any():
        longest = language.lengths(1, MAX_TEST_LENGTH)[-1]
        raise ValueError(
            f"--window must be less than {longest} for --task formal, which tests on strings of up to {longest} "
            f"symbols, got {options.window}"
        )
    lstm = build_lstm(options, language.num_symbols)
    model = SequenceRegressor(lstm, language.num_classes, options.dropout)

    def draw_batch(number: int, batch_size: int) -> Strings:
        rng = np.random.default_rng((options.seed, number))
        return language.draw(rng, rng.choice(train_lengths, batch_size), options.window)

    validation = draw_batch(0, NUM_VALIDATION)

    def batches(start: int) -> Iterator[Strings]:
        for number in itertools.count(start + 1):
            yield draw_batch(number, options.batch)

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: Strings, key: Array) -> Any:
            logits = replace(model, lstm=lstm)(params, batch.inputs, batch.lengths, key=key)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.classes).mean()
            return nats, (nats, carry)

        return loss

    @jax.jit
    def loss_and_correct(params: Any, strings: Strings) -> tuple[Array, Array]:
        logits = model(params, strings.inputs, strings.lengths)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, strings.classes).mean()
        return nats, jnp.argmax(logits, -1) == strings.classes

    def evaluate(params: Any) -> dict[str, float]:
        nats, correct = loss_and_correct(params, validation)
        return {"loss": float(nats), "accuracy": float(correct.mean())}

    def test(params: Any, folder: Path) -> dict[str, float]:
        correct = np.zeros(len(test_lengths))
        for number in range(1, NUM_TEST + 1):  # one string per length at a time
            rng = np.random.default_rng((options.seed, 0, number))
            correct += loss_and_correct(params, language.draw(rng, test_lengths, MAX_TEST_LENGTH))[1]
        accuracy = correct / NUM_TEST
        write_json(folder / TABLE, {"length": test_lengths.tolist(), "accuracy": accuracy.tolist()})
        return {"test_accuracy": float(accuracy[is_longer].mean())}

    name = options.language.replace("_", " ")
    return Task(
        description=f"{name}: {language.num_classes} classes; trained on strings of up to {options.window} symbols, "
        f"tested up to {MAX_TEST_LENGTH}; guessing gives {1 / language.num_classes:.0%}",
        title=f"{name}: {options.cell}",
        loss_unit="nats per string",
        unit_name="strings",
        units_per_step=options.batch,
        validation_units=NUM_VALIDATION,
        format_loss=lambda value: f"{value:.5f} nats",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=lstm,
        lstm_inputs=lambda params, carry, batch: (batch.inputs, None),
        evaluate=evaluate,
        test=test,
    )
