"""Runs that are stopped, killed and damaged, and go on."""

import io
import json
import multiprocessing
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
from test_train import ENVIRONMENT, ROOT, SMALL, TEXT, as_users_have_it, metrics, train

from jaxlstm.training.checkpointing import CheckpointError, Checkpoints
from jaxlstm.training.metrics import Report, keep_rows

ARRAYS = {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "key": jax.random.key(3), "n": jnp.zeros((), jnp.int32)}


def zeros(state):
    return {"w": jnp.zeros_like(state["w"]), "key": jax.random.key(0), "n": state["n"]}


@pytest.fixture
def saved(tmp_path):
    """Five checkpoints written, two of them left."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    donate = jax.jit(lambda state: {**state, "w": state["w"] + 1}, donate_argnums=0)
    state = jax.tree.map(jnp.copy, ARRAYS)
    for step in range(5):
        checkpoints.save(step, state, {"step": step})
        state = donate(state)
    checkpoints.wait()
    return checkpoints


def test_a_checkpoint_is_what_the_state_was_though_the_state_was_donated(saved):
    assert saved.steps() == [3, 4]
    assert saved.record() == (4, {"step": 4})
    again = saved.restore(zeros(ARRAYS))
    np.testing.assert_array_equal(again["w"], ARRAYS["w"] + 4)
    assert again["key"] == ARRAYS["key"]
    # A new process finds the same, and a checkpoint that exists is left as it is.
    other = Checkpoints(saved.folder, keep=2)
    other.save(4, zeros(ARRAYS), {"step": 0})
    other.wait()
    np.testing.assert_array_equal(other.restore(zeros(ARRAYS))["w"], ARRAYS["w"] + 4)


def test_a_state_given_away_while_it_is_being_written_is_written_as_it_was(tmp_path):
    """Without a copy: the writer's hold on the memory keeps the steps that follow from using it."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros(2**21, jnp.float32)
    for n in range(3):
        checkpoints.save(n, {"w": w}, {})
        for _ in range(4):
            before, w = w, step(w)
        assert before.is_deleted()  # so steps do use the memory that they are given
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore({"w": w})["w"], 4.0 * n)


def damage_array(folder):
    path = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() and "ocdbt" in str(p) else 0)
    path.write_bytes(path.read_bytes()[:-1])


def flip_array(folder):
    path = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() and "ocdbt" in str(p) else 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_manifest(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_array, r"checkpoint .*/4 is damaged: .* is not as it was written; remove .*/4 to go on from"),
        (flip_array, r"checkpoint .*/4 is damaged: .* is not as it was written; remove"),
        (lambda folder: (folder / "_METADATA").unlink(), r"/4 is damaged: _METADATA: No such file"),
        (damage_manifest, r"/4 is damaged: manifest.json is not whole"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is not whole"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r"/4 is not a checkpoint of a run: manifest.json: No such",
        ),
    ],
)
def test_a_damaged_checkpoint_says_so_and_the_one_before_it_serves(saved, damage, message, capfd):
    damage(saved.folder / "4")
    with pytest.raises(CheckpointError, match=message):
        saved.restore(zeros(ARRAYS))
    shutil.rmtree(saved.folder / "4")
    np.testing.assert_array_equal(saved.restore(zeros(ARRAYS))["w"], ARRAYS["w"] + 3)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_of_another_model(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"of another model: w is float32\[3,4\], expected float32\[4,3\]"):
        saved.restore({**ARRAYS, "w": ARRAYS["w"].T})
    with pytest.raises(CheckpointError, match=r"of another model: b is absent, expected int32\[\]"):
        saved.restore({**ARRAYS, "b": ARRAYS["n"]})
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path / "none").restore(ARRAYS)


def test_rows_after_the_checkpoint_are_dropped_a_torn_one_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert keep_rows(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(ValueError, match="is damaged: 2 lines, expected at least 3"):
        keep_rows(path, 3)


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
]  # a checkpoint in the middle of a row


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 40 steps in one go, its folder."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    run(["--data", str(folder / "text.txt"), "--max-steps", "40", "--run-dir", str(folder / "run"), *OPTIONS])
    return folder / "run"


def run(arguments):
    """`train.py` in this process; what it printed."""
    console = Console(file=io.StringIO(), width=200)
    try:
        with as_users_have_it():
            train.train(train.parse(arguments), console)
    except SystemExit:
        assert "SIGTERM received" in console.file.getvalue()
    return console.file.getvalue()


def outcome(folder):
    rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in metrics(folder)]
    manifest = json.loads((folder / "checkpoints" / "40" / "manifest.json").read_text())
    loop = {k: v for k, v in manifest["record"]["loop"].items() if "seconds" not in k}
    return rows, loop, (folder / "best.msgpack").read_bytes()


