"""The cells of a stack within a tree of named arrays: which of them are there, and in which order."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxlstm.interop.conversion import Layout, Place, refuse
from jaxlstm.lstm import LSTM


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, such as ``forward_rnn/cell/hi/bias``; a box around an array has no name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path.removesuffix("/value"): leaf for path, leaf in named.items()}


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: dictionaries within dictionaries."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = array
    return tree


def find(lstm: LSTM, layout: Layout, arrays: Mapping[str, Any], cell: str) -> tuple[dict[str, Any], Place]:
    """The arrays of the cells in a tree, and where among them those of a layer and direction are.

    Cells of one stack have one path, but for the numbers in it, which count layers and directions, and for forward and
    backward. Everything else in the tree belongs to somebody else.

    Args:
      lstm: says how many cells there are to be.
      layout: the framework's.
      arrays: by path.
      cell: regular expression of an array's path that tells a cell; the group ``cell`` is the path of the cell.

    Raises:
      ValueError: naming the option, if the framework has no place for one; naming the cells found, if they are not as
        many as layers and directions, or not of one stack.
    """
    refuse(lstm, layout)
    found = {match["cell"] for name in arrays if (match := re.fullmatch(cell, name))}
    wanted = lstm.num_layers * lstm.num_directions
    if len(found) != wanted or len({_stem(path, lstm.bidirectional) for path in found}) != 1:
        names = ", ".join(repr(path.rstrip("/")) for path in _ordered(found)) or "none"
        raise ValueError(
            f"{layout.owner} weights must be the cells of one stack, {wanted} of them for "
            f"num_layers={lstm.num_layers} and bidirectional={lstm.bidirectional}; found {names}"
        )
    cells = _ordered(found)
    own = {name: array for name, array in arrays.items() if name.startswith(tuple(cells))}
    return own, lambda layer, direction, name: cells[layer * lstm.num_directions + direction] + name


def _stem(path: str, bidirectional: bool) -> str:
    return re.sub(r"_?\d+", "", path.replace("backward", "forward") if bidirectional else path)


def _ordered(paths: Iterable[str]) -> list[str]:
    """By the numbers in them, lowest first, and forward before backward."""

    def key(path: str) -> list[int | str]:
        path = path.replace("forward", "0").replace("backward", "1")
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]

    return sorted(paths, key=key)
