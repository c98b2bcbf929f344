"""Files in the safetensors format, under the names of PyTorch."""

import os
from pathlib import Path
from typing import Any

from jaxlstm.atomic_write import atomic_write
from jaxlstm.interop.torch import from_torch, own_names, to_torch
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params


def load_safetensors(lstm: LSTM, path: str | os.PathLike[str], prefix: str | None = None) -> Params:
    """Parameters from a file of PyTorch's names, such as a published model; see `from_torch`.

    Of the file only the LSTM's own arrays are read.

    Args:
      lstm: the configuration.
      path: of the file.
      prefix: of the names, such as ``"encoder.lstm"``; where None, that of the one LSTM that there is.

    Raises:
      ImportError: if safetensors is not installed.
      FileNotFoundError, safetensors.SafetensorError: if there is no file, or it is of another format.
      ValueError, TypeError: as `from_torch`.
    """
    safe_open = _library().safe_open
    with safe_open(path, framework="numpy") as file:
        return from_torch(lstm, {name: file.get_tensor(name) for name in own_names(file.keys(), prefix)}, prefix)


def save_safetensors(lstm: LSTM, params: Params, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write parameters to a file, whole or not at all, under PyTorch's names; see `to_torch`.

    Args:
      lstm: the configuration.
      params: its parameters.
      path: of the file to be.
      overwrite: whether a file that is there already, whoever wrote it, is replaced.

    Raises:
      FileExistsError: if there is a file already and it is not to be replaced.
      ImportError: if safetensors is not installed.
      ValueError, TypeError: as `to_torch`.
    """
    data = _library().numpy.save(to_torch(lstm, params), {"format": "pt"})  # which makes it PyTorch's to other readers
    with atomic_write(Path(path), overwrite=overwrite) as file:
        file.write(data)


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError("files in this format need safetensors: pip install 'jaxlstm[interop]'") from None
    return safetensors
