"""Flax nnx: `LSTMCell` or `OptimizedLSTMCell`, alone, in `RNN`, in `Bidirectional`, and stacked."""

from typing import Any

import jax.numpy as jnp

from jaxlstm import validation
from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.flax_cells import CELL, apart, together, within_layer
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params

LAYOUTS = {
    "LSTMCell": apart("flax nnx", ("ii", "if_", "ig", "io")),
    "OptimizedLSTMCell": together("flax nnx"),
}


def from_flax_nnx(lstm: LSTM, module: Any) -> Params:
    """Parameters from an nnx module or its state.

    The cells, of either kind, are found wherever they lie, and ordered by the numbers in their paths and by
    ``forward_rnn`` and ``backward_rnn``; anything else in the module is not looked at. Cells whose paths differ
    otherwise, such as an encoder's and a decoder's, are not one stack: hand in the part that is meant.

    Args:
      lstm: the configuration.
      module: a module, its `nnx.State` or that as a dictionary, a part of one, or a list of them, lowest layer first.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that the cells have not (no bias, a projection,
        peepholes, coupled gates, layer normalisation, a learned state), if there are not as many cells as layers and
        directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    arrays = {name: array for name, array in cell_discovery.flatten(module).items() if "rngs" not in name.split("/")}
    optimized = any("dense_i/" in name for name in arrays)
    kind = LAYOUTS["OptimizedLSTMCell" if optimized else "LSTMCell"]
    return conversion.read(lstm, kind, *cell_discovery.find(lstm, kind, arrays, CELL))


def to_flax_nnx(lstm: LSTM, params: Params, cell: str = "LSTMCell") -> Any:
    """The state of an `RNN`, or for two directions of a `Bidirectional`, as `nnx.update` takes it; of each layer one.

        nnx.update(rnn, to_flax_nnx(lstm, params, cell="OptimizedLSTMCell"))

    Args:
      lstm: the configuration.
      params: its parameters.
      cell: ``"LSTMCell"`` or ``"OptimizedLSTMCell"``, whose parameters have other names. It must be that of the module:
        `nnx.update` puts names that the module does not know beside its own, and says nothing.

    Returns:
      Dictionaries of JAX arrays, nested; for several layers a list of them.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the cells have not, or ``params`` are not of this LSTM.
    """
    kind = LAYOUTS[validation.choice("cell", cell, LAYOUTS)]
    arrays = conversion.write(lstm, kind, params, lambda n, d, name: f"{n}/{within_layer(lstm, d)}{name}")
    # Name by name: `jax.tree.map` would put layer 10 before layer 2.
    layers = list(cell_discovery.nested({name: jnp.array(array) for name, array in arrays.items()}).values())
    return layers if lstm.num_layers > 1 else layers[0]
