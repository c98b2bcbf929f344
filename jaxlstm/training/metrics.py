"""What a run shows and writes down: progress, metrics, curves."""

import json
import math
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


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON, by `atomic_write`."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def keep_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first ``count`` rows of a file of JSON lines, and nothing else left in the file.

    Raises:
      ValueError: if there are fewer.
    """
    lines = path.read_text(encoding="utf-8").splitlines()[:count] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged: the first {count:,} lines are not all JSON") from None
    if len(rows) < count:
        raise ValueError(f"{path} is damaged: {len(rows):,} lines, expected at least {count:,}")
    with atomic_write(path) as file:
        file.write("".join(line + "\n" for line in lines).encode())
    return rows


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    if math.isinf(seconds):
        return "-:--"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def short(counted: str) -> str:
    """What is counted, for a narrow line."""
    return {"characters": "char", "words": "word"}.get(counted, counted)


def say(console: Console, text: str) -> None:
    """A line as it is: nothing in it is markup, the code of an emoji, or folded."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['left']} left", style="progress.remaining")


class Report:
    """Progress on a terminal or in plain lines, and ``metrics.jsonl`` in the folder of the run.

    Args:
      folder: of the run; it exists.
      console: where to show; one that is not a terminal gets plain lines.
      counted: what speed is measured in, as in ``"characters"``.
      say: a loss, with its unit.
      rows: number of rows that are in ``metrics.jsonl`` already and to be kept; what a killed run wrote after them is
        dropped.
      tensorboard: whether to write the figures for TensorBoard too, into the folder ``tensorboard``.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        counted: str,
        say: Callable[[float], str],
        rows: int = 0,
        *,
        tensorboard: bool = False,
    ) -> None:
        self._counted, self._say = counted, say
        self.console = console
        self._path = folder / "metrics.jsonl"
        self.rows = keep_rows(self._path, rows)
        self._metrics = self._path.open("a", encoding="utf-8")
        last = self.rows[-1]["step"] if self.rows else 0
        self._board = _tensorboard(folder / "tensorboard", last + 1) if tensorboard else None
        columns = (
            TextColumn("{task.fields[figures]}", markup=False),
            BarColumn(None),
            _Remaining(Column(no_wrap=True)),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self._task = self._bar.add_task("", total=1.0, figures="compiling", left="-:--")
        self._began, self._progress = time.perf_counter(), 0.0
        self._valid = ""  # the last validation, for the bar

    def begin(self, progress: float) -> None:
        """The clock of the time left starts here, at this share of the run."""
        self._began, self._progress = time.perf_counter(), progress

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        try:
            self._metrics.close()
        except OSError:  # a row that could not be written is tried again here
            if error is None:
                raise
        if self._board is not None:
            self._board.close()

    def train(self, step: int, loss: float, speed: float, progress: float, skipped: int) -> None:
        """Record the training loss.

        Args:
          step: the step it is at.
          loss: mean since the last record, over steps whose loss was finite; NaN if none was.
          speed: what is counted, per second.
          progress: in [0, 1], gives the time left.
          skipped: steps skipped so far.
        """
        self._write(step, "train", {"loss": loss, f"{self._counted}_per_second": speed, "skipped": skipped})
        done = progress - self._progress
        left = (time.perf_counter() - self._began) * (1 - progress) / done if done > 0 else math.inf
        line = f"{self._figures(step, loss)}  {speed:>9,.0f} {short(self._counted)}/s"
        line += f"  {skipped:,} skipped" if skipped else ""
        self._bar.update(self._task, completed=progress, figures=self._fitting(line, clock(left)), left=clock(left))
        if not self.console.is_terminal:
            self.say(f"{line}  {clock(left)} left")

    def _fitting(self, line: str, left: str) -> str:
        """What there is room for beside the time left, which is never pushed out: figures are in the metrics too."""
        room = self.console.width - len(f"  {left} left")
        whole = line + self._valid
        return whole if len(whole) <= room else line if len(line) <= room else line[: room - 1] + "…"

    def valid(self, step: int, figures: dict[str, float], speed: float, *, best: bool, sample: str) -> None:
        """Record figures on the validation data, ``loss`` among them, and show what the model makes."""
        self._write(step, "valid", figures | {f"{self._counted}_per_second": speed})
        more = "".join(f"  {name} {value:.4g}" for name, value in figures.items() if name != "loss")
        self._valid = f"  valid {figures['loss']:.4f}{more}"
        line = f"{self._figures(step, figures['loss'])}{more}  {speed:>9,.0f} {short(self._counted)}/s  validation"
        self.say(line + (", the best so far" if best else ""))
        if sample:
            self.say("".join(f"    | {line}\n" for line in sample.splitlines()).rstrip("\n"))

    def diagnosis(self, step: int, figures: dict[str, float]) -> None:
        """Record what was seen inside the network."""
        self._write(step, "diagnosis", figures)

    def say(self, text: str) -> None:
        """A line above the bar, as it is."""
        say(self.console, text)

    def _figures(self, step: int, loss: float) -> str:
        return f"step {step:>6,}  loss {self._say(loss)}"

    def _write(self, step: int, split: str, figures: dict[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        self.rows.append({"step": step, "split": split} | values)
        try:
            self._metrics.write(json.dumps(self.rows[-1]) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise write_error(self._path, error) from None
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
            self._board.flush()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files; what a killed run wrote from ``step`` on is not shown."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'jaxlstm[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=step)


def draw_curves(path: Path, rows: list[dict[str, Any]], title: str, unit: str) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, label, color, marker in (("train", "training", "#9ab8d6", ""), ("valid", "validation", "#b3341f", "o")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]
        if points:
            axes.plot(*zip(*points), label=label, color=color, marker=marker, markersize=4, linewidth=1.4)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title)
    if unit.startswith("nats"):
        bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
        bits.set_ylabel(unit.replace("nats", "bits"))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)
