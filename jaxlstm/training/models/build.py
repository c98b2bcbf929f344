"""Builds the LSTM that the options of a run describe."""

import jax.numpy as jnp

import jaxlstm
from jaxlstm.cells import CELLS
from jaxlstm.rnn import RNN
from jaxlstm.training import config
from jaxlstm.training.config import Options


def build_lstm(options: Options, input_size: int, *, longest_dependency: int | None = None) -> RNN:
    """Returns an LSTM with the sizes, cell and regularizers of ``options``, or a residual stack of them.

    Args:
      options: options of the run.
      input_size: I.
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
        cell=options.cell,
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
