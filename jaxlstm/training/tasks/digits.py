"""Handwritten digit classification: the eight rows of an image form a sequence (scikit-learn's 1,797 images).

Two thirds of the images are for training, each shifted by up to one pixel; one sixth is for validation, one for the
test.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.errors import optional_package
from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import fingerprint
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks.task import Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "hidden": 64,
    "bidirectional": True,
    "dropout": 0.3,
    "batch": 64,
    "learning_rate": 5e-3,
    "max_steps": 1500,
    "valid_every": 100,
}
UNUSED = unused_options()
NUM_CLASSES = 10


class Digits(NamedTuple):
    """Images and their labels."""

    rows: np.ndarray  # (8, B, 8) float32 in [0, 1]: the rows of the images, top row first
    labels: np.ndarray  # (B,) int32


def make(options: Options) -> Task:
    """Returns the task; the split of the images does not depend on the seed."""
    images, labels = load_images()
    train, valid, test = split_images(images, labels)
    model = SequenceRegressor(build_lstm(options, images.shape[-1]), NUM_CLASSES, options.dropout)
    batch_indices = shuffled_batches(len(train.labels), options.batch, options.seed)

    def batches(start: int) -> Iterator[Digits]:
        for number in itertools.count(start):
            indices, rng = batch_indices(number), np.random.default_rng((options.seed, number))
            yield Digits(shift_images(train.rows[:, indices], rng), train.labels[indices])

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: Digits, key: Array) -> tuple[Array, tuple[Array, None]]:
            logits = replace(model, lstm=lstm)(params, batch.rows, key=key)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
            return nats, (nats, carry)

        return loss

    @jax.jit
    def loss_and_accuracy(params: Any, rows: Array, labels: Array) -> tuple[Array, Array]:
        logits = model(params, rows)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return nats, (jnp.argmax(logits, -1) == labels).mean()

    def metrics(params: Any, part: Digits) -> dict[str, float]:
        nats, accuracy = loss_and_accuracy(params, *part)
        return {"loss": float(nats), "accuracy": float(accuracy)}

    return Task(
        description=f"{len(train.labels):,} images to train on, {len(valid.labels)} to validate, "
        f"{len(test.labels)} to test",
        title="digits, row by row: LSTM",
        loss_unit="nats per image",
        unit_name="images",
        units_per_step=options.batch,
        validation_units=len(valid.labels),
        format_loss=lambda value: f"{value:.4f} nats",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, batch: (batch.rows, None),
        evaluate=lambda params: metrics(params, valid),
        test=lambda params, folder: {f"test_{name}": value for name, value in metrics(params, test).items()},
        fingerprint=fingerprint(images, labels),
    )


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns images, float32 ``(N, 8, 8)`` in [0, 1], and labels, int32 ``(N,)``.

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    with optional_package("sklearn", extra="tasks", purpose="--task digits", distribution="scikit-learn"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    return (np.asarray(pixels) / 16).reshape(-1, 8, 8).astype(np.float32), np.asarray(labels).astype(np.int32)


def split_images(images: np.ndarray, labels: np.ndarray) -> tuple[Digits, Digits, Digits]:
    """Returns the images for training, validation and test, in a fixed random order."""
    n = len(labels)
    order = np.random.default_rng(0).permutation(n)
    train, valid, test = (
        Digits(np.moveaxis(images[indices], 0, 1), labels[indices])
        for indices in np.split(order, [n * 4 // 6, n * 5 // 6])
    )
    return train, valid, test


def shift_images(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the images ``(8, B, 8)``, each shifted by up to one pixel in both directions."""
    batch_size, pixels = rows.shape[1], np.arange(8)
    padded = np.pad(rows, ((1, 1), (0, 0), (1, 1)))
    down, right = rng.integers(3, size=(2, batch_size))
    return padded[
        pixels[:, None, None] + down[:, None], np.arange(batch_size)[:, None], pixels[None, None, :] + right[:, None]
    ]
