"""Time series forecasting: predict the next steps from a window, compared with the seasonal naive forecast.

Inputs and targets are differences from the last value of the window, in units of the mean change over a season. The
first 70 % of the series are for training, the next 15 % for validation, the last 15 % for the test. Gaps hold the last
number before them, further inputs mark them, and they are never scored.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.diagnostics.plots import literal
from jaxlstm.errors import optional_package
from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data.csv_series import Series, name_list, read_series
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import DataError, fingerprint
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.sequence_regressor import SequenceRegressor, SequenceRegressorParams
from jaxlstm.training.tasks.task import Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "data": "co2",
    "hidden": 64,
    "dropout": 0.1,
    "window": 104,
    "batch": 32,
    "learning_rate": 3e-3,
    "max_steps": 1500,
    "valid_every": 100,
}
UNUSED = unused_options("data", "window", "forecasting")
MAX_DRAWN = 8  # columns in the figure


class Windows(NamedTuple):
    """Windows of a series and the steps that follow them."""

    inputs: np.ndarray  # (T, B, F)
    filled: np.ndarray  # (T, B, F) bool: inputs in gaps
    targets: np.ndarray  # (horizon, B, F)
    scored: np.ndarray  # (horizon, B, F) bool: False for targets in gaps


@dataclass(frozen=True)
class WindowedSeries:
    """A series, split into parts for training, validation and test, and cut into windows.

    Args:
      name: name of the series in error messages.
      series: the series.
      window: steps of the inputs, T.
      horizon: steps to forecast.
      season: steps of a season.

    Raises:
      DataError: if the series is too short, a part has nothing to score, or the mean change of a column over a season
        in the training part is zero or not finite.
    """

    name: str
    series: Series
    window: int
    horizon: int
    season: int

    def __post_init__(self) -> None:
        if self.window < self.season:
            raise DataError(
                f"--window {self.window} is shorter than --season {self.season}; a window must hold a season"
            )
        train_end, valid_end, steps = self.boundaries[1:]
        if train_end < self.span or valid_end - train_end < self.horizon:
            raise DataError(
                f"{self.name}: {steps:,} steps are too few for --window {self.window} and --horizon {self.horizon}: "
                "70 % of them must hold a window and its forecast, and 15 % a forecast"
            )
        for name, begin, end in zip(("training", "validation", "test"), self.boundaries, self.boundaries[1:]):
            first = max(begin, self.window)  # the first window has no targets
            if not self.series.known[first:end].any():
                raise DataError(
                    f"{self.name}: the {name} part has nothing to score: its targets, steps {first:,} to {end:,}, are "
                    "one gap; --target chooses columns"
                )
        for name, scale in zip(self.series.names, self.scale):
            if not 0 < scale < np.inf:
                raise DataError(
                    f"{self.name}: the mean change of {name} over a season in the training part is {scale:g}, expected "
                    "a positive number; --target chooses columns"
                )

    @property
    def span(self) -> int:
        """Number of steps of a window and its targets."""
        return self.window + self.horizon

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """First step of the training, validation and test part, and the number of steps."""
        steps = len(self.series.values)
        return 0, int(0.7 * steps), int(0.85 * steps), steps

    @property
    def scale(self) -> np.ndarray:
        """Mean absolute change over a season in the training part, without gaps, ``(F,)``; 0 if all is gaps."""
        end, season = self.boundaries[1], self.season
        train, known = self.series.values[:end], self.series.known[:end]
        both = known[season:] & known[:-season]
        with np.errstate(over="ignore"):  # the infinite scale is an error
            changes = np.abs(train[season:] - train[:-season])
            return np.where(both, changes, 0).sum(0) / np.maximum(both.sum(0), 1)

    def windows(self, starts: np.ndarray) -> Windows:
        """Returns the windows that begin at the given steps, ``(B,)``, in the units of the series."""
        steps = starts + np.arange(self.span)[:, None]
        values, known, n = self.series.values[steps], self.series.known[steps], self.window
        return Windows(values[:n], ~known[:n], values[n:], known[n:])

    def part(self, n: int) -> Windows:
        """Returns all windows whose targets are in the n-th part of the series."""
        begin, end = self.boundaries[n : n + 2]
        return self.windows(np.arange(begin - self.window, end - self.span + 1))

    def naive_forecast(self, windows: Windows) -> np.ndarray:
        """Returns the seasonal naive forecast, which repeats the last season: ``(horizon, B, F)``."""
        return windows.inputs[np.arange(self.horizon) % self.season - self.season]


def normalize(windows: Windows, scale: np.ndarray) -> Windows:
    """Returns differences from the last value of each window, divided by ``scale``, in float32."""
    last = windows.inputs[-1]
    inputs, targets = (((values - last) / scale).astype(np.float32) for values in (windows.inputs, windows.targets))
    return windows._replace(inputs=inputs, targets=targets)


@dataclass(frozen=True)
class Forecaster:
    """A model that forecasts all steps of the horizon at once from the last output of the LSTM."""

    regressor: SequenceRegressor
    horizon: int

    def with_lstm(self, lstm: RNN) -> "Forecaster":
        """Returns the model with an LSTM of the same parameters."""
        return replace(self, regressor=replace(self.regressor, lstm=lstm))

    def __call__(self, params: SequenceRegressorParams, windows: Windows, *, key: Array | None = None) -> Array:
        """Returns normalized forecasts ``(horizon, B, F)`` of normalized windows."""
        flat = self.regressor(params, self.lstm_inputs(windows), key=key)  # (B, horizon * F)
        return jnp.moveaxis(flat.reshape(*flat.shape[:-1], self.horizon, windows.inputs.shape[-1]), -2, 0)

    def lstm_inputs(self, windows: Windows) -> Array:
        """Returns the inputs and a 1 for each of them that is filled, ``(T, B, 2F)``."""
        return jnp.concatenate([jnp.asarray(windows.inputs), jnp.asarray(windows.filled, jnp.float32)], -1)


def make(options: Options) -> Task:
    """Returns the task on the series of ``--data``."""
    path = co2_path() if options.data == "co2" else Path(options.data)
    series = read_series(
        path,
        time=options.time,
        target=options.target,
        delimiter=options.delimiter,
        decimal=options.decimal,
        date_format=options.date_format,
    )
    data = WindowedSeries(str(path), series, options.window, options.horizon, options.season)
    num_features, scale = series.values.shape[1], data.scale
    lstm = build_lstm(options, 2 * num_features)
    model = Forecaster(SequenceRegressor(lstm, options.horizon * num_features, options.dropout), options.horizon)
    predict = jax.jit(model)
    num_train = data.boundaries[1] - data.span + 1
    batch_starts = shuffled_batches(num_train, options.batch, options.seed)

    def batches(start: int) -> Iterator[Windows]:
        for number in itertools.count(start):
            yield normalize(data.windows(batch_starts(number)), scale)

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: Windows, key: Array) -> tuple[Array, tuple[Array, None]]:
            scored = jnp.asarray(batch.scored)
            forecasts = model.with_lstm(lstm)(params, batch, key=key)
            errors = jnp.where(scored, (forecasts - batch.targets) ** 2, 0)
            value = errors.sum() / jnp.maximum(scored.sum(), 1).astype(errors.dtype)
            return value, (value, carry)

        return loss

    def forecast(params: Any, windows: Windows) -> np.ndarray:
        """Returns forecasts in the units of the series, ``(horizon, B, F)``."""
        return np.asarray(predict(params, normalize(windows, scale))) * scale + windows.inputs[-1]

    def mean_errors(params: Any, windows: Windows) -> dict[str, float]:
        """Returns mean squared and absolute errors of scored targets, in units of the mean change over a season."""

        def errors(forecasts: np.ndarray) -> np.ndarray:
            return ((forecasts - windows.targets) / scale)[windows.scored]

        model_errors, naive_errors = errors(forecast(params, windows)), errors(data.naive_forecast(windows))
        return {
            "loss": float((model_errors**2).mean()),
            "error": float(np.abs(model_errors).mean()),
            "seasonal_naive_error": float(np.abs(naive_errors).mean()),
        }

    def test(params: Any, folder: Path) -> dict[str, float]:
        del folder
        errors = mean_errors(params, data.part(2))
        return {f"test_{name}": errors[name] for name in ("error", "seasonal_naive_error")}

    def draw(params: Any, folder: Path) -> None:
        starts = np.arange(data.boundaries[2] - data.window, data.boundaries[3] - data.span + 1, data.horizon)
        windows = data.windows(starts)
        lines = {
            "truth": np.where(windows.scored, windows.targets, np.nan),
            "LSTM": forecast(params, windows),
            "a season ago": data.naive_forecast(windows),
        }
        steps = (starts[:, None] + data.window + np.arange(data.horizon)).ravel()
        dates = [series.dates[step] for step in steps]
        title = f"{path.stem}: {data.horizon} steps ahead"
        draw_forecasts(folder / "forecast.png", lines, dates, series.names, title)

    return Task(
        description=f"{len(series.values):,} steps of {name_list(series.names)}; {data.horizon} ahead from "
        f"{data.window}",
        title=f"{path.stem}, {data.horizon} steps ahead: LSTM",
        loss_unit="squared error",
        unit_name="windows",
        units_per_step=options.batch,
        validation_units=data.part(1).inputs.shape[1],
        format_loss=lambda value: f"{value:.5f} squared error",
        init=model.regressor.init,
        batches=batches,
        make_loss=make_loss,
        lstm=lstm,
        lstm_inputs=lambda params, carry, batch: (model.lstm_inputs(batch), None),
        evaluate=lambda params: mean_errors(params, data.part(1)),
        test=test,
        draw=draw,
        notes=series.notes,
        fingerprint=fingerprint(series.values, series.known, "\n".join((*series.names, *series.dates))),
    )


def draw_forecasts(
    path: Path, lines: dict[str, np.ndarray], dates: list[str], names: tuple[str, ...], title: str
) -> None:
    """Draws consecutive forecasts of the first `MAX_DRAWN` columns against the true values, as a PNG.

    Args:
      path: path of the figure.
      lines: values by label, ``(horizon, B, F)`` each; forecast b begins where forecast b - 1 ends.
      dates: labels of the ``B * horizon`` steps.
      names: names of the F columns.
      title: title of the figure.
    """
    from matplotlib.figure import Figure

    drawn = names[:MAX_DRAWN]
    if len(drawn) < len(names):
        title += f", the first {len(drawn)} of {len(names):,} columns"
    figure = Figure(figsize=(9, 2.8 * len(drawn)), layout="constrained")
    ticks = np.linspace(0, len(dates) - 1, 5).astype(int)
    for f, axes in enumerate(np.ravel(figure.subplots(len(drawn), 1, squeeze=False))):
        for (label, values), color in zip(lines.items(), ("#333333", "#b3341f", "#9ab8d6")):
            axes.plot(values[..., f].T.reshape(-1), label=label, color=color, linewidth=1.2)
        axes.set(xticks=ticks, xticklabels=[literal(dates[tick]) for tick in ticks])
        axes.set_ylabel(literal(drawn[f]))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(literal(title))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def co2_path() -> Path:
    """Returns the path of the weekly CO2 series of Mauna Loa, 1958 to 2001, that ships with statsmodels.

    Raises:
      ImportError: if statsmodels is not installed.
    """
    with optional_package("statsmodels", extra="tasks", purpose="--data co2"):
        from statsmodels.datasets import co2
    return Path(co2.__file__).parent / "co2.csv"
