r"""The recurrence as a kernel whose weights stay on the chip: for TPUs, and in `hopper` for NVIDIA's Hopper GPUs.

On a TPU the recurrent weights are resident in VMEM, and time is an axis of the grid (`kernel.scan`).

The product of the input is taken outside, for all steps at once; the kernel takes that of the state and calls the
cell's ``gates``. All that is kept for the derivative is the path of the state, ``s_t = (h_t, c_t)``, for it is the
solution of equations that can be differentiated without a word on how they were solved::

    s_t  = step(s_{t-1}, p_t)                           p_t: the weights, and all that the step reads besides
    ds_t = J_t ds_{t-1} + (d step / d p_t) dp_t         J_t = d step / d s_{t-1}

The second line is linear in the tangents. Its right-hand side waits for no other step; the recurrence in ds is a second
kernel and its transpose, which runs backward in time, a third. `jax.lax.custom_linear_solve` makes of the two what
forward and reverse mode and higher derivatives need. With ``remat`` there are first derivatives only: `jax.checkpoint`
drops the rule under a second one, and what is left is a kernel that JAX cannot differentiate.

What it can do on a TPU has been seen in interpret mode, against the same suite as the other implementations, and in
programs lowered for a TPU and compiled for a v5e on a host without one. It has never run on one: its speed is unknown.

Several devices each run a kernel of their own, within ``jax.shard_map(..., check_vma=False)``.
"""

import bisect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.experimental.pallas import mosaic_gpu_sm90, mosaic_tpu_scan
from jaxlstm.experimental.pallas.step import (
    Given,
    Marks,
    Path,
    Static,
    elementwise,
    keep,
    laid_out,
    narrow,
    products,
    restart,
    starts,
    step,
    times,
)
from jaxlstm.params import Layer, State, Weights
from jaxlstm.recurrence import chunked_scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import input_part, slabs

MOST_ROWS, FEWEST_ROWS = 128, 32  # of the batch in one block


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, one direction after the other. The signature is that of `jaxlstm.recurrence`.

    ``how.unroll`` is the steps in one iteration of the grid; a GPU takes one step after the other.

    Raises:
      ValueError: without a TPU or a Hopper GPU, for a dtype that it does not have, for weights that do not fit into
        its memory, and on a GPU for what `hopper.check` names.
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
    static = Static(
        cell, how.rates, jnp.dtype(how.dtype), before.h.dtype, how.reverse, 0, how.unroll, mosaic_gpu_sm90.made_for()
    )
    fresh = jax.tree.map(lambda a: a[None], how.start)
    resets = how.resets
    if resets is not None and how.reverse:  # a fresh start is before the step that follows in the order of the run
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    taken, restarts = jax.tree.map(lambda a: a[..., None], (how.mask, resets))
    marks = Marks(taken, restarts, how.noise)
    mine, batch = laid_out(cell, weights), xs.shape[1]
    if static.hopper:
        mosaic_gpu_sm90.check(static, mine)
        static = mosaic_gpu_sm90.spread_out(static, before.h.shape[-1], batch)
    else:
        static = static._replace(rows=_rows_that_fit(static, mine, marks, batch))

    def over_time(before: State, steps: tuple[Array, Marks]) -> tuple[State, Array]:
        xs, marks = steps
        x = slabs(input_part(weights, xs, static.dtype, static.sums), cell.num_gates, -1)
        return _outputs(static, Given(mine, jnp.moveaxis(x, 0, 1), before, fresh), marks)

    if how.remat is None:
        last, ys = over_time(before, (xs, marks))
    else:  # between chunks only the state is kept; within one, all is computed again for the derivative
        last, ys = chunked_scan.over(
            jax.checkpoint(over_time), before, (xs, marks), size=how.remat, reverse=how.reverse
        )
    if how.resets is not None and how.reverse:  # a reset on the very first step is one of the state that is returned
        last = restart(how.resets[0, :, None], fresh, last)
    return ys, last


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _outputs(static: Static, given: Given, marks: Marks) -> tuple[State, Array]:
    """The last state and ``(T, B, P)`` outputs; where no step is taken, the held h."""
    if static.hopper:
        return mosaic_gpu_sm90.outputs(static, given, marks)

    def body(resident: Any, before: State, now: Any) -> tuple[State, Array]:
        w, fresh = resident
        x, marks = now
        after = step(static, w, x, marks, restart(marks.fresh, fresh, before))
        return after, after.h.astype(static.dtype)

    resident = (narrow(static, given.weights), given.fresh)
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
    if static.hopper:
        return mosaic_gpu_sm90.path(static, given, marks)

    def body(resident: Any, before: State, now: Any) -> tuple[State, State]:
        w, fresh = resident
        x, marks = now
        after = step(static, w, x, marks, restart(marks.fresh, fresh, before))
        return after, after

    resident = (narrow(static, given.weights), given.fresh)
    return Path(given.begin, _scan(static, body, resident, given.begin, (given.x, marks))[1])


