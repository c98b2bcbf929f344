"""Diagnosis of a network over a fixed sample at each validation, in ``diagnosis.jsonl``, to play back over a run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxlstm.atomic_write import atomic_write
from jaxlstm.diagnostics.gate_statistics import UnitStatistics, gate_statistics, sigmoid_gates
from jaxlstm.diagnostics.gradient_flow import GradientNorms, gradient_flow
from jaxlstm.diagnostics.trace import DirectionTrace, Trace, check_args, record_trace
from jaxlstm.json_types import matches
from jaxlstm.rnn import RNN
from jaxlstm.training.metrics import RowFile, read_lines, replace_non_finite
from jaxlstm.training.tasks.task import Task

DIAGNOSIS = "diagnosis.jsonl"  # in the run directory
NUM_SEQUENCES = 4  # of the sample: the first ones of the first batch
MAX_STEPS = 100  # at which the gradient is recorded, evenly chosen
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BATCH_AXES = {"mask": 1, "resets": 1, "lengths": 0, "static": 0}


class Flow(NamedTuple):
    """Gradient norms of one direction of a layer, ``(T,)``, mean over the sequences."""

    total: Array
    elementwise: Array  # of the part that does not pass through W_h


def make_diagnosis(task: Task) -> Callable[[Any], dict[str, Any]]:
    """Returns a function from the parameters of a model to one row of ``diagnosis.jsonl``.

    The sample is the same at each call: the first sequences of the first training batch. The gradient is that of half
    of the squared last output, with respect to the memory after each step: c, or h for a cell without c.

    Returns:
      ``params -> row`` with the entries ``quantiles``, the levels of all quantiles, ``steps``, the steps of the
      gradients, and ``layers``: for each layer, by ``"forward"`` and ``"backward"``, the ``gates`` by name, each with
      its ``quantiles`` and its fractions ``shut`` and ``open``, quantiles of the ``time_constants`` of the units (None
      where infinite, and for a cell without a forget gate), the fraction of ``dead`` units, and the norms ``gradient``
      and ``elementwise``.
    """
    lstm, batch = task.lstm, next(task.batches(0))

    @jax.jit
    def diagnose(params: Any) -> tuple[Trace, list[list[Flow]]]:
        xs, state = task.lstm_inputs(params, task.init_carry(params), batch)
        options: dict[str, Any] = {
            name: None if a is None else _first(a, BATCH_AXES[name]) for name, a in task.lstm_arguments(batch).items()
        }
        xs, state = _first(xs, 1), jax.tree.map(lambda a: _first(a, 1), state)
        traced = record_trace(lstm, check_args(lstm, params.lstm, xs, state, **options), reverse=False)
        last = len(xs) - 1 - jnp.argmax(jnp.flip(traced.step_mask, 0), 0)  # of the steps that are not skipped

        def loss(ys: Array) -> Array:
            y = jnp.take_along_axis(ys, last[None, :, None], 0).astype(jnp.float32)
            return 0.5 * (y * y).sum()

        flow = gradient_flow(lstm, params.lstm, xs, loss, state, **options, jacobian=None)
        return traced, [
            [Flow(_memory_norm(lstm, whole), _memory_norm(lstm, part)) for whole, part in zip(*directions)]
            for directions in (
                (layer.directions, part.directions) for layer, part in zip(flow.layers, flow.elementwise)
            )
        ]

    def row(params: Any) -> dict[str, Any]:
        traced, flows = jax.device_get(diagnose(params))
        num_steps = len(traced.step_mask)
        steps = np.unique(np.linspace(0, num_steps - 1, min(num_steps, MAX_STEPS)).round().astype(int))
        layers = []
        for layer, statistics, flow in zip(traced.layers, gate_statistics(traced).layers, flows):
            directions = zip(layer._fields, layer.directions, statistics.directions, flow)
            layers.append(
                {
                    name: _units(lstm, values, units, traced.step_mask)
                    | {"gradient": norms.total[steps].tolist(), "elementwise": norms.elementwise[steps].tolist()}
                    for name, values, units, norms in directions
                }
            )
        return {"quantiles": QUANTILES, "steps": steps.tolist(), "layers": layers}

    return row


def _first(a: Array, axis: int) -> Array:
    """Returns the first sequences of an array."""
    return jax.lax.slice_in_dim(a, 0, min(NUM_SEQUENCES, a.shape[axis]), axis=axis)


def _memory_norm(lstm: RNN, norms: GradientNorms) -> Float[Array, " T"]:
    """Returns the norms of the gradient of c, or of h for a cell without c, mean over the sequences."""
    return lstm.resolved_cell.states_by_name(norms.c).get("c", norms.h).mean(1)


def _units(lstm: RNN, values: DirectionTrace, units: UnitStatistics, step_mask: np.ndarray) -> dict[str, Any]:
    """Returns the statistics of one direction of a layer as JSON values."""
    names = [name for name in sigmoid_gates(lstm.resolved_cell) if name in values.gates]
    constants = units.time_constant
    return {
        "gates": {
            name: {
                "quantiles": np.quantile(values.gates[name][step_mask], QUANTILES).tolist(),
                "shut": float(units.shut[name].mean()),
                "open": float(units.open[name].mean()),
            }
            for name in names
        },
        "time_constants": None if constants is None else np.quantile(constants, QUANTILES, method="nearest").tolist(),
        "dead": float(units.dead.mean()),
    }


class Diagnosis:
    """Appends a row to ``diagnosis.jsonl`` for each call of `write`; a context that closes the file.

    Args:
      run_dir: the run directory; it exists.
      task: the task of the run.
      last_step: step of the last row to keep: rows that a killed run wrote after its last checkpoint are removed, and
        so are damaged ones.
      print_line: called with one line if complete rows are damaged.
    """

    def __init__(self, run_dir: Path, task: Task, last_step: int, print_line: Callable[[str], None]) -> None:
        self._diagnose = make_diagnosis(task)
        path = run_dir / DIAGNOSIS
        lines = read_lines(path)[:-1]
        steps = [_step(line) for line in lines]
        if damaged := steps.count(0):
            print_line(f"{damaged:,} of {len(lines):,} rows of {path} are damaged; the others are kept")
        with atomic_write(path) as file:
            file.write(b"".join(line + b"\n" for line, step in zip(lines, steps) if 0 < step <= last_step))
        self._file = RowFile(path)

    def write(self, step: int, params: Any) -> None:
        """Appends the row of a step; numbers that are not finite become null."""
        self._file.append(replace_non_finite({"step": step} | self._diagnose(params)))

    def sync(self) -> None:
        """Flushes the file to disk."""
        self._file.sync()

    def __enter__(self) -> "Diagnosis":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of ``diagnosis.jsonl`` that are not damaged; none if there is no such file."""
    return [json.loads(line) for line in read_lines(run_dir / DIAGNOSIS)[:-1] if _step(line)]


def _step(line: bytes) -> int:
    """Returns the step of a row, or 0 if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    return row["step"] if isinstance(row, dict) and matches(row.get("step"), int) else 0
