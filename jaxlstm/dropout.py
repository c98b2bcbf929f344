"""Random masks as data: drawn first, used later, so that every implementation sees the same ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxlstm.params import Size, State


class RegularizerRates(NamedTuple):
    """RegularizerRates of the regularisers inside the recurrence, in [0, 1)."""

    recurrent_dropout: float = 0.0  # share of candidates dropped (Semeniuta et al. 2016)
    zoneout_h: float = 0.0  # share of h that stays as it was (zoneout, Krueger et al. 2017)
    zoneout_c: float = 0.0  # the same of c


class RegularizerMasks(NamedTuple):
    """Masks of the regularisers inside the recurrence; None for one that is off, or for a call without a key.

    Those of a layer are ``(D, T, *batch, .)``; inside an implementation the leading axes go one by one.
    """

    candidate_mask: Array | None = None  # (H,) bool: where False the candidate is dropped
    zoneout_mask_h: Array | None = None  # (P,) bool: where True h stays as it was
    zoneout_mask_c: Array | None = None  # (H,) bool: where True c stays as it was


def draw_masks(
    key: Array | None, rates: RegularizerRates, leading: tuple[Size, ...], h: int, c: int | None
) -> RegularizerMasks:
    """The masks of one layer; ``leading`` is ``(D, T, *batch)``, ``h`` and ``c`` the sizes of the state."""
    if key is None:
        return RegularizerMasks()

    def mask(n: int, share: float, size: int | None) -> Array | None:
        if share == 0.0 or size is None:
            return None
        return jax.random.bernoulli(jax.random.fold_in(key, n), share, (*leading, size))

    kept = None if rates.recurrent_dropout == 0.0 else mask(0, 1 - rates.recurrent_dropout, c)
    return RegularizerMasks(kept, mask(1, rates.zoneout_h, h), mask(2, rates.zoneout_c, c))


def apply_zoneout(rates: RegularizerRates, noise: RegularizerMasks, after: State, before: State) -> State:
    """The state after a step, with some of it as it was before: by the masks, or without them by expectation."""

    def mix(rate: float, held: Array | None, new: Array | None, old: Array | None) -> Array | None:
        if rate == 0.0 or new is None or old is None:
            return new
        return (1 - rate) * new + rate * old if held is None else jnp.where(held, old, new)

    return State(
        mix(rates.zoneout_h, noise.zoneout_mask_h, after.h, before.h),  # pyright: ignore[reportArgumentType]
        mix(rates.zoneout_c, noise.zoneout_mask_c, after.c, before.c),
    )


def dropout_mask(key: Array, rate: float, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zeros with probability ``rate``, else ``1 / (1 - rate)``: multiplying by it keeps the mean (Srivastava 2014).

    Args:
      key: PRNG key.
      rate: share of elements dropped, in [0, 1).
      shape: of the mask.
      dtype: of the mask.
    """
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, jnp.asarray(1.0 / (1.0 - rate), dtype), jnp.zeros((), dtype))


def dropout(key: Array | None, rate: float, x: Array, *, over_time: bool = True) -> Array:
    """``x`` with each element dropped at ``rate`` and the rest scaled up; ``x`` itself without a key or at rate 0.

    Without ``over_time`` one mask serves all of the leading axis, which is time (Gal & Ghahramani 2016).
    """
    if key is None or rate == 0.0:
        return x
    mask = dropout_mask(key, rate, x.shape if over_time else (1, *x.shape[1:]), x.dtype)
    return x * jnp.broadcast_to(mask, x.shape)
