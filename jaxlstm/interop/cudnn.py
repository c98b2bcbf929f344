"""cuDNN: the flat vector of `jax.experimental.rnn`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import Layout, one_bias
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights


def from_cudnn(lstm: LSTM, weights: Any) -> Params:
    """Parameters from the weights of `jax.experimental.rnn.lstm`.

    cuDNN's two biases are added.

    Args:
      lstm: the configuration.
      weights: a vector: the matrices of all layers and directions, then their biases.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: if the LSTM has an option that the vector has no place for (no bias, a projection, peepholes, coupled
        gates, layer normalisation, a learned state), or the vector is of the wrong length.
      TypeError: if ``param_dtype`` does not hold the vector's dtype exactly.
    """
    shapes = conversion.shapes(lstm, LAYOUT, _place)
    order = _matrices_first(shapes)
    sizes = [math.prod(shapes[name]) for name in order]
    if getattr(weights, "shape", None) != (sum(sizes),):
        received = validation.describe(weights)
        raise ValueError(f"cudnn weights must be a vector of shape [{sum(sizes)}], got {received}")
    pieces = np.split(np.asarray(weights), np.cumsum(sizes)[:-1])
    arrays = {name: piece.reshape(shapes[name]) for name, piece in zip(order, pieces)}
    return conversion.read(lstm, LAYOUT, arrays, _place)


def to_cudnn(lstm: LSTM, params: Params) -> np.ndarray:
    """The vector that `jax.experimental.rnn.lstm` takes; the second of its biases is zero.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the vector has no place for, or ``params`` are not of this
        LSTM.
    """
    arrays = conversion.write(lstm, LAYOUT, params, _place)
    return np.concatenate([arrays[name].reshape(-1) for name in _matrices_first(arrays)])


def _matrices_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name.startswith("b"))


def _place(layer: int, direction: int, name: str) -> str:
    return f"{name} of layer {layer}, {'backward' if direction else 'forward'}"


def _write(weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    return {"W_ih": weights.w_x, "W_hh": weights.w_h, "b_ih": weights.b, "b_hh": np.zeros_like(weights.b)}


def _read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"w_x": arrays["W_ih"], "w_h": arrays["W_hh"], "b": one_bias(arrays["b_ih"], arrays["b_hh"])}


LAYOUT = Layout("cudnn", _write, _read)
