"""Windows of series: parts, gaps, scales, scores, quantiles, and the files of a forecast."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import default_jax

import jaxlstm
from jaxlstm.training.cli import parse
from jaxlstm.training.data import forecast_files, forecast_scores
from jaxlstm.training.data.csv_series import read_panel
from jaxlstm.training.data.forecast_windows import WindowedPanel, fit_scaling, part_boundaries, scale_of
from jaxlstm.training.data.text import DataError
from jaxlstm.training.models.build import with_static
from jaxlstm.training.models.forecaster import Forecaster, quantiles_from_gaps
from jaxlstm.training.tasks import forecast

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


def windowed(path, window=8, horizon=2, season=4, **columns):
    panel = read_panel(path, **columns)
    panel, scaling, _ = fit_scaling(str(path), panel, window, horizon, season, ".")
    return WindowedPanel(panel, scaling, window=window, horizon=horizon, season=season)


def make(path, *options):
    return forecast.make(parse([*SMALL, *options, "--data", str(path)]))


def random_walk(gaps=0.0, length=200):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(length) < gaps, np.nan, rng.normal(size=length).cumsum())
    values[0] = 1
    return values


def write_panel(path, lengths=(120, 120, 90), *, more=0):
    """Writes daily series ``s0``, ``s1``, ... with targets ``up`` and ``down``, a covariate and two static columns.

    The last ``more`` rows of each series have covariates only.
    """
    rng = np.random.default_rng(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shop", "date", "up", "down", "promo", "area", "kind"])
        for n, length in enumerate(lengths):
            walk = rng.normal(size=(length, 2)).cumsum(0) * 10**n
            days = np.datetime64("2023-11-01") + np.arange(120 - length, 120 + more)
            for t, day in enumerate(days):
                values = [f"{x:.6g}" for x in walk[t]] if t < length else ["", ""]
                writer.writerow([f"s{n}", day, *values, t % 3, 10 * (n + 1), "red" if n % 2 else "blue"])
    return path


COLUMNS = {"series": "shop", "future": "promo", "static": "area,kind"}
OPTIONS = [text for name, value in COLUMNS.items() for text in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.arange(6) ** 2, [], "6 steps are too few for --season 4 and --horizon 2: 70 % of them must hold"),
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
    ],
)
def test_forecast_refuses_series_that_cannot_be_scored(write, values, options, message):
    with pytest.raises(DataError, match=message):
        forecast.make(parse([*SMALL, *options, "--data", str(write(values))]))


def test_windows_do_not_depend_on_later_values(write):
    values, end = random_walk(gaps=0.3), 150
    whole = windowed(write(values))
    changed = windowed(write([*values[:end], *np.full(50, 1e6)]))
    origins = np.arange(4, end - 2 + 1)
    pairs = [data.windows(np.zeros(len(origins), int), origins) for data in (whole, changed)]
    for a, b in zip(jax.tree.leaves(pairs[0]), jax.tree.leaves(pairs[1])):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.scales, changed.scales)  # of the training part only


def test_scales_leave_out_gaps_and_the_steps_after_training(write):
    """A line rises by 10 per step: a value is 10 (1 + 2 + 3 + 4) / 4 above the mean of the four before it."""
    values = 10.0 * np.arange(100)
    values[80:] *= 1000
    np.testing.assert_allclose(windowed(write(values)).scales, [[25]])
    known = np.ones((9, 1), bool)
    known[5] = False
    line = np.arange(9.0)[:, None]
    np.testing.assert_allclose(scale_of(np.where(known, line, 4), known, 4), [np.mean([2.5, 2.75, 2.75, 2.75])])


def test_windows_mark_gaps_in_inputs_and_targets(write):
    values = random_walk()[:100]
    values[[13, 14, 19]] = np.nan
    windows = windowed(write(values)).windows(np.array([0]), np.array([18]))
    np.testing.assert_array_equal(windows.batch.filled[:, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(windows.batch.values[3:5, 0, 0], windows.batch.values[2, 0, 0])
    np.testing.assert_array_equal(windows.batch.scored[:, 0, 0], [1, 0])
    np.testing.assert_array_equal(windows.batch.exists, True)


def test_windows_are_in_units_of_the_series_and_repeat_the_last_season(write):
    values = random_walk()
    data = windowed(write(values), horizon=6)
    windows = data.windows(np.array([0, 0]), np.array([50, 90]))
    for b, origin in enumerate((50, 90)):
        center = values[origin - 4 : origin].mean()
        expected = (values[origin - 8 : origin + 6] - center) / data.scales[0, 0]
        got = np.concatenate([windows.batch.values, windows.batch.targets])[:, b, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            windows.naive[:, b, 0], [*values[origin - 4 : origin], *values[origin - 4 : origin - 2]]
        )
        np.testing.assert_allclose(
            windows.denormalize(got[8:, None, None, None])[:, b, 0, 0], values[origin : origin + 6], rtol=1e-5
        )


@pytest.mark.slow
def test_windows_mask_the_steps_before_a_series(write):
    data = windowed(write(random_walk()))
    windows = data.windows(np.array([0, 0]), np.array([5, 8]))
    np.testing.assert_array_equal(windows.batch.exists.T, [[0] * 3 + [1] * 5, [1] * 8])
    model = forecast.build_forecaster(parse(SMALL), data, (0.1, 0.5, 0.9))
    with default_jax():
        params = model.init(jax.random.key(0))
        expected = model(params, windows.batch)
        values = np.where(windows.batch.exists[..., None], windows.batch.values, np.nan)
        np.testing.assert_array_equal(model(params, windows.batch._replace(values=values)), expected)
        short = type(windows.batch)(*(a[3:] if len(a) == 8 else a for a in windows.batch))
        np.testing.assert_allclose(model(params, short)[:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)


def test_series_of_a_panel_share_the_times_of_the_parts(tmp_path):
    data = windowed(write_panel(tmp_path / "p.csv"), **COLUMNS)
    assert data.panel.targets == ("up", "down")
    assert part_boundaries(data.panel) == {"training": (0, 84), "validation": (84, 102), "test": (102, 120)}
    series, origins = data.windows_of("test")
    for n in range(3):
        np.testing.assert_array_equal(origins[series == n], np.arange(102, 119))
    series, origins = data.windows_of("training")
    assert [origins[series == n].min() for n in range(3)] == [4, 4, 34]
    assert origins.max() == 82
    few = data.windows_of("test", per_series=3)
    np.testing.assert_array_equal(few[1].reshape(3, 3), [[102, 110, 118]] * 3)


def test_scales_of_a_panel_are_those_of_each_series(tmp_path):
    path = write_panel(tmp_path / "p.csv")
    data = windowed(path, **COLUMNS)
    for n, one in enumerate(data.panel.series):
        end = 84 - one.start
        for f in range(2):
            values = one.values[:end, f]
            distances = [abs(values[t] - values[t - 4 : t].mean()) for t in range(4, end)]
            np.testing.assert_allclose(data.scales[n, f], np.mean(distances))


def test_features_are_covariates_with_marks_static_columns_and_the_calendar(tmp_path):
    data = windowed(write_panel(tmp_path / "p.csv", more=2), **COLUMNS)
    assert data.scaling.periods == ["week"]  # 84 days of training hold no two years
    windows = data.windows(np.array([1, 2]), data.ends[1:])
    future = windows.batch.future
    mean, deviation = data.scaling.future["promo"]
    np.testing.assert_allclose(future[:, 0, 0] * deviation + mean, [0, 1], atol=1e-6)
    np.testing.assert_array_equal(future[..., 1], 0)
    assert (mean, deviation) == pytest.approx((1, np.sqrt(2 / 3)))
    weekdays = np.argmax(future[:, 0, 2:], -1)
    np.testing.assert_array_equal(weekdays, [3, 4])  # 2024-02-29, a Thursday, and 2024-03-01
    static = windows.batch.static[0]
    np.testing.assert_allclose(static, [[0, 0, 1], [np.sqrt(1.5), 1, 0]], atol=1e-6)


@pytest.mark.slow
def test_static_features_reach_every_gate_that_reads_inputs():
    for name in ("lstm", "peephole", "cifg", "gru", "minlstm", "rnn", "ea"):
        cell = with_static(name)
        lstm = jaxlstm.LSTM(3, 4, cell=cell, static_size=2)
        with default_jax():
            params = lstm.init(jax.random.key(0))
            xs = jnp.ones((5, 1, 3))
            first, second = (lstm(params, xs, static=jnp.full((1, 2), value))[0] for value in (0.0, 1.0))
        assert not np.allclose(first, second)
        if name == "lstm":
            assert params.layers[0].forward.w_s.shape == (16, 2)


@pytest.mark.parametrize("quantiles", [(0.5,), (0.1, 0.5, 0.9), (0.01, 0.02, 0.5, 0.51, 0.99)])
def test_quantiles_never_cross_and_begin_at_the_anchor(quantiles):
    anchor = quantiles.index(0.5)
    outputs = 1e3 * jax.random.normal(jax.random.key(0), (2000, len(quantiles)), jnp.float32)
    result = np.asarray(quantiles_from_gaps(outputs, anchor))
    assert (np.diff(result, axis=-1) >= 0).all()
    np.testing.assert_array_equal(result[:, anchor], outputs[:, 0])
    gaps = np.logaddexp(0, np.asarray(outputs[:, 1:], np.float64))
    np.testing.assert_allclose(np.diff(result.astype(np.float64), axis=-1), gaps, atol=2e-3)


@pytest.mark.slow
def test_the_decoder_starts_from_the_state_of_the_encoder_and_reads_the_known_future(tmp_path):
    data = windowed(write_panel(tmp_path / "p.csv"), **COLUMNS)
    batch = data.windows(*(a[:4] for a in data.windows_of("test"))).batch
    model = forecast.build_forecaster(parse([*SMALL, *OPTIONS]), data, (0.1, 0.5, 0.9))
    assert isinstance(model, Forecaster)
    with default_jax():
        params = model.init(jax.random.key(0))
        before = np.asarray(model(params, batch))
        for name, step in (("values", 0), ("past", 0), ("static", 0)):
            array = np.array(getattr(batch, name))
            array[step] += 1
            assert (np.abs(np.asarray(model(params, batch._replace(**{name: array}))) - before) > 0).any(), name
        future = np.array(batch.future)
        future[1] += 1
        after = np.asarray(model(params, batch._replace(future=future)))
        np.testing.assert_array_equal(after[0], before[0])  # the second step is read after the first
        assert not np.allclose(after[1], before[1])
        blind = params._replace(lstm=jax.tree.map(jnp.zeros_like, params.lstm))
        np.testing.assert_array_equal(
            model(blind, batch), model(blind, batch._replace(values=batch.values + 1))
        )  # the history reaches the decoder through the state


@pytest.mark.slow
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
        figures = task.evaluate(params)
    data = windowed(write(values))
    windows = data.windows(*data.windows_of("validation"))
    train = values[:140]
    unit = np.nanmean(np.abs(train[4:] - train[:-4]))
    naive = (np.abs(windows.naive - windows.truth) / unit)[windows.batch.scored].mean()
    assert figures["seasonal_naive_mase"] == pytest.approx(naive)


def test_loss_is_the_mean_pinball_loss(write):
    data = windowed(write(random_walk(gaps=0.3)))
    batch = data.windows(*data.windows_of("test")).batch
    levels = np.array([0.1, 0.5, 0.9], np.float32)
    forecasts = np.sort(np.random.default_rng(0).normal(size=(*batch.targets.shape, 3)).astype(np.float32), -1)
    losses = []
    for index in np.argwhere(batch.scored):
        for q, level in enumerate(levels):
            error = batch.targets[tuple(index)] - forecasts[(*index, q)]
            losses.append(level * error if error >= 0 else (level - 1) * error)
    assert float(forecast.mean_pinball_loss(jnp.asarray(forecasts), batch, levels)) == pytest.approx(np.mean(losses))


def test_scores_are_mase_weighted_quantile_loss_and_coverage():
    rng = np.random.default_rng(0)
    truth, scored = rng.normal(size=(3, 4, 2)), rng.random((3, 4, 2)) < 0.8
    forecasts = np.sort(rng.normal(size=(3, 4, 2, 5)), -1)
    unit, quantiles = rng.uniform(1, 2, (4, 2)), (0.05, 0.1, 0.5, 0.9, 0.95)
    errors, wql, inside = [], [], {"90": [], "80": []}
    for f in range(2):
        for q, level in enumerate(quantiles):
            losses = sum(
                max(level * (y - forecasts[h, b, f, q]), (level - 1) * (y - forecasts[h, b, f, q]))
                for (h, b), y in np.ndenumerate(truth[..., f])
                if scored[h, b, f]
            )
            wql.append(2 * losses / np.abs(truth[..., f][scored[..., f]]).sum())
    for h, b, f in np.argwhere(scored):
        errors.append(abs(truth[h, b, f] - forecasts[h, b, f, 2]) / unit[b, f])
        for name, low, high in (("90", 0, 4), ("80", 1, 3)):
            inside[name].append(forecasts[h, b, f, low] <= truth[h, b, f] <= forecasts[h, b, f, high])
    expected = {"mase": np.mean(errors), "wql": np.mean(wql)}
    expected |= {f"coverage_{name}": np.mean(values) for name, values in inside.items()}
    got = forecast_scores.scores(forecasts, np.where(scored, truth, np.nan), scored, unit, quantiles)
    assert got == pytest.approx(expected)


def test_naive_quantiles_add_the_changes_over_seasons_of_the_training_part(write):
    values = random_walk()
    data = windowed(write(values), horizon=6)
    windows = data.windows(*data.windows_of("test"))
    result = forecast_scores.naive_quantiles(data, windows, (0.1, 0.5, 0.9))
    np.testing.assert_array_equal(result[..., 1], windows.naive)
    for h, lag in ((0, 4), (3, 4), (4, 8), (5, 8)):
        changes = values[lag:140] - values[: 140 - lag]
        for q, level in ((0, 0.1), (2, 0.9)):
            np.testing.assert_allclose(result[h, :, 0, q], windows.naive[h, :, 0] + np.quantile(changes, level))


@pytest.mark.slow
@pytest.mark.parametrize("season", [4, 26])
def test_autoets_forecasts_the_same_windows(write, season):
    pytest.importorskip("statsforecast")
    t = np.arange(400)
    values = 100 + 10 * np.sin(2 * np.pi * t / season) + np.random.default_rng(0).normal(size=400)
    data = windowed(write(values), window=season, season=season, horizon=3)
    windows = data.windows(*data.windows_of("test", 20))
    result = forecast_scores.autoets_quantiles(data, windows, (0.1, 0.5, 0.9))
    assert (np.diff(result, axis=-1) > 0).all()
    figures = forecast_scores.scores(result, windows.truth, windows.batch.scored, np.ones((20, 1)), (0.1, 0.5, 0.9))
    assert figures["mase"] < 1.3  # the mean absolute value of the noise is 0.8
    assert 0.6 < figures["coverage_80"] < 0.95


def test_notes_of_the_series_are_notes_of_the_task(write):
    task = make(write(random_walk(gaps=0.1)))
    assert "time is 'date', 1 per step" in task.notes[0]
    assert any("gaps: " in note for note in task.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--quantiles", "0.1,0.9"],
            "--quantiles must be ascending numbers between 0 and 1 with 0.5, .* got '0.1,0.9'",
        ),
        (["--quantiles", "0.5,0.1"], "--quantiles must be ascending"),
        (["--quantiles", "0.5,1"], "--quantiles must be ascending"),
        (["--quantiles", "many"], "--quantiles must be ascending"),
        (["--bidirectional"], "--bidirectional does not apply to --task forecast"),
    ],
)
def test_forecast_refuses_options(write, options, message):
    with pytest.raises(ValueError, match=message):
        make(write(random_walk()), *options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "has the time of line 2, 2023-11-01; .*--series names the column that tells them apart"),
        ({"series": "x"}, "--series x: no such column, expected one of 'shop', 'date'"),
        ({"series": "shop", "future": "promo,x"}, "--future x: no such column"),
        ({"series": "shop", "future": "kind"}, "line 2, kind: 'blue' is not a number"),
        ({"series": "shop", "static": "up", "target": "up"}, "--target up: the column is taken for --static"),
        ({"series": "shop", "future": "shop"}, "--future shop: the column is taken for --series"),
        (
            {"series": "kind"},
            "line 242 has the time and the 'kind' of line 32, 2023-12-01 and 'blue'; expected one row",
        ),
        (
            {"series": "shop", "static": "promo"},
            "line 3: shop 's0': --static promo changes from '0' to '1', expected one",
        ),
    ],
)
def test_read_panel_names_the_fault_of_columns(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        read_panel(write_panel(tmp_path / "p.csv"), **columns)


def test_series_that_cannot_be_trained_on_are_left_out_with_a_note(tmp_path):
    path = write_panel(tmp_path / "p.csv", lengths=(120, 120, 20))
    task = make(path, *OPTIONS)
    assert "240 steps of 'up', 'down' in 2 series" in task.description
    assert "leaves out 1 of 3 series: " in task.notes[-1] or "leaves out 1 of 3 series: " in task.notes[-2]


def test_parts_are_of_the_time_of_the_series_that_remain(tmp_path):
    """A constant series goes on after the others have ended."""
    path = write_panel(tmp_path / "p.csv", lengths=(120, 120))
    days = np.datetime64("2024-01-01") + np.arange(120)
    rows = "".join(f"flat,{day},3,3,{n % 3},5,blue\n" for n, day in enumerate(days))
    path.write_text(path.read_text() + rows)
    panel, scaling, notes = fit_scaling("p.csv", read_panel(path, **COLUMNS), 8, 2, 4, ".")
    assert notes == [
        "leaves out 1 of 3 series: p.csv: flat: the mean change of up over a season in the training part is 0, "
        "expected a positive number; --target chooses columns"
    ]
    alone = read_panel(write_panel(tmp_path / "alone.csv", lengths=(120, 120)), **COLUMNS)
    expected = fit_scaling("p.csv", alone, 8, 2, 4, ".")[1]
    assert part_boundaries(panel) == part_boundaries(alone)
    assert scaling == expected


def test_history_shorter_than_a_season_is_refused(tmp_path):
    panel = read_panel(write_panel(tmp_path / "p.csv"), **COLUMNS)
    scaling = fit_scaling("p.csv", panel, 8, 2, 4, ".")[1]
    short = read_panel(write_panel(tmp_path / "short.csv", lengths=(120, 4)), **COLUMNS)
    WindowedPanel(short, scaling, window=8, horizon=2, season=4)
    with pytest.raises(DataError, match="series 's1': 4 steps are too few, expected more than --season 4"):
        WindowedPanel(short, scaling._replace(scales={}), window=8, horizon=2, season=4)
    short = read_panel(write_panel(tmp_path / "short.csv", lengths=(120, 3)), **COLUMNS)
    with pytest.raises(DataError, match="series 's1': 3 steps are too few, expected at least --season 4"):
        WindowedPanel(short, scaling, window=8, horizon=2, season=4)


@pytest.mark.slow
def test_a_series_that_ends_before_the_test_is_not_drawn(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda self, text, **_: labels.append(text))
    path = write_panel(tmp_path / "p.csv", lengths=(120, 120))
    rows = [row for row in path.read_text().splitlines() if not (row.startswith("s0") and row[3:] > "2024-01-31")]
    path.write_text("\n".join(rows) + "\n")
    task = make(path, *OPTIONS)
    with default_jax():
        task.draw(task.init(jax.random.key(0)), tmp_path)
    assert labels == ["s1\nup", "s1\ndown"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("$x^{$", "{a}", "_\\"), tuple(f"c{n}" for n in range(30))])
def test_draw_forecasts_draws_any_names_and_the_first_of_many_columns(tmp_path, monkeypatch, names):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, title, **_: titles.append(title))
    path = tmp_path / "s.csv"
    numbers = np.random.default_rng(0).normal(size=(28, len(names)))
    rows = [f"2020-01-{1 + n:02}," + ",".join(map(str, row)) for n, row in enumerate(numbers)]
    path.write_text("date," + ",".join(names) + "\n" + "\n".join(rows) + "\n")
    data = windowed(path)
    windows = data.windows(np.array([0]), data.ends)
    forecasts = np.repeat(windows.naive[..., None], 3, -1)
    forecast_files.draw_forecasts(tmp_path / "f.png", data, windows, forecasts, (0.1, 0.5, 0.9), "t", history=9)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert titles == ["t" if len(names) == 3 else "t, the first 8 of 30 columns"]
