"""How many past steps the output of a network depends on, measured by erasing the ones before."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm import validation
from jaxlstm.diagnostics.trace import check_args
from jaxlstm.params import Params, State
from jaxlstm.rnn import RNN


class EffectiveMemory(NamedTuple):
    """Change of the last output by erasing all steps but the last ones."""

    spans: np.ndarray  # (K,), numbers of last steps that are kept
    change: np.ndarray  # (K,), norm of the change relative to the norm of the output, both over all sequences
    threshold: float

    @property
    def steps(self) -> int | None:
        """The smallest span from which on the change stays below the threshold; None if no span does."""
        above = np.flatnonzero(~(self.change < self.threshold))
        first = int(above[-1]) + 1 if len(above) else 0
        return int(self.spans[first]) if first < len(self.spans) else None


def effective_memory(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    state: State | None = None,
    *,
    spans: Sequence[int] | None = None,
    threshold: float = 0.05,
    static: Float[ArrayLike, "*batch S"] | None = None,
) -> EffectiveMemory:
    """Measures how the last output changes if the network has seen only the last steps, for several numbers of them.

    The state is reset before the last k steps, so everything earlier is erased. The effective memory is the k beyond
    which more context changes the output by less than the threshold, in the manner of Khandelwal et al. (2018), who
    restrict the context of language models. In contrast to a time constant it is measured on the whole network.

    Args:
      lstm: the network; unidirectional.
      params: from ``lstm.init``.
      xs: inputs ``(T, *batch, I)``; the change is over all sequences.
      state: initial state, as in the call.
      spans: the numbers of steps to keep, ascending, from 1 to T-1; None for powers of 2.
      threshold: of `EffectiveMemory.steps`.
      static: as in the call.

    Raises:
      ValueError, TypeError: as the call does, and for a bidirectional network, fewer than two steps, or other spans.
    """
    args = check_args(lstm, params, xs, state, static=static)
    threshold = validation.positive_number("threshold", threshold)
    num_steps, *batch = args.xs.shape[:-1]
    if lstm.bidirectional or num_steps < 2:
        raise ValueError(f"expected a unidirectional network and two steps or more, got {num_steps} and {lstm!r}")
    kept = np.array(2 ** np.arange(int(np.log2(num_steps - 1)) + 1) if spans is None else spans)
    if kept.ndim != 1 or kept.dtype.kind != "i" or not len(kept) or kept[0] < 1 or kept[-1] >= num_steps:
        raise ValueError(f"spans must be integers from 1 to {num_steps - 1}, got {spans}")
    if (np.diff(kept) <= 0).any():
        raise ValueError(f"spans must be ascending, got {spans}")
    expected = lstm(args.params, args.xs, args.state, static=args.static)[0][-1]
    squares = []
    for span in kept:
        resets = jnp.zeros((num_steps, *batch), bool).at[num_steps - span].set(True)
        ys, _ = lstm(args.params, args.xs, args.state, resets=resets, static=args.static)
        squares.append(float(jnp.square(ys[-1] - expected).sum()))
    total = float(jnp.square(expected).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return EffectiveMemory(kept, np.sqrt(np.array(squares) / total), threshold)
