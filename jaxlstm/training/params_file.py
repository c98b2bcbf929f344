"""The parameters of a model in a safetensors file, replaced atomically and checked completely before use.

Each array is named by its path in the parameters, such as ``lstm.layers.0.forward.w_x``, and has the shape and dtype of
the training program, so that any reader of the format can load it:

    safetensors.numpy.load_file("best.safetensors")["lstm.layers.0.forward.w_x"]

The metadata of the file hold the SHA-256 of its contents; see `jaxlstm.checksum`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.checksum import KEY, PLACEHOLDER, check_digest, insert_digest
from jaxlstm.errors import first_line
from jaxlstm.regular_file import read_regular

BEST = "best.safetensors"  # in the run directory: the parameters with the lowest validation loss


def save_params(path: Path, params: Any) -> str:
    """Writes parameters to a file; an existing file is replaced only by a complete one.

    Returns:
      The SHA-256 in the file; see `saved_digest`.
    """
    arrays = {name: np.array(leaf, order="C") for name, leaf in named_leaves(params).items()}
    content = insert_digest(safetensors.numpy.save(arrays, {KEY: PLACEHOLDER}))
    with atomic_write(path) as file:
        file.write(content)
    return _metadata(content)[KEY]


def saved_digest(path: Path) -> str:
    """Returns the SHA-256 in a file that `load_params` has checked."""
    return _metadata(read_regular(path))[KEY]


def load_params(path: Path, init: Callable[[Array], Any]) -> Any:
    """Reads the parameters that `save_params` wrote.

    Args:
      path: the file.
      init: returns parameters of the same structure for a PRNG key; it is traced, not run.

    Raises:
      ValueError: if the file is missing or damaged, holds the parameters of another model, or a value is not finite.
    """
    template = jax.eval_shape(init, jax.random.key(0))
    try:
        content = read_regular(path)
    except OSError as error:
        raise ValueError(f"no checkpoint {path}: {error.strerror}") from None
    check_digest(path, content, _metadata(content).get(KEY))
    try:
        arrays = safetensors.numpy.load(content)
    except Exception as error:  # safetensors raises errors of several types
        raise ValueError(f"{path} is damaged: {first_line(error)}") from None
    check_shapes(str(path), shapes(arrays), shapes(template))
    leaves = [jnp.asarray(arrays[name]) for name in named_leaves(template)]
    params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    check_finite(str(path), params)
    return params


def check_finite(label: str, params: Any) -> None:
    """Checks that all parameters are finite.

    Raises:
      ValueError: names the first array with NaN or infinite values.
    """
    for name, leaf in named_leaves(params).items():
        if not jnp.isfinite(leaf).all():
            raise ValueError(f"{label}: {name} has values that are not finite")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as ``lstm.layers.0.forward.w_x``."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def shapes(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of every leaf by path, such as ``float32[2,3]``."""
    return {name: f"{a.dtype}{list(a.shape)}".replace(" ", "") for name, a in named_leaves(tree).items()}


def check_shapes(label: str, received: dict[str, str], expected: dict[str, str]) -> None:
    """Checks the dtypes and shapes of all arrays of a file, as `shapes` returns them.

    Raises:
      ValueError: names the first array that is missing, unexpected or different.
    """
    for name in sorted(expected | received):
        if received.get(name) != expected.get(name):
            raise ValueError(
                f"{label} is of another model: {name} is {received.get(name, 'absent')}, "
                f"expected {expected.get(name, 'absent')}"
            )


def _metadata(content: bytes) -> dict[str, Any]:
    """Returns the metadata in the header of a safetensors file; none if the header cannot be read."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")].decode())
        metadata = header["__metadata__"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
