"""Runs of the forecasting task: training, resuming, forecasting past the end of a file, and the example."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from training_runs import ROOT, read_summary, run_command

pytestmark = pytest.mark.slow
OPTIONS = ["--task", "forecast", "--series", "shop", "--future", "promo", "--static", "kind"]
OPTIONS += ["--window", "14", "--season", "7", "--horizon", "5", "--hidden", "8", "--batch", "16"]
OPTIONS += [
    "--quantiles",
    "0.05,0.1,0.5,0.9,0.95",
    "--max-steps",
    "150",
    "--valid-every",
    "50",
    "--learning-rate",
    "0.01",
    "--dropout",
    "0.1",
]


def write_sales(path, *, shops=("a", "b", "c"), days=200, future=5, scale=1.0, start="2024-01-01"):
    """Writes daily sales with a week and a promotion of known effect; the last days have promotions only."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shop", "date", "sales", "promo", "kind"])
        for n, shop in enumerate(shops):
            promo = rng.random(days + future) < 0.2
            sales = 10 + np.arange(days + future) % 7 + 5 * promo + 0.3 * rng.normal(size=days + future)
            for t, day in enumerate(np.datetime64(start) + np.arange(days + future).astype("m8[D]")):
                cell = f"{scale * 10.0**n * sales[t]:.6g}" if t < days else ""
                writer.writerow([shop, day, cell, int(promo[t]), "xy"[n % 2]])
    return path


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its output."""
    folder = tmp_path_factory.mktemp("forecast")
    write_sales(folder / "sales.csv")
    return folder, run_command(*OPTIONS, "--data", "sales.csv", "--run-dir", "run", cwd=folder)


def test_summary_has_the_scores_of_each_method(finished):
    folder, output = finished
    summary = read_summary(folder / "run")
    methods = ["", "seasonal_naive_", *(["autoets_"] if "test_autoets_mase" in summary else [])]
    for name in methods:
        for score in ("mase", "wql", "coverage_90", "coverage_80"):
            assert 0 <= summary[f"test_{name}{score}"] < 3
        assert summary[f"test_{name}coverage_90"] >= summary[f"test_{name}coverage_80"]
    assert summary["test_mase"] < summary["test_seasonal_naive_mase"]  # which does not know the promotions
    assert (folder / "run" / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert "in 3 series; 5 ahead from 14" in output
    if len(methods) == 2:
        assert "AutoETS is not compared: statsforecast is not installed" in output


def test_predict_continues_each_series(finished):
    folder, _ = finished
    output = run_command("--predict", "run", "--out", "next.csv", cwd=folder)
    assert "next.csv: 15 rows; next.png: history, forecast and intervals" in output
    rows = read_rows(folder / "next.csv")
    columns = [f"sales_{q}" for q in ("0.05", "0.1", "0.5", "0.9", "0.95")]
    assert list(rows[0]) == ["date", "shop", *columns]
    assert [row["shop"] for row in rows] == [name for name in "abc" for _ in range(5)]
    days = [str(np.datetime64("2024-07-19") + np.timedelta64(n, "D")) for n in range(5)]
    assert [row["date"] for row in rows] == 3 * days
    values = np.array([[float(row[name]) for name in columns] for row in rows])
    assert (np.diff(values) >= 0).all()
    data = [row for row in read_rows(folder / "sales.csv") if row["date"] in days]
    promo = np.array([row["promo"] == "1" for row in data])
    level = 10.0 ** np.repeat(np.arange(3), 5)
    week = (np.arange(200, 205) % 7)[None].repeat(3, 0).reshape(-1)
    errors = values[:, 2] / level - (10 + week + 5 * promo)
    assert np.abs(errors).mean() < 1.5  # a constant forecast is wrong by more than 2
    assert (folder / "next.png").read_bytes().startswith(b"\x89PNG")


def test_predict_scales_known_series_as_in_training_and_new_ones_by_their_history(finished):
    folder, _ = finished
    config = json.loads((folder / "run" / "config.json").read_text())
    assert set(config["scaling"]["scales"]) == {"a", "b", "c"}
    write_sales(folder / "new.csv", shops=("a", "zz"), days=40, scale=7.0, start="2025-03-03")
    output = run_command("--predict", "run", "--data", "new.csv", "--out", "new_next.csv", cwd=folder)
    assert "series that the run was not trained on, scaled by their own history: 'zz'" in output
    rows = read_rows(folder / "new_next.csv")
    assert [row["shop"] for row in rows] == ["a"] * 5 + ["zz"] * 5
    write_sales(folder / "scaled.csv", shops=("a", "zz"), days=40, scale=7000.0, start="2025-03-03")
    run_command("--predict", "run", "--data", "scaled.csv", "--out", "scaled_next.csv", cwd=folder)
    first, second = (
        np.array([float(row["sales_0.5"]) for row in read_rows(folder / name)])
        for name in ("new_next.csv", "scaled_next.csv")
    )
    np.testing.assert_allclose(second[5:], 1000 * first[5:], rtol=1e-3)  # a new series: its own scale
    assert not np.allclose(second[:5], 1000 * first[:5], rtol=1e-3)  # a known one: of its training part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",promo,", ",x,"), "new.csv: --future promo: no such column"),
        (lambda text: text.replace(",sales,", ",x,"), "new.csv: --target sales: no such column of numbers"),
        (
            lambda text: text.replace(",x\r\n", ",w\r\n"),
            "--static kind is 'w', expected one of the training data: 'x', 'y'",
        ),
        (
            lambda text: "\r\n".join(row for row in text.split("\r\n") if "2025-04-14" not in row),
            "new.csv: series 'a': --future promo has no number at 2025-04-14; expected rows for the 5 steps after",
        ),
    ],
)
def test_predict_refuses_other_data_in_one_line(finished, change, message):
    folder, _ = finished
    path = write_sales(folder / "new.csv", days=40, start="2025-03-03")
    path.write_bytes(change(path.read_bytes().decode()).encode())
    output = run_command("--predict", "run", "--data", "new.csv", "--out", "n.csv", cwd=folder, fails=True)
    assert message in output
    assert "Traceback" not in output
    assert output.count("\n") == 1


def test_predict_refuses_the_name_of_its_figure(finished):
    folder, _ = finished
    output = run_command("--predict", "run", "--out", "n.png", cwd=folder, fails=True)
    assert "--out n.png is the name of the figure; expected a CSV file, such as n.csv" in output
    assert not (folder / "n.png").exists()


def test_predict_refuses_another_step_of_time(finished):
    folder, _ = finished
    path = write_sales(folder / "weekly.csv", days=40)
    rows = path.read_text().splitlines()
    path.write_text(
        "\n".join([rows[0], *(row for row in rows[1:] if np.datetime64(row.split(",")[1]).astype(int) % 7 == 4)])
    )
    output = run_command("--predict", "run", "--data", "weekly.csv", "--out", "n.csv", cwd=folder, fails=True)
    assert "weekly.csv: the step of time is 1 week, expected 1 day as in the data of the run" in output


def test_a_run_resumes_and_refuses_other_columns(finished):
    folder, _ = finished
    output = run_command("--resume", "run", "--max-steps", "160", cwd=folder)
    assert "resumed after step 150" in output
    assert read_summary(folder / "run")["steps"] == 160
    output = run_command("--resume", "run", "--quantiles", "0.5", cwd=folder, fails=True)
    assert "--quantiles is 0.5, expected 0.05,0.1,0.5,0.9,0.95" in output


def test_the_cell_may_read_static_features_in_one_gate_only(tmp_path):
    write_sales(tmp_path / "sales.csv")
    run_command(*OPTIONS, "--cell", "ea", "--layers", 2, "--data", "sales.csv", "--run-dir", "run", "--diagnose", 20,
                "--max-steps", 20, cwd=tmp_path)  # fmt: skip
    assert read_summary(tmp_path / "run")["steps"] == 20


def test_several_targets_of_one_series_without_dates(tmp_path):
    rows = [f"{n},{n % 5 + 0.1 * (n * n % 7)},{n % 3 + 0.1 * (n * n % 11)}" for n in range(200)]
    (tmp_path / "s.csv").write_text("time,up,down\n" + "\n".join(rows) + "\n")
    options = "--task forecast --window 15 --season 15 --horizon 20 --hidden 4 --max-steps 5 --target up,down"
    run_command(*options.split(), "--data", "s.csv", "--run-dir", "run", cwd=tmp_path)
    run_command("--predict", "run", "--out", "next.csv", cwd=tmp_path)
    rows = read_rows(tmp_path / "next.csv")
    assert list(rows[0]) == ["time", *(f"{name}_{q}" for name in ("up", "down") for q in ("0.1", "0.5", "0.9"))]
    assert [row["time"] for row in rows] == [str(n) for n in range(200, 220)]


def test_the_example_of_a_panel_learns_in_a_short_form(tmp_path):
    options = ["--shops", "12", "--max-steps", "400", "--window", "28", "--hidden", "32", "--out", str(tmp_path)]
    command = [sys.executable, "examples/forecast_panel.py", *options]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    test, future = results["test"], results["future"]
    assert test["test_truth_mase"] < test["test_mase"] < 0.85 * test["test_seasonal_naive_mase"]
    assert test["test_truth_wql"] < test["test_wql"] < 0.85 * test["test_seasonal_naive_wql"]
    assert 0.7 < test["test_coverage_80"] < 0.9
    assert future["error_of_the_truth"] < future["error"] < 1.7 * future["error_of_the_truth"]  # of 168 numbers
    assert (tmp_path / "next.png").read_bytes().startswith(b"\x89PNG")
