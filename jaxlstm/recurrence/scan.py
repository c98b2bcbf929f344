"""The reference backend: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX."""

from functools import partial

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import State, Weights
from jaxlstm.recurrence.chunked_scan import ScanFns, emit_hidden, scan_directions
from jaxlstm.recurrence.context import Direction, Results, ScanContext
from jaxlstm.recurrence.step import project_inputs, recurrent_step


def run(cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
    """Runs the directions of a layer one after the other; see `jaxlstm.recurrence.context`."""
    return scan_directions([_equations(cell, d.weights, context) for d in directions], directions, context)


def _equations(cell: Cell, weights: Weights, context: ScanContext) -> ScanFns:
    def step(z_x, state: State, masks: RegularizerMasks) -> State:
        return recurrent_step(cell, weights, z_x, state, context.dtype, context.rates, masks)

    project = partial(project_inputs, weights, dtype=context.dtype, accum_dtype=context.accum_dtype)
    return ScanFns(project, emit_hidden(step))
