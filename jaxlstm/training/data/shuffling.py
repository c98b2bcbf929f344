"""Draws batches of examples in a new order each epoch."""

from collections.abc import Callable

import numpy as np

from jaxlstm.errors import optional_package


def shuffled_batches(num_examples: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Returns a function from the number of a batch, counted from 0 without end, to the indices of its examples.

    Every example is drawn once before any is drawn again. Any batch can be computed without the ones before it, so a
    resumed run continues with the same batches.

    Args:
      num_examples: size of the data set.
      batch_size: examples per batch; a batch may contain the end of one epoch and the beginning of the next.
      seed: seed of the order.

    Returns:
      ``batch_number -> indices``, int ``(batch_size,)``.

    Raises:
      ImportError: if grain is not installed.
    """
    with optional_package("grain", extra="tasks", purpose="shuffling examples"):
        import grain
    dataset = grain.MapDataset.range(num_examples).seed(seed % 2**32).shuffle().repeat().batch(batch_size)
    return lambda batch_number: np.asarray(dataset[batch_number])
