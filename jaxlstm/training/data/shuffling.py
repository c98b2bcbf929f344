"""Examples in a new order in every epoch."""

from collections.abc import Callable

import numpy as np


def epochs(examples: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Which examples make up the n-th batch, from 0 and without end: each comes once before any comes again.

    Args:
      examples: how many there are.
      batch: how many go together; a batch may end one epoch and begin the next.
      seed: of their order.

    Returns:
      A function of n to indices, ``(batch,)``.

    Raises:
      ImportError: without grain.
    """
    try:
        import grain
    except ImportError:
        raise ImportError("examples are put in order by grain: pip install 'jaxlstm[tasks]'") from None
    order = grain.MapDataset.range(examples).seed(seed % 2**32).shuffle().repeat().batch(batch)
    return lambda n: np.asarray(order[n])
