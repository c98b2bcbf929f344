"""Output that goes on without a reader, text that cannot control a terminal, and signals at any time."""

import gc
import io
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import jax
import pytest
from rich.console import Console
from training_runs import ENVIRONMENT, ROOT, SMALL, TEXT, read_summary, run_command

from jaxlstm.errors import optional_package
from jaxlstm.training import cli, output, stop_signals
from jaxlstm.training.data.text import CharVocabulary
from jaxlstm.training.metrics import draw_curves, print_line
from jaxlstm.training.tasks import TASKS, language

HOSTILE = "\x1b[2Jclear\x9b31m \x07bell\x7f\ttab"
SPELLED = r"\x1b[2Jclear\x9b31m \x07bell\x7f" + "\ttab"


def test_printable_spells_control_characters_but_newline_and_tab():
    assert output.printable(HOSTILE + "\nЯ 世 é") == SPELLED + "\nЯ 世 é"
    kept = {c for c in output.printable("".join(map(chr, range(2**12)))) if unicodedata.category(c) == "Cc"}
    assert kept == {"\n", "\t"}


def test_print_line_keeps_escape_sequences_from_the_terminal():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    print_line(console, HOSTILE.replace("\t", " "))
    assert console.file.getvalue() == SPELLED.replace("\t", " ") + "\n"


def test_error_messages_are_one_printable_line():
    with pytest.raises(SystemExit) as end, cli.one_line_errors("train.py"):
        raise ValueError("no text '\x1b[2J'\nsecond line")
    assert end.value.code == "train.py: no text '\\x1b[2J' second line"


def lenient_stdout(monkeypatch, descriptor, encoding="utf-8"):
    """Replaces standard output by a lenient one on a file descriptor."""
    stream = io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    output.make_output_lenient()
    return sys.stdout


def test_lenient_output_escapes_what_the_encoding_lacks(monkeypatch):
    read, write = os.pipe()
    lenient_stdout(monkeypatch, write, "ascii")
    print("Я ok \udcff")
    assert os.read(read, 100) == b"\\u042f ok \\udcff\n"


def test_lenient_output_drops_what_a_closed_pipe_or_a_full_device_refuses(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = lenient_stdout(monkeypatch, write)
    print("text", flush=True)
    with pytest.raises(SystemExit) as end:
        output.check_written(stream)
    assert end.value.code == 128 + signal.SIGPIPE
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY)
        stream = lenient_stdout(monkeypatch, full)
        print("text", flush=True)
        with pytest.raises(OSError, match="cannot write to standard output: No space left on device"):
            output.check_written(stream)


def test_lenient_output_drops_what_does_not_fit_into_a_non_blocking_pipe(monkeypatch):
    read, write = os.pipe()
    os.set_blocking(write, False)
    lenient_stdout(monkeypatch, write)
    for _ in range(40):
        print("x" * 2**14, flush=True)
    assert os.read(read, 10) == b"x" * 10


def test_lenient_output_replaces_closed_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    output.make_output_lenient()
    with sys.stdout, sys.stderr:
        print("text", flush=True)


def sample_on_a_terminal(monkeypatch, text):
    monkeypatch.setattr(TASKS["charlm"], "generate_text", lambda *_, **__: text)
    monkeypatch.setattr(cli.config, "load_config", lambda *_: (cli.Options(), {}))
    console = Console(file=io.StringIO(), force_terminal=True)
    cli.sample(cli.Options(sample=Path("run")), console)
    return console.file.getvalue()


def test_sample_on_a_terminal_spells_control_characters(monkeypatch):
    assert sample_on_a_terminal(monkeypatch, HOSTILE + "\r\nline") == SPELLED + "\nline\n"


@pytest.mark.parametrize(("characters", "expected"), [("\n ab", "\n"), (" ab", " "), ("ab", "a")])
def test_charlm_starts_without_a_prompt_from_any_vocabulary(monkeypatch, characters, expected):
    monkeypatch.setattr(language, "generate_text", lambda *_, prompt, **__: f"<{prompt}>")
    options = {"prompt": None, "length": 1, "key": jax.random.key(0), "temperature": 1.0}
    text = TASKS["charlm"].generate_text(cli.Options(), {"vocabulary": characters}, print, **options)
    assert text == f"{expected}<{expected}>"
    CharVocabulary(characters).encode(expected)


@pytest.mark.slow
def test_sample_needs_no_prompt_where_the_text_has_no_newline(tmp_path):
    (tmp_path / "text.txt").write_text("abcde" * 400)
    run_command("--data", "text.txt", "--run-dir", "run", "--max-steps", 1, *SMALL, cwd=tmp_path)
    assert len(run_command("--sample", "run", "--length", 20, cwd=tmp_path)) == len("a") + 20 + len("\n")


# Figures


STRANGE = ("$x^{", "a$b$c", r"$\frac{$", r"\$x$y$", "\udcff", "^_{")


@pytest.mark.slow
def test_curves_draw_strange_names(tmp_path):
    rows = [{"step": step, "split": split, "loss": 1.0} for step, split in enumerate(("train", "valid"))]
    for name in STRANGE:
        draw_curves(tmp_path / "curves.png", rows, name, "nats")


