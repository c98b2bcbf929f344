"""Power cuts: the order in which files are synced to disk, and resuming from copies of a disk taken during a run."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from training_runs import ENVIRONMENT, ROOT, TEXT, start_training

from jaxlstm.atomic_write import atomic_write
from jaxlstm.training.checkpointing import Checkpoints, make_folder

TINY = ["--hidden", "8", "--embedding", "4", "--batch", "4", "--window", "8", "--log-every", "1", "--diagnose", "0"]
TINY += ["--valid-every", "1000000"]


@pytest.fixture
def disk_events(monkeypatch):
    """Names of calls and their paths: ``fsync``, ``rename`` and ``rmtree``, in order."""
    events = []
    calls = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace, "rmtree": shutil.rmtree}

    def fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        calls["fsync"](descriptor)

    def rename(source, target, **options):
        files = [str(path.relative_to(source)) for path in Path(source).rglob("*")]
        calls["rename"](source, target, **options)
        events.append(("rename", str(source), str(target), files))

    def replace(source, target):
        calls["replace"](source, target)
        events.append(("replace", str(target)))

    def rmtree(path):
        events.append(("rmtree", str(path)))
        calls["rmtree"](path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return events


def test_checkpoint_is_on_disk_before_its_name_and_before_an_older_one_is_removed(tmp_path, disk_events):
    folder = tmp_path / "new" / "checkpoints"
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"w": jnp.zeros(3)}, {})
    for created in (tmp_path, tmp_path / "new"):
        assert ("fsync", str(created)) in disk_events
    for step in range(3):
        named = next(n for n, event in enumerate(disk_events) if event[0] == "rename" and event[2].endswith(f"/{step}"))
        _, source, target, files = disk_events[named]
        assert {"_METADATA", "manifest.json", "array_metadatas/process_0"} < set(files)
        before = {event[1] for event in disk_events[:named] if event[0] == "fsync"}
        later_written = {"_CHECKPOINT_METADATA", "commit_success.txt"}
        assert {f"{source}/{name}" for name in files if name not in later_written} | {source} <= before
        removed = disk_events.index(("rmtree", str(folder / str(step - 1)))) if step else len(disk_events)
        after = {event[1] for event in disk_events[named:removed] if event[0] == "fsync"}
        assert {f"{target}/{name}" for name in files} | {str(folder)} <= after


def test_atomic_write_syncs_the_file_and_its_name(tmp_path, disk_events):
    with atomic_write(tmp_path / "a.json") as file:
        file.write(b"{}")
    kinds = [event[0] for event in disk_events]
    assert kinds == ["fsync", "replace", "fsync"]
    assert disk_events[-1] == ("fsync", str(tmp_path))


def test_make_folder_syncs_the_names_of_new_parents(tmp_path, disk_events):
    make_folder(tmp_path / "a" / "b")
    assert disk_events == [("fsync", str(tmp_path / "a")), ("fsync", str(tmp_path))]
    make_folder(tmp_path / "a" / "b")
    assert len(disk_events) == 2
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*/file/b: Not a directory"):
        make_folder(tmp_path / "file" / "b")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_system_calls_sync_a_checkpoint_before_an_older_one_is_removed(tmp_path):
    """The same as seen by the kernel, TensorStore's threads included."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    trace = "strace -f -y --seccomp-bpf -o trace.txt -e trace=fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    command = [*trace.split(), sys.executable, str(ROOT / "train.py"), "--data", "text.txt", "--run-dir", "run", *TINY]
    command += ["--save-every", "4", "--max-steps", "10"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "trace.txt").read_text().splitlines()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "6", "8"]
    named = find(lines, rf'rename.*"{checkpoints}/10.orbax-checkpoint-tmp".*"{checkpoints}/10"')
    removed = find(lines, rf"unlinkat\(\d+<{checkpoints}/4>")
    assert named < removed
    calls = enumerate(re.search(r"f(?:data)?sync\(\d+<(.*?)>", line) for line in lines)
    synced = [(n, call[1]) for n, call in calls if call]
    before = {path for n, path in synced if n < named}
    assert str(tmp_path / "run" / "metrics.jsonl") in before
    for path in (checkpoints / "10").rglob("*"):
        if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert str(path).replace("/10/", "/10.orbax-checkpoint-tmp/") in before
        assert str(path) in {path for n, path in synced if named < n < removed}
    assert str(checkpoints) in {path for n, path in synced if named < n < removed}


def find(lines, pattern):
    """Returns the index of the first line that a pattern matches."""
    return next(n for n, line in enumerate(lines) if re.search(pattern, line))


@contextlib.contextmanager
def mounted(image, folder):
    """Mounts an image of an ext4 file system, with settings that lose as much as the kernel allows."""
    folder.mkdir()
    options = "loop,commit=1,noauto_da_alloc"  # renames get to disk soon, contents that were not synced late
    done = subprocess.run(["mount", "-o", options, str(image), str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount an image: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def snapshot(image, copy, process):
    """Copies the disk of a run at one instant: while the run is stopped, until two copies agree."""
    os.kill(process.pid, signal.SIGSTOP)
    content = None
    while content != (content := image.read_bytes()):
        pass
    copy.write_bytes(content)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
def test_run_resumes_after_every_power_cut(tmp_path):
    """Copies the disk of a run at 20 random times; each copy is resumed, unaided, within --save-every steps."""
    image, cuts, save_every, rng = tmp_path / "disk.img", 20, 4, random.Random(0)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    done_steps = []
    with mounted(image, tmp_path / "disk") as disk:
        limits = ["--save-every", save_every, "--max-steps", 1000000]
        process = start_training(disk, ["--data", tmp_path / "text.txt", "--run-dir", "run", *limits, *TINY])
        try:
            for n in range(cuts):
                enough = 2 * save_every + max(done_steps, default=0)
                while last_step(disk) < enough:
                    assert process.exitcode is None, (disk / "out.txt").read_text()
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 1))
                snapshot(image, tmp_path / f"{n}.img", process)
                done_steps.append(last_step(disk))
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.kill()
            process.join()
    resumed = []
    for n in range(cuts):
        with mounted(tmp_path / f"{n}.img", tmp_path / f"disk{n}") as disk:
            process = start_training(disk, ["--resume", "run", "--max-steps", 1])
            process.join(240)
            printed = (disk / "out.txt").read_text()
            assert process.exitcode == 0, printed
            resumed.append(int(re.search(r"resumed after step ([\d,]+)$", printed, re.MULTILINE)[1].replace(",", "")))
    print(f"cut after steps {done_steps}, resumed after steps {resumed}")
    assert all(0 <= done - step <= save_every for done, step in zip(done_steps, resumed, strict=True))


def last_step(disk):
    """Returns the last step in ``metrics.jsonl``."""
    path = disk / "run" / "metrics.jsonl"
    steps = re.findall(r'^{"step": (\d+)', path.read_text(), re.MULTILINE) if path.exists() else []
    return int(steps[-1]) if steps else 0
