"""One step of a layer: the matrix products around a cell's gates, and what may be asked of them besides."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm.cells import Activated, Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import State, Weights
from jaxlstm.primitives.mixed_precision_dot import matvec

EPSILON = 1e-5  # added to the variance in layer normalisation


def input_part(weights: Weights, x: Float[Array, "*batch I"], dtype: DTypeLike, sums: DTypeLike) -> Array:
    """``W_x x + b``, the share of ``z`` that does not wait for the step before: ``(*batch, G*H)`` in ``sums``.

    With layer normalisation it is ``W_x x`` alone: the bias comes after it.
    """
    z = matvec(weights.w_x, x, dtype, sums)
    if weights.b is None or weights.norm is not None:
        return z
    return z + jnp.broadcast_to(weights.b.astype(sums), z.shape)


def step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch GH"],
    before: State,
    dtype: DTypeLike,
    rates: RegularizerRates,
    noise: RegularizerMasks,
) -> State:
    """One step, from `input_part` and the state before to the state after; products in ``dtype``.

    ``h (*batch, P)`` and ``c (*batch, H)``; ``noise`` is that of this step, ``(*batch, H)``.
    """
    z_h = matvec(weights.w_h, before.h, dtype, z_x.dtype)
    if weights.norm is None:
        z, z_h = slabs(z_x + z_h, cell.num_gates, -1), None
    else:
        z, z_h = slabs(z_x, cell.num_gates, -1), slabs(z_h, cell.num_gates, -1)
    c, m = advance(cell, weights, z, z_h, before.c, noise.candidate_mask, rates, axis=z_x.ndim - 1)
    h = m if weights.w_p is None else matvec(weights.w_p, m, dtype, z_x.dtype)
    return apply_zoneout(rates, noise, State(h, c), before)


def slabs(z: Array, gates: int, axis: int) -> Array:
    """Pre-activations with the gate axis in front: from ``(..., G*H, ...)`` to ``(G, ..., H, ...)``."""
    axis %= z.ndim
    shape = [*z.shape[:axis], gates, z.shape[axis] // gates, *z.shape[axis + 1 :]]
    return jnp.moveaxis(z.reshape(shape), axis, 0)


def advance(
    cell: Cell,
    weights: Weights,
    z: Float[Array, "G *units"],
    z_h: Float[Array, "G *units"] | None,
    c: Float[Array, "*units"] | None,
    kept: Bool[Array, "*units"] | None,
    rates: RegularizerRates,
    axis: int,
    across: str | None = None,
    activated: Activated | None = None,
) -> tuple[Array | None, Array]:
    """All of a step but its matrix products: from pre-activations to ``(c, m)``.

    Args:
      cell: the cell.
      weights: of which ``norm`` and ``w_c`` are used, and ``b`` if there is a ``norm``.
      z: ``W_x x + W_h h + b``; with layer normalisation ``W_x x``.
      z_h: ``W_h h`` with layer normalisation, else None.
      c: the cell state.
      kept: where the candidate is kept by recurrent dropout; None for everywhere.
      rates: of the regularisers.
      axis: of the units, counted in the shape of ``c``.
      across: axis of a mesh of devices that each hold some of the units; None where all are here.
      activated: for `jaxlstm.cells.activated`, in cells whose gates take it.
    """

    def per_unit(v: Float[Array, "*rows H"]) -> Array:
        """``v`` with axes of size 1 for the batch."""
        units = [1] * (z.ndim - 1)
        units[axis] = v.shape[-1]
        return v.astype(z.dtype).reshape(*v.shape[:-1], *units)

    def norm_c(c: Array) -> Array:
        c = _normal(c, (axis,), across) * per_unit(norm.c)
        return c if norm.b_c is None else c + per_unit(norm.b_c)

    options: dict[str, Any] = {}
    norm: Any = weights.norm
    if norm is not None and z_h is not None:
        gains = [per_unit(gain.reshape(cell.num_gates, -1)) for gain in (norm.x, norm.h)]
        z = _normal(z, (0, axis + 1), across) * gains[0] + _normal(z_h, (0, axis + 1), across) * gains[1]
        if weights.b is not None:
            z = z + per_unit(weights.b.reshape(cell.num_gates, -1))
        if cell.has_cell_state:
            options["norm"] = norm_c
    if kept is not None:
        options["keep"] = candidate_scale(kept, rates, z.dtype)
    if weights.w_c is not None:
        options["w"] = per_unit(weights.w_c)
    if activated is not None and cell.takes("activated"):
        options["activated"] = activated
    return cell.gates(z, c, **options)


def candidate_scale(kept: Bool[Array, "*units"], rates: RegularizerRates, dtype: DTypeLike) -> Float[Array, "*units"]:
    """What recurrent dropout multiplies the candidate by: such that its mean stays."""
    return jnp.where(kept, jnp.asarray(1 / (1 - rates.recurrent_dropout), dtype), 0)


def _normal(x: Array, axes: tuple[int, ...], across: str | None) -> Array:
    """Mean 0 and variance 1 over ``axes``: over all gates of a layer at once (Ba, Kiros & Hinton 2016)."""

    def mean(x: Array) -> Array:
        here = x.mean(axes, keepdims=True)
        return here if across is None else lax.pmean(here, across)

    x = x - mean(x)
    return x * lax.rsqrt(mean(x * x) + EPSILON)
