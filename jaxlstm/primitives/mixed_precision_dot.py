"""Matrix products of rounded operands with wider sums, whose derivatives are products of the same kind.

`jax.lax.dot_general` takes bfloat16 operands and gives float32 sums. Its transpose does otherwise: it multiplies the
float32 cotangent with a bfloat16 operand, on a CPU no faster than float32, and rounds the sums. That of `dot` rounds
the cotangent, an operand like others, and keeps the sums.
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


class DotSpec(NamedTuple):
    """What is multiplied, and how. The result has the batch first, then what is left of ``a``, then of ``b``."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]  # axes of a and b that are summed over, in pairs
    batch: tuple[tuple[int, ...], tuple[int, ...]]  # axes of a and b that stay side by side, in pairs
    dtype: jnp.dtype  # of the operands in the matvec
    sums: jnp.dtype  # of the result

    def left(self, which: int, ndim: int) -> list[int]:
        """The other axes, of one of the operands."""
        return [axis for axis in range(ndim) if axis not in (*self.contract[which], *self.batch[which])]

    def times(self, a: Array, b: Array) -> Array:
        """The matvec."""
        if self.dtype == self.sums or has_explicit_sharding(
            a, b
        ):  # of one dtype the transpose is of the same kind anyhow
            return _plain(a, b, kind=self)
        found = jax.make_jaxpr(lambda a, b: _plain(a, b, kind=self))(a, b).out_avals[0]
        return _product.bind(a, b, kind=self, found=found)


