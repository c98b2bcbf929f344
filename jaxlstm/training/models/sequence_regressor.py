"""Maps a sequence to one vector: an LSTM and a linear layer on its last output."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxlstm.dropout import dropout
from jaxlstm.outputs import last_outputs
from jaxlstm.params import Params, accumulation_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.rnn import RNN


class SequenceRegressorParams(NamedTuple):
    """The parameters of a `SequenceRegressor`; O is the output size, P the output size of a step of the LSTM."""

    lstm: Params
    w_out: Array  # (O, P), or (O, 2P) if bidirectional
    b_out: Array  # (O,)


@dataclass(frozen=True)
class SequenceRegressor:
    """A vector computed from a whole sequence: regression targets or the logits of classes.

    The linear layer reads the output after the last valid step; of the backward direction, the output at the first
    step.

    Args:
      lstm: the recurrent network.
      output_size: O.
      dropout: dropout rate of the linear layer's inputs, applied when ``key`` is given.
    """

    lstm: RNN
    output_size: int
    dropout: float = 0.0

    def init(self, key: Array) -> SequenceRegressorParams:
        """Draws the linear layer's weights uniformly from ±1/sqrt of its input size; its bias is zero."""
        k_lstm, k_out = jax.random.split(key)
        dtype, p = self.lstm.param_dtype, self.lstm.num_directions * self.lstm.output_size
        return SequenceRegressorParams(
            lstm=self.lstm.init(k_lstm),
            w_out=jax.random.uniform(k_out, (self.output_size, p), dtype, -(p**-0.5), p**-0.5),
            b_out=jnp.zeros(self.output_size, dtype),
        )

    def __call__(
        self,
        params: SequenceRegressorParams,
        xs: Float[ArrayLike, "T *batch I"],
        lengths: Int[ArrayLike, "*batch"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "*batch O"]:
        """Returns one vector per sequence in float32 or wider.

        Args:
          params: parameters from `init`.
          xs: inputs.
          lengths: lengths of the sequences; None if all have T steps.
          key: turns dropout on.
        """
        k_lstm, k_out = (None, None) if key is None else jax.random.split(key)
        ys, _ = self.lstm(params.lstm, xs, lengths=lengths, key=k_lstm)
        last = last_outputs(ys, lengths, bidirectional=self.lstm.bidirectional)
        last = dropout(k_out, self.dropout, last[None], over_time=True)[0]
        accum_dtype = accumulation_dtype(params.w_out.dtype)
        outputs = matvec(params.w_out, last, last.dtype, accum_dtype)
        return outputs + jnp.broadcast_to(params.b_out.astype(accum_dtype), outputs.shape)
