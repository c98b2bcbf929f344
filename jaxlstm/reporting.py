"""What a run shows and writes down: progress, metrics, curves."""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def figures(step: int, loss: float, characters_per_second: float) -> str:
    """The figures of a line: step, loss in nats and in bits per character, speed."""
    bits = loss / math.log(2)
    return f"step {step:>6,}  loss {loss:.4f} nats  {bits:.4f} bits/char  {characters_per_second:>9,.0f} char/s"


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['left']} left", style="progress.remaining")


class Report:
    """Progress on a terminal or in plain lines, and ``metrics.jsonl`` in the folder of the run.

    Args:
      folder: of the run; it exists.
      console: where to show; one that is not a terminal gets plain lines.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.console = console
        self.rows: list[dict[str, Any]] = []
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        columns = (TextColumn("{task.fields[figures]}"), BarColumn(None), _Remaining())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self._task = self._bar.add_task("", total=1.0, figures="compiling", left="-:--")
        self._began = time.perf_counter()

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._metrics.close()

    def train(self, step: int, loss: float, characters_per_second: float, progress: float) -> None:
        """Record the training loss; ``progress`` in [0, 1] gives the time left."""
        self._write(step, "train", loss, characters_per_second)
        left = (time.perf_counter() - self._began) * (1 - progress) / progress
        line = figures(step, loss, characters_per_second)
        self._bar.update(self._task, completed=progress, figures=line, left=clock(left))
        if not self.console.is_terminal:
            self.say(f"{line}  {clock(left)} left")

    def valid(self, step: int, loss: float, characters_per_second: float, *, best: bool, sample: str) -> None:
        """Record the validation loss and show a sample of what the model writes."""
        self._write(step, "valid", loss, characters_per_second)
        self.say(f"{figures(step, loss, characters_per_second)}  validation{', the best so far' if best else ''}")
        self.say("".join(f"    | {line}\n" for line in sample.splitlines()).rstrip("\n"))

    def say(self, text: str) -> None:
        """A line above the bar, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, step: int, split: str, loss: float, characters_per_second: float) -> None:
        row = {"step": step, "split": split, "loss": loss, "characters_per_second": characters_per_second}
        self.rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()


def draw_curves(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, label, color, marker in (("train", "training", "#9ab8d6", ""), ("valid", "validation", "#b3341f", "o")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points), label=label, color=color, marker=marker, markersize=4, linewidth=1.4)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)