def has_explicit_sharding(*arrays: Array) -> bool:
    """Whether the program says where arrays lie on a mesh, by explicit or manual axes.

    JAX's own operations know what that means for their derivatives, and a primitive of ours does not.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    return any(mesh.explicit_axes or mesh.manual_axes for mesh in meshes)


def matvec(w: Float[Array, "m n"], x: Float[Array, "*batch n"], dtype: DTypeLike, sums: DTypeLike) -> Array:
    """``W x`` over the last axis of ``x``, ``(*batch, m)``: operands rounded to ``dtype``, the rest in ``sums``."""
    return dot(x, w, ((x.ndim - 1,), (1,)), dtype, sums)


def dot(
    a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: DTypeLike, sums: DTypeLike
) -> Array:
    """``a`` times ``b`` over any axes.

    Args:
      a: an operand of any floating-point dtype, which its gradient has too.
      b: the other.
      contract: the axes of ``a``, and those of ``b`` that they are summed over with.
      dtype: of the operands in the matvec, and in those of every derivative.
      sums: of the result.

    Returns:
      The axes of ``a`` that are left, then those of ``b``.
    """
    return DotSpec(contract, ((), ()), jnp.dtype(dtype), jnp.dtype(sums)).times(a, b)


def _plain(a: Array, b: Array, *, kind: DotSpec, **_: Any) -> Array:
    axes = (kind.contract, kind.batch)
    return lax.dot_general(a.astype(kind.dtype), b.astype(kind.dtype), axes, preferred_element_type=kind.sums)


def _on_cpu(a: Array, b: Array, *, kind: DotSpec, **_: Any) -> Array:
    """The same as a matvec of matrices, rows by columns, kept so by barriers.

    That is how XLA's bfloat16 matvec for CPUs reads its operands. Left alone, XLA folds transpositions into a matvec
    after it has decided that it has a kernel for it, and then has none: half the speed, or an error.
    """
    side = tuple(a.shape[axis] for axis in kind.batch[0])
    summed = math.prod(a.shape[axis] for axis in kind.contract[0])
    left = [tuple(x.shape[axis] for axis in kind.left(n, x.ndim)) for n, x in enumerate((a, b))]
    a = jnp.transpose(a, (*kind.batch[0], *kind.left(0, a.ndim), *kind.contract[0])).astype(kind.dtype)
    b = jnp.transpose(b, (*kind.batch[1], *kind.contract[1], *kind.left(1, b.ndim))).astype(kind.dtype)
    a, b = a.reshape(*side, math.prod(left[0]), summed), b.reshape(*side, summed, math.prod(left[1]))
    # A matrix times a vector goes by way of float32, and the matrix there before a loop if no barrier is in the way.
    keep = (lambda x: x) if 1 in (a.shape[-2], b.shape[-1]) else lax.optimization_barrier
    a, b = keep((a, b))
    both = tuple(range(len(side)))
    axes = (((len(side) + 1,), (len(side),)), (both, both))
    return keep(lax.dot_general(a, b, axes, preferred_element_type=kind.sums)).reshape(*side, *left[0], *left[1])


@partial(jax.jit, static_argnames=("kind", "found"))
def _alone(a: Array, b: Array, *, kind: DotSpec, found: Any) -> Array:
    return _product.bind(a, b, kind=kind, found=found)


def _by_itself(a: Array, b: Array, *, kind: DotSpec, found: Any) -> Array:
    """Outside of any program; compiled, unless `jax.disable_jit` says otherwise."""
    return (_plain if jax.config.jax_disable_jit else _alone)(a, b, kind=kind, found=found)  # pyright: ignore


def _tangent(operands: Sequence[Array], tangents: Sequence[Any], *, kind: DotSpec, **_: Any) -> tuple[Array, Any]:
    (a, b), (da, db) = operands, tangents
    terms = [] if isinstance(da, ad.Zero) else [kind.times(da, b)]
    terms += [] if isinstance(db, ad.Zero) else [kind.times(a, db)]
    return kind.times(a, b), sum(terms[1:], terms[0])


def _transpose(ct: Any, a: Any, b: Any, *, kind: DotSpec, **_: Any) -> tuple[Array | None, Array | None]:
    """The cotangent of one operand: that of the matvec, times the other operand."""
    if isinstance(ct, ad.Zero):
        return None, None
    of_b = ad.is_undefined_primal(b)
    unknown, known = (b, a) if of_b else (a, b)
    aval = unknown.aval
    (mine, its), (side, its_side) = ((x[::-1] if of_b else x) for x in (kind.contract, kind.batch))
    batch, left, its_left = tuple(range(len(side))), kind.left(of_b, aval.ndim), tuple(kind.left(not of_b, known.ndim))
    # Of the matvec's axes, those that came from the other operand are summed over with it again.
    first = len(side) if of_b else len(side) + len(left)
    theirs = tuple(range(first, first + len(its_left)))
    paired = [mine[its.index(axis)] for axis in sorted(its)]
    if max(side, default=-1) < min(mine, default=0) < min(left, default=aval.ndim):  # in the order of the operand
        back = kind._replace(contract=(its_left, theirs), batch=(its_side, batch)).times(known, ct)
        order = [*side, *paired, *left]
    else:
        back = kind._replace(contract=(theirs, its_left), batch=(batch, its_side)).times(ct, known)
        order = [*side, *left, *paired]
    back = jnp.transpose(back, [order.index(axis) for axis in range(aval.ndim)]).astype(aval.dtype)
    return (None, back) if of_b else (back, None)


def _mapped(operands: Sequence[Array], mapped: Sequence[int | None], *, kind: DotSpec, **_: Any) -> tuple[Array, int]:
    """The rule of `jax.vmap`: an axis of both operands is one of the batch, an axis of one is left over."""
    # In front of an operand the mapped axis moves the others up by one.
    operands = [a if m is None else jnp.moveaxis(a, m, 0) for a, m in zip(operands, mapped)]
    up = [int(m is not None) for m in mapped]
    contract, batch = (tuple(tuple(n + u for n in axes) for axes, u in zip(x, up)) for x in (kind.contract, kind.batch))
    if all(up):
        batch = tuple((0, *axes) for axes in batch)
        return kind._replace(contract=contract, batch=batch).times(*operands), 0
    kind = kind._replace(contract=contract, batch=batch)
    at = len(batch[0]) + (len(kind.left(0, operands[0].ndim)) if up[1] else 0)
    return kind.times(*operands), at


_product = Primitive("matvec")
_product.def_impl(_by_itself)
_product.def_abstract_eval(lambda *_, found, **__: found)
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[_product] = _mapped
ad.primitive_jvps[_product] = _tangent
ad.primitive_transposes[_product] = _transpose
