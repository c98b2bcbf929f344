"""Haiku: the parameters of `hk.LSTM`, and of `hk.VanillaRNN` for ``cell="rnn"`` with ``activation="relu"``.

`hk.GRU` has no equivalent here: it applies its reset gate before the product with ``W_h``.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.conversion import (
    GATES,
    OptionValues,
    WeightFormat,
    add_biases,
    reorder_gates,
    split_gates,
    stack_gates,
)
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

HAIKU_GATES = "igfo"
HAIKU_FORGET_BIAS = 1.0  # hk.LSTM adds it to z of the forget gate in each step; here it is part of the bias


def from_haiku(lstm: RNN, params: Mapping[str, Mapping[str, Any]], name: str | None = None) -> Params:
    """Returns parameters from the parameters of one or several `hk.LSTM` or `hk.VanillaRNN`.

    Haiku numbers the names of several modules in the order of their creation. They must have been created with the
    lowest layer first, and for two directions forward before backward. All other arrays are ignored.

    Args:
      lstm: the configuration; of a `hk.VanillaRNN` with ``cell="rnn"`` and ``activation="relu"``.
      params: the parameters that ``init`` of the transformed function returns.
      name: name of the first module, with as many of the enclosing names as needed to identify it, such as
        ``"encoder/lstm"``; None for Haiku's default, ``"lstm"`` or ``"vanilla_rnn"``.

    Returns:
      Parameters in ``param_dtype``. The forget gate's bias includes the 1 that `hk.LSTM` adds, rounded to the dtype.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that the modules do not have (no bias, a projection,
        peepholes, coupled gates, layer normalization, a learned state), if their number is not the number of layers
        times directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    _refuse_gru(lstm)
    arrays = cell_discovery.arrays_by_path(params)
    name = re.escape(_module_name(lstm, name))
    if _is_vanilla(lstm):
        cell_pattern = rf"(?P<cell>(.*/)?{name}(_\d+)?/)linear/[wb]"
        has_second_bias = any(re.fullmatch(rf"(.*/)?{name}(_\d+)?/linear_1/b", path) for path in arrays)
        weight_format = VANILLA if has_second_bias else VANILLA_SINGLE_BIAS
        return cell_discovery.params_from_cells(lstm, weight_format, arrays, cell_pattern)
    cell_pattern = rf"(?P<cell>(.*/)?{name}(_\d+)?/linear/)[wb]"
    return cell_discovery.params_from_cells(lstm, HAIKU, arrays, cell_pattern)


def to_haiku(lstm: RNN, params: Params, name: str | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of one `hk.LSTM` per layer and direction: ``lstm``, ``lstm_1`` and so on.

    For ``cell="rnn"`` they are of `hk.VanillaRNN`: ``vanilla_rnn``, ``vanilla_rnn_1`` and so on, with a second bias of
    zero.

    The 1 that `hk.LSTM` adds to the forget gate is subtracted from its bias. The subtraction is exact for a bias of at
    least 0.5. Below, it rounds the bias by up to half a unit in the last place of the result, the smallest error
    possible in this dtype.

    Args:
      lstm: the configuration.
      params: its parameters.
      name: name of the first module, with all enclosing names; None for Haiku's default.

    Raises:
      ValueError, TypeError: if the LSTM has an option that the modules do not have, or ``params`` are of another
        configuration.
    """
    _refuse_gru(lstm)
    first_name = _module_name(lstm, name)
    weight_format, layer_name = (VANILLA, "") if _is_vanilla(lstm) else (HAIKU, "linear/")

    def full_path(layer: int, direction: int, array_name: str) -> str:
        index = layer * lstm.num_directions + direction
        return f"{first_name}{f'_{index}' if index else ''}/{layer_name}{array_name}"

    modules: dict[str, dict[str, np.ndarray]] = {}
    for path, array in conversion.arrays_from_params(lstm, weight_format, params, full_path).items():
        module, array_name = path.rsplit("/", 1)
        modules.setdefault(module, {})[array_name] = array
    return modules


def _refuse_gru(lstm: Any) -> None:
    if getattr(lstm, "cell", None) == "gru":
        raise ValueError(
            "haiku weights do not support cell='gru': hk.GRU applies its reset gate before the product with W_h, "
            "jaxlstm.GRU after it"
        )


def _add_to_forget_gate(b: np.ndarray | Array, value: float) -> np.ndarray:
    slabs = split_gates(b, GATES)
    return stack_gates({**slabs, "f": slabs["f"] + np.asarray(value, b.dtype)}, GATES)


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    w = np.concatenate([weights.w_x, weights.w_h], axis=1)
    b = _add_to_forget_gate(weights.b, -HAIKU_FORGET_BIAS)
    return {"w": reorder_gates(w, GATES, HAIKU_GATES).T, "b": reorder_gates(b, GATES, HAIKU_GATES)}


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    w = reorder_gates(arrays["w"].T, HAIKU_GATES, GATES)
    b = reorder_gates(arrays["b"], HAIKU_GATES, GATES)
    hidden_size = w.shape[0] // len(GATES)
    input_size = w.shape[1] - hidden_size
    return {"w_x": w[:, :input_size], "w_h": w[:, input_size:], "b": _add_to_forget_gate(b, HAIKU_FORGET_BIAS)}


def _is_vanilla(lstm: Any) -> bool:
    return getattr(lstm, "cell", None) == "rnn"


def _module_name(lstm: Any, name: str | None) -> str:
    return name if name is not None else "vanilla_rnn" if _is_vanilla(lstm) else "lstm"


def _to_vanilla_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    return {
        "linear/w": weights.w_x.T,
        "linear/b": weights.b,
        "linear_1/w": weights.w_h.T,
        "linear_1/b": np.zeros_like(weights.b),
    }


def _to_single_bias_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    return {**_to_vanilla_arrays(lstm, weights), "linear_1/b": None}


def _from_vanilla_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    b, second_b = arrays["linear/b"], arrays.get("linear_1/b")
    return {
        "w_x": arrays["linear/w"].T,
        "w_h": arrays["linear_1/w"].T,
        "b": b if second_b is None else add_biases(b, second_b),
    }


def _vanilla_options(lstm: RNN) -> OptionValues:
    return {"cell": ("rnn",), "activation": ("relu",)}


HAIKU = WeightFormat("haiku", _to_arrays, _from_arrays)
VANILLA = WeightFormat("haiku", _to_vanilla_arrays, _from_vanilla_arrays, _vanilla_options)
VANILLA_SINGLE_BIAS = VANILLA._replace(to_arrays=_to_single_bias_arrays)  # with double_bias=False
