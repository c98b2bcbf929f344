"""Plots of gates, cell states, gradient norms and eigenvalues, readable in grayscale and by color-blind readers."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.diagnostics.dynamics import FixedPoints
from jaxlstm.diagnostics.effective_memory import EffectiveMemory
from jaxlstm.diagnostics.trace import DirectionTrace, sort_gates
from jaxlstm.errors import optional_package
from jaxlstm.params import Params, Weights
from jaxlstm.recurrence.step import has_dense_recurrence
from jaxlstm.rnn import RNN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORMAP = "cividis"  # its lightness increases with the value
SIGNED_COLORMAP = "PuOr_r"  # white at zero; negative numbers violet, positive ones orange
LINES = (("#D55E00", "--"), ("#56B4E9", "-."), ("#0072B2", "-"), ("#000000", ":"), ("#009E73", "-"))  # Okabe & Ito 2008
GATE_LABELS = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o"}
SYMBOLS = {"\n": "↵", "\t": "⇥", " ": "·"}


def literal(text: str) -> str:
    """Returns text that matplotlib draws literally.

    Two dollar signs would make it a formula. The name of a file may have bytes that are not UTF-8, shown as ``?``.
    """
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def draw_gates(values: DirectionTrace, text: str, *, units: Sequence[int] | None = None) -> "Figure":
    """Draws gates, cell state and output as heat maps of units over time, with the characters on the time axis.

    Args:
      values: one direction of a layer, of a `trace` of one sequence.
      text: the T characters of the input.
      units: units to draw, from top to bottom; None for 40 of them, in descending order of the mean forget gate.

    Raises:
      ValueError: if the values do not have one row per character.
      ImportError: without matplotlib.
    """
    panels = {name: _check_rows(a, text, name) for name, a in sort_gates(values).gates.items()}
    states = values.c if isinstance(values.c, dict) else {} if values.c is None else {"c": values.c}
    for name, state in states.items():
        panels[name] = _check_rows(state, text, name)
        panels[name] = np.tanh(panels[name]) if name == "c" else panels[name]
    panels["h"] = _check_rows(values.cell_output, text, "cell_output")
    ranking = np.argsort(-panels.get("f", panels["h"]).mean(0), kind="stable")
    evenly = np.linspace(0, len(ranking) - 1, min(40, len(ranking))).round().astype(int)
    chosen = ranking[evenly] if units is None else np.array(units, int)
    figure = _new_figure(max(5.0, 0.105 * len(text) + 1.5), 1.5 * len(panels) + 0.4)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, a) in zip(grid, panels.items()):
        high = max(1.0, float(np.abs(a).max()))  # above 1 without an activation
        low = -high if name in ("c", "h") or a.min() < 0 else 0
        colors = SIGNED_COLORMAP if low < 0 else COLORMAP
        image = axes.imshow(a[:, chosen].T, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest")
        axes.set_ylabel({"c": "tanh(c)", "h": "output h"}.get(name, literal(GATE_LABELS.get(name, name))))
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, pad=0.01, ticks=[low, (low + high) / 2, high])
        axes.tick_params(axis="x", length=0)
    _label_characters(grid[-1], text)
    order = (
        ""
        if units is not None
        else f", evenly chosen, in descending order of the mean of {'f' if 'f' in panels else 'h'}"
    )
    grid[0].set_title(f"{len(chosen)} of {panels['h'].shape[1]} units, one row each{order}", fontsize=10)
    return figure


def draw_cell_states(
    c: Float[ArrayLike, "T H"], text: str, units: Mapping[int, str] | Sequence[int], *, width: int = 72
) -> "Figure":
    """Draws the cell state of single units as the background color of the text.

    Args:
      c: cell states of one direction of a layer, of a `trace` of one sequence.
      text: the T characters of the input.
      units: units to draw; a mapping gives each a title.
      width: maximum number of characters per row; a row also ends with a line of the text.

    Raises:
      ValueError: if ``c`` does not have one row per character.
      ImportError: without matplotlib.
    """
    states = np.tanh(_check_rows(c, text, "c"))
    rows = _wrap(text, width)
    titles = dict(units) if isinstance(units, Mapping) else {unit: f"unit {unit}" for unit in units}
    columns = max(map(len, rows))
    figure = _new_figure(max(6.0, 0.115 * columns + 1.2), max(1.5, (0.24 * len(rows) + 0.5) * len(titles)))
    panels = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    image: Any = None
    for axes, (unit, title) in zip(panels, titles.items()):
        grid = np.full((len(rows), columns), np.nan)
        for y, row in enumerate(rows):
            grid[y, : len(row)] = states[row.start : row.stop, unit]
            for x, t in enumerate(row):
                color = "white" if states[t, unit] < 0.2 else "black"
                symbol = SYMBOLS.get(text[t], text[t])
                axes.text(x, y, symbol, ha="center", va="center", fontsize=7, family="monospace", color=color)
        image = axes.imshow(grid, aspect="auto", cmap=COLORMAP, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(literal(title), fontsize=9, loc="left")
        axes.set_axis_off()
    figure.colorbar(image, ax=list(panels), pad=0.01, ticks=[-1, 0, 1], label="tanh(c)", aspect=40)
    return figure


def draw_norms(
    axes: "Axes",
    norms: Mapping[str, Float[ArrayLike, " T"]],
    *,
    parts: Mapping[str, Float[ArrayLike, " T"]] | None = None,
    title: str = "",
) -> None:
    """Draws gradient norms over time on a log scale, each relative to its value at the last step.

    Args:
      axes: axes to draw on.
      norms: norms by the label of the line.
      parts: norms of a part of each gradient by the same labels, drawn as thin lines relative to the whole at the last
        step; None for none.
      title: title of the axes.
    """
    last = {name: np.asarray(values, np.float64)[-1] for name, values in norms.items()}
    for lines, width in ((norms, None), (parts or {}, 0.8)):
        for (color, style), (name, values) in zip(cycle(LINES), lines.items()):
            a = np.asarray(values, np.float64)
            relative = np.where(a > 0, a / last[name], np.nan)  # norms that underflow to zero have no logarithm
            label = None if width else literal(name)
            axes.semilogy(np.arange(1, len(a) + 1), relative, style, color=color, linewidth=width, label=label)
    axes.set(xlabel="step t", ylabel="gradient at step t / at the last step", title=literal(title))
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-20))


def draw_eigenvalues(lstm: RNN, params: Params, *, layer: int = 0, direction: int = 0) -> "Figure":
    """Draws the eigenvalues of the recurrent matrix of each gate in the complex plane, with the unit circle.

    The matrix is ``W_h``, or ``W_h W_p`` for a network with a projection.

    Args:
      lstm: the network.
      params: from ``lstm.init``.
      layer: index of the layer.
      direction: 0 for forward, 1 for backward.

    Raises:
      ValueError, TypeError: if the network does not have this layer or direction.
      ImportError: without matplotlib.
    """
    layer = validation.index_below("layer", layer, lstm.num_layers)
    direction = validation.index_below("direction", direction, lstm.num_directions)
    matrices = _recurrent_matrices(lstm.resolved_cell, params.layers[layer].directions[direction])
    figure = _new_figure(2.6 * len(matrices) + 0.4, 3.0)
    figure.set_layout_engine("compressed")  # for panels of equal aspect; otherwise their titles are cut
    panels = figure.subplots(1, len(matrices), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, matrix) in zip(panels, matrices.items()):
        values = np.linalg.eigvals(matrix)
        _draw_spectrum(axes, values)
        axes.set_title(f"{name}: largest {np.abs(values).max():.2f}", fontsize=9)
    figure.supylabel("imaginary", fontsize=10)
    return figure


def draw_fixed_points(points: FixedPoints) -> "Figure":
    """Draws the eigenvalues of the Jacobian at each fixed point in the complex plane, with the unit circle.

    A state near the point returns to it along modes inside the circle and leaves it along modes outside.

    Args:
      points: of N starts; a panel each.

    Raises:
      ImportError: without matplotlib.
    """
    figure = _new_figure(2.6 * len(points.eigenvalues) + 0.4, 3.0)
    figure.set_layout_engine("compressed")
    panels = figure.subplots(1, len(points.eigenvalues), squeeze=False, sharex=True, sharey=True)[0]
    for n, (axes, values) in enumerate(zip(panels, points.eigenvalues)):
        _draw_spectrum(axes, values)
        axes.set_title(f"start {n}: speed {float(points.speed[n]):.0e}\nlargest {np.abs(values).max():.2f}", fontsize=9)
    figure.supylabel("imaginary", fontsize=10)
    return figure


def draw_effective_memory(memories: Mapping[str, EffectiveMemory]) -> "Figure":
    """Draws the change of the last output over the number of last steps that are kept, on log scales.

    Args:
      memories: results by the label of the line.

    Raises:
      ImportError: without matplotlib.
    """
    figure = _new_figure(5.0, 3.4)
    axes = figure.subplots()
    for (color, style), (name, memory) in zip(cycle(LINES), memories.items()):
        change = np.where(memory.change > 0, memory.change, np.nan)
        axes.loglog(memory.spans, change, style, color=color, marker=".", label=literal(name))
        axes.axhline(memory.threshold, color="0.4", linewidth=0.8)
    axes.set(xlabel="last steps that are kept", ylabel="relative change of the output")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw_spectrum(axes: "Axes", eigenvalues: np.ndarray) -> None:
    """Draws eigenvalues in the complex plane, with the unit circle."""
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color="0.6", linewidth=0.8)
    axes.scatter(np.real(eigenvalues), np.imag(eigenvalues), s=8, color=LINES[2][0], alpha=0.7, linewidths=0)
    axes.set(xlabel="real", aspect="equal")


def _new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of this size in inches."""
    with optional_package("matplotlib", extra="train", purpose="plotting"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _recurrent_matrices(cell: Cell, weights: Weights) -> dict[str, np.ndarray]:
    """Returns the matrix ``(H, H)`` from the cell outputs of one step to the pre-activations of the next, by gate."""
    if weights.w_h is None or not has_dense_recurrence(cell, weights):
        raise ValueError("the eigenvalues need dense recurrent weights; this cell has none")
    w_h = np.asarray(weights.w_h, np.float64)
    if weights.w_p is not None:
        w_h = w_h @ np.asarray(weights.w_p, np.float64)
    rows = cell.slabs_reading("h")
    names = [name for n, name in enumerate(cell.activations) if n in rows] if cell.num_gates > 1 else ["W_h"]
    return dict(zip((GATE_LABELS.get(name, name) for name in names), np.split(w_h, len(rows))))


def _check_rows(a: ArrayLike, text: str, name: str) -> np.ndarray:
    """Returns ``a`` as ``(T, H)``, with one row per character of the text."""
    values = np.asarray(a, np.float64)
    if values.ndim != 2 or len(values) != len(text):
        raise ValueError(f"{name} must have shape ({len(text)}, H), a row per character, got {list(values.shape)}")
    return values


def _wrap(text: str, width: int) -> list[range]:
    """Splits the indices of a text into rows of at most ``width`` characters that also end at line breaks."""
    rows, start = [], 0
    while start < len(text):
        newline = text.find("\n", start, start + width)
        stop = min(start + width, len(text)) if newline < 0 else newline + 1
        rows.append(range(start, stop))
        start = stop
    return rows


def _label_characters(axes: "Axes", text: str) -> None:
    """Labels the time axis with the characters of a text."""
    axes.set_xticks(range(len(text)), [SYMBOLS.get(character, character) for character in text])
    axes.tick_params(axis="x", length=0, labelsize=9, labelfontfamily="monospace")
