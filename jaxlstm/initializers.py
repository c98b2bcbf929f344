"""Initializers of weights and biases.

Each function returns an initializer of the `jax.nn.initializers` form, ``init(key, shape, dtype) -> Array``, for an
array with an axis (the leading one unless stated otherwise) that stacks ``num_gates`` blocks of H. Every gate is
initialized as a separate array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxlstm.params import accumulation_dtype

Initializer = Callable[..., Array]  # (key, shape, dtype) -> array, as in jax.nn.initializers


def per_gate(initializer: Initializer, num_gates: int = 4, axis: int = 0) -> Initializer:
    """Applies ``initializer`` to the block of each gate along ``axis``, each with its own key.

    A ``(num_gates*H, n)`` matrix has blocks ``(H, n)``; along the last axis, a ``(*kernel, n, num_gates*H)``
    convolution kernel has blocks ``(*kernel, n, H)``.

    Blocks are drawn in float32 or wider and cast at the end: the factorizations behind some initializers support no
    narrower dtype.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        block = list(shape)
        block[axis], remainder = divmod(shape[axis], num_gates)
        if remainder:
            raise ValueError(f"axis {axis} must be a multiple of the {num_gates} gates, got {shape[axis]}")
        draw_dtype = accumulation_dtype(dtype)
        blocks = [initializer(k, tuple(block), draw_dtype) for k in jax.random.split(key, num_gates)]
        return jnp.concatenate(blocks, axis).astype(dtype)

    return init


def glorot_uniform(num_gates: int = 4) -> Initializer:
    """Initializes input weights ``(num_gates*H, I)`` uniformly in ±sqrt(6/(I+H)) per gate (Glorot & Bengio 2010)."""
    return per_gate(jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0), num_gates)


def orthogonal(num_gates: int = 4) -> Initializer:
    """Initializes recurrent weights ``(num_gates*H, P)`` orthogonally per gate (Saxe, McClelland & Ganguli 2014).

    If P differs from H, the rows or the columns are orthonormal, whichever are fewer.
    """
    return per_gate(jax.nn.initializers.orthogonal(), num_gates)


def forget_bias(num_gates: int = 4, forget_gate: int | None = 1, value: float = 1.0) -> Initializer:
    """Initializes a bias ``(num_gates*H,)``: ``value`` for the forget gate, zero for the others.

    After Gers et al. 2000 and Jozefowicz et al. 2015. ``forget_gate`` is the index of its slab; None leaves every bias
    at zero. The key is not used.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        del key
        (rows,) = shape
        if rows % num_gates:
            raise ValueError(f"the bias must be a multiple of the {num_gates} gates, got {rows}")
        bias = jnp.zeros((num_gates, rows // num_gates), dtype)
        return (bias if forget_gate is None else bias.at[forget_gate].set(value)).reshape(rows)

    return init


def chrono(num_gates: int, forget_gate: int, input_gate: int | None, longest: int) -> Initializer:
    """Initializes a bias ``(num_gates*H,)`` for dependencies of up to ``longest`` steps (Tallec & Ollivier 2018).

    The bias of the forget gate is log(u) with u uniform in [1, ``longest`` - 1], so that the time scales of the units
    cover that range. The bias of the input gate, if there is one, is its negative; the others are zero.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        (rows,) = shape
        spans = jax.random.uniform(key, (rows // num_gates,), accumulation_dtype(dtype), 1.0, longest - 1.0)
        bias = jnp.zeros((num_gates, rows // num_gates), dtype)
        bias = bias.at[forget_gate].set(jnp.log(spans).astype(dtype))
        if input_gate is not None:
            bias = bias.at[input_gate].set(-jnp.log(spans).astype(dtype))
        return bias.reshape(rows)

    return init


def power_law_forget_bias(num_gates: int, forget_gate: int, heads: int = 1, depth: float = 0.0) -> Initializer:
    """Initializes a bias ``(num_gates*H,)``: from 5 to -7 over the units of a head by a power law, zero elsewhere.

    Unit k of K in a head gets ``5 - 12 (k / (K - 1))^p`` with p from 0.3 in the first layer to 1.6 in the last, so the
    units forget at different rates (Beck et al. 2024). The key is not used.

    Args:
      num_gates: G.
      forget_gate: the index of its slab.
      heads: number of heads.
      depth: 0 for the first layer to 1 for the last.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        del key
        (rows,) = shape
        units = rows // (num_gates * heads)
        position = jnp.arange(units, dtype=accumulation_dtype(dtype)) / max(units - 1, 1)
        values = jnp.tile(5 - 12 * position ** (0.3 + 1.3 * depth), heads).astype(dtype)
        return jnp.zeros((num_gates, rows // num_gates), dtype).at[forget_gate].set(values).reshape(rows)

    return init
