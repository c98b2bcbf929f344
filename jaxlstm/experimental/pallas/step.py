"""One step, as the kernels take it: its operands, and its parts with the product of the state among them.

Arrays are batch-major, ``(B, H)``, in every function here.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import State, Weights
from jaxlstm.recurrence.step import advance


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    rates: RegularizerRates
    dtype: jnp.dtype  # of the operands of products, and of outputs
    sums: jnp.dtype  # of sums and state
    reverse: bool
    rows: int  # of the batch in one block; on a Hopper GPU, in one set of blocks
    steps: int  # of time in one iteration of the grid
    hopper: bool = False  # whether it is compiled for a Hopper GPU, not for a TPU
    spread: str = ""  # there, what the recurrent weights are spread over: "cluster" or "grid"


class Given(NamedTuple):
    """What the path depends on, and a derivative can be asked for."""

    weights: Weights  # laid out by `laid_out`
    x: Array  # (T, G, B, H): W_x x + b; with layer normalisation W_x x
    begin: State  # (B, .)
    fresh: State | None  # (1, .) from which a sequence starts at a reset; None for zeros


class Marks(NamedTuple):
    """What else a step reads."""

    taken: Array | None  # (T, B, 1) bool: where False the state is held
    fresh: Array | None  # (T, B, 1) bool: where True the state starts anew before the step
    noise: RegularizerMasks  # (T, B, .)


class Path(NamedTuple):
    """The state all along."""

    begin: State  # (B, .)
    after: State  # (T, B, .), after each step


def laid_out(cell: Cell, w: Weights) -> Weights:
    """The weights that the kernel reads: matrices for the right of a product, vectors over all gates with two axes."""
    matrix = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    by_gate = partial(jnp.reshape, shape=(cell.num_gates, -1))
    return Weights(
        w_x=None,  # pyright: ignore[reportArgumentType]
        w_h=matrix(w.w_h.reshape(cell.num_gates, -1, w.w_h.shape[1])),  # (G, P, H)
        b=None if w.norm is None or w.b is None else by_gate(w.b),
        w_p=None if w.w_p is None else matrix(w.w_p),  # (H, P)
        w_c=w.w_c,
        norm=None if w.norm is None else w.norm._replace(x=by_gate(w.norm.x), h=by_gate(w.norm.h)),
    )


def times(static: Static, x: Array, w: Array) -> Array:
    """``x W``: operands in ``dtype``, sums and result in ``sums``."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x.astype(static.dtype), w.astype(static.dtype), contract, preferred_element_type=static.sums)


def products(static: Static, w: Weights, x: Array, h: Array) -> tuple[Array, Array | None]:
    """``z`` of a step; with layer normalisation its two parts."""
    z_h = jnp.stack([times(static, h, slab) for slab in jnp.unstack(w.w_h)])
    return (x + z_h, None) if w.norm is None else (x, z_h)


def elementwise(
    static: Static, noise: RegularizerMasks, w: Weights, z: Array, z_h: Array | None, c: Array | None
) -> tuple[Array | None, Array]:
    """`jaxlstm.step.advance` for arrays (B, H)."""
    return advance(static.cell, w, z, z_h, c, noise.candidate_mask, static.rates, axis=1)


def keep(static: Static, marks: Marks, after: State, before: State) -> State:
    """The state after a step, but for what zoneout or the mask leaves as it was."""
    after = apply_zoneout(static.rates, marks.noise, after, before)
    if marks.taken is None:
        return after
    return jax.tree.map(partial(where, marks.taken), after, before)


def restart(rows: Array | None, fresh: State | None, state: State) -> State:
    """``state (..., B, .)`` with the marked rows ``(..., B, 1)`` at ``fresh (1, .)``, zeros where that is None."""
    if rows is None:
        return state
    if fresh is None:
        return jax.tree.map(lambda a: where(rows, jnp.zeros_like(a), a), state)
    return jax.tree.map(
        lambda a, b: where(rows, jnp.broadcast_to(b.reshape(*[1] * (a.ndim - 2), *b.shape), a.shape), a), state, fresh
    )


def where(rows: Array, a: Array, b: Array) -> Array:
    """``a`` in the marked rows, else ``b``."""
    return jnp.where(jnp.broadcast_to(rows, a.shape), a, b)


def step(static: Static, w: Weights, x: Array, marks: Marks, start: State) -> State:
    """One step."""
    c, m = elementwise(static, marks.noise, w, *products(static, w, x, start.h), start.c)
    h = m if w.w_p is None else times(static, m, w.w_p)
    return keep(static, marks, State(h, c), start)


def starts(static: Static, given: Given, marks: Marks, path: Path) -> State:
    """The states from which the steps are taken: those after the step before, or of a fresh start."""

    def shift(first: Array, after: Array) -> Array:
        return jnp.concatenate([after[1:], first[None]] if static.reverse else [first[None], after[:-1]])

    return restart(marks.fresh, given.fresh, jax.tree.map(shift, path.begin, path.after))


def narrow(static: Static, w: Weights) -> Weights:
    """Weights as they enter products."""
    w_h, w_p = jax.tree.map(lambda a: a.astype(static.dtype), (w.w_h, w.w_p))
    return w._replace(w_h=w_h, w_p=w_p)
