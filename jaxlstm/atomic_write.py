"""Atomic file writes: a file is replaced completely or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxlstm.errors import first_line


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once it is complete and flushed to disk.

    Args:
      path: path of the file to write.
      overwrite: whether to replace an existing file.

    Yields:
      The temporary file, open for writing bytes.

    Raises:
      FileExistsError: if the file exists and ``overwrite`` is False.
      OSError: if the file cannot be written. The message names ``path``; an existing file is left unchanged.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True replaces it")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> OSError:
    """Returns the error with the path in its message; the system omits the path when the disk is full."""
    return OSError(f"cannot write {path}: {error.strerror or first_line(error)}")
