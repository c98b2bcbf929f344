"""One step of a layer: the matrix products around a cell's gates, normalization and regularizers."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from jaxlstm.cells import SOURCES, Cell
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


def hidden_size(cell: Cell, weights: Weights) -> int:
    """Returns H, the number of units."""
    return weights.w_x.shape[0] // len(cell.slabs_reading("x"))


def unsupported_form(
    cell: Cell, weights: Weights | None = None, *, several_states: bool = True, diagonal: bool = False
) -> str | None:
    """Says what keeps a backend from running a cell if it can compute ``W_x x + W_h h`` alone; None for nothing.

    Args:
      cell: the cell.
      weights: weights of a direction, which tell whether ``W_h`` is dense; None to go by the cell.
      several_states: whether the backend supports states other than one named c, and functions that take h.
      diagonal: whether the backend supports a diagonal ``W_h``.
    """
    if not cell.reads_x_and_h:
        return "a cell with gates that do not read both x and h, and nothing else"
    is_dense = cell.recurrent == "dense" if weights is None else has_dense_recurrence(cell, weights)
    if not is_dense and not (diagonal and cell.recurrent == "diagonal"):
        return "recurrent weights that are not dense"
    if not several_states and (cell.reads_h or len(cell.initial_values) > 1):
        return "a cell whose functions take h, or with several states"
    return None


def has_dense_recurrence(cell: Cell, weights: Weights) -> bool:
    """Returns whether ``W_h`` is there and dense, not block-diagonal."""
    output_size = hidden_size(cell, weights) if weights.w_p is None else weights.w_p.shape[0]
    return weights.w_h is not None and weights.w_h.shape[1] == output_size


def require_form(
    name: str, cell: Cell, weights: Weights | None = None, *, several_states: bool = True, diagonal: bool = False
) -> None:
    """Raises a ValueError for a cell with an `unsupported_form`; ``name`` says what does not support it."""
    lacks = unsupported_form(cell, weights, several_states=several_states, diagonal=diagonal)
    if lacks is not None:
        raise ValueError(f"{name} does not support {lacks}")


def project_inputs(
    weights: Weights, x: Float[Array, "*batch I"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch GH"]:
    """Returns ``W_x x + b`` in ``accum_dtype``, the part of ``z`` that does not depend on the previous step.

    It is ``W_x x`` alone with layer normalization, where the bias is added after it, and for a cell with gates that do
    not read x, where `sum_sources` adds it.
    """
    z = matvec(weights.w_x, x, dtype, accum_dtype)
    if weights.b is None or weights.norm is not None or not _every_gate_reads_x(weights, weights.b):
        return z
    return z + jnp.broadcast_to(weights.b.astype(accum_dtype), z.shape)


def _every_gate_reads_x(weights: Weights, b: Array) -> bool:
    return weights.w_x.shape[0] == b.shape[0]


def project_hidden(
    w_h: Float[Array, "GH block"], h: Float[Array, "*batch P"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch GH"]:
    """Returns ``W_h h``, for a dense or a block-diagonal ``W_h``.

    Args:
      w_h: the rows of every gate, ``(G*H, P)``; block-diagonal ``(G*H, P/k)``: a row of block j reads the j-th of k
        parts of h.
      h: the output of the step before.
      dtype: of the operands of matrix products.
      accum_dtype: of the result.
    """
    size, block = h.shape[-1], w_h.shape[1]
    if block == size:
        return matvec(w_h, h, dtype, accum_dtype)
    num_blocks, num_gates = size // block, w_h.shape[0] // size
    if block == 1:  # diagonal
        rows = w_h.reshape(num_gates, size).astype(accum_dtype)
        z = jnp.broadcast_to(rows, (*h.shape[:-1], num_gates, size)) * h.astype(accum_dtype)[..., None, :]
        return z.reshape(*h.shape[:-1], num_gates * size)
    w = w_h.reshape(num_gates, num_blocks, block, block).swapaxes(0, 1).reshape(num_blocks, num_gates * block, block)
    parts = h.reshape(*h.shape[:-1], num_blocks, block)
    z = jax.vmap(partial(matvec, dtype=dtype, accum_dtype=accum_dtype), (0, h.ndim - 1), h.ndim - 1)(w, parts)
    z = z.reshape(*h.shape[:-1], num_blocks, num_gates, block)
    return jnp.moveaxis(z, h.ndim, h.ndim - 1).reshape(*h.shape[:-1], num_gates * size)


def project_static(
    weights: Weights, static: Float[Array, "*batch S"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch GH"]:
    """Returns ``W_s s``, the part of ``z`` that comes from the static features."""
    assert weights.w_s is not None
    return matvec(weights.w_s, static, dtype, accum_dtype)


def sum_sources(
    cell: Cell,
    z_x: Array | None,
    z_h: Array | None,
    z_static: Array | None = None,
    rest: Sequence[Array] | None = None,
    axis: int = -1,
) -> tuple[Array, ...]:
    """Returns the slabs of ``z`` for a cell whose gates read different sources: sums of the products with each source.

    They are not put together into one array: that would be a copy in every step.

    Args:
      cell: the cell.
      z_x: product with the input, which has the slabs of the gates that read it along ``axis``.
      z_h: product with the output of the step before, likewise.
      z_static: product with the static features, likewise.
      rest: an array for every gate, such as its bias, that broadcasts against its slab.
      axis: the axis of the slabs, negative.
    """
    slabs: dict[int, Array] = {}

    def add(gate: int, slab: Array) -> None:
        slabs[gate] = jnp.add(*jnp.broadcast_arrays(slabs[gate], slab)) if gate in slabs else slab

    for source, z in zip(SOURCES, (z_x, z_h, z_static)):
        gates = cell.slabs_reading(source)
        if z is not None:
            for gate, slab in zip(gates, _split(z, len(gates), axis)):
                add(gate, slab)
    for gate, slab in enumerate(rest or ()):
        add(gate, slab)
    return tuple(slabs[gate] for gate in range(cell.num_gates))


def _split(z: Array, num_slabs: int, axis: int) -> Sequence[Array]:
    return lax.split(z, [z.shape[axis] // num_slabs] * num_slabs, axis=z.ndim + axis)


def late_bias(cell: Cell, weights: Weights, accum_dtype: DTypeLike) -> Sequence[Array] | None:
    """Returns the bias of each gate if `project_inputs` did not add it, because there are gates that do not read x."""
    if weights.b is None or weights.norm is not None or _every_gate_reads_x(weights, weights.b):
        return None
    return split_bias(cell, weights, accum_dtype)


def split_bias(cell: Cell, weights: Weights, accum_dtype: DTypeLike) -> Sequence[Array] | None:
    """Returns the bias of each gate; None without bias."""
    return None if weights.b is None else _split(weights.b.astype(accum_dtype), cell.num_gates, -1)


def recurrent_step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch GH"],
    state: State,
    dtype: DTypeLike,
    rates: RegularizerRates,
    masks: RegularizerMasks,
    mesh_axis: str | None = None,
    z_static: Float[Array, "*batch SH"] | None = None,
    multiplied_h: Float[Array, "*batch P"] | None = None,
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
      z_static: from `project_static`; None if no gate reads static features.
      multiplied_h: the h that ``W_h`` multiplies, for example without its gradient; None for the h of ``state``.
    """
    h, z_h = state.h if multiplied_h is None else multiplied_h, None
    if weights.w_h is not None:
        if mesh_axis is not None and weights.w_p is None:
            h = lax.all_gather(h.astype(dtype), mesh_axis, axis=h.ndim - 1, tiled=True)  # the exchange of a step
        z_h = project_hidden(weights.w_h, h, dtype, z_x.dtype)
    if weights.norm is not None:
        return finish_step(cell, weights, z_x, z_h, state, dtype, rates, masks, mesh_axis)
    if cell.reads_x_and_h:
        assert z_h is not None
        return finish_step(cell, weights, z_x + z_h, None, state, dtype, rates, masks, mesh_axis)
    slabs = sum_sources(cell, z_x, z_h, z_static, late_bias(cell, weights, z_x.dtype))
    return _finish_split(cell, weights, slabs, None, state, dtype, rates, masks, mesh_axis)


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
    z, z_h = split_sources(cell, z, z_h, -1, layer_norm=weights.norm is not None)
    return _finish_split(cell, weights, z, z_h, state, dtype, rates, masks, mesh_axis)


