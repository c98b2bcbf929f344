"""Weight formats of the cells of Flax, shared by `nnx` and `linen`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlstm.interop.conversion import GATES, WeightFormat, join_biases, split_bias, split_gates
from jaxlstm.params import Weights
from jaxlstm.rnn import RNN

# By cell, matches the path of an array by which a cell is recognized.
CELL_PATTERNS = {
    "lstm": r"(?P<cell>(.*/)?)(ii|if_?|ig|io|hi|hf|hg|ho|dense_i|dense_h)/(kernel|bias)",
    "gru": r"(?P<cell>(.*/)?)(ir|iz|hr|hz|hn|dense_i|dense_h)/(kernel|bias)",
}


def lstm_per_gate_format(framework: str, forget_layer: str) -> WeightFormat:
    """Returns the format with one dense layer per gate for the input and one for h, which has the bias.

    Args:
      framework: name of the framework in error messages.
      forget_layer: name of the forget gate's dense layer of the input.
    """
    layers_x = {"i": "ii", "f": forget_layer, "g": "ig", "o": "io"}
    layers_h = {gate: f"h{gate}" for gate in GATES}
    return _per_gate_format(framework, "lstm", layers_x, layers_h, bias_layers=layers_h)


def gru_per_gate_format(framework: str) -> WeightFormat:
    """Returns the format with one dense layer per gate for the input, which has the bias, and one for h.

    The candidate's dense layer for h has a bias too.
    """
    layers_x, layers_h = ({"r": f"{s}r", "u": f"{s}z", "n": f"{s}n"} for s in "ih")
    bias_layers = {"r": "ir", "u": "iz", "n_x": "in", "n_h": "hn"}
    return _per_gate_format(framework, "gru", layers_x, layers_h, bias_layers)


def _per_gate_format(
    framework: str,
    cell: str,
    layers_x: Mapping[str, str],
    layers_h: Mapping[str, str],
    bias_layers: Mapping[str, str],
) -> WeightFormat:
    """Returns a format with one dense layer per gate and source.

    Args:
      framework: name of the framework in error messages.
      cell: the name of the cell.
      layers_x: dense layer of the input by gate, in the order of the rows of ``w_x``.
      layers_h: dense layer of h by gate, in the order of the rows of ``w_h``.
      bias_layers: dense layer that has the bias by gate, in the order of ``b``.
    """

    def to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
        assert weights.b is not None
        kernels = {}
        for layers, matrix in ((layers_x, weights.w_x), (layers_h, weights.w_h)):
            kernels |= {layers[gate]: w.T for gate, w in split_gates(matrix, tuple(layers)).items()}
        biases = {bias_layers[gate]: b for gate, b in split_gates(weights.b, tuple(bias_layers)).items()}
        arrays: dict[str, Any] = {}
        for layer in (name for pair in zip(layers_x.values(), layers_h.values()) for name in pair):
            arrays[f"{layer}/kernel"] = kernels[layer]
            arrays[f"{layer}/bias"] = biases.get(layer)
        return arrays

    def from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "w_x": np.concatenate([arrays[f"{layer}/kernel"].T for layer in layers_x.values()]),
            "w_h": np.concatenate([arrays[f"{layer}/kernel"].T for layer in layers_h.values()]),
            "b": np.concatenate([arrays[f"{layer}/bias"] for layer in bias_layers.values()]),
        }

    return WeightFormat(framework, to_arrays, from_arrays, lambda lstm: {"cell": (cell,)})


def lstm_stacked_format(framework: str) -> WeightFormat:
    """Returns the format with one dense layer for all gates of the input, and one for h, which has the bias."""

    def to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
        return {"dense_i/kernel": weights.w_x.T, "dense_h/kernel": weights.w_h.T, "dense_h/bias": weights.b}

    def from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {"w_x": arrays["dense_i/kernel"].T, "w_h": arrays["dense_h/kernel"].T, "b": arrays["dense_h/bias"]}

    return WeightFormat(framework, to_arrays, from_arrays)


def gru_stacked_format(framework: str) -> WeightFormat:
    """Returns the format with one dense layer for all gates of the input, which has the bias, and one for h.

    The candidate has no bias that the reset gate multiplies, so ``b`` must be zero for its part that reads h.
    """

    def to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
        assert weights.b is not None
        b_x, b_h = split_bias(lstm.resolved_cell, weights.b)
        if np.any(b_h):
            raise ValueError(
                f"{framework} GRUCell has no bias that its reset gate multiplies; expected zeros for gate n_h, the "
                f"last {lstm.hidden_size} values of b, got values up to {np.abs(b_h).max():.3g}"
            )
        return {"dense_i/kernel": weights.w_x.T, "dense_i/bias": b_x, "dense_h/kernel": weights.w_h.T}

    def from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
        w_h, b_x = arrays["dense_h/kernel"].T, arrays["dense_i/bias"]
        b = join_biases(lstm.resolved_cell, b_x, np.zeros_like(b_x))
        return {"w_x": arrays["dense_i/kernel"].T, "w_h": w_h, "b": b}

    return WeightFormat(framework, to_arrays, from_arrays, lambda lstm: {"cell": ("gru",)})


def cell_path(lstm: RNN, direction: int) -> str:
    """Returns the path of a cell within its `RNN`, or within a `Bidirectional` of two `RNN`."""
    return f"{('forward', 'backward')[direction]}_rnn/cell/" if lstm.bidirectional else "cell/"


def format_name(lstm: RNN) -> str:
    """Returns the cell whose formats to use: the LSTM for a cell without any, so that an error names the option."""
    return "gru" if getattr(lstm, "cell", None) == "gru" else "lstm"
