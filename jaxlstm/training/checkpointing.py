"""Checkpoints of a run, written by Orbax in the background, complete or not at all; resuming is exact to the bit.

A checkpoint is a folder named by its step. It gets this name once all of its files are written; a killed process leaves
a folder with a temporary name, which the next run removes. ``manifest.json`` in it lists the contents: the record of
the run, shape and dtype of every array, size and SHA-256 of every file. All of it is checked before an array is read.
"""

import hashlib
import json
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

from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import first_line

MANIFEST = "manifest.json"
TIMESTAMPS = "_CHECKPOINT_METADATA"  # written by Orbax after the manifest; not needed to read the arrays
UNFINISHED = "*.orbax-checkpoint-tmp"  # Orbax's name of a checkpoint being written
DISK_RESERVE = 2**20  # bytes that must be free besides the arrays


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that says which and why."""


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's handler, which also writes the manifest before the checkpoint gets its name."""

    contents: dict[str, Any]  # record and arrays of the checkpoint being written

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = {
            str(path.relative_to(folder)): _fingerprint(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != TIMESTAMPS
        }
        manifest = json.dumps({**self.contents, "files": files}, indent=1)
        with atomic_write(folder / MANIFEST) as file:
            file.write(manifest.encode())


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
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(UNFINISHED):
                shutil.rmtree(unfinished)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint folder created")

    def __enter__(self) -> "Checkpoints":
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
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

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
        self._handler.contents = {"record": record, "arrays": _shapes(state)}
        arrays = _arrays(state)  # Orbax holds references, so a step that donates them allocates new memory instead
        # Checked here, because each of Orbax's threads would print a long error for a full disk.
        needed = DISK_RESERVE + sum(a.nbytes for a in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._write_failed(OSError(f"the disk is full: {free:,} bytes are free, {needed:,} needed"))
        try:
            self._writer.save(self.folder / str(step), args=_Save(arrays))
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            raise self._write_failed(error) from None

    def wait(self) -> None:
        """Waits until the last checkpoint is complete, then removes the oldest ones.

        Raises:
          CheckpointError: if it cannot be written.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._write_failed(error) from None
        if jax.process_index() == 0:
            for old in self.steps()[: -self._max_to_keep]:
                shutil.rmtree(self.folder / str(old))

    def latest_record(self) -> tuple[int, dict[str, Any]]:
        """Returns step and record of the latest checkpoint, after checking its files.

        Raises:
          CheckpointError: if there is none or it is damaged.
        """
        if not self.steps():
            raise CheckpointError(f"no checkpoint in {self.folder}")
        step = self.steps()[-1]
        return step, self._read_manifest(step)["record"]

    def restore(self, template: Any) -> Any:
        """Returns the state in the latest checkpoint.

        Args:
          template: a state of the same structure, shapes and dtypes; the result has its shardings.

        Raises:
          CheckpointError: if there is none, or it is damaged or has another structure.
        """
        step, _ = self.latest_record()
        path = self.folder / str(step)
        expected, received = _shapes(template), self._read_manifest(step)["arrays"]
        if received != expected:
            name = min(name for name in expected | received if expected.get(name) != received.get(name))
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name} is {received.get(name, 'absent')}, "
                f"expected {expected.get(name, 'absent')}"
            )
        try:
            arrays = self._writer.restore(path, args=_Restore(_arrays(template)))
        except Exception as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {first_line(error)}") from None
        leaves = [_from_array(arrays[name], leaf) for name, leaf in _named_leaves(template).items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def _read_manifest(self, step: int) -> dict[str, Any]:
        """Returns the manifest of a checkpoint, after checking its files against it."""
        path = self.folder / str(step)
        remedy = f"remove {path} to go on from the checkpoint before it"
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files, _, _ = (manifest[name] for name in ("files", "arrays", "record"))
        except OSError as error:
            raise CheckpointError(f"{path} is not a checkpoint of a run: {MANIFEST}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is incomplete; {remedy}") from None
        for name, fingerprint in files.items():
            try:
                same = _fingerprint(path / name) == fingerprint
            except OSError as error:
                raise CheckpointError(f"checkpoint {path} is damaged: {name}: {error.strerror}; {remedy}") from None
            if not same:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} differs from the file that was written; {remedy}"
                )
        return manifest

    def _write_failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot write a checkpoint to {self.folder}: {first_line(error)}")


def _fingerprint(path: Path) -> str:
    """Returns size and SHA-256 of a file."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _named_leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by path."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: Any) -> dict[str, Array]:
    """Returns the leaves by path, PRNG keys as integers."""
    return {name: jax.random.key_data(a) if _is_key(a) else a for name, a in _named_leaves(state).items()}


def _from_array(array: Array, template: Any) -> Array:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(template)) if _is_key(template) else array


def _shapes(state: Any) -> dict[str, str]:
    """Returns dtype and shape of every leaf by path, such as ``float32[2,3]``."""
    return {name: f"{a.dtype}{list(a.shape)}".replace(" ", "") for name, a in _named_leaves(state).items()}
