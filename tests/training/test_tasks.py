"""Every task learns in a short run (default tier or slow), and reaches its documented result (slow)."""

import dataclasses
import os
import re
import typing

import numpy as np
import pytest
from training_runs import read_metrics, read_summary, run_command, run_process, train

import jaxlstm
from jaxlstm.training.cli import parse
from jaxlstm.training.config import Options
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import DataError, fingerprint
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.tasks import TASKS, forecast
from jaxlstm.training.tasks.task import OPTION_GROUPS, unused_options

STORY = "the cat sat on the mat .\nthe dog lay on the rug .\na bird flew over the mat .\n" * 80
SMALL_SERIES = ["--task", "forecast", "--window", "8", "--season", "4", "--horizon", "2"]


def train_task(folder, *arguments):
    """Trains and returns the summary of the run and the metrics of its last validation."""
    run_dir = folder / "run"
    train([*map(str, arguments), "--run-dir", str(run_dir), "--log-every", "1000", "--diagnose", "0"])
    return read_summary(run_dir), [row for row in read_metrics(run_dir) if row["split"] == "valid"][-1]


def test_task_option_takes_the_names_of_the_table():
    assert set(typing.get_args(typing.get_type_hints(Options)["task"])) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_task_defaults_are_the_defaults_of_its_command_line(name):
    options = parse(["--task", name])
    assert options.task == name
    assert all(getattr(options, field) == value for field, value in TASKS[name].DEFAULTS.items())


def test_typed_options_override_task_defaults():
    assert parse(["--task", "adding", "--window", "30"]).window == 30


def test_learning_rate_default_belongs_to_its_optimizer():
    def rate(*arguments):
        return parse(["--task", "wordlm", *arguments]).learning_rate

    assert rate() == rate("--optimizer", "asgd") == 20
    assert rate("--optimizer", "adamw") is rate("--optimizer=adamw") is None
    assert rate("--optimizer", "adamw", "--learning-rate", "3") == 3


def test_regularization_of_activations_has_names_of_its_own():
    """`jaxlstm.LSTM` calls the nonlinearity ``activation``."""
    options = parse(["--activation-regularization", "2", "--temporal-activation-regularization", "1"])
    assert (options.activation_regularization, options.temporal_activation_regularization) == (2.0, 1.0)
    with pytest.raises(ValueError, match="unknown option --activation; did you mean --activation-regularization"):
        parse(["--activation", "2"])


def test_residual_builds_residual_stack_with_dropout_in_every_layer():
    stack = build_lstm(parse(["--residual", "--hidden", "8", "--dropout", "0.3"]), 4)
    assert isinstance(stack, jaxlstm.ResidualStack)
    assert (stack.input_size, stack.hidden_size, stack.num_layers, stack.dropout) == (4, 8, 1, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--task adding --bidirectional", "--task digits", "--projection 8"])
def test_residual_stack_learns_and_resumes(tmp_path, options):
    """The text makes a language model read its own validation part, so that three layers learn it within 60 steps."""
    (tmp_path / "text.txt").write_text("abc" * 3000)
    data = [] if "--task" in options else ["--data", str(tmp_path / "text.txt"), "--embedding", "8"]
    common = ["--residual", "--layers", "3", "--hidden", "16", "--batch", "16", "--save-every", "20", *data]
    summary, last = train_task(tmp_path, *options.split(), *common, "--max-steps", "60", "--valid-every", "10")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["split"] == "valid"]
    assert last["loss"] < 0.9 * losses[0]
    train(["--resume", str(tmp_path / "run"), "--max-steps", "70"])
    assert read_summary(tmp_path / "run")["steps"] == 70
    assert summary["parameters"] == read_summary(tmp_path / "run")["parameters"]


class RecordingOptions(Options):
    """Options that record the names that are read."""

    def __getattribute__(self, name):
        super().__getattribute__("__dict__").setdefault("read", set()).add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("task", TASKS)
def test_task_reads_exactly_the_options_that_it_declares(task):
    defaults = parse(["--task", task])
    options = RecordingOptions(**{field.name: getattr(defaults, field.name) for field in dataclasses.fields(Options)})
    options.__dict__["read"].clear()
    TASKS[task].make(options)
    for name in unused_options():
        assert (name in options.__dict__["read"]) == (name not in TASKS[task].UNUSED), name


