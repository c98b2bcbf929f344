"""What a training run records of its network's inside, cheap enough to be on all the time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from jaxlstm.diagnostics.gate_statistics import CANDIDATE, OPEN, SHUT
from jaxlstm.diagnostics.trace import checked, record
from jaxlstm.lstm import LSTM
from jaxlstm.params import State


def saturation(
    lstm: LSTM, reads: Callable[[Any, Any, Any], tuple[Array, State | None]]
) -> Callable[[Any, Any, Any], dict[str, Array]]:
    """A compiled function that gives the shares of saturated gates on a batch.

    Args:
      lstm: the recurrent network of a model whose parameters hold those of the network under ``lstm``.
      reads: ``(params, carry, batch) -> (xs, state)``, the inputs of the network and the state that it starts from.

    Returns:
      ``(params, carry, batch) -> shares``: for each gate of each layer and direction, over all units, steps and
      sequences, the share that is below 0.1, ``"gates.0.forward.f.shut"``, and above 0.9, ``"gates.0.forward.f.open"``.
    """

    @jax.jit
    def shares(params: Any, carry: Any, batch: Any) -> dict[str, Array]:
        xs, state = reads(params, carry, batch)
        layers = record(lstm, checked(lstm, params.lstm, xs, state), reverse=False).layers
        return {
            f"gates.{n}.{direction}.{name}.{word}": (gate < SHUT if word == "shut" else gate > OPEN).mean()
            for n, layer in enumerate(layers)
            for direction, steps in zip(("forward", "backward"), layer.all)
            for name, gate in steps.gates.items()
            if name != CANDIDATE
            for word in ("shut", "open")
        }

    return shares


def figures(shares: Mapping[str, Array], gradient: Mapping[str, Array]) -> dict[str, float]:
    """A row of a log: shares of saturated gates, and the norms of a gradient, each by its name."""
    values = dict(shares) | {f"gradient.{name}": norm for name, norm in gradient.items()}
    return {name: float(value) for name, value in jax.device_get(values).items()}
