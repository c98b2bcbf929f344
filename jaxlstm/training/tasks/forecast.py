"""The next steps of a time series from the steps before them, against the forecast that a season repeats itself.

A window is seen relative to its last value, in units of the mean change over a season; so is what is forecast. The
first 70 % of the series are trained on, the next 15 % choose the best parameters, the last 15 % are the test.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.training.config import Options
from jaxlstm.training.data import csv_series, text
from jaxlstm.training.data.shuffling import epochs
from jaxlstm.training.models.build import network
from jaxlstm.training.models.sequence_regressor import Readout
from jaxlstm.training.tasks.task import OF_LANGUAGE, Task

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
UNUSED = OF_LANGUAGE


class Pairs(NamedTuple):
    """Windows and what followed them."""

    before: np.ndarray  # (T, B, F)
    after: np.ndarray  # (horizon, B, F)


def make(options: Options) -> Task:
    """The task on the series that the options name."""
    path = weekly_carbon_dioxide() if options.data == "co2" else Path(options.data)
    table = csv_series.read(path)
    values, horizon, season = table.values, options.horizon, options.season
    steps, features = values.shape
    cuts = [0, int(0.7 * steps), int(0.85 * steps), steps]
    span = options.window + horizon
    if cuts[1] < span or cuts[2] - cuts[1] < horizon or options.window < season:
        raise text.DataError(
            f"{steps:,} steps are too few for windows of {options.window} and a horizon of {horizon}, or the window is "
            f"shorter than a season, {season}"
        )
    scale = np.abs(values[season : cuts[1]] - values[: cuts[1] - season]).mean(0)
    if not scale.all():
        raise text.DataError(f"{path}: {table.names[int(np.argmin(scale))]} does not change from season to season")
    model = Readout(network(options, features), horizon * features, options.dropout)

    def pairs(starts: np.ndarray) -> Pairs:
        at = starts + np.arange(span)[:, None]  # (T + horizon, B)
        both = values[at].astype(np.float64)
        return Pairs(both[: options.window], both[options.window :])

    def part(n: int) -> Pairs:
        """All windows whose forecast lies in one part of the series."""
        return pairs(np.arange(cuts[n] - options.window, cuts[n + 1] - span + 1))

    def relative(window: Pairs) -> Pairs:
        return Pairs(*((a - window.before[-1]) / scale for a in window))

    examples = epochs(cuts[1] - span + 1, options.batch, options.seed)

    def batches(start: int) -> Iterator[Pairs]:
        for position in itertools.count(start):
            drawn = relative(pairs(examples(position)))
            yield Pairs(*(a.astype(np.float32) for a in drawn))

    def answer(params: Any, before: Any, key: Array | None) -> Array:
        flat = model(params, before, key=key)  # (B, horizon * F)
        return jnp.moveaxis(flat.reshape(*flat.shape[:-1], horizon, features), -2, 0)

    def loss(params: Any, carry: Any, batch: Pairs, key: Array) -> tuple[Array, tuple[Array, Any]]:
        value = jnp.mean((answer(params, batch.before, key) - batch.after) ** 2)
        return value, (value, carry)

    predict = jax.jit(lambda params, before: answer(params, before, None))

    def forecast(params: Any, window: Pairs) -> np.ndarray:
        """In the units of the series."""
        ahead = predict(params, relative(window).before.astype(np.float32))
        return np.asarray(ahead) * scale + window.before[-1]

    def naive(window: Pairs) -> np.ndarray:
        """What was there a season ago, again and again."""
        ahead = window.before[np.arange(horizon) % season - season]
        return ahead

    def figures(params: Any, window: Pairs) -> dict[str, float]:
        """Mean absolute errors, in units of the mean change over a season."""
        error, baseline = (
            float((np.abs(ahead - window.after) / scale).mean()) for ahead in (forecast(params, window), naive(window))
        )
        return {"error": error, "seasonal_naive_error": baseline}

    def evaluate(params: Any) -> dict[str, float]:
        window = part(1)
        ahead = (forecast(params, window) - window.after) / scale
        return {"loss": float((ahead**2).mean()), **figures(params, window)}

    def draw(params: Any, folder: Path) -> None:
        """Forecasts one after the other over the test part, against what came."""
        from matplotlib.figure import Figure

        starts = np.arange(cuts[2] - options.window, steps - span + 1, horizon)
        window = pairs(starts)
        lines = {"truth": window.after, "LSTM": forecast(params, window), "a season ago": naive(window)}
        picture = Figure(figsize=(9, 2.8 * features), layout="constrained")
        for f, axes in enumerate(np.ravel(picture.subplots(features, 1, squeeze=False))):
            for (label, ahead), color in zip(lines.items(), ("#333333", "#b3341f", "#9ab8d6")):
                axes.plot(ahead[..., f].T.reshape(-1), label=label, color=color, linewidth=1.2)
            dates = [table.dates[k] for k in (starts[:, None] + options.window + np.arange(horizon)).ravel()]
            marks = np.linspace(0, len(dates) - 1, 5).astype(int)
            axes.set(ylabel=table.names[f], xticks=marks, xticklabels=[dates[k] for k in marks])
            axes.grid(alpha=0.3)
            axes.legend()
        picture.suptitle(f"{path.stem}: {horizon} steps ahead")
        with atomic_write(folder / "forecast.png") as file:
            picture.savefig(file, format="png", dpi=150)

    return Task(
        about=f"{path.stem}: {steps:,} steps of {', '.join(table.names)}; {horizon} ahead from {options.window}",
        title=f"{path.stem}, {horizon} steps ahead: LSTM",
        unit="squared error",
        counted="windows",
        per_step=options.batch,
        evaluated=part(1).before.shape[1],
        say=lambda value: f"{value:.5f} squared error",
        init=model.init,
        carry=lambda params: None,
        batches=batches,
        loss=loss,
        lstm=model.lstm,
        reads=lambda params, carry, batch: (batch.before, None),
        evaluate=evaluate,
        test=lambda params: {f"test_{name}": value for name, value in figures(params, part(2)).items()},
        draw=draw,
        fingerprint=text.fingerprint(values, "\n".join(table.dates)),
    )


def weekly_carbon_dioxide() -> Path:
    """The file of statsmodels' weekly CO2 at Mauna Loa, 1958 to 2001."""
    try:
        from statsmodels.datasets import co2
    except ImportError:
        raise ImportError("the default series is statsmodels': pip install 'jaxlstm[tasks]', or --data FILE") from None
    return Path(co2.__file__).parent / "co2.csv"
