"""A language model: embedding, LSTM and softmax, with its loss, evaluation and sampling."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import activation_regularization
from jaxlstm.dropout import dropout, dropout_mask
from jaxlstm.params import Params, State, accumulation_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.rnn import RNN
from jaxlstm.training.data.text import Window, evaluation_windows
from jaxlstm.training.train_step import Loss


class LanguageModelParams(NamedTuple):
    """The parameters of a `LanguageModel`; V is the vocabulary size, E the embedding size, P the LSTM's output size."""

    embedding: Array  # (V, E)
    lstm: Params
    w_out: Array | None  # (V, P); None if tied to the embedding
    b_out: Array  # (V,)


@dataclass(frozen=True)
class LanguageModel:
    """A model of the next token given all tokens before it.

    Args:
      vocabulary_size: V.
      lstm: the recurrent network, in one direction; its input size is the embedding size E.
      dropout: dropout rate of the LSTM's outputs before the softmax, applied when ``key`` is given.
      tied: whether the softmax weights are the embedding (Press & Wolf 2017; Inan et al. 2017). E must equal P.
      embedding_dropout: share of the vocabulary whose embedding is dropped when ``key`` is given, at every position of
        the token (Gal & Ghahramani 2016; Merity, Keskar & Socher 2018). Tied softmax weights are not dropped.
      variational: whether ``dropout`` has one mask for all steps.

    Raises:
      ValueError: if E and P differ and the weights are tied.
    """

    vocabulary_size: int
    lstm: RNN
    dropout: float = 0.0
    tied: bool = False
    embedding_dropout: float = 0.0
    variational: bool = False

    def __post_init__(self) -> None:
        e, p = self.lstm.input_size, self.lstm.output_size
        if self.tied and e != p:
            raise ValueError(f"tied weights need an embedding of the size of the LSTM's outputs, got {e} and {p}")

    def init(self, key: Array) -> LanguageModelParams:
        """Draws the embedding from the standard normal and the softmax weights uniformly from ±1/sqrt(P).

        Tied weights are drawn as softmax weights. The bias is zero.
        """
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
        """Returns the logits of the token after each of ``tokens``, and the final state; ``key`` turns dropout on."""
        _, dropped, state = self.outputs(params, tokens, state, resets=resets, key=key)
        return self.logits(params, dropped), state

    def embed(
        self, params: LanguageModelParams, tokens: Int[ArrayLike, "*batch"], key: Array | None = None
    ) -> Float[Array, "*batch E"]:
        """Returns the embeddings of ``tokens``, the inputs of the LSTM; ``key`` turns embedding dropout on."""
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
        """Returns the LSTM's outputs before and after output dropout, and the final state."""
        k_lstm, k_out, k_in = (None, None, None) if key is None else jax.random.split(key, 3)
        xs = self.embed(params, tokens, k_in)
        ys, state = self.lstm(params.lstm, xs, state, resets=resets, key=k_lstm)
        return ys, dropout(k_out, self.dropout, ys, over_time=not self.variational), state

    def step(
        self, params: LanguageModelParams, state: State, token: Int[ArrayLike, "*batch"]
    ) -> tuple[State, Float[Array, "*batch V"]]:
        """Returns the state and the logits after one more token."""
        state, y = self.lstm.step(params.lstm, state, params.embedding[jnp.asarray(token)])
        return state, self.logits(params, y)

    def logits(self, params: LanguageModelParams, ys: Float[Array, "*batch P"]) -> Float[Array, "*batch V"]:
        """Returns the softmax logits, in float32 or wider."""
        w_out = params.embedding if params.w_out is None else params.w_out
        accum_dtype = accumulation_dtype(w_out.dtype)
        logits = matvec(w_out, ys, ys.dtype, accum_dtype)
        return logits + jnp.broadcast_to(params.b_out.astype(accum_dtype), logits.shape)


def restart_carry(model: LanguageModel, params: LanguageModelParams, carry: State, window: Window) -> State:
    """Returns the state that a window starts from: the initial one if its streams restart, else the carried one."""
    initial = model.lstm.initial_state(window.inputs.shape[1:], params.lstm)
    return jax.tree.map(lambda first, carried: jnp.where(window.restart, first, carried), initial, carry)


def training_loss(model: LanguageModel, *, activation: float = 0.0, temporal_activation: float = 0.0) -> Loss:
    """Returns the loss of one window of truncated backpropagation through time.

    Args:
      model: the model.
      activation: weight of `jaxlstm.activation_regularization.activation`, applied to the outputs after dropout.
      temporal_activation: weight of `jaxlstm.activation_regularization.temporal_activation`, applied to the outputs
        before dropout.

    Returns:
      ``loss(params, carry, window, key) -> (total, (nats, carry))``; ``nats`` is the cross-entropy per token without
      the weighted terms. The carried state is dropped if the window's streams restart.
    """

    def loss(
        params: LanguageModelParams, carry: State, window: Window, key: Array
    ) -> tuple[Array, tuple[Array, State]]:
        inputs, targets = (jnp.asarray(ids, jnp.int32) for ids in (window.inputs, window.targets))
        ys, dropped, carry = model.outputs(params, inputs, restart_carry(model, params, carry, window), key=key)
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
def _sum_losses(
    model: LanguageModel,
    params: LanguageModelParams,
    state: State,
    inputs: Int[ArrayLike, "T B"],
    targets: Int[ArrayLike, "T B"],
    loss_mask: Bool[ArrayLike, "T B"],
    resets: Bool[ArrayLike, "T B"],
) -> tuple[Float[Array, ""], State]:
    """Returns the summed loss of an `EvaluationWindow` in nats, and the final state."""
    logits, state = model(params, inputs, state, resets=resets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(loss_mask, losses, 0).sum(), state


def evaluate(
    model: LanguageModel, params: LanguageModelParams, ids: np.ndarray, *, batch_size: int = 32, window: int = 128
) -> float:
    """Returns the loss in nats per token over all of ``ids`` but the first; see `evaluation_windows`."""
    state = model.lstm.initial_state((batch_size,), params.lstm)
    total = 0.0
    for batch in evaluation_windows(ids, batch_size, window):
        nats, state = _sum_losses(model, params, state, *batch)
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
    """Samples tokens one at a time, each from the softmax given all tokens before it.

    Args:
      model: the model.
      params: its parameters.
      prompt: at least one token to condition on; not part of the result.
      length: number of tokens to sample.
      key: PRNG key.
      temperature: divides the logits; 0 takes the most likely token.
    """

    def sample_token(carry: tuple[State, Array], key: Array) -> tuple[tuple[State, Array], Array]:
        state, logits = carry
        t = jnp.asarray(temperature, logits.dtype)
        sampled = jax.random.categorical(key, logits / jnp.where(t > 0, t, 1))
        token = jnp.where(t > 0, sampled, jnp.argmax(logits))
        return model.step(params, state, token), token

    logits, state = model(params, prompt)
    return jax.lax.scan(sample_token, (state, logits[-1]), jax.random.split(key, length))[1]
