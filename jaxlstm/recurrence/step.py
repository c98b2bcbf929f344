"""One step of a layer: the matrix products around a cell's gates, normalization and regularizers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import Norm, State, Weights
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.recurrence.gates import Activate as Activate
from jaxlstm.recurrence.gates import evaluate_cell

EPSILON = 1e-5  # added to the variance in layer normalization


class ElementwiseWeights(NamedTuple):
    """The weights that the elementwise part of a step reads."""

    b: Array | None  # (G*H,), bias added after layer normalization; None without it
    w_c: Array | None  # (K, H), peepholes
    norm: Norm | None


def elementwise_weights(weights: Weights) -> ElementwiseWeights:
    """Returns the weights that `apply_gates` reads."""
    return ElementwiseWeights(None if weights.norm is None else weights.b, weights.w_c, weights.norm)


def project_inputs(
    weights: Weights, x: Float[Array, "*batch I"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch GH"]:
    """Returns ``W_x x + b`` in ``accum_dtype``, the part of ``z`` that does not depend on the previous step.

    With layer normalization it is ``W_x x`` alone: the bias is added after the normalization.
    """
    z = matvec(weights.w_x, x, dtype, accum_dtype)
    if weights.b is None or weights.norm is not None:
        return z
    return z + jnp.broadcast_to(weights.b.astype(accum_dtype), z.shape)


def recurrent_step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch GH"],
    state: State,
    dtype: DTypeLike,
    rates: RegularizerRates,
    masks: RegularizerMasks,
    mesh_axis: str | None = None,
) -> State:
    """Takes one step, from the projected inputs and the state to the new state.

    Args:
      cell: the cell.
      weights: weights of one direction of a layer.
      z_x: from `project_inputs`.
      state: h ``(*batch, P)`` and c ``(*batch, H)``.
      dtype: of the operands of matrix products.
      rates: rates of the regularizers.
      masks: masks of this step, ``(*batch, .)``.
      mesh_axis: mesh axis over which the units are sharded; None if each device has all units.
    """
    h = state.h
    if mesh_axis is not None and weights.w_p is None:
        h = lax.all_gather(h.astype(dtype), mesh_axis, axis=h.ndim - 1, tiled=True)  # the exchange of a step
    z_h = matvec(weights.w_h, h, dtype, z_x.dtype)
    z, z_h = (z_x + z_h, None) if weights.norm is None else (z_x, z_h)
    return finish_step(cell, weights, z, z_h, state, dtype, rates, masks, mesh_axis)


def finish_step(
    cell: Cell,
    weights: Weights,
    z: Float[Array, "*batch GH"],
    z_h: Float[Array, "*batch GH"] | None,
    state: State,
    dtype: DTypeLike,
    rates: RegularizerRates,
    masks: RegularizerMasks,
    mesh_axis: str | None = None,
) -> State:
    """Takes the rest of a step, from the pre-activations and the state to the new state; arguments as `recurrent_step`.

    ``z`` and ``z_h`` are the two arrays of `apply_gates`, with the gates still in the last axis.
    """
    z, z_h = split_gates(z, cell.num_gates, -1), None if z_h is None else split_gates(z_h, cell.num_gates, -1)
    c, h = apply_gates(
        cell, weights, z, z_h, state.c, masks.candidate_mask, rates, axis=z.ndim - 2, mesh_axis=mesh_axis
    )
    if weights.w_p is not None:
        h = matvec(weights.w_p, h, dtype, z.dtype)
        h = h if mesh_axis is None else lax.psum(h, mesh_axis)  # the exchange of a step with a projection
    return apply_zoneout(rates, masks, State(h, c), state)


def split_gates(z: Array, num_gates: int, axis: int) -> Array:
    """Moves the gates to a leading axis: from ``(..., G*H, ...)`` to ``(G, ..., H, ...)``."""
    axis %= z.ndim
    shape = [*z.shape[:axis], num_gates, z.shape[axis] // num_gates, *z.shape[axis + 1 :]]
    return jnp.moveaxis(z.reshape(shape), axis, 0)


def apply_gates(
    cell: Cell,
    weights: Weights | ElementwiseWeights,
    z: Float[Array, "G *units"],
    z_h: Float[Array, "G *units"] | None,
    c: Float[Array, "*units"] | None,
    candidate_mask: Bool[Array, "*units"] | None,
    rates: RegularizerRates,
    axis: int,
    mesh_axis: str | None = None,
    activate: Activate | None = None,
) -> tuple[Array | None, Array]:
    """Computes the elementwise part of a step: from pre-activations to the new cell state and the cell's output.

    Args:
      cell: the cell.
      weights: all weights, or the result of `elementwise_weights`.
      z: ``W_x x + W_h h + b``; with layer normalization ``W_x x``.
      z_h: ``W_h h`` with layer normalization, else None.
      c: the cell state.
      candidate_mask: False where recurrent dropout drops the candidate; None if it drops none.
      rates: rates of the regularizers.
      axis: the axis of the units in ``c``.
      mesh_axis: mesh axis over which the units are sharded; None if each device has all units.
      activate: replaces `jaxlstm.recurrence.gates.activate`.
    """

    def per_unit(v: Float[Array, "*rows H"]) -> Array:
        """Adds axes of size 1 for the batch."""
        units = [1] * (z.ndim - 1)
        units[axis] = v.shape[-1]
        return v.astype(z.dtype).reshape(*v.shape[:-1], *units)

    options: dict[str, Any] = {}
    norm = weights.norm
    if norm is not None and z_h is not None:
        gain_x, gain_h = (per_unit(gain.reshape(cell.num_gates, -1)) for gain in (norm.x, norm.h))
        axes = (0, axis + 1)
        z = _normalize(z, axes, mesh_axis) * gain_x + _normalize(z_h, axes, mesh_axis) * gain_h
        if weights.b is not None:
            z = z + per_unit(weights.b.reshape(cell.num_gates, -1))
        gain_c, shift_c = norm.c, norm.b_c
        if gain_c is not None:

            def normalize_c(c: Array) -> Array:
                c = _normalize(c, (axis,), mesh_axis) * per_unit(gain_c)
                return c if shift_c is None else c + per_unit(shift_c)

            options["normalize"] = normalize_c
    if candidate_mask is not None:
        options["candidate_scale"] = candidate_scale(candidate_mask, rates, z.dtype)
    if weights.w_c is not None:
        options["peepholes"] = per_unit(weights.w_c)
    if activate is not None:
        options["activate"] = activate
    return evaluate_cell(cell, z, c, **options)


def candidate_scale(
    candidate_mask: Bool[Array, "*units"], rates: RegularizerRates, dtype: DTypeLike
) -> Float[Array, "*units"]:
    """Returns the factor of the candidate in recurrent dropout, with mean 1."""
    return jnp.where(candidate_mask, jnp.asarray(1 / (1 - rates.recurrent_dropout), dtype), 0)


def _normalize(x: Array, axes: tuple[int, ...], mesh_axis: str | None) -> Array:
    """Shifts and scales to mean 0 and variance 1 over ``axes``: over all gates of a layer at once (Ba et al. 2016)."""

    def mean(x: Array) -> Array:
        local = x.mean(axes, keepdims=True)
        return local if mesh_axis is None else lax.pmean(local, mesh_axis)

    x = x - mean(x)
    return x * lax.rsqrt(mean(x * x) + EPSILON)
