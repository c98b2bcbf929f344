"""Flax linen: `LSTMCell`, `OptimizedLSTMCell` and `GRUCell`, as a cell, in `RNN`, in `Bidirectional`, and stacked."""

from typing import Any

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.flax_cells import CELL_PATTERNS, cell_path, format_name, gru_per_gate_format, lstm_per_gate_format
from jaxlstm.params import Params
from jaxlstm.rnn import RNN

FORMATS = {
    "lstm": lstm_per_gate_format("flax linen", forget_layer="if"),  # of both cells
    "gru": gru_per_gate_format("flax linen"),
}


def from_flax_linen(lstm: RNN, variables: Any) -> Params:
    """Returns parameters from the variables that ``init`` of a linen module returns.

    Cells are found anywhere in the tree. They are ordered by the numbers in their paths and by ``forward_rnn`` and
    ``backward_rnn``; all other arrays are ignored. Cells with otherwise different paths, such as an encoder's and a
    decoder's, are not one stack: pass the subtree of one of them.

    Args:
      lstm: the configuration.
      variables: the dictionary, its collection ``"params"``, a subtree, or a list of subtrees with the lowest layer
        first.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the network has an option that the cells do not have (no bias, a projection,
        peepholes, coupled gates, layer normalization, a learned state), if the number of cells is not the number of
        layers times directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    cell, arrays = format_name(lstm), cell_discovery.arrays_by_path(variables)
    return cell_discovery.params_from_cells(lstm, FORMATS[cell], arrays, CELL_PATTERNS[cell])


def to_flax_linen(lstm: RNN, params: Params) -> dict[str, Any]:
    """Returns variables for ``apply`` of an `RNN` of these cells, or of a `Bidirectional` for two directions.

    Several layers are named ``layers_0``, ``layers_1`` and so on, as in `nn.Sequential`.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the cells do not have, or ``params`` are of another
        configuration.
    """

    def full_path(layer: int, direction: int, name: str) -> str:
        layer_path = f"layers_{layer}/" if lstm.num_layers > 1 else ""
        return f"params/{layer_path}{cell_path(lstm, direction)}{name}"

    arrays = conversion.arrays_from_params(lstm, FORMATS[format_name(lstm)], params, full_path)
    return cell_discovery.nest_by_path(arrays)
