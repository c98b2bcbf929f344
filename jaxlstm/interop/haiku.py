"""Haiku: the parameters of `hk.LSTM`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlstm.interop import cell_discovery, conversion
from jaxlstm.interop.conversion import Layout, reorder
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, Weights

GATES = "igfo"
FORGET_BIAS = np.array([[0], [0], [1], [0]])  # what hk.LSTM adds to z in each step; here it lies in the parameters


def from_haiku(lstm: LSTM, params: Mapping[str, Mapping[str, Any]], name: str = "lstm") -> Params:
    """Parameters from those of one or several `hk.LSTM`.

    Of several, haiku numbers the names in the order of creation; that order must be lowest layer first, and for two
    directions forward before backward. Anything else in ``params`` is not looked at.

    Args:
      lstm: the configuration.
      params: what ``init`` of the transformed function returns.
      name: of the first `hk.LSTM`, with as much of the names around it as it takes to tell it from others, such as
        ``"encoder/lstm"``.

    Returns:
      Parameters in ``param_dtype``. The 1 that `hk.LSTM` adds to the forget gate is added to its bias, rounded to the
      dtype.

    Raises:
      ValueError: naming what is wrong, if the LSTM has an option that `hk.LSTM` has not (no bias, a projection,
        peepholes, coupled gates, layer normalisation, a learned state), if there are not as many `hk.LSTM` as layers
        and directions, or if an array is missing, unexpected or of the wrong shape.
      TypeError: naming the array, if ``param_dtype`` does not hold its dtype exactly.
    """
    cell = rf"(?P<cell>(.*/)?{re.escape(name)}(_\d+)?/linear/)[wb]"
    return conversion.read(lstm, LAYOUT, *cell_discovery.find(lstm, LAYOUT, cell_discovery.flatten(params), cell))


def to_haiku(lstm: LSTM, params: Params, name: str = "lstm") -> dict[str, dict[str, np.ndarray]]:
    """The parameters of `hk.LSTM`, or of as many as there are layers and directions: ``lstm``, ``lstm_1`` and so on.

    The 1 that `hk.LSTM` adds to the forget gate is taken off the bias. That is exact for a bias of 0.5 and more, and
    otherwise rounds it by up to half a unit in the last place of its result: no other number of the same dtype comes
    nearer.

    Args:
      lstm: the configuration.
      params: its parameters.
      name: of the first `hk.LSTM`, with all names around it.

    Raises:
      ValueError, TypeError: if the LSTM has an option that `hk.LSTM` has not, or ``params`` are not of this LSTM.
    """

    def place(layer: int, direction: int, array: str) -> str:
        count = layer * lstm.num_directions + direction
        return f"{name}{f'_{count}' if count else ''}/linear/{array}"

    modules: dict[str, dict[str, np.ndarray]] = {}
    for path, array in conversion.write(lstm, LAYOUT, params, place).items():
        module, own = path.rsplit("/", 1)
        modules.setdefault(module, {})[own] = array
    return modules


def _shift(b: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The bias, in haiku's order, with a number added to each gate."""
    slabs = b.reshape(4, -1)
    return np.where(by == 0, slabs, slabs + by.astype(b.dtype)).reshape(-1)


def _write(weights: Weights) -> dict[str, Any]:
    assert weights.b is not None
    w = np.concatenate([weights.w_x, weights.w_h], axis=1)
    return {"w": reorder(w, "ifgo", GATES).T, "b": _shift(reorder(weights.b, "ifgo", GATES), -FORGET_BIAS)}


def _read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    w = reorder(arrays["w"].T, GATES, "ifgo")
    b = reorder(_shift(arrays["b"], FORGET_BIAS), GATES, "ifgo")
    inputs = w.shape[1] - w.shape[0] // 4
    return {"w_x": w[:, :inputs], "w_h": w[:, inputs:], "b": b}


LAYOUT = Layout("haiku", _write, _read)
