"""The command ``jaxlstm`` and ``python -m jaxlstm.diagnostics``: subcommands, help, missing packages."""

import importlib
import os
import re
import runpy
import subprocess
import sys

import pytest
from training_runs import ENVIRONMENT, ROOT, SMALL, TEXT, run_command

from jaxlstm.training import commands


def run_jaxlstm(monkeypatch, capsys, *arguments, fails=False):
    """Runs ``jaxlstm`` in this process and returns its output."""
    monkeypatch.setattr(sys, "argv", ["jaxlstm", *map(str, arguments)])
    message = ""
    try:
        commands.main()
    except SystemExit as end:
        message = str(end.code or "")
    assert bool(message) == fails, message
    return capsys.readouterr().out + message


def test_jaxlstm_without_arguments_prints_help(monkeypatch, capsys):
    printed = run_jaxlstm(monkeypatch, capsys)
    assert printed == run_jaxlstm(monkeypatch, capsys, "--help")
    for name in ("train", "sample", "inspect", "explore", "vanishing"):
        assert f"\n  {name} " in printed


def test_jaxlstm_names_an_unknown_command(monkeypatch, capsys):
    printed = run_jaxlstm(monkeypatch, capsys, "fit", fails=True)
    assert printed == "jaxlstm: no command 'fit', expected one of train, sample, inspect, explore, vanishing"


def test_jaxlstm_help_to_a_closed_pipe_prints_no_traceback():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; sys.argv = ['jaxlstm']; from jaxlstm.training.commands import main; main()"
    run = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_jaxlstm_command_has_help(monkeypatch, capsys, name):
    module, function = commands.COMMANDS[name][0].split(":")
    monkeypatch.setattr(importlib.import_module("jaxlstm.training.cli"), "set_up_process", lambda: None)
    assert callable(getattr(importlib.import_module(module), function))
    printed = run_jaxlstm(monkeypatch, capsys, name, "--help")
    assert f"usage: jaxlstm {name} [-h]" in printed
    assert "{None}" not in printed
    assert "(default: None)" not in printed
    assert not re.search(r"'\s+│\n", printed)  # a raw newline in a default


def test_commands_name_the_extra_of_a_missing_package():
    code = """
import runpy, sys
from jaxlstm.training import commands
def error_of(run):
    try:
        run()
    except SystemExit as end:
        print(end.code)
sys.modules["tyro"] = None
for name in commands.COMMANDS:
    sys.argv = ["jaxlstm", name]
    error_of(commands.main)
sys.argv = ["train.py"]
error_of(lambda: runpy.run_path("train.py", run_name="__main__"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    names = [*(f"jaxlstm {name}" for name in commands.COMMANDS), "train.py"]
    assert run.stdout.splitlines() == [f"{n}: tyro is not installed: pip install 'jaxlstm[train]'" for n in names]


def test_one_line_imports_names_the_top_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^tool: matplotlib is not installed"), commands.one_line_imports("tool"):
        importlib.import_module("matplotlib.figure")


def test_diagnostics_module_runs_the_same_commands(monkeypatch):
    monkeypatch.setattr(importlib.import_module("jaxlstm.training.cli"), "set_up_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["jaxlstm.diagnostics", "vanishing", "--steps", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jaxlstm.diagnostics", run_name="__main__", alter_sys=False)
    assert end.value.code == "python -m jaxlstm.diagnostics vanishing: --steps must be at least 2, got 1"
    monkeypatch.setattr(sys, "argv", ["jaxlstm.diagnostics"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("jaxlstm.diagnostics", run_name="__main__")
    assert end.value.code.endswith(": expected a command, one of vanishing, inspect, explore (--help describes them)")


@pytest.mark.slow
def test_jaxlstm_trains_samples_and_inspects(tmp_path):
    def jaxlstm(*arguments):
        program = "from jaxlstm.training.commands import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=240,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    code, printed, _ = jaxlstm("train", "--data", "text.txt", "--max-steps", 20, "--run-dir", "run", *SMALL)
    assert code == 0
    assert "jaxlstm train --sample run" in printed
    code, printed, _ = jaxlstm("sample", "run", "--prompt", "The ", "--length", 30)
    assert code == 0
    assert printed == run_command("--sample", "run", "--prompt", "The ", "--length", 30, cwd=tmp_path)
    code, printed, _ = jaxlstm("inspect", "run", "--text", "The fox")
    assert code == 0
    assert "gates.png" in printed
    assert jaxlstm("sample", "none") == (1, "", "jaxlstm sample: RUN_DIR none is not the folder of a run: "
                                         "none/config.json: No such file or directory\n")  # fmt: skip
