"""How far bfloat16 and float32 drift from float64 over a long sequence.

python benchmarks/precision.py                    4,096 steps, H=256
python benchmarks/precision.py --forget-bias 6    cells that remember for hundreds of steps
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
from measuring import machine
from rich.console import Console

import jaxlstm
from jaxlstm.training.metrics import write_json

SPANS = 8  # pieces of the sequence whose error is given apart


@dataclass(frozen=True)
class Options:
    """How far bfloat16 and float32 drift from float64 over a long sequence."""

    steps: int = 4096
    """T."""
    rows: int = 8
    """B."""
    inputs: int = 64
    """I."""
    units: int = 256
    """H."""
    forget_bias: float = 1.0
    """Bias of the forget gates: at 6, a cell keeps what it holds for some 400 steps."""
    json: Path | None = None
    """Where to write the figures."""


def run(options: Options, dtype: Any, param_dtype: Any) -> dict[str, np.ndarray]:
    """Outputs, final state and gradients in float64, from the same numbers whatever the dtype."""
    lstm = jaxlstm.LSTM(options.inputs, options.units, dtype=dtype, param_dtype=param_dtype)
    drawn = jaxlstm.LSTM(options.inputs, options.units, forget_bias=options.forget_bias).init(jax.random.key(0))
    params = jax.tree.map(lambda a: a.astype(param_dtype), drawn)
    shape = (options.steps, options.rows, options.inputs)
    xs = jax.random.normal(jax.random.key(1), shape, jnp.float32).astype(param_dtype)
    weights = jax.random.normal(jax.random.key(2), (*shape[:2], options.units), jnp.float32).astype(param_dtype)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        ys, state = lstm(params, xs)
        return jnp.mean(ys.astype(param_dtype) * weights), (ys, state)

    gradient, (ys, state) = jax.grad(loss, has_aux=True)(params)
    arrays = {"outputs": ys, "c at the end": state.c} | {
        f"gradient of {name}": getattr(gradient.layers[0].forward, name) for name in ("w_x", "w_h", "b")
    }
    return {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def main(options: Options, console: Console) -> None:
    """Measure, show, write."""
    if options.steps < SPANS or min(options.rows, options.inputs, options.units) < 1:
        got = f"{options.steps} {options.rows} {options.inputs} {options.units}"
        raise ValueError(f"at least {SPANS} steps, and 1 row, input and unit are measured, got {got}")
    path = options.json and report.to_be_written(options.json)
    jax.config.update("jax_enable_x64", True)
    exact = run(options, None, jnp.float64)
    kinds = {"float32": (jnp.float32, jnp.float32), "bfloat16": (jnp.bfloat16, jnp.float32)}
    found: dict[str, Any] = {}
    for name, (dtype, param_dtype) in kinds.items():
        got = run(options, dtype, param_dtype)
        error = {what: rms(got[what] - exact[what]) / rms(exact[what]) for what in exact}
        spans = [
            rms(a - b) / rms(b)
            for a, b in zip(np.array_split(got["outputs"], SPANS), np.array_split(exact["outputs"], SPANS))
        ]
        found[name] = {"relative_rms_error": error, "of_outputs_by_span": spans}
    names = list(found)
    sizes = f"T={options.steps} B={options.rows} I={options.inputs} H={options.units}"
    sizes += f", forget bias {options.forget_bias:g}"
    rows = [(what, *(f"{found[n]['relative_rms_error'][what]:.2e}" for n in names)) for what in exact]
    report.table(console, f"root-mean-square error relative to float64, {sizes}", ("", *names), rows)
    rows = [
        (f"{n + 1} of {SPANS}", *(f"{found[name]['of_outputs_by_span'][n]:.2e}" for name in names))
        for n in range(SPANS)
    ]
    report.table(console, "outputs, by piece of the sequence", ("", *names), rows)
    if path is not None:
        write_json(path, {"machine": machine(), "sizes": sizes, **found})


def rms(a: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(a))))


if __name__ == "__main__":
    report.obey(main, Options)
