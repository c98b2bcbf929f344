"""Prints tables, draws the comparison, and runs the command line of a benchmark."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro
from peers import JAXLSTM, JAXLSTM_BF16, JAXLSTM_SCAN, JAXLSTM_SHARDED, TORCH, TORCH_BF16
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# The color-blind safe palette of Okabe and Ito; the markers differ as well.
STYLES: dict[str, tuple[str, str, bool]] = {  # name -> (color, marker, whether the marker is filled)
    "nnx LSTMCell": ("#56B4E9", "v", True),
    "nnx OptimizedLSTMCell": ("#0072B2", "^", True),
    "linen OptimizedLSTMCell": ("#009E73", "D", True),
    "haiku": ("#E69F00", "o", True),
    "equinox": ("#CC79A7", "P", True),
    "keras": ("#000000", "X", True),
    TORCH: ("#D55E00", "s", True),
    TORCH_BF16: ("#D55E00", "s", False),
    JAXLSTM_SCAN: ("#777777", "*", True),
    JAXLSTM_SHARDED: ("#777777", "*", False),
}


def make_console() -> Console:
    """Returns a console; one of 120 columns if the output is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def run_cli(main: Callable[[Any, Console], None], options: type) -> None:
    """Parses ``options`` from the command line and calls ``main``; errors end the process with one line."""
    try:
        main(tyro.cli(options), make_console())
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def prepare_output(path: Path) -> Path:
    """Creates the folder of an output file and returns the path; called before anything is measured.

    Raises:
      ValueError: if the folder cannot be created, or ``path`` is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create the folder {path.parent}: {error.strerror}") from None
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file name")
    return path


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table: text left-aligned, numbers right-aligned, a dash for None."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    cells = [list(row) for row in rows]
    for n, column in enumerate(columns):
        is_text = any(isinstance(row[n], str) for row in cells)
        table.add_column(column, justify="left" if is_text else "right")
    for row in cells:
        table.add_row(*map(_format_cell, row))
    console.print(Text(title, style="bold"), table, sep="\n")


def print_line(console: Console, text: str) -> None:
    """Prints one line without markup, highlighting or line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _format_cell(value: Any) -> Text:
    if value is None:
        return Text("-")
    if isinstance(value, float):
        return Text(f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}")
    return Text(str(value))


def draw_comparison(path: Path, shapes: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the time of each peer relative to jaxlstm, per shape: training step above, inference below.

    PyTorch in bfloat16 is compared with jaxlstm in bfloat16, all others with jaxlstm in float32.

    Args:
      path: file to write.
      shapes: results of the section ``shapes``, one entry per shape.
      title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, kind, label in zip(panels, ("train", "infer"), ("training step", "inference")):
        _draw_panel(axes, shapes, kind)
        axes.set_title(label, fontsize=12, loc="left")
    panels[-1].set_xlabel("shape: T steps, B sequences, I inputs, H hidden units", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, shapes: Sequence[dict[str, Any]], kind: str) -> None:
    names = [name for name in STYLES if any(name in shape[kind] for shape in shapes)]
    ratios: list[float] = []
    for n, name in enumerate(names):
        reference = JAXLSTM_BF16 if name == TORCH_BF16 else JAXLSTM
        points = [
            (x + 0.72 * ((n + 0.5) / len(names) - 0.5), times[name]["median_ms"] / times[reference]["median_ms"])
            for x, times in enumerate(shape[kind] for shape in shapes)
            if name in times and reference in times
        ]
        if points:
            color, marker, filled = STYLES[name]
            label = f"{name} (to jaxlstm bf16)" if name == TORCH_BF16 else name
            face = color if filled else "white"
            size = 12 if marker == "*" else 8
            axes.plot(*zip(*points), marker, color=color, markerfacecolor=face, markersize=size, label=label, zorder=3)
            ratios += [ratio for _, ratio in points]
    axes.axhline(1, color="black", linewidth=1.2, zorder=2)
    for x in range(1, len(shapes), 2):
        axes.axvspan(x - 0.5, x + 0.5, color="#f1f1f1", zorder=0)
    _set_log_scale(axes, ratios)
    labels = ["T={T}  B={B}\nI={I}  H={H}".format(**shape["shape"]) for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels, fontsize=10)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.set_ylabel("time relative to jaxlstm\n(above 1: slower than jaxlstm)", fontsize=11)


def _set_log_scale(axes: Any, ratios: Sequence[float]) -> None:
    """Sets a logarithmic y axis that contains the ratios and 1, with ticks written as plain numbers."""
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100]
    low, high = 0.85 * min([1, *ratios]), 1.18 * max([1, *ratios])
    axes.set_yscale("log")
    axes.minorticks_off()
    visible = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(visible, [f"{tick:g}×" for tick in visible], fontsize=10)
    axes.set_ylim(low, high)
    axes.grid(axis="y", color="#cccccc", linewidth=0.7, zorder=1)
