"""A language model: embedding, LSTM, softmax; its loss, its measure, and what it writes."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import activation_regularization
from jaxlstm.dropout import dropout, dropout_mask
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, State, accumulation_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.training.data.text import Window, evaluation_windows


class LanguageModelParams(NamedTuple):
    """The trained arrays of a `LanguageModel`; V is the vocabulary size, E the embedding size."""

    embedding: Array  # (V, E)
    lstm: Params
    w_out: Array | None  # (V, P); None where it is tied to the embedding
    b_out: Array  # (V,)


@dataclass(frozen=True)
class LanguageModel:
    """The next token's logits from all tokens before it.

    Args:
      vocabulary_size: V.
      lstm: the recurrent network; its input size is the embedding size E. It runs in one direction.
      dropout: rate at which the LSTM's outputs are dropped before the softmax when ``key`` is given; by one mask for
        the whole sequence if the LSTM is ``variational``.
      tied: whether the softmax has the embedding for its weights (Press & Wolf 2017; Inan et al. 2017). E is then P.
      embedding_dropout: share of the vocabulary whose embedding is dropped when ``key`` is given: a token is or is not,
        wherever it stands (Gal & Ghahramani 2016; Merity, Keskar & Socher 2018). The softmax's weights stay whole.

    Raises:
      ValueError: if E and P differ and are to be tied.
    """

    vocabulary_size: int
    lstm: LSTM
    dropout: float = 0.0
    tied: bool = False
    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        e, p = self.lstm.input_size, self.lstm.output_size
        if self.tied and e != p:
            raise ValueError(f"tied weights need an embedding of the size of the LSTM's outputs, got {e} and {p}")

    def init(self, key: Array) -> LanguageModelParams:
        """Embedding standard normal, softmax weights uniform in ±1/sqrt(P), its bias zero; tied, both uniform."""
        k_embedding, k_lstm, k_out = jax.random.split(key, 3)
        dtype, v, p = self.lstm.param_dtype, self.vocabulary_size, self.lstm.output_size
        w_out = jax.random.uniform(k_out, (v, p), dtype, -(p**-0.5), p**-0.5)
        return LanguageModelParams(
            embedding=w_out if self.tied else jax.random.normal(k_embedding, (v, self.lstm.input_size), dtype),
            lstm=self.lstm.init(k_lstm),
            w_out=None if self.tied else w_out,
            b_out=jnp.zeros(v, dtype),
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
        _, dropped, state = self.outputs(params, tokens, state, resets=resets, key=key)
        return self.logits(params, dropped), state

    def inputs(
        self, params: LanguageModelParams, tokens: Int[ArrayLike, "*batch"], key: Array | None = None
    ) -> Float[Array, "*batch E"]:
        """What the LSTM reads: the tokens' embeddings, some dropped with a ``key``."""
        tokens = jnp.asarray(tokens)
        xs = params.embedding[tokens]
        if key is None or self.embedding_dropout == 0.0:
            return xs
        return xs * dropout_mask(key, self.embedding_dropout, (self.vocabulary_size, 1), xs.dtype)[tokens]

    def outputs(
        self,
        params: LanguageModelParams,
        tokens: Int[ArrayLike, "T *batch"],
        state: State | None = None,
        *,
        resets: Bool[ArrayLike, "T *batch"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "T *batch P"], Float[Array, "T *batch P"], State]:
        """The LSTM's outputs as they are and as `logits` wants them, dropped with a ``key``; and the state."""
        k_lstm, k_out, k_in = (None, None, None) if key is None else jax.random.split(key, 3)
        xs = self.inputs(params, tokens, k_in)
        ys, state = self.lstm(params.lstm, xs, state, resets=resets, key=k_lstm)
        return ys, dropout(k_out, self.dropout, ys, over_time=not self.lstm.variational), state

    def step(
        self, params: LanguageModelParams, state: State, token: Int[ArrayLike, "*batch"]
    ) -> tuple[State, Float[Array, "*batch V"]]:
        """The state and the logits after one more token."""
        state, y = self.lstm.step(params.lstm, state, params.embedding[jnp.asarray(token)])
        return state, self.logits(params, y)

    def logits(self, params: LanguageModelParams, ys: Float[Array, "*batch P"]) -> Float[Array, "*batch V"]:
        """The softmax's logits, in float32 or wider."""
        w_out = params.embedding if params.w_out is None else params.w_out
        sums = accumulation_dtype(w_out.dtype)
        logits = matvec(w_out, ys, ys.dtype, sums)
        return logits + jnp.broadcast_to(params.b_out.astype(sums), logits.shape)


def carried(carry: State, window: Window) -> State:
    """The state that a window goes on from: that after the window before it, or zeros where the streams begin."""
    return jax.tree.map(lambda a: jnp.where(window.first, 0, a), carry)


def training_loss(model: LanguageModel, *, activation: float = 0.0, temporal_activation: float = 0.0) -> Any:
    """The loss of a window of truncated backpropagation through time, for `jaxlstm.training.make_step`.

    Args:
      model: the model.
      activation: weight of `jaxlstm.activation_regularization.activation`, of the dropped outputs.
      temporal_activation: weight of `jaxlstm.activation_regularization.temporal_activation`, of the outputs before they
        are dropped.

    Returns:
      ``loss(params, carry, window, key) -> (total, (nats, carry))``; ``nats`` per token, without the weighted terms.
      Where the window's streams begin, the carried state is dropped.
    """

    def loss(params: Any, carry: State, window: Window, key: Array) -> tuple[Array, tuple[Array, State]]:
        inputs, targets = (jnp.asarray(ids, jnp.int32) for ids in window[:2])
        ys, dropped, carry = model.outputs(params, inputs, carried(carry, window), key=key)
        logits = model.logits(params, dropped)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        total = nats
        if activation:
            total += activation * activation_regularization.activation(dropped)
        if temporal_activation:
            total += temporal_activation * activation_regularization.temporal_activation(ys)
        return total, (nats, carry)

    return loss


@partial(jax.jit, static_argnums=0)
def _score(
    model: LanguageModel,
    params: LanguageModelParams,
    state: State,
    inputs: Int[ArrayLike, "T B"],
    targets: Int[ArrayLike, "T B"],
    counted: Bool[ArrayLike, "T B"],
    resets: Bool[ArrayLike, "T B"],
) -> tuple[Float[Array, ""], State]:
    logits, state = model(params, inputs, state, resets=resets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(counted, losses, 0).sum(), state


def evaluate(
    model: LanguageModel, params: LanguageModelParams, ids: np.ndarray, *, batch: int = 32, window: int = 128
) -> float:
    """Loss in nats per token over all of ``ids`` but the first, each predicted once; see `evaluation_windows`."""
    state = model.lstm.initial_state((batch,), params.lstm)
    total = 0.0
    for part in evaluation_windows(ids, batch, window):
        nats, state = _score(model, params, state, *part)
        total += float(nats)
    return total / (len(ids) - 1)


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
