"""Windows of a series: parts, gaps, normalization, scores and the figure of a forecast."""

import jax
import numpy as np
import pytest
from training_runs import default_jax

from jaxlstm.training.cli import parse
from jaxlstm.training.data.csv_series import read_series
from jaxlstm.training.data.text import DataError
from jaxlstm.training.tasks import forecast
from jaxlstm.training.tasks.forecast import WindowedSeries

SMALL = ["--task", "forecast", "--window", "8", "--season", "4", "--horizon", "2", "--hidden", "4", "--dropout", "0"]


@pytest.fixture
def write(tmp_path):
    """Writes a series, one value per year, NaN for a gap; returns the path."""

    def write_values(values):
        path = tmp_path / "s.csv"
        cells = ["" if np.isnan(value) else repr(float(value)) for value in values]
        path.write_text("date,a\n" + "".join(f"{1000 + n},{cell}\n" for n, cell in enumerate(cells)))
        return path

    return write_values


def windowed(path):
    return WindowedSeries(str(path), read_series(path), window=8, horizon=2, season=4)


def make(path):
    return forecast.make(parse([*SMALL, "--data", str(path)]))


def random_walk(gaps=0.0, length=200):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(length) < gaps, np.nan, rng.normal(size=length).cumsum())
    values[0] = 1
    return values


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.arange(14) ** 2, [], "14 steps are too few for --window 8 and --horizon 2: 70 % of them must hold"),
        (random_walk(), ["--window", "3"], "--window 3 is shorter than --season 4; a window must hold a season"),
        (np.arange(99) % 4, [], "the mean change of a over a season in the training part is 0, expected a positive"),
        (
            1.5e308 * (-1.0) ** (np.arange(99) // 4),
            [],
            "over a season in the training part is inf, expected a positive",
        ),
        (
            np.where(np.arange(200) // 35 == 4, np.nan, random_walk()),
            ["--horizon", "1"],
            "the validation part has nothing to score: its targets, steps 140 to 170, are one gap",
        ),
        (
            np.where(np.arange(200) // 8 == 0, random_walk(), np.where(np.arange(200) < 140, np.nan, random_walk())),
            [],
            "the training part has nothing to score: its targets, steps 8 to 140, are one gap",
        ),
    ],
)
def test_forecast_refuses_series_that_cannot_be_scored(write, values, options, message):
    with pytest.raises(DataError, match=message):
        forecast.make(parse([*SMALL, *options, "--data", str(write(values))]))


def test_windows_do_not_depend_on_later_values(write):
    values, end = random_walk(gaps=0.3), 150
    whole = windowed(write(values))
    changed = windowed(write([*values[:end], *np.full(50, 1e6)]))
    starts = np.arange(end - whole.span + 1)
    for a, b in zip(whole.windows(starts), changed.windows(starts)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.scale, changed.scale)  # of the training part only


def test_scale_leaves_out_gaps_and_the_steps_after_training(write):
    values = 10.0 * np.arange(100)
    values[[5, 30]] = np.nan
    values[80:] *= 1000
    np.testing.assert_allclose(windowed(write(values)).scale, [40])


def test_windows_mark_gaps_in_inputs_and_targets(write):
    values = random_walk()[:100]
    values[[13, 14, 19]] = np.nan
    windows = windowed(write(values)).windows(np.array([10]))
    np.testing.assert_array_equal(windows.filled[:, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(windows.inputs[3:5, 0, 0], values[12])
    np.testing.assert_array_equal(windows.scored[:, 0, 0], [1, 0])


def test_forecaster_reads_values_and_the_mask_of_gaps(write):
    task = make(write(random_walk(gaps=0.3)))
    batch = next(task.batches(0))
    xs, state = task.lstm_inputs(None, None, batch)
    assert (task.lstm.input_size, state) == (2, None)
    np.testing.assert_array_equal(xs[..., 0], batch.inputs[..., 0])
    np.testing.assert_array_equal(xs[..., 1], batch.filled[..., 0])
    assert 0.2 < float(xs[..., 1].mean()) < 0.4


def test_filled_targets_are_never_scored(write):
    values = random_walk(gaps=0.3)
    task = make(write(values))
    batch = next(task.batches(0))
    with default_jax():
        params, key = task.init(jax.random.key(0)), jax.random.key(1)
        loss = float(task.loss(params, None, batch, key)[0])
        assert not batch.scored.all()
        other = np.where(batch.scored, batch.targets, 1e9).astype(np.float32)
        assert float(task.loss(params, None, batch._replace(targets=other), key)[0]) == loss
        nothing = batch._replace(scored=np.zeros_like(batch.scored))
        assert float(task.loss(params, None, nothing, key)[0]) == 0
        scores = task.evaluate(params)
    data = windowed(write(values))
    windows = data.part(1)
    naive = (np.abs(data.naive_forecast(windows) - windows.targets) / data.scale)[windows.scored].mean()
    assert scores["seasonal_naive_error"] == pytest.approx(naive)


def test_a_straight_line_does_not_predict_a_random_walk_with_gaps(write):
    values = random_walk(gaps=0.3, length=2000)
    windows = windowed(write(values)).part(1)
    last, before = windows.inputs[-1], windows.inputs[-2]
    line = last + (last - before) * np.arange(1, 3)[:, None, None]
    errors = np.abs(line - windows.targets)[windows.scored]
    assert (errors < 1e-6).mean() < 0.01


def test_notes_of_the_series_are_notes_of_the_task(write):
    task = make(write(random_walk(gaps=0.1)))
    assert "time is 'date', 1 per step" in task.notes[0]
    assert any("gaps: " in note for note in task.notes)


@pytest.mark.parametrize("names", [("$x^{$", "{a}", "_\\"), tuple(f"c{n}" for n in range(5000))])
def test_draw_forecasts_draws_any_names_and_the_first_of_many_columns(tmp_path, monkeypatch, names):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, title, **_: titles.append(title))
    lines = {"truth": np.full((2, 3, len(names)), np.nan), "LSTM": np.zeros((2, 3, len(names)))}
    forecast.draw_forecasts(tmp_path / "f.png", lines, [f"2020-01-0{n}" for n in range(1, 7)], names, "t")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert titles == ["t" if len(names) == 3 else "t, the first 8 of 5,000 columns"]
