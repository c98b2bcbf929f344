"""An identity that limits the gradient passing through it, for backpropagation through time."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def clip_cotangent(x: Array, limit: float | None) -> Array:
    """Returns ``x``. Reverse mode clips each number of its gradient to ``[-limit, limit]``; forward mode is exact.

    Args:
      x: an array of floats.
      limit: a positive number; None for no limit.
    """
    return x if limit is None else clip_cotangent_p.bind(x, limit=limit)


def _transpose_rule(cotangent: Array, x: Any, *, limit: float) -> tuple[Array]:
    del x
    return (jnp.clip(cotangent, -limit, limit),)


clip_cotangent_p = Primitive("clip_cotangent")
clip_cotangent_p.def_impl(lambda x, *, limit: x)
clip_cotangent_p.def_abstract_eval(lambda x, *, limit: x)
mlir.register_lowering(clip_cotangent_p, mlir.lower_fun(lambda x, *, limit: x, multiple_results=False))
batching.defvectorized(clip_cotangent_p)
ad.deflinear2(clip_cotangent_p, _transpose_rule)
