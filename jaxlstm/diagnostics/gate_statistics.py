"""Statistics of the gates of a traced call: time constants, saturation and inactive units."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Shaped

from jaxlstm import validation
from jaxlstm.cells import Cell, sigmoid, tanh
from jaxlstm.diagnostics.trace import DirectionTrace, PerDirection, Trace

SHUT, OPEN = 0.1, 0.9  # a gate below the first or above the second is saturated (Karpathy, Johnson & Fei-Fei 2015)
ALMOST_ALWAYS = 0.99  # fraction of the steps
INACTIVE = 0.01  # a unit is dead if |output| never exceeds this, frozen if its cell state has a smaller deviation


class UnitStatistics(NamedTuple):
    """Statistics of each unit of one direction of a layer, over all valid steps of all sequences."""

    time_constant: np.ndarray | None  # (H,) in steps, -1/ln(mean f); None for a cell without a forget gate
    shut: dict[str, np.ndarray]  # (H,) by gate, fraction of the steps at which the gate is below 0.1
    open: dict[str, np.ndarray]  # (H,) by gate, fraction of the steps at which the gate is above 0.9
    dead: np.ndarray  # (H,) bool: the magnitude of the output never exceeds 0.01
    frozen: np.ndarray | None  # (H,) bool: the standard deviation of the cell state is below 0.01; None without c
    saturated: dict[str, np.ndarray]  # (H,) bool by gate: shut, or open, at more than 99% of the steps; of a vanilla
    # network with tanh "output": the magnitude of the output is above 0.9 as often


class GateStatistics(NamedTuple):
    """Statistics of all units of a network."""

    layers: tuple[PerDirection[UnitStatistics], ...]  # lowest layer first
    report: str  # summary in words, with remedies


class ChosenUnit(NamedTuple):
    """The unit that correlates most with a signal."""

    unit: int
    chosen: float  # Pearson's correlation on the data of the choice, where it is biased upward
    held_out: float  # on other data


def gate_statistics(trace: Trace) -> GateStatistics:
    """Computes time constants, saturation and inactive units of a traced call, and a report in words.

    The time constant of a unit is -1/ln(mean f), the number of steps after which a cell state that is multiplied by the
    mean f at each step has decayed to 1/e. It measures how long a unit retains its cell state if nothing is added.

    Args:
      trace: from `jaxlstm.diagnostics.trace`.

    Raises:
      ValueError: if lengths and mask skipped every step.
      TypeError: if ``trace`` is not a `Trace`.
    """
    validation.instance("trace", trace, Trace, "the result of jaxlstm.diagnostics.trace")
    step_mask = np.asarray(trace.step_mask)
    if not step_mask.any():
        raise ValueError(f"gate statistics need at least one valid step, but all {step_mask.size} are skipped")
    layers, lines = [], []
    for n, layer in enumerate(trace.layers):
        layers.append(PerDirection(*(_unit_statistics(trace.cell, values, step_mask) for values in layer.directions)))
        for direction, units in zip(layer._fields, layers[-1].directions):
            lines.append(f"layer {n}" + (f", {direction}" if len(layer.directions) > 1 else ""))
            lines[-1] += f": {len(units.dead)} units, {int(step_mask.sum()):,} steps"
            lines += [f"  {line}" for line in _describe(units, longest=int(step_mask.sum(0).max()))]
    return GateStatistics(tuple(layers), "\n".join(lines))


def correlated_units(
    values: Shaped[ArrayLike, "T *batch H"], signal: Shaped[ArrayLike, "T *batch"]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks units by their correlation with a signal, for example with the position in a line of text.

    Args:
      values: values of the units, for example ``c`` of a trace.
      signal: one number per step and sequence.

    Returns:
      ``(units, correlations)``, both ``(H,)``: indices of the units and Pearson's correlation with the signal, in
      descending order of magnitude. The correlation of a constant unit or signal is 0.

    Raises:
      ValueError: if the signal does not have one number per step and sequence.
    """
    if np.shape(values)[:-1] != np.shape(signal):
        raise ValueError(f"signal must have shape {list(np.shape(values)[:-1])}, got {list(np.shape(signal))}")
    x = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    y = np.asarray(signal, np.float64).reshape(-1, 1)
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    correlations = np.divide((x * y).sum(0), scale, out=np.zeros(x.shape[1]), where=scale > 0)
    units = np.argsort(-np.abs(correlations), kind="stable")
    return units, correlations[units]


