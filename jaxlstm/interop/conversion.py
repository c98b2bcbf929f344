"""Conversion between `Params` and the named weight arrays of another framework.

A `WeightFormat` says how a framework stores one layer in one direction. `params_from_arrays` and `arrays_from_params`
are the only code that checks and converts whole networks.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.params import Layer, Params, Weights
from jaxlstm.rnn import RNN

GATES = "ifgo"  # the order in which `Weights` stacks the gates of an LSTM
GRU_GATES = "run"  # reset gate, update gate and candidate: the order of the rows of w_x and of w_h of a GRU

NameFn = Callable[[int, int, str], str]  # (layer, direction, name within the layer) -> name within the network
OptionValues = Mapping[str, Collection[Any]]  # option of `LSTM` -> supported values

# Values of the options that determine which parameters exist, as every format supports them.
BASE_OPTIONS: OptionValues = {
    "cell": ("lstm",),
    "proj_size": (None,),
    "use_bias": (True,),
    "layer_norm": (False,),
    "learned_state": (False,),
    "heads": (1,),
    "residual": (False,),
}


class WeightFormat(NamedTuple):
    """The weight arrays of one layer in one direction, under the names that a framework gives them.

    Args:
      framework: name of the framework in error messages.
      to_arrays: ``(lstm, weights)``: converts `Weights` to named arrays, in the framework's order. The value None
        marks an absent array.
      from_arrays: ``(lstm, arrays)``: converts named arrays to keyword arguments of `Weights`.
      supported_options: values of options that this format supports, in place of those in `BASE_OPTIONS`.
    """

    framework: str
    to_arrays: Callable[[RNN, Weights], dict[str, Any]]
    from_arrays: Callable[[RNN, Mapping[str, Any]], dict[str, Any]]
    supported_options: Callable[[RNN], OptionValues] = lambda lstm: {}


class _ArraySpec(NamedTuple):
    """An expected array: the layer and direction, its name there, its name in the network, and its shape."""

    layer: int
    direction: int
    local_name: str
    name: str
    shape: tuple[int, ...]


def check_supported(lstm: RNN, weight_format: WeightFormat) -> None:
    """Checks that the format can represent the parameters of a configuration.

    Raises:
      ValueError: naming the option that the format does not support.
      TypeError: if ``lstm`` is not an `LSTM`.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    for option, supported in {**BASE_OPTIONS, **weight_format.supported_options(lstm)}.items():
        value = getattr(lstm, option)
        if value not in supported:
            raise ValueError(f"{weight_format.framework} weights do not support {option}={value!r}")


def array_shapes(lstm: RNN, weight_format: WeightFormat, name_fn: NameFn) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a configuration by name, in the framework's order.

    Raises:
      ValueError: naming the option, if the format does not support it.
    """
    return {spec.name: spec.shape for spec in _array_specs(lstm, weight_format, name_fn)}


def params_from_arrays(lstm: RNN, weight_format: WeightFormat, arrays: Mapping[str, Any], name_fn: NameFn) -> Params:
    """Returns parameters in ``param_dtype``, converted from the arrays of a framework.

    Args:
      lstm: the configuration.
      weight_format: the framework's format of one layer in one direction.
      arrays: all arrays of the network by name.
      name_fn: names of the arrays within the network.

    Raises:
      ValueError: naming the option, if the format does not support it; naming the array, if it is missing, unexpected
        or of the wrong shape; or if ``param_dtype`` needs ``jax_enable_x64``.
      TypeError: naming the array, if it is not an array or ``param_dtype`` cannot represent its dtype exactly.
    """
    specs = _array_specs(lstm, weight_format, name_fn)
    param_dtype = jnp.dtype(lstm.param_dtype)
    validation.available("param_dtype", param_dtype)
    for spec in specs:
        if spec.name not in arrays:
            raise ValueError(f"{weight_format.framework} weight {spec.name!r} of shape {list(spec.shape)} is missing")
    expected_names = {spec.name for spec in specs}
    for name, value in arrays.items():
        if name not in expected_names:
            received = validation.describe(value)
            raise ValueError(f"{weight_format.framework} weight {name!r} is not part of this network, got {received}")
    arrays_by_direction: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for spec in specs:
        label = f"{weight_format.framework} weight {spec.name!r}"
        array = _exact_cast(label, arrays[spec.name], spec.shape, param_dtype, lstm)
        arrays_by_direction.setdefault((spec.layer, spec.direction), {})[spec.local_name] = array
    weights = [Weights(**weight_format.from_arrays(lstm, local)) for local in arrays_by_direction.values()]
    step = lstm.num_directions
    layers = tuple(Layer(*weights[k : k + step]) for k in range(0, len(weights), step))
    return jax.tree.map(jnp.asarray, Params(layers))


def arrays_from_params(
    lstm: RNN, weight_format: WeightFormat, params: Params, name_fn: NameFn
) -> dict[str, np.ndarray]:
    """Returns the arrays of a framework by name: copies, contiguous and writable, in the dtypes of the parameters.

    Raises:
      ValueError, TypeError: if the format does not support an option, or ``params`` are of another configuration.
    """
    check_supported(lstm, weight_format)
    validation.params(params, lstm.param_shapes(), lstm.state_dtype)
    return {
        name_fn(n, d, local_name): np.array(array, order="C")
        for n, layer in enumerate(jax.tree.map(np.asarray, params).layers)
        for d, weights in enumerate(layer.directions)
        for local_name, array in weight_format.to_arrays(lstm, weights).items()
        if array is not None
    }


def split_gates(array: np.ndarray | Array, gates: Sequence[str]) -> dict[str, np.ndarray]:
    """Splits the leading axis into one slab per gate."""
    return dict(zip(gates, np.split(array, len(gates))))


def stack_gates(slabs: Mapping[str, np.ndarray], gates: Sequence[str]) -> np.ndarray:
    """Concatenates slabs along the leading axis in the given order of gates."""
    return np.concatenate([slabs[gate] for gate in gates])


def reorder_gates(array: np.ndarray | Array, from_gates: Sequence[str], to_gates: Sequence[str]) -> np.ndarray:
    """Reorders the slabs of the leading axis from one order of gates to another."""
    return stack_gates(split_gates(array, from_gates), to_gates)


def add_biases(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Adds the two biases of a framework; elements whose second bias is zero keep the first bit by bit (-0.0 too)."""
    return np.where(second == 0, first, first + second)


