"""The command, as it is typed."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
CACHE = tempfile.TemporaryDirectory(prefix="jaxlstm-cache-")  # compiled programs, for as long as the tests run
ENVIRONMENT |= {
    "XDG_CACHE_HOME": CACHE.name,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "PYTHONIOENCODING": "utf-8",
}
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

SMALL = ["--hidden", "16", "--embedding", "8", "--batch", "4", "--window", "16", "--log-every", "10"]
TEXT = "Привет, мир! The quick brown fox jumps over the lazy dog. 世界\n" * 60


def process(*arguments, cwd):
    """The command in a process of its own, as it is typed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def as_users_have_it():
    """JAX without the strictness of the tests; signals as they were before."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        for kind, usual in handlers.items():
            signal.signal(kind, usual)


def command(*arguments, cwd, fails=False):
    """The command in this process, which has imported it: what it prints. `fails`: whether, or with what code."""
    out = io.StringIO()
    ended = 0
    printing = contextlib.redirect_stdout(out), contextlib.redirect_stderr(out)
    with contextlib.chdir(cwd), as_users_have_it(), printing[0], printing[1]:
        try:
            train.obey([str(argument) for argument in arguments], Console(file=out, width=200))
        except SystemExit as end:
            ended = end.code
    if isinstance(ended, str):  # the line that Python prints, before it ends with 1
        print(ended, file=out)
        ended = 1
    assert bool(ended) == bool(fails), out.getvalue()
    assert fails in (False, True, ended)
    return out.getvalue()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a text of three scripts: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--data", "text.txt", "--run-dir", "run", "--max-steps", 60, "--valid-every", 20, "--seed", 3]
    return folder / "run", command(*arguments, *SMALL, cwd=folder)


def test_what_a_run_leaves_behind(run):
    folder, _ = run
    rows = metrics(folder)
    assert all(list(row)[:4] == ["step", "split", "loss", "characters_per_second"] for row in rows)
    assert all(list(row)[4:] == (["skipped"] if row["split"] == "train" else []) for row in rows)
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    assert [row["step"] for row in train] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in valid] == [20, 40, 60]
    assert train[-1]["loss"] < train[0]["loss"] < math.log(len(set(TEXT))) + 0.5
    assert all(row["characters_per_second"] > 0 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"valid_loss", "best_step", "steps", "parameters", "wall_seconds", "device"}
    best = min(valid, key=lambda row: row["loss"])
    assert (summary["valid_loss"], summary["best_step"]) == (best["loss"], best["step"])
    assert summary["steps"] == 60
    vocabulary, embedding, hidden = len(set(TEXT)), 8, 16
    lstm = 4 * hidden * (embedding + hidden + 1)
    assert summary["parameters"] == vocabulary * embedding + lstm + vocabulary * (hidden + 1)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["options"]["hidden"] == 16
    assert config["options"]["seed"] == 3
    assert config["vocabulary"] == "".join(sorted(set(TEXT)))
    assert (folder / "best.msgpack").stat().st_size > 4 * summary["parameters"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plain_lines_where_there_is_no_terminal(run):
    _, printed = run
    assert "\x1b" not in printed
    assert re.search(r"step +60  loss \d\.\d{4} nats  \d\.\d{4} bits/char +[\d,]+ char/s  0:00 left", printed)
    assert re.search(r"step +60  loss \d\.\d{4} nats .* validation", printed)
    assert "    | " in printed
    assert "python train.py --sample run" in printed


def test_a_sample_goes_on_from_its_prompt_and_is_repeatable(run):
    folder, _ = run
    arguments = ["--sample", folder, "--prompt", "The ", "--length", 50, "--temperature", 0.8]
    first, second = (command(*arguments, cwd=folder.parent) for _ in range(2))
    assert first == second
    assert first.startswith("The ")
    assert len(first) == len("The ") + 50 + len("\n")
    assert set(first) <= set(TEXT)


@pytest.mark.slow
def test_every_option_of_a_language_modeller(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = "--cell peephole --layer-norm --projection 8 --tied --layers 2 --dropout 0.1 --input-dropout 0.1"
    options += " --embedding-dropout 0.1"
    options += " --variational --recurrent-dropout 0.1 --weight-drop 0.2 --zoneout-h 0.1 --zoneout-c 0.1"
    options += " --activation 2 --temporal-activation 1 --optimizer asgd --learning-rate 2"
    arguments = ["--data", "text.txt", "--run-dir", "run", "--max-steps", 40, "--valid-every", 5, *options.split()]
    command(*arguments, *SMALL, cwd=tmp_path)
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert all(row["averaged_steps"] >= 0 for row in metrics(tmp_path / "run") if row["split"] == "valid")
    sample = command("--sample", "run", "--length", 20, "--prompt", "The", cwd=tmp_path)
    assert len(sample) == 24


def test_a_seed_makes_a_run_repeatable(run, tmp_path):
    folder, _ = run
    options = ["--data", folder.parent / "text.txt", "--max-steps", 60, "--valid-every", 20, *SMALL]
    losses = {}
    for seed in (3, 4):
        command(*options, "--run-dir", tmp_path / str(seed), "--seed", seed, cwd=tmp_path)
        losses[seed] = [row["loss"] for row in metrics(tmp_path / str(seed))]
    wanted = [row["loss"] for row in metrics(folder)]
    assert losses[3] == wanted
    assert losses[4] != wanted


@pytest.mark.slow  # seconds of a clock; the one that is put forward, in test_checkpoints, is fast
def test_the_clock_bounds_a_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    command("--data", "text.txt", "--run-dir", "run", "--max-seconds", 4, *SMALL, cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] > 1
    assert summary["wall_seconds"] < 4 + 12  # the last validation, compiled for the first time, on a busy machine
    assert math.isfinite(summary["valid_loss"])


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_its_results_written(tmp_path):
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
    assert re.search(r"SIGINT received; stopped after step ([\d,]+); saved: python train.py --resume run\n", printed)
    assert "Traceback" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["valid_loss"])
    assert (tmp_path / "run" / "best.msgpack").is_file()


def test_help_documents_every_option_and_its_unit(tmp_path):
    printed = command("--help", cwd=tmp_path)
    examples = [line for line in train.__doc__.splitlines() if line.startswith("python train.py")]
    assert set(examples) < {line.strip() for line in printed.splitlines()}  # each on a line of its own
    for option in dataclasses.fields(train.Options):
        assert f"--{option.name.replace('_', '-')}" in printed
    for unit in ("in seconds", "in steps", "Characters per stream"):
        assert unit in " ".join(printed.replace("│", " ").split())


@pytest.mark.slow
def test_the_command_as_it_is_typed(run, tmp_path):
    folder, _ = run
    text = folder.parent / "text.txt"
    process(
        "--data", text, "--run-dir", "run", "--max-steps", 60, "--valid-every", 20, "--seed", 3, *SMALL, cwd=tmp_path
    )
    assert process("--sample", "run", "--prompt", "The ", cwd=tmp_path).stdout.startswith("The ")
    refused = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--data", "none"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert re.fullmatch(r"train\.py: no text 'none': .*\n", refused.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "no text 'missing.txt': neither a file nor one of the known names"),
        (["--data", "short.txt"], "90 tokens to train on are fewer than batch x window + window = 2,112"),
        (["--data", "tiny.txt"], "9 characters are too few: the last tenth is for validation"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "latin.txt"], "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        (["--run-dir", "full"], "--run-dir full is not an empty folder; a run never writes over another"),
        (["--run-dir", "short.txt"], "--run-dir short.txt is not an empty folder"),
        (["--sample", "nowhere"], "--sample nowhere is not the folder of a run"),
        (["--sample", "full"], "is not the configuration of a run"),
        (["--hidden", "0"], "--hidden must be greater than 0, got 0"),
        (["--dropout", "1"], "--dropout must lie in [0, 1), got 1"),
        (["--temperature", "-1"], "--temperature must be finite and not negative, got -1"),
        (["--temperature", "nan"], "--temperature must be finite and not negative, got nan"),
        (["--seed", str(2**63)], f"--seed must be less than 2**63, got {2**63}"),
        (["--task", "wordlm", "--data", "short.txt"], "short.txt is one line: words are split by lines"),
        (["--task", "adding", "--window", "1"], "--window must be at least 2 for --task adding, got 1"),
        (["--task", "digits", "--data", "short.txt"], "--task digits has no use for --data, got short.txt"),
        (["--max-seconds", "nan"], "--max-seconds must be greater than 0, got nan"),
        (["--hidden", "many"], "Error parsing --hidden: invalid literal for int() with base 10: 'many'"),
        (["--colour", "blue"], "--colour"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_mistakes_get_one_line_and_no_traceback(tmp_path, arguments, message):
    (tmp_path / "tiny.txt").write_text("too short")
    (tmp_path / "short.txt").write_text("too short." * 10)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    said = " ".join(command(*arguments, cwd=tmp_path, fails=True).replace("│", " ").split())
    assert "Traceback" not in said
    assert message in said
    assert (tmp_path / "full" / "config.json").read_text() == "{}"


def test_a_sample_names_the_characters_it_does_not_know(run):
    folder, _ = run
    said = command("--sample", folder, "--prompt", "The %", cwd=folder.parent, fails=True)
    assert said == f"train.py: not in the vocabulary of {len(set(TEXT))} characters: '%'\n"


def test_a_sample_is_printed_as_it_is(run, monkeypatch):
    folder, _ = run
    text = "\tif x:\r\n\t\ty = a[:x:]  # [b]\x0c"
    monkeypatch.setattr(train.TASKS["charlm"], "write", lambda *_, **__: text)
    assert command("--sample", folder, cwd=folder.parent) == text + "\n"


def test_words_go_on_from_words(tmp_path):
    (tmp_path / "run").mkdir()
    config = {"options": {"task": "wordlm"}, "vocabulary": ["<eos>", "<unk>", "cat"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    said = command("--sample", "run", "--prompt", " ", cwd=tmp_path, fails=True)
    assert said == "train.py: --prompt must have at least one character or word, got ' '\n"


def test_rows_that_do_not_lie_evenly_over_a_mesh_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train.devices, "begin", lambda *_: jax.make_mesh((2, 1), train.devices.AXES))
    said = command("--batch", "3", "--mesh", "data=2", "--run-dir", "run", cwd=tmp_path, fails=True)
    assert said == "train.py: --batch 3 does not lie evenly over data=2 of --mesh\n"
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
def test_what_the_machine_or_the_user_ends_is_one_line(tmp_path, monkeypatch, error, code, message):
    def fails(*_):
        raise error

    monkeypatch.setattr(train, "train", fails)
    assert command("--run-dir", "run", cwd=tmp_path, fails=code) == message


def test_a_damaged_checkpoint_is_one_line(run, tmp_path):
    folder, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "best.msgpack"
    path.write_bytes(path.read_bytes()[:1000])
    said = command("--sample", copy, cwd=tmp_path, fails=True)
    assert re.fullmatch(r"train\.py: .*best.msgpack is damaged or of another model: .*\n", said)


@pytest.mark.slow
def test_the_default_run_learns_the_language_reference(tmp_path):
    """Below what the frequencies of pairs of characters give on the same split of Python 3.11's text, 2.32 nats."""
    process("--max-seconds", 120, "--run-dir", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["valid_loss"] < 2.2
