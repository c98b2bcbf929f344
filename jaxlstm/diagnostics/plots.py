"""Pictures of what is inside a network, for paper too: brightness carries the value, line styles the names."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlstm.cells import Cell
from jaxlstm.diagnostics.gate_statistics import CANDIDATE
from jaxlstm.diagnostics.trace import Steps, in_order
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights
from jaxlstm.training.data import synthetic
from jaxlstm.training.vanishing_gradient import Learner

BRIGHTNESS = "cividis"  # from dark to bright without a turn: the same order in grey, and to a colour-blind eye
LINES = (("#D55E00", "--"), ("#56B4E9", "-."), ("#0072B2", "-"), ("#000000", ":"), ("#009E73", "-"))  # Okabe & Ito 2008
MEANING = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o"}
SYMBOLS = {"\n": "↵", "\t": "⇥", " ": "·"}


def draw_gates(steps: Steps, text: str, *, units: Sequence[int] | None = None) -> Figure:
    """Gates and cell state as heat maps, units over time, the input characters on the axis.

    Args:
      steps: of one layer and direction of a `trace` of one sequence.
      text: T characters, the inputs.
      units: which to draw, from top to bottom; by default 40 of them, the longest memory first.
    """
    values = {name: _of_one_sequence(a, text, name) for name, a in in_order(steps).gates.items()}
    if steps.c is not None:
        values["c"] = np.tanh(_of_one_sequence(steps.c, text, "c"))
    values["h"] = _of_one_sequence(steps.m, text, "m")
    ranking = np.argsort(-values.get("f", values["h"]).mean(0), kind="stable")  # by the mean forget gate
    some = np.linspace(0, len(ranking) - 1, min(40, len(ranking))).round().astype(int)
    chosen = ranking[some] if units is None else list(units)
    figure = Figure(figsize=(max(5.0, 0.13 * len(text) + 2), 1.75 * len(values) + 0.4), layout="constrained")
    panels = figure.subplots(len(values), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, a) in zip(panels, values.items()):
        low = -1 if name in (CANDIDATE, "c", "h") else 0
        image = axes.imshow(a[:, chosen].T, aspect="auto", cmap=BRIGHTNESS, vmin=low, vmax=1, interpolation="nearest")
        axes.set_ylabel({"c": "tanh(c)", "h": "output h"}.get(name, MEANING.get(name, name)))
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, pad=0.01, ticks=[low, (low + 1) / 2, 1])
        axes.tick_params(axis="x", length=0)
    _characters_on(panels[-1], text)
    panels[0].set_title(f"{len(chosen)} of {values['h'].shape[1]} units, one row each", fontsize=10)
    return figure


def draw_cell_states(
    c: Float[ArrayLike, "T H"], text: str, units: Mapping[int, str] | Sequence[int], *, width: int = 72
) -> Figure:
    """The cell state of chosen units over the text: one sees what makes a unit change its mind.

    Args:
      c: cell states, of one layer and direction of a `trace` of one sequence.
      text: T characters, the inputs.
      units: which to draw; a mapping gives each a title of its own.
      width: characters in a row; a row ends with each line of the text.
    """
    states = np.tanh(_of_one_sequence(c, text, "c"))
    rows = _wrap(text, width)
    titles = dict(units) if isinstance(units, Mapping) else {unit: f"unit {unit}" for unit in units}
    columns = max(map(len, rows))
    size = (max(6.0, 0.115 * columns + 1.2), max(1.5, (0.24 * len(rows) + 0.5) * len(titles)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    image: Any = None
    for axes, (unit, title) in zip(panels, titles.items()):
        grid = np.full((len(rows), columns), np.nan)
        for y, row in enumerate(rows):
            grid[y, : len(row)] = states[row.start : row.stop, unit]
            for x, at in enumerate(row):
                dark = states[at, unit] < 0.2
                symbol = SYMBOLS.get(text[at], text[at])
                color = "white" if dark else "black"
                axes.text(x, y, symbol, ha="center", va="center", fontsize=7, family="monospace", color=color)
        image = axes.imshow(grid, aspect="auto", cmap=BRIGHTNESS, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_axis_off()
    figure.colorbar(image, ax=list(panels), pad=0.01, ticks=[-1, 0, 1], label="tanh(c)", aspect=40)
    return figure


def draw_vanishing(learners: Mapping[str, Learner], *, title: str = "") -> Figure:
    """The gradient through time before and after training, and the learning curves."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    second.sharey(first)
    draw_norms(first, {name: one.before for name, one in learners.items()}, title="before training")
    draw_norms(second, {name: one.after for name, one in learners.items()}, title="after training")
    second.set_ylabel("")
    for (color, style), (name, one) in zip(cycle(LINES), learners.items()):
        third.semilogy(one.updates, one.errors, style, color=color, label=name)
    third.axhline(synthetic.ADDING_BASELINE, color="0.4", linewidth=0.8)
    third.text(
        third.get_xlim()[1], synthetic.ADDING_BASELINE * 0.85, "always answering 1 ", ha="right", va="top", fontsize=8
    )
    third.set(xlabel="updates", ylabel="mean squared error", title="learning")
    third.legend(fontsize=8)
    for axes in (first, second, third):
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    return figure