@pytest.mark.parametrize("task", TASKS)
def test_unused_option_is_rejected_by_name(task):
    values = dict.fromkeys(unused_options(), "0.3") | {"data": "x", "window": "9", "embedding": "7"}
    values |= dict.fromkeys(OPTION_GROUPS["forecasting"], "7") | {"decimal": ",", "language": "even_pairs"}
    values |= {"pooling": "mean", "class_weights": "balanced"}
    for name in TASKS[task].UNUSED:
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(
            ValueError, match=f"--task {task} does not use {option}{'' if name == 'tied' else ', got '}"
        ):
            parse(["--task", task, option, *([] if name == "tied" else [values[name]])])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lr", "; did you mean --learning-rate?"),
        ("--batch-size=4", "; did you mean --batch?"),
        ("--hidden-size", "; did you mean --hidden?"),
        ("--no-layernorm", "; did you mean --layer-norm?"),
        ("--qqq", ""),
    ],
)
def test_unknown_option_is_named_with_the_one_meant(option, meant):
    message = f"unknown option {option.partition('=')[0]}{meant} (--help lists the options)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse([option, "3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cell lsmt", "--cell must be one of 'lstm', 'peephole',.*; got 'lsmt'; did you mean 'lstm'?"),
        ("--cell=lsmt", "--cell must be one of .*; got 'lsmt'; did you mean 'lstm'?"),
        ("--implementation cuda", "--implementation must be one of 'auto', 'scan'.*; got 'cuda'.*"),
        ("--task charml", "--task must be one of 'charlm'.*; did you mean 'charlm'?"),
        ("--hidden big", "--hidden must be an integer, got big"),
        ("--hidden 1e3", "--hidden must be an integer, got 1e3"),
        ("--learning-rate=x", "--learning-rate must be a number, got x"),
        ("--hidden", "--hidden needs a value; .*"),
        ("--hidden --tied", "--hidden needs a value; .*"),
        ("-x", "unknown option -x .*"),
        ("my.txt", "unexpected argument my.txt; did you mean --data my.txt?"),
        ("--tied my", r"unexpected argument my \(--help lists the options\)"),
        ("--tied=yes", "--tied takes no value, got yes; use --tied or --no-tied"),
    ],
)
def test_mistaken_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message.replace('?', '[?]')}$"):
        parse(arguments.split())


def test_values_may_begin_with_a_minus():
    assert parse(["--prompt", "-- a b"]).prompt == "-- a b"
    assert parse(["--prompt=-a"]).prompt == "-a"
    with pytest.raises(ValueError, match="--clip must be greater than 0, got -1"):
        parse(["--clip", "-1"])
    with pytest.raises(ValueError, match=r"^--prompt needs a value; .* is given as --prompt=-VALUE$"):
        parse(["--prompt", "-a"])


def test_every_option_belongs_to_a_task():
    assert all(any(name not in module.UNUSED for module in TASKS.values()) for name in unused_options())


@pytest.mark.parametrize("name", ["charlm", "wordlm"])
def test_fingerprint_tells_texts_with_the_same_description_apart(tmp_path, name):
    def make(text):
        (tmp_path / "text.txt").write_text(text)
        return TASKS[name].make(parse(["--task", name, "--data", str(tmp_path / "text.txt"), "--window", "5"]))

    task, same, other = make(STORY), make(STORY), make(STORY.replace("c", "C"))
    assert task.fingerprint == same.fingerprint != other.fingerprint
    assert task.description == same.description == other.description


