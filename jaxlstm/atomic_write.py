"""Atomic file writes: a file is replaced completely or not at all."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxlstm.errors import first_line

PARTIAL = re.compile(r"[0-9a-f]{16}\.partial")  # names of temporary files; a killed process leaves its own


def sync_path(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk: until then a power cut may undo a write or a rename."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot flush folders
            raise
    finally:
        os.close(descriptor)


def is_partial(path: Path) -> bool:
    """Returns whether a path is a temporary file of `atomic_write`."""
    return PARTIAL.fullmatch(path.name) is not None and path.is_file()


@contextlib.contextmanager
def atomic_write(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` once it is complete and flushed to disk.

    The temporary file is in the same folder. Its name is random and it is created exclusively, so concurrent writers
    never share one, and a symbolic link planted under a guessed name is never written through. The last writer wins. A
    symbolic link to a file is replaced itself; its target is left unchanged.

    Args:
      path: path of the file to write.
      overwrite: whether to replace an existing file.

    Yields:
      The temporary file, open for writing bytes.

    Raises:
      FileExistsError: if the file exists and ``overwrite`` is False.
      OSError: if the file cannot be written, or ``path`` is a folder, a device, a named pipe or a link to nothing. The
        message names ``path``; an existing file is left unchanged.
    """
    partial = path.with_name(f"{secrets.token_hex(8)}.partial")
    try:
        if os.path.lexists(path):
            if not overwrite:
                raise _already_exists(path)
            if not path.is_file():
                raise OSError("it is not a regular file")
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_to_new(partial, path)
        sync_path(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _rename_to_new(partial: Path, path: Path) -> None:
    """Renames a file unless the new name exists, also if another process creates it at the same moment."""
    try:
        try:
            os.link(partial, path)  # unlike a rename, fails if the name exists
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links: reserve the name with an empty file
            path.open("xb").close()
            os.replace(partial, path)
    except FileExistsError:
        raise _already_exists(path) from None


def _already_exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; overwrite=True replaces it")


def write_error(path: Path, error: OSError) -> OSError:
    """Returns the error with the path in its message; the system omits the path when the disk is full."""
    return OSError(f"cannot write {path}: {error.strerror or first_line(error)}")
