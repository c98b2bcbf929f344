"""PyTorch: the ``state_dict`` of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, or of the cell of one of them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import OptionValues, WeightFormat, join_biases, split_bias
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

FIRST_NAME = re.compile(r"(?P<prefix>(.*\.)?)weight_ih(_l0)?")  # every module and every cell has it
ARRAY_PATTERN = re.compile(r"(weight|bias)_(ih|hh|hr)(_\w+)?")  # includes unexpected names, so that they raise an error
WEIGHT = r"(?P<weight>(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?)"
PARAMETRIZED = (  # tensors from which a weight is computed, by weight norm or another parametrization
    re.compile(rf"(?P<prefix>(.*\.)?){WEIGHT}_(g|v|orig)"),
    re.compile(rf"(?P<prefix>(.*\.)?)parametrizations\.{WEIGHT}\..*"),
)
RAW = "_raw"  # ends the names of AWD-LSTM's trained weights; the weight without it is a copy with dropout


def from_torch(lstm: RNN, state_dict: Mapping[str, Any], prefix: str | None = None) -> Params:
    """Returns parameters from the ``state_dict`` of an `nn.LSTM`, its cell, or a module that contains one.

    `nn.GRU`, `nn.RNN` and their cells are supported for ``cell="gru"`` and ``cell="rnn"``. The two biases of PyTorch
    are added where their sum is all that matters. Entries outside the module are ignored. With the weight drop of
    AWD-LSTM, the trained weights ``*_raw`` are taken, not their copies with dropout.

    Args:
      lstm: the configuration, with the cell of the module; for ``cell="rnn"`` with its activation.
      state_dict: arrays or tensors by name.
      prefix: prefix of the names, such as ``"encoder.lstm"``; None if the module contains a single LSTM.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming the cause, if the LSTM has an option that `nn.LSTM` does not have (peepholes, coupled gates,
        layer normalization, a learned state), if there is no LSTM or more than one, or if an array is missing,
        unexpected, of the wrong shape, without values (on the meta device), or computed from others (weight norm).
      TypeError: naming the array, if ``param_dtype`` cannot represent its dtype exactly; or if ``prefix`` is not a
        str.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to arrays, got {validation.describe(state_dict)}")
    conversion.check_supported(lstm, TORCH)
    names = lstm_array_names(state_dict, prefix)
    prefix = _resolve_prefix(state_dict, prefix)
    is_cell = f"{prefix}weight_ih" in names
    if is_cell and lstm.num_layers * lstm.num_directions > 1:
        raise ValueError(
            f"torch weight {prefix + 'weight_ih'!r} is of a cell, which is one layer in one direction; expected weights"
            f" for num_layers={lstm.num_layers} and bidirectional={lstm.bidirectional}"
        )
    arrays = {name: tensor_to_array(source, state_dict[source]) for name, source in names.items()}
    return conversion.params_from_arrays(
        lstm, TORCH, arrays, lambda n, d, name: prefix + (name if is_cell else _torch_name(n, d, name))
    )


def to_torch(lstm: RNN, params: Params) -> dict[str, np.ndarray]:
    """Returns the ``state_dict`` of an `nn.LSTM`, an `nn.GRU` or, for ``cell="rnn"``, an `nn.RNN`, as NumPy arrays.

    The second of PyTorch's biases is zero, except for the candidate of a GRU. Cells such as `nn.LSTMCell` have the same
    names without ``_l0``.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(lstm, params).items()})

    `torch.from_numpy` does not accept bfloat16; with ``param_dtype=bfloat16`` write
    ``torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)``.

    Raises:
      ValueError, TypeError: if the LSTM has an option that `nn.LSTM` does not have, or ``params`` are of another
        configuration.
    """
    return conversion.arrays_from_params(lstm, TORCH, params, _torch_name)


def lstm_array_names(names: Collection[str], prefix: str | None) -> dict[str, str]:
    """Returns the names that belong to the LSTM with this prefix, or look as if they did.

    Returns:
      For each name the entry that holds its array: the name itself, or with weight drop the trained weight.

    Raises:
      ValueError: if there is no LSTM or more than one, or if a weight is computed from other tensors.
    """
    prefix = _resolve_prefix(names, prefix)
    _check_not_parametrized(names, prefix)
    local = [name for name in names if name.startswith(prefix) and ARRAY_PATTERN.fullmatch(name.removeprefix(prefix))]
    sources = {name: name for name in local if not name.endswith(RAW)}
    for parent in (prefix, prefix.removesuffix("module.")):  # of the LSTM, or of the module that drops its weights
        for name in names:
            if name.startswith(parent) and ARRAY_PATTERN.fullmatch(name.removeprefix(parent)) and name.endswith(RAW):
                sources[prefix + name.removeprefix(parent).removesuffix(RAW)] = name
    return sources


