"""Maps a sequence to one vector: an LSTM and a linear layer on its pooled outputs."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

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

Pooling = Literal["last", "mean", "max"]


class SequenceRegressorParams(NamedTuple):
    """The parameters of a `SequenceRegressor`; O is the output size, P the output size of a step of the LSTM."""

    lstm: Params
    w_out: Array  # (O, P), or (O, 2P) if bidirectional
    b_out: Array  # (O,)
    embedding: Array | None = None  # (V, I); None for inputs that are vectors


@dataclass(frozen=True)
class SequenceRegressor:
    """A vector computed from a whole sequence: regression targets or the logits of classes.

    Args:
      lstm: the recurrent network.
      output_size: O.
      dropout: dropout rate of the linear layer's inputs, applied when ``key`` is given.
      pooling: inputs of the linear layer: ``"last"``, the output after the last valid step, and of the backward
        direction the output at the first step; ``"mean"`` or ``"max"`` over the valid steps, for each feature.
      vocabulary_size: V, for inputs that are ids of tokens, which are embedded; None for vectors.
    """

    lstm: RNN
    output_size: int
    dropout: float = 0.0
    pooling: Pooling = "last"
    vocabulary_size: int | None = None

    def init(self, key: Array) -> SequenceRegressorParams:
        """Draws the linear layer's weights uniformly from ±1/sqrt of its input size; its bias is zero.

        An embedding is drawn from the standard normal.
        """
        k_lstm, k_out = jax.random.split(key)
        dtype, p = self.lstm.param_dtype, self.lstm.num_directions * self.lstm.output_size
        embedding = None
        if self.vocabulary_size is not None:
            shape = (self.vocabulary_size, self.lstm.input_size)
            embedding = jax.random.normal(jax.random.fold_in(k_out, 1), shape, dtype)
        return SequenceRegressorParams(
            embedding=embedding,
            lstm=self.lstm.init(k_lstm),
            w_out=jax.random.uniform(k_out, (self.output_size, p), dtype, -(p**-0.5), p**-0.5),
            b_out=jnp.zeros(self.output_size, dtype),
        )

    def __call__(
        self,
        params: SequenceRegressorParams,
        xs: Float[ArrayLike, "T *batch I"] | Int[ArrayLike, "T *batch"],
        lengths: Int[ArrayLike, "*batch"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "*batch O"]:
        """Returns one vector per sequence in float32 or wider.

        Args:
          params: parameters from `init`.
          xs: inputs: vectors, or ids of tokens.
          lengths: lengths of the sequences; None if all have T steps.
          key: turns dropout on.
        """
        k_lstm, k_out = (None, None) if key is None else jax.random.split(key)
        ys, _ = self.lstm(params.lstm, self.embed(params, xs), lengths=lengths, key=k_lstm)
        pooled = self.pool(ys, lengths)
        pooled = dropout(k_out, self.dropout, pooled[None], over_time=True)[0]
        accum_dtype = accumulation_dtype(params.w_out.dtype)
        outputs = matvec(params.w_out, pooled, pooled.dtype, accum_dtype)
        return outputs + jnp.broadcast_to(params.b_out.astype(accum_dtype), outputs.shape)

    def embed(self, params: SequenceRegressorParams, xs: ArrayLike) -> Array:
        """Returns the inputs of the LSTM: ``xs``, or the embeddings of its ids."""
        return jnp.asarray(xs) if params.embedding is None else params.embedding[jnp.asarray(xs)]

    def pool(
        self, ys: Float[Array, "T *batch P"], lengths: Int[ArrayLike, "*batch"] | None
    ) -> Float[Array, "*batch P"]:
        """Returns one vector per sequence from the outputs; zeros for a sequence of length 0."""
        if self.pooling == "last":
            return last_outputs(ys, lengths, bidirectional=self.lstm.bidirectional)
        if lengths is None:
            return ys.mean(0) if self.pooling == "mean" else ys.max(0)
        counts = jnp.expand_dims(jnp.asarray(lengths), -1)
        if self.pooling == "mean":  # outputs after the length are zero
            total = ys.astype(accumulation_dtype(ys.dtype)).sum(0)
            return (total / jnp.maximum(counts, 1).astype(total.dtype)).astype(ys.dtype)
        steps = jnp.arange(len(ys)).reshape(-1, *[1] * counts.ndim)
        largest = jnp.where(steps < counts[None], ys, -jnp.inf).max(0)
        return jnp.where(counts > 0, largest, 0)
