"""The recurrences of `jaxlstm.experimental.pallas.api` as kernels for Hopper GPUs, each a `blocks.scan`.

The blocks that share the weights are those of a cluster or, where they do not fit into one, of the grid. Forward they
send h, for a tangent that of h, and multiply by their rows of ``W_h``. Backward they send the slopes of z, and multiply
by their rows of the transpose. The rest of a step is elementwise: the cell's ``gates``, or their derivative, and what
the mask, resets and regularisers make of it.

The numbers have been seen in the interpreter that Pallas has for these kernels, with blocks that wait for one another,
and both have been compiled for an H100, down to machine code, on a host without a GPU. They have never run on one. Not
their speed alone is unknown, but whether what a block has written, and waited for, is there for the others beyond the
barrier: an interpreter takes that for granted, and of the grid it has not seen the semaphore either.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm.experimental.pallas import mosaic_gpu_cluster, mosaic_gpu_grid, mosaic_gpu_scan, mosaic_tpu_scan
from jaxlstm.experimental.pallas.step import (
    Given,
    Marks,
    Path,
    Static,
    elementwise,
    keep,
    products,
    restart,
    starts,
    times,
)
from jaxlstm.params import State, Weights


def made_for() -> bool:
    """Whether kernels are made for a GPU: the one at hand, or as `kernel.making_for` says."""
    said = mosaic_tpu_scan.making_for.value
    return isinstance(said, mosaic_tpu_scan.Hopper) or (said is None and jax.default_backend() == "gpu")


def check(static: Static, w: Weights) -> None:
    """Refuse, by name, what the kernel for Hopper GPUs cannot do.

    Raises:
      ValueError: with what was received.
    """
    if mosaic_tpu_scan.making_for.value is None:
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", "none"))
        if not capability.startswith("9."):
            raise ValueError(
                "implementation='pallas' is a kernel for TPUs and Hopper GPUs, of compute capability 9.x; got a "
                f"{device.device_kind} of compute capability {capability}"
            )
    if static.dtype != jnp.bfloat16 or static.sums != jnp.float32:
        raise ValueError(
            "implementation='pallas' takes dtype=bfloat16 with sums in float32 on a Hopper GPU, got products in "
            f"{static.dtype} and sums in {static.sums}; float32 would be products in TF32, which are not taken unasked"
        )
    lacking = {"layer normalisation": w.norm is not None, "a projection": w.w_p is not None}
    for what, present in lacking.items():
        if present:
            raise ValueError(f"implementation='pallas' does not take {what} on a Hopper GPU")


def spread_out(static: Static, units: int, batch: int) -> Static:
    """With what the weights are spread over: a cluster if they fit into one, else the grid.

    Raises:
      ValueError: if they fit into neither.
    """
    gates = static.cell.num_gates
    rows = mosaic_gpu_cluster.rows_that_fit(gates, units, batch)
    if rows is not None:
        return static._replace(spread="cluster", rows=rows)
    return static._replace(spread="grid", rows=mosaic_gpu_grid.rows_that_fit(gates, units, batch))


def outputs(static: Static, given: Given, marks: Marks) -> tuple[State, Array]:
    """The last state and ``(T, B, H)`` outputs; where no step is taken, the held h."""
    last, sent, out = _forward(static, given, marks, lambda after: None if marks.fresh is None else _h(static, after))
    return last, sent[:, 0] if out is None else out


def path(static: Static, given: Given, marks: Marks) -> Path:
    """The states of all steps."""
    return Path(given.begin, _forward(static, given, marks, lambda after: after)[2])


def _h(static: Static, after: State) -> Array:
    return after.h.astype(static.dtype)


def _forward(static: Static, given: Given, marks: Marks, out: Any) -> tuple[State, Array, Any]:
    """The steps, and of each what ``out`` makes of the state after it."""

    def body(resident: Any, z_h: Array, start: State, now: Any) -> tuple[State, Array, Any]:
        w, fresh = resident
        x, marks, restarts = now
        after = _after(static, w, x + z_h, marks, start)
        start = restart(restarts, fresh, after)
        return start, start.h[None], out(after)

    first, following = _restarts(static, marks)
    begin = restart(first, given.fresh, given.begin)
    resident = (Weights(None, None, w_c=given.weights.w_c), given.fresh)  # pyright: ignore[reportArgumentType]
    w_h = jnp.swapaxes(given.weights.w_h, -1, -2)[:, None]
    return _scan(static)(body, w_h, begin.h[None], resident, begin, (given.x, marks, following))


def solve(static: Static, given: Given, marks: Marks, path: Path, b: Path) -> Path:
    """``ds`` of the path's tangent equation, from its right-hand side."""
    start = starts(static, given, marks, path)
    z = _pre_activations(static, given, start)

    def body(w: Weights, dz: Array, d_start: State, now: Any) -> tuple[State, Array, State]:
        z, c, marks, restarts, b = now
        # h itself is kept or not, in a linear way: its value has no part in the tangent.
        start = State(jnp.zeros_like(d_start.h), c)
        d_after = jax.jvp(lambda z, start: _after(static, w, z, marks, start), (z, start), (dz, d_start))[1]
        after = jax.tree.map(jnp.add, d_after, b)
        d_start = restart(restarts, None, after)
        return d_start, d_start.h[None], after

    first, following = _restarts(static, marks)
    begin = restart(first, None, b.begin)
    resident = Weights(None, None, w_c=given.weights.w_c)  # pyright: ignore[reportArgumentType]
    w_h = jnp.swapaxes(given.weights.w_h, -1, -2)[:, None]
    over_time = (z, start.c, marks, following, b.after)
    return Path(b.begin, _scan(static)(body, w_h, begin.h[None], resident, begin, over_time)[2])


