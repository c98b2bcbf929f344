"""The recurrent network that the options describe."""

import jax.numpy as jnp

import jaxlstm
from jaxlstm.training.config import Options


def network(options: Options, input_size: int, *, remember: int | None = None) -> jaxlstm.LSTM:
    """An LSTM of the options' sizes, cell and regularisers.

    Args:
      options: of the run.
      input_size: I.
      remember: longest dependency in steps; where ``--chrono`` does not say otherwise, the initial biases of cells with
        a forget gate are drawn for it.
    """
    if options.chrono is None and options.cell != "rnn":
        chrono = None if remember is None else max(remember, 3)
    else:
        chrono = options.chrono
    return jaxlstm.LSTM(
        input_size,
        options.hidden,
        num_layers=options.layers,
        bidirectional=options.bidirectional,
        dtype=jnp.dtype(options.dtype),
        cell=options.cell,
        layer_norm=options.layer_norm,
        proj_size=options.projection,
        chrono=chrono,
        dropout=options.dropout,
        input_dropout=options.input_dropout,
        variational=options.variational,
        recurrent_dropout=options.recurrent_dropout,
        weight_drop=options.weight_drop,
        zoneout_h=options.zoneout_h,
        zoneout_c=options.zoneout_c,
        implementation="sharded" if options.mesh and "model" in options.mesh else None,
    )
