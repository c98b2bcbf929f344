"""Cuts the series of a file into training, validation and test, scales them, and draws windows from them."""

from typing import NamedTuple

import numpy as np

from jaxlstm.training.data.calendar_features import calendar_features, useful_periods
from jaxlstm.training.data.csv_series import Panel, Series, name_list, read_numbers
from jaxlstm.training.data.text import DataError
from jaxlstm.training.models.forecaster import Batch

PARTS = {"training": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}  # fractions of the time


class Scaling(NamedTuple):
    """What a run needs to know of its training data to forecast other data: an entry of ``config.json``."""

    targets: list[str]  # (F,) columns to forecast
    time: str  # column of times
    step: str  # step of the time axis, such as "1 day"
    periods: list[str]  # see `calendar_features`
    scales: dict[str, list[float]]  # by series, (F,): see `scale_of`; of the training part
    future: dict[str, list[float]]  # mean and standard deviation of each covariate in the training part
    static_numbers: dict[str, list[float]]  # mean and standard deviation over the series
    static_texts: dict[str, list[str]]  # the texts of each other column of --static


class Windows(NamedTuple):
    """A batch of windows, with centers and scales that convert forecasts to the units of the series."""

    batch: Batch
    series: np.ndarray  # (B,) int: index of the series
    origins: np.ndarray  # (B,) int: step of the axis that is the first to forecast
    center: np.ndarray  # (B, F) float64: mean of the last season of the history
    scale: np.ndarray  # (B, F) float64
    truth: np.ndarray  # (H, B, F) float64
    naive: np.ndarray  # (H, B, F) float64: the last season of the history, repeated

    def denormalize(self, quantiles: np.ndarray) -> np.ndarray:
        """Returns normalized quantiles ``(H, B, F, Q)`` in the units of the series, float64."""
        return quantiles.astype(np.float64) * self.scale[..., None] + self.center[..., None]


def scale_of(values: np.ndarray, known: np.ndarray, season: int) -> np.ndarray:
    """Returns the mean distance of the known values from the mean of the season before them, ``(F,)``; 0 without any.

    Args:
      values: ``(T, F)``, gaps filled.
      known: ``(T, F)`` bool.
      season: steps of a season.
    """
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, 0)])
    means = (sums[season:-1] - sums[: -season - 1]) / season
    distances = np.where(known[season:], np.abs(values[season:] - means), 0)
    return distances.sum(0) / np.maximum(known[season:].sum(0), 1)


def seasonal_error(values: np.ndarray, known: np.ndarray, season: int) -> np.ndarray:
    """Returns the mean absolute change over a season without gaps, ``(F,)``: the unit of MASE; 0 without any."""
    both = known[season:] & known[:-season]
    changes = np.abs(values[season:] - values[:-season])
    return np.where(both, changes, 0).sum(0) / np.maximum(both.sum(0), 1)


def part_boundaries(panel: Panel) -> dict[str, tuple[int, int]]:
    """Returns the first step of each part and the one after its last; all series are cut at the same times."""
    begin = min(one.start for one in panel.series)
    steps = max(one.end for one in panel.series) - begin
    return {name: (begin + int(first * steps), begin + int(end * steps)) for name, (first, end) in PARTS.items()}