def test_fingerprint_of_a_series_changes_with_every_row(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("date,a\n" + "".join(f"{n},{n * n % 7}\n" for n in range(99)))
    options = parse([*SMALL_SERIES, "--data", str(path)])
    before = forecast.make(options).fingerprint
    with path.open("a") as file:
        file.write("99,3\n")
    assert forecast.make(options).fingerprint != before


def test_fingerprint_depends_on_order_and_boundaries():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(np.arange(3)) != fingerprint(np.arange(3)[::-1])


def test_adding_learns(tmp_path):
    options = "--task adding --window 8 --hidden 16 --batch 64 --max-steps 250 --learning-rate 0.02"
    summary, last = train_task(tmp_path, *options.split())
    assert summary["valid_loss"] < 0.03  # always answering 1 costs 0.167
    assert last["loss"] == pytest.approx(summary["valid_loss"], rel=0.5)


@pytest.mark.slow
def test_copy_learns(tmp_path):
    options = "--task copy --window 2 --hidden 32 --batch 64 --max-steps 250 --learning-rate 0.03"
    _, last = train_task(tmp_path, *options.split())
    assert last["accuracy"] > 0.2  # chance is one eighth
    assert last["loss"] < 0.93 * 10 * np.log(8) / 22


@pytest.mark.slow
def test_digits_learns(tmp_path):
    options = "--task digits --hidden 24 --max-steps 120 --learning-rate 0.02"
    summary, last = train_task(tmp_path, *options.split())
    assert last["accuracy"] > 0.6
    assert summary["test_accuracy"] > 0.6


@pytest.mark.slow
def test_wordlm_learns_and_generates_words(tmp_path):
    (tmp_path / "text.txt").write_text(STORY)
    options = "--task wordlm --embedding 8 --projection 8 --hidden 16 --batch 4 --window 8 --max-steps 150"
    options += " --optimizer adamw --learning-rate 0.02 --clip 1"
    options += " --activation-regularization 0 --temporal-activation-regularization 0"
    options += " --input-dropout 0 --weight-drop 0.1 --dropout 0.1 --prompt x"
    summary, _ = train_task(tmp_path, *options.split(), "--data", tmp_path / "text.txt")
    assert summary["valid_loss"] < 0.6 * np.log(15)
    text = run_command("--sample", "run", "--prompt", "the cat", "--length", 12, cwd=tmp_path)
    assert text.startswith("the cat ")
    assert set(text.split()) <= set(STORY.split())


@pytest.mark.parametrize(
    ("task", "text", "note"),
    [
        (
            "wordlm",
            "\n".join(f"{n}字{n}" for n in range(500)),
            "100% of the words to train on and 100% of those to valid",
        ),
        ("wordlm", STORY, None),
        ("charlm", STORY, None),
    ],
)
def test_language_tasks_tell_of_texts_of_unknown_words(tmp_path, task, text, note):
    (tmp_path / "text.txt").write_text(text)
    options = parse(["--task", task, "--data", str(tmp_path / "text.txt"), "--window", "5"])
    notes = TASKS[task].make(options).notes
    assert notes == () if note is None else note in notes[0]


@pytest.mark.parametrize(
    ("task", "text", "notes"),
    [
        ("wordlm", STORY + "\n" * 500, ("all 72 words to validate on are '\\n', so the loss says little",)),
        ("charlm", STORY + "\n" * 1500, ("all 765 characters to validate on are '\\n', so the loss says little",)),
        (
            "charlm",
            "a" * 2000,
            (
                "all 1,799 characters to train on are 'a', so the loss says little",
                "all 199 characters to validate on are 'a', so the loss says little",
            ),
        ),
    ],
)
def test_language_tasks_tell_of_one_repeated_token(tmp_path, task, text, notes):
    (tmp_path / "text.txt").write_text(text)
    options = parse(["--task", task, "--data", str(tmp_path / "text.txt"), "--window", "5"])
    assert TASKS[task].make(options).notes == notes


@pytest.mark.parametrize("task", ["charlm", "wordlm"])
def test_language_tasks_tell_of_tables(tmp_path, task):
    path = tmp_path / "prices.csv"
    hint = f"{path} is a table by its name: it is read as text; --task forecast forecasts its columns"
    path.write_text("date,price\n" + "2020-01-01,5\n" * 400)
    assert TASKS[task].make(parse(["--task", task, "--data", str(path), "--window", "5"])).notes[0] == hint
    path.write_text("date,price\n" + "2020-01-01,5\n" * 4)
    with pytest.raises(DataError, match=f"to train on are too few .*; {hint}"):
        TASKS[task].make(parse(["--task", task, "--data", str(path)]))


def test_wordlm_reads_a_folder_with_two_files(tmp_path):
    (tmp_path / "ptb.train.txt").write_text(STORY)
    (tmp_path / "ptb.valid.txt").write_text("the cat lay on a penguin .\n")
    options = parse(["--task", "wordlm", "--data", str(tmp_path), "--window", "9"])
    assert TASKS["wordlm"].make(options).description == "1,920 words to train on, 8 to validate, 15 distinct"
    (tmp_path / "ptb.valid.txt").unlink()
    os.mkfifo(tmp_path / "ptb.valid.txt")
    with pytest.raises(DataError, match=r"ptb\.valid\.txt is not a regular file; expected a text file"):
        TASKS["wordlm"].make(options)
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(DataError, match=r"must hold one file \*train\* and one \*valid\*"):
        TASKS["wordlm"].make(options)


@pytest.mark.slow
def test_forecast_of_two_columns_beats_the_naive_forecast_and_draws_a_figure(tmp_path):
    t = np.arange(400)
    rng = np.random.default_rng(0)
    two = np.stack([np.sin(2 * np.pi * t / 12) + 0.02 * t, np.cos(2 * np.pi * t / 12) - 0.03 * t], -1)
    two += 0.02 * rng.normal(size=two.shape)
    rows = [f"{a if n % 50 else ''},{2000 + n},{b}" for n, (a, b) in enumerate(two, 1)]
    (tmp_path / "two.csv").write_text("up,date,down\n" + "\n".join(rows) + "\n")
    options = "--task forecast --window 24 --season 12 --horizon 6 --hidden 16 --max-steps 200 --learning-rate 0.02"
    summary, last = train_task(tmp_path, *options.split(), "--data", tmp_path / "two.csv")
    assert summary["test_mase"] < 0.8 * summary["test_seasonal_naive_mase"]
    # Errors are in units of the mean change over a season, and the trend makes the naive forecast wrong by one of them.
    assert last["seasonal_naive_mase"] == pytest.approx(1, rel=0.1)
    assert (tmp_path / "run" / "forecast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["adding", "copy", "digits", "forecast", "formal"])
def test_batches_depend_on_their_number_only(name):
    task = TASKS[name].make(parse(["--task", name]))
    batches, resumed = task.batches(0), task.batches(3)
    for _ in range(3):
        next(batches)
    batch, same, other = next(batches), next(resumed), next(resumed)
    for array, expected in zip(batch, same):
        np.testing.assert_array_equal(array, expected)
    assert not np.array_equal(batch[0], other[0])


def test_shuffled_batches_draw_every_example_once_per_epoch():
    batches = [shuffled_batches(10, 4, 7)(n) for n in range(10)]
    epochs = np.concatenate(batches).reshape(4, 10)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(shuffled_batches(10, 4, 7)(3), batches[3])
    assert not np.array_equal(shuffled_batches(10, 4, 8)(0), batches[0])


@pytest.mark.slow
def test_digits_reaches_its_documented_accuracy(tmp_path):
    run_process("--task", "digits", "--run-dir", "run", cwd=tmp_path)
    assert read_summary(tmp_path / "run")["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_forecast_reaches_its_documented_error(tmp_path):
    run_process("--task", "forecast", "--run-dir", "run", cwd=tmp_path)
    summary = read_summary(tmp_path / "run")
    assert summary["test_mase"] < 0.35 * summary["test_seasonal_naive_mase"]
    assert summary["test_wql"] < 0.5 * summary["test_seasonal_naive_wql"]
    pytest.importorskip("statsforecast")
    assert summary["test_mase"] < 1.1 * summary["test_autoets_mase"]


@pytest.mark.slow
def test_adding_over_400_steps_is_learned_by_the_lstm_only(tmp_path):
    losses = {}
    for cell in ("lstm", "rnn"):
        run_process("--task", "adding", "--cell", cell, "--run-dir", cell, cwd=tmp_path)
        losses[cell] = read_summary(tmp_path / cell)["valid_loss"]
    assert losses["lstm"] < 0.01
    assert losses["rnn"] > 0.1
