"""Resuming a run: accepted and refused options, and messages."""

import json
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from training_runs import SMALL, TEXT, default_jax, read_metrics, read_summary, run_command, train

from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.training import cli, params_file, run_directory
from jaxlstm.training.config import Options, load_config
from jaxlstm.training.loop import make_limits
from jaxlstm.training.run_directory import check_paths, check_start, create_run_dir, saved_config
from jaxlstm.training.tasks import TASKS

TINY = [*SMALL, "--log-every", "1", "--valid-every", "3", "--save-every", "2", "--diagnose", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of 4 steps, beside its text."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    run_command("--data", "text.txt", "--run-dir", "run", "--max-steps", 4, *TINY, cwd=folder)
    return folder / "run"


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the run and its text."""
    shutil.copy(finished.parent / "text.txt", tmp_path)
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    """Returns all files of a folder with their contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse_step(*_, **__):
    raise ValueError("cannot run on this mesh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,model=5"], "--mesh data=2,model=5 needs 10 devices, got 2"),
        (["--hidden", "7"], "--hidden is 7, expected 16"),
        (["--max-steps", "9", "--data", "other.txt"], "--data other.txt has the content with SHA-256"),
        (["--max-steps", "9", "--tensorboard"], "--tensorboard needs tensorboardX"),
        (["--max-steps", "9", "--log-every", "3"], "cannot run on this mesh"),
    ],
)
def test_refused_resume_leaves_the_folder_unchanged(run_dir, monkeypatch, arguments, message):
    (run_dir.parent / "other.txt").write_text(TEXT[1:], encoding="utf-8")
    (run_dir / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    if message == "cannot run on this mesh":
        monkeypatch.setattr(jax, "eval_shape", refuse_step)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the number of devices cannot change any more
    before = contents(run_dir)
    printed = run_command("--resume", "run", *arguments, cwd=run_dir.parent, fails=True)
    assert message in printed
    assert printed.count("\n") == 1
    assert contents(run_dir) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/6.orbax-checkpoint-tmp", "profile"])
def test_resume_refused_for_a_path_of_another_kind_leaves_the_folder_unchanged(run_dir, name):
    path, kind = run_dir / name, "folder"
    if name == "metrics.jsonl":
        path.unlink()
        path.mkdir()
        kind = "regular file"
    else:
        path.write_text("x")
    before = contents(run_dir)
    printed = run_command("--resume", "run", "--max-steps", 9, "--profile", 1, cwd=run_dir.parent, fails=True)
    assert printed == f"train.py: run/{name} is not a {kind}; remove or rename it\n"
    assert contents(run_dir) == before


def test_check_paths_names_the_first_path_of_another_kind(tmp_path):
    both = Options(tensorboard=True, profile=1)
    (tmp_path / "tensorboard").write_text("x")
    (tmp_path / "profile").write_text("x")
    check_paths(tmp_path, Options())  # does not write them
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "4").write_text("x")
    for name in ("checkpoints/4", "tensorboard", "profile"):
        with pytest.raises(ValueError, match=f"{name} is not a folder; remove or rename it"):
            check_paths(tmp_path, both)
        (tmp_path / name).unlink()
    for name in ("config.json", "metrics.jsonl", "best.safetensors", "summary.json", "curves.png"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a regular file; remove or rename it"):
            check_paths(tmp_path, both)
        (tmp_path / name).unlink()
    (tmp_path / "curves.png").symlink_to("nothing")
    with pytest.raises(ValueError, match=r"curves\.png is not a regular file"):
        check_paths(tmp_path, both)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "d\udcff.txt"], r"--data must be valid UTF-8, got '/.*/d\\udcff.txt'"),
        (["--data", "text.txt", "--run-dir", "r\udcff"], r"--run-dir must be valid UTF-8, got '/.*/r\\udcff'"),
        (["--resume", "r\udcff"], r"--resume must be valid UTF-8, got '/.*/r\\udcff'"),
        (
            ["--task", "forecast", "--data", "co2", "--target", "a\udcff"],
            r"--target must be valid UTF-8, got 'a\\udcff'",
        ),
    ],
)
def test_parse_refuses_names_that_are_not_utf8(tmp_path, arguments, named):
    (tmp_path / "r\udcff").mkdir()
    printed = run_command(*arguments, cwd=tmp_path, fails=True)
    assert re.fullmatch(rf"train\.py: {named}; choose another name\n", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["r\udcff"]


def test_parse_refuses_a_current_folder_that_is_not_utf8(tmp_path):
    folder = tmp_path / "w\udcff"
    folder.mkdir()
    printed = run_command("--max-steps", 1, cwd=folder, fails=True)
    assert re.fullmatch(r"train\.py: --run-dir must be valid UTF-8, got '/.*/w\\udcff/runs'; choose.*\n", printed)
    assert list(folder.iterdir()) == []


def test_missing_extra_is_reported_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    printed = run_command("--data", "none.txt", "--run-dir", "run", "--tensorboard", cwd=tmp_path, fails=True)
    assert printed == (
        "train.py: --tensorboard needs tensorboardX, which is not installed: pip install 'jaxlstm[tensorboard]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_refused_step_leaves_no_run_directory(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(jax, "eval_shape", refuse_step)
    run_command("--data", "text.txt", "--run-dir", "run", *TINY, cwd=tmp_path, fails=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_resume_accepts_data_that_moved_and_reports_versions_and_learning_rate(run_dir, monkeypatch):
    (run_dir / "metrics.jsonl").write_bytes(b"")
    (run_dir.parent / "text.txt").rename(run_dir.parent / "moved.txt")
    versions = {**run_directory.versions(), "jax": "99.0"}
    monkeypatch.setattr(run_directory, "versions", lambda: versions)
    printed = run_command("--resume", "run", "--data", "moved.txt", "--max-steps", 6, cwd=run_dir.parent)
    lines = printed.splitlines()
    assert lines[0] == f"resumed with other versions, so losses may differ slightly: jax {jax.__version__} -> 99.0"
    assert lines[1].startswith("the learning rate changes from 4e-05 to 0.0011: with the new limits step 4 is at 67% ")
    assert lines[1].endswith(" the run, before at 100%")
    assert lines[2].endswith("; resumed after step 4")
    assert lines[3].endswith(
        "6 of 6 rows of run/metrics.jsonl are damaged or missing; the others are kept, and training goes on"
    )
    rows = [row for row in read_metrics(run_dir) if row["split"] == "train"]
    assert [row["step"] for row in rows] == [5, 6]
    assert rows[0]["learning_rate"] > rows[1]["learning_rate"] == pytest.approx(4e-5)
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert config["options"]["data"] == str(run_dir.parent / "moved.txt")
    assert config["versions"] == versions
    # Nothing to do: no further line, and no further time.
    seconds = read_summary(run_dir)["wall_seconds"]
    printed = run_command("--resume", run_dir, cwd=run_dir)  # the path of the data is absolute
    assert "learning rate" not in printed
    assert "nothing left to do: the run ended at step 6 and --max-steps is 6\n" in printed
    assert read_summary(run_dir)["wall_seconds"] <= seconds


@pytest.mark.slow
def test_resume_without_best_parameters(run_dir):
    best = next(run_dir.glob("best.*"))
    content = best.read_bytes()
    best.write_bytes(content[:-9])
    before = contents(run_dir)
    assert "is damaged" in run_command("--resume", "run", "--max-steps", 5, cwd=run_dir.parent, fails=True)
    assert contents(run_dir) == before
    best.unlink()
    printed = run_command("--resume", "run", "--max-steps", 5, cwd=run_dir.parent)
    assert f"run/{best.name} is missing: the next validation gives the best parameters\n" in printed
    assert best.exists()
    assert read_summary(run_dir)["best_step"] == 5


@pytest.mark.slow
def test_resume_replaces_best_parameters_of_a_later_step(run_dir):
    """A killed run may have replaced them after its last checkpoint."""
    best, before = run_dir / "best.safetensors", (run_dir / "best.safetensors").read_bytes()
    assert read_summary(run_dir)["best_step"] == 4
    shutil.rmtree(run_dir / "checkpoints" / "4")
    printed = run_command("--resume", "run", "--max-steps", 3, cwd=run_dir.parent)
    assert f"run/{best.name} was replaced after step 3: the next validation gives the best parameters\n" in printed
    assert best.read_bytes() != before
    assert_summary_of_the_best_parameters(run_dir, 3)


@pytest.mark.slow
def test_resume_keeps_the_loss_of_new_best_parameters(run_dir):
    """Losses of best parameters that were lost do not count."""
    path = run_dir / "checkpoints" / "4" / "manifest.json"
    manifest = read_checked_json(path)
    manifest["record"]["loop"]["valid_losses"][0] = 0.5  # lower than any later one
    write_checked_json(path, manifest)
    (run_dir / "best.safetensors").unlink()
    for _ in range(2):  # the second resume makes no step
        run_command("--resume", "run", "--max-steps", 5, cwd=run_dir.parent)
        assert_summary_of_the_best_parameters(run_dir, 5)


def assert_summary_of_the_best_parameters(run_dir, step):
    """The summary names a step, its validation loss, and the loss of the parameters in the file."""
    summary = read_summary(run_dir)
    (loss,) = {row["loss"] for row in read_metrics(run_dir) if row["split"] == "valid" and row["step"] == step}
    with default_jax():
        options, _ = load_config(run_dir, "")
        task = TASKS[options.task].make(options)
        measured = task.evaluate(params_file.load_params(run_dir / params_file.BEST, task.init))["loss"]
    assert (summary["best_step"], summary["valid_loss"], measured) == (step, loss, loss)


def test_versions_include_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(run_directory.jaxlstm, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "__init__.py").write_text("a = 1\n")
    hashes = set()
    for code in ("a = 1\n", "a = 2\n"):
        (tmp_path / "sub.py").write_text(code)
        hashes.add(run_directory.versions.__wrapped__()["code"])
    assert len(hashes) == 2
    saved = {"versions": {**run_directory.versions(), "code": "0" * 64}}
    assert run_directory.changed_versions(saved) == f"code 000000000000 -> {run_directory.versions()['code'][:12]}"
    assert run_directory.changed_versions({"versions": {}}).startswith("jaxlstm unknown -> ")


def test_limits_give_the_progress():
    assert make_limits(None, None).steps == 1200
    assert make_limits(None, 10.0).progress(10**9, 2.0, 1.0) == pytest.approx(2 / 9)
    assert make_limits(100, 10.0).progress(50, 2.0, 0.0) == 0.5
    assert make_limits(100, None).progress(200, 1e9, 0.0) == 1


ADDING = Options(task="adding", batch=2, window=4, hidden=2)


@pytest.fixture
def task():
    return TASKS["adding"].make(ADDING)


def start(folder, task, *names):
    """Creates a folder as a run leaves it that ended at its start."""
    folder.mkdir()
    for name in names:
        if name == "checkpoints":
            (folder / name / "2.orbax-checkpoint-tmp").mkdir(parents=True)
        elif name == "config.json":
            write_checked_json(folder / name, saved_config(ADDING, task))
        else:
            (folder / name).write_text("")
    return folder


STARTED = [
    [],
    ["lock"],
    ["lock", "0123456789abcdef.partial"],
    ["lock", "checkpoints"],
    ["lock", "config.json", "metrics.jsonl", "checkpoints", "best.msgpack"],
]


@pytest.mark.parametrize("names", STARTED)
def test_started_run_without_a_checkpoint_goes_on(tmp_path, task, names):
    """By ``--resume`` and by the same command, whether it was killed or the disk was full."""
    folder = start(tmp_path / "run", task, *names)
    options = cli.parse(["--resume", str(folder), "--task", "adding", "--batch", "2", "--window", "4", "--hidden", "2"])
    assert (options.task, options.hidden, options.resume) == ("adding", 2, folder)
    check_start(folder, ADDING, task)
    assert create_run_dir(Options(task="adding", batch=2, window=4, hidden=2, run_dir=folder), task) == folder


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["movie.mp4.partial"],
        ["0123456789abcdef.partial.txt"],
        ["config.json", "checkpoints", "summary.json"],
        ["best.msgpack"],
    ],
)
def test_folder_with_anything_else_is_not_a_started_run(tmp_path, task, names):
    folder = start(tmp_path / "run", task, *names)
    with pytest.raises(ValueError, match="is not an empty folder; a run never overwrites another"):
        create_run_dir(Options(task="adding", batch=2, window=4, hidden=2, run_dir=folder), task)
    with pytest.raises(ValueError, match=r"is not the folder of a run|has results but no checkpoint"):
        check_start(folder, ADDING, task)


def test_runs_of_the_same_second_get_different_folders(tmp_path, task, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda _: "2026-01-01-000000")
    folders = [create_run_dir(ADDING, task) for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"runs/2026-01-01-000000{end}" for end in ("", "-2", "-3")]
    assert all(folder.is_dir() for folder in folders)


def test_started_run_of_other_options_is_kept(tmp_path, task):
    folder = start(tmp_path / "run", task, "config.json")
    other = Options(task="adding", batch=2, window=4, hidden=3, run_dir=folder)
    with pytest.raises(ValueError, match="is not an empty folder"):
        create_run_dir(other, task)
    with pytest.raises(ValueError, match=r"is of another run: --hidden is 2, expected 3"):
        check_start(folder, other, task)


@pytest.mark.slow
def test_started_run_without_configuration_trains(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    new = ["--data", tmp_path / "text.txt", "--max-steps", 4, *TINY]
    for name, option in (("a", "--resume"), ("b", "--run-dir")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        printed = train([*new, option, tmp_path / name])
        assert ("has no config.json yet: it gets the options of this command" in printed) == (option == "--resume")
        assert read_summary(tmp_path / name)["steps"] == 4
    rows = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("a", "b")]
    np.testing.assert_array_equal(*rows)