def test_missing_package_is_named_as_on_pypi():
    message = r"--task digits needs scikit-learn, which is not installed: pip install 'jaxlstm\[tasks\]'"
    with (
        pytest.raises(ImportError, match=message),
        optional_package("sklearn", extra="tasks", purpose="--task digits", distribution="scikit-learn"),
    ):
        raise ModuleNotFoundError(name="sklearn")


# Signals


@pytest.fixture
def signal_handlers():
    """Sets the default handlers of the stop signals, which a shell may have ignored, and restores them."""
    handlers = {kind: signal.signal(kind, signal.SIG_DFL) for kind in stop_signals.STOP_SIGNALS}
    yield
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("kind", stop_signals.STOP_SIGNALS)
def test_stop_signals_end_the_start_up_with_one_line(capsys, kind):
    stop_signals.raise_on_stop_signals()
    with pytest.raises(SystemExit) as end, cli.one_line_errors("train.py"):
        signal.raise_signal(kind)
    assert end.value.code == 128 + kind
    assert capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.usefixtures("signal_handlers")
def test_stop_signal_in_a_garbage_collection_is_not_lost(monkeypatch, capsys):
    def callback(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGTERM)

    def collect_and_wait() -> None:
        gc.collect()
        time.sleep(60)

    stop_signals.raise_on_stop_signals()
    monkeypatch.setattr(sys, "unraisablehook", cli._handle_unraisable)
    gc.callbacks.append(callback)
    start = time.monotonic()
    with pytest.raises(stop_signals.Interrupted, match="SIGTERM"):
        collect_and_wait()
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("signal_handlers")
def test_hangup_is_caught_unless_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop_signals.raise_on_stop_signals()
    received = stop_signals.catch_stop_signals()
    signal.raise_signal(signal.SIGHUP)
    assert received == []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    received = stop_signals.catch_stop_signals()
    signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGHUP]


# The command in a subprocess


@pytest.fixture
def default_sigint():
    """Makes subprocesses receive SIGINT, which the subprocesses of a shell's background job ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


RUN = [
    "--data",
    "text.txt",
    "--run-dir",
    "run",
    "--max-steps",
    "30",
    "--valid-every",
    "15",
    "--save-every",
    "10",
    *SMALL,
]


def start(*arguments, cwd, wrapper=(), **options):
    """Starts ``train.py`` in a subprocess, by a wrapper if there is one."""
    (cwd / "text.txt").write_text(TEXT, encoding="utf-8")
    command = [*wrapper, sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, **{"env": ENVIRONMENT, "stderr": subprocess.PIPE, **options})


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["ascii", "closed pipe", "/dev/full", "closed"])
def test_run_goes_on_whatever_happens_to_its_output(tmp_path, stdout):
    options = {}
    if stdout == "ascii":
        options = {"env": ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, "stdout": subprocess.PIPE}
    elif stdout == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        options = {"stdout": write}
    elif stdout == "/dev/full":
        options = {"stdout": os.open(stdout, os.O_WRONLY)}
    else:
        options = {"wrapper": ("bash", "-c", 'exec "$0" "$@" >&-')}
    process = start(*RUN, cwd=tmp_path, **options)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, b"")
    assert read_summary(tmp_path / "run")["steps"] == 30
    assert (tmp_path / "run" / "checkpoints" / "30").is_dir()


@pytest.mark.slow
def test_sample_reports_a_full_device_and_is_quiet_on_a_closed_pipe(tmp_path):
    start(*RUN, cwd=tmp_path, stdout=subprocess.DEVNULL).communicate(timeout=240)
    with open("/dev/full", "w") as full:
        process = start("--sample", "run", cwd=tmp_path, stdout=full)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (1, b"train.py: cannot write to standard output: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    process = start("--sample", "run", cwd=tmp_path, stdout=write)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, b"")


@pytest.mark.slow
@pytest.mark.usefixtures("default_sigint")
def test_program_jaxlstm_ends_cleanly_during_the_imports(tmp_path):
    for n in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", "from jaxlstm.training.commands import main; main()", "train", "--help"],
            cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(0.2 + 0.3 * n)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGINT, 128 + signal.SIGINT)
        assert errors in (b"", b"jaxlstm train: interrupted\n")


@pytest.mark.slow
@pytest.mark.usefixtures("default_sigint")
def test_interrupted_process_skips_the_teardown(tmp_path):
    code = """
import atexit, os, signal
atexit.register(os.abort)  # runs after the functions registered later
from jaxlstm.training import cli
cli.set_up_process()
with cli.one_line_errors("train.py"):
    print("started")
    signal.raise_signal(signal.SIGINT)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert result.stdout == b"started\n"
    assert (result.returncode, result.stderr) == (128 + signal.SIGINT, b"train.py: interrupted\n")


@pytest.mark.slow
@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_any_time_end_cleanly(tmp_path, kind):
    """From the imports to the training loop; a run that has begun ends with 128 plus the signal."""
    for n in range(16):
        process = start(*RUN, "--max-steps", "1000000", cwd=tmp_path, stdout=subprocess.PIPE)
        time.sleep(0.1 + 0.5 * n)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (-kind, 128 + kind), errors
        assert re.fullmatch(rb"(train.py: interrupted\n)?", errors), errors
        subprocess.run(["rm", "-rf", str(tmp_path / "run")], check=True)
