"""The training command: outputs, errors and options."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from training_runs import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    TEXT,
    read_metrics,
    read_summary,
    run_command,
    run_process,
    write_config,
)

from jaxlstm.training import cli, sharding
from jaxlstm.training.config import Options, groups
from jaxlstm.training.loop import Trainer
from jaxlstm.training.tasks import TASKS


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run on a text in three scripts: its directory and its output."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--data", "text.txt", "--run-dir", "run", "--max-steps", 60, "--valid-every", 20, "--seed", 3]
    return folder / "run", run_command(*arguments, *SMALL, cwd=folder)


def test_run_writes_metrics_summary_config_and_parameters(finished_run):
    folder, _ = finished_run
    rows = read_metrics(folder)
    assert all(list(row)[:4] == ["step", "split", "loss", "characters_per_second"] for row in rows)
    assert all(list(row)[4:] == (["learning_rate", "skipped"] if row["split"] == "train" else []) for row in rows)
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    assert [row["step"] for row in train] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in valid] == [20, 40, 60]
    assert train[0]["learning_rate"] > train[1]["learning_rate"] > train[-1]["learning_rate"] > 0
    assert train[-1]["loss"] < train[0]["loss"] < math.log(len(set(TEXT))) + 0.5
    assert all(row["characters_per_second"] > 0 for row in rows)
    summary = read_summary(folder)
    assert set(summary) == {"sha256", "valid_loss", "best_step", "steps", "parameters", "wall_seconds", "device"}
    best = min(valid, key=lambda row: row["loss"])
    assert (summary["valid_loss"], summary["best_step"]) == (best["loss"], best["step"])
    assert summary["steps"] == 60
    vocabulary, embedding, hidden = len(set(TEXT)), 8, 16
    lstm = 4 * hidden * (embedding + hidden + 1)
    assert summary["parameters"] == vocabulary * embedding + lstm + vocabulary * (hidden + 1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["options"]["hidden"] == 16
    assert config["options"]["seed"] == 3
    assert config["options"]["data"] == str(folder.parent / "text.txt")  # absolute
    assert config["vocabulary"] == "".join(sorted(set(TEXT)))
    assert (folder / "best.safetensors").stat().st_size > 4 * summary["parameters"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_a_terminal_prints_plain_lines(finished_run):
    _, printed = finished_run
    assert "\x1b" not in printed
    assert re.search(r"step +60  loss \d\.\d{4} nats  \d\.\d{4} bits/char +[\d,]+ char/s  0:00 left", printed)
    assert re.search(r"step +60  loss \d\.\d{4} nats .* validation", printed)
    assert "    | " in printed
    assert "python train.py --sample run" in printed


def test_sample_continues_its_prompt_and_is_repeatable(finished_run):
    folder, _ = finished_run
    arguments = ["--sample", folder, "--prompt", "The ", "--length", 50, "--temperature", 0.8]
    first, second = (run_command(*arguments, cwd=folder.parent) for _ in range(2))
    assert first == second
    assert first.startswith("The ")
    assert len(first) == len("The ") + 50 + len("\n")
    assert set(first) <= set(TEXT)


@pytest.mark.slow
def test_language_model_accepts_every_option(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = "--cell peephole --layer-norm --projection 8 --tied --layers 2 --dropout 0.1 --input-dropout 0.1"
    options += " --embedding-dropout 0.1"
    options += " --variational --recurrent-dropout 0.1 --weight-drop 0.2 --zoneout-h 0.1 --zoneout-c 0.1"
    options += (
        " --activation-regularization 2 --temporal-activation-regularization 1 --optimizer asgd --learning-rate 2"
    )
    arguments = ["--data", "text.txt", "--run-dir", "run", "--max-steps", 40, "--valid-every", 5, *options.split()]
    run_command(*arguments, *SMALL, cwd=tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert all(row["averaged_steps"] >= 0 for row in read_metrics(tmp_path / "run") if row["split"] == "valid")
    sample = run_command("--sample", "run", "--length", 20, "--prompt", "The", cwd=tmp_path)
    assert len(sample) == 24


@pytest.mark.slow
def test_seed_determines_the_losses(finished_run, tmp_path):
    folder, _ = finished_run
    options = ["--data", folder.parent / "text.txt", "--max-steps", 60, "--valid-every", 20, *SMALL]
    losses = {}
    for seed in (3, 4):
        run_command(*options, "--run-dir", tmp_path / str(seed), "--seed", seed, cwd=tmp_path)
        losses[seed] = [row["loss"] for row in read_metrics(tmp_path / str(seed))]
    wanted = [row["loss"] for row in read_metrics(folder)]
    assert losses[3] == wanted
    assert losses[4] != wanted


@pytest.mark.slow  # waits for real seconds; test_checkpointing sets the clock instead
def test_max_seconds_limits_a_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run_command("--data", "text.txt", "--run-dir", "run", "--max-seconds", 4, *SMALL, cwd=tmp_path)
    summary = read_summary(tmp_path / "run")
    assert summary["steps"] > 1
    assert summary["wall_seconds"] < 4 + 12  # the last validation compiles, on a busy machine
    assert math.isfinite(summary["valid_loss"])


@pytest.mark.slow
def test_ctrl_c_stops_a_run_after_writing_its_results(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--data", "text.txt", "--run-dir", "run", "--max-steps", "1000000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    path = tmp_path / "run" / "metrics.jsonl"
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert re.search(r"SIGINT received; saved after step ([\d,]+); to go on:\npython train.py --resume run\n", printed)
    assert "Traceback" not in printed
    summary = read_summary(tmp_path / "run")
    assert math.isfinite(summary["valid_loss"])
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_help_documents_the_options_of_the_task_and_their_units(tmp_path):
    printed = run_command("--help", cwd=tmp_path)
    lines = {line.strip() for line in printed.splitlines()}
    examples = [line for line in cli.DESCRIPTION.format(command="python train.py").splitlines() if "--" in line]
    assert len(examples) == 6
    assert set(examples) < lines  # on separate lines
    for option in dataclasses.fields(Options):
        is_shown = f"--{option.name.replace('_', '-')} " in printed.replace(",", " ")
        assert is_shown == (option.name not in TASKS["charlm"].UNUSED), option.name
    for group in groups():
        assert f" {group} options " in printed
    text = " ".join(printed.replace("│", " ").split())
    for unit in ("in seconds", "in steps", "characters or words per stream"):
        assert unit in text


def test_help_shows_the_defaults_of_the_task(tmp_path):
    text = " ".join(run_command("--task", "adding", "--help", cwd=tmp_path).replace("│", " ").split())
    assert "Peak learning rate. (default: 0.01)" in text
    assert "Hidden size of each layer. (default: 64)" in text


def test_options_are_in_one_group_each():
    names = [field.name for fields in groups().values() for field in fields]
    assert names == [field.name for field in dataclasses.fields(Options)]
    assert list(groups()) == [
        "data", "model", "training", "run", "devices", "prediction", "sampling",
    ]  # fmt: skip


@pytest.mark.slow
def test_train_py_trains_samples_and_refuses(finished_run, tmp_path):
    folder, _ = finished_run
    text = folder.parent / "text.txt"
    run_process(
        "--data", text, "--run-dir", "run", "--max-steps", 60, "--valid-every", 20, "--seed", 3, *SMALL, cwd=tmp_path
    )
    assert run_process("--sample", "run", "--prompt", "The ", cwd=tmp_path).stdout.startswith("The ")
    refused = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--data", "none"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert re.fullmatch(r"train\.py: no text 'none': .*\n", refused.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "no text 'missing.txt': neither a file nor one of the known names"),
        (
            ["--data", "short.txt"],
            "90 characters to train on are too few for --batch 32 and --window 64, which need 2,112",
        ),
        (
            ["--data", "tiny.txt"],
            "8 characters to train on are too few for --batch 32 and --window 64, which need 2,112",
        ),
        (["--data", "empty.txt"], "empty.txt is empty; expected text"),
        (["--data", "latin.txt"], "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        ([*SMALL, "--run-dir", "full"], "--run-dir full is not an empty folder; a run never overwrites another"),
        ([*SMALL, "--run-dir", "short.txt"], "--run-dir short.txt is not an empty folder"),
        (["--sample", "nowhere"], "--sample nowhere is not the folder of a run"),
        (
            ["--sample", "full"],
            "full/config.json is damaged or was not written by this version: it has no sha256",
        ),
        (["--hidden", "0"], "--hidden must be greater than 0, got 0"),
        (["--dropout", "1"], "--dropout must lie in [0, 1), got 1"),
        (["--temperature", "-1"], "--temperature must be finite and not negative, got -1"),
        (["--temperature", "nan"], "--temperature must be finite and not negative, got nan"),
        (["--seed", str(2**63)], f"--seed must be less than 2**63, got {2**63}"),
        (["--task", "wordlm", "--data", "short.txt"], "short.txt is one line: words are split by lines"),
        (["--task", "adding", "--window", "1"], "--window must be at least 2 for --task adding, got 1"),
        (
            ["--task", "formal", "--language", "modular_arithmetic", "--window", "255"],
            "--window must be less than 255 for --task formal, which tests on strings of up to 255 symbols, got 255",
        ),
        (["--task", "digits", "--data", "short.txt"], "--task digits does not use --data, got short.txt"),
        (
            ["--task", "nope"],
            "--task must be one of 'charlm', 'wordlm', 'adding', 'copy', 'digits', 'forecast', 'formal', 'classify'; "
            "got 'nope'",
        ),
        (["--process", "3"], "--coordinator and --process need --processes, got --processes 1"),
        (["--max-seconds", "nan"], "--max-seconds must be greater than 0, got nan"),
        (["--hidden", "many"], "--hidden must be an integer, got many"),
        (["--color", "blue"], "unknown option --color (--help lists the options)"),
        (["--dtype", "int8"], "--dtype must be one of 'float32', 'bfloat16'; got 'int8'"),
        (["my.txt"], "unexpected argument my.txt; did you mean --data my.txt?"),
    ],
)
def test_mistakes_print_one_line_without_traceback(tmp_path, arguments, message):
    (tmp_path / "tiny.txt").write_text("too short")
    (tmp_path / "short.txt").write_text("too short." * 10)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    output = run_command(*arguments, cwd=tmp_path, fails=True)
    assert output.startswith(f"train.py: {message}")
    assert output.index("\n") == len(output) - 1
    assert (tmp_path / "full" / "config.json").read_text() == "{}"


def test_sample_names_unknown_characters(finished_run):
    folder, _ = finished_run
    output = run_command("--sample", folder, "--prompt", "The %", cwd=folder.parent, fails=True)
    assert (
        output
        == f"train.py: not in the vocabulary of {len(set(TEXT))} characters: '%'; remove or replace them in the text\n"
    )


def test_sample_is_printed_literally(finished_run, monkeypatch):
    folder, _ = finished_run
    text = "\tif x:\r\n\t\ty = a[:x:]  # [b]\x0c"
    monkeypatch.setattr(TASKS["charlm"], "generate_text", lambda *_, **__: text)
    assert run_command("--sample", folder, cwd=folder.parent) == text + "\n"


def test_sample_of_words_refuses_a_blank_prompt(tmp_path):
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", Options(task="wordlm"), vocabulary=["<eos>", "<unk>", "cat"])
    output = run_command("--sample", "run", "--prompt", " ", cwd=tmp_path, fails=True)
    assert output == "train.py: --prompt must have at least one character or word, got ' '\n"


@pytest.mark.parametrize(("option", "axis"), [("--batch", "data"), ("--hidden", "model")])
def test_size_not_divisible_by_the_mesh_is_refused_before_the_run_directory_exists(tmp_path, monkeypatch, option, axis):
    sizes = tuple(sharding.parse_mesh(f"{axis}=2").values())
    monkeypatch.setattr(sharding, "initialize_devices", lambda *_: jax.make_mesh(sizes, sharding.AXES))
    output = run_command(option, "3", "--mesh", f"{axis}=2", "--run-dir", "run", cwd=tmp_path, fails=True)
    assert output == f"train.py: {option} 3 is not divisible by {axis}=2 of --mesh\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "train.py: interrupted\n"),
        (MemoryError("no 4 GiB"), 1, "train.py: no 4 GiB\n"),
        (MemoryError(), 1, "train.py: out of memory\n"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no\nrest"), 1, "train.py: RESOURCE_EXHAUSTED: no\n"),
    ],
)
def test_interrupts_and_memory_errors_print_one_line(tmp_path, monkeypatch, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "run", fail)
    assert run_command("--run-dir", "run", cwd=tmp_path, fails=code) == message


def test_damaged_parameters_print_one_line(finished_run, tmp_path):
    folder, _ = finished_run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "best.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    output = run_command("--sample", copy, cwd=tmp_path, fails=True)
    assert re.fullmatch(r"train\.py: .*best.safetensors is damaged: .*\n", output)


@pytest.mark.slow
def test_default_run_learns_the_language_reference(tmp_path):
    """The loss is lower than character bigram frequencies give on the same split of Python 3.11's text, 2.32 nats."""
    run_process("--max-seconds", 120, "--run-dir", "run", cwd=tmp_path)
    assert read_summary(tmp_path / "run")["valid_loss"] < 2.2