def fit_scaling(
    name: str, panel: Panel, window: int, horizon: int, season: int, decimal: str
) -> tuple[Panel, Scaling, list[str]]:
    """Returns the series that can be trained on, the scaling of their training part, and notes.

    Args:
      name: name of the data in error messages.
      panel: the series.
      window: steps of a history.
      horizon: steps to forecast.
      season: steps of a season.
      decimal: decimal separator of static numbers.

    Raises:
      DataError: if the only series, or every one of several, is too short, does not change over a season in the
        training part, or has nothing to score in a part.
    """
    if window < season:
        raise DataError(f"--window {window} is shorter than --season {season}; a window must hold a season")
    boundaries = part_boundaries(panel)
    train_end, first = boundaries["training"][1], boundaries["training"][0]
    steps = boundaries["test"][1] - first
    if train_end - first < season + horizon or any(end - begin < horizon for begin, end in boundaries.values()):
        raise DataError(
            f"{name}: {steps:,} steps are too few for --season {season} and --horizon {horizon}: 70 % of them must "
            "hold a season and a forecast, and 15 % a forecast"
        )
    scales: dict[str, list[float]] = {}
    kept: list[Series] = []
    reasons: list[str] = []
    for one in panel.series:
        label = name if len(panel.series) == 1 else f"{name}: {one.name}"
        end = max(train_end - one.start, 0)
        if end < season + horizon:
            reasons.append(f"{label}: {end:,} steps in the training part do not hold a season and a forecast")
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite is an error
            scale = scale_of(one.values[:end], one.known[:end], season)
            change = seasonal_error(one.values[:end], one.known[:end], season)
        for target, value, other in zip(panel.targets, change, scale):
            if not (0 < value < np.inf and 0 < other < np.inf):
                reasons.append(
                    f"{label}: the mean change of {target} over a season in the training part is {value:g}, expected a "
                    "positive number; --target chooses columns"
                )
                break
        else:
            kept.append(one)
            scales[one.name] = scale.tolist()
    if not kept:
        raise DataError(reasons[0])
    if reasons:  # the parts are of the time of the other series
        note = f"leaves out {len(reasons):,} of {len(panel.series):,} series: {reasons[0]}"
        others = panel._replace(series=tuple(kept))
        panel, scaling, notes = fit_scaling(name, others, window, horizon, season, decimal)
        return panel, scaling, [note, *notes]
    for part, (begin, end) in boundaries.items():
        if not any(one.known[max(begin - one.start, season) : max(end - one.start, 0)].any() for one in kept):
            raise DataError(
                f"{name}: the {part} part has nothing to score: its targets, steps {begin:,} to {end:,}, are one gap; "
                "--target chooses columns"
            )
    numbers, texts = _fit_static(panel, decimal)
    clock = panel.times.to_clock(panel.axis.at(np.arange(first, train_end)))
    scaling = Scaling(
        targets=list(panel.targets),
        time=panel.time,
        step=panel.axis.step,
        periods=useful_periods(clock),
        scales=scales,
        future=_fit_future(name, panel, train_end),
        static_numbers=numbers,
        static_texts=texts,
    )
    return panel, scaling, []


def _moments(values: np.ndarray) -> list[float]:
    """Returns mean and standard deviation, 1 for a constant."""
    deviation = float(values.std())
    return [float(values.mean()), deviation if deviation > 0 else 1.0]


def _fit_future(name: str, panel: Panel, train_end: int) -> dict[str, list[float]]:
    """Returns mean and standard deviation of each covariate in the training part."""
    result = {}
    for k, column in enumerate(panel.future):
        values = np.concatenate([one.future[: train_end - one.start, k] for one in panel.series])
        values = values[np.isfinite(values)]
        if not values.size:
            raise DataError(f"{name}: --future {column} has no number in the training part")
        result[column] = _moments(values)
    return result


