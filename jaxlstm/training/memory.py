"""Refuses work that cannot fit before it allocates: XLA may end the process, and the system may kill it."""

import math
import os
from typing import Any

import jax


def check_memory(needed: int, remedy: str) -> None:
    """Compares a lower bound of the memory that work needs with the memory of all devices.

    Args:
      needed: bytes.
      remedy: the options to lower, for the error message.

    Raises:
      ValueError: if the devices have less.
    """
    available = _total_memory()
    if needed > available:
        raise ValueError(
            f"this needs at least {needed / 2**30:,.1f} GiB of memory, and there are {available / 2**30:,.1f} GiB; "
            f"lower {remedy}"
        )


def num_bytes(tree: Any) -> int:
    """Returns the size of all arrays of a tree, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _total_memory() -> float:
    """Returns the bytes of all devices; CPU devices share the memory of their machine. Infinite if unknown."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    if all(limits):
        return float(sum(limits) * jax.process_count())
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count())
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
