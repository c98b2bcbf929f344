"""Flax linen: the variables of `LSTMCell` or `OptimizedLSTMCell`, alone, in `RNN`, in `Bidirectional`, and stacked."""

from typing import Any

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.flax_cells import CELL, apart, within_layer
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params

LAYOUT = apart("flax linen", ("ii", "if", "ig", "io"))


def from_flax_linen(lstm: LSTM, variables: Any) -> Params:
    """Parameters from what ``init`` of a linen module returns.

    Both cells have the same. They are found wherever they lie, and ordered by the numbers in their paths and by
    ``forward_rnn`` and ``backward_rnn``; anything else in the module is not looked at. Cells whose paths differ
    otherwise, such as an encoder's and a decoder's, are not one stack: hand in the part that is meant.

    Args:
      lstm: the configuration.
      variables: the dictionary, its part ``"params"``, a part of that, or a list of such parts, lowest layer first.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that the cells have not (no bias, a projection,
        peepholes, coupled gates, layer normalisation, a learned state), if there are not as many cells as layers and
        directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    return conversion.read(lstm, LAYOUT, *cell_discovery.find(lstm, LAYOUT, cell_discovery.flatten(variables), CELL))


def to_flax_linen(lstm: LSTM, params: Params) -> dict[str, Any]:
    """What ``apply`` takes of an `RNN` of either cell, or for two directions of a `Bidirectional` of two.

    Those of several layers are in the place where `nn.Sequential` has them, ``layers_0`` and so on.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the cells have not, or ``params`` are not of this LSTM.
    """

    def place(layer: int, direction: int, name: str) -> str:
        which = f"layers_{layer}/" if lstm.num_layers > 1 else ""
        return f"params/{which}{within_layer(lstm, direction)}{name}"

    return cell_discovery.nested(conversion.write(lstm, LAYOUT, params, place))
