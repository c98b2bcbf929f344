"""Checks of arguments: wrong input raises one clear error while tracing, with the received and the expected value."""

import contextlib
import difflib
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.export import is_symbolic_dim
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxlstm.cells import SOURCES, Cell, argument_names
from jaxlstm.errors import first_line
from jaxlstm.params import Params, Size, State

# Beginnings of names of operations whose results depend on other places although shapes do not show it.
SHAPE_PRESERVING = ("cum", "fft", "iota", "reduce_window", "rev", "sort")
Network = TypeVar("Network", bound=Any)  # a dataclass: `jaxlstm.LSTM` or `jaxlstm.ConvLSTM`


def positive_int(name: str, value: Any) -> int:
    """Returns ``value`` as an int of at least 1."""
    return int_at_least(name, value, 1)


def int_at_least(name: str, value: Any, minimum: int) -> int:
    """Returns ``value`` as an int of at least ``minimum``."""
    number = _index(name, value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def index_below(name: str, value: Any, count: int) -> int:
    """Returns ``value`` as an int from 0 to ``count - 1``."""
    number = _index(name, value)
    if not 0 <= number < count:
        raise ValueError(f"{name} must be {f'0 to {count - 1}' if count > 1 else '0, the only one'}; got {number}")
    return number


def _index(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def sizes(name: str, value: Any) -> tuple[Size, ...]:
    """Returns sizes of axes as a tuple of ints of at least 0, or of symbolic dimensions while a program is exported.

    A single size needs no tuple.
    """
    given = value if isinstance(value, tuple | list) else (value,)
    try:
        axes = tuple(size if is_symbolic_dim(size) else operator.index(size) for size in given)
    except TypeError:
        raise TypeError(f"{name} must be an int or a tuple of ints, got {value!r}") from None
    if any(isinstance(size, int) and size < 0 for size in axes):
        raise ValueError(f"{name} must be sizes of at least 0, got {axes}")
    return axes


def spatial_shape(name: str, value: Any) -> tuple[int, ...]:
    """Returns the sizes of one to three spatial axes, each at least 1; a single size needs no tuple."""
    axes = sizes(name, value)
    if not 1 <= len(axes) <= 3 or min(axes) < 1:
        raise ValueError(f"{name} must be 1 to 3 sizes of at least 1, got {axes}")
    return axes


def kernel_shape(name: str, value: Any, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Returns odd kernel sizes, one per spatial axis; a single size is used for all axes."""
    kernel = sizes(name, value)
    if not isinstance(value, tuple | list):
        kernel *= len(spatial)
    if len(kernel) != len(spatial):
        raise ValueError(f"{name} must be one size or one for each of {len(spatial)} spatial axes, got {kernel}")
    if not all(size % 2 for size in kernel):
        raise ValueError(f"{name} must be odd, so that each position is the center of its patch, got {kernel}")
    return kernel


def flag(name: str, value: Any) -> bool:
    """Returns a Python or NumPy bool as a bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def rate(name: str, value: Any) -> float:
    """Returns ``value`` as a float in [0, 1)."""
    number = _float(name, value, "a number in [0, 1)")
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return number


def number(name: str, value: Any) -> float:
    """Returns ``value`` as a finite float."""
    number = _float(name, value, "a number")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def positive_number(name: str, value: Any) -> float:
    """Returns ``value`` as a finite float above zero."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return result


def _float(name: str, value: Any, expected: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, np.generic | np.ndarray | Array) and not isinstance(value, Tracer):
        kinds = jnp.integer, jnp.floating
        is_number = value.shape == () and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if not is_number:
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def cell(value: Cell) -> None:
    """Checks that the parts of a user's own cell fit together."""
    names = _gate_names(value)
    for label in ("forget_gate", "input_gate", "candidate"):
        name = getattr(value, label)
        if name is not None and name not in names:
            raise ValueError(f"{label} of the cell must be one of its gates {', '.join(names)}, got {name!r}")
    states = _state_names(value, names)
    _check_sources(value, names)
    choice("recurrent of the cell", value.recurrent, ("dense", "diagonal"))
    flag("affine of the cell", value.affine)
    if value.forget_bias != "power_law":
        number("forget_bias of the cell", value.forget_bias)
    if not isinstance(value.peepholes, tuple) or not set(value.peepholes) <= set(names):
        raise ValueError(f"peepholes of the cell must be some of its gates {', '.join(names)}, got {value.peepholes!r}")
    if value.peepholes and len(states) != 1:
        raise ValueError(f"peepholes of the cell need one cell state, got {', '.join(states) or 'none'}")
    read: set[str] = set()
    for label in ("update", "output"):
        function: Any = getattr(value, label)
        if function is None and label == "update":
            continue
        if not callable(function):
            raise TypeError(f"{label} of the cell must be a function, got {describe(function)}")
        arguments = argument_names(function)
        known = [*names, *states, "h"]
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ValueError(f"{label} of the cell takes {unknown[0]!r}, which is not one of {', '.join(known)}")
        read |= set(arguments)
        num_results = len(states) if label == "update" else 1
        _check_elementwise(f"{label} of the cell", function, arguments, num_results)
    unread = [name for name in names if name not in read]
    if unread:
        raise ValueError(f"gate {unread[0]!r} of the cell is read neither by update nor by output")


def _state_names(cell: Cell, gates: list[str]) -> list[str]:
    """Returns the names of a cell's states after checking their declaration."""
    pairs = cell.state
    if not isinstance(pairs, tuple) or not all(isinstance(a, tuple) and len(a) == 2 for a in pairs):
        raise TypeError(
            f'state of the cell must be a dict of initial values such as {{"c": 0.0}}, got {describe(pairs)}'
        )
    names = [name for name, _ in pairs]
    for name, initial in pairs:
        if not (isinstance(name, str) and name.isidentifier()) or name in (*gates, "h") or names.count(name) > 1:
            raise ValueError(f"names of states must be identifiers other than h and the gates, got {name!r}")
        if math.isnan(_float(f"the initial value of state {name!r}", initial, "a number")):
            raise ValueError(f"the initial value of state {name!r} must be a number, got nan")
    if bool(names) != (cell.update is not None):
        raise ValueError(
            f"a cell has states if it has an update: got state={', '.join(names) or 'none'} and "
            f"{'no update' if cell.update is None else 'an update'}"
        )
    return names


def _check_sources(cell: Cell, gates: list[str]) -> None:
    """Checks which sources the gates read."""
    pairs = cell.reads
    if not isinstance(pairs, tuple) or not all(isinstance(a, tuple) and len(a) == 2 for a in pairs):
        raise TypeError(f'reads of the cell must be a dict such as {{"i": ("x",)}}, got {describe(pairs)}')
    for name, sources in pairs:
        if name not in gates:
            raise ValueError(f"reads of the cell must name its gates {', '.join(gates)}, got {name!r}")
        is_valid = isinstance(sources, tuple) and sources and len(set(sources)) == len(sources)
        if not is_valid or not set(sources) <= set(SOURCES):
            raise ValueError(f"gate {name!r} must read some of {', '.join(SOURCES)}, as a tuple, got {sources!r}")
    if not cell.slabs_reading("x"):
        raise ValueError("at least one gate of the cell must read x, got none")


def _gate_names(cell: Cell) -> list[str]:
    """Returns the names of a cell's gates after checking their declaration."""
    pairs = cell.gates
    if not isinstance(pairs, tuple) or not pairs or not all(isinstance(a, tuple) and len(a) == 2 for a in pairs):
        raise TypeError(
            'gates of the cell must be a dict of activations by name such as {"i": jaxlstm.cells.sigmoid}, got '
            f"{describe(pairs)}"
        )
    names = [name for name, _ in pairs]
    for name, activation in pairs:
        is_state = name in ("h", *(state for state, *_ in cell.state or ()))
        if not (isinstance(name, str) and name.isidentifier()) or is_state or names.count(name) > 1:
            raise ValueError(f"names of gates must be different identifiers, not h or a state, got {name!r}")
        if activation is None:
            continue
        if not callable(activation):
            raise TypeError(f"the activation of gate {name!r} must be a function or None, got {describe(activation)}")
        _check_elementwise(f"the activation of gate {name!r}", lambda z, activation=activation: activation(z), ("z",))
    return names


def _check_elementwise(
    label: str, function: Callable[..., Any], arguments: tuple[str, ...], num_results: int = 1
) -> None:
    """Checks by tracing that a function of arrays by name is elementwise; several results are a tuple."""
    array = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    try:
        closed, result = jax.make_jaxpr(lambda values: function(**values), return_shape=True)(
            dict.fromkeys(arguments, array)
        )
    except Exception as error:  # of the user's function
        raise ValueError(f"{label} failed on arrays [2, 3]: {first_line(error)}") from error
    if num_results > 1 and not (isinstance(result, tuple) and len(result) == num_results):
        raise ValueError(f"{label} must return a tuple of {num_results} states, got {describe(result)}")
    for each in result if num_results > 1 else (result,):
        if isinstance(each, jax.ShapeDtypeStruct) and each.shape == array.shape:
            continue
        received = list(each.shape) if isinstance(each, jax.ShapeDtypeStruct) else describe(each)
        raise ValueError(f"{label} must be elementwise over units; for arrays [2, 3] it returned {received}")
    mixing = _mixing_operation(closed.jaxpr, array.shape)
    if mixing is not None:
        raise ValueError(f"{label} must be elementwise over units, got the operation {mixing!r}")


def _mixing_operation(jaxpr: Jaxpr, shape: tuple[int, ...]) -> str | None:
    """Returns the first operation of a jaxpr that mixes numbers of different places; None if there is none.

    The sizes of ``shape`` are different from each other and from 1, so that an operation on whole axes shows in shapes.
    """
    for equation in jaxpr.eqns:
        arrays = [cast(Any, atom).aval for atom in (*equation.invars, *equation.outvars)]
        name = equation.primitive.name
        if name.startswith(SHAPE_PRESERVING) or any(a.shape != shape for a in arrays if a.size != 1):
            return name
        parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        for inner in filter(_is_jaxpr, parameters):
            mixing = _mixing_operation(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, shape)
            if mixing is not None:
                return mixing
    return None


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def replace_quietly(network: Network, **options: Any) -> Network:
    """Returns a network with other options, without repeating the warnings about its own."""
    with without_warnings():
        return replace(network, **options)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hides the warnings about options, which were given when the user made the network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def warn_unused_dropout(dropout: float, num_layers: int, variational: bool) -> None:
    """Warns about dropout options without an effect, in the words of `torch.nn.LSTM`'s warning."""
    message = None
    if dropout > 0 and num_layers == 1:
        message = (
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
            f"greater than 1, but got dropout={dropout} and num_layers={num_layers}"
        )
    elif variational and dropout == 0:
        message = (
            "variational option gives the dropout between layers one mask for all steps, so it expects non-zero "
            f"dropout and num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}"
        )
    if message is not None:  # at the line that made the network, above two __post_init__ and one __init__
        warnings.warn(message, UserWarning, stacklevel=5)


def float_dtype(name: str, value: Any) -> jnp.dtype:
    """Returns ``value`` as a floating-point dtype."""
    try:
        dtype = jnp.dtype("None" if value is None else value)  # NumPy takes None for float64
    except TypeError:
        raise TypeError(f"{name} must be a floating-point dtype, got {value!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype.name}")
    return dtype


def choice(name: str, value: Any, names: Any) -> str:
    """Returns ``value``, which must be one of ``names``."""
    if not isinstance(value, str) or value not in names:
        near = difflib.get_close_matches(value.lower(), list(names), 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}{hint}")
    return value


def available(name: str, dtype: jnp.dtype) -> None:
    """Checks that float64 is switched on in JAX; otherwise JAX would silently use float32."""
    if dtype.itemsize > 4 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} is {dtype.name}, which needs jax.config.update('jax_enable_x64', True)")


def key(value: Any) -> None:
    """Checks that ``value`` is a single PRNG key, typed or raw."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    typed = is_array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    raw = is_array and value.dtype == jnp.uint32 and value.shape == _raw_key_shape()
    if not (raw or (typed and value.shape == ())):
        raise TypeError(f"key must be one PRNG key such as jax.random.key(0), got {describe(value)}")


def _raw_key_shape() -> tuple[int, ...]:
    """Returns the shape of a raw key, which JAX interprets as a key of its default kind."""
    return jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape


def describe(value: Any) -> str:
    """Describes a value in an error message: dtype and shape of an array, the type of anything else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__


def instance(name: str, value: Any, expected: type, description: str) -> None:
    """Checks the type of an argument; ``description`` says in the message what it must be."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {description}, got {describe(value)}")


def array(name: str, value: Any, kind: Any, shape: tuple[int, ...] | None = None, why: str = "") -> Array:
    """Returns ``value`` as an array of this kind of dtype and, if given, this shape; ``why`` ends the message."""
    if isinstance(value, Array) and jnp.issubdtype(value.dtype, kind) and shape in (None, value.shape):
        return value
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        is_named_tuple = hasattr(value, "_fields")  # a `State`, not a list of numbers
        if not isinstance(value, int | float | list | tuple) or is_named_tuple:
            raise TypeError(f"{name} must be an array, got {describe(value)}")
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"{name} must be an array, got {describe(value)}: {first_line(error)}") from None
    try:
        right = jnp.issubdtype(value.dtype, kind)
    except TypeError:  # a dtype of another library
        right = None
    if right is None or isinstance(value, jax.ShapeDtypeStruct):
        library = type(value).__module__.partition(".")[0]
        raise TypeError(
            f"{name} must be an array of JAX or NumPy, got {library}'s {type(value).__name__} {describe(value)}"
        )
    if not right:
        expected = {jnp.floating: "floating-point", jnp.integer: "integer", jnp.bool_: "boolean"}[kind]
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{why}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}{why}")
    return jnp.asarray(value)


def step_masks(
    lengths_: Any, mask: Any, resets: Any, num_steps: int, batch: tuple[int, ...]
) -> tuple[Array | None, Array | None, Array | None]:
    """Returns ``lengths (*batch)``, ``mask`` and ``resets`` ``(T, *batch)`` as arrays; None stays None."""
    over_time = (num_steps, *batch)
    return (
        None if lengths_ is None else lengths("lengths", lengths_, batch),
        None if mask is None else array("mask", mask, jnp.bool_, over_time),
        None if resets is None else array("resets", resets, jnp.bool_, over_time),
    )


def lengths(name: str, value: Any, batch: tuple[int, ...]) -> Array:
    """Returns lengths of sequences in a signed dtype wide enough for any number of steps."""
    counts = array(name, value, jnp.integer, batch)
    if counts.dtype in (jnp.int32, jnp.int64):
        return counts
    if counts.dtype.itemsize >= 4:
        counts = jnp.minimum(counts, jnp.iinfo(jnp.int32).max)
    return counts.astype(jnp.int32)


def inputs(name: str, xs: Any, feature_shape: tuple[int, ...], leading: str) -> Array:
    """Returns inputs whose last axes must be ``feature_shape``; ``leading`` names the axes before, as "T, *batch"."""
    xs = array(name, xs, jnp.floating, why="; token ids are embedded or one-hot encoded first")
    min_axes = len(feature_shape) + ("T" in leading)
    if xs.ndim < min_axes or xs.shape[-len(feature_shape) :] != feature_shape:
        features, hint = ", ".join(map(str, feature_shape)), ""
        if len(feature_shape) == 1 and feature_shape[0] in xs.shape[:-1]:
            axis = xs.shape.index(feature_shape[0])
            hint = f"; move the axis of the features to the end: jnp.moveaxis({name}, {axis}, -1)"
        raise ValueError(f"{name} must have shape ({leading}, {features}), got {list(xs.shape)}{hint}")
    return xs


def params(value: Any, expected: Params, widest: jnp.dtype) -> None:
    """Checks parameters: the expected tree and shapes, and no dtype wider than the one sums are computed in.

    ``expected`` holds a `jax.ShapeDtypeStruct` for each array.
    """
    if not isinstance(value, Params):
        raise TypeError(f"params must be a jaxlstm.Params as made by init, got {describe(value)}")
    have, have_tree = jax.tree.flatten(value)
    want, want_tree = jax.tree.flatten(expected)
    if have_tree == want_tree and all(map(_has_shape_and_dtype, have, want)):
        return
    _check_params_by_name(value, expected, widest)


def _has_shape_and_dtype(value: Any, expected: Any) -> bool:
    return isinstance(value, jax.Array) and value.shape == expected.shape and value.dtype == expected.dtype


def _check_params_by_name(value: Params, expected: Params, widest: jnp.dtype) -> None:
    want = dict(jax.tree_util.tree_flatten_with_path(expected)[0])
    have = dict(jax.tree_util.tree_flatten_with_path(value)[0])
    for path in [*want, *(p for p in have if p not in want)]:
        name = "params" + jax.tree_util.keystr(path)
        if path not in have:
            raise ValueError(f"{name} is missing; expected shape {list(want[path].shape)}")
        if path not in want:
            raise ValueError(f"{name} is not a parameter of this configuration, got {describe(have[path])}")
        leaf = array(name, have[path], jnp.floating, want[path].shape)
        if leaf.dtype.itemsize > widest.itemsize:
            raise TypeError(f"{name} is {leaf.dtype}, wider than the {widest} of this configuration; set param_dtype")


def state(value: Any, expected: State, why: str = "", name: str = "state") -> State:
    """Returns a state of this configuration and batch, cast to its dtype; a tuple ``(h, c)`` becomes a `State`.

    ``why`` ends the message about a wrong shape.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        parts, reason = ("(h, c)", "") if expected.c is not None else ("(h, None)", ": this cell has no cell state")
        raise TypeError(f"{name} must be a jaxlstm.State{parts} or a tuple {parts}, got {describe(value)}{reason}")
    h, c = value
    if isinstance(expected.c, dict):
        names = ", ".join(expected.c)
        if not isinstance(c, dict) or set(c) != set(expected.c):
            received = f"a dict of {', '.join(map(repr, c))}" if isinstance(c, dict) else describe(c)
            raise ValueError(f"{name}.c must be a dict of the states {names}; got {received}")
        h = _state_array(f"{name}.h", h, expected.h, why)
        return State(h, {k: _state_array(f"{name}.c[{k!r}]", c[k], a, why) for k, a in expected.c.items()})
    if (c is None) != (expected.c is None):
        wanted = "None: this cell has no cell state" if expected.c is None else f"an array {list(expected.c.shape)}"
        raise ValueError(f"{name}.c must be {wanted}; got {describe(c)}")
    h = _state_array(f"{name}.h", h, expected.h, why)
    return State(h, None if expected.c is None else _state_array(f"{name}.c", c, expected.c, why))


def _state_array(name: str, value: Any, expected: Any, why: str) -> Array:
    a = array(name, value, jnp.floating, expected.shape, why)
    return a if a.dtype == expected.dtype else a.astype(expected.dtype)
