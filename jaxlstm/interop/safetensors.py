"""Files in the safetensors format, with PyTorch's names."""

import os
from pathlib import Path

from jaxlstm import validation
from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import optional_package
from jaxlstm.interop.torch import from_torch, lstm_array_names, to_torch
from jaxlstm.params import Params
from jaxlstm.regular_file import open_regular
from jaxlstm.rnn import RNN


def load_safetensors(lstm: RNN, path: str | os.PathLike[str], prefix: str | None = None) -> Params:
    """Returns parameters from a file with PyTorch's names, such as a published model; see `from_torch`.

    Only the arrays of the LSTM are read from the file.

    Args:
      lstm: the configuration.
      path: path of the file.
      prefix: prefix of the names, such as ``"encoder.lstm"``; None if the file contains a single LSTM.

    Raises:
      ImportError: if safetensors is not installed: ``pip install 'jaxlstm[interop]'``.
      OSError, safetensors.SafetensorError: if the file does not exist, is not a regular file or has another format.
      ValueError, TypeError: as `from_torch`.
    """
    with optional_package("safetensors", extra="interop", purpose="load_safetensors"):
        from safetensors import safe_open
    open_regular(Path(path)).close()  # safetensors waits for the writer of a named pipe
    with safe_open(path, framework="numpy") as file:
        names = lstm_array_names(file.keys(), prefix)
        return from_torch(lstm, {name: file.get_tensor(source) for name, source in names.items()}, prefix)


def save_safetensors(lstm: RNN, params: Params, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes parameters to a file with PyTorch's names, completely or not at all; see `to_torch`.

    Args:
      lstm: the configuration.
      params: its parameters.
      path: path of the file.
      overwrite: whether to replace an existing file.

    Raises:
      FileExistsError: if the file exists and ``overwrite`` is False.
      ImportError: if safetensors is not installed: ``pip install 'jaxlstm[interop]'``.
      ValueError, TypeError: as `to_torch`.
    """
    overwrite = validation.flag("overwrite", overwrite)
    with optional_package("safetensors", extra="interop", purpose="save_safetensors"):
        from safetensors.numpy import save
    data = save(to_torch(lstm, params), {"format": "pt"})  # marks the file as PyTorch's for other readers
    with atomic_write(Path(path), overwrite=overwrite) as file:
        file.write(data)
