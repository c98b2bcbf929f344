"""Comparison of a candidate's results with the reference backend's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm.rnn import RNN

WIDE_PRECISIONS = ("highest", "float32")  # values of jax.default_matmul_precision with products in float32


def tolerance(lstm: RNN, xs_shape: tuple[int, ...]) -> float:
    """Returns the largest `relative_error` of correct results.

    The rounding errors of n operations, of either sign, add up to about sqrt(n) units in the last place. Where the
    products are as precise as the sums, n counts the terms of the longest chain of sums: over features, time, batch and
    layers. Eight times that leaves room for the constants of a gradient.

    Operands narrower than the sums are rounded before each product, once per layer on the way up and once on the way
    down, and the errors of the sums are negligible. Errors of different steps are independent and the network
    forgets, so that the error, relative to the largest number of an array, does not grow with time; see the bound in
    the code. A wrong term changes results by more than either bound.

    Args:
      lstm: the network; its dtypes and sizes matter.
      xs_shape: ``(T, *batch, I)``.
    """
    narrow = max(_unit(lstm.output_dtype), float(jnp.finfo(lstm.param_dtype).eps))
    wide = float(jnp.finfo(lstm.state_dtype).eps)
    if narrow > wide:
        return 4 * narrow * (2 * lstm.num_layers) ** 0.5
    features = max(lstm.input_size, lstm.num_directions * lstm.output_size) + lstm.output_size
    num_terms = math.prod(xs_shape[:-1]) * features * lstm.num_layers
    return 8 * wide * num_terms**0.5


def _unit(dtype: jnp.dtype) -> float:
    """Returns the unit in the last place of operands of matrix products, as the platform multiplies them."""
    eps = float(jnp.finfo(dtype).eps)
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if dtype != jnp.float32 or precision in WIDE_PRECISIONS:
        return eps
    # By default, GPUs round float32 operands to TF32, with 10 bits of mantissa, and TPUs to bfloat16.
    return {"gpu": 2.0**-10, "tpu": float(jnp.finfo(jnp.bfloat16).eps)}.get(jax.default_backend(), eps)


def relative_error(actual: Any, expected: Any) -> float:
    """Returns the largest difference of two trees of arrays, each relative to the largest magnitude of its array.

    It is infinite for a number that is not finite and for a difference from an array of zeros.
    """
    errors = jax.tree.map(_array_error, actual, expected)
    return max(jax.tree.leaves(errors), default=0.0)


def _array_error(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    difference, scale = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
