"""Forecasts a panel of series whose true quantiles are known: one global model, trained, scored and used.

    pip install -e '.[tasks]'
    python examples/forecast_panel.py --out runs/panel

Writes ``panel.csv``, the daily sales of shops: a level, a week, a year, promotions whose effect depends on the kind of
the shop, gaps, and noise that one day hands on to the next. Everything but the noise is known, so the quantiles of the
next days given the past are too. The program trains ``train.py --task forecast`` on the file, scores the model, the
seasonal naive forecast, AutoETS (if statsforecast is installed) and the true quantiles on the same windows, forecasts
past the end of the file with ``--predict``, and compares the forecast with days that the file does not have. It writes
``results.json``, ``next.csv`` and ``next.png``.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from jaxlstm.training import cli
from jaxlstm.training.data.forecast_scores import scores
from jaxlstm.training.data.forecast_windows import fit_scaling, part_boundaries, seasonal_error
from jaxlstm.training.tasks import forecast

QUANTILES = (0.1, 0.5, 0.9)
WEEK = {"market": (0, 0, 0, 0.1, 0.2, 0.3, -0.4), "office": (0.2, 0.2, 0.1, 0.1, 0, -0.4, -0.4), "station": (0.0,) * 7}
PROMOTION = {"market": 0.3, "office": 0.1, "station": 0.0}  # effect as a fraction of the level
CARRY = 0.7  # of the noise from one day to the next


@dataclass(frozen=True)
class Config:
    """Sizes of the panel and of the model."""

    shops: int = 60
    days: int = 1096  # 2022 to 2024, with a leap day
    horizon: int = 14
    window: int = 42
    hidden: int = 64
    dropout: float = 0.1
    max_steps: int = 1500
    batch: int = 64
    gaps: float = 0.02  # fraction of numbers that are missing
    seed: int = 0
    out: Path = Path("runs/panel")


@dataclass(frozen=True)
class Truth:
    """The panel: D days in the file, and the days of the horizon after them."""

    names: list[str]  # (N,)
    kinds: list[str]  # (N,)
    dates: np.ndarray  # (D + H,) datetime64[D]
    promotion: np.ndarray  # (D + H, N) 0 or 1
    signal: np.ndarray  # (D + H, N): all but the noise
    noise: np.ndarray  # (D + H, N): of unit variance
    spread: np.ndarray  # (N,): standard deviation of the noise in the units of the sales
    known: np.ndarray  # (D + H, N) bool: False in gaps

    @property
    def sales(self) -> np.ndarray:
        """The sales ``(D + H, N)``."""
        return self.signal + self.spread * self.noise

    def quantiles(self, shop: int, origin: int, horizon: int) -> np.ndarray:
        """Returns the quantiles of the sales of a shop from day ``origin`` on, given the days before: ``(H, Q)``.

        The noise d days after the last known one e is normal with mean ``CARRY**d * e`` and variance
        ``1 - CARRY**(2 * d)``.
        """
        last = int(np.flatnonzero(self.known[:origin, shop])[-1])
        decay = CARRY ** np.arange(origin - last, origin - last + horizon)
        mean, deviation = decay * self.noise[last, shop], np.sqrt(1 - decay**2)
        levels = np.array([NormalDist().inv_cdf(q) for q in QUANTILES])
        noise = mean[:, None] + deviation[:, None] * levels
        return self.signal[origin : origin + horizon, shop, None] + self.spread[shop] * noise


def draw_panel(config: Config) -> Truth:
    """Returns a panel with known truth."""
    rng = np.random.default_rng(config.seed)
    steps, shops = config.days + config.horizon, config.shops
    dates = np.datetime64("2022-01-01") + np.arange(steps).astype("m8[D]")
    kinds = [list(WEEK)[n % 3] for n in range(shops)]
    weekday, day = (dates.astype(int) + 3) % 7, np.arange(steps) / 365.25
    week = np.array([[WEEK[kind][d] for kind in kinds] for d in weekday])
    year = 0.2 * np.sin(2 * np.pi * (day[:, None] + rng.uniform(-0.1, 0.1, shops)))
    promotion = (rng.random((steps, shops)) < 0.15).astype(int)
    effect = promotion * np.array([PROMOTION[kind] for kind in kinds])
    level = 10 ** rng.uniform(1, 4, shops)
    noise = np.empty((steps, shops))
    noise[0] = rng.normal(size=shops)
    for t in range(1, steps):
        noise[t] = CARRY * noise[t - 1] + np.sqrt(1 - CARRY**2) * rng.normal(size=shops)
    known = rng.random((steps, shops)) >= config.gaps
    known[[0, config.days - 1]] = True  # the forecast begins after the last number
    return Truth(
        names=[f"shop {n + 1:02}" for n in range(shops)],
        kinds=kinds,
        dates=dates,
        promotion=promotion,
        signal=level * (1 + week + year + effect),
        noise=noise,
        spread=level * rng.uniform(0.06, 0.12, shops),
        known=known,
    )


def write_panel(path: Path, truth: Truth, config: Config) -> None:
    """Writes the panel; the days of the horizon have promotions but no sales."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["shop", "date", "sales", "promotion", "kind"])
        for n, name in enumerate(truth.names):
            for t, date in enumerate(truth.dates):
                is_known = t < config.days and truth.known[t, n]
                sales = f"{truth.sales[t, n]:.6g}" if is_known else ""
                writer.writerow([name, date, sales, truth.promotion[t, n], truth.kinds[n]])


