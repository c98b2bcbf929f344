"""How it is shown: tables on the terminal, a picture."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro
from peers import OURS, OURS_BF16, SCAN, SPREAD, TORCH, TORCH_BF16
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Okabe and Ito's colours, told apart by the colour-blind; the markers differ as well.
STYLES: dict[str, tuple[str, str, bool]] = {  # colour, marker, whether it is filled
    "nnx LSTMCell": ("#56B4E9", "v", True),
    "nnx OptimizedLSTMCell": ("#0072B2", "^", True),
    "linen OptimizedLSTMCell": ("#009E73", "D", True),
    "haiku": ("#E69F00", "o", True),
    "equinox": ("#CC79A7", "P", True),
    "keras": ("#000000", "X", True),
    TORCH: ("#D55E00", "s", True),
    TORCH_BF16: ("#D55E00", "s", False),
    SCAN: ("#777777", "*", True),
    SPREAD: ("#777777", "*", False),
}


def console() -> Console:
    """The terminal, or, where the output goes to a file, one that is wide enough."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def obey(main: Callable[[Any, Console], None], options: type) -> None:
    """A command line; a mistake, or what the machine refuses, ends the process with one line."""
    try:
        main(tyro.cli(options), console())
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def to_be_written(path: Path) -> Path:
    """The path of a file, once its folder is there: to be found out before anything is measured.

    Raises:
      ValueError: if its folder cannot be made, or it is a folder itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is written")
    return path


def table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; text to the left, numbers to the right, a dash where there is none."""
    shown = Table(box=box.SIMPLE, pad_edge=False)
    body = [list(row) for row in rows]
    for n, column in enumerate(columns):
        is_text = any(isinstance(row[n], str) for row in body)
        shown.add_column(column, justify="left" if is_text else "right")
    for row in body:
        shown.add_row(*map(_cell, row))
    console.print(Text(title, style="bold"), shown, sep="\n")


def _cell(value: Any) -> Text:
    if value is None:
        return Text("-")
    if isinstance(value, float):
        return Text(f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}")
    return Text(str(value))


def draw(path: Path, shapes: Sequence[dict[str, Any]], title: str) -> None:
    """Time of each peer relative to ours, over shapes: training above, inference below.

    PyTorch's bfloat16 is compared with our bfloat16, all others with our float32.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, kind, label in zip(panels, ("train", "infer"), ("training step", "inference")):
        _panel(axes, shapes, kind)
        axes.set_title(label, fontsize=12, loc="left")
    panels[-1].set_xlabel("shape of the work: T steps, B sequences, I inputs, H hidden units", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, shapes: Sequence[dict[str, Any]], kind: str) -> None:
    present = [name for name in STYLES if any(name in shape[kind] for shape in shapes)]
    ratios: list[float] = []
    for n, name in enumerate(present):
        reference = OURS_BF16 if name == TORCH_BF16 else OURS
        points = [
            (at + 0.72 * ((n + 0.5) / len(present) - 0.5), times[name]["median_ms"] / times[reference]["median_ms"])
            for at, times in enumerate(shape[kind] for shape in shapes)
            if name in times and reference in times
        ]
        if points:
            colour, marker, filled = STYLES[name]
            label = f"{name} (to our bfloat16)" if name == TORCH_BF16 else name
            face = colour if filled else "white"
            size = 12 if marker == "*" else 8
            axes.plot(*zip(*points), marker, color=colour, markerfacecolor=face, markersize=size, label=label, zorder=3)
            ratios += [ratio for _, ratio in points]
    axes.axhline(1, color="black", linewidth=1.2, zorder=2)
    for at in range(1, len(shapes), 2):
        axes.axvspan(at - 0.5, at + 0.5, color="#f1f1f1", zorder=0)
    _scale(axes, ratios)
    names = ["T={T}  B={B}\nI={I}  H={H}".format(**shape["shape"]) for shape in shapes]
    axes.set_xticks(range(len(shapes)), names, fontsize=10)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.set_ylabel("time relative to jaxlstm\n(above 1: slower than it)", fontsize=11)


def _scale(axes: Any, ratios: Sequence[float]) -> None:
    """A logarithmic axis around the ratios, 1 always on it, with ticks that read as plain numbers."""
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100]
    low, high = 0.85 * min([1, *ratios]), 1.18 * max([1, *ratios])
    axes.set_yscale("log")
    axes.minorticks_off()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}×" for tick in shown], fontsize=10)
    axes.set_ylim(low, high)
    axes.grid(axis="y", color="#cccccc", linewidth=0.7, zorder=1)
