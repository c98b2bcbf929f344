"""The parameters of a model in a file: MessagePack, written by Flax, replaced atomically."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import first_line

BEST = "best.msgpack"  # in the run directory: the parameters with the lowest validation loss


def save_params(path: Path, params: Any) -> None:
    """Writes parameters to a file; an existing file is replaced only by a complete one."""
    with atomic_write(path) as file:
        file.write(flax.serialization.to_bytes(params))


def load_params(path: Path, init: Callable[[Array], Any]) -> Any:
    """Reads the parameters that `save_params` wrote.

    Args:
      path: the file.
      init: returns parameters of the same structure for a PRNG key; it is traced, not run.

    Raises:
      ValueError: if the file is missing or damaged, or holds the parameters of another model.
    """
    template = jax.eval_shape(init, jax.random.key(0))
    try:
        params: Any = flax.serialization.from_bytes(template, path.read_bytes())
    except OSError as error:
        raise ValueError(f"no checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # MessagePack and Flax raise errors of many types
        raise ValueError(f"{path} is damaged or of another model: {first_line(error)}") from None
    for (key_path, expected), leaf in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(params)):
        if leaf.shape != expected.shape:
            name = jax.tree_util.keystr(key_path, simple=True, separator=".")
            raise ValueError(f"{path} is of another model: {name} has shape {leaf.shape}, expected {expected.shape}")
    return params