def _fit_static(panel: Panel, decimal: str) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Returns the moments of static columns of numbers, and the texts of the others."""
    numbers, texts = {}, {}
    for s, column in enumerate(panel.static):
        cells = [one.static[s] for one in panel.series]
        values = read_numbers(cells, decimal)
        if np.isfinite(values).all():
            numbers[column] = _moments(values)
        else:
            texts[column] = sorted(set(cells))
    return numbers, texts


def static_features(one: Series, columns: tuple[str, ...], scaling: Scaling, decimal: str) -> list[float]:
    """Returns the features of a series: a normalized number, or one feature for each text of the training data.

    Raises:
      DataError: for a text that the training data do not have, or one in a column of numbers.
    """
    features: list[float] = []
    for cell, column in zip(one.static, columns):
        if column in scaling.static_numbers:
            mean, deviation = scaling.static_numbers[column]
            value = float(read_numbers([cell], decimal)[0])
            if not np.isfinite(value):
                raise DataError(f"series {one.name!r}: --static {column} is {cell!r}, expected a number")
            features.append((value - mean) / deviation)
        else:
            texts = scaling.static_texts[column]
            if cell not in texts:
                raise DataError(
                    f"series {one.name!r}: --static {column} is {cell!r}, expected one of the training data: "
                    f"{name_list(texts)}"
                )
            features += [float(cell == text) for text in texts]
    return features


class WindowedPanel:
    """The series of a file on one grid of steps, from which windows are drawn.

    Args:
      panel: N series.
      scaling: of the training data. Series without a scale there get one from all of their values.
      window: steps of a history, T. The steps before the first of a series are masked.
      horizon: steps to forecast, H.
      season: steps of a season.
      decimal: decimal separator of static numbers.

    Raises:
      DataError: for a series shorter than a season, or one without a scale that has no more than a season or does not
        change.
    """

    def __init__(
        self, panel: Panel, scaling: Scaling, *, window: int, horizon: int, season: int, decimal: str = "."
    ) -> None:
        self.panel, self.scaling = panel, scaling
        self.window, self.horizon, self.season = window, horizon, season
        steps = len(panel.axis.labels) + horizon
        self.values = np.zeros((steps, len(panel.series), len(panel.targets)))
        self.known = np.zeros(self.values.shape, bool)
        covariates = np.full((steps, len(panel.series), len(panel.future)), np.nan)
        for n, one in enumerate(panel.series):
            self.values[one.start : one.end, n], self.known[one.start : one.end, n] = one.values, one.known
            covariates[one.start : one.start + len(one.future), n] = one.future
        self.missing = np.isnan(covariates)
        moments = np.array([scaling.future[name] for name in panel.future]).reshape(-1, 2)
        covariates = np.where(self.missing, 0, (covariates - moments[:, 0]) / moments[:, 1])
        self.covariates = np.concatenate([covariates, self.missing], -1).astype(np.float32)
        clock = panel.times.to_clock(panel.axis.at(np.arange(steps)))
        self.calendar = calendar_features(clock, scaling.periods)
        self.starts, self.ends = np.array([(one.start, one.end) for one in panel.series]).T
        self.scales = np.array([self._scale(one) for one in panel.series])
        static = [static_features(one, panel.static, scaling, decimal) for one in panel.series]
        self.static = np.array(static, np.float32)

    def _scale(self, one: Series) -> list[float]:
        """Returns the scale of a series in the training data, or of its own values."""
        is_known = one.name in self.scaling.scales
        if len(one.values) < self.season + (not is_known):
            raise DataError(
                f"series {one.name!r}: {len(one.values):,} steps are too few, expected "
                f"{'at least' if is_known else 'more than'} --season {self.season}"
            )
        if is_known:
            return self.scaling.scales[one.name]
        scale = scale_of(one.values, one.known, self.season)
        for target, value in zip(self.panel.targets, scale):
            if not 0 < value < np.inf:
                raise DataError(f"series {one.name!r}: {target} does not change; a constant has no scale")
        return scale.tolist()

    @property
    def num_features(self) -> int:
        """C, the number of covariates, marks of their gaps, and features of the calendar."""
        return self.covariates.shape[-1] + self.calendar.shape[-1]

    def windows_of(self, part: str, per_series: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns series and origins of the windows whose targets are in a part, ``(B,)`` each.

        Args:
          part: ``"training"``, ``"validation"`` or ``"test"``.
          per_series: largest number of windows of a series, evenly spaced in time; None for all.
        """
        begin, end = part_boundaries(self.panel)[part]
        series, origins = [], []
        for n, (first, last) in enumerate(zip(self.starts, self.ends)):
            of_series = np.arange(max(begin, first + self.season), min(end, last) - self.horizon + 1)
            if per_series is not None and len(of_series) > per_series:
                of_series = of_series[np.linspace(0, len(of_series) - 1, per_series).round().astype(int)]
            series.append(np.full(len(of_series), n))
            origins.append(of_series)
        return np.concatenate(series), np.concatenate(origins)

    def windows(self, series: np.ndarray, origins: np.ndarray) -> Windows:
        """Returns windows of the given series, ``(B,)``, with forecasts that begin at the given steps, ``(B,)``."""
        steps = origins + np.arange(-self.window, self.horizon)[:, None]  # (T + H, B)
        exists = steps >= self.starts[series]
        steps, n = np.maximum(steps, 0), self.window
        values, known = self.values[steps, series], self.known[steps, series]  # (T + H, B, F)
        calendar = np.broadcast_to(self.calendar[steps], (*steps.shape, self.calendar.shape[-1]))
        features = np.concatenate([self.covariates[steps, series], calendar], -1)
        features = np.where(exists[..., None], features, 0)
        center, scale = values[n - self.season : n].mean(0), self.scales[series]
        naive = values[n + np.arange(self.horizon) % self.season - self.season]

        def normalize(array: np.ndarray) -> np.ndarray:
            return ((array - center) / scale).astype(np.float32)

        batch = Batch(
            values=np.where(exists[:n, :, None], normalize(values[:n]), 0),
            filled=exists[:n, :, None] & ~known[:n],
            exists=exists[:n],
            past=features[:n],
            future=features[n:],
            season_ago=normalize(naive),
            targets=np.where(known[n:], normalize(values[n:]), 0),
            scored=known[n:],
            static=self.static[series][None],
        )
        return Windows(batch, series, origins, center, scale, values[n:], naive)
