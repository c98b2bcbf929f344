"""Builds the LSTM that the options of a run describe."""

from dataclasses import replace

import jax.numpy as jnp

import jaxlstm
from jaxlstm import cells
from jaxlstm.cells import CELLS, Cell, CellName
from jaxlstm.rnn import RNN
from jaxlstm.training import config
from jaxlstm.training.config import Options


def build_lstm(
    options: Options, input_size: int, *, longest_dependency: int | None = None, static_size: int | None = None
) -> RNN:
    """Returns an LSTM with the sizes, cell and regularizers of ``options``, or a residual stack of them.

    Args:
      options: options of the run.
      input_size: I.
      static_size: number of static features, which every gate that reads the inputs reads too; None for none.
      longest_dependency: longest dependency of the task in steps, for the chrono initializer of cells with a forget
        gate; ``--chrono`` takes precedence. None keeps the usual initializer.
    """
    chrono = options.chrono
    has_forget_gate = options.cell != "rnn" and CELLS[options.cell].forget_gate is not None
    if chrono is None and longest_dependency is not None and has_forget_gate:
        chrono = max(longest_dependency, 3)
    # Models apply --dropout to outputs, too.
    dropout_between_layers = options.dropout if options.layers > 1 or options.residual else 0.0
    network = jaxlstm.ResidualStack if options.residual else jaxlstm.LSTM
    return network(
        input_size,
        options.hidden,
        num_layers=options.layers,
        bidirectional=options.bidirectional,
        dtype=jnp.dtype(options.dtype),
        cell=options.cell if static_size is None else with_static(options.cell),
        static_size=static_size,
        layer_norm=options.layer_norm,
        proj_size=options.projection,
        chrono=chrono,
        dropout=dropout_between_layers,
        input_dropout=options.input_dropout,
        variational=options.variational and dropout_between_layers > 0,
        recurrent_dropout=options.recurrent_dropout,
        weight_drop=options.weight_drop,
        zoneout_h=options.zoneout_h,
        zoneout_c=options.zoneout_c,
        implementation="tensor_parallel" if config.splits_units(options) else None,
    )


def with_static(name: CellName) -> Cell:
    """Returns a cell whose gates read static features wherever they read inputs, unless a gate reads them already.

    Their products are computed once per sequence, not in every step as with features repeated over time.
    """
    cell = cells.RNN["tanh"] if name == "rnn" else CELLS[name]
    if cell.slabs_reading("static"):
        return cell
    reads = dict(cell.reads)
    gates = {gate: reads.get(gate, ("x", "h")) for gate in cell.activations}
    return replace(
        cell, reads={gate: (*sources, "static") if "x" in sources else sources for gate, sources in gates.items()}
    )
