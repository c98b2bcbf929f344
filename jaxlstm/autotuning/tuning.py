"""The result of a search: its table, and the file that keeps it."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlstm.autotuning.configuration import lstm_from_json, lstm_to_json
from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.json_types import check_entries, from_json
from jaxlstm.rnn import RNN

NOT_TRIED = "not tried"
TYPES: dict[str, Any] = {  # of the entries of the file
    "lstm": dict[str, Any],
    "table": list[dict[str, Any]],
    "xs_shape": list[int],
    "training": bool,
    "device": str,
    "jax_version": str,
}


@dataclass(frozen=True)
class Trial:
    """One row of the table: a candidate and its time, or why it has none."""

    candidate: str  # its options, as they are given to `jaxlstm.LSTM`
    seconds: float | None = None  # median time of a run; None if it was not timed
    runs: int = 0  # number of timed runs
    error: float | None = None  # largest relative error, see `jaxlstm.autotuning.agreement`; None if it did not run
    is_default: bool = False  # whether it is the backend and layout of the network if none is chosen
    note: str = ""  # "chosen", or why it cannot be chosen: refused, failed, wrong, not tried, ...

    @property
    def milliseconds(self) -> str:
        """The time with its unit; empty without a time."""
        return "" if self.seconds is None else f"{1e3 * self.seconds:.4g} ms"


@dataclass(frozen=True)
class Tuning:
    """Result of `jaxlstm.autotune`; prints as a table.

    Args:
      lstm: the network with the chosen backend, layout and steps per iteration.
      table: a row per candidate: the chosen one, the others by time, then those without a time.
      xs_shape: ``(T, *batch, I)``, the shape of the inputs.
      training: whether a value and gradient was timed; otherwise a call.
      device: the kind of device; for a CPU its architecture and number of cores, too.
      jax_version: the version of JAX.
    """

    lstm: RNN
    table: tuple[Trial, ...]
    xs_shape: tuple[int, ...]
    training: bool
    device: str
    jax_version: str

    def __str__(self) -> str:
        """Returns the table; rows that were not tried are counted."""
        timed = "value and gradient" if self.training else "call"
        rows = [("candidate", "median", "runs", "error", "")]
        rows += [_row(trial) for trial in self.table if not trial.note.startswith(NOT_TRIED)]
        widths = [max(len(row[n]) for row in rows) for n in range(4)]
        lines = [f"{self.lstm}: {timed}, xs {list(self.xs_shape)}, {self.device}, JAX {self.jax_version}"]
        for name, median, runs, error, note in rows:
            numbers = f"{median:>{widths[1]}}  {runs:>{widths[2]}}  {error:>{widths[3]}}"
            lines.append(f"{name:<{widths[0]}}  {numbers}  {note}".rstrip())
        if not_tried := len(self.table) + 1 - len(rows):
            lines.append(f"{not_tried} more {NOT_TRIED}: out of time")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes the choice and the table to a file for `jaxlstm.load_tuning`, atomically.

        Raises:
          ValueError: for a cell or a backend that cannot be imported by its name.
          OSError: if the file cannot be written.
        """
        values = vars(self) | {"lstm": lstm_to_json(self.lstm), "table": [asdict(trial) for trial in self.table]}
        write_checked_json(Path(path), values)


def load_tuning(path: str | Path) -> Tuning:
    """Reads a `Tuning` that `Tuning.save` wrote.

    The module of a custom cell is imported, under the name that the file has for it. The device and the version of JAX
    must be those of the search. Compare ``lstm`` with its dtypes, ``xs_shape`` and ``training`` with your own network,
    shapes and use: nothing here knows them, and the choice may not be the fastest for others.

    Args:
      path: path of the file.

    Raises:
      ValueError: if it was written for another kind of device or another version of JAX, or is damaged.
      OSError: if the file cannot be read.
    """
    path = Path(path)
    values = read_checked_json(path)
    check_entries(values, TYPES, str(path))
    for name, expected in (("device", device_name()), ("jax_version", jax.__version__)):
        if values[name] != expected:
            raise ValueError(
                f"{path}: {name} is {values[name]!r}, expected {expected!r}: the choice may not be the fastest here; "
                "jaxlstm.autotune finds it"
            )
    return Tuning(
        lstm_from_json(values["lstm"], f"{path}: lstm"),
        tuple(from_json(Trial, trial, f"{path}: table") for trial in values["table"]),
        tuple(values["xs_shape"]),
        values["training"],
        values["device"],
        values["jax_version"],
    )


def device_name() -> str:
    """Returns the kind of device that programs run on by default; for a CPU with architecture and number of cores."""
    device = next(iter(jnp.zeros(()).devices()))
    if device.platform != "cpu":
        return device.device_kind
    return f"{device.device_kind} ({platform.machine()}, {os.cpu_count()} cores)"


def _row(trial: Trial) -> tuple[str, str, str, str, str]:
    """Returns the cells of a row."""
    error = "" if trial.error is None else f"{trial.error:.1e}"
    note = "; ".join(filter(None, ("the default" if trial.is_default else "", trial.note)))
    return trial.candidate, trial.milliseconds, str(trial.runs) if trial.runs else "", error, note
