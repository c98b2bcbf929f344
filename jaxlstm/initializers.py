"""Where training starts.

Each function returns an initialiser of the `jax.nn.initializers` form, ``init(key, shape, dtype) -> Array``, for an
array with an axis (the leading one unless said otherwise) that stacks ``num_gates`` slabs of H, and treats every gate
as an array of its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxlstm.params import accumulation_dtype

Initializer = Callable[..., Array]  # (key, shape, dtype) -> array, as those of jax.nn.initializers


def per_gate(initializer: Initializer, num_gates: int = 4, axis: int = 0) -> Initializer:
    """``initializer`` applied to each gate's block of an array that stacks them along ``axis``, each with its own key.

    A ``(num_gates*H, n)`` matrix has blocks ``(H, n)``; along the last axis, a ``(*kernel, n, num_gates*H)``
    convolution has blocks ``(*kernel, n, H)``.

    Drawn in float32 or wider and rounded at the end: the factorisations behind some initialisers know no narrower
    type.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        block = list(shape)
        block[axis], left = divmod(shape[axis], num_gates)
        if left:
            raise ValueError(f"axis {axis} stacks {num_gates} gates, but {shape[axis]} is no multiple of {num_gates}")
        draw_dtype = accumulation_dtype(dtype)
        blocks = [initializer(k, tuple(block), draw_dtype) for k in jax.random.split(key, num_gates)]
        return jnp.concatenate(blocks, axis).astype(dtype)

    return init


def glorot_uniform(num_gates: int = 4) -> Initializer:
    """Input weights ``(num_gates*H, I)``: uniform in ±sqrt(6 / (I + H)) for each gate (Glorot & Bengio 2010)."""
    return per_gate(jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0), num_gates)


def orthogonal(num_gates: int = 4) -> Initializer:
    """Recurrent weights ``(num_gates*H, P)``: each gate's matrix orthogonal (Saxe, McClelland & Ganguli 2014).

    Where P differs from H, rows or columns are orthonormal, whichever are fewer.
    """
    return per_gate(jax.nn.initializers.orthogonal(), num_gates)


def forget_bias(num_gates: int = 4, forget_gate: int | None = 1, value: float = 1.0) -> Initializer:
    """Bias ``(num_gates*H,)``: zero, but ``value`` for the forget gate (Gers et al. 2000; Jozefowicz et al. 2015).

    ``forget_gate`` counts slabs; None leaves every bias at zero. The key is not used.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        del key
        (rows,) = shape
        if rows % num_gates:
            raise ValueError(f"the bias stacks {num_gates} gates, but {rows} is no multiple of {num_gates}")
        bias = jnp.zeros((num_gates, rows // num_gates), dtype)
        return (bias if forget_gate is None else bias.at[forget_gate].set(value)).reshape(rows)

    return init


def chrono(num_gates: int, forget_gate: int, input_gate: int | None, longest: int) -> Initializer:
    """Bias ``(num_gates*H,)`` for dependencies of up to ``longest`` steps (Tallec & Ollivier 2018).

    The forget gate's is log(u) with u uniform in [1, ``longest`` - 1], so that the units' spans are spread over that
    range; the input gate's, where there is one, is its negative; the others are zero.
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
