"""Standard output and error that never end a run, and text that cannot control a terminal."""

import io
import os
import signal
import sys
from typing import Any

CONTROL_CHARACTERS = {  # all but newline and tab, in the spelling of Python
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """Returns text with its control characters spelled out: escape sequences would act on the terminal."""
    return text.translate(CONTROL_CHARACTERS)


class LenientFile(io.FileIO):
    """A file descriptor whose failed writes are dropped: to a closed pipe, a full disk or a terminal that is gone."""

    error: OSError | None = None  # of the last failed write

    def write(self, data: Any, /) -> int:
        """Writes the data; returns their length also if that failed, so that callers go on."""
        try:
            written = super().write(data)
        except OSError as error:
            self.error, written = error, None
        return memoryview(data).nbytes if written is None else written  # None: a non-blocking pipe is full


def make_output_lenient() -> None:
    """Makes standard output and error drop failed writes, and escape characters that their encoding does not have.

    A run must not end because nobody reads its progress; its results are in files.
    """
    sys.stdout, sys.stderr = _lenient(sys.stdout), _lenient(sys.stderr)


def check_written(stream: Any) -> None:
    """Flushes a stream whose contents are a result, and raises the error of a lenient one.

    Raises:
      OSError: if something could not be written.
      SystemExit: without a message, if the reader closed the pipe.
    """
    stream.flush()
    file = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(file, LenientFile) or file.error is None:
        return
    if isinstance(file.error, BrokenPipeError):
        raise SystemExit(128 + signal.SIGPIPE)
    raise OSError(f"cannot write to standard output: {file.error.strerror}")


def _lenient(stream: Any) -> Any:
    """Returns a lenient stream on the same file descriptor; one that was closed at the start is replaced."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        file = io.BufferedWriter(LenientFile(stream.fileno(), "w", closefd=False))
    except OSError:  # not a file: a program that calls the command captures its output
        return stream
    line_buffering = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=line_buffering)
