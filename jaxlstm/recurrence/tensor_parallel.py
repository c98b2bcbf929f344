"""The reference with the units of a layer laid over the axis ``model`` of a mesh of devices, the batch over ``data``.

A device holds some of the units, all gates of each. A step then needs one exchange: every device has to see all of h,
which is gathered, or of its projection, to which each device adds its part; the rest is elementwise over units. Layer
normalisation needs two more for each mean and variance. The mesh is that of `jax.set_mesh`; without one, or with one
device along ``model``, there is nothing to exchange and this is the reference.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, apply_zoneout
from jaxlstm.params import Layer, State, Weights
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.recurrence import scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import advance, input_part, slabs

BATCH, UNITS = "data", "model"  # axes of the mesh


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time. The signature is that of `jaxlstm.recurrence`."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = {} if mesh.empty else dict(mesh.shape)
    if devices.get(UNITS, 1) == 1:
        return scan.run(cell, layer, xs, state, how)
    units = layer.forward.w_h.shape[0] // cell.num_gates
    if units % devices[UNITS]:
        raise ValueError(f"{units} hidden units cannot be shared out evenly over model={devices[UNITS]} devices")
    rows = BATCH if BATCH in devices else None
    of_h = UNITS if layer.forward.w_p is None else None  # a projected h is whole on every device

    def state_spec(state: State, *axes: str | None) -> State:
        return State(PartitionSpec(*axes, of_h), None if state.c is None else PartitionSpec(*axes, UNITS))  # pyright: ignore

    def noise_spec(noise: RegularizerMasks) -> RegularizerMasks:
        spec = jax.tree.map(lambda _: PartitionSpec(None, None, rows, UNITS), noise)
        return (
            spec
            if noise.zoneout_mask_h is None
            else spec._replace(zoneout_mask_h=PartitionSpec(None, None, rows, of_h))
        )

    apart = [_by_unit(cell, w) for w in layer.directions]
    arrays = (apart, xs, state, how.mask, how.resets, how.start, how.noise)
    over_time, weights = PartitionSpec(None, rows), list(map(_spec, apart))
    start = None if how.start is None else state_spec(how.start, None)
    specs = (
        weights,
        over_time,
        state_spec(state, None, rows),
        *_like(over_time, arrays[3:5]),
        start,
        noise_spec(how.noise),
    )

    def here(apart, xs, state, mask, resets, start, noise):  # what one device does
        if rows is not None:  # so that gradients of weights are summed over rows once, and not at every step
            apart, start = jax.tree.map(lambda a: lax.pcast(a, rows, to="varying"), (apart, start))
        directions = [_equations(cell, _stacked(w), how, state) for w in apart]
        mine = how._replace(mask=mask, resets=resets, start=start, noise=noise)
        ys, last = scan.over_time(directions, xs, state, mine)
        return jnp.stack(ys, axis=2).astype(how.dtype), last

    out = (PartitionSpec(None, rows, None, of_h), state_spec(state, None, rows))
    ys, last = jax.shard_map(here, in_specs=specs, out_specs=out)(*arrays)
    return ys.reshape(*ys.shape[:2], -1), last


def _by_unit(cell: Cell, w: Weights) -> Weights:
    """With ``(G, H, ...)`` for ``(G*H, ...)``, so that all gates of a unit go together."""
    parts = jax.tree.map(lambda a: a.reshape(cell.num_gates, -1, *a.shape[1:]), _of_gates(w))
    return _with(w, parts)


def _stacked(w: Weights) -> Weights:
    """The other way."""
    return _with(w, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), _of_gates(w)))


def _spec(w: Weights) -> Weights:
    """Where weights laid out by `_by_unit` lie; of ``(H,)``, ``(P, H)`` and ``(K, H)`` the last axis is units too."""
    spec = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), UNITS), w)
    return _with(spec, jax.tree.map(lambda _: PartitionSpec(None, UNITS), _of_gates(w)))


def _of_gates(w: Weights) -> tuple[Any, ...]:
    """The arrays that have rows for every gate."""
    return (w.w_x, w.w_h, w.b, *((None, None) if w.norm is None else (w.norm.x, w.norm.h)))


def _with(w: Weights, parts: tuple[Any, ...]) -> Weights:
    """``w`` with others for `_of_gates`."""
    w_x, w_h, b, x, h = parts
    return w._replace(w_x=w_x, w_h=w_h, b=b, norm=None if w.norm is None else w.norm._replace(x=x, h=h))


def _like(spec: PartitionSpec, tree: Any) -> Any:
    """The same for every array of a tree."""
    return jax.tree.map(lambda _: spec, tree)


def _equations(cell: Cell, weights: Weights, how: How, state: State) -> scan.Equations:
    """Those of the units that lie here."""
    dtype, sums = how.dtype, state.h.dtype

    @scan.puts_out_h
    def step(z_x: Array, before: State, noise: RegularizerMasks) -> State:
        h = before.h
        if weights.w_p is None:
            h = lax.all_gather(h.astype(dtype), UNITS, axis=1, tiled=True)  # (B, H): the one exchange of a step
        z, z_h = z_x, matvec(weights.w_h, h, dtype, sums)
        if weights.norm is None:
            z, z_h = z + z_h, None
        z, z_h = jax.tree.map(lambda a: slabs(a, cell.num_gates, -1), (z, z_h))
        c, m = advance(
            cell, weights, z, z_h, before.c, noise.candidate_mask, how.rates, axis=z_x.ndim - 1, across=UNITS
        )
        if weights.w_p is not None:
            m = lax.psum(matvec(weights.w_p, m, dtype, sums), UNITS)  # (B, P): the exchange with a projection
        return apply_zoneout(how.rates, noise, State(m, c), before)

    return scan.Equations(partial(input_part, weights, dtype=dtype, sums=sums), step)
