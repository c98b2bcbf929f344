"""PyTorch: the ``state_dict`` of an `nn.LSTM`, or of an `nn.RNN` for ``cell="rnn"``."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import OptionValues, WeightFormat, add_biases
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights

FIRST_NAME = "weight_ih_l0"  # every nn.LSTM has it
ARRAY_PATTERN = re.compile(r"(weight|bias)_(ih|hh|hr)_\w+")  # includes unexpected names, so that they raise an error


def from_torch(lstm: LSTM, state_dict: Mapping[str, Any], prefix: str | None = None) -> Params:
    """Returns parameters from the ``state_dict`` of an `nn.LSTM`, or of a module that contains one.

    The two biases of PyTorch are added. Entries outside the LSTM are ignored.

    Args:
      lstm: the configuration; for ``cell="rnn"`` with the activation of the module.
      state_dict: arrays or tensors by name.
      prefix: prefix of the names, such as ``"encoder.lstm"``; None if the module contains a single LSTM.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that `nn.LSTM` does not have (peepholes, coupled gates,
        layer normalization, a learned state), if there is no LSTM or more than one, or if an array is missing,
        unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to arrays, got {validation.describe(state_dict)}")
    conversion.check_supported(lstm, TORCH)
    prefix = _resolve_prefix(state_dict, prefix)
    arrays = {name: _tensor_to_array(state_dict[name]) for name in lstm_array_names(state_dict, prefix)}
    return conversion.params_from_arrays(lstm, TORCH, arrays, lambda n, d, name: prefix + _torch_name(n, d, name))


def to_torch(lstm: LSTM, params: Params) -> dict[str, np.ndarray]:
    """Returns the ``state_dict`` of an `nn.LSTM`, or of an `nn.RNN` for ``cell="rnn"``, as NumPy arrays.

    The second of PyTorch's biases is zero.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(lstm, params).items()})

    `torch.from_numpy` does not accept bfloat16; with ``param_dtype=bfloat16`` write
    ``torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)``.

    Raises:
      ValueError, TypeError: if the LSTM has an option that `nn.LSTM` does not have, or ``params`` are of another
        configuration.
    """
    return conversion.arrays_from_params(lstm, TORCH, params, _torch_name)


def lstm_array_names(names: Collection[str], prefix: str | None) -> list[str]:
    """Returns the names that belong to the LSTM with this prefix, or look as if they did."""
    prefix = _resolve_prefix(names, prefix)
    return [name for name in names if name.startswith(prefix) and ARRAY_PATTERN.fullmatch(name.removeprefix(prefix))]


def _resolve_prefix(names: Collection[str], prefix: str | None) -> str:
    """Returns the prefix with its dot; for None, the prefix of the only LSTM among the names."""
    if prefix is not None:
        return prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
    prefixes = [name.removesuffix(FIRST_NAME) for name in names if re.fullmatch(rf"(.*\.)?{FIRST_NAME}", name)]
    if not prefixes:
        raise ValueError(f"state_dict has no LSTM: no name is {FIRST_NAME!r} or ends in '.{FIRST_NAME}'")
    if len(prefixes) > 1:
        choices = ", ".join(map(repr, prefixes))
        raise ValueError(f"state_dict has {len(prefixes)} LSTMs; choose one with prefix=: {choices}")
    return prefixes[0]


def _tensor_to_array(value: Any) -> Any:
    """Converts a tensor to an array; returns anything else unchanged."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # PyTorch cannot convert it to NumPy; JAX can read it
        return jnp.from_dlpack(value)
    return value.numpy()


def _torch_name(layer: int, direction: int, name: str) -> str:
    return f"{name}_l{layer}{'_reverse' if direction else ''}"


def _to_arrays(weights: Weights) -> dict[str, Any]:
    return {
        "weight_ih": weights.w_x,
        "weight_hh": weights.w_h,
        "bias_ih": weights.b,
        "bias_hh": None if weights.b is None else np.zeros_like(weights.b),
        "weight_hr": weights.w_p,
    }


def _from_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "w_x": arrays["weight_ih"],
        "w_h": arrays["weight_hh"],
        "b": add_biases(arrays["bias_ih"], arrays["bias_hh"]) if "bias_ih" in arrays else None,
        "w_p": arrays.get("weight_hr"),
    }


def _supported_options(lstm: LSTM) -> OptionValues:
    """Supports the two activations of `nn.RNN`, and the projections of `nn.LSTM`, which must be smaller than H."""
    if lstm.cell == "rnn":
        return {"cell": ("rnn",), "use_bias": (True, False), "activation": (None, "tanh", "relu")}
    return {"use_bias": (True, False), "proj_size": (None, *range(1, lstm.hidden_size))}


TORCH = WeightFormat("torch", _to_arrays, _from_arrays, _supported_options)
