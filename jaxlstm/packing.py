"""Examples of unequal lengths in full rows: packed end to end, each beginning with a reset. Stands alone: NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Examples laid end to end; `jaxlstm.LSTM` takes ``resets`` and ``mask`` as they are."""

    values: np.ndarray  # (T, B, ...), zero where nothing lies
    resets: np.ndarray  # (T, B) bool: the first step of an example
    mask: np.ndarray  # (T, B) bool: False where nothing lies
    places: tuple[tuple[int, int], ...]  # of each example in turn: its first step and its row


def pack(examples: Sequence[np.ndarray], steps: int) -> Packed:
    """Examples in as few rows of ``steps`` as come by taking the longest first, each to the fullest row it fits in.

    Args:
      examples: arrays ``(length, ...)`` that differ in nothing but their length.
      steps: T.

    Raises:
      ValueError: if there is no example, or one is empty or longer than a row, or they differ in more than length.
    """
    examples = [np.asarray(example) for example in examples]
    kinds = sorted({f"{a.dtype}[{', '.join(['length', *map(str, a.shape[1:])])}]" for a in examples})
    if len(kinds) > 1:
        raise ValueError(f"examples must differ in nothing but their length, got {' and '.join(kinds)}")
    lengths = [len(example) if example.ndim else 0 for example in examples]
    if not lengths or min(lengths) < 1 or max(lengths) > steps:
        raise ValueError(f"examples must have 1 to {steps} steps, got {sorted(set(lengths))}")
    used: list[int] = []
    places = [(0, 0)] * len(examples)
    for n in sorted(range(len(examples)), key=lambda n: -lengths[n]):
        fitting = [row for row, taken in enumerate(used) if taken + lengths[n] <= steps]
        row = max(fitting, key=lambda row: used[row]) if fitting else len(used)
        if row == len(used):
            used.append(0)
        places[n] = (used[row], row)
        used[row] += lengths[n]
    values = np.zeros((steps, len(used), *examples[0].shape[1:]), examples[0].dtype)
    resets = np.zeros((steps, len(used)), bool)
    for example, (first, row) in zip(examples, places):
        values[first : first + len(example), row] = example
        resets[first, row] = True
    return Packed(values, resets, np.arange(steps)[:, None] < np.array(used), tuple(places))
