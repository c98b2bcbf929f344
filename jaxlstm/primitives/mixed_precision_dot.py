"""Matrix products with operands rounded to one dtype and sums in a wider one, in the derivatives too.

`jax.lax.dot_general` takes bfloat16 operands and returns float32 sums, but its transpose multiplies the float32
cotangent with a bfloat16 operand, on a CPU no faster than float32, and rounds the sums. The transpose of `dot` rounds
the cotangent like any operand and keeps the sums.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Float

AxisPairs = tuple[tuple[int, ...], tuple[int, ...]]  # axes of a, and the axes of b that they are paired with


class DotSpec(NamedTuple):
    """Axes and dtypes of a product of two arrays ``a`` and ``b``.

    The result has the batch axes first, then the remaining axes of ``a``, then the remaining axes of ``b``.
    """

    contracting_axes: AxisPairs  # summed over
    batch_axes: AxisPairs
    dtype: jnp.dtype  # of the operands as they are multiplied
    accum_dtype: jnp.dtype  # of the sums and of the result

    def dot_general(self, a: Array, b: Array) -> Array:
        """Computes the product."""
        # With one dtype the transpose of `jax.lax.dot_general` is already of the right kind.
        if self.dtype == self.accum_dtype or has_explicit_sharding(a, b):
            return _lax_dot_general(a, b, spec=self)
        result = jax.make_jaxpr(lambda a, b: _lax_dot_general(a, b, spec=self))(a, b).out_avals[0]
        return mixed_precision_dot_p.bind(a, b, spec=self, result=result)

    def remaining_axes(self, operand: int, ndim: int) -> list[int]:
        """Returns the axes of an operand, 0 for ``a`` or 1 for ``b``, that are neither contracted nor batch axes."""
        return [
            axis for axis in range(ndim) if axis not in (*self.contracting_axes[operand], *self.batch_axes[operand])
        ]


def has_explicit_sharding(*arrays: Array) -> bool:
    """Returns whether an array is on a mesh with explicit or manual axes.

    The derivatives of JAX's operations handle such axes; the primitives of this package do not.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    return any(mesh.explicit_axes or mesh.manual_axes for mesh in meshes)


def matvec(w: Float[Array, "m n"], x: Float[Array, "*batch n"], dtype: DTypeLike, accum_dtype: DTypeLike) -> Array:
    """Computes ``W x`` over the last axis of ``x``.

    Args:
      w: the matrix.
      x: the vectors.
      dtype: dtype to which the operands are rounded.
      accum_dtype: dtype of the sums and of the result.

    Returns:
      the products, ``(*batch, m)``.
    """
    return dot(x, w, ((x.ndim - 1,), (1,)), dtype, accum_dtype)


def dot(a: Array, b: Array, contracting_axes: AxisPairs, dtype: DTypeLike, accum_dtype: DTypeLike) -> Array:
    """Computes the sum of products of ``a`` and ``b`` over any axes.

    Args:
      a: an array of any floating-point dtype; its gradient has the same dtype.
      b: the other operand, likewise.
      contracting_axes: the axes of ``a`` that are summed over, and the axes of ``b`` that they are paired with.
      dtype: dtype to which the operands are rounded, here and in every derivative.
      accum_dtype: dtype of the sums and of the result.

    Returns:
      an array with the remaining axes of ``a``, then the remaining axes of ``b``.
    """
    return DotSpec(contracting_axes, ((), ()), jnp.dtype(dtype), jnp.dtype(accum_dtype)).dot_general(a, b)


def _lax_dot_general(a: Array, b: Array, *, spec: DotSpec, **_: Any) -> Array:
    axes = (spec.contracting_axes, spec.batch_axes)
    return lax.dot_general(a.astype(spec.dtype), b.astype(spec.dtype), axes, preferred_element_type=spec.accum_dtype)


def _cpu_dot_general(a: Array, b: Array, *, spec: DotSpec, **_: Any) -> Array:
    """Computes the product of two matrices, each stored row by row, between optimization barriers.

    XLA's bfloat16 kernel for CPUs reads its operands in this order. Without the barriers XLA folds transpositions into
    a product after it has selected the kernel, which then does not apply: half the speed, or an error.
    """
    batch = tuple(a.shape[axis] for axis in spec.batch_axes[0])
    contracted = math.prod(a.shape[axis] for axis in spec.contracting_axes[0])
    axes_a, axes_b = spec.remaining_axes(0, a.ndim), spec.remaining_axes(1, b.ndim)
    shape_a, shape_b = tuple(a.shape[axis] for axis in axes_a), tuple(b.shape[axis] for axis in axes_b)
    a = jnp.transpose(a, (*spec.batch_axes[0], *axes_a, *spec.contracting_axes[0])).astype(spec.dtype)
    b = jnp.transpose(b, (*spec.batch_axes[1], *spec.contracting_axes[1], *axes_b)).astype(spec.dtype)
    a = a.reshape(*batch, math.prod(shape_a), contracted)
    b = b.reshape(*batch, contracted, math.prod(shape_b))
    # XLA multiplies a matrix with a vector in float32, and converts the matrix before a loop only without a barrier.
    barrier = (lambda x: x) if 1 in (a.shape[-2], b.shape[-1]) else lax.optimization_barrier
    a, b = barrier((a, b))
    leading = tuple(range(len(batch)))
    axes = (((len(batch) + 1,), (len(batch),)), (leading, leading))
    result = barrier(lax.dot_general(a, b, axes, preferred_element_type=spec.accum_dtype))
    return result.reshape(*batch, *shape_a, *shape_b)