def state(folder):
    # Arrays without a template: as they were written.
    with jax.numpy_dtype_promotion("standard"):
        options, _ = train.configuration.of_run(folder, "")
        task = train.TASKS[options.task].make(options)
        optimizer = train.training.optimizer(1.0, warmup=0.0, weight_decay=0.0, clip=1.0)
        params = task.init(jax.random.key(0))
        like = train.training.start(params, optimizer, task.carry(params), jax.random.key(0))
        return jax.tree.leaves(Checkpoints(folder / "checkpoints").restore(like)._replace(key=0))


def same(folder, whole):
    assert outcome(folder) == outcome(whole)
    for a, b in zip(state(folder), state(whole)):
        np.testing.assert_array_equal(a, b)


def interrupted(monkeypatch, at, what):
    """``what`` happens when the row of step ``at`` is reported."""
    report = Report.train

    def reported(self, step, *rest):
        report(self, step, *rest)
        if step == at:
            what()

    monkeypatch.setattr(Report, "train", reported)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_then_crashes_ends_bit_for_bit_as_one_in_one_go(whole, tmp_path, monkeypatch):
    arguments = ["--data", str(whole.parent / "text.txt"), "--max-steps", "40", "--run-dir", str(tmp_path / "run")]

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupted(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        printed = run([*arguments, *OPTIONS])
    assert f"SIGTERM received; stopped after step 12; saved: python train.py --resume {tmp_path / 'run'}\n" in printed
    with monkeypatch.context() as patch:
        interrupted(patch, 27, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(["--resume", str(tmp_path / "run")])
    assert metrics(tmp_path / "run")[-1]["step"] == 27
    # What came after the checkpoint is lost, and nothing else.
    assert "resumed after step 25" in run(["--resume", str(tmp_path / "run")])
    same(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 40


def test_a_run_goes_on_with_its_own_options_and_data(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for option, message in (
        (["--hidden", "32"], "goes on with the options of that run: --hidden is 16, expected 32"),
        (["--task", "charlm", "--seed", "3"], "--seed is 0, expected 3"),
        (["--run-dir", "other"], "goes on in that folder, and has no use for --run-dir other"),
    ):
        with pytest.raises(ValueError, match=message):
            train.parse(["--resume", str(tmp_path / "run"), *option])
    options = train.parse(["--resume", str(tmp_path / "run"), "--max-steps", "50", "--valid-every", "7"])
    assert (options.max_steps, options.valid_every, options.hidden) == (50, 7, 16)
    said = "nothing is left to do: step 40 is the last one by --max-steps 40\n"
    assert said in run(["--resume", str(tmp_path / "run"), "--max-seconds", "100"])
    path = tmp_path / "run" / "checkpoints" / "40" / "manifest.json"
    manifest = json.loads(path.read_text())
    for record, message in (
        (manifest["record"] | {"about": "none"}, "is of another run: the data are none, expected 3,"),
        (manifest["record"] | {"fingerprint": "0"}, r"the data of --data \S+text.txt have changed since it began"),
        (
            manifest["record"] | {"options": {**manifest["record"]["options"], "hidden": 8}},
            "--hidden is 8, expected 16",
        ),
        ({"step": 3}, "is not one of train.py: KeyError"),
    ):
        path.write_text(json.dumps(manifest | {"record": record}))
        with pytest.raises(CheckpointError, match=message):
            run(["--resume", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=r"--resume .* is not the folder of a run"):
        train.parse(["--resume", str(tmp_path)])


def test_the_clock_goes_on_counting(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "40" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert 0 < manifest["record"]["loop"]["seconds"] < json.loads((whole / "summary.json").read_text())["wall_seconds"]
    manifest["record"]["loop"]["seconds"] = 3600.0
    path.write_text(json.dumps(manifest))
    run(["--resume", str(tmp_path / "run"), "--max-steps", "1000", "--max-seconds", "3000"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 41
    assert summary["wall_seconds"] > 3600


@pytest.mark.slow
def test_steps_that_are_not_finite_are_counted_in_the_metrics_and_end_the_run_in_the_end(whole, tmp_path, monkeypatch):
    """A recurrent state that is NaN at steps 9 and 10, and another time from step 9 on."""
    arguments = ["--data", str(whole.parent / "text.txt"), "--max-steps", "40", *OPTIONS, "--max-skipped", "5"]
    make = train.training.make_step

    def poisoned(until):
        def make_step(loss, optimizer):
            step, taken = make(loss, optimizer), iter(range(1, 100))

            def wrong(state, batch, progress):
                n = next(taken)
                carry = jax.tree.map(lambda a: a * (jnp.nan if 9 <= n <= until else 1), state.carry)
                state, outcome = step(state._replace(carry=carry), batch, progress)
                return state._replace(carry=jax.tree.map(jnp.nan_to_num, state.carry)), outcome

            return wrong

        return make_step

    monkeypatch.setattr(train.training, "make_step", poisoned(10))
    printed = run([*arguments, "--run-dir", str(tmp_path / "two")])
    rows = [row for row in metrics(tmp_path / "two") if row["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 0, 1, *[2] * 11]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert printed.count("  2 skipped") == 11
    monkeypatch.setattr(train.training, "make_step", poisoned(100))
    with pytest.raises(FloatingPointError, match="was not finite at 5 steps in a row, up to step 13;"):
        run([*arguments, "--run-dir", str(tmp_path / "all")])
    assert [row["loss"] is None for row in metrics(tmp_path / "all")] == [False, False, False, True]
    assert sorted(p.name for p in (tmp_path / "all" / "checkpoints").iterdir()) == ["10", "5"]


def test_a_full_disk_is_seen_before_anything_is_written(saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    before = {p: p.read_bytes() for p in saved.folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"the disk is full: 1,000 bytes are free, 1,048,\d+ needed"):
        saved.save(5, ARRAYS, {})
    saved.wait()
    assert {p: p.read_bytes() for p in saved.folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_write_that_fails_midway_is_one_line_and_leaves_what_was_there(whole, tmp_path):
    """Files end, as on a full disk, after so many KiB: arrays of a checkpoint, parameters, the configuration."""
    # A checkpoint's arrays, 31 KiB here, are spread over two files or more, never the same way twice: a limit far below
    # half of them, yet above every other file written at these steps.
    for kibibytes, message in (
        (6, r"cannot write a checkpoint to \S+/run\d+/checkpoints: .*/41\.orbax-checkpoint-tmp.*: File too large.*"),
        (8, r"cannot write run\d+/best\.msgpack: File too large"),
        (1, r"cannot write run\d+/config\.json: File too large"),
    ):
        folder = tmp_path / f"run{kibibytes}"
        shutil.copytree(whole, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        often = "--max-steps 60 --save-every 2 --valid-every 1" if kibibytes == 8 else "--max-steps 60 --save-every 2"
        limited = f"ulimit -f {kibibytes}; exec {sys.executable} {ROOT / 'train.py'} --resume {folder.name} {often}"
        done = subprocess.run(
            ["bash", "-c", limited],
            cwd=tmp_path,
            env=ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / f"cache{kibibytes}")},  # its files are cut short too
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 1
        assert re.fullmatch(rf"train\.py: {message}\n", done.stderr), done.stderr
        again = {"metrics.jsonl", "config.json"} if kibibytes > 1 else {"metrics.jsonl"}  # are written once more
        for path, content in before.items():
            assert path.name in again or path.read_bytes() == content, path
        assert not list(folder.glob("*.partial"))


def test_one_process_at_a_time_in_a_folder(whole):
    message = r"another process is training in .*/run: .*/run/lock is locked"
    with train.alone_in(whole), pytest.raises(ValueError, match=message):
        run(["--resume", str(whole)])
    with train.alone_in(whole):  # it was let go of
        pass


def test_a_row_that_cannot_be_written_is_named(tmp_path):
    report = Report(tmp_path, Console(quiet=True), "words", str)
    report._metrics.close()
    report._metrics = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: No space left on device"), report:
        report.diagnosis(1, {"a": 1.0})


def train_in(folder, arguments):
    """The command, in a process of its own that has imported it already."""
    os.chdir(folder)
    out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    sys.argv = ["train.py", *arguments]
    train.main()


def kill_at_random(folder, kills, *, save_every=4):
    """Kill a run again and again: at its start, and at and between its checkpoints. Returns what it went on from."""
    draw = random.Random(0)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    new = ["--data", "text.txt", "--run-dir", "run", "--max-steps", "1000000", "--save-every", str(save_every)]
    new += ["--hidden", "16", "--embedding", "8", "--batch", "4", "--window", "16"]
    new += ["--log-every", "1", "--valid-every", "1000000", "--diagnose", "0"]
    metrics, out = folder / "run" / "metrics.jsonl", folder / "out.txt"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])
    resumed = []
    for n in range(kills):
        lines = metrics.read_text().splitlines(True) if metrics.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        assert steps == list(range(1, len(steps) + 1))
        out.write_text("")
        started = (folder / "run" / "config.json").exists()
        process = processes.Process(target=train_in, args=(folder, ["--resume", "run"] if started else new))
        process.start()
        began = time.monotonic()
        early = n > 0 and draw.random() < 0.1  # while it starts
        while not early and not re.search("^step", out.read_text(), re.MULTILINE):
            assert process.exitcode is None, out.read_text()
            assert time.monotonic() < began + 120
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 3.0 if early else 0.5))
        process.kill()
        process.join()
        said = out.read_text()
        assert process.exitcode == -signal.SIGKILL, said
        if "characters" in said:
            after = re.search(r"resumed after step ([\d,]+)$", said, re.MULTILINE)
            resumed.append(int(after[1].replace(",", "")) if after else 0)
            assert len(steps) - resumed[-1] <= save_every
    return resumed


@pytest.mark.slow
def test_a_run_survives_being_killed(tmp_path):
    """A handful of kills; ``JAXLSTM_KILLS=100`` makes it a hundred. What it goes on from is whole, or it would not."""
    steps = kill_at_random(tmp_path, int(os.environ.get("JAXLSTM_KILLS", "5")))
    assert steps == sorted(steps)
    assert steps[-1] > 0
    print(f"went on after steps {steps}")
