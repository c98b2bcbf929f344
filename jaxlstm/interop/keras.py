"""Keras 3: the list ``get_weights()`` of `LSTM`, `GRU` or `SimpleRNN`, or of a `Bidirectional` of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import (
    GRU_GATES,
    OptionValues,
    WeightFormat,
    join_biases,
    position_name,
    reorder_gates,
    split_bias,
)
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

KERAS_GRU_GATES = "urn"


def from_keras(lstm: RNN, weights: Sequence[Any]) -> Params:
    """Returns parameters from the list ``get_weights()`` of a Keras layer.

    Args:
      lstm: the configuration: ``cell="gru"`` for a `GRU`, ``cell="rnn"`` with the activation for a `SimpleRNN`.
      weights: the list of one layer, or the concatenated lists of several layers, lowest first. The list of a
        `Bidirectional` has the forward direction first; its ``merge_mode`` must be ``"concat"``, the default. A `GRU`
        must have ``reset_after=True``, the default; only the shape of its bias tells.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that the layer does not have (a projection, peepholes,
        coupled gates, layer normalization, a learned state), or if an array is missing, unexpected or of the wrong
        shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    if not isinstance(weights, list | tuple):
        raise TypeError(f"weights must be the list get_weights(), got {validation.describe(weights)}")
    names = list(conversion.array_shapes(lstm, KERAS, position_name))
    if lstm.cell == "gru":
        _check_reset_after(lstm, dict(zip(names, weights)))
    names += [f"number {k}" for k in range(len(names), len(weights))]
    return conversion.params_from_arrays(lstm, KERAS, dict(zip(names, weights)), position_name)


def to_keras(lstm: RNN, params: Params) -> list[np.ndarray]:
    """Returns the list for ``set_weights`` of one layer, or the concatenated lists of several layers, lowest first.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the layer does not have, or ``params`` are of another
        configuration.
    """
    return list(conversion.arrays_from_params(lstm, KERAS, params, position_name).values())


def _check_reset_after(lstm: RNN, arrays: Mapping[str, Any]) -> None:
    """Raises an error that names the bias of a `GRU` whose reset gate is applied before the product with ``W_h``."""
    for name, array in arrays.items():
        if name.startswith("bias") and getattr(array, "shape", None) == (3 * lstm.hidden_size,):
            raise ValueError(
                f"keras weight {name!r} of shape {list(array.shape)} is of a GRU with reset_after=False, whose reset "
                "gate is applied before the product with W_h; expected reset_after=True"
            )


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    if lstm.cell != "gru":
        return {"kernel": weights.w_x.T, "recurrent_kernel": weights.w_h.T, "bias": weights.b}
    biases = () if weights.b is None else split_bias(lstm.resolved_cell, weights.b)
    w_x, w_h, *biases = (reorder_gates(a, GRU_GATES, KERAS_GRU_GATES) for a in (weights.w_x, weights.w_h, *biases))
    return {"kernel": w_x.T, "recurrent_kernel": w_h.T, "bias": np.stack(biases) if biases else None}


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    w_x, w_h, b = arrays["kernel"].T, arrays["recurrent_kernel"].T, arrays.get("bias")
    if lstm.cell != "gru":
        return {"w_x": w_x, "w_h": w_h, "b": b}
    biases = () if b is None else tuple(b)
    w_x, w_h, *biases = (reorder_gates(a, KERAS_GRU_GATES, GRU_GATES) for a in (w_x, w_h, *biases))
    return {"w_x": w_x, "w_h": w_h, "b": join_biases(lstm.resolved_cell, *biases) if biases else None}


def _supported_options(lstm: RNN) -> OptionValues:
    return {"cell": ("lstm", "gru", "rnn"), "use_bias": (True, False)}


KERAS = WeightFormat("keras", _to_arrays, _from_arrays, _supported_options)
