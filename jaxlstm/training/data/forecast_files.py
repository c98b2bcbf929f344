"""The files of a forecast: a CSV file that continues the data, and figures with intervals."""

import csv
import io
from pathlib import Path

import numpy as np

from jaxlstm.atomic_write import atomic_write
from jaxlstm.diagnostics.plots import literal
from jaxlstm.training.data.csv_series import Panel
from jaxlstm.training.data.forecast_scores import intervals
from jaxlstm.training.data.forecast_windows import WindowedPanel, Windows
from jaxlstm.training.data.text import DataError

MAX_DRAWN = 8  # panels in a figure
TRUTH, MODEL, NAIVE = "#333333", "#b3341f", "#6f93bd"  # colors


def check_future(data: WindowedPanel, name: str) -> None:
    """Checks that the covariates of every step to forecast are in the file.

    Raises:
      DataError: names the first column and step without a number.
    """
    for n, one in enumerate(data.panel.series):
        missing = data.missing[one.end : one.end + data.horizon, n]
        if missing.any():
            step, column = np.argwhere(missing)[0]
            at = data.panel.times.spell(data.panel.axis.at(np.array([one.end + step])))[0]
            of_series = f"series {one.name!r}: " if one.name else ""
            raise DataError(
                f"{name}: {of_series}--future {data.panel.future[column]} has no number at {at}; expected rows for the "
                f"{data.horizon} steps after the last number to forecast"
            )


def write_forecasts(
    path: Path,
    data: WindowedPanel,
    windows: Windows,
    forecasts: np.ndarray,
    quantiles: tuple[float, ...],
    *,
    series: str | None,
) -> None:
    """Writes forecasts as a CSV file: the time as in the data, the series if there are several, target and quantile.

    Args:
      path: path of the file.
      data: the data.
      windows: one window for each of B forecasts.
      forecasts: ``(H, B, F, Q)``.
      quantiles: Q probabilities.
      series: column of the series; None if there is one.
    """
    panel = data.panel
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{target}_{level:g}" for target in panel.targets for level in quantiles]
    writer.writerow([panel.time, *([] if series is None else [series]), *columns])
    steps = windows.origins + np.arange(data.horizon)[:, None]  # (H, B)
    times = panel.times.spell(panel.axis.at(steps.T.reshape(-1)))
    for b, n in enumerate(windows.series):
        for h in range(data.horizon):
            names = [] if series is None else [panel.series[n].name]
            numbers = [f"{value:.10g}" for value in forecasts[h, b].reshape(-1)]
            writer.writerow([times[b * data.horizon + h], *names, *numbers])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def drawn_panels(panel: Panel, series: np.ndarray) -> list[tuple[int, int]]:
    """Returns the series, of those with these indices, and targets in a figure: the first `MAX_DRAWN`."""
    return [(n, f) for n in np.unique(series).tolist() for f in range(len(panel.targets))][:MAX_DRAWN]


def draw_forecasts(
    path: Path,
    data: WindowedPanel,
    windows: Windows,
    forecasts: np.ndarray,
    quantiles: tuple[float, ...],
    title: str,
    *,
    history: int,
    naive: bool = False,
) -> None:
    """Draws forecasts with their intervals, and the numbers of the data, as a PNG; one panel per target with windows.

    Args:
      path: path of the figure.
      data: the data.
      windows: one window for each of B forecasts.
      forecasts: ``(H, B, F, Q)``.
      quantiles: Q probabilities with 0.5.
      title: title of the figure.
      history: steps to draw before the first forecast of a series.
      naive: whether to draw the seasonal naive forecast too.
    """
    from matplotlib.figure import Figure

    panel, median = data.panel, quantiles.index(0.5)
    drawn = drawn_panels(panel, windows.series)
    count = len(np.unique(windows.series)) * len(panel.targets)
    if len(drawn) < count:
        title += f", the first {len(drawn)} of {count:,} columns"
    figure = Figure(figsize=(9, 1.0 + 1.8 * len(drawn)), layout="constrained")
    for (n, f), axes in zip(drawn, np.ravel(figure.subplots(len(drawn), 1, squeeze=False))):
        members = np.flatnonzero(windows.series == n)
        first = int(windows.origins[members].min()) - history
        last = int(windows.origins[members].max()) + data.horizon
        steps = np.arange(max(first, int(data.starts[n])), min(last, int(data.ends[n])))
        known = data.known[steps, n, f]
        axes.plot(steps, np.where(known, data.values[steps, n, f], np.nan), color=TRUTH, linewidth=1.1, label="data")
        for number, b in enumerate(members):
            ahead = windows.origins[b] + np.arange(data.horizon)

            def label(text: str, number: int = number) -> str | None:
                return text if number == 0 else None

            if naive:
                axes.plot(ahead, windows.naive[:, b, f], color=NAIVE, linewidth=1, label=label("a season ago"))
            for low, high, percent in intervals(quantiles):
                edges = forecasts[:, b, f, low], forecasts[:, b, f, high]
                axes.fill_between(ahead, *edges, color=MODEL, alpha=0.22, linewidth=0, label=label(f"{percent} %"))
            axes.plot(ahead, forecasts[:, b, f, median], color=MODEL, linewidth=1.3, label=label("LSTM, median"))
        ticks = np.linspace(steps[0], last - 1, 5).astype(int)
        axes.set(xticks=ticks, xticklabels=[literal(text) for text in panel.axis.label(panel.axis.at(ticks))])
        name = panel.series[n].name
        axes.set_ylabel(literal(f"{name}\n{panel.targets[f]}" if name else panel.targets[f]))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=len(labels))
    figure.suptitle(literal(title))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