def _finish_split(
    cell: Cell,
    weights: Weights,
    z: Array | tuple[Array, ...],
    z_h: Array | None,
    state: State,
    dtype: DTypeLike,
    rates: RegularizerRates,
    masks: RegularizerMasks,
    mesh_axis: str | None,
) -> State:
    """Does `finish_step` with the arrays of `apply_gates`."""
    (accum_dtype, num_axes), old_h = _slab_type(z), state.h if cell.reads_h else None
    c, h = apply_gates(cell, weights, z, z_h, state.c, masks.candidate_mask, rates, num_axes - 1, mesh_axis, h=old_h)
    if weights.w_p is not None:
        h = matvec(weights.w_p, h, dtype, accum_dtype)
        h = h if mesh_axis is None else lax.psum(h, mesh_axis)  # the exchange of a step with a projection
    return apply_zoneout(rates, masks, State(h, c), state)


def split_gates(z: Array, num_gates: int, axis: int) -> Array:
    """Moves the gates to a leading axis: from ``(..., G*H, ...)`` to ``(G, ..., H, ...)``."""
    axis %= z.ndim
    shape = [*z.shape[:axis], num_gates, z.shape[axis] // num_gates, *z.shape[axis + 1 :]]
    return jnp.moveaxis(z.reshape(shape), axis, 0)


def split_sources(
    cell: Cell, z: Array, z_h: Array | None, axis: int, *, layer_norm: bool
) -> tuple[Array, Array | None]:
    """Splits the arguments ``z`` and ``z_h`` of `apply_gates` by `split_gates`."""
    gates = len(cell.slabs_reading("x")) if layer_norm else cell.num_gates
    return split_gates(z, gates, axis), None if z_h is None else split_gates(z_h, len(cell.slabs_reading("h")), axis)


def _slab_type(z: Array | tuple[Array, ...]) -> tuple[jnp.dtype, int]:
    """Returns the dtype and the number of axes of one slab of the argument ``z`` of `apply_gates`."""
    return (z[0].dtype, z[0].ndim) if isinstance(z, tuple) else (z.dtype, z.ndim - 1)


def apply_gates(
    cell: Cell,
    weights: Weights | ElementwiseWeights,
    z: Float[Array, "G *units"] | tuple[Float[Array, "*units"], ...],
    z_h: Float[Array, "Gh *units"] | None,
    c: Any,
    candidate_mask: Bool[Array, "*units"] | None,
    rates: RegularizerRates,
    axis: int,
    mesh_axis: str | None = None,
    activate: Activate | None = None,
    h: Float[Array, "*units"] | None = None,
) -> tuple[Any, Array]:
    """Computes the elementwise part of a step: from pre-activations to the new states and the cell's output.

    Args:
      cell: the cell.
      weights: all weights, or the result of `elementwise_weights`.
      z: the pre-activations of all gates, one array or one for each; with layer normalization ``W_x x``.
      z_h: ``W_h h`` with layer normalization, else None.
      c: the states, as in `jaxlstm.params.State`; of shape ``units``.
      candidate_mask: False where recurrent dropout drops the candidate; None if it drops none.
      rates: rates of the regularizers.
      axis: the axis of the units in ``c``.
      mesh_axis: mesh axis over which the units are sharded; None if each device has all units.
      activate: replaces `jaxlstm.recurrence.gates.activate`.
      h: the output of the step before; None if the cell does not read it.
    """
    dtype, ndim = _slab_type(z)

    def per_unit(v: Float[Array, "*rows H"]) -> Array:
        """Adds axes of size 1 for the batch."""
        units = [1] * ndim
        units[axis] = v.shape[-1]
        return v.astype(dtype).reshape(*v.shape[:-1], *units)

    options: dict[str, Any] = {}
    norm = weights.norm
    if norm is not None:
        assert not isinstance(z, tuple)
        axes = (0, axis + 1)
        z = _normalize(z, axes, mesh_axis) * per_unit(norm.x.reshape(z.shape[0], -1))
        if z_h is not None and norm.h is not None:
            z_h = _normalize(z_h, axes, mesh_axis) * per_unit(norm.h.reshape(z_h.shape[0], -1))
        if cell.reads_x_and_h and z_h is not None:
            z = z + z_h
        else:
            z = jnp.concatenate(sum_sources(cell, z, z_h, axis=-z.ndim))
        if weights.b is not None:
            z = z + per_unit(weights.b.reshape(cell.num_gates, -1))
        gain_c, shift_c = norm.c, norm.b_c
        if gain_c is not None:

            def normalize_c(c: Array) -> Array:
                c = _normalize(c, (axis,), mesh_axis) * per_unit(gain_c)
                return c if shift_c is None else c + per_unit(shift_c)

            options["normalize"] = normalize_c
    if candidate_mask is not None:
        options["candidate_scale"] = candidate_scale(candidate_mask, rates, dtype)
    if weights.w_c is not None:
        options["peepholes"] = per_unit(weights.w_c)
    if activate is not None:
        options["activate"] = activate
    if h is not None:
        options["h"] = h
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
