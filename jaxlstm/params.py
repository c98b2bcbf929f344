"""Shape letters, the recurrent state and the parameter types.

| letter | meaning                                                            |
| ------ | ------------------------------------------------------------------ |
| T      | time steps, always the leading axis                                |
| B      | batch; ``*batch`` is any number of batch axes, none included       |
| I      | input size                                                         |
| H      | hidden size                                                        |
| P      | output size of a step: the projection size if there is one, else H |
| G      | gates of a cell: 4 for the LSTM, in the order i, f, g, o           |
| L, D   | layers, directions (1 or 2)                                        |
| S      | size of the static features                                        |
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Size = Any  # size of an axis: an int, or a symbolic dimension under `jax.export`


class State(NamedTuple):
    """Recurrent state between two steps.

    The leading axis counts layers and directions in PyTorch's order: layer 0 forward, layer 0 backward, layer 1
    forward, and so on.
    """

    h: Array  # (L*D, *batch, P), hidden state: the output of the last step
    c: Any  # (L*D, *batch, H), cell state; None for a cell without one, a dict by name for a cell with several states


class Norm(NamedTuple):
    """Layer-normalization parameters of one layer in one direction. The shift of z is the bias of `Weights`."""

    x: Array  # (G*H,), gain of W_x x
    h: Array | None  # (G*H,), gain of W_h h; None without W_h
    c: Array | None = None  # (H,), gain of the cell state; None for a cell without one or with several states
    b_c: Array | None = None  # (H,), shift of the cell state; None without bias


class Weights(NamedTuple):
    """Parameters of one layer in one direction; gates are stacked in the order i, f, g, o.

    A matrix has rows for the gates that read its source: for most cells w_x and w_h have rows for all G gates.
    """

    w_x: Array  # (G*H, I), input weights
    w_h: Any  # (G*H, P), recurrent weights, (G*H, P/k) with k heads and (G*H, 1) if diagonal; None if no gate reads h
    b: Array | None = None  # (G*H,), bias; None without one
    w_p: Array | None = None  # (P, H), projection; None without one
    w_c: Array | None = None  # (K, H), peepholes, one row per gate that reads the cell state; None without them
    norm: Norm | None = None  # None without layer normalization
    w_s: Array | None = None  # (G*H, S), weights of the static features; None if no gate reads them


class Layer(NamedTuple):
    """Parameters of both directions of one layer."""

    forward: Weights
    backward: Weights | None = None  # None in a unidirectional network

    @property
    def directions(self) -> tuple[Weights, ...]:
        """The weights of each direction, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


class FeedForward(NamedTuple):
    """Parameters of the feed-forward part of a residual layer; F is its hidden size, W the width of the stream."""

    norm: Array  # (W,), gain of the normalization of its inputs
    w_up: Array  # (F, W)
    b_up: Array | None  # (F,); None without bias
    w_down: Array  # (W, F)
    b_down: Array | None  # (W,); None without bias


class ResidualBlock(NamedTuple):
    """Parameters of a layer of a `jaxlstm.ResidualStack` around its recurrence."""

    norm: Array  # (W,), gain of the normalization of the layer's inputs
    feed_forward: FeedForward | None = None  # None without a feed-forward part


class Residual(NamedTuple):
    """Parameters of a `jaxlstm.ResidualStack` around its recurrent layers; W is D*P."""

    w_in: Array | None  # (W, I), projection of the inputs; None if I is W
    blocks: tuple[ResidualBlock, ...]  # lowest layer first
    norm: Array  # (W,), gain of the normalization of the outputs


class Params(NamedTuple):
    """All parameters of a recurrent network, lowest layer first."""

    layers: tuple[Layer, ...]
    state: State | None = None  # learned initial state, h (L*D, P) and c (L*D, H); None if it is not learned
    residual: Residual | None = None  # of a `jaxlstm.ResidualStack`; None for other networks


def output_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of matrix products and outputs: ``dtype``, or ``param_dtype`` if it is None."""
    return jnp.dtype(param_dtype if dtype is None else dtype)


def state_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the state, the gates and all sums: float32 or wider, for any dtype of the products."""
    return accumulation_dtype(output_dtype(dtype, param_dtype), param_dtype)


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Returns the widest of float32 and the given floating-point dtypes, in every promotion mode of JAX."""
    return max((jnp.dtype(d) for d in (jnp.float32, *dtypes)), key=lambda dtype: dtype.itemsize)
