"""Wrong input is one clear error, raised while tracing: what was received, what was expected."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim

from jaxlstm.cells import Cell
from jaxlstm.params import Params, Size, State


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int of at least 1."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def sizes(name: str, value: Any) -> tuple[Size, ...]:
    """Sizes of axes as a tuple of ints of at least 0, or of sizes that are symbols while a program is exported.

    A single one may come without its tuple.
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
    """Sizes of one to three spatial axes, each at least 1; a single one may come without its tuple."""
    axes = sizes(name, value)
    if not 1 <= len(axes) <= 3 or min(axes) < 1:
        raise ValueError(f"{name} must be 1 to 3 sizes of at least 1, got {axes}")
    return axes


def kernel_shape(name: str, value: Any, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Odd sizes of a kernel, one for each spatial axis; a single one is taken for all of them."""
    kernel = sizes(name, value)
    if not isinstance(value, tuple | list):
        kernel *= len(spatial)
    if len(kernel) != len(spatial):
        raise ValueError(f"{name} must be one size or one for each of {len(spatial)} spatial axes, got {kernel}")
    if not all(size % 2 for size in kernel):
        raise ValueError(f"{name} must be odd, so that a position is the middle of what it sees, got {kernel}")
    return kernel


def flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def rate(name: str, value: Any) -> float:
    """``value`` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return float(value)


def number(name: str, value: Any) -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def cell(value: Cell) -> None:
    """A cell of the user's own, whose parts must fit together."""
    if not callable(value.gates):
        raise TypeError(f"gates of the cell must be a function, got {describe(value.gates)}")
    positive_int("num_gates of the cell", value.num_gates)
    for name in ("forget_gate", "input_gate"):
        slab = getattr(value, name)
        is_int = isinstance(slab, int) and not isinstance(slab, bool)
        if slab is not None and not (is_int and slab in range(value.num_gates)):
            raise ValueError(f"{name} of the cell counts slabs of z from 0 to {value.num_gates - 1}, got {slab!r}")
    if not isinstance(value.num_peepholes, int) or value.num_peepholes < 0:
        raise ValueError(f"num_peepholes of the cell must be an integer of at least 0, got {value.num_peepholes!r}")
    if bool(value.num_peepholes) != value.takes("w"):
        takes = "take" if value.takes("w") else "do not take"
        raise ValueError(f"the cell's gates {takes} `w`, but num_peepholes is {value.num_peepholes}")


def float_dtype(name: str, value: Any) -> jnp.dtype:
    """``value`` as a floating-point dtype."""
    try:
        dtype = jnp.dtype("None" if value is None else value)  # NumPy takes None for float64
    except TypeError:
        raise TypeError(f"{name} must be a floating-point dtype, got {value!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype.name}")
    return dtype


def choice(name: str, value: Any, names: Any) -> str:
    """``value``, which must be one of ``names``."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}")
    return value


def available(name: str, dtype: jnp.dtype) -> None:
    """float64 must be switched on in JAX; otherwise it would turn into float32 unseen."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} is {dtype.name}, which needs jax.config.update('jax_enable_x64', True)")


def key(value: Any) -> None:
    """A single PRNG key, typed or raw."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    typed = is_array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    raw = is_array and value.dtype == jnp.uint32 and value.shape == _raw_key_shape()
    if not (raw or (typed and value.shape == ())):
        raise TypeError(f"key must be one PRNG key such as jax.random.key(0), got {describe(value)}")


def _raw_key_shape() -> tuple[int, ...]:
    """Of a key that is not typed, which JAX takes for one of its default kind."""
    return jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape


def describe(value: Any) -> str:
    """A value in an error message: dtype and shape of an array, the type of anything else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__


def array(name: str, value: Any, kind: Any, shape: tuple[int, ...] | None = None, why: str = "") -> Array:
    """``value`` as an array of the given kind of dtype and, where given, shape; ``why`` ends the message."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        if not isinstance(value, int | float | list):
            raise TypeError(f"{name} must be an array, got {describe(value)}")
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            reason = str(error).split("\n")[0]
            raise TypeError(f"{name} must be an array, got {describe(value)}, which makes none: {reason}") from None
    try:
        right = jnp.issubdtype(value.dtype, kind)
    except TypeError:  # that of another library
        right = None
    if right is None or isinstance(value, jax.ShapeDtypeStruct):
        of = type(value).__module__.partition(".")[0]
        raise TypeError(f"{name} must be an array of JAX or NumPy, got {of}'s {type(value).__name__} {describe(value)}")
    if not right:
        expected = {jnp.floating: "floating-point", jnp.integer: "integer", jnp.bool_: "boolean"}[kind]
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{why}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}{why}")
    return jnp.asarray(value)


def marks(
    lengths: Any, mask: Any, resets: Any, num_steps: int, batch: tuple[int, ...]
) -> tuple[Array | None, Array | None, Array | None]:
    """``lengths (*batch)``, ``mask`` and ``resets`` ``(T, *batch)`` as arrays; None stays None."""
    over_time = (num_steps, *batch)
    return (
        None if lengths is None else counts(array("lengths", lengths, jnp.integer, batch)),
        None if mask is None else array("mask", mask, jnp.bool_, over_time),
        None if resets is None else array("resets", resets, jnp.bool_, over_time),
    )


def counts(lengths: Array) -> Array:
    """Lengths in a dtype that a count of steps, and less than nothing, fit in."""
    if lengths.dtype in (jnp.int32, jnp.int64):
        return lengths
    if lengths.dtype.itemsize >= 4:
        lengths = jnp.minimum(lengths, jnp.iinfo(jnp.int32).max)
    return lengths.astype(jnp.int32)


def inputs(name: str, xs: Any, input_size: int, leading: str, spatial: tuple[int, ...] = ()) -> Array:
    """Inputs whose last axes are the spatial ones, where there are any, and the input size."""
    xs = array(name, xs, jnp.floating, why="; token ids are embedded or one-hot encoded first")
    last = (*spatial, input_size)
    smallest = len(last) + ("T" in leading)
    if xs.ndim < smallest or xs.shape[-len(last) :] != last:
        raise ValueError(f"{name} must have shape ({leading}, {', '.join(map(str, last))}), got {list(xs.shape)}")
    return xs


def params(value: Any, expected: Params, widest: jnp.dtype) -> None:
    """The parameters of this configuration: same tree, same shapes, no dtype wider than the sums'.

    ``expected`` holds a `jax.ShapeDtypeStruct` for each array.
    """
    if not isinstance(value, Params):
        raise TypeError(f"params must be a jaxlstm.Params as made by init, got {describe(value)}")
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


def state(value: Any, expected: State) -> State:
    """A state of this configuration and batch, cast to its dtype; ``expected`` holds `jax.ShapeDtypeStruct`."""
    if not isinstance(value, State):
        raise TypeError(f"state must be a jaxlstm.State(h, c), got {describe(value)}")
    if (value.c is None) != (expected.c is None):
        wanted = "None: this cell has no cell state" if expected.c is None else f"an array {list(expected.c.shape)}"
        raise ValueError(f"state.c must be {wanted}; got {describe(value.c)}")
    leaves = {
        name: array(f"state.{name}", getattr(value, name), jnp.floating, want.shape).astype(want.dtype)
        for name, want in expected._asdict().items()
        if want is not None
    }
    return State(leaves["h"], leaves.get("c"))
