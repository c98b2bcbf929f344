"""What Newton's method on the trajectory took."""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.diagnostics.trace import checked
from jaxlstm.experimental import newton
from jaxlstm.experimental.newton import Effort, Newton
from jaxlstm.lstm import LSTM, CallArgs
from jaxlstm.params import Layer, Params, State
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.context import How


def newton_effort(
    lstm: LSTM,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
) -> tuple[Effort, ...]:
    """Iterations, residual and steps taken one by one of ``lstm(params, xs, ...)``, without a key, for each layer.

    Args:
      lstm: the network, with ``implementation="newton"`` or a `jaxlstm.recurrence.Newton`.
      params: its parameters.
      xs: inputs of at least one step.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.

    Raises:
      ValueError, TypeError: as the call does, for a sequence without steps, and for another implementation.
    """
    arguments = checked(lstm, params, xs, state, lengths, mask, resets)
    if lstm.implementation != "newton" and not isinstance(lstm.implementation, Newton):
        raise ValueError(f"newton_effort needs implementation='newton', got {lstm.implementation!r}")
    return _effort(lstm, arguments, validation.flag("reverse", reverse))


@partial(jax.jit, static_argnums=(0, 2))
def _effort(lstm: LSTM, arguments: CallArgs, reverse: bool) -> tuple[Effort, ...]:
    options = lstm.implementation if isinstance(lstm.implementation, Newton) else Newton()
    efforts: list[Effort] = []

    def run(cell: Cell, layer: Layer, xs: Array, state: State, how: How) -> tuple[Array, State]:
        def over_rows(xs: Array, state: State, how: How) -> tuple[Any, State]:
            ys, after, effort = newton.solve(cell, layer, xs, state, how, options)
            efforts.append(effort)
            return ys, after

        return masking.steps_that_exist(over_rows, xs, state, how, batch_axes=xs.ndim - 2)

    lstm._over_layers(run, arguments, reverse)
    return tuple(efforts)
