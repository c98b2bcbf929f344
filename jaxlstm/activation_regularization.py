"""Terms of a loss that keep outputs small and slow (Merity, McCann & Socher 2017; Merity, Keskar & Socher 2018)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlstm import validation
from jaxlstm.params import accumulation_dtype


def activation(ys: Float[Array, "T *batch P"], mask: Bool[Array, "T *batch"] | None = None) -> Float[Array, ""]:
    """The mean square of the outputs: activation regularisation. AWD-LSTM takes it of the dropped outputs, times 2.

    Args:
      ys: outputs.
      mask: steps that count; None for all.

    Returns:
      a scalar in float32 or wider; 0 where no step counts.

    Raises:
      ValueError, TypeError: for a mask of another shape or dtype.
    """
    return _mean_square(ys, _steps(ys, mask))


def temporal_activation(
    ys: Float[Array, "T *batch P"], mask: Bool[Array, "T *batch"] | None = None
) -> Float[Array, ""]:
    """The mean square of the change from step to step: temporal activation regularisation, "slowness".

    AWD-LSTM takes it of the outputs before dropout, times 1.

    Args:
      ys: outputs.
      mask: steps that count; a change counts where both of its steps do. None for all.

    Returns:
      a scalar in float32 or wider; 0 where no change counts.

    Raises:
      ValueError, TypeError: for a mask of another shape or dtype.
    """
    mask = _steps(ys, mask)
    return _mean_square(ys[1:] - ys[:-1], None if mask is None else mask[1:] & mask[:-1])


def _steps(ys: Array, mask: Array | None) -> Array | None:
    return None if mask is None else validation.array("mask", mask, jnp.bool_, ys.shape[:-1])


def _mean_square(a: Array, mask: Array | None) -> Array:
    sums = accumulation_dtype(a.dtype)
    if mask is None:
        return jnp.square(a.astype(sums)).sum() / float(max(a.size, 1))
    counted = mask[..., None]
    kept = jnp.where(counted, a, 0).astype(sums)  # before the square, or NaN behind the mask would reach the gradient
    return jnp.square(kept).sum() / jnp.maximum(counted.sum().astype(sums) * a.shape[-1], 1)