def true_scores(arguments: list[str], truth: Truth) -> dict[str, float]:
    """Returns the scores of the true quantiles on the windows of the test part."""
    options = cli.parse(arguments)
    panel = forecast.read_file(Path(options.data), options, time="date", target="sales")
    panel, scaling, _ = fit_scaling("panel", panel, options.window, options.horizon, options.season, options.decimal)
    data = forecast.windowed(panel, scaling, options)
    end = part_boundaries(panel)["training"][1]
    unit = np.stack([seasonal_error(one.values[:end], one.known[:end], options.season) for one in panel.series])
    windows = data.windows(*forecast.test_windows(data))
    pairs = zip(windows.series, windows.origins)
    quantiles = np.stack([truth.quantiles(int(n), int(origin), options.horizon) for n, origin in pairs], 1)
    return scores(quantiles[:, :, None], windows.truth, windows.batch.scored, unit[windows.series], QUANTILES)


def score_future(path: Path, truth: Truth, config: Config) -> dict[str, float]:
    """Returns the coverage of the interval in a file of forecasts, and the mean error of its median and of the truth's.

    Errors are in units of the standard deviation of the noise.
    """
    with path.open() as file:
        rows = list(csv.DictReader(file))
    days = slice(config.days, config.days + config.horizon)
    columns = [np.array([float(row[f"sales_{q:g}"]) for row in rows]) for q in QUANTILES]
    low, median, high = (column.reshape(config.shops, config.horizon).T for column in columns)
    assert [row["date"] for row in rows] == [str(date) for date in truth.dates[days]] * config.shops
    sales = truth.sales[days]
    best = np.stack([truth.quantiles(n, config.days, config.horizon)[:, 1] for n in range(config.shops)], -1)
    return {
        "coverage_80": float(((low <= sales) & (sales <= high)).mean()),
        "error": float((np.abs(median - sales) / truth.spread).mean()),
        "error_of_the_truth": float((np.abs(best - sales) / truth.spread).mean()),
    }


def main(config: Config) -> dict[str, Any]:
    """Writes the panel, trains, forecasts and scores; returns the results."""
    config.out.mkdir(parents=True, exist_ok=True)
    truth, data, run = draw_panel(config), config.out / "panel.csv", config.out / "run"
    write_panel(data, truth, config)
    options = ["--series", "shop", "--future", "promotion", "--static", "kind", "--season", "7"]
    options += ["--horizon", str(config.horizon), "--window", str(config.window), "--hidden", str(config.hidden)]
    options += ["--batch", str(config.batch), "--dropout", str(config.dropout), "--input-dropout", "0"]
    options += ["--max-steps", str(config.max_steps), "--seed", str(config.seed)]
    arguments = ["--task", "forecast", "--data", str(data), *options]
    console = Console()
    cli.run_cli([*arguments, "--run-dir", str(run)], console)
    cli.run_cli(["--predict", str(run), "--data", str(data), "--out", str(config.out / "next.csv")], console)
    summary = json.loads((run / "summary.json").read_text())
    results = {
        "training": " ".join(["python train.py --task forecast --data panel.csv", *options]),
        "test": {name: value for name, value in summary.items() if name.startswith("test_")}
        | {f"test_truth_{name}": value for name, value in true_scores(arguments, truth).items()},
        "future": score_future(config.out / "next.csv", truth, config),
        "seconds": summary["wall_seconds"],
    }
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in (results["test"] | {f"future_{k}": v for k, v in results["future"].items()}).items():
        print(f"{name:32} {value:.4g}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
