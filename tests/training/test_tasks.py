"""Every task learns, short; and reaches its stated result, slow."""

import dataclasses
import json
import typing

import numpy as np
import pytest
from test_checkpoints import run
from test_train import command, metrics, process, train

from jaxlstm.training.config import Options
from jaxlstm.training.data import csv_series
from jaxlstm.training.data import text as data
from jaxlstm.training.data.shuffling import epochs
from jaxlstm.training.data.text import DataError
from jaxlstm.training.tasks import TASKS, forecast
from jaxlstm.training.tasks.task import OF_LANGUAGE, OF_SERIES

OF_DIGITS = ["--task", "digits", "--hidden", "24", "--max-steps", "120", "--learning-rate", "0.02"]
STORY = "the cat sat on the mat .\nthe dog lay on the rug .\na bird flew over the mat .\n" * 80


def figures(folder, *arguments):
    """The summary of a run and the figures of its last validation."""
    run([*map(str, arguments), "--run-dir", str(folder / "run"), "--log-every", "1000"])
    last = [row for row in metrics(folder / "run") if row["split"] == "valid"][-1]
    return json.loads((folder / "run" / "summary.json").read_text()), last


def test_the_table_is_what_the_option_takes():
    assert set(typing.get_args(typing.get_type_hints(Options)["task"])) == set(TASKS)
    for name, task in TASKS.items():
        options = train.parse(["--task", name])
        assert options.task == name
        assert all(getattr(options, field) == value for field, value in task.DEFAULTS.items())
    assert train.parse(["--task", "adding", "--window", "30"]).window == 30


def test_a_learning_rate_is_that_of_its_optimizer():
    def rate(*arguments):
        return train.parse(["--task", "wordlm", *arguments]).learning_rate

    assert rate() == rate("--optimizer", "asgd") == 20
    assert rate("--optimizer", "adamw") is rate("--optimizer=adamw") is None
    assert rate("--optimizer", "adamw", "--learning-rate", "3") == 3


class Watched(Options):
    """Options that note which of them are read."""

    def __getattribute__(self, name):
        super().__getattribute__("__dict__").setdefault("read", set()).add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("task", TASKS)
def test_an_option_without_a_use_is_refused(task):
    values = {field.name: getattr(train.parse(["--task", task]), field.name) for field in dataclasses.fields(Options)}
    options = Watched(**values)
    options.__dict__["read"].clear()
    TASKS[task].make(options)
    typed = {"data": "x", "window": "9", **dict.fromkeys(OF_LANGUAGE, "0.3"), **dict.fromkeys(OF_SERIES, "7")}
    typed["embedding"] = "7"
    for name, value in typed.items():
        assert (name in options.__dict__["read"]) == (name not in TASKS[task].UNUSED), name
        if name in TASKS[task].UNUSED:
            value = [] if name == "tied" else [value]
            with pytest.raises(ValueError, match=f"--task {task} has no use for --{name.replace('_', '-')}, got "):
                train.parse(["--task", task, f"--{name.replace('_', '-')}", *value])


def test_data_are_known_again_by_every_number_in_them(tmp_path):
    def made(text):
        (tmp_path / "text.txt").write_text(text)
        small = ["--data", str(tmp_path / "text.txt"), "--batch", "2", "--window", "5"]
        return [TASKS[name].make(train.parse(["--task", name, *small])) for name in ("charlm", "wordlm")]

    first, again = made(STORY), made(STORY)
    other = made(STORY.replace("c", "C"))
    for one, same, different in zip(first, again, other):
        assert one.fingerprint == same.fingerprint != different.fingerprint
        assert one.about == different.about
    assert data.fingerprint("ab", "c") != data.fingerprint("a", "bc")
    assert data.fingerprint(np.arange(3)) != data.fingerprint(np.arange(3)[::-1])
    (tmp_path / "s.csv").write_text("date,a\n" + "".join(f"{n},{n * n % 7}\n" for n in range(99)))
    series_options = ["--task", "forecast", "--data", str(tmp_path / "s.csv")]
    series_options += ["--window", "8", "--season", "4", "--horizon", "2"]
    before = forecast.make(train.parse(series_options)).fingerprint
    with (tmp_path / "s.csv").open("a") as file:
        file.write("99,3\n")
    assert forecast.make(train.parse(series_options)).fingerprint != before


def test_adding(tmp_path):
    options = "--task adding --window 8 --hidden 16 --batch 64 --max-steps 250 --learning-rate 0.02"
    summary, last = figures(tmp_path, *options.split())
    assert summary["valid_loss"] < 0.03  # always answering 1 costs 0.167
    assert last["loss"] == pytest.approx(summary["valid_loss"], rel=0.5)


@pytest.mark.slow
def test_copying(tmp_path):
    options = "--task copy --window 2 --hidden 32 --batch 64 --max-steps 250 --learning-rate 0.03"
    _, last = figures(tmp_path, *options.split())
    assert last["accuracy"] > 0.2  # an eighth by chance
    assert last["loss"] < 0.93 * 10 * np.log(8) / 22


@pytest.mark.slow
def test_digits(tmp_path):
    summary, last = figures(tmp_path, *OF_DIGITS)
    assert last["accuracy"] > 0.6
    assert summary["test_accuracy"] > 0.6


