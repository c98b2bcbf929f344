"""Checkpoints, and runs that are stopped, killed or damaged and then resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from training_runs import ENVIRONMENT, ROOT, SMALL, TEXT, default_jax, read_metrics, read_summary, start_training, train

from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.training import cli, train_step
from jaxlstm.training.checkpointing import CheckpointError, Checkpoints, checkpoint_steps
from jaxlstm.training.config import load_config
from jaxlstm.training.metrics import Report, RowFile
from jaxlstm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxlstm.training.run_directory import lock_run_dir
from jaxlstm.training.tasks import TASKS

ARRAYS = {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "key": jax.random.key(3), "n": jnp.zeros((), jnp.int32)}


def zeros(state):
    return {"w": jnp.zeros_like(state["w"]), "key": jax.random.key(0), "n": state["n"]}


@pytest.fixture
def saved(tmp_path):
    """Five checkpoints written, the last two kept."""
    donate = jax.jit(lambda state: {**state, "w": state["w"] + 1}, donate_argnums=0)
    state = jax.tree.map(jnp.copy, ARRAYS)
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state, {"step": step})
            state = donate(state)
        checkpoints.wait()
        yield checkpoints


def test_checkpoint_holds_the_state_before_it_was_donated(saved):
    assert saved.steps() == [3, 4]
    assert saved.latest_record() == (4, {"step": 4})
    again = saved.restore(zeros(ARRAYS))
    np.testing.assert_array_equal(again["w"], ARRAYS["w"] + 4)
    assert again["key"] == ARRAYS["key"]
    # A new process reads the same, and an existing checkpoint is not replaced.
    other = Checkpoints(saved.folder, max_to_keep=2)
    other.save(4, zeros(ARRAYS), {"step": 0})
    other.wait()
    np.testing.assert_array_equal(other.restore(zeros(ARRAYS))["w"], ARRAYS["w"] + 4)


def test_checkpoint_of_a_state_donated_during_the_write_is_unchanged(tmp_path):
    """No copy is made: the references of the writer keep later steps from using the memory."""
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros(2**21, jnp.float32)
    with Checkpoints(tmp_path, max_to_keep=9) as checkpoints:
        for n in range(3):
            checkpoints.save(n, {"w": w}, {})
            for _ in range(4):
                before, w = w, step(w)
            assert before.is_deleted()  # so steps do use donated memory
            checkpoints.wait()
            np.testing.assert_array_equal(checkpoints.restore({"w": w})["w"], 4.0 * n)


def truncate_array(folder):
    path = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() and "ocdbt" in str(p) else 0)
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(folder):
    path = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() and "ocdbt" in str(p) else 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_manifest(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncate_array,
            r"checkpoint .*/4 is damaged: .* differs from the file that was written; remove .*/4 to go on from",
        ),
        (flip_bit, r"checkpoint .*/4 is damaged: .* differs from the file that was written; remove"),
        (lambda folder: (folder / "_METADATA").unlink(), r"/4 is damaged: _METADATA: No such file"),
        (truncate_manifest, r"/4/manifest.json is damaged: it is not JSON; remove"),
        (
            lambda folder: (folder / "manifest.json").write_text("[]"),
            "manifest.json is damaged: it is not",
        ),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r"/4 is not a checkpoint of a run: manifest.json: No such",
        ),
    ],
)
def test_damaged_checkpoint_is_named_and_the_previous_one_works(saved, damage, message, capfd):
    damage(saved.folder / "4")
    with pytest.raises(CheckpointError, match=message):
        saved.restore(zeros(ARRAYS))
    shutil.rmtree(saved.folder / "4")
    np.testing.assert_array_equal(saved.restore(zeros(ARRAYS))["w"], ARRAYS["w"] + 3)
    assert capfd.readouterr() == ("", "")


def test_checkpoint_of_another_model_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"of another model: w is float32\[3,4\], expected float32\[4,3\]"):
        saved.restore({**ARRAYS, "w": ARRAYS["w"].T})
    with pytest.raises(CheckpointError, match=r"of another model: b is absent, expected int32\[\]"):
        saved.restore({**ARRAYS, "b": ARRAYS["n"]})
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path / "none").restore(ARRAYS)


OPTIONS = [
    *SMALL,
    "--dropout",
    "0.3",
    "--save-every",
    "10",
    "--valid-every",
    "15",
    "--log-every",
    "3",
]  # checkpoints between two rows of the metrics


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """The directory of an uninterrupted run of 40 steps."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    train(["--data", str(folder / "text.txt"), "--max-steps", "40", "--run-dir", str(folder / "run"), *OPTIONS])
    return folder / "run"


