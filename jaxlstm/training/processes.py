"""Connects the processes of a run, compares their options and data, and ends all of them when one is lost.

Process 0 listens at ``--coordinator``. Each other process opens a control connection to it and sends its options; then
both ends send a message every second. A process whose control connection closes or stays silent prints one line and
ends with status 1. Without this, JAX would notice a lost process after 100 seconds and abort with a C++ backtrace.

JAX's own connections pass through the same port: a relay in each process forwards them. When process 0 is gone, the
relay keeps JAX's connection open, because JAX aborts the process when it closes.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlstm.errors import first_line
from jaxlstm.training import config
from jaxlstm.training.config import Options
from jaxlstm.training.output import printable

AUTO = "auto"  # instead of the address of process 0
BEAT_SECONDS = 1.0  # between two messages of a process
SILENCE_SECONDS = 25.0  # a process that sent no message for so long is lost
CONNECT_SECONDS = 120.0  # to wait for all processes at the start
MISMATCH_SECONDS = 15.0  # to wait for the other processes to tell them that the options differ
NOT_COMPARED = ("process", "coordinator")

_ending = threading.Lock()  # held by the thread that ends the process, so that one line is printed


class DifferentDataError(ValueError):
    """The processes of a run read different data; raised in all of them."""


def end_process(prog: str, message: str, status: int = 1) -> NoReturn:
    """Prints one line and ends the process.

    A process connected to others ends at once: Python would wait for them, and one of them may be lost.

    Args:
      prog: name of the program.
      message: what happened.
      status: exit status.
    """
    line = printable(f"{prog}: {message}").replace("\n", " ")
    if not jax.distributed.is_initialized():
        if status == 1:
            raise SystemExit(line)  # Python prints it
        print(line, file=sys.stderr)
        raise SystemExit(status)
    if "Gloo" in message:  # a collective failed; the thread that watches the lost process names it
        time.sleep(2)
    _ending.acquire()
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides it
    print(show_cursor + line, file=sys.stderr, flush=True)
    os._exit(status)


@contextlib.contextmanager
def connected_processes(options: Options, prog: str) -> Iterator[int]:
    """Connects the processes of ``--processes``; must be entered before anything else uses a device.

    While the context is active, the loss of a process ends all others. Leaving it waits for all of them to leave it.
    The context returns the number of processes.

    Args:
      options: options of the run, which must be the same in all processes except for ``--process``.
      prog: name of the program, for the line that it ends with.

    Raises:
      ValueError: if the processes cannot be connected, or their options differ.
    """
    if options.coordinator != AUTO and options.processes == 1:
        if options.coordinator is not None or options.process != 0:
            raise ValueError("--coordinator and --process need --processes, got --processes 1")
        yield 1
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take over SIGTERM
    local_devices = None
    if options.coordinator == AUTO:
        options, local_devices = _ask_cluster(options)
    if options.process >= options.processes:
        raise ValueError(f"--process must be less than --processes {options.processes}, got {options.process}")
    group = (_Leader if options.process == 0 else _Follower)(options, prog, local_devices)
    group.connect()
    try:
        yield options.processes
    except DifferentDataError:  # all processes leave, so that each prints this error and none reports a lost process
        group.leave()
        raise
    group.leave()


def check_same_data(fingerprint: str) -> None:
    """Checks that all processes read the same data, which the options alone do not ensure.

    Args:
      fingerprint: SHA-256 of the data of this process in hexadecimal digits, or empty for data that are generated.

    Raises:
      DifferentDataError: if the data of a process differ from those of process 0.
    """
    if jax.process_count() == 1:
        return
    gathered = multihost_utils.process_allgather(np.frombuffer(fingerprint.encode().ljust(64), np.uint8))
    first, *others = (row.tobytes().decode().strip() for row in gathered)
    for number, other in enumerate(others, start=1):
        if other != first:
            raise DifferentDataError(
                f"all processes must read the same data: its SHA-256 is {other:.12} in process {number} "
                f"and {first:.12} in process 0; give all of them the same files"
            )


def _ask_cluster(options: Options) -> tuple[Options, Sequence[int] | None]:
    """Returns the options with the settings of the cluster, and the indices of this process' devices, None for all.

    Raises:
      ValueError: if JAX knows no cluster here.
    """
    try:
        # JAX has no public function for this: `jax.distributed.initialize` asks the cluster and connects at once.
        from jax._src.clusters import ClusterEnv

        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(CONNECT_SECONDS)
        )
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(
            f"--coordinator {AUTO} gets no settings from the cluster: {first_line(error)}; give HOST:PORT, --processes "
            "and --process"
        ) from None
    if address is None or processes is None or process is None:
        raise ValueError(
            f"--coordinator {AUTO} finds no cluster that JAX knows; give HOST:PORT, --processes and --process"
        )
    return replace(options, coordinator=address, processes=processes, process=process), devices


def _compared(options: Options) -> dict[str, Any]:
    """Returns the options that must be the same in all processes, as JSON values."""
    values = {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


class _Link:
    """The control connection to another process: one JSON object per line, an empty one every second.

    Args:
      connection: the open connection.
      name: name of the other process in messages.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name = name
        self.done = threading.Event()  # the other process left `connected_processes`
        self._connection = connection
        self._connection.settimeout(SILENCE_SECONDS)
        self._lines = connection.makefile("r", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; a failure is noticed by `receive`."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(f"{json.dumps(message)}\n".encode())

    def receive(self) -> dict[str, Any]:
        """Returns the next message that is not empty.

        Raises:
          ConnectionError: if the other process ended or does not respond.
        """
        try:
            while line := self._lines.readline():
                if message := json.loads(line):
                    return message
        except TimeoutError:
            raise ConnectionError(
                f"{self.name} has not responded for {SILENCE_SECONDS:.0f} s: it is stopped or cut off"
            ) from None
        except (OSError, ValueError):
            pass
        raise ConnectionError(f"{self.name} ended before the run was complete")

    def beat(self) -> None:
        """Sends an empty message every second, for as long as the process lives."""
        while True:
            self.send({})
            time.sleep(BEAT_SECONDS)


class _Group:
    """The connections of one process to the others."""

    def __init__(self, options: Options, prog: str, local_devices: Sequence[int] | None) -> None:
        self.options, self.prog, self.local_devices = options, prog, local_devices
        self.links: list[_Link] = []

    def add(self, link: _Link) -> None:
        """Adds a connection and starts its beat."""
        self.links.append(link)
        _start(link.beat)

    def initialize_jax(self, address: str, **options: Any) -> None:
        """Connects JAX and watches the connections."""
        for link in self.links:
            _start(self.watch, link)
        try:
            jax.distributed.initialize(
                address, self.options.processes, self.options.process, self.local_devices, **options
            )
        except RuntimeError as error:
            raise ValueError(f"cannot connect the processes: {first_line(error)}") from None

    def watch(self, link: _Link) -> None:
        """Receives the messages of a process until it is done; ends this one if that process is lost."""
        try:
            while not link.done.is_set():
                message = link.receive()
                if "lost" in message:
                    raise ConnectionError(message["lost"])
                if "done" in message:
                    link.done.set()
        except ConnectionError as error:
            self.lost(str(error))

    def lost(self, reason: str) -> NoReturn:
        """Tells the other processes why this one ends, and ends it."""
        for link in self.links:
            link.send({"lost": reason})
        end_process(self.prog, f"{reason}; go on with --resume in all processes")

    def leave(self) -> None:
        """Waits until all processes are done, then disconnects JAX."""
        for link in self.links:
            link.send({"done": True})
        for link in self.links:
            link.done.wait()
        jax.distributed.shutdown()


class _Leader(_Group):
    """Process 0: accepts the connections of the others."""

    def __init__(self, options: Options, prog: str, local_devices: Sequence[int] | None) -> None:
        super().__init__(options, prog, local_devices)
        self.lock = threading.Lock()  # held while a process is registered
        self.numbers = {0}  # of the processes that connected, this one included
        self.error = ""  # why the run cannot start

    def connect(self) -> None:
        """Accepts all processes, compares their options and connects JAX."""
        _, port = _parse_address(self.options.coordinator)
        try:
            server = _listen(port)
        except OSError as error:
            with contextlib.suppress(ValueError):  # if another process 0 listens there, it ends too
                _Follower(self.options, self.prog, None).join()
            raise ValueError(f"--coordinator {self.options.coordinator}: {error.strerror or error}") from None
        service_port = _free_port()
        _start(_accept, server, lambda connection: self.welcome(connection, service_port))
        self.wait_for_all()
        for link in self.links:
            link.send({"error": self.error} if self.error else {"start": True})
        if self.error:
            raise ValueError(self.error)
        address = f"127.0.0.1:{service_port}"
        self.initialize_jax(address, coordinator_bind_address=address)

    def wait_for_all(self) -> None:
        """Waits until every process connected, or until an error was sent to those that did."""
        expected = set(range(self.options.processes))
        deadline = time.monotonic() + CONNECT_SECONDS
        while not expected <= self.numbers:
            if self.error:
                deadline = min(deadline, time.monotonic() + MISMATCH_SECONDS)
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, sorted(expected - self.numbers)))
                self.error = self.error or f"--process {missing} did not connect within {CONNECT_SECONDS:.0f} s"
                return
            time.sleep(0.05)

    def welcome(self, connection: socket.socket, service_port: int) -> None:
        """Handles a new connection: JAX's is forwarded, a process is registered."""
        connection.settimeout(SILENCE_SECONDS)
        try:
            hello = json.loads(_read_line(connection))
            if hello == "jax":
                _relay(connection, ("127.0.0.1", service_port), b"", on_lost=lambda: None)
                return
            number, options = int(hello["process"]), dict(hello["options"])
        except (OSError, ValueError, TypeError, KeyError):  # not one of the processes
            connection.close()
            return
        with self.lock:
            self.error = self.error or self.difference(number, options)
            self.add(_Link(connection, f"process {number}"))
            self.numbers.add(number)

    def difference(self, number: int, theirs: dict[str, Any]) -> str:
        """Returns why a process does not belong to this run, or an empty text."""
        for name, ours in _compared(self.options).items():
            if theirs.get(name) != ours:
                return (
                    "all processes must be started with the same options: "
                    f"{config.flag(name)} is {theirs.get(name)} in process {number} and {ours} in process 0"
                )
        return f"two processes have --process {number}" if number in self.numbers else ""


