"""Random masks as data: drawn first, multiplied later, so that every implementation sees the same ones."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def keep_mask(key: Array, rate: float, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zeros with probability ``rate``, else ``1 / (1 - rate)``: multiplying by it keeps the mean (Srivastava 2014).

    Args:
      key: PRNG key.
      rate: share of elements dropped, in [0, 1).
      shape: of the mask.
      dtype: of the mask.
    """
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, jnp.asarray(1.0 / (1.0 - rate), dtype), jnp.zeros((), dtype))


def dropout(key: Array | None, rate: float, x: Array) -> Array:
    """``x`` with each element dropped at ``rate`` and the rest scaled up; ``x`` itself without a key or at rate 0."""
    return x if key is None or rate == 0.0 else x * keep_mask(key, rate, x.shape, x.dtype)
