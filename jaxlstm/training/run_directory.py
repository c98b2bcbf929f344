"""The run directory: creation, lock, record of the run in each checkpoint, and the copy for other processes.

Each run writes ``config.json``, ``metrics.jsonl``, ``diagnosis.jsonl``, ``best.safetensors``, ``checkpoints/``,
``summary.json`` and ``curves.png`` into it.
"""

import contextlib
import functools
import hashlib
import math
import os
import reprlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

import jaxlstm
from jaxlstm.atomic_write import is_partial, sync_path, write_error
from jaxlstm.json_types import check_entries, from_json
from jaxlstm.training import config
from jaxlstm.training.checkpointing import UNFINISHED, CheckpointError, Checkpoints, checkpoint_steps, make_folder
from jaxlstm.training.config import Options
from jaxlstm.training.data import labeled_sequences
from jaxlstm.training.data.text import DOWNLOADS, EMBEDDED
from jaxlstm.training.file_lock import file_lock
from jaxlstm.training.params_file import BEST, check_finite
from jaxlstm.training.playback import DIAGNOSIS
from jaxlstm.training.tasks.task import Task
from jaxlstm.training.train_step import TrainState

KNOWN_DATA = (EMBEDDED, *DOWNLOADS, "co2", labeled_sequences.EMBEDDED)  # names that --data takes for no file


@dataclass
class RunRecord:
    """Progress of a run besides its `TrainState`; part of every checkpoint.

    Raises:
      ValueError: if a value is outside its range.
    """

    step: int = 0
    seconds: float = 0.0  # wall-clock time
    rows: int = 0  # rows of metrics.jsonl
    best_step: int = 0  # of the lowest validation loss; 0 without best parameters
    best_loss: float | None = None
    best_digest: str = ""  # SHA-256 in best.safetensors, which may be replaced after the checkpoint was written
    valid_losses: list[float] = field(default_factory=list)
    valid_seconds: float = 0.0  # duration of the last validation
    losses: list[float] = field(default_factory=list)  # of the steps since the last row; not finite if skipped

    def __post_init__(self) -> None:
        for name in ("step", "seconds", "rows", "best_step", "valid_seconds"):
            config.check_limit(name, getattr(self, name), "non-negative")
        if self.step > config.MAX_SIZE:
            raise ValueError(f"step must be at most {config.MAX_SIZE:,}, got {reprlib.repr(self.step)}")
        if self.rows > 3 * self.step:  # training, validation and diagnosis
            raise ValueError(f"rows must be at most three per step of {self.step:,}, got {reprlib.repr(self.rows)}")
        if self.best_step > self.step:
            raise ValueError(f"best_step must be at most step {self.step}, got {self.best_step}")
        if not all(map(math.isfinite, self.valid_losses)):
            raise ValueError(f"valid_losses must be finite, got {reprlib.repr(self.valid_losses)}")
        if not (self.best_loss in self.valid_losses if self.best_step else self.best_loss is None):
            raise ValueError(
                f"best_loss must be one of valid_losses, or None if best_step is 0, got {self.best_loss} "
                f"and best_step {self.best_step}"
            )


