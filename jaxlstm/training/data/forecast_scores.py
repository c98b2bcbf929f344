"""Scores of quantile forecasts, and the forecasts that they are compared with: seasonal naive and AutoETS."""

import warnings
from typing import cast

import numpy as np

from jaxlstm.training.data.forecast_windows import WindowedPanel, Windows, part_boundaries

LONGEST_ETS_SEASON = 24  # exponential smoothing has one state per step of the season
MAX_ETS_FITS = 200  # series times targets


def pinball_loss(errors: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Returns the pinball loss of ``errors = truth - forecast``, quantiles along the last axis."""
    return np.maximum(quantiles * errors, (quantiles - 1) * errors)


def scores(
    forecasts: np.ndarray, truth: np.ndarray, scored: np.ndarray, unit: np.ndarray, quantiles: tuple[float, ...]
) -> dict[str, float]:
    """Returns MASE, weighted quantile loss and the coverage of each central interval.

    MASE is the mean absolute error of the median, each in units of the mean absolute change of its series over a season
    in the training part (Hyndman & Koehler 2006). The weighted quantile loss is twice the sum of the pinball loss,
    divided by the sum of absolute values, and averaged over quantiles and targets. Targets in gaps do not count.

    Args:
      forecasts: ``(H, B, F, Q)`` in the units of the series.
      truth: ``(H, B, F)``.
      scored: ``(H, B, F)`` bool: False in gaps.
      unit: the unit of MASE by window, ``(B, F)``.
      quantiles: Q probabilities with 0.5.

    Returns:
      ``mase``, ``wql``, and ``coverage_80`` for the quantiles 0.1 and 0.9.
    """
    levels = np.array(quantiles)
    errors = truth[..., None] - forecasts
    median = quantiles.index(0.5)
    losses = np.where(scored[..., None], pinball_loss(errors, levels), 0).sum((0, 1))  # (F, Q)
    sizes = np.where(scored, np.abs(truth), 0).sum((0, 1))[:, None]
    result = {
        "mase": float((np.abs(errors[..., median]) / unit)[scored].mean()),
        "wql": float((2 * losses / np.maximum(sizes, np.finfo(float).tiny)).mean()),
    }
    for low, high, percent in intervals(quantiles):
        covers = (errors[..., low] >= 0) & (errors[..., high] <= 0)
        result[f"coverage_{percent}"] = float(covers[scored].mean())
    return result


def intervals(quantiles: tuple[float, ...]) -> list[tuple[int, int, str]]:
    """Returns the indices of the quantiles p and 1 - p, and the percentage between them, widest interval first."""
    found = []
    for low, p in enumerate(quantiles):
        for high, q in enumerate(quantiles):
            if p < 0.5 and abs(p + q - 1) < 1e-9:
                found.append((low, high, f"{100 * (q - p):.6g}"))
    return found


def naive_quantiles(data: WindowedPanel, windows: Windows, quantiles: tuple[float, ...]) -> np.ndarray:
    """Returns the seasonal naive forecast with intervals, ``(H, B, F, Q)``.

    To every quantile but the median it adds the same quantile of the changes over as many seasons as the forecast goes
    ahead, in the training part of the series.
    """
    end, season = part_boundaries(data.panel)["training"][1], data.season
    result = np.repeat(windows.naive[..., None], len(quantiles), -1)
    others = [q for q, level in enumerate(quantiles) if level != 0.5]
    levels = [quantiles[q] for q in others]
    for n, one in enumerate(data.panel.series):
        values, known = one.values[: end - one.start], one.known[: end - one.start]
        members = np.flatnonzero(windows.series == n)
        if not members.size:
            continue
        most = (len(values) - 1) // season
        for h in range(0, data.horizon, season):
            lag = season * min(h // season + 1, most)
            for f in range(values.shape[1]):
                both = known[lag:, f] & known[:-lag, f]
                changes = (values[lag:, f] - values[:-lag, f])[both]
                if changes.size:
                    rows = slice(h, h + season)
                    for q, change in zip(others, np.quantile(changes, levels)):
                        result[rows, members, f, q] += change
    return result


def missing_autoets(data: WindowedPanel) -> str | None:
    """Returns the reason why AutoETS is not compared; None if it is."""
    try:
        import statsforecast as _  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "AutoETS is not compared: statsforecast is not installed (pip install 'jaxlstm[tasks]')"
    fits = len(data.panel.series) * len(data.panel.targets)
    if fits > MAX_ETS_FITS:
        return f"AutoETS is not compared: {fits:,} series to fit, more than {MAX_ETS_FITS}"
    return None


def autoets_quantiles(data: WindowedPanel, windows: Windows, quantiles: tuple[float, ...]) -> np.ndarray:
    """Returns the forecasts of statsforecast's AutoETS, ``(H, B, F, Q)``.

    It is fitted to each series before the test part, and continued with the whole history of each window without
    another fit. For seasons of more than `LONGEST_ETS_SEASON` steps the series is seasonally adjusted by MSTL first.
    Gaps hold the last number before them.
    """
    from statsforecast.models import MSTL, AutoETS  # pyright: ignore[reportMissingImports]

    end, season = part_boundaries(data.panel)["test"][0], data.season
    is_long = season > LONGEST_ETS_SEASON
    result = np.zeros((*windows.naive.shape, len(quantiles)))
    widths = [round(abs(100 * (2 * level - 1)), 6) for level in quantiles]
    levels = [int(width) if width == int(width) else width for width in widths]
    names = ["mean" if q == 0.5 else f"{'lo' if q < 0.5 else 'hi'}-{level}" for q, level in zip(quantiles, levels)]
    # Annotated as integers there; fractions such as 97.5 work as well.
    levels = cast(list[int], sorted({level for level in levels if level > 0}))
    for n, f in np.ndindex(len(data.panel.series), len(data.panel.targets)):
        members = np.flatnonzero(windows.series == n)
        if not members.size:
            continue
        start = data.starts[n]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about models that it tries and leaves
            model = MSTL(season, trend_forecaster=AutoETS(model="ZZN")) if is_long else AutoETS(season_length=season)
            model.fit(data.values[start:end, n, f])
            for b in members:
                history = data.values[start : windows.origins[b], n, f]
                forecast = model.forward(history, h=data.horizon, level=levels)
                for q, name in enumerate(names):
                    result[:, b, f, q] = forecast[name]
    return result
