"""Haiku: the parameters of `hk.LSTM`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.conversion import GATES, WeightFormat, reorder_gates, split_gates, stack_gates
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights

HAIKU_GATES = "igfo"
HAIKU_FORGET_BIAS = 1.0  # hk.LSTM adds it to z of the forget gate in each step; here it is part of the bias


def from_haiku(lstm: LSTM, params: Mapping[str, Mapping[str, Any]], name: str = "lstm") -> Params:
    """Returns parameters from the parameters of one or several `hk.LSTM`.

    Haiku numbers the names of several modules in the order of their creation. They must have been created with the
    lowest layer first, and for two directions forward before backward. All other arrays are ignored.

    Args:
      lstm: the configuration.
      params: the parameters that ``init`` of the transformed function returns.
      name: name of the first `hk.LSTM`, with as many of the enclosing names as needed to identify it, such as
        ``"encoder/lstm"``.

    Returns:
      Parameters in ``param_dtype``. The forget gate's bias includes the 1 that `hk.LSTM` adds, rounded to the dtype.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that `hk.LSTM` does not have (no bias, a projection,
        peepholes, coupled gates, layer normalization, a learned state), if the number of `hk.LSTM` is not the number
        of layers times directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    cell_pattern = rf"(?P<cell>(.*/)?{re.escape(name)}(_\d+)?/linear/)[wb]"
    return cell_discovery.params_from_cells(lstm, HAIKU, cell_discovery.arrays_by_path(params), cell_pattern)


def to_haiku(lstm: LSTM, params: Params, name: str = "lstm") -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of one `hk.LSTM` per layer and direction: ``lstm``, ``lstm_1`` and so on.

    The 1 that `hk.LSTM` adds to the forget gate is subtracted from its bias. The subtraction is exact for a bias of at
    least 0.5. Below, it rounds the bias by up to half a unit in the last place of the result, the smallest error
    possible in this dtype.

    Args:
      lstm: the configuration.
      params: its parameters.
      name: name of the first `hk.LSTM`, with all enclosing names.

    Raises:
      ValueError, TypeError: if the LSTM has an option that `hk.LSTM` does not have, or ``params`` are of another
        configuration.
    """

    def full_path(layer: int, direction: int, array_name: str) -> str:
        index = layer * lstm.num_directions + direction
        return f"{name}{f'_{index}' if index else ''}/linear/{array_name}"

    modules: dict[str, dict[str, np.ndarray]] = {}
    for path, array in conversion.arrays_from_params(lstm, HAIKU, params, full_path).items():
        module, array_name = path.rsplit("/", 1)
        modules.setdefault(module, {})[array_name] = array
    return modules


def _add_to_forget_gate(b: np.ndarray | Array, value: float) -> np.ndarray:
    slabs = split_gates(b, GATES)
    return stack_gates({**slabs, "f": slabs["f"] + np.asarray(value, b.dtype)}, GATES)


def _to_arrays(weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    w = np.concatenate([weights.w_x, weights.w_h], axis=1)
    b = _add_to_forget_gate(weights.b, -HAIKU_FORGET_BIAS)
    return {"w": reorder_gates(w, GATES, HAIKU_GATES).T, "b": reorder_gates(b, GATES, HAIKU_GATES)}


def _from_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    w = reorder_gates(arrays["w"].T, HAIKU_GATES, GATES)
    b = reorder_gates(arrays["b"], HAIKU_GATES, GATES)
    hidden_size = w.shape[0] // len(GATES)
    input_size = w.shape[1] - hidden_size
    return {"w_x": w[:, :input_size], "w_h": w[:, input_size:], "b": _add_to_forget_gate(b, HAIKU_FORGET_BIAS)}


HAIKU = WeightFormat("haiku", _to_arrays, _from_arrays)
