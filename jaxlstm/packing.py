"""Packing of examples of unequal lengths into full rows, each example marked by a reset. Uses NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Packed examples; pass ``resets`` and ``mask`` to `jaxlstm.LSTM` under these names."""

    values: np.ndarray  # (T, B, ...), zero in unused steps
    resets: np.ndarray  # (T, B) bool, True at the first step of each example
    mask: np.ndarray  # (T, B) bool, False in unused steps
    places: tuple[tuple[int, int], ...]  # (first step, row) of each example, in the order of the input


def pack(examples: Sequence[np.ndarray], steps: int) -> Packed:
    """Packs examples into few rows of ``steps`` by best-fit decreasing.

    The longest example comes first, and each goes to the fullest row with enough space left.

    Args:
      examples: arrays ``(length, ...)`` that have the same dtype and shape except for their length.
      steps: T, the length of a row.

    Raises:
      ValueError: if there are no examples, an example is empty or longer than a row, or dtypes or shapes differ.
    """
    examples = [np.asarray(example) for example in examples]
    kinds = sorted({f"{a.dtype}[{', '.join(['length', *map(str, a.shape[1:])])}]" for a in examples})
    if len(kinds) > 1:
        raise ValueError(f"examples must differ in nothing but their length, got {' and '.join(kinds)}")
    lengths = [len(example) if example.ndim else 0 for example in examples]
    if not lengths or min(lengths) < 1 or max(lengths) > steps:
        raise ValueError(f"examples must have 1 to {steps} steps, got {sorted(set(lengths))}")
    places, used_steps = _best_fit_decreasing(lengths, steps)
    values = np.zeros((steps, len(used_steps), *examples[0].shape[1:]), examples[0].dtype)
    resets = np.zeros((steps, len(used_steps)), bool)
    for example, (first, row) in zip(examples, places):
        values[first : first + len(example), row] = example
        resets[first, row] = True
    return Packed(values, resets, np.arange(steps)[:, None] < np.array(used_steps), tuple(places))


def _best_fit_decreasing(lengths: Sequence[int], steps: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns (first step, row) of each example, and the number of used steps of each row."""
    used_steps: list[int] = []
    places = [(0, 0)] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        rows_with_space = [row for row, used in enumerate(used_steps) if used + lengths[n] <= steps]
        row = max(rows_with_space, key=lambda row: used_steps[row], default=len(used_steps))
        if row == len(used_steps):
            used_steps.append(0)
        places[n] = (used_steps[row], row)
        used_steps[row] += lengths[n]
    return places, used_steps
