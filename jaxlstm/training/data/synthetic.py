"""Tasks that measure memory: sequences drawn at random, whose answer lies a known number of steps back."""

from typing import NamedTuple

import numpy as np


class Adding(NamedTuple):
    """A batch of the adding task."""

    inputs: np.ndarray  # (T, B, 2) float32: a number in [0, 1), and 1 where it counts, else 0
    targets: np.ndarray  # (B,) float32: the sum of the two numbers that count


class Copying(NamedTuple):
    """A batch of the copying task; symbols are 1 to 8, 0 is blank and 9 asks for the answer."""

    inputs: np.ndarray  # (delay + 2*length, B) int32
    targets: np.ndarray  # the same shape: blank until the symbols have to be said again


ADDING_BASELINE = 1 / 6  # mean squared error of always answering 1


def adding(rng: np.random.Generator, steps: int, batch: int) -> Adding:
    """Two marked numbers are to be added up, one in each half (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    Args:
      rng: source of the draw.
      steps: T, at least 2.
      batch: B.
    """
    numbers = rng.random((steps, batch), np.float32)
    marks = np.zeros((steps, batch), np.float32)
    rows, half = np.arange(batch), steps // 2
    marks[rng.integers(half, size=batch), rows] = 1
    marks[rng.integers(half, steps, size=batch), rows] = 1
    return Adding(np.stack([numbers, marks], axis=-1), (numbers * marks).sum(0))


def copying(rng: np.random.Generator, delay: int, batch: int, length: int = 10) -> Copying:
    """Symbols are to be said again after a delay (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016).

    Always answering blank and then guessing costs ``length * log(8) / (delay + 2*length)`` nats per step.

    Args:
      rng: source of the draw.
      delay: steps between symbols and answer, at least 1; the last of them asks for it.
      batch: B.
      length: number of symbols.
    """
    symbols = rng.integers(1, 9, (length, batch), np.int32)
    inputs = np.zeros((delay + 2 * length, batch), np.int32)
    targets = np.zeros_like(inputs)
    inputs[:length], targets[-length:] = symbols, symbols
    inputs[-length - 1] = 9
    return Copying(inputs, targets)
