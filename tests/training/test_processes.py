"""Several processes of a run: options are compared, and when one is lost the others end with one line."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from training_runs import ENVIRONMENT, ROOT, TEXT

from jaxlstm.training import processes
from jaxlstm.training.config import Options


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def ended(monkeypatch):
    """Short waits; a process that would end is recorded instead. JAX is not connected."""
    lines = []

    def end_process(prog, message, status=1):
        lines.append((message, status))
        raise SystemExit

    monkeypatch.setattr(processes, "end_process", end_process)
    monkeypatch.setattr(processes, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 1.5)
    monkeypatch.setattr(processes, "MISMATCH_SECONDS", 0.5)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    return lines


def connect(*several, work=lambda: None):
    """Connects processes, each in a thread that calls ``work``; returns the errors."""
    errors = [""] * len(several)

    def enter(n, options):
        try:
            with processes.connected_processes(options, "train.py"):
                work()
        except ValueError as error:
            errors[n] = str(error)

    threads = [threading.Thread(target=enter, args=pair) for pair in enumerate(several)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


def options_of(process, port, **options):
    return Options(**{"processes": 2, "process": process, "coordinator": f"127.0.0.1:{port}"} | options)


def test_processes_with_the_same_options_connect_and_leave(ended):
    port = free_port()
    three = [options_of(n, port, processes=3) for n in range(3)]
    assert connect(*three) == ["", "", ""]
    assert ended == []


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"seed": 1}, "--seed is 1 in process 1 and 0 in process 0"),
        ({"hidden": 8}, "--hidden is 8 in process 1 and 512 in process 0"),
        ({"max_steps": 5}, "--max-steps is 5 in process 1 and None in process 0"),
        ({"mesh": "data=2"}, "--mesh is data=2 in process 1 and None in process 0"),
        ({"processes": 3}, "--processes is 3 in process 1 and 2 in process 0"),
    ],
)
def test_processes_with_other_options_end_before_the_first_step(ended, different, message):
    port = free_port()
    errors = connect(options_of(0, port), options_of(1, port, **different))
    assert errors == [f"all processes must be started with the same options: {message}"] * 2
    assert ended == []


def test_two_processes_with_the_same_index_end(ended):
    port = free_port()
    leader, *followers = connect(options_of(0, port, processes=3), *[options_of(1, port, processes=3)] * 2)
    assert leader == "two processes have --process 1"
    assert leader in followers


def test_processes_with_other_data_end_with_the_same_line(ended, monkeypatch):
    def gather(own):
        assert own.tobytes() == b"a" * 64
        return np.stack([own, np.frombuffer(b"b" * 64, np.uint8)])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    port = free_port()
    errors = connect(options_of(0, port), options_of(1, port), work=lambda: processes.check_same_data("a" * 64))
    message = "its SHA-256 is bbbbbbbbbbbb in process 1 and aaaaaaaaaaaa in process 0; give all of them the same files"
    assert errors == [f"all processes must read the same data: {message}"] * 2
    assert ended == []


@pytest.mark.slow
def test_a_process_that_does_not_connect_is_named(ended):
    assert connect(options_of(0, free_port())) == ["--process 1 did not connect within 2 s"]
    port = free_port()
    (error,) = connect(options_of(1, port))
    assert error == f"--coordinator 127.0.0.1:{port}: process 0 did not answer within 2 s: Connection refused"


@pytest.mark.parametrize("coordinator", [None, "host", "host:", "host:x", "host:70000", ":5"])
def test_coordinator_must_be_an_address(coordinator):
    with (
        pytest.raises(ValueError, match="--processes needs --coordinator HOST:PORT, the address of process 0, got"),
        processes.connected_processes(Options(processes=2, coordinator=coordinator), "train.py"),
    ):
        pass


@contextlib.contextmanager
def fake_process(port):
    """Process 1 as seen by process 0: a control connection without beats."""
    hello = {"process": 1, "options": processes._compared(options_of(1, port))}
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{json.dumps(hello)}\n".encode())
    with connection:
        yield connection


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("closed", "process 1 ended before the run was complete"),
        ("silent", "process 1 has not responded for 1 s: it is stopped or cut off"),
        ("done", ""),
    ],
)
def test_leader_ends_when_a_process_is_lost(ended, fate, message):
    port = free_port()
    leader = processes._Leader(options_of(0, port), "train.py", None)
    thread = threading.Thread(target=leader.connect)
    thread.start()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")  # is ignored
    with fake_process(port) as connection:
        thread.join(10)
        if fate == "done":
            connection.sendall(b'{"done": true}\n')
            assert leader.links[0].done.wait(5)
        if fate == "silent":
            time.sleep(1.5)
    time.sleep(0.3)
    expected = [(f"{message}; go on with --resume in all processes", 1)] if message else []
    assert ended == expected


# The command in several processes

RUN = [
    "--data", "text.txt", "--max-steps", "1000000", "--hidden", "16", "--embedding", "8",
    "--batch", "8", "--window", "16", "--log-every", "2", "--mesh", "data=2",
]  # fmt: skip


def start(folder, cluster=False, texts=(TEXT, TEXT)):
    """Starts two processes, connected by options or by the variables of a cluster, each with a text."""
    port = free_port()
    both = []
    for n, text in enumerate(texts):
        (folder / str(n)).mkdir()
        (folder / str(n) / "text.txt").write_text(text, encoding="utf-8")
        settings = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(n)]
        slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(n), "LOCALID": str(n)}
        variables = {f"SLURM_{name}": value for name, value in slurm.items()} | {"JAX_COORDINATOR_PORT": str(port)}
        connection = ["--coordinator", "auto"] if cluster else settings
        both.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *RUN, "--run-dir", str(folder / "run"), *connection],
                cwd=folder / str(n),
                env=ENVIRONMENT | variables if cluster else ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"{n}.log").open("w"),
            )
        )
    return both


def lines_of(folder, process):
    """Returns what a process printed to standard error, without the greeting of Gloo."""
    lines = (folder / f"{process}.log").read_text().splitlines()
    return [line for line in lines if not line.startswith("[Gloo]")]


def wait_for_rows(folder):
    deadline = time.monotonic() + 240
    path = folder / "run" / "metrics.jsonl"
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("kind", "cluster"),
    [(signal.SIGKILL, False), (signal.SIGSTOP, False), (signal.SIGKILL, True)],
    ids=["killed", "stopped", "killed in a cluster"],
)
def test_others_end_with_one_line_when_a_process_is_lost(tmp_path, kind, cluster, victim):
    both = start(tmp_path, cluster)
    try:
        wait_for_rows(tmp_path)
        both[victim].send_signal(kind)
        assert both[1 - victim].wait(30) == 1
    finally:
        for process in both:
            os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
    what = "ended before the run was complete" if kind == signal.SIGKILL else "has not responded for 25 s.*"
    (line,) = lines_of(tmp_path, 1 - victim)
    assert re.fullmatch(rf"train\.py: process {victim} {what}; go on with --resume in all processes", line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_error_of_one_process_ends_the_other(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()  # only process 0 looks into the run directory
    both = start(tmp_path)
    assert [process.wait(240) for process in both] == [1, 1]
    assert lines_of(tmp_path, 0) == [
        f"train.py: --run-dir {tmp_path / 'run'} is not an empty folder; a run never overwrites another: "
        "choose a new name"
    ]
    (line,) = lines_of(tmp_path, 1)
    assert line.startswith("train.py: process 0 ended before the run was complete")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("other", [TEXT[1:] + TEXT[:1], TEXT + "~"], ids=["same vocabulary", "larger vocabulary"])
def test_processes_with_other_data_end_before_the_first_step(tmp_path, other):
    both = start(tmp_path, texts=(TEXT, other))
    assert [process.wait(240) for process in both] == [1, 1]
    (line,) = lines_of(tmp_path, 0)
    assert re.fullmatch(
        r"train\.py: all processes must read the same data: its SHA-256 is \w{12} in process 1 .*", line
    )
    assert lines_of(tmp_path, 1) == [line]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_sigterm_to_one_process_stops_all_with_a_checkpoint(tmp_path):
    both = start(tmp_path)
    wait_for_rows(tmp_path)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(240) for process in both] == [128 + signal.SIGTERM] * 2
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert lines_of(tmp_path, 0) == lines_of(tmp_path, 1) == []