def draw_norms(axes: Axes, norms: Mapping[str, Float[ArrayLike, " T"]], *, title: str = "") -> None:
    """Gradient norms over time, each relative to that at the last step, on a log scale."""
    for (color, style), (name, values) in zip(cycle(LINES), norms.items()):
        a = np.asarray(values, np.float64)
        relative = np.where(a > 0, a / a[-1], np.nan)  # what underflowed has no place on the scale
        axes.semilogy(np.arange(1, len(a) + 1), relative, style, color=color, label=name)
    axes.set(xlabel="step t", ylabel="gradient at step t / at the last step", title=title)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-20))


def draw_eigenvalues(lstm: LSTM, params: Params, *, layer: int = 0, direction: int = 0) -> Figure:
    """The eigenvalues of W_h, gate by gate, in the complex plane with the unit circle.

    With a projection they are those of ``W_h W_p``, by which one step's units reach the next one's.

    Raises:
      ValueError: for a layer or a direction that the network has not.
    """
    for name, number, count in (("layer", layer, lstm.num_layers), ("direction", direction, lstm.num_directions)):
        if not 0 <= number < count:
            raise ValueError(f"{name} must be one of 0 to {count - 1}, got {number}")
    blocks = _recurrent_blocks(lstm.resolved_cell, params.layers[layer].directions[direction])
    figure = Figure(figsize=(2.6 * len(blocks) + 0.4, 3.0), layout="constrained")
    angles = np.linspace(0, 2 * np.pi, 200)
    panels = figure.subplots(1, len(blocks), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, matrix) in zip(panels, blocks.items()):
        values = np.linalg.eigvals(matrix)
        axes.plot(np.cos(angles), np.sin(angles), color="0.6", linewidth=0.8)
        axes.scatter(np.real(values), np.imag(values), s=8, color=LINES[2][0], alpha=0.7, linewidths=0)
        axes.set(title=f"{name}: largest {np.abs(values).max():.2f}", xlabel="real", aspect="equal")
        axes.title.set_fontsize(9)
    figure.supylabel("imaginary", fontsize=10)
    return figure


def _recurrent_blocks(cell: Cell, w: Weights) -> dict[str, np.ndarray]:
    """By name, the ``(H, H)`` matrix from the units of one step to each slab of the next one's z."""
    w_h = np.asarray(w.w_h, np.float64)
    if w.w_p is not None:
        w_h = w_h @ np.asarray(w.w_p, np.float64)
    letters = {4: "ifgo", 3: "fgo"}.get(cell.num_gates, "")
    names = [MEANING[letter] for letter in letters] or [
        f"W_h {n}" if cell.num_gates > 1 else "W_h" for n in range(cell.num_gates)
    ]
    return dict(zip(names, np.split(w_h, cell.num_gates)))


def _of_one_sequence(a: ArrayLike, text: str, name: str) -> np.ndarray:
    """``(T, H)`` values that go with T characters."""
    values = np.asarray(a, np.float64)
    if values.ndim != 2 or len(values) != len(text):
        raise ValueError(f"{name} must have shape ({len(text)}, H), a row per character, got {list(values.shape)}")
    return values


def _wrap(text: str, width: int) -> list[range]:
    """Ranges of the text, one for each row: up to ``width`` characters, and no further than a line's end."""
    rows, begin = [], 0
    while begin < len(text):
        newline = text.find("\n", begin, begin + width)
        end = min(begin + width, len(text)) if newline < 0 else newline + 1
        rows.append(range(begin, end))
        begin = end
    return rows


def _characters_on(axes: Axes, text: str) -> None:
    """Characters as ticks of the time axis."""
    axes.set_xticks(range(len(text)), [SYMBOLS.get(character, character) for character in text])
    axes.tick_params(axis="x", length=0, labelsize=8, labelfontfamily="monospace")
