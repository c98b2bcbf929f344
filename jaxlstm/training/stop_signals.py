"""Ctrl-C and SIGTERM: the first one stops a run after its current step, the second one at once."""

import signal


def catch_stop_signals() -> list[signal.Signals]:
    """Installs handlers for SIGINT and SIGTERM.

    Returns:
      An empty list to which the first signal is appended when it arrives; the previous handlers are then active again.
    """
    received: list[signal.Signals] = []

    def handler(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        for kind, previous in previous_handlers.items():
            signal.signal(kind, previous)

    previous_handlers = {kind: signal.signal(kind, handler) for kind in (signal.SIGINT, signal.SIGTERM)}
    return received
