"""Dropout, zoneout and the random masks of the regularizers inside the recurrence.

Masks are drawn before the recurrence runs and are passed to it as arrays, so that every backend sees the same masks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlstm.params import State


class RegularizerRates(NamedTuple):
    """Rates of the regularizers inside the recurrence, in [0, 1)."""

    recurrent_dropout: float = 0.0  # of candidates (Semeniuta et al. 2016)
    zoneout_h: float = 0.0  # of units of h that keep their old value (Krueger et al. 2017)
    zoneout_c: float = 0.0  # of units of c that keep their old value


class RegularizerMasks(NamedTuple):
    """Masks of the regularizers inside the recurrence; None for a regularizer that is off or without a key.

    A whole layer has masks ``(D, T, *batch, .)``; a backend receives one direction, and a step one step of it.
    """

    candidate_mask: Array | None = None  # (H,) bool: the candidate is dropped where False
    zoneout_mask_h: Array | None = None  # (P,) bool: h keeps its old value where True
    zoneout_mask_c: Array | None = None  # (H,) bool: c keeps its old value where True


def regularizer_key(key: Array | None, layer: int, regularizer: int) -> Array | None:
    """Derives the key of one regularizer of one layer; None without a key."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, layer), regularizer)


def draw_masks(
    key: Array | None, rates: RegularizerRates, directions: int, xs: Array, h: int, c: int | None
) -> RegularizerMasks:
    """Draws the masks of one layer.

    Args:
      key: PRNG key; without one there are no masks.
      rates: the rates.
      directions: number of directions.
      xs: ``(T, *batch, I)``, inputs of the layer.
      h: size of h.
      c: size of c; None for a cell without cell state.
    """
    if key is None:
        return RegularizerMasks()
    leading, sharding = (directions, *xs.shape[:-1]), explicit_sharding(xs)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(None, *sharding.spec[:-1], None))

    def mask(n: int, share: float, size: int | None) -> Array | None:
        if share == 0.0 or size is None:
            return None
        return jax.random.bernoulli(jax.random.fold_in(key, n), share, (*leading, size), out_sharding=sharding)

    candidate_mask = None if rates.recurrent_dropout == 0.0 else mask(0, 1 - rates.recurrent_dropout, c)
    return RegularizerMasks(candidate_mask, mask(1, rates.zoneout_h, h), mask(2, rates.zoneout_c, c))


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Returns how ``x`` is divided over Explicit mesh axes, as a mask for it must be; None if it is not."""
    sharding = jax.typeof(x).sharding
    return sharding if any(axis is not None for axis in sharding.spec) else None


def apply_zoneout(rates: RegularizerRates, masks: RegularizerMasks, new: State, old: State) -> State:
    """Returns the state after a step with zoneout: by the masks, or without masks the expectation over them."""
    h = _mix(rates.zoneout_h, masks.zoneout_mask_h, new.h, old.h)
    if rates.zoneout_c == 0.0:
        return State(h, new.c)
    return State(h, _mix(rates.zoneout_c, masks.zoneout_mask_c, new.c, old.c))


def _mix(rate: float, mask: Array | None, new: Array, old: Array) -> Array:
    if rate == 0.0:
        return new
    return (1 - rate) * new + rate * old if mask is None else jnp.where(mask, old, new)


def dropout_mask(
    key: Array, rate: float, shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None = None
) -> Array:
    """Draws zeros with probability ``rate``, else ``1 / (1 - rate)``, to preserve the mean (Srivastava et al. 2014).

    Args:
      key: PRNG key.
      rate: probability of a zero, in [0, 1).
      shape: shape of the mask.
      dtype: dtype of the mask.
      sharding: explicit sharding of the mask.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, shape, out_sharding=sharding)
    return jnp.where(keep, jnp.asarray(1.0 / (1.0 - rate), dtype), jnp.zeros((), dtype))


def dropout(key: Array | None, rate: float, x: Array, *, over_time: bool = True) -> Array:
    """Drops elements of ``x (T, ...)`` at ``rate`` and scales up the others; identity without a key or at rate 0.

    With ``over_time=False`` all steps share one mask (Gal & Ghahramani 2016).
    """
    if key is None or rate == 0.0:
        return x
    shape, sharding = x.shape, explicit_sharding(x)
    if not over_time:
        shape = (1, *shape[1:])
        sharding = None if sharding is None else sharding.update(spec=PartitionSpec(None, *sharding.spec[1:]))
    mask = dropout_mask(key, rate, shape, x.dtype, sharding)
    return x * jnp.broadcast_to(mask, x.shape)
