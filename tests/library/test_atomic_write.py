"""Files that are replaced completely or not at all, and files that are read only if they are files."""

import os
import secrets
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from time_limit import time_limit

from jaxlstm.atomic_write import atomic_write
from jaxlstm.regular_file import read_regular

ROOT = Path(__file__).parent.parent.parent


def write(path, content, **options):
    with atomic_write(path, **options) as file:
        file.write(content)


def test_atomic_write_replaces_a_file_and_leaves_no_other(tmp_path):
    path = tmp_path / ("x" * 250)  # the temporary name is not longer
    write(path, b"first")
    mode = stat.S_IMODE(path.stat().st_mode)
    (tmp_path / "plain").touch()
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)  # as the umask says
    with pytest.raises(TypeError, match="bytes"):
        write(path, "half")
    assert path.read_bytes() == b"first"
    write(path, b"second")
    assert path.read_bytes() == b"second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", path.name]


def test_atomic_write_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    write(tmp_path / "file", b"content")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_atomic_write_never_writes_through_a_planted_link(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_bytes(b"precious")
    (tmp_path / "file.partial").symlink_to(victim)
    write(path, b"content")
    assert (victim.read_bytes(), path.read_bytes()) == (b"precious", b"content")
    # Even a guessed name is not opened.
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "guessed.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(path, b"other")
    assert (victim.read_bytes(), path.read_bytes()) == (b"precious", b"content")


@pytest.mark.skipif(os.name == "nt", reason="no devices and named pipes on Windows")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "folder", "link to nothing"])
def test_atomic_write_refuses_to_replace_anything_but_a_file(tmp_path, monkeypatch, kind, overwrite):
    path = tmp_path / "file"
    if kind == "device":
        path = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if kind == "link to a device" else tmp_path / "nothing")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("replaced"))
    before = path.lstat()
    message = "it is not a regular file" if overwrite else "exists; overwrite=True replaces it"
    with pytest.raises(OSError, match=message) as error:
        write(path, b"content", overwrite=overwrite)
    assert str(path) in str(error.value)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_atomic_write_without_overwrite_keeps_a_file_created_meanwhile(tmp_path, monkeypatch, has_hard_links):
    if not has_hard_links:
        monkeypatch.setattr(os, "link", lambda *_: os.open("/nonexistent/folder/file", os.O_RDONLY))
    path = tmp_path / "file"
    late = atomic_write(path, overwrite=False)
    late.__enter__().write(b"late")
    write(path, b"early", overwrite=False)
    with pytest.raises(FileExistsError, match="file exists; overwrite=True replaces it"):
        late.__exit__(None, None, None)
    assert path.read_bytes() == b"early"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_concurrent_writers_never_fail_each_other(tmp_path):
    """402 threads replace one file at the same time; a reader sees complete contents only."""
    path, failures = tmp_path / "file", []
    barrier = threading.Barrier(402)

    def write_number(number):
        barrier.wait()
        try:
            write(path, b"%03d" % number * 1000)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write_number, args=(n,)) for n in range(402)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            content = path.read_bytes()
            seen.add((len(content), content == content[:3] * 1000))
    assert not failures
    assert seen <= {(3000, True)}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_racing_processes_never_fail_each_other(tmp_path):
    """16 processes replace one file 50 times each."""
    program = """
import sys
from pathlib import Path
from jaxlstm.atomic_write import atomic_write
input()
for n in range(50):
    with atomic_write(Path("file")) as file:
        file.write((sys.argv[1] * 5000).encode())
"""
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([*command, f"{n:02}"], cwd=tmp_path, env=environment, stdin=subprocess.PIPE) for n in range(16)
    ]
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait(300) for process in processes] == [0] * 16
    content = (tmp_path / "file").read_bytes()
    assert content == content[:2] * 5000
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="no devices and named pipes on Windows")
def test_read_regular_refuses_pipes_and_devices_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "good link").symlink_to(tmp_path / "file")
    with time_limit(20):
        for name in ("pipe", "link"):
            with pytest.raises(OSError, match="not a regular file"):
                read_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "good link") == b"content"
