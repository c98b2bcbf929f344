r"""The recurrence as a TPU kernel: recurrent weights resident in VMEM, time an axis of the grid (`kernel.scan`).

The product of the input is taken outside, for all steps at once; the kernel takes that of the state and calls the
cell's ``gates``. All that is kept for the derivative is the path of the state, ``s_t = (h_t, c_t)``, for it is the
solution of equations that can be differentiated without a word on how they were solved::

    s_t  = step(s_{t-1}, p_t)                           p_t: the weights, and all that the step reads besides
    ds_t = J_t ds_{t-1} + (d step / d p_t) dp_t         J_t = d step / d s_{t-1}

The second line is linear in the tangents. Its right-hand side waits for no other step; the recurrence in ds is a second
kernel and its transpose, which runs backward in time, a third. `jax.lax.custom_linear_solve` makes of the two what
forward and reverse mode and higher derivatives need. With ``remat`` there are first derivatives only: `jax.checkpoint`
drops the rule under a second one, and what is left is a kernel that JAX cannot differentiate.

What it can do has been seen in interpret mode, against the same suite as the other implementations, and in programs
lowered for a TPU and compiled for a v5e on a host without one. It has never run on a TPU: its speed is unknown.

Several devices each run a kernel of their own, within ``jax.shard_map(..., check_vma=False)``.
"""

import bisect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import Noise, Rates, zone_out
from jaxlstm.recurrence import chunks, kernel
from jaxlstm.recurrence.how import How
from jaxlstm.step import advance, input_part, slabs
from jaxlstm.types import Layer, State, Weights

MOST_ROWS, FEWEST_ROWS = 128, 32  # of the batch in one block


class Static(NamedTuple):
    """What is known when the program is compiled."""

    cell: Cell
    rates: Rates
    dtype: jnp.dtype  # of the operands of products, and of outputs
    sums: jnp.dtype  # of sums and state
    reverse: bool
    rows: int  # of the batch in one block
    steps: int  # of time in one iteration of the grid


class Given(NamedTuple):
    """What the path depends on, and a derivative can be asked for."""

    weights: Weights  # laid out by `_laid_out`
    x: Array  # (T, G, B, H): W_x x + b; with layer normalisation W_x x
    begin: State  # (B, .)
    fresh: State | None  # (1, .) from which a sequence starts at a reset; None for zeros


class Marks(NamedTuple):
    """What else a step reads."""

    taken: Array | None  # (T, B, 1) bool: where False the state is held
    fresh: Array | None  # (T, B, 1) bool: where True the state starts anew before the step
    noise: Noise  # (T, B, .)