def recorded(folder):
    """Returns everything that a run writes, without times."""
    rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in read_metrics(folder)]
    manifest = json.loads((folder / "checkpoints" / "40" / "manifest.json").read_text())
    loop = {k: v for k, v in manifest["record"]["loop"].items() if "seconds" not in k}
    return rows, loop, (folder / "best.safetensors").read_bytes()


def final_state(folder):
    """Returns the arrays of the latest checkpoint, without the PRNG key."""
    with default_jax():
        options, _ = load_config(folder, "")
        task = TASKS[options.task].make(options)
        optimizer = make_optimizer(learning_rate_schedule("adamw", 1.0, 0.0), weight_decay=0.0, clip=1.0)
        params = task.init(jax.random.key(0))
        template = train_step.init_train_state(params, optimizer, task.init_carry(params), jax.random.key(0))
        return jax.tree.leaves(Checkpoints(folder / "checkpoints").restore(template)._replace(key=0))


def assert_same_run(folder, expected):
    assert recorded(folder) == recorded(expected)
    for a, b in zip(final_state(folder), final_state(expected)):
        np.testing.assert_array_equal(a, b)


def call_at_row(monkeypatch, at, function):
    """Calls a function when the training row of step ``at`` is recorded."""
    training_row = Report.training_row

    def patched(self, step, *rest):
        training_row(self, step, *rest)
        if step == at:
            function()

    monkeypatch.setattr(Report, "training_row", patched)


