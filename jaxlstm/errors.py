"""Helpers for one-line error messages."""

import contextlib
from collections.abc import Iterator


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    message = str(error).strip()
    return message.split("\n")[0] if message else type(error).__name__


@contextlib.contextmanager
def optional_package(package: str, *, extra: str, purpose: str, distribution: str | None = None) -> Iterator[None]:
    """Turns a failed import of an optional package into one line that names the extra to install.

        with optional_package("onnx", extra="onnx", purpose="to_onnx"):
            import onnx

    Args:
      package: name of the top-level package. The failed import of any other package is not changed.
      extra: name of the extra of this project that installs the package.
      purpose: subject of the message: the feature that needs the package.
      distribution: name of the package on PyPI, if it differs.

    Raises:
      ImportError: if the package is not installed.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {distribution or package}, which is not installed: pip install 'jaxlstm[{extra}]'",
            name=package,
        ) from None
