"""Output of a run: progress on the terminal, ``metrics.jsonl``, TensorBoard files and the plot of the losses."""

import json
import math
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from jaxlstm.atomic_write import atomic_write, write_error
from jaxlstm.diagnostics.plots import literal
from jaxlstm.errors import optional_package
from jaxlstm.json_types import matches
from jaxlstm.training.output import printable

SPLITS = ("train", "valid", "diagnosis")  # kinds of rows


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def truncate_rows(path: Path, count: int, last_step: int) -> list[dict[str, Any]]:
    """Removes all but the undamaged ones among the first ``count`` rows from ``metrics.jsonl``, and returns these.

    Args:
      path: the file; a missing one has no rows.
      count: number of rows to keep.
      last_step: step of the last of them; later ones are removed, also if a damaged line lets them move up.

    Raises:
      ValueError: if the path is not a file.
    """
    lines = read_lines(path)[:count]
    rows = [row for line in lines if (row := parse_row(line)) is not None and row["step"] <= last_step]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def read_lines(path: Path) -> list[bytes]:
    """Returns the lines of a file, the last one without a line break; none if there is no such file.

    Raises:
      ValueError: if the path is not a file.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; remove or rename it")
    return path.read_bytes().split(b"\n")


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Returns a row of ``metrics.jsonl``, or None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not matches(row.get("step"), int) or row.get("split") not in SPLITS:
        return None
    figures = [value for name, value in row.items() if name not in ("step", "split")]
    is_whole = row["step"] >= 0 and all(v is None or (matches(v, float) and math.isfinite(v)) for v in figures)
    return row if is_whole and ("loss" in row or row["split"] == "diagnosis") else None


def replace_non_finite(value: Any) -> Any:
    """Returns a JSON value with None in place of every number that is not finite: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: replace_non_finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowFile:
    """A file in the run directory to which rows are appended, one JSON object per line; a context that closes it.

    Args:
      path: the file; what it contains is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row of finite numbers."""
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self._path, error) from None

    def sync(self) -> None:
        """Flushes the file to disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self._path, error) from None

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:  # closing tries again to write a row that failed
            if error is None:
                raise


def format_duration(seconds: float) -> str:
    """Returns seconds as ``m:ss`` or ``h:mm:ss``."""
    if math.isinf(seconds):
        return "-:--"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def print_line(console: Console, text: str, *, wrap: bool = True) -> None:
    """Prints text literally, without markup, emoji codes or escape sequences.

    Args:
      console: where to print.
      text: one line or several.
      wrap: whether long lines are wrapped between words on a terminal; False for a command to copy.
    """
    text = printable(text)
    if wrap and console.is_terminal:
        text = "\n".join(_wrap_line(line, console.width) for line in text.split("\n"))
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _wrap_line(line: str, width: int) -> str:
    """Wraps a line between words, where it fits, and repeats its indentation, or the gutter of a sample."""
    if len(line) <= width:
        return line
    text = line.lstrip(" ").removeprefix("| ")
    indent = line.removesuffix(text)
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )


class _RemainingTime(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['left']} left", style="progress.remaining")


class Report:
    """Progress as a bar on a terminal, otherwise as plain lines, and rows of ``metrics.jsonl`` in the run directory.

    Args:
      run_dir: the run directory; it exists.
      console: console for progress.
      unit_name: unit of the training speed, such as ``"characters"``.
      format_loss: formats a loss with its unit.
      num_rows: number of rows of an existing ``metrics.jsonl`` to keep; rows that a killed run wrote after its last
        checkpoint are removed, and so are damaged ones.
      last_step: step of the last row to keep.
      tensorboard: whether to write the metrics for TensorBoard too, into the folder ``tensorboard``.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console,
        unit_name: str,
        format_loss: Callable[[float], str],
        num_rows: int = 0,
        last_step: int = 0,
        *,
        tensorboard: bool = False,
    ) -> None:
        self.console = console
        self._unit_name, self._format_loss = unit_name, format_loss
        self._short_unit = {"characters": "char", "words": "word"}.get(unit_name, unit_name)
        self._path = run_dir / "metrics.jsonl"
        self.rows = truncate_rows(self._path, num_rows, last_step)
        if len(self.rows) < num_rows:
            lost = f"{num_rows - len(self.rows):,} of {num_rows:,} rows of {self._path} are damaged or missing"
            self.print_line(f"{lost}; the others are kept, and training goes on")
        self._file = RowFile(self._path)
        self._tensorboard = None
        if tensorboard:  # figures that a killed run wrote after its last checkpoint are hidden
            self._tensorboard = summary_writer()(str(run_dir / "tensorboard"), purge_step=last_step + 1)
        columns = (
            TextColumn("{task.fields[figures]}", markup=False),
            BarColumn(None),
            _RemainingTime(Column(no_wrap=True)),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True, transient=True)
        self._bar_task = self._bar.add_task("", total=1.0, figures="compiling", left="-:--")
        self._start_time, self._start_progress = time.perf_counter(), 0.0
        self._last_validation = ""  # shown in the bar

    def start_clock(self, progress: float) -> None:
        """Starts the clock of the remaining time at a completed fraction of the run."""
        self._start_time, self._start_progress = time.perf_counter(), progress

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._file.__exit__(kind, error, trace)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def sync(self) -> None:
        """Flushes ``metrics.jsonl`` to disk."""
        self._file.sync()

    def training_row(
        self, step: int, loss: float, speed: float, progress: float, learning_rate: float, skipped: int
    ) -> None:
        """Records the training loss and updates the progress.

        Args:
          step: the current step.
          loss: mean of the finite losses since the last row; NaN if there was none.
          speed: units per second.
          progress: completed fraction of the run, for the remaining time.
          learning_rate: learning rate of the step.
          skipped: number of steps skipped so far.
        """
        figures = {"loss": loss, f"{self._unit_name}_per_second": speed, "learning_rate": learning_rate}
        self._write(step, "train", figures | {"skipped": skipped})
        done = progress - self._start_progress
        seconds_left = (time.perf_counter() - self._start_time) * (1 - progress) / done if done > 0 else math.inf
        left = format_duration(seconds_left)
        line = f"{self._step_and_loss(step, loss)}  {speed:>9,.0f} {self._short_unit}/s"
        line += f"  {skipped:,} skipped" if skipped else ""
        self.print_line(line if self.console.is_terminal else f"{line}  {left} left")  # the bar shows what is left
        self._bar.update(self._bar_task, completed=progress, figures=self._fit_width(line, left), left=left)

    def validation_row(self, step: int, figures: dict[str, float], speed: float, *, is_best: bool, sample: str) -> None:
        """Records figures on the validation data, ``loss`` among them, and prints them with a sample of the model."""
        self._write(step, "valid", figures | {f"{self._unit_name}_per_second": speed})
        more = "".join(f"  {name} {value:.4g}" for name, value in figures.items() if name != "loss")
        self._last_validation = f"  valid {figures['loss']:.4f}{more}"
        line = f"{self._step_and_loss(step, figures['loss'])}{more}  {speed:>9,.0f} {self._short_unit}/s  validation"
        self.print_line(line + (", the best so far" if is_best else ""))
        if sample:
            self.print_line("\n".join(f"    | {line}" for line in sample.splitlines()))

    def diagnosis_row(self, step: int, figures: dict[str, float]) -> None:
        """Records gate saturation and gradient norms."""
        self._write(step, "diagnosis", figures)

    def print_line(self, text: str, *, wrap: bool = True) -> None:
        """Prints literal text above the bar; see `print_line`."""
        print_line(self.console, text, wrap=wrap)

    def _step_and_loss(self, step: int, loss: float) -> str:
        return f"step {step:>6,}  loss {self._format_loss(loss)}"

    def _fit_width(self, line: str, left: str) -> str:
        """Shortens the figures so that the remaining time fits beside them; they are in the metrics too."""
        width = self.console.width - len(f"  {left} left")
        if len(line + self._last_validation) <= width:
            return line + self._last_validation
        return line if len(line) <= width else line[: width - 1] + "…"

    def _write(self, step: int, split: str, figures: dict[str, float]) -> None:
        self.rows.append(replace_non_finite({"step": step, "split": split} | figures))
        self._file.append(self.rows[-1])
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
            self._tensorboard.flush()


def summary_writer() -> Any:
    """Returns the class that writes TensorBoard files.

    Raises:
      ImportError: if its package is not installed.
    """
    with optional_package("tensorboardX", extra="tensorboard", purpose="--tensorboard"):
        from tensorboardX import SummaryWriter
    return SummaryWriter


def draw_curves(path: Path, rows: list[dict[str, Any]], title: str, unit: str) -> None:
    """Plots training and validation loss over steps, as a PNG.

    Args:
      path: the file.
      rows: rows of ``metrics.jsonl``.
      title: title of the plot.
      unit: unit of the loss; nats get a second axis in bits.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, label, color, marker in (("train", "training", "#9ab8d6", ""), ("valid", "validation", "#b3341f", "o")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]
        if points:
            axes.plot(*zip(*points), label=label, color=color, marker=marker, markersize=4, linewidth=1.4)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=literal(title))
    if unit.startswith("nats"):
        bits = axes.secondary_yaxis("right", functions=(_nats_to_bits, _bits_to_nats))
        bits.set_ylabel(unit.replace("nats", "bits"))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _nats_to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _bits_to_nats(bits: Any) -> Any:
    return bits * math.log(2)
