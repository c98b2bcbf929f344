"""Draws the results of `jaxlstm.training.vanishing_gradient`."""

from collections.abc import Mapping
from itertools import cycle

from matplotlib.figure import Figure

from jaxlstm.diagnostics.plots import LINES, draw_norms, literal
from jaxlstm.training.data.synthetic import ADDING_BASELINE
from jaxlstm.training.vanishing_gradient import TrainingResult


def draw_vanishing(results: Mapping[str, TrainingResult], *, title: str = "") -> Figure:
    """Draws gradient norms through time before and after training, and learning curves.

    Args:
      results: results by the name of the network.
      title: title of the figure.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    before, after, learning = figure.subplots(1, 3)
    after.sharey(before)
    for axes, when in ((before, "before"), (after, "after")):
        norms, elementwise = (
            {name: getattr(result, f"{kind}_norms_{when}") for name, result in results.items()}
            for kind in ("gradient", "elementwise")
        )
        draw_norms(axes, norms, parts=elementwise, title=f"{when} training (thin: along c alone)")
    after.set_ylabel("")
    for (color, style), (name, result) in zip(cycle(LINES), results.items()):
        marker = "." if len(result.updates) == 1 else ""
        learning.semilogy(result.updates, result.errors, style, color=color, marker=marker, label=literal(name))
    learning.axhline(ADDING_BASELINE, color="0.4", linewidth=0.8)
    right, below = learning.get_xlim()[1], ADDING_BASELINE * 0.85
    learning.text(right, below, "always answering 1 ", ha="right", va="top", fontsize=8)
    learning.set(xlabel="updates", ylabel="mean squared error", title="learning")
    learning.legend(fontsize=8)
    for axes in (before, after, learning):
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(literal(title))
    return figure