@_path.defjvp
def _(static: Static, primals: Any, tangents: Any) -> Any:
    (given, marks), (d_given, _) = primals, tangents
    path = _path(static, given, marks)

    def steps(given: Given, path: Path) -> Path:
        """The right-hand side of the first equation, all steps at once."""
        start = starts(static, given, marks, path)
        return Path(given.begin, jax.vmap(partial(step, static, given.weights))(given.x, marks, start))

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
    if static.hopper:
        return mosaic_gpu_sm90.solve(static, given, marks, path, b)

    def body(w: Weights, before: State, now: Any) -> tuple[State, State]:
        x, marks, start, b = now
        d_start = restart(marks.fresh, None, before)
        d_after = jax.jvp(partial(step, static, w, x, marks), (start,), (d_start,))[1]
        after = jax.tree.map(jnp.add, d_after, b)
        return after, after

    over_time = (given.x, marks, starts(static, given, marks, path), b.after)
    return Path(b.begin, _scan(static, body, narrow(static, given.weights), b.begin, over_time)[1])


def _solve_transposed(static: Static, given: Given, marks: Marks, path: Path, b: Path) -> Path:
    """The transpose of `_solve`: what a loss with the slopes ``b`` along the path has in all, by its way through it."""
    if static.hopper:
        return mosaic_gpu_sm90.solve_transposed(static, given, marks, path, b)
    start = starts(static, given, marks, path)
    z, z_h = jax.vmap(partial(products, static, given.weights))(given.x, start.h)

    def body(resident: Any, after: State, now: Any) -> tuple[State, State]:
        w, w_h, w_p = resident
        z, z_h, c, marks, b = now
        after = jax.tree.map(jnp.add, after, b)
        d, d_start = jax.linear_transpose(partial(keep, static, marks), after, after)(after)
        dm = d.h if w_p is None else times(static, d.h, w_p)
        dz, dz_h, dc = jax.vjp(partial(elementwise, static, marks.noise, w), z, z_h, c)[1]((d.c, dm))
        slabs = jnp.unstack(dz if dz_h is None else dz_h)
        dh = sum((times(static, *pair) for pair in zip(slabs, jnp.unstack(w_h))), jnp.zeros_like(d_start.h))
        d_start = jax.tree.map(jnp.add, d_start, State(dh, dc))
        return restart(marks.fresh, None, d_start), after

    w = narrow(static, given.weights)
    w_h, w_p = jax.tree.map(partial(jnp.swapaxes, axis1=-1, axis2=-2), (w.w_h, w.w_p))
    resident = (w._replace(w_h=None, w_p=None), w_h, w_p)
    zeros = jax.tree.map(jnp.zeros_like, b.begin)
    begin, after = _scan(static, body, resident, zeros, (z, z_h, start.c, marks, b.after), backward=True)
    return Path(jax.tree.map(jnp.add, begin, b.begin), after)


def _scan(
    static: Static, body: mosaic_tpu_scan.Body, resident: Any, carry: Any, over_time: Any, *, backward: bool = False
) -> tuple[Any, Any]:
    """`kernel.scan`, in the order of the steps or ``backward``."""
    reverse = static.reverse ^ backward
    return mosaic_tpu_scan.scan(body, resident, carry, over_time, rows=static.rows, steps=static.steps, reverse=reverse)


def _rows_that_fit(static: Static, w: Weights, marks: Marks, batch: int) -> int:
    """The most rows in a block with which every kernel fits into VMEM.

    Raises:
      ValueError: if none does, or the dtype is not one of a TPU.
    """
    chip = mosaic_tpu_scan.chip()
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
    return mosaic_tpu_scan.footprint(
        mosaic_tpu_scan.Blocks(rows, static.steps, reverse=False), resident, state, over_time
    )
