"""The run directory: creation, lock, record of the run in each checkpoint, and the copy for other processes.

Each run writes ``config.json``, ``metrics.jsonl``, ``best.msgpack``, ``checkpoints/``, ``summary.json`` and
``curves.png`` into it.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxlstm.training import config
from jaxlstm.training.checkpointing import CheckpointError, Checkpoints
from jaxlstm.training.config import Options
from jaxlstm.training.tasks.task import Task
from jaxlstm.training.train_step import TrainState


@dataclass
class RunRecord:
    """Progress of a run besides its `TrainState`; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # wall-clock time
    rows: int = 0  # rows of metrics.jsonl
    best_step: int = 0
    valid_losses: list[float] = field(default_factory=list)
    valid_seconds: float = 0.0  # duration of the last validation
    losses: list[float] = field(default_factory=list)  # of the steps since the last row of metrics.jsonl


def create_run_dir(options: Options) -> Path:
    """Creates the directory of a new run; of several processes, only process 0 creates it.

    Raises:
      ValueError: if the directory is not empty, or several processes have no common one.
    """
    run_dir = options.run_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if jax.process_count() > 1 and options.run_dir is None:
        raise ValueError("several processes need --run-dir or --resume: one run directory for all of them")
    if jax.process_index() > 0:
        return run_dir
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"--run-dir {run_dir} is not an empty folder; a run never overwrites another")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Locks a run directory for one process; the system releases the lock however the process ends.

    There is no such lock on Windows, so nothing keeps a second process out there.

    Raises:
      ValueError: if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = run_dir / "lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {run_dir}: {path} is locked") from None
        yield


def temporary_copy(run_dir: Path) -> Path:
    """Returns a copy of the run directory without checkpoints, for processes that do not write to it."""
    copy = Path(tempfile.mkdtemp())
    for path in run_dir.iterdir():
        if path.is_file() and not path.name.endswith(".partial"):
            shutil.copy(path, copy)
    return copy


def saved_config(options: Options, task: Task) -> dict[str, Any]:
    """Returns the part of ``config.json`` that every checkpoint repeats, to recognize its run."""
    return {"options": config.to_json(options), "about": task.description, "fingerprint": task.fingerprint}


def restore_run(
    checkpoints: Checkpoints, options: Options, task: Task, template: TrainState
) -> tuple[TrainState, RunRecord]:
    """Returns state and record of the latest checkpoint.

    Args:
      checkpoints: checkpoints of the run.
      options: options of this command, compared with the saved ones.
      task: task of this command; its data are compared with the saved description.
      template: a state of the same structure, shapes and shardings.

    Raises:
      CheckpointError: if the checkpoint belongs to a run with other options or data, or is damaged.
    """
    step, saved = checkpoints.latest_record()
    path = checkpoints.folder / str(step)
    try:
        mismatches = config.differences(options, saved["options"])
        if saved["about"] != task.description:
            mismatches.append(f"the data are {saved['about']}, expected {task.description}")
        elif saved["fingerprint"] != task.fingerprint:
            mismatches.append(f"the data of --data {options.data} have changed since it began")
        record = RunRecord(**saved["loop"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} was not written by train.py: {error!r}") from None
    if mismatches:
        raise CheckpointError(f"checkpoint {path} is of another run: {mismatches[0]}")
    return checkpoints.restore(template), record
