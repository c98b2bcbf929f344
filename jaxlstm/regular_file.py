"""Reads files that may have been replaced by something that blocks or never ends."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading bytes; a named pipe or a device raises an error instead of blocking.

    Raises:
      OSError: if the file cannot be opened or is not a regular file.
    """

    def open_without_blocking(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer opens at once

    file = open(path, "rb", opener=open_without_blocking)  # noqa: SIM115  (returned open)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """Returns the contents of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()
