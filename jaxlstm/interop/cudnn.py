"""cuDNN: the flat weight vector of `jax.experimental.rnn`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import WeightFormat, add_biases, position_name
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN


def from_cudnn(lstm: RNN, weights: Any) -> Params:
    """Returns parameters from the weights of `jax.experimental.rnn.lstm`.

    The two biases of cuDNN are added.

    Args:
      lstm: the configuration.
      weights: a vector of the matrices of all layers and directions, followed by their biases.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: if the LSTM has an option that the vector cannot represent (no bias, a projection, peepholes, coupled
        gates, layer normalization, a learned state), or the vector has the wrong length.
      TypeError: if ``param_dtype`` cannot represent the dtype of the vector exactly.
    """
    shapes = conversion.array_shapes(lstm, CUDNN, position_name)
    order = _matrices_first(shapes)
    sizes = [math.prod(shapes[name]) for name in order]
    if getattr(weights, "shape", None) != (sum(sizes),):
        received = validation.describe(weights)
        raise ValueError(f"cudnn weights must be a vector of shape [{sum(sizes)}], got {received}")
    pieces = np.split(np.asarray(weights), np.cumsum(sizes)[:-1])
    arrays = {name: piece.reshape(shapes[name]) for name, piece in zip(order, pieces)}
    return conversion.params_from_arrays(lstm, CUDNN, arrays, position_name)


def to_cudnn(lstm: RNN, params: Params) -> np.ndarray:
    """Returns the weight vector for `jax.experimental.rnn.lstm`; the second of its biases is zero.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the vector cannot represent, or ``params`` are of another
        configuration.
    """
    arrays = conversion.arrays_from_params(lstm, CUDNN, params, position_name)
    return np.concatenate([arrays[name].reshape(-1) for name in _matrices_first(arrays)])


def _matrices_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name.startswith("b"))


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    return {"W_ih": weights.w_x, "W_hh": weights.w_h, "b_ih": weights.b, "b_hh": np.zeros_like(weights.b)}


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"w_x": arrays["W_ih"], "w_h": arrays["W_hh"], "b": add_biases(arrays["b_ih"], arrays["b_hh"])}


CUDNN = WeightFormat("cudnn", _to_arrays, _from_arrays)
