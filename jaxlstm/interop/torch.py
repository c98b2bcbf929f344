"""PyTorch: the ``state_dict`` of an `nn.LSTM`, or of an `nn.RNN` for ``cell="rnn"``."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import Layout, one_bias
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights

FIRST = "weight_ih_l0"  # every nn.LSTM has it
OWN = re.compile(r"(weight|bias)_(ih|hh|hr)_\w+")  # also what is none of its arrays and only looks like one


def from_torch(lstm: LSTM, state_dict: Mapping[str, Any], prefix: str | None = None) -> Params:
    """Parameters from the ``state_dict`` of an `nn.LSTM`, or of a module that has one.

    The two biases of PyTorch are added. What is not of the LSTM is not looked at.

    Args:
      lstm: the configuration; for ``cell="rnn"`` the activation is the module's.
      state_dict: arrays or tensors by name.
      prefix: of the names, such as ``"encoder.lstm"``; where None, that of the one LSTM that there is.

    Returns:
      Parameters in ``param_dtype``.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that `nn.LSTM` has not (peepholes, coupled gates,
        layer normalisation, a learned state), if there is no LSTM or there are several, or if an array is missing,
        unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to arrays, got {validation.describe(state_dict)}")
    conversion.refuse(lstm, LAYOUT)
    prefix = _prefix(state_dict, prefix)
    arrays = {name: _array(state_dict[name]) for name in own_names(state_dict, prefix)}
    return conversion.read(lstm, LAYOUT, arrays, lambda n, d, name: prefix + _place(n, d, name))


def to_torch(lstm: LSTM, params: Params) -> dict[str, np.ndarray]:
    """The ``state_dict`` of an `nn.LSTM`, or for ``cell="rnn"`` of an `nn.RNN`, as NumPy arrays.

    The second of PyTorch's biases is zero.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(lstm, params).items()})

    With ``param_dtype=bfloat16``, which `torch.from_numpy` does not know, an array comes in as
    ``torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)``.

    Raises:
      ValueError, TypeError: if the LSTM has an option that `nn.LSTM` has not, or ``params`` are not of this LSTM.
    """
    return conversion.write(lstm, LAYOUT, params, _place)


def own_names(names: Iterable[str], prefix: str | None) -> list[str]:
    """Those of the names that are the LSTM's, of its arrays or looking like them."""
    prefix = _prefix(names, prefix)
    return [name for name in names if name.startswith(prefix) and OWN.fullmatch(name.removeprefix(prefix))]


def _prefix(names: Iterable[str], prefix: str | None) -> str:
    """The prefix with its dot; where None is given, that of the one LSTM among the names."""
    if prefix is not None:
        return prefix if prefix == "" or prefix.endswith(".") else f"{prefix}."
    found = [name.removesuffix(FIRST) for name in names if re.fullmatch(rf"(.*\.)?{FIRST}", name)]
    if not found:
        raise ValueError(f"state_dict must have an LSTM: no name in it is {FIRST!r} or ends in '.{FIRST}'")
    if len(found) > 1:
        raise ValueError(f"state_dict has {len(found)} LSTMs, choose one of them: prefix={', '.join(map(repr, found))}")
    return found[0]


def _array(value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # PyTorch makes no NumPy array of it, but JAX takes it
        return jnp.from_dlpack(value)
    return value.numpy()


def _place(layer: int, direction: int, name: str) -> str:
    return f"{name}_l{layer}{'_reverse' if direction else ''}"


def _write(weights: Weights) -> dict[str, Any]:
    return {
        "weight_ih": weights.w_x,
        "weight_hh": weights.w_h,
        "bias_ih": weights.b,
        "bias_hh": None if weights.b is None else np.zeros_like(weights.b),
        "weight_hr": weights.w_p,
    }


def _read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "w_x": arrays["weight_ih"],
        "w_h": arrays["weight_hh"],
        "b": one_bias(arrays.get("bias_ih"), arrays.get("bias_hh")),
        "w_p": arrays.get("weight_hr"),
    }


def _also(lstm: LSTM) -> dict[str, Collection[Any]]:
    """`nn.RNN` has two activations; the projections of `nn.LSTM` are smaller than h."""
    if lstm.cell == "rnn":
        return {"cell": ("rnn",), "use_bias": (True, False), "activation": (None, "tanh", "relu")}
    return {"use_bias": (True, False), "proj_size": (None, *range(1, lstm.hidden_size))}


LAYOUT = Layout("torch", _write, _read, _also)
