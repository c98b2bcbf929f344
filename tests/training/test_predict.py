"""The option ``--predict``: the options of the run, the file to read and to write, and the call of the task."""

import types
from pathlib import Path

import pytest
from training_runs import run_command, write_config

from jaxlstm.training.cli import parse
from jaxlstm.training.tasks import TASKS


@pytest.fixture
def predicting(tmp_path, monkeypatch):
    """The folder of a run of digits with --hidden 9, and the calls of the method ``predict`` that the task now has."""
    calls = []

    def predict(options, config, load_params, out):
        calls.append((options, config, load_params, out))
        return "wrote [2] rows"

    task = types.SimpleNamespace(DEFAULTS={}, UNUSED=(), make=TASKS["digits"].make, predict=predict)
    monkeypatch.setitem(TASKS, "digits", task)
    for name, options in (("run", ["--task", "digits", "--hidden", "9"]), ("text", [])):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, parse(options), **({"vocabulary": "ab"} if name == "text" else {}))
    (tmp_path / "new.csv").write_text("a,b\n1,2\n")
    return tmp_path, calls


def test_predict_calls_the_task_with_the_options_of_the_run_and_the_new_file(predicting):
    folder, calls = predicting
    arguments = ["--predict", "run", "--data", "new.csv", "--decimal", ",", "--out", "out.csv"]
    assert run_command(*arguments, cwd=folder) == "wrote [2] rows\n"
    [(options, config, load_params, out)] = calls
    assert (options.task, options.hidden, options.data, options.decimal) == ("digits", 9, "new.csv", ",")
    assert config["options"]["hidden"] == 9
    assert out == Path("out.csv")
    with pytest.raises(ValueError, match=r"no checkpoint run/best\.safetensors"):
        load_params(lambda key: key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--predict run", "--predict run needs --out FILE, the CSV file to write"),
        (
            "--predict run --out o.csv --hidden 8",
            "--predict run uses the options of that run: --hidden is 8, expected 9",
        ),
        ("--predict run --out o.csv --max-steps 8", "--predict run uses the options of that run: --max-steps is 8"),
        ("--predict run --out o.csv --task adding", "--predict run uses the options of that run: --task is adding"),
        ("--predict run --out o.csv --sample run", "--predict run cannot be combined with --sample run"),
        ("--predict run --out o.csv --resume run", "--predict run cannot be combined with --resume run"),
        ("--predict run --data new.csv --out new.csv", "--out new.csv is the file of --data; choose another name"),
        ("--predict nowhere --out o.csv", "--predict nowhere is not the folder of a run"),
        ("--predict text --out o.csv", "text is one of charlm"),
        ("--out o.csv", "--out o.csv is the file that --predict writes; --predict names a run directory"),
    ],
)
def test_predict_refuses_in_one_line(predicting, arguments, message):
    folder, calls = predicting
    output = run_command(*arguments.split(), cwd=folder, fails=True)
    assert message in output
    assert output.count("\n") == 1
    assert not calls
