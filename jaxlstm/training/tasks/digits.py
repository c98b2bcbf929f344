"""Handwritten digits, the eight rows of an image one after the other (scikit-learn's 1,797 images).

Two thirds are trained on, each shifted by up to a pixel; one sixth chooses the best parameters, one sixth is the test.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data import text
from jaxlstm.training.data.shuffling import epochs
from jaxlstm.training.models.build import network
from jaxlstm.training.models.sequence_regressor import Readout
from jaxlstm.training.tasks.task import OF_LANGUAGE, OF_SERIES, Task

DEFAULTS: dict[str, Any] = {
    "hidden": 64,
    "bidirectional": True,
    "dropout": 0.3,
    "batch": 64,
    "learning_rate": 5e-3,
    "max_steps": 1500,
    "valid_every": 100,
}
UNUSED = ("data", "window", *OF_LANGUAGE, *OF_SERIES)


class Digits(NamedTuple):
    """Images and what they show."""

    rows: np.ndarray  # (8, B, 8) float32 in [0, 1], the top row first
    labels: np.ndarray  # (B,) int32


def make(options: Options) -> Task:
    """The task; the split is the same for every seed."""
    images, labels = load()
    order = np.random.default_rng(0).permutation(len(labels))
    cuts = [0, len(labels) * 4 // 6, len(labels) * 5 // 6, len(labels)]
    train, valid, test = (
        Digits(np.moveaxis(images[part], 0, 1), labels[part])
        for part in (order[a:b] for a, b in itertools.pairwise(cuts))
    )
    model = Readout(network(options, images.shape[-1]), 10, options.dropout)

    examples = epochs(len(train.labels), options.batch, options.seed)

    def batches(start: int) -> Iterator[Digits]:
        for position in itertools.count(start):
            chosen, rng = examples(position), np.random.default_rng((options.seed, position))
            rows = np.pad(train.rows[:, chosen], ((1, 1), (0, 0), (1, 1)))
            down, right = rng.integers(3, size=(2, options.batch))
            eight = np.arange(8)[:, None, None]
            shifted = rows[eight + down[:, None], np.arange(options.batch)[:, None], eight.T + right[:, None]]
            yield Digits(shifted, train.labels[chosen])

    def loss(params: Any, carry: Any, batch: Digits, key: Array) -> tuple[Array, tuple[Array, Any]]:
        logits = model(params, batch.rows, key=key)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value, (value, carry)

    @jax.jit
    def score(params: Any, rows: Array, labels: Array) -> tuple[Array, Array]:
        logits = model(params, rows)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return nats, (jnp.argmax(logits, -1) == labels).mean()

    def figures(params: Any, part: Digits) -> dict[str, float]:
        nats, accuracy = score(params, *part)
        return {"loss": float(nats), "accuracy": float(accuracy)}

    return Task(
        about=f"{len(train.labels):,} images to train on, {len(valid.labels)} to validate, {len(test.labels)} to test",
        title="digits, row by row: LSTM",
        unit="nats per image",
        counted="images",
        per_step=options.batch,
        evaluated=len(valid.labels),
        say=lambda value: f"{value:.4f} nats",
        init=model.init,
        carry=lambda params: None,
        batches=batches,
        loss=loss,
        lstm=model.lstm,
        reads=lambda params, carry, batch: (batch.rows, None),
        evaluate=lambda params: figures(params, valid),
        test=lambda params: {f"test_{name}": value for name, value in figures(params, test).items()},
        fingerprint=text.fingerprint(images, labels),
    )


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, 8, 8)`` in [0, 1] and labels ``(N,)``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the images are scikit-learn's: pip install 'jaxlstm[tasks]'") from None
    pixels, labels = load_digits(return_X_y=True)
    return (np.asarray(pixels) / 16).reshape(-1, 8, 8).astype(np.float32), np.asarray(labels).astype(np.int32)
