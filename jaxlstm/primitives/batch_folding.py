"""Functions of a batch that absorb an axis of `jax.vmap` into the batch.

`jax.vmap` of a loop over one sequence adds a leading axis to every array of the loop, in front of the axes that its
memory layout was chosen for. `foldable_call` calls a function whose vmap rule merges the mapped axis into the batch
axis instead; the function then chooses its layout for the larger batch. Under all other transformations the call acts
as the function itself: it is compiled and differentiated in place, and its transpose is a foldable call again.

If an array without a batch axis is mapped as well, or if a result sums over the batch (per-sequence gradients of shared
weights), the function is mapped as usual.

A call takes two forms of the function, so that the one for execution may use operations without a derivative. It is
compiled, and transposed in the arguments that it is linear in. The differentiable form replaces it under `jax.jvp`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxlstm.primitives.mixed_precision_dot import has_explicit_sharding

SHARED = -1  # in place of a batch axis: the array has none
BatchSize = Any  # an int, or a symbolic dimension under `jax.export`


class FoldableFn(NamedTuple):
    """A function of arrays with the batch axes of its arguments and results, each an axis or `SHARED`."""

    fn: Callable[..., Sequence[Array]]
    in_axes: Sequence[int]
    out_axes: Sequence[int]


# (batch_size, differentiable) -> the function for this batch size. For different batch sizes the arguments and results
# differ in nothing but the size and the position of the batch axis.
FnForBatchSize = Callable[[BatchSize, bool], FoldableFn]


class TreeFn(NamedTuple):
    """Makes a function of trees a function of their leaves."""

    fn: Callable[..., Any]
    differentiable_fn: Callable[..., Any]
    in_axes: Callable[[BatchSize], Any]
    out_axes: Callable[[BatchSize], Any]
    in_tree: Any
    out_tree: Any

    def __call__(self, batch_size: BatchSize, differentiable: bool) -> FoldableFn:
        """Returns the function for this batch size."""
        tree_fn = self.differentiable_fn if differentiable else self.fn

        def fn(*leaves: Array) -> Sequence[Array]:
            return jax.tree.leaves(tree_fn(batch_size, *self.in_tree.unflatten(leaves)))

        def flatten(prefix: Any, tree: Any) -> Sequence[int]:
            return jax.tree.leaves(jax.tree.broadcast(prefix, tree.unflatten([0] * tree.num_leaves)))

        in_axes, out_axes = self.in_axes(batch_size), self.out_axes(batch_size)
        return FoldableFn(fn, flatten(in_axes, self.in_tree), flatten(out_axes, self.out_tree))


def foldable_call(
    fn: Callable[..., Any],
    batch_size: BatchSize,
    args: tuple[Any, ...],
    in_axes: Callable[[BatchSize], Any],
    out_axes: Callable[[BatchSize], Any],
    differentiable_fn: Callable[..., Any],
) -> Any:
    """Returns ``fn(batch_size, *args)``, computed so that `jax.vmap` merges the mapped axis into the batch.

    Args:
      fn: a function of a batch size and trees of arrays. It treats every row of the batch alone and closes over no
        arrays.
      batch_size: the size of the batch.
      args: the trees of arrays.
      in_axes: returns for a batch size the batch axis of each array in ``args``, or `SHARED`, as a tree prefix.
      out_axes: the same for the results.
      differentiable_fn: computes the same values as ``fn`` and replaces it under differentiation.
    """
    leaves, in_tree = jax.tree.flatten(args)
    if has_explicit_sharding(*leaves):
        return differentiable_fn(batch_size, *args)
    jaxpr, shapes = jax.make_jaxpr(lambda *a: fn(batch_size, *in_tree.unflatten(a)), return_shape=True)(*leaves)
    out_tree = jax.tree.structure(shapes)
    tree_fn = TreeFn(fn, differentiable_fn, in_axes, out_axes, in_tree, out_tree)
    return out_tree.unflatten(_bind(jaxpr, tree_fn, batch_size, leaves))


def _bind(
    jaxpr: ClosedJaxpr, fn_for_batch_size: FnForBatchSize, batch_size: BatchSize, arrays: Sequence[Array]
) -> list[Array]:
    return foldable_call_p.bind(*arrays, jaxpr=jaxpr, fn_for_batch_size=fn_for_batch_size, batch_size=batch_size)


def _trace_and_bind(fn_for_batch_size: FnForBatchSize, batch_size: BatchSize, arrays: Sequence[Array]) -> list[Array]:
    jaxpr = jax.make_jaxpr(fn_for_batch_size(batch_size, False).fn)(*arrays)
    return _bind(jaxpr, fn_for_batch_size, batch_size, arrays)


def _eager_impl(*arrays: Array, jaxpr: ClosedJaxpr, **_: Any) -> list[Array]:
    return jaxpr_as_fun(jaxpr)(*arrays)


class VmappedFn(NamedTuple):
    """A function mapped as usual. No array has a batch axis any more, but the differentiable form is still known."""

    fn_for_batch_size: FnForBatchSize
    mapped_axes: tuple[int | None, ...]
    axis_size: BatchSize

    def __call__(self, batch_size: BatchSize, differentiable: bool) -> FoldableFn:
        """Returns the function for this batch size."""
        foldable = self.fn_for_batch_size(batch_size, differentiable)
        fn = jax.vmap(foldable.fn, self.mapped_axes, axis_size=self.axis_size)
        return FoldableFn(fn, [SHARED] * len(foldable.in_axes), [SHARED] * len(foldable.out_axes))


def _batching_rule(
    arrays: Sequence[Array],
    mapped_axes: Sequence[int | None],
    *,
    fn_for_batch_size: FnForBatchSize,
    batch_size: BatchSize,
    **_: Any,
) -> tuple[list[Array], list[int]]:
    """Merges the mapped axis into the batch; see the module docstring for the exceptions."""
    axis_size = next(a.shape[m] for a, m in zip(arrays, mapped_axes) if m is not None)
    small, large = fn_for_batch_size(batch_size, False), fn_for_batch_size(batch_size * axis_size, False)
    shared_is_mapped = any(m is not None and axis == SHARED for m, axis in zip(mapped_axes, small.in_axes))
    if shared_is_mapped or SHARED in small.out_axes:
        vmapped = VmappedFn(fn_for_batch_size, tuple(mapped_axes), axis_size)
        outs = _trace_and_bind(vmapped, batch_size, arrays)
        return outs, [0] * len(outs)

    def fold(a: Array, mapped_axis: int | None, axis: int, new_axis: int) -> Array:
        if axis == SHARED:
            return a
        a = jnp.broadcast_to(a, (axis_size, *a.shape)) if mapped_axis is None else jnp.moveaxis(a, mapped_axis, 0)
        a = jnp.moveaxis(a, (0, 1 + axis), (new_axis, new_axis + 1))
        return a.reshape(*a.shape[:new_axis], batch_size * axis_size, *a.shape[new_axis + 2 :])

    def unfold(a: Array, axis: int, new_axis: int) -> Array:
        a = a.reshape(*a.shape[:axis], axis_size, batch_size, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, (axis, axis + 1), (new_axis, new_axis + 1))

    folded = [fold(*each) for each in zip(arrays, mapped_axes, small.in_axes, large.in_axes)]
    outs = _trace_and_bind(fn_for_batch_size, batch_size * axis_size, folded)
    return [unfold(*each) for each in zip(outs, large.out_axes, small.out_axes)], list(small.out_axes)


def _jvp_rule(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    fn_for_batch_size: FnForBatchSize,
    batch_size: BatchSize,
    **_: Any,
) -> Any:
    """Differentiates the differentiable form in the arguments whose tangents are not zero."""
    is_active = [not isinstance(d, ad.Zero) for d in tangents]
    fn = fn_for_batch_size(batch_size, True).fn

    def active_fn(*active: Array) -> Sequence[Array]:
        remaining = iter(active)
        return fn(*(next(remaining) if moves else a for a, moves in zip(primals, is_active)))

    active = [a for a, moves in zip(primals, is_active) if moves]
    active_tangents = [d for d, moves in zip(tangents, is_active) if moves]
    return jax.jvp(active_fn, active, active_tangents)


class TransposedFn(NamedTuple):
    """The transpose of a function in the arguments that it is linear in.

    A function of the cotangents of the results and of the nonlinear arguments, which returns the cotangents of the
    linear arguments.
    """

    fn_for_batch_size: FnForBatchSize
    batch_size: BatchSize
    linear_args: tuple[jax.ShapeDtypeStruct | None, ...]  # for this batch size; None for a nonlinear argument

    def __call__(self, batch_size: BatchSize, differentiable: bool) -> FoldableFn:
        """Returns the transpose for this batch size."""
        old_axes = self.fn_for_batch_size(self.batch_size, differentiable).in_axes
        foldable = self.fn_for_batch_size(batch_size, differentiable)
        linear_args = [
            None if a is None else _resize(a, axis, new_axis, batch_size)
            for a, axis, new_axis in zip(self.linear_args, old_axes, foldable.in_axes)
        ]

        def transposed(*arrays: Array) -> Sequence[Array]:
            cotangents, nonlinear = arrays[: len(foldable.out_axes)], arrays[len(foldable.out_axes) :]

            def linear_fn(*linear: Array) -> tuple[Array, ...]:
                linear_iter, nonlinear_iter = iter(linear), iter(nonlinear)
                return tuple(foldable.fn(*(next(nonlinear_iter if a is None else linear_iter) for a in linear_args)))

            return jax.linear_transpose(linear_fn, *(a for a in linear_args if a is not None))(tuple(cotangents))

        nonlinear_axes = [axis for a, axis in zip(linear_args, foldable.in_axes) if a is None]
        linear_axes = [axis for a, axis in zip(linear_args, foldable.in_axes) if a is not None]
        return FoldableFn(transposed, (*foldable.out_axes, *nonlinear_axes), linear_axes)


def _resize(a: jax.ShapeDtypeStruct, axis: int, new_axis: int, batch_size: BatchSize) -> jax.ShapeDtypeStruct:
    """Returns the shape with the batch axis moved from ``axis`` to ``new_axis`` and its size replaced."""
    if axis == SHARED:
        return a
    shape = [*a.shape[:axis], *a.shape[axis + 1 :]]
    return jax.ShapeDtypeStruct((*shape[:new_axis], batch_size, *shape[new_axis:]), a.dtype)


def _transpose_rule(
    cotangents: Sequence[Any],
    *args: Any,
    jaxpr: ClosedJaxpr,
    fn_for_batch_size: FnForBatchSize,
    batch_size: BatchSize,
) -> list[Array | None]:
    """Calls the transpose, again as a foldable call."""
    del jaxpr
    if all(isinstance(a, ad.Zero) for a in cotangents):
        return [None] * len(args)
    linear_args = tuple(
        jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) if ad.is_undefined_primal(a) else None for a in args
    )
    nonlinear = [a for a in args if not ad.is_undefined_primal(a)]
    transposed = TransposedFn(fn_for_batch_size, batch_size, linear_args)
    arrays = [*(ad.instantiate_zeros(a) for a in cotangents), *nonlinear]
    results = iter(_trace_and_bind(transposed, batch_size, arrays))
    return [None if a is None else next(results) for a in linear_args]


foldable_call_p = Primitive("foldable_call")
foldable_call_p.multiple_results = True
foldable_call_p.def_impl(_eager_impl)
foldable_call_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
mlir.register_lowering(foldable_call_p, mlir.lower_fun(_eager_impl, multiple_results=True))
batching.primitive_batchers[foldable_call_p] = _batching_rule
ad.primitive_jvps[foldable_call_p] = _jvp_rule
ad.primitive_transposes[foldable_call_p] = _transpose_rule
