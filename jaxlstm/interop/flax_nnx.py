"""Flax nnx: `LSTMCell`, `OptimizedLSTMCell` and `GRUCell`, as a cell, in `RNN`, in `Bidirectional`, and stacked."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.flax_cells import (
    CELL_PATTERNS,
    cell_path,
    format_name,
    gru_stacked_format,
    lstm_per_gate_format,
    lstm_stacked_format,
)
from jaxlstm.params import Params
from jaxlstm.rnn import RNN

# By cell, the formats of the classes of Flax that compute it; the first is the default.
FORMATS = {
    "lstm": {
        "LSTMCell": lstm_per_gate_format("flax nnx", forget_layer="if_"),
        "OptimizedLSTMCell": lstm_stacked_format("flax nnx"),
    },
    "gru": {"GRUCell": gru_stacked_format("flax nnx")},
}


def from_flax_nnx(lstm: RNN, module: Any) -> Params:
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
      ValueError: naming the cause, if the network has an option that the cells do not have (no bias, a projection,
        peepholes, coupled gates, layer normalization, a learned state), if a cell has other activations than the
        LSTM's (a state or dictionary does not tell), if the number of cells is not the number of layers times
        directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    _check_activations(module)
    arrays = {
        path: array
        for path, array in cell_discovery.arrays_by_path(module).items()
        if "rngs" not in path.split("/")  # a cell with keep_rngs=True stores its random streams beside its weights
    }
    cell = format_name(lstm)
    has_stacked_gates = any("dense_i/" in path for path in arrays)
    weight_format = list(FORMATS[cell].values())[-1 if has_stacked_gates else 0]
    return cell_discovery.params_from_cells(lstm, weight_format, arrays, CELL_PATTERNS[cell])


def _check_activations(module: Any) -> None:
    """Raises an error that names the cell, if the activations of a cell in the module are not the LSTM's."""
    if "flax.nnx" not in sys.modules:  # then nothing in it is a module
        return
    from flax import nnx

    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.LSTMCell | nnx.OptimizedLSTMCell | nnx.GRUCell):
            continue
        for name, expected in (("gate_fn", jax.nn.sigmoid), ("activation_fn", jnp.tanh)):
            received = getattr(node, name)
            if not callable(received) or not _same_function(received, expected):
                cell = "/".join(map(str, path)) or type(node).__name__
                raise ValueError(
                    f"flax nnx cell {cell!r} has {name}={getattr(received, '__name__', received)}, "
                    f"expected {expected.__name__}"
                )


def _same_function(received: Any, expected: Any) -> bool:
    """Compares two activations by their values: another function may compute the same."""
    x = jnp.linspace(-4, 4, 17, dtype=jnp.float32)
    return received is expected or np.allclose(received(x), expected(x), atol=1e-5)


def to_flax_nnx(lstm: RNN, params: Params, cell: str | None = None) -> Any:
    """Returns the state of an `RNN`, or for two directions of a `Bidirectional`, for `nnx.update`.

        nnx.update(rnn, to_flax_nnx(lstm, params, cell="OptimizedLSTMCell"))

    Args:
      lstm: the configuration.
      params: its parameters.
      cell: class of the module's cells, ``"LSTMCell"`` (if None) or ``"OptimizedLSTMCell"``; their parameters have
        different names. `nnx.update` does not report a wrong class: it adds unknown names to the module. For a GRU it
        is ``"GRUCell"``, which has no bias that the reset gate multiplies: that part of ``b`` must be zero.

    Returns:
      Nested dictionaries of JAX arrays; for several layers a list of one per layer.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the cells do not have, or ``params`` are of another
        configuration.
    """
    formats = FORMATS[format_name(lstm)]
    weight_format = formats[validation.choice("cell", next(iter(formats)) if cell is None else cell, formats)]
    arrays = conversion.arrays_from_params(
        lstm, weight_format, params, lambda layer, direction, name: f"{layer}/{cell_path(lstm, direction)}{name}"
    )
    # A dictionary comprehension keeps the order of layers; `jax.tree.map` would sort layer 10 before layer 2.
    jax_arrays = {name: jnp.array(array) for name, array in arrays.items()}
    layers = list(cell_discovery.nest_by_path(jax_arrays).values())
    return layers if lstm.num_layers > 1 else layers[0]
