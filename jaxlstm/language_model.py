"""A language model: embedding, LSTM, softmax."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm.dropout import dropout
from jaxlstm.model import LSTM
from jaxlstm.types import Params, State, sums_dtype


class LanguageModelParams(NamedTuple):
    """The trained arrays of a `LanguageModel`; V is the vocabulary size, E the embedding size."""

    embedding: Array  # (V, E)
    lstm: Params
    w_out: Array  # (V, P)
    b_out: Array  # (V,)


@dataclass(frozen=True)
class LanguageModel:
    """The next token's logits from all tokens before it.

    Args:
      vocabulary_size: V.
      lstm: the recurrent network; its input size is the embedding size E. It runs in one direction.
      dropout: rate at which the LSTM's outputs are dropped before the softmax when ``key`` is given.
    """

    vocabulary_size: int
    lstm: LSTM
    dropout: float = 0.0

    def init(self, key: Array) -> LanguageModelParams:
        """Embedding standard normal, softmax weights uniform in ±1/sqrt(P), its bias zero."""
        k_embedding, k_lstm, k_out = jax.random.split(key, 3)
        dtype, p = self.lstm.param_dtype, self.lstm.output_size
        bound = p**-0.5
        return LanguageModelParams(
            embedding=jax.random.normal(k_embedding, (self.vocabulary_size, self.lstm.input_size), dtype),
            lstm=self.lstm.init(k_lstm),
            w_out=jax.random.uniform(k_out, (self.vocabulary_size, p), dtype, -bound, bound),
            b_out=jnp.zeros(self.vocabulary_size, dtype),
        )

    def __call__(
        self,
        params: LanguageModelParams,
        tokens: Int[ArrayLike, "T *batch"],
        state: State | None = None,
        *,
        resets: Bool[ArrayLike, "T *batch"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "T *batch V"], State]:
        """Logits of the token after each of ``tokens``, and the state after the last; dropout with a ``key``."""
        k_lstm, k_out = (None, None) if key is None else jax.random.split(key)
        ys, state = self.lstm(params.lstm, params.embedding[jnp.asarray(tokens)], state, resets=resets, key=k_lstm)
        return self._logits(params, dropout(k_out, self.dropout, ys)), state

    def step(
        self, params: LanguageModelParams, state: State, token: Int[ArrayLike, "*batch"]
    ) -> tuple[State, Float[Array, "*batch V"]]:
        """The state and the logits after one more token."""
        state, y = self.lstm.step(params.lstm, state, params.embedding[jnp.asarray(token)])
        return state, self._logits(params, y)

    def _logits(self, params: LanguageModelParams, ys: Array) -> Array:
        sums = sums_dtype(params.w_out.dtype)
        logits = jnp.einsum("...p,vp->...v", ys, params.w_out.astype(ys.dtype), preferred_element_type=sums)
        return logits + jnp.broadcast_to(params.b_out.astype(sums), logits.shape)


@partial(jax.jit, static_argnames=("model", "length"))
def generate(
    model: LanguageModel,
    params: LanguageModelParams,
    prompt: Int[ArrayLike, " T"],
    length: int,
    key: Array,
    temperature: float | Array = 1.0,
) -> Int[Array, " length"]:
    """Tokens drawn one step at a time, each from the softmax of the logits after all tokens before it.

    Args:
      model: the model.
      params: its parameters.
      prompt: at least one token to begin with; not part of the result.
      length: number of tokens to draw.
      key: PRNG key.
      temperature: divides the logits; 0 takes the likeliest token.
    """

    def body(carry: tuple[State, Array], key: Array) -> tuple[tuple[State, Array], Array]:
        state, logits = carry
        warm = jnp.asarray(temperature, logits.dtype)
        drawn = jax.random.categorical(key, logits / jnp.where(warm > 0, warm, 1))
        token = jnp.where(warm > 0, drawn, jnp.argmax(logits))
        return model.step(params, state, token), token

    logits, state = model(params, prompt)
    return jax.lax.scan(body, (state, logits[-1]), jax.random.split(key, length))[1]
