"""Weight formats of the LSTM cells of Flax, shared by `nnx` and `linen`."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlstm.interop.conversion import GATES, WeightFormat, split_gates, stack_gates
from jaxlstm.params import Weights
from jaxlstm.rnn import RNN

# Matches the path of an array by which a cell is recognized.
CELL_PATTERN = r"(?P<cell>(.*/)?)(ii|if_?|ig|io|hi|hf|hg|ho|dense_i|dense_h)/(kernel|bias)"


def per_gate_format(framework: str, input_layers: Sequence[str]) -> WeightFormat:
    """Returns the format with one dense layer per gate for the input and one for h, which has the bias.

    Args:
      framework: name of the framework in error messages.
      input_layers: names of the dense layers of the input, in the order of `GATES`.
    """
    layer_names = [(gate, input_layer, f"h{gate}") for gate, input_layer in zip(GATES, input_layers)]

    def to_arrays(weights: Weights) -> dict[str, Any]:
        assert weights.b is not None
        w_x, w_h, b = (split_gates(array, GATES) for array in (weights.w_x, weights.w_h, weights.b))
        arrays = {}
        for gate, x, h in layer_names:
            arrays |= {f"{x}/kernel": w_x[gate].T, f"{h}/kernel": w_h[gate].T, f"{h}/bias": b[gate]}
        return arrays

    def from_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "w_x": stack_gates({gate: arrays[f"{x}/kernel"].T for gate, x, _ in layer_names}, GATES),
            "w_h": stack_gates({gate: arrays[f"{h}/kernel"].T for gate, _, h in layer_names}, GATES),
            "b": stack_gates({gate: arrays[f"{h}/bias"] for gate, _, h in layer_names}, GATES),
        }

    return WeightFormat(framework, to_arrays, from_arrays)


def stacked_format(framework: str) -> WeightFormat:
    """Returns the format with one dense layer for all gates of the input, and one for h, which has the bias."""

    def to_arrays(weights: Weights) -> dict[str, Any]:
        return {"dense_i/kernel": weights.w_x.T, "dense_h/kernel": weights.w_h.T, "dense_h/bias": weights.b}

    def from_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {"w_x": arrays["dense_i/kernel"].T, "w_h": arrays["dense_h/kernel"].T, "b": arrays["dense_h/bias"]}

    return WeightFormat(framework, to_arrays, from_arrays)


def cell_path(lstm: RNN, direction: int) -> str:
    """Returns the path of a cell within its `RNN`, or within a `Bidirectional` of two `RNN`."""
    return f"{('forward', 'backward')[direction]}_rnn/cell/" if lstm.bidirectional else "cell/"
