"""Flax nnx: `LSTMCell` and `OptimizedLSTMCell`, as a cell, in `RNN`, in `Bidirectional`, and stacked."""

from typing import Any

import jax.numpy as jnp

from jaxlstm import validation
from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.flax_cells import CELL_PATTERN, cell_path, per_gate_format, stacked_format
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params

FORMATS = {
    "LSTMCell": per_gate_format("flax nnx", ("ii", "if_", "ig", "io")),
    "OptimizedLSTMCell": stacked_format("flax nnx"),
}


def from_flax_nnx(lstm: LSTM, module: Any) -> Params:
    """Returns parameters from an nnx module or its state.

    Cells of either class are found anywhere in the module. They are ordered by the numbers in their paths and by
    ``forward_rnn`` and ``backward_rnn``; all other arrays are ignored. Cells with otherwise different paths, such as an
    encoder's and a decoder's, are not one stack: pass the submodule of one of them.

    Args:
      lstm: the configuration.
      module: a module, its `nnx.State` or pure dictionary, a part of it, or a list of these with the lowest layer
        first.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that the cells do not have (no bias, a projection,
        peepholes, coupled gates, layer normalization, a learned state), if the number of cells is not the number of
        layers times directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    arrays = {
        path: array
        for path, array in cell_discovery.arrays_by_path(module).items()
        if "rngs" not in path.split("/")  # a cell with keep_rngs=True stores its random streams beside its weights
    }
    is_optimized = any("dense_i/" in path for path in arrays)
    weight_format = FORMATS["OptimizedLSTMCell" if is_optimized else "LSTMCell"]
    return cell_discovery.params_from_cells(lstm, weight_format, arrays, CELL_PATTERN)


def to_flax_nnx(lstm: LSTM, params: Params, cell: str = "LSTMCell") -> Any:
    """Returns the state of an `RNN`, or for two directions of a `Bidirectional`, for `nnx.update`.

        nnx.update(rnn, to_flax_nnx(lstm, params, cell="OptimizedLSTMCell"))

    Args:
      lstm: the configuration.
      params: its parameters.
      cell: class of the module's cells, ``"LSTMCell"`` or ``"OptimizedLSTMCell"``; their parameters have different
        names. `nnx.update` does not report a wrong class: it adds unknown names to the module.

    Returns:
      Nested dictionaries of JAX arrays; for several layers a list of one per layer.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the cells do not have, or ``params`` are of another
        configuration.
    """
    weight_format = FORMATS[validation.choice("cell", cell, FORMATS)]
    arrays = conversion.arrays_from_params(
        lstm, weight_format, params, lambda layer, direction, name: f"{layer}/{cell_path(lstm, direction)}{name}"
    )
    # A dictionary comprehension keeps the order of layers; `jax.tree.map` would sort layer 10 before layer 2.
    jax_arrays = {name: jnp.array(array) for name, array in arrays.items()}
    layers = list(cell_discovery.nest_by_path(jax_arrays).values())
    return layers if lstm.num_layers > 1 else layers[0]
