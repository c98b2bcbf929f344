"""xlstm: the ``state_dict`` of an `sLSTMLayer` of NX-AI's package, for ``cell="slstm"``.

The layer computes its gates from the input by block-diagonal matrices without bias, one block per head. ``W_x`` is
dense here: it has zeros outside the blocks, which training changes. The normalization of the layer's output,
``group_norm``, and its dropout are not part of the recurrence.

Source: https://github.com/NX-AI/xlstm, version 2.0.6, xlstm/blocks/slstm.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import GATES, OptionValues, WeightFormat, split_gates
from jaxlstm.interop.torch import resolve_prefix, tensor_to_array
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

KERNEL, BIAS = "slstm_cell._recurrent_kernel_", "slstm_cell._bias_"
GATE_LAYERS = {"i": "igate.weight", "f": "fgate.weight", "g": "zgate.weight", "o": "ogate.weight"}
ARRAY_PATTERN = re.compile(r"([ifzo]gate|slstm_cell)\..+")  # includes unexpected names, so that they raise an error


def from_xlstm(lstm: RNN, state_dict: Mapping[str, Any], prefix: str | None = None) -> Params:
    """Returns parameters from the ``state_dict`` of an `sLSTMLayer`, or of a model that contains one.

    The layouts of both backends of the package, ``"vanilla"`` and ``"cuda"``, are recognized by the shape of the
    recurrent kernel. ``lstm(params, xs)`` then computes the output of the layer's ``slstm_cell``, to which the layer
    applies its ``group_norm``; its weight and all entries outside the layer are ignored.

    Args:
      lstm: the configuration: ``cell="slstm"`` with the heads of the layer, one layer, and inputs of the hidden size.
      state_dict: arrays or tensors by name.
      prefix: prefix of the names, such as ``"blocks.1.xlstm"``; None if the model contains a single layer.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the network has an option that the layer does not have, if the layer has a
        convolution, if there is no layer or more than one, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly; or if ``prefix`` is not a
        str.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to arrays, got {validation.describe(state_dict)}")
    conversion.check_supported(lstm, FORMATS["vanilla"])
    found = [name.removesuffix(KERNEL) for name in state_dict if name.endswith(KERNEL)]
    prefix = resolve_prefix(prefix, found, "sLSTM layer", f"no name ends in {KERNEL!r}")
    local_names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    for name in local_names:
        if name.startswith("conv1d."):
            raise ValueError(
                f"xlstm weight {prefix + name!r} is of a convolution of the inputs of gates i and f, which the cell "
                "does not have; expected a layer with conv1d_kernel_size=0"
            )
    arrays = {
        prefix + name: tensor_to_array(prefix + name, state_dict[prefix + name], "xlstm")
        for name in local_names
        if ARRAY_PATTERN.fullmatch(name)
    }
    units = lstm.hidden_size // lstm.heads
    kernel = arrays.get(prefix + KERNEL)
    is_cuda = getattr(kernel, "shape", None) == (lstm.heads, units, len(GATES) * units)
    weight_format = FORMATS["cuda" if is_cuda else "vanilla"]
    return conversion.params_from_arrays(lstm, weight_format, arrays, lambda n, d, name: prefix + name)


def to_xlstm(lstm: RNN, params: Params, backend: str = "cuda") -> dict[str, np.ndarray]:
    """Returns the ``state_dict`` of an `sLSTMLayer` without its ``group_norm``, as NumPy arrays.

        tensors = {name: torch.from_numpy(array) for name, array in to_xlstm(lstm, params).items()}
        layer.load_state_dict(tensors, strict=False)  # keeps group_norm.weight

    Args:
      lstm: the configuration.
      params: its parameters. Those of ``W_x`` outside the blocks must be zero.
      backend: backend of the layer, ``"cuda"``, the default of the package, or ``"vanilla"``; they store the recurrent
        kernel and the bias in different orders.

    Raises:
      ValueError, TypeError: if the network has an option that the layer does not have, ``W_x`` is not block-diagonal,
        or ``params`` are of another configuration.
    """
    weight_format = FORMATS[validation.choice("backend", backend, FORMATS)]
    return conversion.arrays_from_params(lstm, weight_format, params, lambda n, d, name: name)


