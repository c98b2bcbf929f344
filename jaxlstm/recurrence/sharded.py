"""The reference with the units of a layer laid over the axis ``model`` of a mesh of devices, the batch over ``data``.

A device holds some of the units, all gates of each. A step then needs one exchange: every device has to see all of h,
which is gathered; the rest is elementwise over units. The mesh is that of `jax.set_mesh`; without one, or with one
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
from jaxlstm.dropout import Noise, zone_out
from jaxlstm.products import product
from jaxlstm.recurrence import scan
from jaxlstm.recurrence.how import How
from jaxlstm.step import advance, input_part, slabs
from jaxlstm.types import Layer, State, Weights

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
    if layer.forward.norm is not None or layer.forward.w_p is not None:
        raise ValueError("implementation='sharded' keeps units apart: no layer_norm and no proj_size over its devices")
    if units % devices[UNITS]:
        raise ValueError(f"{units} hidden units cannot be shared out evenly over model={devices[UNITS]} devices")

    def by_unit(w: Array) -> Array:
        """From ``(G*H, ...)`` to ``(G, H, ...)``."""
        return w.reshape(cell.num_gates, units, *w.shape[1:])

    apart = jax.tree.map(by_unit, [w._replace(w_c=None) for w in layer.directions])
    peepholes = [w.w_c for w in layer.directions]
    rows = BATCH if BATCH in devices else None

    def spec(*axes: str | None) -> Any:
        return lambda a: PartitionSpec(*axes[: a.ndim])

    arrays = (apart, peepholes, xs, state, how.mask, how.resets, how.start, how.noise)
    specs = tuple(
        jax.tree.map(of, a)
        for of, a in zip(
            (
                spec(None, UNITS),
                spec(None, UNITS),
                spec(None, rows, None),
                spec(None, rows, UNITS),
                spec(None, rows),
                spec(None, rows),
                spec(None, UNITS),
                spec(None, None, rows, UNITS),
            ),
            arrays,
        )
    )

    def here(apart, peepholes, xs, state, mask, resets, start, noise):  # what one device does
        if rows is not None:  # so that gradients of weights are summed over rows once, and not at every step
            apart, peepholes, start = jax.tree.map(
                lambda a: lax.pcast(a, rows, to="varying"), (apart, peepholes, start)
            )
        directions = [
            _equations(cell, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)._replace(w_c=w_c), how, state)
            for w, w_c in zip(apart, peepholes)
        ]
        mine = how._replace(mask=mask, resets=resets, start=start, noise=noise)
        ys, last = scan.over_time(directions, xs, state, mine)
        return jnp.stack(ys, axis=2).astype(how.dtype), last

    out = (PartitionSpec(None, rows, None, UNITS), jax.tree.map(spec(None, rows, UNITS), state))
    ys, last = jax.shard_map(here, in_specs=specs, out_specs=out)(*arrays)
    return ys.reshape(*ys.shape[:2], -1), last


def _equations(cell: Cell, weights: Weights, how: How, state: State) -> scan.Equations:
    """Those of the units that lie here."""

    @scan.puts_out_h
    def step(z_x: Array, before: State, noise: Noise) -> State:
        h = lax.all_gather(before.h.astype(how.dtype), UNITS, axis=1, tiled=True)  # (B, H): the one exchange of a step
        z = slabs(z_x + product(weights.w_h, h, how.dtype, z_x.dtype), cell.num_gates, -1)
        c, m = advance(cell, weights, z, None, before.c, noise.kept, how.rates, axis=z_x.ndim - 1)
        return zone_out(how.rates, noise, State(m, c), before)

    return scan.Equations(partial(input_part, weights, dtype=how.dtype, sums=state.h.dtype), step)
