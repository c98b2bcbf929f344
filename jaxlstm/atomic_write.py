"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once all of it is on the disk.

    Args:
      path: of the file to be.
      overwrite: whether a file that is there may be replaced.

    Raises:
      FileExistsError: if there is one and it may not.
      OSError: names the file that cannot be written; what was there stays as it was.
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
    """The error with the file's name in it: the system gives none where it is the disk that is full."""
    return OSError(f"cannot write {path}: {error.strerror or error}")