def _check_not_parametrized(names: Collection[str], prefix: str) -> None:
    """Raises an error that names the tensors from which a weight of this LSTM is computed."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, weight = _parametrized_weight(name) or (None, "")
        if parent == prefix:
            found.setdefault(weight, []).append(name)
    for weight, tensors in found.items():
        raise ValueError(
            f"torch weight {prefix + weight!r} is computed from {', '.join(map(repr, tensors))}: remove the weight norm"
            " or other parametrization from the module before calling state_dict()"
        )


def _parametrized_weight(name: str) -> tuple[str, str] | None:
    """Returns prefix and weight if the name is of a tensor from which a weight is computed."""
    match = PARAMETRIZED[0].fullmatch(name) or PARAMETRIZED[1].fullmatch(name)
    return match and (match["prefix"], match["weight"])


def _resolve_prefix(names: Collection[str], prefix: str | None) -> str:
    """Returns the prefix with its dot; for None, the prefix of the only recurrent module among the names."""
    found = [match["prefix"] for name in names if (match := FIRST_NAME.fullmatch(name))]
    found += [parametrized[0] for name in names if (parametrized := _parametrized_weight(name))]
    expected = "no name is 'weight_ih_l0' or ends in '.weight_ih_l0', or 'weight_ih' for a cell"
    return resolve_prefix(prefix, found, "recurrent module", expected)


def resolve_prefix(prefix: str | None, found: Collection[str], kind: str, expected: str) -> str:
    """Returns the prefix of a module with its dot; for None, the only one found.

    Args:
      prefix: the prefix that the user gave, or None.
      found: prefixes of the modules among the names of a ``state_dict``.
      kind: what they are, for error messages.
      expected: completes the message if there is none.

    Raises:
      ValueError: for None, if there is none or more than one.
      TypeError: if the prefix is not a str.
    """
    if prefix is not None:
        validation.instance("prefix", prefix, str, "a str or None")
        return prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
    prefixes = list(dict.fromkeys(found))
    if not prefixes:
        raise ValueError(f"state_dict has no {kind}: {expected}")
    if len(prefixes) > 1:
        choices = ", ".join(map(repr, prefixes))
        raise ValueError(f"state_dict has {len(prefixes)} {kind}s; choose one with prefix=: {choices}")
    return prefixes[0]


def tensor_to_array(name: str, value: Any, framework: str = "torch") -> Any:
    """Converts a tensor to an array; returns anything else unchanged."""
    if not hasattr(value, "detach"):
        return value
    if getattr(value, "is_meta", False):
        raise ValueError(
            f"{framework} weight {name!r} is on the meta device, which has no values; load the weights first"
        )
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # PyTorch cannot convert it to NumPy; JAX can read it
        return jnp.from_dlpack(value)
    return value.numpy()


def _torch_name(layer: int, direction: int, name: str) -> str:
    return f"{name}_l{layer}{'_reverse' if direction else ''}"


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    b_x, b_h = (None, None) if weights.b is None else split_bias(lstm.resolved_cell, weights.b)
    return {
        "weight_ih": weights.w_x,
        "weight_hh": weights.w_h,
        "bias_ih": b_x,
        "bias_hh": b_h,
        "weight_hr": weights.w_p,
    }


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = "bias_ih" in arrays
    return {
        "w_x": arrays["weight_ih"],
        "w_h": arrays["weight_hh"],
        "b": join_biases(lstm.resolved_cell, arrays["bias_ih"], arrays["bias_hh"]) if has_bias else None,
        "w_p": arrays.get("weight_hr"),
    }


def _supported_options(lstm: RNN) -> OptionValues:
    """Supports the two activations of `nn.RNN`, and the projections of `nn.LSTM`, which must be smaller than H."""
    if lstm.cell == "rnn":
        return {"cell": ("rnn",), "use_bias": (True, False), "activation": (None, "tanh", "relu")}
    if lstm.cell == "gru":
        return {"cell": ("gru",), "use_bias": (True, False)}
    return {"use_bias": (True, False), "proj_size": (None, *range(1, lstm.hidden_size))}


TORCH = WeightFormat("torch", _to_arrays, _from_arrays, _supported_options)