class _Follower(_Group):
    """A process that connects to process 0."""

    def connect(self) -> None:
        """Connects to process 0, and connects JAX."""
        address, link = self.join()
        relay = socket.create_server(("127.0.0.1", 0))
        _start(_accept, relay, lambda connection: _relay(connection, address, b'"jax"\n', on_lost=link.done.wait))
        self.initialize_jax(f"127.0.0.1:{relay.getsockname()[1]}")

    def join(self) -> tuple[tuple[str, int], _Link]:
        """Connects to process 0, which compares the options; returns its address and the connection."""
        address = _parse_address(self.options.coordinator)
        try:
            connection = _connect(address)
        except OSError as error:
            raise ValueError(
                f"--coordinator {self.options.coordinator}: process 0 did not answer within {CONNECT_SECONDS:.0f} s: "
                f"{error.strerror or error}"
            ) from None
        link = _Link(connection, "process 0")
        link.send({"process": self.options.process, "options": _compared(self.options)})
        self.add(link)
        try:
            answer = link.receive()
        except ConnectionError as error:
            raise ValueError(str(error)) from None
        if "error" in answer:
            raise ValueError(answer["error"])
        return address, link


def _parse_address(coordinator: str | None) -> tuple[str, int]:
    """Returns host and port."""
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--processes needs --coordinator HOST:PORT, the address of process 0, got {coordinator}")
    return host.strip("[]"), int(port)


