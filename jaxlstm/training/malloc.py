"""What the process does with memory that it has freed."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # parameters of mallopt, from malloc.h of the GNU C library
LARGEST = 2**31 - 1  # an int of C


def keep_freed() -> bool:
    """Have freed memory stay with the process, instead of giving it back to the system.

    On a CPU, XLA allocates the buffers of a step of training anew each time. Given back, they are fetched again page by
    page at the first touch: of a step of the default `train.py`, 20 of 84 ms on two cores of an AMD EPYC. The process
    holds on to the most that it ever needed at once. All threads share one arena, since only the first may be larger
    than 64 MiB: with 1,024 units a step takes 0.88 of its time with one arena for each thread. To be called before
    other threads allocate. For programs: a library does not choose this for its users.

    Returns:
      Whether the C library has such a choice: that of GNU on Linux has.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    settings = ((TRIM_THRESHOLD, LARGEST), (MMAP_THRESHOLD, LARGEST), (ARENA_MAX, 1))
    return mallopt is not None and all(mallopt(*setting) for setting in settings)
