"""Gate saturation and gradient norms of a training step, cheap enough to record throughout a run."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from jaxlstm.diagnostics.gate_statistics import OPEN, SHUT, sigmoid_gates
from jaxlstm.diagnostics.trace import check_args, record_trace
from jaxlstm.params import State
from jaxlstm.rnn import RNN


def gate_saturation(
    lstm: RNN,
    lstm_inputs: Callable[[Any, Any, Any], tuple[Array, State | None]],
    lstm_arguments: Callable[[Any], dict[str, Array | None]] = lambda batch: {},
) -> Callable[[Any, Any, Any], dict[str, Array]]:
    """Returns a compiled function that computes the fractions of saturated gates on a batch.

    Args:
      lstm: the recurrent network of a model; its parameters are the field ``lstm`` of the model's.
      lstm_inputs: ``(params, carry, batch) -> (xs, state)``, inputs and initial state of the network.
      lstm_arguments: ``batch -> arguments``, further arguments of the call.

    Returns:
      ``(params, carry, batch) -> fractions``: for each gate of each layer and direction, over all units, steps and
      sequences, the fraction below 0.1, ``"gates.0.forward.f.shut"``, and above 0.9, ``"gates.0.forward.f.open"``.
    """

    @jax.jit
    def fractions(params: Any, carry: Any, batch: Any) -> dict[str, Array]:
        xs, state = lstm_inputs(params, carry, batch)
        layers = record_trace(
            lstm, check_args(lstm, params.lstm, xs, state, **lstm_arguments(batch)), reverse=False
        ).layers
        result = {}
        for n, layer in enumerate(layers):
            for direction, steps in zip(("forward", "backward"), layer.directions):
                for name in sigmoid_gates(lstm.resolved_cell):
                    if name in steps.gates:  # the activation of a vanilla network is no gate
                        prefix = f"gates.{n}.{direction}.{name}"
                        result[f"{prefix}.shut"] = (steps.gates[name] < SHUT).mean()
                        result[f"{prefix}.open"] = (steps.gates[name] > OPEN).mean()
        return result

    return fractions


def diagnosis_row(fractions: Mapping[str, Array], gradient_norms: Mapping[str, Array]) -> dict[str, float]:
    """Returns one row of metrics: fractions of saturated gates and gradient norms by name."""
    values = dict(fractions) | {f"gradient.{name}": norm for name, norm in gradient_norms.items()}
    return {name: float(value) for name, value in jax.device_get(values).items()}
