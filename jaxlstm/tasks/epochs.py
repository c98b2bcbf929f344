"""Examples in a new order in every epoch."""

import itertools
from collections.abc import Iterator

import numpy as np


def epochs(examples: int, batch: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Which examples make up a batch, endlessly, each once before any comes again.

    Args:
      examples: how many there are.
      batch: how many go together; a batch may end one epoch and begin the next.
      seed: of their order.
      start: the number of batches already taken.

    Returns:
      Indices, ``(batch,)``.

    Raises:
      ImportError: without grain.
    """
    try:
        import grain
    except ImportError:
        raise ImportError("examples are put in order by grain: pip install 'jaxlstm[tasks]'") from None
    order = grain.MapDataset.range(examples).seed(seed % 2**32).shuffle().repeat().batch(batch)
    return (np.asarray(order[position]) for position in itertools.count(start))