@partial(jax.jit, static_argnames=("spec", "result"))
def _jit_dot_general(a: Array, b: Array, *, spec: DotSpec, result: Any) -> Array:
    return mixed_precision_dot_p.bind(a, b, spec=spec, result=result)


def _eager_impl(a: Array, b: Array, *, spec: DotSpec, result: Any) -> Array:
    """Computes the product outside of a compiled program: compiled by itself, unless `jax.disable_jit` is on."""
    disable_jit = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return (_lax_dot_general if disable_jit else _jit_dot_general)(a, b, spec=spec, result=result)


def _jvp_rule(operands: Sequence[Array], tangents: Sequence[Any], *, spec: DotSpec, **_: Any) -> tuple[Array, Any]:
    (a, b), (da, db) = operands, tangents
    terms = [] if isinstance(da, ad.Zero) else [spec.dot_general(da, b)]
    terms += [] if isinstance(db, ad.Zero) else [spec.dot_general(a, db)]
    return spec.dot_general(a, b), sum(terms[1:], terms[0])


def _transpose_rule(ct: Any, a: Any, b: Any, *, spec: DotSpec, **_: Any) -> tuple[Array | None, Array | None]:
    """Computes the cotangent of one operand, the product of the result's cotangent and the other operand."""
    if isinstance(ct, ad.Zero):
        return None, None
    is_b = ad.is_undefined_primal(b)
    unknown, known = (b, a) if is_b else (a, b)
    aval = unknown.aval
    contracting, known_contracting = spec.contracting_axes[::-1] if is_b else spec.contracting_axes
    batch, known_batch = spec.batch_axes[::-1] if is_b else spec.batch_axes
    remaining = spec.remaining_axes(is_b, aval.ndim)
    known_remaining = tuple(spec.remaining_axes(not is_b, known.ndim))
    # Sum over the axes of the cotangent that came from the other operand.
    ct_batch = tuple(range(len(batch)))
    first = len(batch) if is_b else len(batch) + len(remaining)
    ct_contracting = tuple(range(first, first + len(known_remaining)))
    paired = [contracting[known_contracting.index(axis)] for axis in sorted(known_contracting)]
    # Order the operands so that the result has the axes in the order of the unknown operand, if one order does.
    if max(batch, default=-1) < min(contracting, default=0) < min(remaining, default=aval.ndim):
        spec = spec._replace(contracting_axes=(known_remaining, ct_contracting), batch_axes=(known_batch, ct_batch))
        result, order = spec.dot_general(known, ct), [*batch, *paired, *remaining]
    else:
        spec = spec._replace(contracting_axes=(ct_contracting, known_remaining), batch_axes=(ct_batch, known_batch))
        result, order = spec.dot_general(ct, known), [*batch, *remaining, *paired]
    result = jnp.transpose(result, [order.index(axis) for axis in range(aval.ndim)]).astype(aval.dtype)
    return (None, result) if is_b else (result, None)


def _batching_rule(
    operands: Sequence[Array], mapped: Sequence[int | None], *, spec: DotSpec, **_: Any
) -> tuple[Array, int]:
    """Makes an axis mapped in both operands a batch axis, and an axis mapped in one operand a remaining axis."""
    operands = [a if m is None else jnp.moveaxis(a, m, 0) for a, m in zip(operands, mapped)]
    # The mapped axis in front shifts the other axes of its operand by one.
    is_mapped = [m is not None for m in mapped]
    contracting, batch = (_shift(axes, is_mapped) for axes in (spec.contracting_axes, spec.batch_axes))
    if all(is_mapped):
        batch = ((0, *batch[0]), (0, *batch[1]))
        return spec._replace(contracting_axes=contracting, batch_axes=batch).dot_general(*operands), 0
    spec = spec._replace(contracting_axes=contracting, batch_axes=batch)
    out_axis = len(batch[0]) + (len(spec.remaining_axes(0, operands[0].ndim)) if is_mapped[1] else 0)
    return spec.dot_general(*operands), out_axis


def _shift(axes: AxisPairs, by: Sequence[int]) -> AxisPairs:
    """Adds ``by[0]`` to the axes of the first operand and ``by[1]`` to the axes of the second."""
    return tuple(axis + by[0] for axis in axes[0]), tuple(axis + by[1] for axis in axes[1])


mixed_precision_dot_p = Primitive("mixed_precision_dot")
mixed_precision_dot_p.def_impl(_eager_impl)
mixed_precision_dot_p.def_abstract_eval(lambda *_, result, **__: result)
mlir.register_lowering(mixed_precision_dot_p, mlir.lower_fun(_lax_dot_general, multiple_results=False))
mlir.register_lowering(mixed_precision_dot_p, mlir.lower_fun(_cpu_dot_general, multiple_results=False), platform="cpu")
batching.primitive_batchers[mixed_precision_dot_p] = _batching_rule
ad.primitive_jvps[mixed_precision_dot_p] = _jvp_rule
ad.primitive_transposes[mixed_precision_dot_p] = _transpose_rule
