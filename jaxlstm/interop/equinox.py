"""Equinox: one `equinox.nn.LSTMCell`, or `GRUCell` for ``cell="gru"``, for each layer and direction."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm.errors import optional_package
from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.conversion import OptionValues, WeightFormat
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

CELL_PATTERN = r"(?P<cell>(.*/)?)weight_ih"


def from_equinox(lstm: RNN, cells: Any) -> Params:
    """Returns parameters from cells of Equinox.

    Args:
      lstm: the configuration.
      cells: a cell, or a list of cells with the lowest layer first. For two directions a pair (forward, backward), or
        a list of pairs. A module that has them in one attribute is accepted too.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that the cell does not have (a projection, peepholes,
        coupled gates, layer normalization, a learned state), if the number of cells is not the number of layers times
        directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    return cell_discovery.params_from_cells(lstm, EQUINOX, cell_discovery.arrays_by_path(cells), CELL_PATTERN)


def to_equinox(lstm: RNN, params: Params) -> Any:
    """Returns a cell of Equinox, or a list of one cell per layer; for two directions, pairs in place of cells.

    Raises:
      ImportError: if Equinox is not installed: ``pip install 'jaxlstm[interop]'``.
      ValueError, TypeError: if the LSTM has an option that the cell does not have, or ``params`` are of another
        configuration.
    """
    arrays = conversion.arrays_from_params(lstm, EQUINOX, params, lambda n, d, name: f"{n}/{d}/{name}")
    with optional_package("equinox", extra="interop", purpose="to_equinox"):
        import equinox
    cell_class = equinox.nn.GRUCell if lstm.cell == "gru" else equinox.nn.LSTMCell

    def create_cell(cell_arrays: dict[str, Any]) -> Any:
        input_size = cell_arrays["weight_ih"].shape[1]
        cell = cell_class(input_size, lstm.hidden_size, use_bias=lstm.use_bias, key=jax.random.key(0))
        return equinox.tree_at(
            lambda cell: [getattr(cell, name) for name in cell_arrays],
            cell,
            [jnp.asarray(array) for array in cell_arrays.values()],
        )

    layers = [
        tuple(create_cell(cell_arrays) for cell_arrays in directions.values())
        for directions in cell_discovery.nest_by_path(arrays).values()
    ]
    entries = layers if lstm.bidirectional else [layer[0] for layer in layers]
    return entries if lstm.num_layers > 1 else entries[0]


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    arrays = {"weight_ih": weights.w_x, "weight_hh": weights.w_h, "bias": weights.b}
    if lstm.cell == "gru" and weights.b is not None:  # bias_n is of the candidate's part that reads h
        arrays["bias"], arrays["bias_n"] = np.split(weights.b, [3 * lstm.hidden_size])
    return arrays


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    b = arrays.get("bias")
    if "bias_n" in arrays:
        b = np.concatenate([arrays["bias"], arrays["bias_n"]])
    return {"w_x": arrays["weight_ih"], "w_h": arrays["weight_hh"], "b": b}


def _supported_options(lstm: RNN) -> OptionValues:
    return {"cell": ("lstm", "gru"), "use_bias": (True, False)}


EQUINOX = WeightFormat("equinox", _to_arrays, _from_arrays, _supported_options)