def _xlstm_format(kernel_axes: tuple[int, ...], bias_axes: tuple[int, ...]) -> WeightFormat:
    """Returns the format of a layer.

    Args:
      kernel_axes: order of the axes gates, heads, units and units read in the recurrent kernel, whose shape merges the
        gates with the units.
      bias_axes: order of the axes gates, heads and units in the bias.
    """

    def to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
        assert weights.b is not None
        sizes = _sizes(lstm)
        _, heads, units = sizes
        blocks = {gate: _diagonal_blocks(gate, w, heads) for gate, w in split_gates(weights.w_x, GATES).items()}
        kernel = weights.w_h.reshape(*sizes, units).transpose(kernel_axes)
        shape = (heads, -1, units) if kernel_axes[-1] == 3 else (heads, units, -1)
        return {
            **{GATE_LAYERS[gate]: blocks[gate] for gate in GATES},
            KERNEL: kernel.reshape(shape),
            BIAS: weights.b.reshape(sizes).transpose(bias_axes).reshape(-1),
        }

    def from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
        sizes = _sizes(lstm)
        kernel_sizes, bias_sizes = (*sizes, sizes[-1]), sizes
        kernel = arrays[KERNEL].reshape([kernel_sizes[axis] for axis in kernel_axes]).transpose(np.argsort(kernel_axes))
        b = arrays[BIAS].reshape([bias_sizes[axis] for axis in bias_axes]).transpose(np.argsort(bias_axes))
        return {
            "w_x": np.concatenate([_block_diagonal(arrays[GATE_LAYERS[gate]]) for gate in GATES]),
            "w_h": kernel.reshape(len(GATES) * lstm.hidden_size, -1),
            "b": b.reshape(-1),
        }

    return WeightFormat("xlstm", to_arrays, from_arrays, _supported_options)


def _sizes(lstm: RNN) -> tuple[int, int, int]:
    """Returns the numbers of gates, heads and units per head: the axes of a row of ``w_h``."""
    return len(GATES), lstm.heads, lstm.hidden_size // lstm.heads


def _diagonal_blocks(gate: str, w: np.ndarray, heads: int) -> np.ndarray:
    """Returns the blocks ``(heads, units, units)`` of a matrix, whose other elements must be zero."""
    units = len(w) // heads
    blocks = np.stack([w[n : n + units, n : n + units] for n in range(0, len(w), units)])
    if np.any(w != _block_diagonal(blocks)):
        raise ValueError(
            f"xlstm weights need block-diagonal input weights with heads={heads}, got other elements than zero outside "
            f"the blocks of gate {gate} in w_x"
        )
    return blocks


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    """Returns the matrix that has these blocks on its diagonal and is zero elsewhere."""
    heads, units, _ = blocks.shape
    w = np.zeros((heads * units, heads * units), blocks.dtype)
    for n, block in enumerate(blocks):
        w[n * units : (n + 1) * units, n * units : (n + 1) * units] = block
    return w


def _supported_options(lstm: RNN) -> OptionValues:
    return {
        "cell": ("slstm",),
        "heads": (lstm.heads,),
        "num_layers": (1,),
        "bidirectional": (False,),
        "input_size": (lstm.hidden_size,),
    }


# By backend; axes are numbered as in `_sizes`, and 3 is the axis of the units that the kernel reads.
FORMATS = {
    "vanilla": _xlstm_format(kernel_axes=(1, 0, 2, 3), bias_axes=(0, 1, 2)),
    "cuda": _xlstm_format(kernel_axes=(1, 3, 0, 2), bias_axes=(1, 0, 2)),
}
