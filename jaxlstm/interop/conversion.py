"""Where another framework keeps what `Weights` holds; the one way in and the one way out."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.lstm import LSTM
from jaxlstm.params import Layer, Params, Weights, state_dtype

Place = Callable[[int, int, str], str]  # layer, direction, name within it -> name within the whole
Direction = tuple[int, int, dict[str, tuple[int, ...]]]  # layer, direction, name within it -> shape

# What every framework's LSTM is; a layout adds the values of these options that its framework has beyond.
PLAIN: dict[str, Collection[Any]] = {
    "cell": ("lstm",),
    "proj_size": (None,),
    "use_bias": (True,),
    "layer_norm": (False,),
    "learned_state": (False,),
}


class Layout(NamedTuple):
    """The arrays of one layer in one direction, by the names of their framework.

    Args:
      owner: the framework, as messages name it.
      write: `Weights` to named arrays, in the framework's order; None for an array that there is not.
      read: the way back, to the fields of `Weights`.
      also: values of options, beyond those in `PLAIN`, that the arrays have a place for.
    """

    owner: str
    write: Callable[[Weights], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    also: Callable[[LSTM], Mapping[str, Collection[Any]]] = lambda lstm: {}


def shapes(lstm: LSTM, layout: Layout, place: Place) -> dict[str, tuple[int, ...]]:
    """The shape of every array of this configuration, in the framework's order.

    Raises:
      ValueError: naming the option, if the framework has no place for one.
    """
    return _named(_directions(lstm, layout), place)


def read(lstm: LSTM, layout: Layout, arrays: Mapping[str, Any], place: Place) -> Params:
    """Parameters in ``param_dtype`` from a framework's arrays.

    Raises:
      ValueError: naming the option or the array, if the framework has no place for an option, an array is missing or
        of the wrong shape, or there is one too many; or if ``param_dtype`` needs to be switched on.
      TypeError: naming the array, if it is none, or of a dtype that ``param_dtype`` does not hold exactly.
    """
    directions = _directions(lstm, layout)
    validation.available("param_dtype", jnp.dtype(lstm.param_dtype))
    expected = _named(directions, place)
    for name, shape in expected.items():
        if name not in arrays:
            raise ValueError(f"{layout.owner} weight {name!r} of shape {list(shape)} is missing")
    for name, value in arrays.items():
        if name not in expected:
            received = validation.describe(value)
            raise ValueError(f"{layout.owner} weight {name!r} is not one of this configuration, got {received}")
    found = {
        name: _checked(f"{layout.owner} weight {name!r}", arrays[name], shape, jnp.dtype(lstm.param_dtype))
        for name, shape in expected.items()
    }
    weights = [Weights(**layout.read({name: found[place(n, d, name)] for name in own})) for n, d, own in directions]
    width = lstm.num_directions
    layers = tuple(Layer(*weights[k : k + width]) for k in range(0, len(weights), width))
    return jax.tree.map(jnp.asarray, Params(layers))


def write(lstm: LSTM, layout: Layout, params: Params, place: Place) -> dict[str, np.ndarray]:
    """A framework's arrays, contiguous and writable, in the dtypes of the parameters.

    Raises:
      ValueError, TypeError: if the framework has no place for an option, or ``params`` are not of this configuration.
    """
    refuse(lstm, layout)
    validation.params(params, lstm.param_shapes(), state_dtype(lstm.dtype, lstm.param_dtype))
    return {
        place(n, d, name): np.array(array, order="C")
        for n, layer in enumerate(jax.tree.map(np.asarray, params).layers)
        for d, weights in enumerate(layer.directions)
        for name, array in layout.write(weights).items()
        if array is not None
    }


def reorder(array: Any, have: str, want: str) -> np.ndarray:
    """The slabs of the leading axis, one per gate in the order ``have``, in the order ``want``."""
    slabs = dict(zip(have, np.split(array, len(have))))
    return np.concatenate([slabs[gate] for gate in want])


def one_bias(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """The sum of a framework's two biases; one that is zero leaves the other as it is, a negative zero too."""
    return first if first is None or second is None else np.where(second == 0, first, first + second)


def refuse(lstm: LSTM, layout: Layout) -> None:
    """Refuse options that the framework has no place for.

    Raises:
      ValueError: naming the option.
      TypeError: if it is no `LSTM`.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(f"lstm must be a jaxlstm.LSTM, got {validation.describe(lstm)}")
    for option, values in {**PLAIN, **layout.also(lstm)}.items():
        value = getattr(lstm, option)
        if value not in values:
            raise ValueError(f"{layout.owner} has no place for {option}={value!r}")


def _directions(lstm: LSTM, layout: Layout) -> list[Direction]:
    """Layer, direction, and the shapes of the arrays there by name."""
    refuse(lstm, layout)
    # A single zero, spread over the shape: what is written of it has the framework's shapes and takes no memory.
    zeros = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), lstm.param_shapes())
    return [
        (n, d, {name: array.shape for name, array in layout.write(weights).items() if array is not None})
        for n, layer in enumerate(zeros.layers)
        for d, weights in enumerate(layer.directions)
    ]


def _named(directions: list[Direction], place: Place) -> dict[str, tuple[int, ...]]:
    """The shapes by the names within the whole."""
    return {place(n, d, name): shape for n, d, own in directions for name, shape in own.items()}


def _checked(name: str, value: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """``value`` as a NumPy array of this shape, cast to this dtype, which must hold it exactly."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} must be an array, got {validation.describe(value)}")
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {validation.describe(array)}")
    if not np.can_cast(array.dtype, dtype):
        raise TypeError(f"{name} is {array.dtype}, which param_dtype={dtype} does not hold exactly; cast it beforehand")
    return array.astype(dtype)  # a copy: what becomes of the framework's memory is its own affair
