"""Loss terms that keep outputs small and slow (Merity, McCann & Socher 2017; Merity, Keskar & Socher 2018)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlstm import validation
from jaxlstm.params import accumulation_dtype


def activation(ys: Float[Array, "T *batch P"], mask: Bool[Array, "T *batch"] | None = None) -> Float[Array, ""]:
    """Computes activation regularization, the mean square of the outputs.

    AWD-LSTM applies it to the outputs after dropout, with weight 2.

    Args:
      ys: outputs.
      mask: steps that count; None for all.

    Returns:
      a scalar in float32 or wider; 0 if no step counts.

    Raises:
      ValueError, TypeError: for a mask of another shape or dtype.
    """
    return _mean_square(ys, _check_mask(ys, mask))


def temporal_activation(
    ys: Float[Array, "T *batch P"], mask: Bool[Array, "T *batch"] | None = None
) -> Float[Array, ""]:
    """Computes temporal activation regularization ("slowness"), the mean square of the change between steps.

    AWD-LSTM applies it to the outputs before dropout, with weight 1.

    Args:
      ys: outputs.
      mask: steps that count; a change counts if both of its steps do. None for all.

    Returns:
      a scalar in float32 or wider; 0 if no change counts.

    Raises:
      ValueError, TypeError: for a mask of another shape or dtype.
    """
    mask = _check_mask(ys, mask)
    return _mean_square(ys[1:] - ys[:-1], None if mask is None else mask[1:] & mask[:-1])


def _check_mask(ys: Array, mask: Array | None) -> Array | None:
    return None if mask is None else validation.array("mask", mask, jnp.bool_, ys.shape[:-1])


def _mean_square(a: Array, mask: Array | None) -> Array:
    accum_dtype = accumulation_dtype(a.dtype)
    if mask is None:
        return jnp.square(a.astype(accum_dtype)).sum() / float(max(a.size, 1))
    mask = mask[..., None]
    # Masked before the square: otherwise NaN behind the mask would reach the gradient.
    counted = jnp.where(mask, a, 0).astype(accum_dtype)
    return jnp.square(counted).sum() / jnp.maximum(mask.sum().astype(accum_dtype) * a.shape[-1], 1)
