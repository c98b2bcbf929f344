"""Keras 3: the list ``get_weights()`` of `LSTM`, `Bidirectional(LSTM)`, and of `SimpleRNN` for ``cell="rnn"``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import OptionValues, WeightFormat, position_name
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN


def from_keras(lstm: RNN, weights: Sequence[Any]) -> Params:
    """Returns parameters from the list ``get_weights()`` of a Keras layer.

    Args:
      lstm: the configuration; for ``cell="rnn"`` with the activation of the layer.
      weights: the list of one layer, or the concatenated lists of several layers, lowest first. The list of a
        `Bidirectional` has the forward direction first; its ``merge_mode`` must be ``"concat"``, the default.

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
    names += [f"number {k}" for k in range(len(names), len(weights))]
    return conversion.params_from_arrays(lstm, KERAS, dict(zip(names, weights)), position_name)


def to_keras(lstm: RNN, params: Params) -> list[np.ndarray]:
    """Returns the list for ``set_weights`` of one layer, or the concatenated lists of several layers, lowest first.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the layer does not have, or ``params`` are of another
        configuration.
    """
    return list(conversion.arrays_from_params(lstm, KERAS, params, position_name).values())


def _to_arrays(weights: Weights) -> dict[str, Any]:
    return {"kernel": weights.w_x.T, "recurrent_kernel": weights.w_h.T, "bias": weights.b}


def _from_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"w_x": arrays["kernel"].T, "w_h": arrays["recurrent_kernel"].T, "b": arrays.get("bias")}


def _supported_options(lstm: RNN) -> OptionValues:
    return {"cell": ("lstm", "rnn"), "use_bias": (True, False)}


KERAS = WeightFormat("keras", _to_arrays, _from_arrays, _supported_options)
