"""Time series forecasting: quantiles of the next steps, compared with the seasonal naive forecast and AutoETS.

The first 70 % of the time are for training, the next 15 % for validation, the last 15 % for the test. Gaps hold the
last number before them, further inputs mark them, and they are never scored. ``--predict`` forecasts past the end of a
file.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.errors import optional_package
from jaxlstm.json_types import check_entries
from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data import forecast_files
from jaxlstm.training.data.csv_series import Panel, name_list, read_panel
from jaxlstm.training.data.forecast_scores import (
    autoets_quantiles,
    missing_autoets,
    naive_quantiles,
    scores,
)
from jaxlstm.training.data.forecast_windows import (
    Scaling,
    WindowedPanel,
    Windows,
    fit_scaling,
    part_boundaries,
    seasonal_error,
)
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import DataError, fingerprint
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.forecaster import Batch, Forecaster
from jaxlstm.training.tasks.task import LoadParams, Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "data": "co2",
    "hidden": 64,
    "dropout": 0.4,
    "input_dropout": 0.1,
    "window": 104,
    "batch": 32,
    "learning_rate": 3e-3,
    "max_steps": 1000,
    "valid_every": 100,
}
UNUSED = unused_options("data", "window", "forecasting")
SCORED_PER_SERIES = 120  # windows of the validation or the test part: neighbors hardly differ
MAX_VALIDATED, MAX_TESTED = 2_000, 20_000  # windows of all series
EVALUATION_BATCH = 256


def make(options: Options) -> Task:
    """Returns the task on the series of ``--data``."""
    quantiles = parse_quantiles(options.quantiles)
    path = co2_path() if options.data == "co2" else Path(options.data)
    panel = read_file(path, options, time=options.time, target=options.target)
    notes = panel.notes
    panel, scaling, more_notes = fit_scaling(
        str(path), panel, options.window, options.horizon, options.season, options.decimal
    )
    data = windowed(panel, scaling, options)
    no_autoets = missing_autoets(data)
    model = build_forecaster(options, data, quantiles)
    forecast = forecaster(model)
    series, origins = data.windows_of("training")
    batch_indices = shuffled_batches(len(series), options.batch, options.seed)
    levels = np.array(quantiles, np.float32)
    validation, test_part = scored_windows(data, "validation", MAX_VALIDATED), test_windows(data)
    train_end = part_boundaries(panel)["training"][1]
    ends = [train_end - one.start for one in panel.series]
    unit = np.array(  # of MASE, by series
        [seasonal_error(one.values[:end], one.known[:end], options.season) for one, end in zip(panel.series, ends)]
    )

    def batches(start: int) -> Iterator[Batch]:
        for number in itertools.count(start):
            indices = batch_indices(number)
            yield data.windows(series[indices], origins[indices]).batch

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: Batch, key: Array) -> tuple[Array, tuple[Array, None]]:
            value = mean_pinball_loss(model.with_lstm(lstm)(params, batch, key=key), batch, levels)
            return value, (value, carry)

        return loss

    def score(forecasts: np.ndarray, windows: Windows) -> dict[str, float]:
        return scores(forecasts, windows.truth, windows.batch.scored, unit[windows.series], quantiles)

    def evaluate(params: Any) -> dict[str, float]:
        windows = data.windows(*validation)
        normalized, forecasts = forecast(params, windows)
        loss = float(mean_pinball_loss(jnp.asarray(normalized), windows.batch, levels))
        naive = naive_quantiles(data, windows, quantiles)
        figures = {"": forecasts, "seasonal_naive_": naive}
        return {"loss": loss} | {f"{name}mase": score(values, windows)["mase"] for name, values in figures.items()}

    def test(params: Any, folder: Path) -> dict[str, float]:
        del folder
        windows = data.windows(*test_part)
        methods = {"": forecast(params, windows)[1], "seasonal_naive_": naive_quantiles(data, windows, quantiles)}
        if no_autoets is None:
            methods["autoets_"] = autoets_quantiles(data, windows, quantiles)
        figures = {name: score(values, windows) for name, values in methods.items()}
        return {f"test_{name}{score}": figures[name][score] for score in figures[""] for name in methods}

    def draw(params: Any, folder: Path) -> None:
        begin, end = part_boundaries(panel)["test"]
        ahead = np.arange(begin, end - options.horizon + 1, options.horizon)
        begins, ends = data.starts[:, None] + options.season, data.ends[:, None]
        of_series, at = np.nonzero((begins <= ahead) & (ahead < ends))  # series may begin late or end early
        is_drawn = np.isin(of_series, [n for n, _ in forecast_files.drawn_panels(panel, of_series)])
        windows = data.windows(of_series[is_drawn], ahead[at[is_drawn]])
        forecast_files.draw_forecasts(
            folder / "forecast.png",
            data,
            windows,
            forecast(params, windows)[1],
            quantiles,
            f"{path.stem}: {options.horizon} steps ahead",
            history=0,
            naive=True,
        )

    return Task(
        description=f"{sum(len(one.values) for one in panel.series):,} steps of {name_list(panel.targets)}"
        + (f" in {len(panel.series):,} series" if options.series is not None else "")
        + f"; {options.horizon} ahead from {options.window}",
        title=f"{path.stem}, {options.horizon} steps ahead: LSTM",
        loss_unit="pinball loss",
        unit_name="windows",
        units_per_step=options.batch,
        validation_units=len(validation[0]),
        format_loss=lambda value: f"{value:.5f} pinball loss",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, batch: (model.encoder_inputs(batch), None),
        lstm_arguments=lambda batch: {"mask": jnp.asarray(batch.exists), "static": model.static(batch)},
        evaluate=evaluate,
        test=test,
        draw=draw,
        notes=(*notes, *more_notes, *([] if no_autoets is None else [no_autoets])),
        fingerprint=panel_fingerprint(panel),
        extra_config={"scaling": scaling._asdict()},
    )


def predict(
    options: Options,
    config: Mapping[str, Any],
    load_params: LoadParams,
    out: Path,
) -> str:
    """Forecasts past the end of each series of ``--data`` and writes a CSV file and a figure beside it.

    Series that the run was trained on keep the scale of its training part; others get one from their own history.
    """
    check_entries(config["scaling"], Scaling.__annotations__, f"config.json of {options.predict}: scaling")
    scaling = Scaling(**config["scaling"])
    quantiles = parse_quantiles(options.quantiles)
    figure = out.with_suffix(".png")
    if figure == out:
        raise ValueError(
            f"--out {out} is the name of the figure; expected a CSV file, such as {out.with_suffix('.csv')}"
        )
    path = co2_path() if options.data == "co2" else Path(options.data)
    panel = read_file(path, options, time=scaling.time, target=scaling.targets)
    if panel.axis.step != scaling.step:
        raise DataError(
            f"{path}: the step of time is {panel.axis.step}, expected {scaling.step} as in the data of the run"
        )
    data = windowed(panel, scaling, options)
    forecast_files.check_future(data, str(path))
    model = build_forecaster(options, data, quantiles)
    params = load_params(model.init)
    windows = data.windows(np.arange(len(panel.series)), data.ends)
    forecasts = forecaster(model)(params, windows)[1]
    forecast_files.write_forecasts(out, data, windows, forecasts, quantiles, series=options.series)
    title = f"{path.stem}: the next {options.horizon} steps"
    history = max(2 * options.season, 3 * options.horizon)
    forecast_files.draw_forecasts(figure, data, windows, forecasts, quantiles, title, history=history)
    new = [one.name for one in panel.series if one.name not in scaling.scales]
    lines = [*panel.notes]
    if new:
        lines.append(f"series that the run was not trained on, scaled by their own history: {name_list(new)}")
    rows = options.horizon * len(panel.series)
    return "\n".join([*lines, f"{out}: {rows:,} rows; {figure}: history, forecast and intervals"])


def parse_quantiles(text: str) -> tuple[float, ...]:
    """Returns the quantiles of ``--quantiles``.

    Raises:
      ValueError: unless they are ascending numbers between 0 and 1, one of which is 0.5.
    """
    try:
        quantiles = tuple(float(part) for part in text.split(","))
    except ValueError:
        quantiles = ()
    ascending = all(a < b for a, b in itertools.pairwise((0.0, *quantiles, 1.0)))
    if not ascending or 0.5 not in quantiles:
        raise ValueError(
            f"--quantiles must be ascending numbers between 0 and 1 with 0.5, such as 0.1,0.5,0.9, got {text!r}"
        )
    return quantiles


def read_file(path: Path, options: Options, *, time: str | None, target: str | list[str] | None) -> Panel:
    """Returns the series of a file in the form that the options describe."""
    return read_panel(
        path,
        time=time,
        target=target,
        series=options.series,
        future=options.future,
        static=options.static,
        delimiter=options.delimiter,
        decimal=options.decimal,
        date_format=options.date_format,
    )


def windowed(panel: Panel, scaling: Scaling, options: Options) -> WindowedPanel:
    """Returns the windows of series that the options describe."""
    return WindowedPanel(
        panel,
        scaling,
        window=options.window,
        horizon=options.horizon,
        season=options.season,
        decimal=options.decimal,
    )


def scored_windows(data: WindowedPanel, part: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns series and origins of the windows of a part that are scored, about ``most`` at most."""
    return data.windows_of(part, max(1, min(SCORED_PER_SERIES, most // len(data.panel.series))))


def test_windows(data: WindowedPanel) -> tuple[np.ndarray, np.ndarray]:
    """Returns series and origins of the windows of the test part, the same for all methods."""
    return scored_windows(data, "test", MAX_TESTED)


def build_forecaster(options: Options, data: WindowedPanel, quantiles: tuple[float, ...]) -> Forecaster:
    """Returns the model for windows of ``data``.

    Raises:
      ValueError: for a bidirectional encoder.
    """
    if options.bidirectional:
        raise ValueError("--bidirectional does not apply to --task forecast: the state after the history is handed on")
    num_targets = len(data.panel.targets)
    static_size = data.static.shape[-1] or None
    lstm = build_lstm(options, 2 * num_targets + data.num_features, static_size=static_size)
    return Forecaster(lstm, num_targets, quantiles, options.dropout)


def forecaster(model: Forecaster) -> Callable[[Any, Windows], tuple[np.ndarray, np.ndarray]]:
    """Returns a function from parameters and windows to normalized quantiles, and those in the series' units.

    It computes them in batches of one size, so that it is compiled once.
    """
    compiled = jax.jit(model)

    def forecast(params: Any, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        count = windows.batch.values.shape[1]
        size = min(EVALUATION_BATCH, count)
        parts = []
        for begin in range(0, count, size):
            indices = np.minimum(np.arange(begin, begin + size), count - 1)
            parts.append(np.asarray(compiled(params, Batch(*(a[:, indices] for a in windows.batch)))))
        normalized = np.concatenate(parts, 1)[:, :count]
        return normalized, windows.denormalize(normalized)

    return forecast


def mean_pinball_loss(forecasts: Array, batch: Batch, levels: np.ndarray) -> Array:
    """Returns the mean pinball loss of scored targets over all quantiles, in normalized units; 0 without any."""
    scored = jnp.asarray(batch.scored)
    errors = jnp.asarray(batch.targets)[..., None] - forecasts
    shaped = jnp.broadcast_to(jnp.asarray(levels), errors.shape)
    losses = jnp.maximum(shaped * errors, (shaped - 1) * errors).mean(-1)
    return jnp.where(scored, losses, 0).sum() / jnp.maximum(scored.sum(), 1).astype(losses.dtype)


def panel_fingerprint(panel: Panel) -> str:
    """Returns the hash of everything read from the file."""
    texts = "\n".join((*panel.targets, *panel.future, *panel.static, *panel.axis.labels))
    arrays = [a for one in panel.series for a in (one.values, one.known, one.future) if a.size]
    cells = "\n".join(repr((one.name, one.start, one.static)) for one in panel.series)
    return fingerprint(texts, cells, *arrays)


def co2_path() -> Path:
    """Returns the path of the weekly CO2 series of Mauna Loa, 1958 to 2001, that ships with statsmodels.

    Raises:
      ImportError: if statsmodels is not installed.
    """
    with optional_package("statsmodels", extra="tasks", purpose="--data co2"):
        from statsmodels.datasets import co2
    return Path(co2.__file__).parent / "co2.csv"