@pytest.mark.slow
def test_resume_after_a_stop_and_a_crash_is_exact(complete_run, tmp_path, monkeypatch):
    arguments = [
        "--data",
        str(complete_run.parent / "text.txt"),
        "--max-steps",
        "40",
        "--run-dir",
        str(tmp_path / "run"),
    ]

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        call_at_row(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        printed = train([*arguments, *OPTIONS])
    assert f"SIGTERM received; saved after step 12; to go on:\npython train.py --resume {tmp_path / 'run'}\n" in printed
    with monkeypatch.context() as patch:
        call_at_row(patch, 27, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(["--resume", str(tmp_path / "run")])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 27
    # Only the steps after the last checkpoint are repeated.
    assert "resumed after step 25" in train(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", complete_run)
    assert read_summary(tmp_path / "run")["steps"] == 40


@pytest.mark.slow
def test_resume_needs_the_options_and_data_of_the_run(complete_run, tmp_path):
    shutil.copytree(complete_run, tmp_path / "run")
    for option, message in (
        (["--hidden", "32"], "continues with the options of that run: --hidden is 32, expected 16"),
        (["--task", "charlm", "--seed", "3"], "--seed is 3, expected 0"),
        (["--run-dir", "other"], "continues in that folder and cannot be combined with --run-dir other"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.parse(["--resume", str(tmp_path / "run"), *option])
    options = cli.parse(["--resume", str(tmp_path / "run"), "--max-steps", "50", "--valid-every", "7"])
    assert (options.max_steps, options.valid_every, options.hidden) == (50, 7, 16)
    message = "nothing left to do: the run ended at step 40 and --max-steps is 40\n"
    assert message in train(["--resume", str(tmp_path / "run"), "--max-seconds", "100"])
    path = tmp_path / "run" / "checkpoints" / "40" / "manifest.json"
    manifest = read_checked_json(path)
    for record, message in (
        (
            manifest["record"] | {"fingerprint": "0"},
            r"is of another run: --data \S+text.txt has the content with SHA-256 \w{12}, expected 0, ",
        ),
        (
            manifest["record"] | {"options": {**manifest["record"]["options"], "hidden": 8}},
            "--hidden is 8, expected 16",
        ),
        ({"step": 3}, "was not written by train.py: its record has no key 'options'"),
        (
            manifest["record"] | {"loop": {**manifest["record"]["loop"], "rows": "3"}},
            "was not written by train.py: its record: loop: rows must be int",
        ),
        (
            manifest["record"] | {"loop": {**manifest["record"]["loop"], "step": 41}},
            "was not written by train.py: its record is of step 41",
        ),
        (
            manifest["record"] | {"options": {**manifest["record"]["options"], "max_steps": -1}},
            "was not written by train.py: --max-steps must be greater than 0, got -1",
        ),
    ):
        write_checked_json(path, manifest | {"record": record})
        with pytest.raises(CheckpointError, match=message):
            train(["--resume", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=r"--resume .* is not the folder of a run"):
        cli.parse(["--resume", str(tmp_path)])


@pytest.mark.slow
def test_resume_continues_the_clock(complete_run, tmp_path):
    shutil.copytree(complete_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "40" / "manifest.json"
    manifest = read_checked_json(path)
    assert 0 < manifest["record"]["loop"]["seconds"] < read_summary(complete_run)["wall_seconds"]
    manifest["record"]["loop"] |= {"seconds": 3600.0, "valid_seconds": 0.0}
    write_checked_json(path, manifest)
    limits = ["--max-steps", "1000", "--max-seconds"]
    printed = train(["--resume", str(tmp_path / "run"), *limits, "3000"])
    assert "nothing left to do: the run ended after 3,600 s and --max-seconds is 3000\n" in printed
    summary = read_summary(tmp_path / "run")
    assert (summary["steps"], summary["wall_seconds"]) == (40, 3600)  # the time of this resume does not count
    train(["--resume", str(tmp_path / "run"), *limits, "3600.01"])
    summary = read_summary(tmp_path / "run")
    assert summary["steps"] == 41
    assert summary["wall_seconds"] > 3600.01


@pytest.mark.slow
def test_non_finite_steps_are_counted_and_end_the_run_after_max_skipped(complete_run, tmp_path, monkeypatch):
    """The recurrent state is NaN at steps 9 and 10, and in a second run from step 9 on."""
    arguments = ["--data", str(complete_run.parent / "text.txt"), "--max-steps", "40", *OPTIONS, "--max-skipped", "5"]
    make_step = train_step.make_step

    def with_nan_until(last):
        def make(*arguments):
            step, numbers = make_step(*arguments), iter(range(100))  # call 0 only traces the step

            def step_with_nan(state, batch, progress):
                n = next(numbers)
                carry = jax.tree.map(lambda a: a * (jnp.nan if 9 <= n <= last else 1), state.carry)
                state, step_metrics = step(state._replace(carry=carry), batch, progress)
                return state._replace(carry=jax.tree.map(jnp.nan_to_num, state.carry)), step_metrics

            return step_with_nan

        return make

    monkeypatch.setattr(train_step, "make_step", with_nan_until(10))
    printed = train([*arguments, "--run-dir", str(tmp_path / "two")])
    rows = [row for row in read_metrics(tmp_path / "two") if row["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 0, 1, *[2] * 11]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert printed.count("  2 skipped") == 11
    monkeypatch.setattr(train_step, "make_step", with_nan_until(100))
    with pytest.raises(FloatingPointError, match="was not finite at 5 steps in a row, up to step 13;"):
        train([*arguments, "--run-dir", str(tmp_path / "all")])
    assert [row["loss"] is None for row in read_metrics(tmp_path / "all")] == [False, False, False, True]
    assert sorted(p.name for p in (tmp_path / "all" / "checkpoints").iterdir()) == ["10", "5"]


def test_checkpoint_on_a_full_disk_is_refused_before_writing(saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    before = {p: p.read_bytes() for p in saved.folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"the disk is full: 1,000 bytes are free, 1,048,\d+ needed"):
        saved.save(5, ARRAYS, {})
    saved.wait()
    assert {p: p.read_bytes() for p in saved.folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_failed_write_prints_one_line_and_keeps_existing_files(complete_run, tmp_path):
    """Files are limited to a few KiB, too small for a checkpoint's arrays, the parameters, or the configuration."""
    # The 31 KiB of arrays are spread over two or more files, differently each time: the first limit is far below half
    # of them, yet above every other file written at these steps.
    for kibibytes, message in (
        (6, r"cannot write a checkpoint to \S+/run\d+/checkpoints: .*/41\.orbax-checkpoint-tmp.*: File too large.*"),
        (8, r"cannot write run\d+/best\.safetensors: File too large"),
        (1, r"cannot write run\d+/config\.json: File too large"),
    ):
        folder = tmp_path / f"run{kibibytes}"
        shutil.copytree(complete_run, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        often = "--max-steps 60 --save-every 2 --valid-every 1" if kibibytes == 8 else "--max-steps 60 --save-every 2"
        limited = f"ulimit -f {kibibytes}; exec {sys.executable} {ROOT / 'train.py'} --resume {folder.name} {often}"
        done = subprocess.run(
            ["bash", "-c", limited],
            cwd=tmp_path,
            env=ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / f"cache{kibibytes}")},  # also limited
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 1
        assert re.fullmatch(rf"train\.py: {message}\n", done.stderr), done.stderr
        again = {"metrics.jsonl", "config.json"} if kibibytes > 1 else {"metrics.jsonl"}  # are rewritten
        for path, content in before.items():
            assert path.name in again or path.read_bytes() == content, path
        assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_run_directory_is_locked_by_one_process(complete_run):
    message = r"another process is training in .*/run: .*/run/lock is locked"
    with lock_run_dir(complete_run), pytest.raises(ValueError, match=message):
        train(["--resume", str(complete_run)])
    with lock_run_dir(complete_run):  # released
        pass


def test_report_names_a_file_that_cannot_be_written(tmp_path):
    report = Report(tmp_path, Console(quiet=True), "words", str)
    with report._file:
        report._file = RowFile(Path("/dev/full"))
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"), report:
        report.diagnosis_row(1, {"a": 1.0})


def kill_at_random(folder, kills, *, save_every=4):
    """Kills a run repeatedly: at its start, and during and between its checkpoints. Returns the steps of resuming."""
    rng = random.Random(0)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    new = ["--data", "text.txt", "--run-dir", "run", "--max-steps", "1000000", "--save-every", str(save_every)]
    new += ["--hidden", "16", "--embedding", "8", "--batch", "4", "--window", "16"]
    new += ["--log-every", "1", "--valid-every", "1000000", "--diagnose", "0"]
    metrics, out = folder / "run" / "metrics.jsonl", folder / "out.txt"
    resumed = []
    for n in range(kills):
        lines = metrics.read_text().splitlines(True) if metrics.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        assert steps == list(range(1, len(steps) + 1))
        out.write_text("")
        has_checkpoint = bool(checkpoint_steps(folder / "run" / "checkpoints"))
        started = (folder / "run" / "config.json").exists()
        # Without a checkpoint the same command works too.
        resumes = has_checkpoint or (started and rng.random() < 0.5)
        process = start_training(folder, ["--resume", "run"] if resumes else new)
        began = time.monotonic()
        early = n > 0 and rng.random() < 0.1  # while it starts
        while not early and not re.search("^step", out.read_text(), re.MULTILINE):
            assert process.exitcode is None, out.read_text()
            assert time.monotonic() < began + 120
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3.0 if early else 0.5))
        process.kill()
        process.join()
        printed = out.read_text()
        assert process.exitcode == -signal.SIGKILL, printed
        if "characters" in printed:
            after = re.search(r"resumed after step ([\d,]+)$", printed, re.MULTILINE)
            resumed.append(int(after[1].replace(",", "")) if after else 0)
            assert len(steps) - resumed[-1] <= save_every
    return resumed


@pytest.mark.slow
def test_run_resumes_after_being_killed(tmp_path):
    """Kills the run 100 times, or ``JAXLSTM_KILLS`` times; resuming checks that each checkpoint is complete."""
    steps = kill_at_random(tmp_path, int(os.environ.get("JAXLSTM_KILLS", "100")))
    assert steps == sorted(steps)
    assert steps[-1] > 0
    print(f"resumed after steps {steps}")
