"""Work of the solver behind ``implementation="newton"``: iterations, residuals and sequential steps of each layer."""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.experimental.newton import Newton, SolverStats, solve_directions
from jaxlstm.network import CallArgs
from jaxlstm.params import Layer, Params, State
from jaxlstm.recurrence.context import Direction, LayerInputs, Results
from jaxlstm.recurrence.masking import concat_directions, scan_masked
from jaxlstm.rnn import RNN


def newton_stats(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
) -> tuple[SolverStats, ...]:
    """Runs ``lstm(params, xs, ...)`` without a key and returns the work of the solver for each layer.

    Args:
      lstm: the network, with ``implementation="newton"`` or a `jaxlstm.experimental.newton.Newton`.
      params: its parameters.
      xs: inputs ``(T, *batch, I)`` of at least one step.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.

    Raises:
      ValueError, TypeError: as the call does, for a sequence without steps, and for another implementation.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    if lstm.implementation != "newton" and not isinstance(lstm.implementation, Newton):
        raise ValueError(f"newton_stats needs implementation='newton', got {lstm.implementation!r}")
    args = lstm.check_call(params, xs, state, lengths=lengths, mask=mask, resets=resets)
    if len(args.xs) == 0:
        raise ValueError("xs must have at least one step, got none")
    return _layer_stats(lstm, args, validation.flag("reverse", reverse))


@partial(jax.jit, static_argnums=(0, 2))
def _layer_stats(lstm: RNN, args: CallArgs, reverse: bool) -> tuple[SolverStats, ...]:
    options = lstm.implementation if isinstance(lstm.implementation, Newton) else Newton()
    context = lstm.scan_context(lstm.regularizer_rates)
    layer_stats: list[SolverStats] = []

    def run_layer(layer: Layer, xs: Array, state: State, inputs: LayerInputs, reverse: bool) -> tuple[Any, State]:
        def backend(directions: tuple[Direction, ...]) -> Results:
            outputs, states, stats = solve_directions(options, lstm.resolved_cell, directions, context)
            layer_stats.append(stats)
            return outputs, states

        merge = concat_directions(lstm.output_dtype)
        return scan_masked(backend, layer, xs, state, inputs, reverse=reverse, batch_axes=xs.ndim - 2, merge=merge)

    lstm.scan_layers(args, reverse, run_layer)
    return tuple(layer_stats)
