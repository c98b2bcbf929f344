"""The LSTM cells of Flax, which `nnx` and `linen` have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlstm.interop.conversion import Layout
from jaxlstm.lstm import LSTM
from jaxlstm.params import Weights

# An array's path by which a cell is known.
CELL = r"(?P<cell>(.*/)?)(ii|if_?|ig|io|hi|hf|hg|ho|dense_i|dense_h)/(kernel|bias)"


def apart(owner: str, inputs: Sequence[str]) -> Layout:
    """A layer for each gate, of the input and of h; ``inputs`` names the former. Biases are those of h."""
    hidden = ("hi", "hf", "hg", "ho")

    def write(weights: Weights) -> dict[str, Any]:
        assert weights.b is not None
        arrays = {}
        for x, h, w_x, w_h, b in zip(inputs, hidden, *(np.split(a, 4) for a in (weights.w_x, weights.w_h, weights.b))):
            arrays |= {f"{x}/kernel": w_x.T, f"{h}/kernel": w_h.T, f"{h}/bias": b}
        return arrays

    def read(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "w_x": np.concatenate([arrays[f"{name}/kernel"].T for name in inputs]),
            "w_h": np.concatenate([arrays[f"{name}/kernel"].T for name in hidden]),
            "b": np.concatenate([arrays[f"{name}/bias"] for name in hidden]),
        }

    return Layout(owner, write, read)


def together(owner: str) -> Layout:
    """One layer for all gates."""

    def write(weights: Weights) -> dict[str, Any]:
        return {"dense_i/kernel": weights.w_x.T, "dense_h/kernel": weights.w_h.T, "dense_h/bias": weights.b}

    def read(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {"w_x": arrays["dense_i/kernel"].T, "w_h": arrays["dense_h/kernel"].T, "b": arrays["dense_h/bias"]}

    return Layout(owner, write, read)


def within_layer(lstm: LSTM, direction: int) -> str:
    """The path of a cell within its `RNN`, or within its `Bidirectional` of two `RNN`."""
    return f"{('forward', 'backward')[direction]}_rnn/cell/" if lstm.bidirectional else "cell/"