class Path(NamedTuple):
    """The state all along."""

    begin: State  # (B, .)
    after: State  # (T, B, .), after each step


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`.

    ``how.unroll`` is the steps in one iteration of the grid.

    Raises:
      ValueError: without a TPU, for a dtype that it does not have, and for weights that do not fit into its VMEM.
    """
    explicit = jax.typeof(xs).sharding.mesh.explicit_axes
    if explicit:
        raise ValueError(
            "implementation='pallas' runs on each device by itself, within jax.shard_map(..., check_vma=False); got "
            f"inputs on a mesh with the explicit axes {explicit}"
        )
    ys, last = [], []
    for d, weights in enumerate(layer.directions):
        before, start, noise = jax.tree.map(lambda a: a[d], (state, how.start, how.noise))  # noqa: B023
        mine = how._replace(start=start, noise=noise, reverse=how.reverse ^ (d == 1))
        y, after = _direction(cell, weights, xs, before, mine)
        ys.append(y)
        last.append(after)
    return jnp.concatenate(ys, axis=-1), jax.tree.map(lambda *a: jnp.stack(a), *last)


def _direction(cell: Cell, weights: Weights, xs: Array, before: State, how: How) -> tuple[Array, State]:
    """One direction: outputs ``(T, B, P)`` and the last state."""
    static = Static(cell, how.rates, jnp.dtype(how.dtype), before.h.dtype, how.reverse, 0, how.unroll)
    fresh = jax.tree.map(lambda a: a[None], how.start)
    resets = how.resets
    if resets is not None and how.reverse:  # a fresh start is before the step that follows in the order of the run
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    taken, restarts = jax.tree.map(lambda a: a[..., None], (how.mask, resets))
    marks = Marks(taken, restarts, how.noise)
    laid_out = _laid_out(cell, weights)
    static = static._replace(rows=_rows_that_fit(static, laid_out, marks, xs.shape[1]))

    def over_time(before: State, steps: tuple[Array, Marks]) -> tuple[State, Array]:
        xs, marks = steps
        x = slabs(input_part(weights, xs, static.dtype, static.sums), cell.num_gates, -1)
        return _outputs(static, Given(laid_out, jnp.moveaxis(x, 0, 1), before, fresh), marks)

    if how.remat is None:
        last, ys = over_time(before, (xs, marks))
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunks.over(jax.checkpoint(over_time), before, (xs, marks), size=how.remat, reverse=how.reverse)
    if how.resets is not None and how.reverse:  # a reset on the very first step is one of the state that is returned
        last = _restart(how.resets[0, :, None], fresh, last)
    return ys, last


def _laid_out(cell: Cell, w: Weights) -> Weights:
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


def _times(static: Static, x: Array, w: Array) -> Array:
    """``x W``: operands in ``dtype``, sums and result in ``sums``."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x.astype(static.dtype), w.astype(static.dtype), contract, preferred_element_type=static.sums)


def _products(static: Static, w: Weights, x: Array, h: Array) -> tuple[Array, Array | None]:
    """``z`` of a step; with layer normalisation its two parts."""
    z_h = jnp.stack([_times(static, h, slab) for slab in jnp.unstack(w.w_h)])
    return (x + z_h, None) if w.norm is None else (x, z_h)


def _advance(
    static: Static, noise: Noise, w: Weights, z: Array, z_h: Array | None, c: Array | None
) -> tuple[Array | None, Array]:
    """`jaxlstm.step.advance` for arrays (B, H)."""
    return advance(static.cell, w, z, z_h, c, noise.kept, static.rates, axis=1)


def _keep(static: Static, marks: Marks, after: State, before: State) -> State:
    """The state after a step, but for what zoneout or the mask leaves as it was."""
    after = zone_out(static.rates, marks.noise, after, before)
    if marks.taken is None:
        return after
    return jax.tree.map(partial(_where, marks.taken), after, before)


def _restart(rows: Array | None, fresh: State | None, state: State) -> State:
    """``state (..., B, .)`` with the marked rows ``(..., B, 1)`` at ``fresh (1, .)``, zeros where that is None."""
    if rows is None:
        return state
    if fresh is None:
        return jax.tree.map(lambda a: _where(rows, jnp.zeros_like(a), a), state)
    return jax.tree.map(
        lambda a, b: _where(rows, jnp.broadcast_to(b.reshape(*[1] * (a.ndim - 2), *b.shape), a.shape), a), state, fresh
    )


def _where(rows: Array, a: Array, b: Array) -> Array:
    """``a`` in the marked rows, else ``b``."""
    return jnp.where(jnp.broadcast_to(rows, a.shape), a, b)


def _step(static: Static, w: Weights, x: Array, marks: Marks, start: State) -> State:
    """One step."""
    c, m = _advance(static, marks.noise, w, *_products(static, w, x, start.h), start.c)
    h = m if w.w_p is None else _times(static, m, w.w_p)
    return _keep(static, marks, State(h, c), start)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _outputs(static: Static, given: Given, marks: Marks) -> tuple[State, Array]:
    """The last state and ``(T, B, P)`` outputs; where no step is taken, the held h."""

    def body(resident: Any, before: State, now: Any) -> tuple[State, Array]:
        w, fresh = resident
        x, marks = now
        after = _step(static, w, x, marks, _restart(marks.fresh, fresh, before))
        return after, after.h.astype(static.dtype)

    resident = (_narrow(static, given.weights), given.fresh)
    return _scan(static, body, resident, given.begin, (given.x, marks))


@_outputs.defjvp
def _(static: Static, primals: Any, tangents: Any) -> Any:
    (given, marks), (d_given, _) = primals, tangents

    def outputs(given: Given) -> tuple[State, Array]:
        after = _path(static, given, marks).after
        return jax.tree.map(lambda a: a[0 if static.reverse else -1], after), after.h.astype(static.dtype)

    return jax.jvp(outputs, (given,), (d_given,))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _path(static: Static, given: Given, marks: Marks) -> Path:
    """The states that solve the equations above."""

    def body(resident: Any, before: State, now: Any) -> tuple[State, State]:
        w, fresh = resident
        x, marks = now
        after = _step(static, w, x, marks, _restart(marks.fresh, fresh, before))
        return after, after

    resident = (_narrow(static, given.weights), given.fresh)
    return Path(given.begin, _scan(static, body, resident, given.begin, (given.x, marks))[1])


@_path.defjvp
def _(static: Static, primals: Any, tangents: Any) -> Any:
    (given, marks), (d_given, _) = primals, tangents
    path = _path(static, given, marks)

    def steps(given: Given, path: Path) -> Path:
        """The right-hand side of the first equation, all steps at once."""
        start = _starts(static, given, marks, path)
        return Path(given.begin, jax.vmap(partial(_step, static, given.weights))(given.x, marks, start))

    @jax.checkpoint  # or the partials of all steps would be kept
    def by_given(given: Given, path: Path, d_given: Given) -> Path:
        return jax.jvp(lambda given: steps(given, path), (given,), (d_given,))[1]

    def by_path(d: Path) -> Path:
        return jax.jvp(lambda path: steps(given, path), (path,), (d,))[1]

    # The solve is transposed only where every part of b depends on a tangent, or seems to. (A barrier would make it
    # seem so too, but JAX 0.12 does not transpose one of which some parts are constant.)
    nothing: Any = sum(0 * jnp.ravel(d)[:1].sum() for d in jax.tree.leaves(d_given))
    b = jax.tree.map(lambda a: a + jnp.broadcast_to(nothing.astype(a.dtype), a.shape), by_given(given, path, d_given))
    return path, lax.custom_linear_solve(
        lambda d: jax.tree.map(jnp.subtract, d, by_path(d)),
        b,
        lambda _, b: _solve(static, given, marks, path, b),
        lambda _, b: _solve_transposed(static, given, marks, path, b),
    )


def _solve(static: Static, given: Given, marks: Marks, path: Path, b: Path) -> Path:
    """``ds`` of the second equation, from its right-hand side."""

    def body(w: Weights, before: State, now: Any) -> tuple[State, State]:
        x, marks, start, b = now
        d_start = _restart(marks.fresh, None, before)
        d_after = jax.jvp(partial(_step, static, w, x, marks), (start,), (d_start,))[1]
        after = jax.tree.map(jnp.add, d_after, b)
        return after, after

    over_time = (given.x, marks, _starts(static, given, marks, path), b.after)
    return Path(b.begin, _scan(static, body, _narrow(static, given.weights), b.begin, over_time)[1])


def _solve_transposed(static: Static, given: Given, marks: Marks, path: Path, b: Path) -> Path:
    """The transpose of `_solve`: what a loss with the slopes ``b`` along the path has in all, by its way through it."""
    start = _starts(static, given, marks, path)
    z, z_h = jax.vmap(partial(_products, static, given.weights))(given.x, start.h)

    def body(resident: Any, after: State, now: Any) -> tuple[State, State]:
        w, w_h, w_p = resident
        z, z_h, c, marks, b = now
        after = jax.tree.map(jnp.add, after, b)
        d, d_start = jax.linear_transpose(partial(_keep, static, marks), after, after)(after)
        dm = d.h if w_p is None else _times(static, d.h, w_p)
        dz, dz_h, dc = jax.vjp(partial(_advance, static, marks.noise, w), z, z_h, c)[1]((d.c, dm))
        slabs = jnp.unstack(dz if dz_h is None else dz_h)
        dh = sum((_times(static, *pair) for pair in zip(slabs, jnp.unstack(w_h))), jnp.zeros_like(d_start.h))
        d_start = jax.tree.map(jnp.add, d_start, State(dh, dc))
        return _restart(marks.fresh, None, d_start), after

    w = _narrow(static, given.weights)
    w_h, w_p = jax.tree.map(partial(jnp.swapaxes, axis1=-1, axis2=-2), (w.w_h, w.w_p))
    resident = (w._replace(w_h=None, w_p=None), w_h, w_p)
    zeros = jax.tree.map(jnp.zeros_like, b.begin)
    begin, after = _scan(static, body, resident, zeros, (z, z_h, start.c, marks, b.after), backward=True)
    return Path(jax.tree.map(jnp.add, begin, b.begin), after)


def _starts(static: Static, given: Given, marks: Marks, path: Path) -> State:
    """The states from which the steps are taken: those after the step before, or of a fresh start."""

    def shift(first: Array, after: Array) -> Array:
        return jnp.concatenate([after[1:], first[None]] if static.reverse else [first[None], after[:-1]])

    return _restart(marks.fresh, given.fresh, jax.tree.map(shift, path.begin, path.after))


def _narrow(static: Static, w: Weights) -> Weights:
    """Weights as they enter products."""
    w_h, w_p = jax.tree.map(lambda a: a.astype(static.dtype), (w.w_h, w.w_p))
    return w._replace(w_h=w_h, w_p=w_p)


def _scan(
    static: Static, body: kernel.Body, resident: Any, carry: Any, over_time: Any, *, backward: bool = False
) -> tuple[Any, Any]:
    """`kernel.scan`, in the order of the steps or ``backward``."""
    reverse = static.reverse ^ backward
    return kernel.scan(body, resident, carry, over_time, rows=static.rows, steps=static.steps, reverse=reverse)


def _rows_that_fit(static: Static, w: Weights, marks: Marks, batch: int) -> int:
    """The most rows in a block with which every kernel fits into VMEM.

    Raises:
      ValueError: if none does, or the dtype is not one of a TPU.
    """
    chip = kernel.chip()
    rows = _even_blocks(batch, MOST_ROWS)
    if chip is None:
        return rows
    if static.sums != jnp.float32 or static.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"implementation='pallas' takes float32 and bfloat16 on a TPU, got products in {static.dtype} and sums in "
            f"{static.sums}"
        )
    gates, outputs, units = w.w_h.shape
    # The rest is for what the compiler adds: on a v5e, 6.5 MiB at 2688 units of float32.
    most = chip.vmem_capacity_bytes * 15 // 16

    def fits(units: int, rows: int) -> bool:
        return _footprint(static, w, marks, units, rows) <= most

    while rows > FEWEST_ROWS and not fits(units, rows):
        rows = _even_blocks(batch, max(FEWEST_ROWS, rows // 2))
    if fits(units, rows):
        return rows
    largest = bisect.bisect_left(range(1, units), True, key=lambda n: not fits(n, rows))
    weights = gates * outputs * units * static.dtype.itemsize / 2**20
    whole = _footprint(static, w, marks, units, rows) / 2**20
    raise ValueError(
        f"implementation='pallas' keeps the recurrent weights in VMEM: {gates} x {outputs} x {units} of "
        f"{static.dtype.name} are {weights:.1f} MiB, with the blocks of {rows} sequences {whole:.1f} MiB; a "
        f"{chip.chip_version} has {most / 2**20:.1f} MiB for them, and hidden_size fits up to {largest}"
    )


def _even_blocks(batch: int, most: int) -> int:
    """The rows of a block, at most ``most`` or little more, where a batch is cut into as few as that needs."""
    blocks = max(1, -(-batch // most))
    return batch if blocks == 1 else -(-batch // blocks // 16) * 16


def _footprint(static: Static, w: Weights, marks: Marks, units: int, rows: int) -> int:
    """Bytes of VMEM of the largest kernel of a layer like this one with ``units``."""

    def array(*shape: int, dtype: Any = static.sums) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    gates, outputs, _ = w.w_h.shape
    outputs = units if w.w_p is None else outputs
    resident = [array(gates, outputs, units, dtype=static.dtype)]
    if w.w_p is not None:
        resident.append(array(units, outputs, dtype=static.dtype))
    state = State(array(1, outputs), array(1, units) if static.cell.has_cell_state else None)
    step = State(array(1, 1, outputs), array(1, 1, units) if static.cell.has_cell_state else None)
    pre_activations = [array(1, gates, 1, units)] * (1 if w.norm is None else 2)
    noise = jax.tree.map(lambda a: array(1, 1, units), marks.noise)
    over_time = (pre_activations, marks.taken, marks.fresh, noise, [step] * 3)  # the states before, b and the result
    return kernel.footprint(kernel.Blocks(rows, static.steps, reverse=False), resident, state, over_time)
