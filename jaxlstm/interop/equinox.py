"""Equinox: `equinox.nn.LSTMCell`, one for each layer and direction."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.conversion import Layout
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights


def from_equinox(lstm: LSTM, cells: Any) -> Params:
    """Parameters from the cells of Equinox.

    Args:
      lstm: the configuration.
      cells: a cell; a list of them, lowest layer first; for two directions a pair, forward and backward, or a list of
        pairs. They may lie in a module, in one attribute.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that the cell has not (a projection, peepholes,
        coupled gates, layer normalisation, a learned state), if there are not as many cells as layers and directions,
        or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    found = cell_discovery.find(lstm, LAYOUT, cell_discovery.flatten(cells), r"(?P<cell>(.*/)?)weight_ih")
    return conversion.read(lstm, LAYOUT, *found)


def to_equinox(lstm: LSTM, params: Params) -> Any:
    """The cells of Equinox: one, or a list with one for each layer; for two directions, pairs instead of cells.

    Raises:
      ImportError: if Equinox is not installed.
      ValueError, TypeError: if the LSTM has an option that the cell has not, or ``params`` are not of this LSTM.
    """
    arrays = conversion.write(lstm, LAYOUT, params, lambda n, d, name: f"{n}/{d}/{name}")
    try:
        import equinox
    except ImportError:
        raise ImportError("to_equinox needs Equinox: pip install 'jaxlstm[interop]'") from None

    def cell(arrays: dict[str, Any]) -> Any:
        width = arrays["weight_ih"].shape[1]
        drawn = equinox.nn.LSTMCell(width, lstm.hidden_size, use_bias=lstm.use_bias, key=jax.random.key(0))
        return equinox.tree_at(
            lambda cell: [getattr(cell, name) for name in arrays], drawn, [jnp.asarray(a) for a in arrays.values()]
        )

    layers = [tuple(cell(own) for own in layer.values()) for layer in cell_discovery.nested(arrays).values()]
    entries = layers if lstm.bidirectional else [layer[0] for layer in layers]
    return entries if lstm.num_layers > 1 else entries[0]


def _write(weights: Weights) -> dict[str, Any]:
    return {"weight_ih": weights.w_x, "weight_hh": weights.w_h, "bias": weights.b}


def _read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"w_x": arrays["weight_ih"], "w_h": arrays["weight_hh"], "b": arrays.get("bias")}


def _also(lstm: LSTM) -> dict[str, Collection[Any]]:
    return {"use_bias": (True, False)}


LAYOUT = Layout("equinox", _write, _read, _also)
