"""`last_outputs`: the last valid output of each sequence."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxlstm import validation


def last_outputs(
    ys: Float[ArrayLike, "T *batch_and_outputs"],
    lengths: Int[ArrayLike, "*batch"] | None = None,
    *,
    bidirectional: bool = False,
) -> Float[Array, "*batch_and_outputs"]:
    """Returns the last valid output of each sequence, for example for classification.

    For a bidirectional network it concatenates the last output of each direction: the forward half of the last step
    and the backward half of the first step, so that both have read the whole sequence. After a call with
    ``reverse=True`` the final output is ``ys[0]``.

    It takes lengths only, and knows nothing of steps that ``mask`` skipped: the output of a skipped last step is zero.
    The last valid output is then in the final state: ``state.h[-1]``, or for a bidirectional network ``state.h[-2]``
    and ``state.h[-1]``; for a sequence whose steps are all skipped, these are the initial state.

    Args:
      ys: outputs of a call of an LSTM or a ConvLSTM: ``(T, *batch, *features)``.
      lengths: lengths of the sequences ``(*batch,)``, as in the call; None if all have T steps. Lengths above T count
        as T.
      bidirectional: whether ``ys`` has two directions, forward first in the last axis.

    Returns:
      the outputs; zeros for sequences of length 0.

    Raises:
      ValueError, TypeError: for a wrong shape or dtype, or an odd number of outputs of a bidirectional network.
    """
    ys = validation.array("ys", ys, jnp.floating)
    if ys.ndim < 2:
        raise ValueError(f"ys must have shape (T, *batch, outputs), got {list(ys.shape)}")
    num_steps, *axes, size = ys.shape
    bidirectional = validation.flag("bidirectional", bidirectional)
    if bidirectional and size % 2:
        raise ValueError(f"ys of a bidirectional network must have an even number of outputs, got {size}")
    if num_steps == 0:
        return jnp.zeros((*axes, size), ys.dtype)
    if lengths is None:
        counts = jnp.full(axes, num_steps, jnp.int32)
    else:
        counts = jnp.clip(validation.lengths("lengths", lengths, tuple(axes[: np.ndim(lengths)])), 0, num_steps)
    counts = jnp.expand_dims(counts, tuple(range(counts.ndim, len(axes) + 1)))
    index = jnp.broadcast_to(jnp.maximum(counts - 1, 0)[None], (1, *axes, 1))
    last = jnp.take_along_axis(ys, index, axis=0)[0]
    if bidirectional:
        last = jnp.concatenate([last[..., : size // 2], ys[0, ..., size // 2 :]], axis=-1)
    return jnp.where(counts > 0, last, 0)
