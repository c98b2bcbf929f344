"""Time series forecasting: predict the next steps from a window, compared with the seasonal naive forecast.

Inputs and targets are differences from the last value of the window, in units of the mean change over a season. The
first 70 % of the series are for training, the next 15 % for validation, the last 15 % for the test.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import optional_package
from jaxlstm.training.config import Options
from jaxlstm.training.data.csv_series import Series, read_series
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import DataError, fingerprint
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.sequence_regressor import SequenceRegressor, SequenceRegressorParams
from jaxlstm.training.tasks.task import Task, unused_options

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


class Windows(NamedTuple):
    """Windows of a series and the steps that follow them."""

    inputs: np.ndarray  # (T, B, F)
    targets: np.ndarray  # (horizon, B, F)


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
      DataError: if the series is too short, or a column does not change from season to season.
    """

    name: str
    series: Series
    window: int
    horizon: int
    season: int

    def __post_init__(self) -> None:
        train_end, valid_end = self.boundaries[1:3]
        if train_end < self.span or valid_end - train_end < self.horizon or self.window < self.season:
            raise DataError(
                f"{len(self.series.values):,} steps are too few for windows of {self.window} and a horizon of "
                f"{self.horizon}, or the window is shorter than a season, {self.season}"
            )
        scale = self.scale
        if not scale.all():
            raise DataError(
                f"{self.name}: {self.series.names[int(np.argmin(scale))]} does not change from season to season"
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
        """Mean absolute change over a season in the training part, ``(F,)``."""
        train = self.series.values[: self.boundaries[1]]
        return np.abs(train[self.season :] - train[: -self.season]).mean(0)

    def windows(self, starts: np.ndarray) -> Windows:
        """Returns the windows that begin at the given steps, ``(B,)``, in the units of the series."""
        values = self.series.values[starts + np.arange(self.span)[:, None]].astype(np.float64)
        return Windows(values[: self.window], values[self.window :])

    def part(self, n: int) -> Windows:
        """Returns all windows whose targets are in the n-th part of the series."""
        begin, end = self.boundaries[n : n + 2]
        return self.windows(np.arange(begin - self.window, end - self.span + 1))

    def naive_forecast(self, windows: Windows) -> np.ndarray:
        """Returns the seasonal naive forecast, which repeats the last season: ``(horizon, B, F)``."""
        return windows.inputs[np.arange(self.horizon) % self.season - self.season]


def normalize(windows: Windows, scale: np.ndarray) -> Windows:
    """Returns differences from the last value of each window, divided by ``scale``."""
    last = windows.inputs[-1]
    return Windows((windows.inputs - last) / scale, (windows.targets - last) / scale)


@dataclass(frozen=True)
class Forecaster:
    """A model that forecasts all steps of the horizon at once from the last output of the LSTM."""

    regressor: SequenceRegressor
    horizon: int

    def __call__(self, params: SequenceRegressorParams, xs: Any, *, key: Array | None = None) -> Array:
        """Returns normalized forecasts ``(horizon, B, F)`` of normalized inputs ``(T, B, F)``."""
        flat = self.regressor(params, xs, key=key)  # (B, horizon * F)
        return jnp.moveaxis(flat.reshape(*flat.shape[:-1], self.horizon, xs.shape[-1]), -2, 0)


def make(options: Options) -> Task:
    """Returns the task on the series of ``--data``."""
    path = co2_path() if options.data == "co2" else Path(options.data)
    series = read_series(path)
    data = WindowedSeries(str(path), series, options.window, options.horizon, options.season)
    num_features, scale = series.values.shape[1], data.scale
    lstm = build_lstm(options, num_features)
    model = Forecaster(SequenceRegressor(lstm, options.horizon * num_features, options.dropout), options.horizon)
    predict = jax.jit(model)
    num_train = data.boundaries[1] - data.span + 1
    batch_starts = shuffled_batches(num_train, options.batch, options.seed)

    def batches(start: int) -> Iterator[Windows]:
        for number in itertools.count(start):
            inputs, targets = normalize(data.windows(batch_starts(number)), scale)
            yield Windows(inputs.astype(np.float32), targets.astype(np.float32))

    def loss(params: Any, carry: None, batch: Windows, key: Array) -> tuple[Array, tuple[Array, None]]:
        value = jnp.mean((model(params, batch.inputs, key=key) - batch.targets) ** 2)
        return value, (value, carry)

    def forecast(params: Any, windows: Windows) -> np.ndarray:
        """Returns forecasts in the units of the series, ``(horizon, B, F)``."""
        inputs = normalize(windows, scale).inputs.astype(np.float32)
        return np.asarray(predict(params, inputs)) * scale + windows.inputs[-1]

    def absolute_errors(params: Any, windows: Windows) -> dict[str, float]:
        """Returns mean absolute errors in units of the mean change over a season."""
        forecasts = {"error": forecast(params, windows), "seasonal_naive_error": data.naive_forecast(windows)}
        return {name: float((np.abs(y - windows.targets) / scale).mean()) for name, y in forecasts.items()}

    def evaluate(params: Any) -> dict[str, float]:
        windows = data.part(1)
        error = (forecast(params, windows) - windows.targets) / scale
        return {"loss": float((error**2).mean()), **absolute_errors(params, windows)}

    def draw(params: Any, folder: Path) -> None:
        starts = np.arange(data.boundaries[2] - data.window, data.boundaries[3] - data.span + 1, data.horizon)
        windows = data.windows(starts)
        lines = {
            "truth": windows.targets,
            "LSTM": forecast(params, windows),
            "a season ago": data.naive_forecast(windows),
        }
        steps = (starts[:, None] + data.window + np.arange(data.horizon)).ravel()
        dates = [series.dates[step] for step in steps]
        title = f"{path.stem}: {data.horizon} steps ahead"
        draw_forecasts(folder / "forecast.png", lines, dates, series.names, title)

    return Task(
        description=f"{path.stem}: {len(series.values):,} steps of {', '.join(series.names)}; {data.horizon} ahead "
        f"from {data.window}",
        title=f"{path.stem}, {data.horizon} steps ahead: LSTM",
        loss_unit="squared error",
        unit_name="windows",
        units_per_step=options.batch,
        validation_units=data.part(1).inputs.shape[1],
        format_loss=lambda value: f"{value:.5f} squared error",
        init=model.regressor.init,
        batches=batches,
        loss=loss,
        lstm=lstm,
        lstm_inputs=lambda params, carry, batch: (batch.inputs, None),
        evaluate=evaluate,
        test=lambda params: {f"test_{name}": error for name, error in absolute_errors(params, data.part(2)).items()},
        draw=draw,
        fingerprint=fingerprint(series.values, "\n".join(series.dates)),
    )


def draw_forecasts(
    path: Path, lines: dict[str, np.ndarray], dates: list[str], names: tuple[str, ...], title: str
) -> None:
    """Draws consecutive forecasts of every column against the true values, as a PNG.

    Args:
      path: path of the figure.
      lines: values by label, ``(horizon, B, F)`` each; forecast b begins where forecast b - 1 ends.
      dates: labels of the ``B * horizon`` steps.
      names: names of the F columns.
      title: title of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8 * len(names)), layout="constrained")
    ticks = np.linspace(0, len(dates) - 1, 5).astype(int)
    for f, axes in enumerate(np.ravel(figure.subplots(len(names), 1, squeeze=False))):
        for (label, values), color in zip(lines.items(), ("#333333", "#b3341f", "#9ab8d6")):
            axes.plot(values[..., f].T.reshape(-1), label=label, color=color, linewidth=1.2)
        axes.set(ylabel=names[f], xticks=ticks, xticklabels=[dates[tick] for tick in ticks])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
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
