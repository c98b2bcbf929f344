"""Rows of ``diagnosis.jsonl``: their values, and the file across stops and damage."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from training_runs import SMALL, TEXT, default_jax, train

from jaxlstm import diagnostics
from jaxlstm.training import cli
from jaxlstm.training.metrics import RowFile
from jaxlstm.training.playback import NUM_SEQUENCES, QUANTILES, Diagnosis, make_diagnosis
from jaxlstm.training.tasks import TASKS
from jaxlstm.training.tasks.task import Task


def make_task(arguments):
    options = cli.parse([str(argument) for argument in arguments])
    return TASKS[options.task].make(options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--layers", "2"], ["--cell", "gru"], ["--cell", "slstm"]], ids=str)
def test_diagnosis_of_a_language_model(options, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    with default_jax():
        task = make_task([*SMALL, *options, "--batch", "6", "--data", tmp_path / "text"])
        params = task.init(jax.random.key(0))
        row = json.loads(json.dumps(make_diagnosis(task)(params)))
        xs = params.embedding[next(task.batches(0)).inputs[:, :NUM_SEQUENCES]]
        assert xs.shape == (16, NUM_SEQUENCES, 8)
        traced = diagnostics.trace(task.lstm, params.lstm, xs)
        flow = diagnostics.gradient_flow(task.lstm, params.lstm, xs, lambda ys: (ys[-1] ** 2).sum() / 2, jacobian=None)
    assert row["steps"] == list(range(16))
    assert len(row["layers"]) == task.lstm.num_layers
    for n, layer in enumerate(row["layers"]):
        (values,) = layer.values()
        trace, whole, part = (a[n].forward for a in (traced.layers, flow.layers, flow.elementwise))
        for name, gate in values["gates"].items():
            a = np.asarray(trace.gates[name])
            np.testing.assert_allclose(gate["quantiles"], np.quantile(a, QUANTILES), rtol=1e-5)
            np.testing.assert_allclose([gate["shut"], gate["open"]], [(a < 0.1).mean(), (a > 0.9).mean()], atol=1e-6)
        memory = [norms.h if trace.c is None else norms.c for norms in (whole, part)]
        memory = [norms["c"] if isinstance(norms, dict) else norms for norms in memory]
        np.testing.assert_allclose(values["gradient"], memory[0].mean(1), rtol=1e-4)
        np.testing.assert_allclose(values["elementwise"], memory[1].mean(1), rtol=1e-4)
        if "f" in values["gates"]:
            constants = -1 / np.log(np.asarray(trace.gates["f"]).mean((0, 1)))
            median = np.quantile(constants, 0.5, method="nearest")
            np.testing.assert_allclose(values["time_constants"][2], median, rtol=1e-4)
        else:
            assert values["time_constants"] is None


@pytest.mark.slow
def test_diagnosis_has_one_row_per_validation_after_a_resume(tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    options = [*SMALL, "--data", tmp_path / "text", "--valid-every", "2", "--save-every", "2", "--diagnose", "3"]
    train([*options, "--max-steps", "4", "--run-dir", tmp_path / "run"])
    path = tmp_path / "run" / "diagnosis.jsonl"
    (first,) = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 5}\n{"step": 2, "trunc')  # of a killed run
    train(["--resume", tmp_path / "run", "--max-steps", "8"])
    lines = path.read_text().splitlines()
    assert lines[0] == first
    assert [json.loads(line)["step"] for line in lines] == [4, 6, 8]


def test_diagnosis_file_keeps_whole_rows_up_to_a_step_and_writes_null_for_infinity(tmp_path, monkeypatch):
    rows = ['{"step": 1, "a": 0}', "damaged", "[1]", '{"step": true}', '{"step": 2}', '{"step": 3}', '{"step": 2']
    path = tmp_path / "diagnosis.jsonl"
    path.write_text("\n".join(rows))
    monkeypatch.setattr("jaxlstm.training.playback.make_diagnosis", lambda task: lambda params: {"values": params})
    printed = []
    diagnosis = Diagnosis(tmp_path, object.__new__(Task), 2, printed.append)
    assert printed == [f"3 of 6 rows of {path} are damaged; the others are kept"]  # the last one is cut
    with diagnosis:
        diagnosis.write(4, [1.0, float("inf"), {"b": float("nan")}])
        diagnosis.sync()
    lines = path.read_text().splitlines()
    assert lines[:2] == [rows[0], rows[4]]
    assert [json.loads(line) for line in lines[2:]] == [{"step": 4, "values": [1.0, None, {"b": None}]}]


def test_diagnosis_names_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlstm.training.playback.make_diagnosis", lambda task: lambda params: {"values": params})
    diagnosis = Diagnosis(tmp_path, object.__new__(Task), 0, print)
    with diagnosis._file:
        diagnosis._file = RowFile(Path("/dev/full"))
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"), diagnosis:
        diagnosis.write(1, [1.0])


@pytest.mark.slow
def test_diagnosis_of_a_forecaster_passes_the_mask():
    with default_jax():
        task = make_task(["--task", "forecast", "--data", "co2", "--hidden", "8", "--batch", "4"])
        row = make_diagnosis(task)(task.init(jax.random.key(0)))
    exists = np.asarray(task.lstm_arguments(next(task.batches(0)))["mask"])[:, :NUM_SEQUENCES].any(1)[row["steps"]]
    gradient = np.array(row["layers"][0]["forward"]["gradient"])
    np.testing.assert_array_equal(gradient > 0, exists)
