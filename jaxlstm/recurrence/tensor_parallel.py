"""The reference backend with the hidden units sharded over the mesh axis ``model`` and the batch over ``data``.

Each device holds some of the units, with all gates of each. A step needs one exchange between devices: of h, which is
gathered because every device reads all of it, or of its projection, which is summed over devices; the rest is
elementwise over units. Layer normalization needs two more exchanges per mean and variance. The mesh is set by
`jax.set_mesh`; without a mesh, or with one device along ``model``, this is the reference backend.
"""

from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import State, Weights
from jaxlstm.recurrence.chunked_scan import layer_equations, scan_directions
from jaxlstm.recurrence.context import Direction, Results, ScanContext
from jaxlstm.recurrence.step import require_form

BATCH_AXIS, UNITS_AXIS = "data", "model"  # names of mesh axes

Tree = TypeVar("Tree")


def run(cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
    """Runs the directions of a layer one after the other; see `jaxlstm.recurrence.context`.

    Raises:
      ValueError: if the devices along ``model`` do not divide the hidden size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = {} if mesh.empty else dict(mesh.shape)
    if devices.get(UNITS_AXIS, 1) == 1:
        return _scan(cell, directions, context, mesh_axis=None)
    require_form("implementation='tensor_parallel' on several devices", cell, directions[0].weights)
    hidden_size = directions[0].weights.w_h.shape[0] // cell.num_gates
    if hidden_size % devices[UNITS_AXIS]:
        raise ValueError(
            f"hidden_size must be a multiple of the {devices[UNITS_AXIS]} devices along model, got {hidden_size}"
        )
    batch_axis = BATCH_AXIS if BATCH_AXIS in devices else None

    def scan_local(directions: tuple[Direction, ...]) -> Results:
        if batch_axis is not None:  # sums the gradients of weights over the batch once, not at every step
            directions = tuple(_pvary(d, batch_axis) for d in directions)
        local = tuple(d._replace(weights=_stack_gates(d.weights)) for d in directions)
        outputs, states = _scan(cell, local, context, mesh_axis=UNITS_AXIS)
        return [h.astype(context.dtype) for h in outputs], states

    split = tuple(d._replace(weights=_split_gates(cell, d.weights)) for d in directions)
    specs = tuple(_direction_spec(d, batch_axis) for d in split)
    # A projected h is whole on every device.
    outputs_spec = [PartitionSpec(None, batch_axis, spec.state.h[-1]) for spec in specs]
    out_specs = (outputs_spec, [spec.state for spec in specs])
    return jax.shard_map(scan_local, in_specs=(specs,), out_specs=out_specs)(split)


def _scan(cell: Cell, directions: tuple[Direction, ...], context: ScanContext, mesh_axis: str | None) -> Results:
    equations = [layer_equations(cell, d, context, mesh_axis) for d in directions]
    return scan_directions(equations, directions, context)


def _pvary(direction: Direction, batch_axis: str) -> Direction:
    """Marks the arrays without a batch axis as varying over the batch."""
    weights, restart_state = jax.tree.map(
        lambda a: lax.pcast(a, batch_axis, to="varying"), (direction.weights, direction.restart_state)
    )
    return direction._replace(weights=weights, restart_state=restart_state)


def _split_gates(cell: Cell, w: Weights) -> Weights:
    """Reshapes ``(G*H, ...)`` to ``(G, H, ...)``, so that all gates of a unit are on one device."""
    return _map_gates(lambda a: a.reshape(cell.num_gates, -1, *a.shape[1:]), w)


def _stack_gates(w: Weights) -> Weights:
    """Inverts `_split_gates`."""
    return _map_gates(lambda a: a.reshape(-1, *a.shape[2:]), w)


def _map_gates(f: Any, w: Weights) -> Weights:
    """Applies ``f`` to the arrays that have rows for every gate."""
    norm = None if w.norm is None else w.norm._replace(x=f(w.norm.x), h=f(w.norm.h))
    return w._replace(w_x=f(w.w_x), w_h=f(w.w_h), b=None if w.b is None else f(w.b), norm=norm)


def _direction_spec(direction: Direction, batch_axis: str | None) -> Direction:
    """Returns how the arrays of a direction are sharded; the weights come from `_split_gates`."""
    w = direction.weights
    # Of (H,), (P, H) and (K, H) the last axis is units, of (G, H, ...) the second.
    weights = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), UNITS_AXIS), w)
    weights = _map_gates(lambda _: PartitionSpec(None, UNITS_AXIS), weights)
    h_axis = UNITS_AXIS if w.w_p is None else None  # a projected h is whole on every device
    over_time = PartitionSpec(None, batch_axis)

    def like(spec: PartitionSpec, tree: Tree) -> Tree:
        return jax.tree.map(lambda _: spec, tree)

    def state_spec(state: State, *leading: str | None) -> Any:
        return State(
            h=like(PartitionSpec(*leading, h_axis), state.h), c=like(PartitionSpec(*leading, UNITS_AXIS), state.c)
        )

    masks = RegularizerMasks(
        candidate_mask=like(PartitionSpec(None, batch_axis, UNITS_AXIS), direction.masks.candidate_mask),
        zoneout_mask_h=like(PartitionSpec(None, batch_axis, h_axis), direction.masks.zoneout_mask_h),
        zoneout_mask_c=like(PartitionSpec(None, batch_axis, UNITS_AXIS), direction.masks.zoneout_mask_c),
    )
    return Direction(
        weights=weights,
        xs=like(over_time, direction.xs),
        state=state_spec(direction.state, batch_axis),
        step_mask=like(over_time, direction.step_mask),
        restarts=like(over_time, direction.restarts),
        restart_state=None if direction.restart_state is None else state_spec(direction.restart_state),
        masks=masks,
    )