def create_run_dir(options: Options, task: Task) -> Path:
    """Creates the directory of a new run; of several processes, only process 0 creates it.

    The directory of a run with the same options and data that has no checkpoint yet is used again.

    Raises:
      ValueError: if the directory has other files, or several processes have no common one.
    """
    run_dir = options.run_dir
    if run_dir is None:
        if jax.process_count() > 1:
            raise ValueError("several processes need --run-dir or --resume: one run directory for all of them")
        return _create_dated_dir(Path("runs"))
    if jax.process_index() == 0:
        if run_dir.exists() and not (lacks_config(run_dir) or _is_same_start(run_dir, options, task)):
            remedy = f"resume it with --resume {run_dir}, or " if (run_dir / config.CONFIG).is_file() else ""
            raise ValueError(
                f"--run-dir {run_dir} is not an empty folder; a run never overwrites another: {remedy}choose a new name"
            )
        make_folder(run_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run directory created")
    return run_dir


def _create_dated_dir(parent: Path) -> Path:
    """Creates a folder named by the current time, with a number if another run began in the same second."""
    make_folder(parent)
    start = time.strftime("%Y-%m-%d-%H%M%S")
    name, number = start, 1
    while True:
        try:
            (parent / name).mkdir()
            sync_path(parent)
            return parent / name
        except FileExistsError:
            number += 1
            name = f"{start}-{number}"
        except OSError as error:
            raise write_error(parent / name, error) from None


def lacks_config(run_dir: Path) -> bool:
    """Returns whether a folder is empty or has only the files of a run that ended before it wrote ``config.json``."""
    if not run_dir.is_dir():
        return False
    names = {path.name for path in run_dir.iterdir() if not is_partial(path)}
    return names <= {"lock", "checkpoints"} and not checkpoint_steps(run_dir / "checkpoints")


def _is_same_start(run_dir: Path, options: Options, task: Task) -> bool:
    """Returns whether a folder has a run of the same options and data, and neither checkpoint nor result."""
    try:
        saved = config.load_config(run_dir, "--run-dir")[1]
    except ValueError:
        return False
    has_results = checkpoint_steps(run_dir / "checkpoints") or (run_dir / "summary.json").exists()
    return not has_results and not _mismatches(saved, options, task)


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Locks a run directory for one process; the system releases the lock however the process ends.

    Temporary files of a killed process are removed. There is no such lock on Windows, so nothing keeps a second process
    out there.

    Raises:
      ValueError: if another process holds the lock, or the file of the lock is not a regular file.
    """
    path = run_dir / "lock"
    with contextlib.ExitStack() as exit_stack:
        try:
            exit_stack.enter_context(file_lock(path, wait=False))
        except BlockingIOError:
            raise ValueError(f"another process is training in {run_dir}: {path} is locked") from None
        for unfinished in filter(is_partial, list(run_dir.iterdir())):
            unfinished.unlink()
        yield


def check_paths(run_dir: Path, options: Options) -> None:
    """Checks that nothing else has the name of a file or a folder that the run writes.

    Raises:
      ValueError: names the first path that is of another kind.
    """
    files = [run_dir / name for name in (config.CONFIG, "metrics.jsonl", DIAGNOSIS, BEST, "summary.json", "curves.png")]
    folders = [run_dir / "checkpoints", *(run_dir / "checkpoints").glob(UNFINISHED)]
    folders += [run_dir / "checkpoints" / str(step) for step in checkpoint_steps(run_dir / "checkpoints")]
    folders += [run_dir / "tensorboard"] if options.tensorboard else []
    folders += [run_dir / "profile"] if options.profile else []
    for paths, is_expected, kind in ((files, Path.is_file, "regular file"), (folders, Path.is_dir, "folder")):
        for path in paths:
            if os.path.lexists(path) and not is_expected(path):
                raise ValueError(f"{path} is not a {kind}; remove or rename it")


def temporary_copy(run_dir: Path) -> Path:
    """Returns a copy of the run directory without checkpoints, for processes that do not write to it."""
    copy = Path(tempfile.mkdtemp())
    for path in run_dir.iterdir():
        if path.is_file() and not is_partial(path):
            shutil.copy(path, copy)
    return copy


def saved_config(options: Options, task: Task, backend: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the part of ``config.json`` that every checkpoint repeats, to recognize its run.

    Args:
      options: options of the run.
      task: its task.
      backend: the measured backend, see `jaxlstm.training.backend`; None if none was measured.
    """
    values = config.to_json(options)
    if options.data not in KNOWN_DATA and Path(options.data).is_file():
        values["data"] = str(Path(options.data).absolute())  # a resume may start in another folder
    saved = {"options": values, "about": task.description, "fingerprint": task.fingerprint, "versions": versions()}
    return saved if backend is None else saved | {"backend": backend}


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of the package and of JAX, and the SHA-256 of the package's code."""
    package = Path(jaxlstm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return {"jaxlstm": jaxlstm.__version__, "jax": jax.__version__, "code": digest.hexdigest()}


def changed_versions(saved: dict[str, Any]) -> str:
    """Returns the versions that differ from the ones in a configuration, as text; empty if none do."""
    before = saved["versions"]
    changes = [
        f"{name} {before.get(name, 'unknown')!s:.12} -> {value:.12}"
        for name, value in versions().items()
        if before.get(name) != value
    ]
    return ", ".join(changes)


def check_start(run_dir: Path, options: Options, task: Task) -> None:
    """Checks that a run without a checkpoint can start in its directory.

    Raises:
      ValueError: if the run has other options or data, or has results already.
    """
    if lacks_config(run_dir):
        return
    if (run_dir / "summary.json").exists():
        raise ValueError(f"{run_dir} has results but no checkpoint; --run-dir with another folder starts a new run")
    saved = config.load_config(run_dir, "--resume")[1]
    if mismatches := _mismatches(saved, options, task):
        raise ValueError(f"{run_dir} is of another run: {mismatches[0]}")


def restore_run(
    checkpoints: Checkpoints, options: Options, task: Task, template: TrainState
) -> tuple[TrainState, RunRecord, dict[str, Any]]:
    """Returns state and record of the latest checkpoint, and the configuration of the run when it was written.

    Args:
      checkpoints: checkpoints of the run.
      options: options of this command, compared with the saved ones.
      task: task of this command; its data are compared with the saved ones.
      template: a state of the same structure, shapes and shardings.

    Raises:
      CheckpointError: if the checkpoint belongs to a run with other options or data, or is damaged.
    """
    step, saved = checkpoints.latest_record()
    path = checkpoints.folder / str(step)
    try:
        check_entries(saved, config.entry_types(saved) | {"loop": dict[str, Any]}, "its record")
        check_entries(saved["options"], config.saved_types(), "its record: options")
        Options(**saved["options"])  # checks their limits
        record = from_json(RunRecord, saved["loop"], "its record: loop")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} was not written by train.py: {error}") from None
    if record.step != step:
        raise CheckpointError(f"checkpoint {path} was not written by train.py: its record is of step {record.step}")
    if mismatches := _mismatches(saved, options, task):
        raise CheckpointError(f"checkpoint {path} is of another run: {mismatches[0]}")
    state = checkpoints.restore(template)
    check_finite(f"checkpoint {path}", state.params)
    return state, record, saved


def _mismatches(saved: dict[str, Any], options: Options, task: Task) -> list[str]:
    """Lists the differences of a saved configuration from the options and data of this command."""
    result = config.differences(saved["options"], config.to_json(options))
    if saved["fingerprint"] != task.fingerprint:
        received, expected = (f"{value!s:.12}" for value in (task.fingerprint, saved["fingerprint"]))
        result.append(
            f"--data {options.data} has the content with SHA-256 {received}, expected {expected}, "
            "the content when the run began"
        )
    return result