def held_out_unit(
    values: Shaped[ArrayLike, "T *batch H"],
    signal: Shaped[ArrayLike, "T *batch"],
    test_values: Shaped[ArrayLike, "N *test_batch H"],
    test_signal: Shaped[ArrayLike, "N *test_batch"],
) -> ChosenUnit:
    """Chooses the unit that correlates most with a signal, and computes its correlation on data the choice did not see.

    The largest of many correlations is large by chance. On other data the chosen unit has no such advantage. Compare
    it with untrained networks, too: their units also follow the recent inputs.

    Args:
      values: values of the units, to choose by.
      signal: one number per step and sequence.
      test_values: values of the same units over other data.
      test_signal: the signal over other data.

    Raises:
      ValueError: if a signal does not have one number per step and sequence, or the numbers of units differ.
    """
    units, correlations = correlated_units(values, signal)
    if np.shape(test_values)[-1] != len(units):
        raise ValueError(f"test_values must have {len(units)} units as values, got {np.shape(test_values)[-1]}")
    unit = int(units[0])
    _, tested = correlated_units(np.asarray(test_values)[..., unit : unit + 1], test_signal)
    return ChosenUnit(unit, float(correlations[0]), float(tested[0]))


def sigmoid_gates(cell: Cell) -> list[str]:
    """Returns the names of the gates between 0 and 1: those after a sigmoid, not the candidates."""
    return [name for name, activation in cell.activations.items() if activation in (sigmoid, jax.nn.sigmoid)]


def _unit_statistics(cell: Cell, values: DirectionTrace, step_mask: np.ndarray) -> UnitStatistics:
    recorded = [name for name in sigmoid_gates(cell) if name in values.gates]
    gates = {name: np.asarray(values.gates[name], np.float64)[step_mask] for name in recorded}
    time_constant = None
    if cell.forget_gate in gates:
        with np.errstate(divide="ignore"):  # a mean of 0 or 1
            time_constant = 1 / np.abs(np.log(gates[cell.forget_gate].mean(0)))
    c = cell.states_by_name(values.c).get("c")
    outputs = np.abs(np.asarray(values.cell_output)[step_mask])
    shut = {name: (a < SHUT).mean(0) for name, a in gates.items()}
    opened = {name: (a > OPEN).mean(0) for name, a in gates.items()}
    saturated = {name: (shut[name] > ALMOST_ALWAYS) | (opened[name] > ALMOST_ALWAYS) for name in gates}
    if cell.num_gates == 1 and set(cell.activations.values()) <= {tanh, jnp.tanh}:
        saturated["output"] = (outputs > OPEN).mean(0) > ALMOST_ALWAYS
    return UnitStatistics(
        time_constant,
        shut,
        opened,
        dead=outputs.max(0) <= INACTIVE,
        frozen=None if c is None else np.asarray(c, np.float64)[step_mask].std(0) < INACTIVE,
        saturated=saturated,
    )


def _describe(units: UnitStatistics, longest: int) -> Iterator[str]:
    """Yields lines about one direction of a layer: figures, and the remedy for each unhealthy one.

    Args:
      units: its statistics.
      longest: number of valid steps of the longest sequence.
    """
    total = len(units.dead)
    if units.time_constant is not None:
        median, long = np.quantile(units.time_constant, (0.5, 0.9), method="nearest")  # some may be infinite
        yield f"time constants: half of the units are below {median:.1f} steps, a tenth above {long:.1f}"
        if long < longest / 10:
            yield (
                f"  nine units in ten forget within a tenth of the {longest} steps of the longest sequence. For longer"
                " dependencies raise forget_bias, or spread the time constants with chrono."
            )
    for name, shut in units.shut.items():
        opened = units.open[name]
        yield f"gate {name}: shut at {shut.mean():.0%} of the steps, open at {opened.mean():.0%}"
    for name, is_saturated in units.saturated.items():
        count = int(is_saturated.sum())
        if count > total / 4:
            yield (
                f"  {name}: {count} of {total} units are saturated at almost every step, where the activation has"
                " almost no gradient. A lower learning rate, layer_norm or smaller inputs prevent saturation."
            )
    inactive = [(units.dead, "dead: the output never exceeds 0.01")]
    if units.frozen is not None:
        inactive.append((units.frozen, "frozen: the cell state is nearly constant"))
    for is_inactive, meaning in inactive:
        count = int(is_inactive.sum())
        yield f"{count} of {total} units are {meaning}"
        if count > total / 10:
            yield "  the network is too large for the task, or training diverged: try fewer units or a lower rate."
