"""`last_outputs`: the last valid output of each sequence."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxlstm import validation


def last_outputs(
    ys: Float[ArrayLike, "T *batch DP"],
    lengths: Int[ArrayLike, "*batch"] | None = None,
    *,
    bidirectional: bool = False,
) -> Float[Array, "*batch DP"]:
    """Returns the last valid output of each sequence, for example for classification.

    For a bidirectional network it concatenates the last output of each direction: the forward half of the last step
    and the backward half of the first step, so that both have read the whole sequence.

    Args:
      ys: outputs of a call.
      lengths: lengths of the sequences, as in the call; None if all have T steps. Lengths above T count as T.
      bidirectional: whether ``ys`` has two directions, forward first.

    Returns:
      the outputs; zeros for sequences of length 0.

    Raises:
      ValueError, TypeError: for a wrong shape or dtype, or an odd number of outputs of a bidirectional network.
    """
    ys = validation.array("ys", ys, jnp.floating)
    if ys.ndim < 2:
        raise ValueError(f"ys must have shape (T, *batch, outputs), got {list(ys.shape)}")
    num_steps, *axes, size = ys.shape
    if bidirectional and size % 2:
        raise ValueError(f"ys of a bidirectional network must have an even number of outputs, got {size}")
    batch = tuple(axes)
    if lengths is None:
        counts: Any = jnp.full(batch, num_steps, jnp.int32)
    else:
        counts = jnp.clip(validation.lengths("lengths", lengths, batch), 0, num_steps)
    if num_steps == 0:
        return jnp.zeros((*batch, size), ys.dtype)
    index = jnp.expand_dims(jnp.maximum(counts - 1, 0), (0, counts.ndim + 1))
    last = jnp.take_along_axis(ys, jnp.broadcast_to(index, (1, *batch, 1)), axis=0)[0]
    if bidirectional:
        last = jnp.concatenate([last[..., : size // 2], ys[0, ..., size // 2 :]], axis=-1)
    return jnp.where((counts > 0)[..., None], last, 0)
