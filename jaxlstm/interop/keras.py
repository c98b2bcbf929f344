"""Keras 3: the ``get_weights()`` of `LSTM`, `Bidirectional(LSTM)`, and of `SimpleRNN` for ``cell="rnn"``."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import Layout
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights


def from_keras(lstm: LSTM, weights: Sequence[Any]) -> Params:
    """Parameters from the list that ``get_weights()`` of a Keras layer gives.

    Args:
      lstm: the configuration; for ``cell="rnn"`` the activation is the layer's.
      weights: of one layer, or of several, one after the other, lowest first. `Bidirectional` has them of the forward
        direction, then of the backward one; its ``merge_mode`` must be ``"concat"``, as it is by default.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that the layer has not (a projection, peepholes,
        coupled gates, layer normalisation, a learned state), or if an array is missing, one too many or of the wrong
        shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    if not isinstance(weights, list | tuple):
        raise TypeError(f"weights must be the list of get_weights(), got {validation.describe(weights)}")
    names = list(conversion.shapes(lstm, LAYOUT, _place))
    names += [f"number {k}" for k in range(len(names), len(weights))]
    return conversion.read(lstm, LAYOUT, dict(zip(names, weights)), _place)


def to_keras(lstm: LSTM, params: Params) -> list[np.ndarray]:
    """The list that ``set_weights`` takes, of one layer or of several, one after the other.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the layer has not, or ``params`` are not of this LSTM.
    """
    return list(conversion.write(lstm, LAYOUT, params, _place).values())


def _place(layer: int, direction: int, name: str) -> str:
    return f"{name} of layer {layer}, {'backward' if direction else 'forward'}"


def _write(weights: Weights) -> dict[str, Any]:
    return {"kernel": weights.w_x.T, "recurrent_kernel": weights.w_h.T, "bias": weights.b}


def _read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"w_x": arrays["kernel"].T, "w_h": arrays["recurrent_kernel"].T, "b": arrays.get("bias")}


def _also(lstm: LSTM) -> dict[str, Collection[Any]]:
    return {"cell": ("lstm", "rnn"), "use_bias": (True, False)}


LAYOUT = Layout("keras", _write, _read, _also)
