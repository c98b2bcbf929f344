"""Work over a batch that `jax.vmap` makes a larger batch of, instead of an axis in front of everything.

`jax.vmap` of a loop over one sequence is, left to itself, a loop whose arrays have an axis in front of those that their
layout was chosen for. `call` marks work that can take the mapped axis into its batch and then lays itself out for the
batch that comes of it. To the rest of JAX it is the work itself: compiled in place, differentiated in place, and
transposed into work of its own kind, which can be mapped in turn.

Where something that the whole batch shares is mapped too, or where a sum over the batch is asked for (the gradient of
shared weights, for each sequence by itself), what is in it is mapped as it is.

Work may be given in two forms. What is compiled, and transposed in what it is linear in, is the quick one; where it is
differentiated, the smooth one takes its place, so that the quick one may do what has no derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxlstm.params import Size
from jaxlstm.primitives.mixed_precision_dot import has_explicit_sharding

SHARED = -1  # in place of an axis: the whole batch has one array


class Work(NamedTuple):
    """A function of arrays, and where in each of them the batch is."""

    function: Callable[..., Sequence[Array]]
    ins: Sequence[int]
    outs: Sequence[int]


# The work for a number of rows, from one to another of which only the batch's axes may move; and whether it is to be
# smooth: whether all that it computes must have a derivative.
Make = Callable[[Size, bool], Work]


class OfTrees(NamedTuple):
    """Work on trees as work on their leaves."""

    run: Callable[..., Any]
    smooth: Callable[..., Any]
    ins: Callable[[Size], Any]
    outs: Callable[[Size], Any]
    given: Any  # structure of the operands
    found: Any  # structure of what is returned

    def __call__(self, rows: Size, smooth: bool) -> Work:
        """The work for a number of rows."""
        run = self.smooth if smooth else self.run

        def function(*leaves: Array) -> Sequence[Array]:
            return jax.tree.leaves(run(rows, *self.given.unflatten(leaves)))

        def axes(prefix: Any, structure: Any) -> Sequence[int]:
            return jax.tree.leaves(jax.tree.broadcast(prefix, structure.unflatten([0] * structure.num_leaves)))

        return Work(function, axes(self.ins(rows), self.given), axes(self.outs(rows), self.found))


def call(
    run: Callable[..., Any],
    rows: Size,
    trees: tuple[Any, ...],
    ins: Callable[[Size], Any],
    outs: Callable[[Size], Any],
    smooth: Callable[..., Any],
) -> Any:
    """What ``run(rows, *trees)`` returns.

    Args:
      run: the work, for any number of rows, on trees of arrays; it mixes no rows and closes over no arrays.
      rows: in the batch.
      trees: the operands.
      ins: the axis of the batch in each array of ``trees`` for a number of rows, or `SHARED`, as prefixes of trees.
      outs: the same for what is returned.
      smooth: what returns the same and is differentiated in place of ``run``, which need not have a derivative.
    """
    leaves, given = jax.tree.flatten(trees)
    if has_explicit_sharding(*leaves):
        return smooth(rows, *trees)
    program, found = jax.make_jaxpr(lambda *a: run(rows, *given.unflatten(a)), return_shape=True)(*leaves)
    found = jax.tree.structure(found)
    return found.unflatten(_call(program, OfTrees(run, smooth, ins, outs, given, found), rows, leaves))


def _call(program: ClosedJaxpr, make: Make, rows: Size, arrays: Sequence[Array]) -> list[Array]:
    """The work as one operation, which knows how to be another."""
    return _work.bind(*arrays, program=program, make=make, rows=rows)


def _again(make: Make, rows: Size, arrays: Sequence[Array]) -> list[Array]:
    """`_call` of what ``make`` makes."""
    return _call(jax.make_jaxpr(make(rows, False).function)(*arrays), make, rows, arrays)


def _run(*arrays: Array, program: ClosedJaxpr, **_: Any) -> list[Array]:
    return jaxpr_as_fun(program)(*arrays)


class Mapped(NamedTuple):
    """Work mapped as it is. It has no batch any more, and is work all the same, which knows what its derivative is."""

    make: Make
    mapped: tuple[int | None, ...]
    size: Size

    def __call__(self, rows: Size, smooth: bool) -> Work:
        """The work for a number of rows."""
        work = self.make(rows, smooth)
        function = jax.vmap(work.function, self.mapped, axis_size=self.size)
        return Work(function, [SHARED] * len(work.ins), [SHARED] * len(work.outs))


def _mapped(
    arrays: Sequence[Array], mapped: Sequence[int | None], *, make: Make, rows: Size, **_: Any
) -> tuple[list[Array], list[int]]:
    """The rule of `jax.vmap`."""
    size = next(a.shape[m] for a, m in zip(arrays, mapped) if m is not None)
    here, there = make(rows, False), make(rows * size, False)
    shared = any(m is not None and axis == SHARED for m, axis in zip(mapped, here.ins))
    if shared or SHARED in here.outs:
        outs = _again(Mapped(make, tuple(mapped), size), rows, arrays)
        return outs, [0] * len(outs)

    def fold(a: Array, m: int | None, axis: int, to: int) -> Array:
        if axis == SHARED:
            return a
        a = jnp.broadcast_to(a, (size, *a.shape)) if m is None else jnp.moveaxis(a, m, 0)
        a = jnp.moveaxis(a, (0, 1 + axis), (to, to + 1))
        return a.reshape(*a.shape[:to], rows * size, *a.shape[to + 2 :])

    def unfold(a: Array, axis: int, to: int) -> Array:
        a = a.reshape(*a.shape[:axis], size, rows, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, (axis, axis + 1), (to, to + 1))

    outs = _again(make, rows * size, list(map(fold, arrays, mapped, here.ins, there.ins)))
    return list(map(unfold, outs, there.outs, here.outs)), list(here.outs)


def _tangent(primals: Sequence[Array], tangents: Sequence[Any], *, make: Make, rows: Size, **_: Any) -> Any:
    """The rule of `jax.jvp`: that of what is in it, for the tangents that are not zero."""
    moving = [not isinstance(d, ad.Zero) for d in tangents]
    function = make(rows, True).function

    def run(*moved: Array) -> Sequence[Array]:
        rest = iter(moved)
        return function(*(next(rest) if moves else a for a, moves in zip(primals, moving)))

    here, there = zip(*((a, d) for a, d, moves in zip(primals, tangents, moving) if moves))
    return jax.jvp(run, here, there)


class Transposed(NamedTuple):
    """The transpose of work in the operands that it is linear in: work on the cotangents and the other operands."""

    make: Make
    rows: Size
    operands: tuple[jax.ShapeDtypeStruct | None, ...]  # for ``rows``; None for one that it is not linear in

    def __call__(self, rows: Size, smooth: bool) -> Work:
        """The transpose for a number of rows."""
        before, work = self.make(self.rows, smooth), self.make(rows, smooth)
        linear = [a and self._for(rows, a, axis, to) for a, axis, to in zip(self.operands, before.ins, work.ins)]

        def function(*arrays: Array) -> Sequence[Array]:
            cotangents, known = arrays[: len(work.outs)], arrays[len(work.outs) :]

            def run(*unknown: Array) -> tuple[Array, ...]:
                some, others = iter(unknown), iter(known)
                return tuple(work.function(*(next(others) if a is None else next(some) for a in linear)))

            return jax.linear_transpose(run, *(a for a in linear if a is not None))(tuple(cotangents))

        of_known = tuple(axis for a, axis in zip(linear, work.ins) if a is None)
        return Work(
            function, (*work.outs, *of_known), tuple(axis for a, axis in zip(linear, work.ins) if a is not None)
        )

    def _for(self, rows: Size, a: jax.ShapeDtypeStruct, axis: int, to: int) -> jax.ShapeDtypeStruct:
        if axis == SHARED:
            return a
        others = [*a.shape[:axis], *a.shape[axis + 1 :]]
        return jax.ShapeDtypeStruct((*others[:to], rows, *others[to:]), a.dtype)


def _transpose(
    cotangents: Sequence[Any], *operands: Any, program: ClosedJaxpr, make: Make, rows: Size
) -> list[Array | None]:
    """The rule of backpropagation."""
    if all(isinstance(a, ad.Zero) for a in cotangents):
        return [None] * len(operands)
    unknown = tuple(
        jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) if ad.is_undefined_primal(a) else None for a in operands
    )
    known = [a for a in operands if not ad.is_undefined_primal(a)]
    given = [ad.instantiate_zeros(a) for a in cotangents]
    found = iter(_again(Transposed(make, rows, unknown), rows, [*given, *known]))
    return [None if a is None else next(found) for a in unknown]


_work = Primitive("batch")
_work.multiple_results = True
_work.def_impl(_run)
_work.def_abstract_eval(lambda *_, program, **__: program.out_avals)
mlir.register_lowering(_work, mlir.lower_fun(_run, multiple_results=True))
batching.primitive_batchers[_work] = _mapped
ad.primitive_jvps[_work] = _tangent
ad.primitive_transposes[_work] = _transpose
