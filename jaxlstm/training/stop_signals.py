"""Ctrl-C, SIGTERM and a closed terminal end the start-up at once, and a run after its current step."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


_interruptions: list[int] = []  # the signals that raised `Interrupted`


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process; ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def raise_on_stop_signals() -> None:
    """Makes stop signals raise `Interrupted`, so that files being written are removed; ``nohup`` is respected."""
    for kind in STOP_SIGNALS:
        if not _ignores_hangup(kind):
            signal.signal(kind, _interrupt)


def repeat_ignored_signal(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Sends a signal again whose `Interrupted` Python ignored, as it does in callbacks of the garbage collector.

    Args:
      unraisable: argument of ``sys.unraisablehook``.

    Returns:
      Whether the exception was an `Interrupted`.
    """
    if not isinstance(unraisable.exc_value, Interrupted):
        return False
    threading.Timer(0.05, os.kill, [os.getpid(), unraisable.exc_value.number]).start()
    return True


def skip_teardown_if_interrupted() -> None:
    """Ends an interrupted process before Python takes its objects down; for `atexit`.

    JAX may crash there if the signal interrupted its start or a compilation.
    """
    if _interruptions:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        os._exit(128 + _interruptions[-1])


def catch_stop_signals() -> list[signal.Signals]:
    """Installs handlers of the stop signals.

    Returns:
      An empty list to which the first signal is appended when it arrives; the previous handlers are then active again.
    """
    received: list[signal.Signals] = []

    def handler(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        for kind, previous in previous_handlers.items():
            signal.signal(kind, previous)

    caught = [kind for kind in STOP_SIGNALS if not _ignores_hangup(kind)]
    previous_handlers = {kind: signal.signal(kind, handler) for kind in caught}
    return received


def _ignores_hangup(kind: int) -> bool:
    return kind not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(kind) == signal.SIG_IGN


def _interrupt(number: int, _: FrameType | None) -> None:
    _interruptions.append(number)
    raise Interrupted(number)
