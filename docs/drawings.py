"""Draws how an LSTM treats lengths, masks and resets: ``python docs/drawings.py``, a few seconds.

Each drawing is computed from calls: the color of a step is the first input that its output depends on, found by
`jax.jacobian`, and a step is white if its output is zero.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import jaxlstm

FIGURES = Path(__file__).parent / "figures"
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")  # Okabe & Ito 2008
NUM_STEPS, BATCH_SIZE = 12, 3
MASK = ("110111111111", "111000110111", "111111111000")  # 1: True; one row per sequence
RESETS = ("000000000000", "000010000100", "000100010010")


def parse(rows: tuple[str, ...]) -> jax.Array:
    """Returns ``(T, B)`` booleans from one string of 0 and 1 per sequence."""
    return jnp.array([[digit == "1" for digit in row] for row in rows]).T


def influence(**masks: Any) -> np.ndarray:
    """Returns ``(B, T, T)`` booleans: whether the output of a step, the first T, depends on the input of another."""
    lstm = jaxlstm.LSTM(1, 2)
    params = lstm.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (NUM_STEPS, BATCH_SIZE, 1))
    jacobian = jax.jacobian(lambda xs: lstm(params, xs, **masks)[0].sum(-1))(xs)  # (T, B, T, B, 1)
    return np.stack([np.asarray(jacobian[:, b, :, b, 0] != 0) for b in range(BATCH_SIZE)])


def draw(name: str, rows: list[str], **masks: Any) -> None:
    """Writes the drawing of a call with these masks to ``docs/figures``; ``rows`` are the labels of the sequences."""
    figure = Figure(figsize=(7.2, 1.7), layout="constrained")
    axes = figure.subplots()
    for b, depends in enumerate(influence(**masks)):
        first = [int(np.argmax(row)) if row.any() else None for row in depends]  # None: the step is skipped
        starts = sorted({start for start in first if start is not None})
        for t, start in enumerate(first):
            color = "white" if start is None else COLORS[starts.index(start)]
            axes.add_patch(Rectangle((t, b), 1, 1, facecolor=color, edgecolor="black", linewidth=0.8))
            label = "0" if start is None else f"y{t}"
            axes.text(t + 0.5, b + 0.5, label, ha="center", va="center", fontsize=9)
        for start in starts:
            axes.plot([start, start], [b, b + 1], color="black", linewidth=3.5)
    axes.set(xlim=(-0.1, NUM_STEPS + 0.1), ylim=(BATCH_SIZE + 0.1, -0.1), xlabel="step")
    axes.set_xticks(np.arange(NUM_STEPS) + 0.5, [str(t) for t in range(NUM_STEPS)])
    axes.set_yticks(np.arange(BATCH_SIZE) + 0.5, rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Writes the drawings."""
    mpl.rcParams["svg.hashsalt"] = "jaxlstm"  # the same names in the file each time
    draw("lengths", ["length 12", "length 7", "length 0"], lengths=jnp.array([12, 7, 0]))
    draw("mask", [f"sequence {b}" for b in range(BATCH_SIZE)], mask=parse(MASK))
    draw("resets", [f"sequence {b}" for b in range(BATCH_SIZE)], resets=parse(RESETS))


if __name__ == "__main__":
    main()
