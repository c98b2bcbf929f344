"""Checkpoints of a run, written by Orbax in the background, complete or not at all; resuming is exact to the bit.

A checkpoint is a folder named by its step. It gets this name once all of its files are written; a killed process leaves
a folder with a temporary name, which the next run removes. Its files are on disk before it gets its name, and its name
is on disk before an older checkpoint is removed, so a power cut leaves a complete checkpoint, too. ``manifest.json`` in
it lists the contents: the record of the run, shape and dtype of every array, size and SHA-256 of every file, its own
included. All of it is checked before an array is read.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils

from jaxlstm.atomic_write import sync_path, write_error
from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.errors import first_line
from jaxlstm.json_types import from_json
from jaxlstm.regular_file import open_regular
from jaxlstm.training.params_file import check_shapes, named_leaves, shapes

MANIFEST = "manifest.json"
LATE_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # written by Orbax after the manifest, and never read
UNFINISHED = "*.orbax-checkpoint-tmp"  # Orbax's name of a checkpoint being written
DISK_RESERVE = 2**20  # bytes that must be free besides the arrays


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that says which and why."""


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``."""

    record: dict[str, Any]  # of the run
    arrays: dict[str, str]  # dtype and shape of every array
    files: dict[str, str]  # size and SHA-256 of every other file


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's handler, which also writes the manifest and syncs all files before the checkpoint gets its name."""

    contents: dict[str, Any]  # record and arrays of the checkpoint being written

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = {name: _fingerprint(folder / name) for name in _protected_files(folder)}
        write_checked_json(folder / MANIFEST, self.contents | {"files": files})
        sync_tree(folder)  # Orbax itself syncs only the arrays


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclass
class _Save(ocp.args.StandardSave):
    """Arguments of a save by `_Handler`."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclass
class _Restore(ocp.args.StandardRestore):
    """Arguments of a restore by `_Handler`."""


class Checkpoints:
    """The latest checkpoints of a run.

    Args:
      folder: folder of the checkpoints, created if missing.
      max_to_keep: number of latest checkpoints to keep.
    """

    def __init__(self, folder: Path, max_to_keep: int = 3) -> None:
        self.folder = folder.absolute()
        self._max_to_keep = max_to_keep
        self._handler = _Handler()
        self._writer = ocp.AsyncCheckpointer(self._handler)
        self._unsynced: Path | None = None  # the checkpoint being written

    def __enter__(self) -> "Checkpoints":
        """Creates the folder and removes unfinished checkpoints; until then nothing on disk is changed."""
        if jax.process_index() == 0:
            make_folder(self.folder)
            for unfinished in self.folder.glob(UNFINISHED):
                shutil.rmtree(unfinished)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint folder created")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Completes the checkpoint being written, also after an error."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._writer.close()

    def steps(self) -> list[int]:
        """Returns the steps of the existing checkpoints, ascending."""
        return checkpoint_steps(self.folder)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to write a checkpoint, after waiting for the previous one. An existing one is not replaced.

        Args:
          step: the name of the checkpoint.
          state: a pytree of arrays; the caller may donate it at once.
          record: everything else to restore, as JSON values.

        Raises:
          CheckpointError: if this checkpoint or the previous one cannot be written.
        """
        self.wait()
        if step in self.steps():
            return
        self._handler.contents = {"record": record, "arrays": shapes(state)}
        arrays = _arrays(state)  # Orbax holds references, so a step that donates them allocates new memory instead
        # Checked here, because each of Orbax's threads would print a long error for a full disk.
        needed = DISK_RESERVE + sum(a.nbytes for a in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._write_failed(OSError(f"the disk is full: {free:,} bytes are free, {needed:,} needed"))
        path = self.folder / str(step)
        try:
            self._writer.save(path, args=_Save(arrays))
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            raise self._write_failed(error) from None
        self._unsynced = path

    def wait(self) -> None:
        """Waits until the last checkpoint is complete and on disk, then removes the oldest ones and files no one reads.

        Raises:
          CheckpointError: if it cannot be written.
        """
        try:
            self._writer.wait_until_finished()
            if self._unsynced is not None and jax.process_index() == 0:
                sync_tree(self._unsynced)  # its name, and the file that Orbax wrote last
        except Exception as error:
            raise self._write_failed(error) from None
        self._unsynced = None
        if jax.process_index() == 0:
            for old in self.steps()[: -self._max_to_keep]:
                shutil.rmtree(self.folder / str(old))
            for step in self.steps()[-1:]:
                for name in LATE_FILES:  # they would be the only files without a checksum
                    (self.folder / str(step) / name).unlink(missing_ok=True)

    def latest_record(self) -> tuple[int, dict[str, Any]]:
        """Returns step and record of the latest checkpoint, after checking its files.

        Raises:
          CheckpointError: if there is none or it is damaged.
        """
        if not self.steps():
            raise CheckpointError(f"no checkpoint in {self.folder}")
        step = self.steps()[-1]
        return step, self._read_manifest(step).record

    def restore(self, template: Any) -> Any:
        """Returns the state in the latest checkpoint.

        Args:
          template: a state of the same structure, shapes and dtypes; the result has its shardings.

        Raises:
          CheckpointError: if there is none, or it is damaged or has another structure.
        """
        step, _ = self.latest_record()
        path = self.folder / str(step)
        try:
            check_shapes(f"checkpoint {path}", self._read_manifest(step).arrays, shapes(template))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        try:
            arrays = self._writer.restore(path, args=_Restore(_arrays(template)))
        except Exception as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {first_line(error)}") from None
        leaves = [_from_array(arrays[name], leaf) for name, leaf in named_leaves(template).items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def _read_manifest(self, step: int) -> Manifest:
        """Returns the manifest of a checkpoint, after checking its files against it."""
        path = self.folder / str(step)
        remedy = f"remove {path} to go on from the checkpoint before it"
        try:
            manifest = from_json(Manifest, read_checked_json(path / MANIFEST), str(path / MANIFEST))
        except OSError as error:
            raise CheckpointError(f"{path} is not a checkpoint of a run: {MANIFEST}: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{error}; {remedy}") from None
        for name, fingerprint in manifest.files.items():
            try:
                same = _fingerprint(path / name) == fingerprint
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                raise CheckpointError(f"checkpoint {path} is damaged: {name}: {reason}; {remedy}") from None
            if not same:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} differs from the file that was written; {remedy}"
                )
        for name in _protected_files(path):
            if name not in manifest.files:
                raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not list {name}; {remedy}")
        return manifest

    def _write_failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot write a checkpoint to {self.folder}: {first_line(error)}")


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending; none if there is no folder."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def sync_tree(folder: Path) -> None:
    """Flushes all files and folders in a folder to disk, then its name."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync_path(path)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents; their names are on disk afterward.

    Raises:
      OSError: if it cannot be created; the message names the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_path(path.parent)
    except OSError as error:
        raise write_error(folder, error) from None


def _protected_files(folder: Path) -> list[str]:
    """Returns the names of the files of a checkpoint that its manifest lists: all that existed when it was written."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name not in (MANIFEST, *LATE_FILES)]


def _fingerprint(path: Path) -> str:
    """Returns size and SHA-256 of a file."""
    with open_regular(path) as file:
        return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: Any) -> dict[str, Array]:
    """Returns the leaves by path, PRNG keys as integers."""
    return {name: jax.random.key_data(a) if _is_key(a) else a for name, a in named_leaves(state).items()}


def _from_array(array: Array, template: Any) -> Array:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(template)) if _is_key(template) else array
