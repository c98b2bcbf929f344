"""The alphabet: the letters of every shape in this package, the recurrent state and the parameters.

| letter | meaning                                                            |
| ------ | ------------------------------------------------------------------ |
| T      | time steps, always the leading axis                                |
| B      | batch; ``*batch`` is any number of batch axes, none included       |
| I      | input size                                                         |
| H      | hidden size                                                        |
| P      | output size of a step: the projection size if there is one, else H |
| G      | gates of a cell: 4 for the LSTM, in the order i, f, g, o           |
| L, D   | layers, directions (1 or 2)                                        |
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Size = Any  # of an axis: an int, or a symbol while `jax.export` makes a program for any size


class State(NamedTuple):
    """What an LSTM remembers between two steps.

    The leading axis counts layers and directions in PyTorch's order: layer 0 forward, layer 0 backward, layer 1
    forward, and so on.
    """

    h: Array  # (L*D, *batch, P), the output of the last step taken
    c: Array | None  # (L*D, *batch, H), the cell state; None for a cell that has none


class Norm(NamedTuple):
    """Gains of a layer-normalised cell, and the shift of its cell state; that of z is the bias of `Weights`."""

    x: Array  # (G*H,), of W_x x
    h: Array  # (G*H,), of W_h h
    c: Array | None = None  # (H,), of the cell state; None for a cell that has none
    b_c: Array | None = None  # (H,), added to the normalised cell state; None without bias


class Weights(NamedTuple):
    """The trained arrays of one layer in one direction; gates are stacked in the order i, f, g, o."""

    w_x: Array  # (G*H, I), from the input
    w_h: Array  # (G*H, P), from the step before
    b: Array | None = None  # (G*H,); None without bias
    w_p: Array | None = None  # (P, H), the projection; None without one
    w_c: Array | None = None  # (K, H), peepholes, one row for each gate that sees the cell state; None without
    norm: Norm | None = None  # of layer normalisation; None without


class Layer(NamedTuple):
    """The two directions of one layer."""

    forward: Weights
    backward: Weights | None = None  # None where the layer runs in one direction

    @property
    def directions(self) -> tuple[Weights, ...]:
        """The weights of the directions there are, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


class Params(NamedTuple):
    """All trained arrays of an `LSTM`, lowest layer first."""

    layers: tuple[Layer, ...]
    state: State | None = None  # h (L*D, P) and c (L*D, H) where the initial state is learned


def output_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> jnp.dtype:
    """The dtype of matrix products and outputs: ``dtype``, or that of the parameters where it is None."""
    return jnp.dtype(param_dtype if dtype is None else dtype)


def state_dtype(dtype: DTypeLike | None, param_dtype: DTypeLike) -> jnp.dtype:
    """The dtype of the state, the gates and all sums: float32 or wider, whatever the products are taken in."""
    return accumulation_dtype(output_dtype(dtype, param_dtype), param_dtype)


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The widest of float32 and the given floating-point dtypes, whatever JAX's mode of promotion."""
    return max((jnp.dtype(d) for d in (jnp.float32, *dtypes)), key=lambda dtype: dtype.itemsize)
