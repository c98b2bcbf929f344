"""Runs of the training command for tests: in this process or in a subprocess."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from jaxlstm import checksum
from jaxlstm.training import cli, config
from jaxlstm.training.loop import Trainer

ROOT = Path(__file__).parent.parent
CACHE = tempfile.TemporaryDirectory(prefix="jaxlstm-cache-")  # compiled programs, deleted at the end of the tests
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
    "XDG_CACHE_HOME": CACHE.name,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "PYTHONIOENCODING": "utf-8",
}
SMALL = ["--hidden", "16", "--embedding", "8", "--batch", "4", "--window", "16", "--log-every", "10"]
TEXT = "Привет, мир! The quick brown fox jumps over the lazy dog. 世界\n" * 60


def run_process(*arguments, cwd):
    """Runs ``python train.py`` in a subprocess; it must succeed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def default_jax():
    """Turns off JAX's strict promotion, which the tests use; restores the signal handlers afterward."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def run_command(*arguments, cwd, fails=False):
    """Runs a command line in this process and returns its output; ``fails`` may be the expected exit code."""
    out = io.StringIO()
    code = 0
    with contextlib.chdir(cwd), default_jax(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.run_cli([str(argument) for argument in arguments], Console(file=out, width=200))
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # Python prints the message and exits with 1
        print(code, file=out)
        code = 1
    assert bool(code) == bool(fails), out.getvalue()
    assert fails in (False, True, code)
    return out.getvalue()


def train(arguments):
    """Trains in this process and returns the output; errors are raised, a stop by SIGTERM is not."""
    console = Console(file=io.StringIO(), width=200)
    try:
        with default_jax():
            Trainer(cli.parse([str(argument) for argument in arguments]), console).run()
    except SystemExit:
        assert "SIGTERM received" in console.file.getvalue()
    return console.file.getvalue()


def write_config(run_dir, options, **entries):
    """Writes the ``config.json`` of a run of the given `Options`."""
    values = {"options": config.to_json(options), "about": "text", "fingerprint": "0", "versions": {}}
    checksum.write_checked_json(run_dir / "config.json", values | entries)


def start_training(folder, arguments):
    """Starts the command in a folder, in a forked process that has imported it already; it prints to ``out.txt``."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["jaxlstm.training.cli"])
    process = processes.Process(target=train_in_child, args=(folder, [str(argument) for argument in arguments]))
    process.start()
    return process


def train_in_child(folder, arguments):
    """Runs the command in this process."""
    os.chdir(folder)
    out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ["XDG_CACHE_HOME"] = CACHE.name
    cli.train_main(arguments, "train.py")


def read_metrics(run_dir):
    """Returns the rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_summary(run_dir):
    """Returns the contents of ``summary.json``."""
    return json.loads((run_dir / "summary.json").read_text())
