"""What an implementation is told besides the layer, its inputs and its state."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxlstm.dropout import RegularizerMasks, RegularizerRates
from jaxlstm.params import State


class How(NamedTuple):
    """Arrays are None where there is nothing of their kind."""

    mask: Array | None  # (T, B) bool: steps taken
    resets: Array | None  # (T, B) bool: first steps of a new sequence
    start: State | None  # h (D, P) and c (D, H) from which a sequence starts at a reset; None for zeros
    noise: RegularizerMasks  # (D, T, B, .)
    rates: RegularizerRates
    reverse: bool  # whether the forward direction runs backward in time, and the backward one forward
    dtype: jnp.dtype  # of products and outputs
    unroll: int  # steps per iteration of the compiled loop
    remat: int | None  # steps per rematerialised chunk
    lengths: Array | None = None  # (B,) int: steps taken of each row, where the mask is a prefix; else None
