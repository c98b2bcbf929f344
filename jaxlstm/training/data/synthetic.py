"""Synthetic tasks that measure memory: random sequences whose answer is a known number of steps back."""

from typing import NamedTuple

import numpy as np


class AddingBatch(NamedTuple):
    """A batch of the adding task."""

    inputs: np.ndarray  # (T, B, 2) float32: a number in [0, 1), and a marker that is 1 at two steps, else 0
    targets: np.ndarray  # (B,) float32: the sum of the two marked numbers


class CopyingBatch(NamedTuple):
    """A batch of the copying task; symbols are 1 to 8, 0 is the blank and 9 the cue to repeat them."""

    inputs: np.ndarray  # (delay + 2*length, B) int32
    targets: np.ndarray  # (delay + 2*length, B) int32: blank until the symbols have to be repeated


ADDING_BASELINE = 1 / 6  # mean squared error of always answering 1


def adding(rng: np.random.Generator, steps: int, batch_size: int) -> AddingBatch:
    """Draws a batch of the adding task (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    The answer is the sum of two marked numbers, one in each half of the sequence.

    Args:
      rng: random number generator.
      steps: T, at least 2.
      batch_size: B.
    """
    numbers = rng.random((steps, batch_size), np.float32)
    markers = np.zeros((steps, batch_size), np.float32)
    sequences, half = np.arange(batch_size), steps // 2
    markers[rng.integers(half, size=batch_size), sequences] = 1
    markers[rng.integers(half, steps, size=batch_size), sequences] = 1
    return AddingBatch(np.stack([numbers, markers], axis=-1), (numbers * markers).sum(0))


def copying(rng: np.random.Generator, delay: int, batch_size: int, length: int = 10) -> CopyingBatch:
    """Draws a batch of the copying task: repeat the symbols after a delay (references as for `adding`).

    Answering blank until the cue and then guessing costs ``length * log(8) / (delay + 2*length)`` nats per step.

    Args:
      rng: random number generator.
      delay: steps between symbols and answer, at least 1; the cue is the last of them.
      batch_size: B.
      length: number of symbols.
    """
    symbols = rng.integers(1, 9, (length, batch_size), np.int32)
    inputs = np.zeros((delay + 2 * length, batch_size), np.int32)
    targets = np.zeros_like(inputs)
    inputs[:length], targets[-length:] = symbols, symbols
    inputs[-length - 1] = 9
    return CopyingBatch(inputs, targets)