def solve_transposed(static: Static, given: Given, marks: Marks, path: Path, b: Path) -> Path:
    """The transpose of `solve`."""
    start = starts(static, given, marks, path)
    z = _pre_activations(static, given, start)

    def body(w: Weights, dh: Array, held: State, now: Any) -> tuple[State, Array, State]:
        z, c, marks, restarts, b = now
        d_start = restart(restarts, None, State(held.h + dh[0], held.c))  # of the step that follows
        after = jax.tree.map(jnp.add, d_start, b)
        d, held = jax.linear_transpose(lambda after, start: keep(static, marks, after, start), after, after)(after)
        dz, dc = jax.vjp(lambda z, c: elementwise(static, marks.noise, w, z, None, c), z, c)[1]((d.c, d.h))
        return State(held.h, None if dc is None else held.c + dc), dz, after

    first, following = _restarts(static, marks)
    resident = Weights(None, None, w_c=given.weights.w_c)  # pyright: ignore[reportArgumentType]
    zeros = jax.tree.map(jnp.zeros_like, b.begin)
    over_time = (z, start.c, marks, following, b.after)
    w = given.weights.w_h[None]
    held, dz, after = _scan(static, backward=True)(body, w, jnp.zeros_like(z[0]), resident, zeros, over_time)
    dz = dz[-1 if static.reverse else 0]
    dh = jnp.stack(list(map(partial(times, static), dz, jnp.swapaxes(given.weights.w_h, -1, -2)))).sum(0)
    begin = restart(first, None, State(held.h + dh, held.c))
    return Path(jax.tree.map(jnp.add, begin, b.begin), after)


def _after(static: Static, w: Weights, z: Array, marks: Marks, start: State) -> State:
    """The state after a step."""
    c, h = elementwise(static, marks.noise, w, z, None, start.c)
    return keep(static, marks, State(h, c), start)


def _pre_activations(static: Static, given: Given, start: State) -> Array:
    """``z (T, G, B, H)`` of all steps, from the states they are taken from."""
    return jax.vmap(lambda x, h: products(static, given.weights, x, h)[0])(given.x, start.h)


def _restarts(static: Static, marks: Marks) -> tuple[Array | None, Array | None]:
    """Where a fresh start comes before the first step, ``(B, 1)``, and where before the step that follows each."""
    if marks.fresh is None:
        return None, None
    none = jnp.zeros_like(marks.fresh[:1])
    if static.reverse:
        return marks.fresh[-1], jnp.concatenate([none, marks.fresh[:-1]])
    return marks.fresh[0], jnp.concatenate([marks.fresh[1:], none])


def _scan(static: Static, *, backward: bool = False) -> Callable[..., tuple[Any, Array, Any]]:
    """`blocks.scan`, in the order of the steps or ``backward``."""
    form, kind = {
        "cluster": (mosaic_gpu_cluster.form, mosaic_gpu_scan.Block),
        "grid": (mosaic_gpu_grid.form, mosaic_gpu_grid.Block),
    }[static.spread]
    return partial(mosaic_gpu_scan.scan, partial(form, rows=static.rows, reverse=static.reverse ^ backward), kind)