def _listen(port: int) -> socket.socket:
    """Listens at a port of all network interfaces, as JAX's coordinator does."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _connect(address: tuple[str, int]) -> socket.socket:
    """Connects to an address at which another process may not listen yet."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(address, timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _read_line(connection: socket.socket) -> bytes:
    """Reads a line byte by byte: bytes after it belong to another reader."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 2**16:
            raise OSError("not a line")
        line += byte
    return line


def _accept(server: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Handles each connection to a server in a thread."""
    while True:
        connection, _ = server.accept()
        _start(handle, connection)


def _relay(near: socket.socket, address: tuple[str, int], greeting: bytes, on_lost: Callable[[], Any]) -> None:
    """Forwards a connection to an address, after sending a greeting there.

    Args:
      near: the connection.
      address: host and port to connect to.
      greeting: bytes to send first.
      on_lost: called when the far end closed, before ``near`` is closed.
    """
    try:
        far = _connect(address)
        far.sendall(greeting)
    except OSError:
        near.close()
        return
    for connection in (near, far):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _start(_forward, near, far)
    _forward(far, near, on_lost)


def _forward(source: socket.socket, target: socket.socket, on_lost: Callable[[], Any] = lambda: None) -> None:
    """Copies bytes until one end closes, then closes the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    on_lost()
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _start(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function in a thread that does not keep the process alive."""
    threading.Thread(target=function, args=arguments, daemon=True).start()
