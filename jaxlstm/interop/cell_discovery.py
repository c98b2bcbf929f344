"""Finds the cells of a stacked LSTM in a tree of named arrays, and their order."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import NameFn, WeightFormat
from jaxlstm.params import Params
from jaxlstm.rnn import RNN


def arrays_by_path(tree: Any) -> dict[str, Any]:
    """Flattens a tree to arrays by path, such as ``forward_rnn/cell/hi/bias``; boxes around arrays add no name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {path.removesuffix("/value"): leaf for path, leaf in arrays.items()}


def nest_by_path(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dictionaries from arrays by path; the inverse of `arrays_by_path`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = array
    return tree


def params_from_cells(lstm: RNN, weight_format: WeightFormat, arrays: Mapping[str, Any], cell_pattern: str) -> Params:
    """Returns the parameters of the cells found among arrays by path; see `find_cells` and `params_from_arrays`."""
    cell_arrays, name_fn = find_cells(lstm, weight_format, arrays, cell_pattern)
    return conversion.params_from_arrays(lstm, weight_format, cell_arrays, name_fn)


def find_cells(
    lstm: RNN, weight_format: WeightFormat, arrays: Mapping[str, Any], cell_pattern: str
) -> tuple[dict[str, Any], NameFn]:
    """Returns the arrays of the cells in a tree, and the function that names them by layer and direction.

    Cells of one stack have the same path except for numbers, which count layers and directions, and for the words
    forward and backward. All other arrays are ignored.

    Args:
      lstm: the configuration, which determines the number of cells.
      weight_format: the framework's format of one cell.
      arrays: arrays by path.
      cell_pattern: regular expression for the path of an array by which a cell is recognized; its group ``cell`` is the
        path of the cell.

    Raises:
      ValueError: naming the option, if the format does not support it; naming the cells found, if their number is not
        the number of layers times directions, or if they are not cells of one stack.
    """
    conversion.check_supported(lstm, weight_format)
    paths = {match["cell"] for name in arrays if (match := re.fullmatch(cell_pattern, name))}
    num_cells = lstm.num_layers * lstm.num_directions
    if len(paths) != num_cells or len({_path_without_position(path, lstm.bidirectional) for path in paths}) != 1:
        found = ", ".join(repr(path.rstrip("/")) for path in _sort_cells(paths)) or "none"
        expected = "1 cell" if num_cells == 1 else f"{num_cells} cells"
        raise ValueError(
            f"{weight_format.framework} weights must contain one stack of {expected} for "
            f"num_layers={lstm.num_layers} and bidirectional={lstm.bidirectional}; found {found}"
        )
    cells = _sort_cells(paths)
    cell_arrays = {name: array for name, array in arrays.items() if name.startswith(tuple(cells))}
    return cell_arrays, lambda layer, direction, name: cells[layer * lstm.num_directions + direction] + name


def _path_without_position(path: str, bidirectional: bool) -> str:
    return re.sub(r"_?\d+", "", path.replace("backward", "forward") if bidirectional else path)


def _sort_cells(paths: Iterable[str]) -> list[str]:
    """Sorts paths by the numbers in them, lowest first, and forward before backward."""

    def sort_key(path: str) -> list[int | str]:
        path = path.replace("forward", "0").replace("backward", "1")
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]

    return sorted(paths, key=sort_key)
