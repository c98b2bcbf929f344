"""One answer to a sequence: an LSTM and a linear layer on its last output."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm.dropout import dropout
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, accumulation_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec


class ReadoutParams(NamedTuple):
    """The trained arrays of a `Readout`; O is the size of the answer."""

    lstm: Params
    w_out: Array  # (O, P), or (O, 2P) of a bidirectional network
    b_out: Array  # (O,)


@dataclass(frozen=True)
class Readout:
    """A vector from a whole sequence, after its last step; the backward direction answers after its own, the first.

    Args:
      lstm: the recurrent network.
      output_size: O.
      dropout: rate at which what the answer is read from is dropped when ``key`` is given.
    """

    lstm: LSTM
    output_size: int
    dropout: float = 0.0

    def init(self, key: Array) -> ReadoutParams:
        """Weights of the linear layer uniform in ±1/sqrt of its inputs, its bias zero."""
        k_lstm, k_out = jax.random.split(key)
        dtype, p = self.lstm.param_dtype, self.lstm.num_directions * self.lstm.output_size
        return ReadoutParams(
            lstm=self.lstm.init(k_lstm),
            w_out=jax.random.uniform(k_out, (self.output_size, p), dtype, -(p**-0.5), p**-0.5),
            b_out=jnp.zeros(self.output_size, dtype),
        )

    def __call__(
        self, params: ReadoutParams, xs: Float[ArrayLike, "T *batch I"], *, key: Array | None = None
    ) -> Float[Array, "*batch O"]:
        """The answers, in float32 or wider; dropout with a ``key``."""
        k_lstm, k_out = (None, None) if key is None else jax.random.split(key)
        ys, _ = self.lstm(params.lstm, xs, key=k_lstm)
        last, p = ys[-1], self.lstm.output_size
        if self.lstm.bidirectional:
            last = jnp.concatenate([last[..., :p], ys[0, ..., p:]], -1)
        last = dropout(k_out, self.dropout, last[None], over_time=True)[0]
        sums = accumulation_dtype(params.w_out.dtype)
        answer = matvec(params.w_out, last, last.dtype, sums)
        return answer + jnp.broadcast_to(params.b_out.astype(sums), answer.shape)
