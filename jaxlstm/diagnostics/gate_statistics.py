"""What the gates of a run say about memory: time constants, saturation, units that do nothing."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Shaped

from jaxlstm.diagnostics.trace import Directions, Steps, Trace

SHUT, OPEN = 0.1, 0.9  # a gate below the one, above the other is saturated (Karpathy, Johnson & Fei-Fei 2015)
CANDIDATE = "g"  # the named value that is no gate
STILL = 0.01  # an output never larger than this is no output; a cell state that varies less holds no memory


class Units(NamedTuple):
    """What one layer in one direction remembers, unit by unit, over all steps taken of all sequences."""

    time_constant: np.ndarray | None  # (H,) steps, -1/ln(mean f); None for a cell without forget gate
    shut: dict[str, np.ndarray]  # by gate: (H,), the share of steps at which it is below 0.1
    open: dict[str, np.ndarray]  # by gate: (H,), the share of steps at which it is above 0.9
    dead: np.ndarray  # (H,) bool: the output is never larger than 0.01
    frozen: np.ndarray | None  # (H,) bool: the cell state's standard deviation is below 0.01; None without c


class Memory(NamedTuple):
    """What a network remembers."""

    layers: tuple[Directions, ...]  # of `Units`, the lowest layer first
    report: str  # what it means, and what people do about it


def memory(trace: Trace) -> Memory:
    """Time constants, saturation and idle units of a traced run, and a report in words.

    A cell state that is multiplied by f at each step is down to 1/e after -1/ln(f) of them: that is the time constant,
    of the mean f. It says how long a unit keeps what it holds if nothing is added, not what it has learnt.

    Args:
      trace: from `jaxlstm.diagnostics.trace`.

    Raises:
      ValueError: if no step was taken.
    """
    taken = np.asarray(trace.taken)
    if not taken.any():
        raise ValueError(f"no step of {taken.size} was taken: there is nothing to measure")
    layers = tuple(Directions(*(_units(steps, taken) for steps in layer.all)) for layer in trace.layers)
    names = ("forward", "backward")
    lines = [
        line
        for n, layer in enumerate(layers)
        for name, units in zip(names, layer.all)
        for line in _words(f"layer {n}" + (f", {name}" if len(layer.all) > 1 else ""), units, taken)
    ]
    return Memory(layers, "\n".join(lines))


def following(
    values: Shaped[ArrayLike, "T *batch H"], signal: Shaped[ArrayLike, "T *batch"]
) -> tuple[np.ndarray, np.ndarray]:
    """The units that follow a signal, the closest first: which unit counts quotes, which the length of a line?

    Args:
      values: of a trace, its c say.
      signal: what a unit may follow, one number per step.

    Returns:
      ``(units, correlations)``, both ``(H,)``: numbers of units, in the order of the size of Pearson's correlation with
      the signal; 0 for a unit or a signal that is constant.

    Raises:
      ValueError: if the signal is not one number for each step and row of the values.
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


def _units(steps: Steps, taken: np.ndarray) -> Units:
    gates = {name: np.asarray(a, np.float64)[taken] for name, a in steps.gates.items() if name != CANDIDATE}
    time_constant = None
    if "f" in gates:
        with np.errstate(divide="ignore"):  # a gate that is 1, or 0, throughout
            time_constant = 1 / np.abs(np.log(gates["f"].mean(0)))
    return Units(
        time_constant,
        {name: (a < SHUT).mean(0) for name, a in gates.items()},
        {name: (a > OPEN).mean(0) for name, a in gates.items()},
        dead=np.abs(np.asarray(steps.m)[taken]).max(0) <= STILL,
        frozen=None if steps.c is None else np.asarray(steps.c, np.float64)[taken].std(0) < STILL,
    )


def _words(where: str, units: Units, taken: np.ndarray) -> list[str]:
    """A paragraph about one layer in one direction: a figure, what it means, what people do about it."""
    total, longest = len(units.dead), int(taken.sum(0).max())
    lines = [f"{where}: {total} units, {int(taken.sum()):,} steps"]

    def say(text: str) -> None:
        lines.append(f"  {text}")

    if units.time_constant is not None:
        middle, long = np.quantile(units.time_constant, (0.5, 0.9), method="nearest")  # some may be infinite
        say(f"memory: half of the units keep less than {middle:.1f} steps, a tenth more than {long:.1f}")
        if long < longest / 10:
            say(
                f"  no unit in ten holds on for a tenth of the {longest} steps seen. Where answers lie further back,"
                " raise forget_bias, or spread the time constants over the span with chrono."
            )
    for name, shut in units.shut.items():
        opened = units.open[name]
        say(f"gate {name}: shut at {shut.mean():.0%} of the steps, open at {opened.mean():.0%}")
        stuck = int(((shut > 0.99) | (opened > 0.99)).sum())
        if stuck > total / 4:
            say(
                f"  {stuck} of {total} hardly ever leave saturation, where a sigmoid passes no gradient on: they no"
                " longer learn. A lower learning rate, layer_norm or smaller inputs keep gates in their range."
            )
    idle = [(units.dead, "dead: no output ever exceeds 0.01")]
    if units.frozen is not None:
        idle.append((units.frozen, "frozen: the cell state is the same whatever comes in"))
    for which, meaning in idle:
        count = int(which.sum())
        say(f"{count} of {total} units are {meaning}")
        if count > total / 10:
            say("  the network is larger than its task, or training drove it there: try fewer units or a lower rate.")
    return lines