def split_bias(cell: Cell, b: np.ndarray | Array) -> tuple[np.ndarray, np.ndarray]:
    """Splits a bias into the two of a framework that adds one to ``W_x x`` and one to ``W_h h``.

    The second is zero for gates that read both x and h.
    """
    slabs, x = np.split(b, cell.num_gates), cell.slabs_reading("x")
    second = [np.zeros_like(slabs[n]) if n in x else slabs[n] for n in cell.slabs_reading("h")]
    return np.concatenate([slabs[n] for n in x]), np.concatenate(second)


def join_biases(cell: Cell, b_x: np.ndarray, b_h: np.ndarray) -> np.ndarray:
    """Returns the bias of a cell from the two of a framework; the inverse of `split_bias`."""
    x, h = cell.slabs_reading("x"), cell.slabs_reading("h")
    first, second = dict(zip(x, np.split(b_x, len(x)))), dict(zip(h, np.split(b_h, len(h))))
    both = {n: add_biases(first[n], second[n]) for n in x if n in h}
    slabs = {**first, **second, **both}
    return np.concatenate([slabs[n] for n in range(cell.num_gates)])


def position_name(layer: int, direction: int, name: str) -> str:
    """Names an array by its position, for frameworks that give arrays no names within the network."""
    return f"{name} of layer {layer}, {'backward' if direction else 'forward'}"


def _array_specs(lstm: RNN, weight_format: WeightFormat, name_fn: NameFn) -> list[_ArraySpec]:
    """Returns the expected arrays of a configuration in the framework's order."""
    check_supported(lstm, weight_format)
    # Broadcast a single zero to each shape, so that converting the arrays gives the framework's shapes without memory.
    zeros = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), lstm.param_shapes())
    return [
        _ArraySpec(n, d, local_name, name_fn(n, d, local_name), array.shape)
        for n, layer in enumerate(zeros.layers)
        for d, weights in enumerate(layer.directions)
        for local_name, array in weight_format.to_arrays(lstm, weights).items()
        if array is not None
    ]


def _exact_cast(label: str, value: Any, shape: tuple[int, ...], dtype: jnp.dtype, lstm: RNN) -> np.ndarray:
    """Returns a copy of ``value`` as a NumPy array in a dtype that represents all its numbers exactly."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{label} must be an array, got {validation.describe(value)}")
    array = np.asarray(value)
    if array.shape != shape:
        differing = [sizes for sizes in zip(array.shape, shape) if sizes[0] != sizes[1]]
        units, hint = lstm.hidden_size, ""
        if array.ndim == len(shape) and len(differing) == 1:
            received, expected = differing[0]
            gates = (lstm.resolved_cell.slabs_reading(source) for source in ("x", "h"))
            if received % units == 0 and expected in {len(each) * units for each in gates}:
                hint = f": {received // units} gates of {units} units, of another cell; expected {expected // units}"
        raise ValueError(f"{label} must have shape {list(shape)}, got {list(array.shape)}{hint}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{label} must be floating-point, got {validation.describe(array)}")
    if not np.can_cast(array.dtype, dtype):
        raise TypeError(
            f"{label} is {array.dtype}, which param_dtype={dtype} cannot represent exactly; cast it beforehand"
        )
    return array.astype(dtype)
