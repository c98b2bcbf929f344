"""Turns a call that blocks into a failed test."""

import contextlib
import signal


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the block once the time is over, also inside a system call that waits."""

    def stop(number, frame):
        raise TimeoutError(f"blocked for {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
