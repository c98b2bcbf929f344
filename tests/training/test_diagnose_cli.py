"""The commands ``inspect``, ``explore`` and ``vanishing``."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console
from training_runs import write_config

from jaxlstm.training import cli, config, inspect_run, params_file
from jaxlstm.training.diagnose_cli import Explore, Inspect, main
from jaxlstm.training.tasks import language


@pytest.fixture
def trained_run(tmp_path):
    """Returns the directory of a character model with initial weights, in the format of ``train.py``."""
    asked = config.Options(hidden=8, embedding=4, layers=2)
    folder = tmp_path / "run"
    folder.mkdir()
    characters = '\n "()abc'
    write_config(folder, asked, vocabulary=characters)
    model = language.build_language_model(asked, len(characters))
    params_file.save_params(folder / params_file.BEST, model.init(jax.random.key(0)))
    return folder


@pytest.mark.slow
def test_inspect_writes_figures_and_prints_the_report(trained_run, tmp_path, capsys):
    text = 'abc (ab)\n"c" a'
    (trained_run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "diagnosis", "gradient.a": 3.0, "gradient.b": 4.0, "gates.x": 9.0}\n'
        '{"step": 2, "split": "diagnosis", "gradient.a": null, "gradient.b": 4.0}\n'
        '{"step": 2, "split": "train", "loss": 4.0}\n'
    )
    np.testing.assert_equal(inspect_run.recorded_gradient_norms(trained_run), [5, np.nan])
    out = tmp_path / "pictures"
    Inspect(trained_run, text, layer=1, out=out).run(Console())
    assert {path.name for path in out.iterdir()} == {"gates.png", "eigenvalues.png", "cell_states.png"}
    printed = capsys.readouterr().out
    assert f"layer 1: 8 units, {len(text)} steps" in printed
    assert "gradient norms of 1 steps: 0.1: 5" in printed
    assert "1 of 2 gradients are not finite" in printed
    model, params, ids = inspect_run.load_character_model(trained_run, text)
    assert ids.tolist() == ['\n "()abc'.index(character) for character in text]
    jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0)))


def test_inspect_errors_are_one_clear_line(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_process", lambda: None)

    def error_of(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *map(str, arguments)])
        assert "\n" not in str(stop.value)
        return str(stop.value)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = trained_run
    assert "is not the folder of a run" in error_of(tmp_path / "no", "--text", "a")
    assert "not in the vocabulary of 8 characters: 'z'" in error_of(run, "--text", "az")
    assert "--text must have at least one character" in error_of(run, "--text", "")
    assert "--layer must be 0 to 1; got 2" in error_of(run, "--text", "a", "--layer", "2")
    assert "full is not an empty folder; pictures never replace others" in error_of(
        run, "--text", "a", "--out", tmp_path / "full"
    )
    whole = (run / params_file.BEST).read_bytes()
    (run / params_file.BEST).write_bytes(whole[:100])
    assert "best.safetensors is damaged" in error_of(run, "--text", "a")
    (run / params_file.BEST).unlink()
    assert "no checkpoint" in error_of(run, "--text", "a")
    write_config(run, config.Options(task="digits"))
    assert "expected a run of --task charlm" in error_of(run, "--text", "a")


@pytest.mark.slow
def test_explore_writes_a_page_about_the_text(trained_run, tmp_path, capsys):
    text = 'abc (ab)\n"c" a'
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    Explore(trained_run, tmp_path / "text.txt", layer=1, out=tmp_path / "page.html").run(Console(width=500))
    assert f"page.html: {len(text) - 1} characters" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    header = json.loads(re.search(r'id="header">(.*?)</script>', page)[1])
    assert header["labels"] == list(text[:-1])
    assert header["layer"] == 1
    assert header["classes"] == list('\n "()abc')
    assert header["title"] == "run: text.txt"
    assert header["arrays"]["gradients"] == ["float16", [len(text) - 1, 64]]
    assert "property inside quotes" in header["arrays"]
    assert "training" not in header


def test_explore_plays_back_the_rows_of_the_run(trained_run, tmp_path):
    values = {"gates": {}, "time_constants": None, "dead": 0.0, "gradient": [1.0], "elementwise": [0.5]}
    row = {"step": 3, "steps": [0], "layers": [{"forward": values}] * 2}
    (trained_run / "diagnosis.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"step": 4}) + '\n{"step": 5, "st'
    )
    (tmp_path / "text.txt").write_text("abc", encoding="utf-8")
    Explore(trained_run, tmp_path / "text.txt", out=tmp_path / "page.html").run(Console(width=500))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    header = json.loads(re.search(r'id="header">(.*?)</script>', page)[1])
    assert [moment["step"] for moment in header["training"]["rows"]] == [3, 4]
    assert header["training"]["rows"][0]["layer"] == {"forward": values}


def test_explore_errors_are_one_clear_line(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "set_up_process", lambda: None)

    def error_of(text, out="page.html", *options):
        text_path, out_path = str(tmp_path / "text.txt"), str(tmp_path / out)
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            main(["explore", str(trained_run), "--text", text_path, "--out", out_path, *options])
        assert "\n" not in str(stop.value)
        return str(stop.value)

    (tmp_path / "old.html").touch()
    (trained_run / "diagnosis.jsonl").mkdir()
    assert "diagnosis.jsonl is not a regular file; remove or rename it" in error_of("ab")
    (trained_run / "diagnosis.jsonl").rmdir()
    assert "--layer must be 0 to 1; got 2" in error_of("ab", "page.html", "--layer", "2")
    assert "old.html exists; the command never replaces a file" in error_of("ab", "old.html")
    assert "--out must end in .html, got" in error_of("ab", "page.png")
    assert "must have at least two characters" in error_of("a")
    assert "not in the vocabulary of 8 characters: 'z'" in error_of("az")
    write_config(trained_run, config.Options(task="digits"))
    assert "is a run of --task digits; expected a run of --task charlm" in error_of("ab")
    assert not (tmp_path / "page.html").exists()


def command(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "jaxlstm.diagnostics", *map(str, arguments)], capture_output=True, text=True
    )
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.slow
def test_vanishing_writes_the_figure_and_prints_the_summary(tmp_path):
    small = ["--steps", "10", "--hidden", "4", "--updates", "50", "--batch", "2"]
    run = command("vanishing", "--out", tmp_path / "v.png", *small)
    assert run.returncode == 0, run.stderr
    assert "After 50 updates on the adding task over 10 steps" in run.stdout
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    again = command("vanishing", "--out", tmp_path / "v.png")
    assert again.returncode != 0
    assert "exists; the command never replaces a file" in again.stderr
