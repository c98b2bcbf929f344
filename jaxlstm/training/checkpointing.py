"""Checkpoints of a run, from which it goes on bit for bit: written by Orbax beside training, whole or not at all.

A checkpoint is a folder named by its step. It gets its name once everything in it is written; what a killed process
leaves half done has another name, and is removed by the next run. ``manifest.json`` in it says what belongs to it: the
record of the run, shape and dtype of every array, size and SHA-256 of every file. All that is checked before an array
is read.
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

MANIFEST = "manifest.json"
DATES = "_CHECKPOINT_METADATA"  # Orbax's, completed after the manifest is written; not needed to read the arrays
UNFINISHED = "*.orbax-checkpoint-tmp"  # Orbax's name of a checkpoint being written


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that says which and why."""


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's own, which adds the manifest before the checkpoint gets its name."""

    contents: dict[str, Any]  # of the checkpoint being written: record and arrays

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = {
            str(p.relative_to(folder)): _fingerprint(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != DATES
        }
        manifest = json.dumps({**self.contents, "files": files}, indent=1)
        with atomic_write(folder / MANIFEST) as file:
            file.write(manifest.encode())


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclass
class _Save(ocp.args.StandardSave):
    """To be saved by `_Handler`."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclass
class _Restore(ocp.args.StandardRestore):
    """To be restored by `_Handler`."""


class Checkpoints:
    """The latest checkpoints of a run.

    Args:
      folder: of the checkpoints; made where it does not exist.
      keep: number of the latest checkpoints that are kept.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        self._handler = _Handler()
        self._writer = ocp.AsyncCheckpointer(self._handler)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(UNFINISHED):
                shutil.rmtree(unfinished)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the folder of the checkpoints is there")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What is being written is written to its end, also where the run ends by an error."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._writer.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, ascending."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Begin to write a checkpoint; waits only for the one before it. One that exists is left as it is.

        Args:
          step: names the checkpoint.
          state: a pytree of arrays; the caller may donate it at once.
          record: whatever else belongs to the run, as JSON.

        Raises:
          CheckpointError: if this checkpoint or the one before it cannot be written.
        """
        self.wait()
        if step in self.steps():
            return
        self._handler.contents = {"record": record, "arrays": _shapes(state)}
        arrays = _arrays(state)  # Orbax holds on to their memory: a step that is given it makes room elsewhere
        # Orbax's threads would each say at length that the disk is full.
        needed, free = 2**20 + sum(a.nbytes for a in arrays.values()), shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._not_written(OSError(f"the disk is full: {free:,} bytes are free, {needed:,} needed"))
        try:
            self._writer.save(self.folder / str(step), args=_Save(arrays))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._not_written(error) from None

    def wait(self) -> None:
        """Until the last checkpoint is whole; only then the oldest ones go.

        Raises:
          CheckpointError: if it cannot be written.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from None
        if jax.process_index() == 0:
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self.folder / str(old))

    def record(self) -> tuple[int, dict[str, Any]]:
        """Step and record of the latest checkpoint, its files checked.

        Raises:
          CheckpointError: if there is none or it is damaged.
        """
        if not self.steps():
            raise CheckpointError(f"no checkpoint in {self.folder}")
        step = self.steps()[-1]
        return step, self._manifest(step)["record"]

    def restore(self, like: Any) -> Any:
        """The state in the latest checkpoint.

        Args:
          like: a state of the same structure, shapes and dtypes; its arrays lie where those read shall lie.

        Raises:
          CheckpointError: if there is none, or it is damaged, or one of another structure.
        """
        step, _ = self.record()
        path = self.folder / str(step)
        expected, found = _shapes(like), self._manifest(step)["arrays"]
        if found != expected:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            received, wanted = (arrays.get(name, "absent") for arrays in (found, expected))
            raise CheckpointError(f"checkpoint {path} is of another model: {name} is {received}, expected {wanted}")
        try:
            arrays = self._writer.restore(path, args=_Restore(_arrays(like)))
        except Exception as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {_first_line(error)}") from None
        leaves = [_from_array(arrays[name], leaf) for name, leaf in _named(like).items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _manifest(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step holds, once its files are what they were when it was written."""
        path = self.folder / str(step)
        help_ = f"remove {path} to go on from the checkpoint before it"
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files, _, _ = (manifest[name] for name in ("files", "arrays", "record"))
        except OSError as error:
            raise CheckpointError(f"{path} is not a checkpoint of a run: {MANIFEST}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not whole; {help_}") from None
        for name, fingerprint in files.items():
            try:
                same = _fingerprint(path / name) == fingerprint
            except OSError as error:
                raise CheckpointError(f"checkpoint {path} is damaged: {name}: {error.strerror}; {help_}") from None
            if not same:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not as it was written; {help_}")
        return manifest

    def _not_written(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot write a checkpoint to {self.folder}: {_first_line(error)}")


def _fingerprint(path: Path) -> str:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by the path that leads to them."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: Any) -> dict[str, Array]:
    """The leaves by name, PRNG keys as the integers that they consist of."""
    return {name: jax.random.key_data(a) if _is_key(a) else a for name, a in _named(state).items()}


def _from_array(array: Array, like: Any) -> Array:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else array


def _shapes(state: Any) -> dict[str, str]:
    """Dtype and shape of every leaf, as in ``float32[2,3]``."""
    return {name: f"{a.dtype}{list(a.shape)}".replace(" ", "") for name, a in _named(state).items()}
