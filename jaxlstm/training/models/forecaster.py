"""Quantile forecasts: an encoder reads the history, and a decoder starts from its state and reads the known future."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.dropout import dropout
from jaxlstm.params import Params, accumulation_dtype
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.rnn import RNN


class Batch(NamedTuple):
    """Histories of B series, T steps long, and the H steps after them, in normalized units."""

    values: np.ndarray  # (T, B, F) float32: targets up to the forecast; in a gap, the last number before it
    filled: np.ndarray  # (T, B, F) bool: True in gaps
    exists: np.ndarray  # (T, B) bool: False before the first step of a series
    past: np.ndarray  # (T, B, C) float32: covariates and calendar
    future: np.ndarray  # (H, B, C) float32: the same after the history
    season_ago: np.ndarray  # (H, B, F) float32: the last season of the history, repeated
    targets: np.ndarray  # (H, B, F) float32
    scored: np.ndarray  # (H, B, F) bool: False for targets in gaps
    static: np.ndarray  # (1, B, S) float32


class ForecasterParams(NamedTuple):
    """The parameters of a `Forecaster`; P is the output size of a step of the LSTM."""

    lstm: Params  # of the encoder
    decoder: Params
    w_out: Array  # (F * Q, P + F)
    b_out: Array  # (F * Q,)


@dataclass(frozen=True)
class Forecaster:
    """Quantiles of each target at each step after the history.

    The encoder reads the targets with a mark for each gap, the covariates and the calendar of the history. Its final
    state starts the decoder, which reads the covariates and the calendar of the steps to forecast, the targets a season
    before them and the fraction of the horizon. A linear layer on its outputs and on the targets a season before gives
    the quantile nearest to the median and the gaps between the quantiles: `quantiles_from_gaps`.

    Args:
      lstm: the encoder. If it reads static features, so does the decoder.
      num_targets: F.
      quantiles: Q probabilities, ascending.
      dropout: dropout rate of the decoder's outputs, applied when ``key`` is given.
    """

    lstm: RNN
    num_targets: int
    quantiles: tuple[float, ...]
    dropout: float = 0.0

    @property
    def decoder(self) -> RNN:
        """The network of the decoder: like the encoder, without the marks of gaps, with the fraction of the horizon."""
        return replace(self.lstm, input_size=self.lstm.input_size - self.num_targets + 1)

    @property
    def anchor(self) -> int:
        """Index of the quantile nearest to the median."""
        return int(np.argmin(np.abs(np.array(self.quantiles) - 0.5)))

    def with_lstm(self, lstm: RNN) -> "Forecaster":
        """Returns the model with another backend for encoder and decoder; parameters stay the same."""
        return replace(self, lstm=lstm)

    def init(self, key: Array) -> ForecasterParams:
        """Draws the linear layer's weights uniformly from ±1/sqrt of its input size; its bias is zero."""
        k_encoder, k_decoder, k_out = jax.random.split(key, 3)
        dtype, size = self.lstm.param_dtype, self.lstm.output_size + self.num_targets
        outputs = self.num_targets * len(self.quantiles)
        return ForecasterParams(
            lstm=self.lstm.init(k_encoder),
            decoder=self.decoder.init(k_decoder),
            w_out=jax.random.uniform(k_out, (outputs, size), dtype, -(size**-0.5), size**-0.5),
            b_out=jnp.zeros(outputs, dtype),
        )

    def __call__(self, params: ForecasterParams, batch: Batch, *, key: Array | None = None) -> Array:
        """Returns normalized quantiles ``(H, B, F, Q)``, ascending along the last axis, in float32 or wider.

        Args:
          params: parameters from `init`.
          batch: histories and known futures; targets are not read.
          key: turns dropout on.
        """
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        mask, static = jnp.asarray(batch.exists), self.static(batch)
        _, state = self.lstm(params.lstm, self.encoder_inputs(batch), mask=mask, key=keys[0], static=static)
        xs = self.decoder_inputs(batch)
        ys, _ = self.decoder(params.decoder, xs, state, key=keys[1], static=static)
        ys = dropout(keys[2], self.dropout, ys)
        accum_dtype = accumulation_dtype(params.w_out.dtype)
        season_ago = jnp.asarray(batch.season_ago)
        outputs = matvec(params.w_out, jnp.concatenate([ys, season_ago.astype(ys.dtype)], -1), ys.dtype, accum_dtype)
        outputs = outputs + jnp.broadcast_to(params.b_out.astype(accum_dtype), outputs.shape)
        outputs = outputs.reshape(*outputs.shape[:-1], self.num_targets, len(self.quantiles))
        return quantiles_from_gaps(outputs, self.anchor)

    def encoder_inputs(self, batch: Batch) -> Array:
        """Returns the inputs of the encoder, ``(T, B, 2F + C)``."""
        return jnp.concatenate([batch.values, jnp.asarray(batch.filled, jnp.float32), batch.past], -1)

    def decoder_inputs(self, batch: Batch) -> Array:
        """Returns the inputs of the decoder, ``(H, B, F + C + 1)``."""
        horizon, batch_size, _ = batch.season_ago.shape
        fraction = (jnp.arange(horizon, dtype=jnp.float32) + 1) / horizon
        fraction = jnp.broadcast_to(fraction[:, None, None], (horizon, batch_size, 1))
        return jnp.concatenate([batch.season_ago, batch.future, fraction], -1)

    def static(self, batch: Batch) -> Array | None:
        """Returns the static features ``(B, S)``; None if the network reads none."""
        return None if self.lstm.static_size is None else jnp.asarray(batch.static)[0]


def quantiles_from_gaps(outputs: Array, anchor: int) -> Array:
    """Returns quantiles that never cross.

    The anchor is an output; the gap to the next quantile is the softplus of another output. Sums of numbers that are
    not negative never decrease, in floating point either.

    Args:
      outputs: ``(..., Q)``; the first one is the anchor, the others are the gaps in ascending order.
      anchor: index of the anchor among the quantiles.
    """
    gaps = jax.nn.softplus(outputs[..., 1:])
    sums = jnp.concatenate([jnp.zeros_like(outputs[..., :1]), jnp.cumsum(gaps, -1)], -1)
    return outputs[..., :1] + (sums - sums[..., anchor : anchor + 1])
