"""Locks between processes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a file; the system releases it however the process ends.

    There is no such lock on Windows, so processes do not wait for each other there.

    Args:
      path: path of the lock file, created if it does not exist and never deleted: a process may wait for it.
      wait: whether to wait while another process holds the lock.

    Raises:
      BlockingIOError: if another process holds the lock and ``wait`` is False.
      ValueError: if the file is not a regular one.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if path.exists() and not path.is_file():  # a named pipe would block
        raise ValueError(f"{path} is not a regular file")
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