@pytest.mark.slow
def test_wordlm(tmp_path):
    (tmp_path / "text.txt").write_text(STORY)
    options = "--task wordlm --embedding 8 --projection 8 --hidden 16 --batch 4 --window 8 --max-steps 150"
    options += " --optimizer adamw --learning-rate 0.02 --clip 1 --activation 0 --temporal-activation 0"
    options += " --input-dropout 0 --weight-drop 0.1 --dropout 0.1 --prompt x"
    summary, _ = figures(tmp_path, *options.split(), "--data", tmp_path / "text.txt")
    assert summary["valid_loss"] < 0.6 * np.log(15)
    text = command("--sample", "run", "--prompt", "the cat", "--length", 12, cwd=tmp_path)
    assert text.startswith("the cat ")
    assert set(text.split()) <= set(STORY.split())


def test_wordlm_takes_a_folder_of_parts(tmp_path):
    (tmp_path / "ptb.train.txt").write_text(STORY)
    (tmp_path / "ptb.valid.txt").write_text("the cat lay on a penguin .\n")
    task = TASKS["wordlm"].make(train.parse(["--task", "wordlm", "--data", str(tmp_path), "--window", "9"]))
    assert task.about == "1,920 words to train on, 8 to validate, 15 different"
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(DataError, match=r"must hold one file \*train\* and one \*valid\*"):
        TASKS["wordlm"].make(train.parse(["--task", "wordlm", "--data", str(tmp_path)]))


@pytest.mark.slow
def test_forecast_of_two_columns_and_its_picture(tmp_path):
    t = np.arange(400)
    rng = np.random.default_rng(0)
    two = np.stack([np.sin(2 * np.pi * t / 12) + 0.02 * t, np.cos(2 * np.pi * t / 12) - 0.03 * t], -1)
    two += 0.02 * rng.normal(size=two.shape)
    rows = [f"{a!s},2000-{n},{b!s}" if n % 50 else f",2000-{n},{b!s}" for n, (a, b) in enumerate(two)]
    (tmp_path / "two.csv").write_text("up,date,down\n" + "\n".join(rows) + "\n")
    options = "--task forecast --window 24 --season 12 --horizon 6 --hidden 16 --max-steps 200 --learning-rate 0.02"
    summary, last = figures(tmp_path, *options.split(), "--data", tmp_path / "two.csv")
    assert summary["test_error"] < 0.8 * summary["test_seasonal_naive_error"]
    # A trend of 0.02 and 0.03 a step is a change of 1 a season: the season before is wrong by about that.
    assert last["seasonal_naive_error"] == pytest.approx(1, rel=0.1)
    assert (tmp_path / "run" / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_a_series_from_a_file(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("a,Date,b\n1,x,\n,y,4\n3,z,5\n\n")
    names, dates, values = csv_series.read(path)
    assert (names, dates) == (("a", "b"), ("x", "y", "z"))
    np.testing.assert_array_equal(values, [[1, 4], [2, 4], [3, 5]])
    assert csv_series.read(forecast.weekly_carbon_dioxide()).values.shape == (2284, 1)
    for content, message in (
        ("", "is empty"),
        ("date\nx\n", "expected a column of dates and columns of numbers, with commas between, got \\['date'\\]"),
        ("date;a\nx;1\n", "got \\['date;a'\\]"),
        ("date,a\n\n\nx,one\n", "line 4, a: 'one' is not a number"),
        ('date,a\nx,"' + "1" * 200_000, "field larger than field limit"),
        ("date,a\nx,1\ny\n", "line 3 has 1 cells, the header 2"),
        ("date,a\nx,one\n", "line 2, a: 'one' is not a number"),
        ("date,a\nx,\n", "a has no number"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            csv_series.read(path)


def test_batches_depend_on_their_position_alone():
    for name in ("adding", "copy", "digits", "forecast"):
        task = TASKS[name].make(train.parse(["--task", name]))
        whole, later = task.batches(0), task.batches(3)
        for _ in range(3):
            next(whole)
        for a, b, c in zip(next(whole), next(later), next(later)):
            np.testing.assert_array_equal(a, b)
            assert not np.array_equal(b, c)


@pytest.mark.slow
def test_digits_as_stated(tmp_path):
    process("--task", "digits", "--run-dir", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_forecast_as_stated(tmp_path):
    process("--task", "forecast", "--run-dir", "run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_error"] < 0.5 * summary["test_seasonal_naive_error"]


@pytest.mark.slow
def test_adding_over_400_steps_is_solved_by_the_lstm_alone(tmp_path):
    losses = {}
    for cell in ("lstm", "rnn"):
        run(["--task", "adding", "--cell", cell, "--run-dir", str(tmp_path / cell)])
        losses[cell] = json.loads((tmp_path / cell / "summary.json").read_text())["valid_loss"]
    assert losses["lstm"] < 0.01
    assert losses["rnn"] > 0.1


def test_epochs_take_every_example_once_and_go_on_from_any_batch():
    taken = list(map(epochs(10, 4, 7), range(10)))
    order = np.concatenate(taken).reshape(4, 10)
    for each in order:
        np.testing.assert_array_equal(np.sort(each), np.arange(10))
    assert len({tuple(each) for each in order}) == 4
    np.testing.assert_array_equal(epochs(10, 4, 7)(3), taken[3])
    assert not np.array_equal(epochs(10, 4, 8)(0), taken[0])
