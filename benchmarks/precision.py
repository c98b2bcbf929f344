"""Measure the rounding error of float32 and bfloat16 over a long sequence, against float64.

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
from machine import describe_machine
from rich.console import Console

import jaxlstm
from jaxlstm.training.metrics import write_json

NUM_SPANS = 8  # the sequence is divided into spans; the error of the outputs is reported for each


@dataclass(frozen=True)
class Options:
    """Measure the rounding error of float32 and bfloat16 over a long sequence, against float64."""

    steps: int = 4096
    """T, the number of time steps."""
    batch_size: int = 8
    """B, the number of sequences."""
    input_size: int = 64
    """I, the input size."""
    hidden_size: int = 256
    """H, the number of hidden units."""
    forget_bias: float = 1.0
    """Bias of the forget gates. At 6, a cell remembers for about 400 steps."""
    json: Path | None = None
    """File to write the results to."""


def compute(options: Options, dtype: Any, param_dtype: Any) -> dict[str, np.ndarray]:
    """Returns outputs, final cell state and gradients, cast to float64.

    Parameters and inputs are drawn in float32, so that they are equal for every dtype.

    Args:
      options: sizes and forget bias.
      dtype: of matrix products and outputs; None for ``param_dtype``.
      param_dtype: of parameters, inputs and loss.
    """
    lstm = jaxlstm.LSTM(options.input_size, options.hidden_size, dtype=dtype, param_dtype=param_dtype)
    init_lstm = jaxlstm.LSTM(options.input_size, options.hidden_size, forget_bias=options.forget_bias)
    params = jax.tree.map(lambda a: a.astype(param_dtype), init_lstm.init(jax.random.key(0)))
    leading = (options.steps, options.batch_size)
    xs = jax.random.normal(jax.random.key(1), (*leading, options.input_size), jnp.float32).astype(param_dtype)
    loss_weights = jax.random.normal(jax.random.key(2), (*leading, options.hidden_size), jnp.float32)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        ys, state = lstm(params, xs)
        return jnp.mean(ys.astype(param_dtype) * loss_weights.astype(param_dtype)), (ys, state)

    grads, (ys, state) = jax.grad(loss, has_aux=True)(params)
    arrays = {"outputs": ys, "c at the end": state.c} | {
        f"gradient of {name}": getattr(grads.layers[0].forward, name) for name in ("w_x", "w_h", "b")
    }
    return {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def main(options: Options, console: Console) -> None:
    """Measures both dtypes, prints the errors and writes the results."""
    if options.steps < NUM_SPANS or min(options.batch_size, options.input_size, options.hidden_size) < 1:
        received = f"{options.steps}, {options.batch_size}, {options.input_size}, {options.hidden_size}"
        raise ValueError(f"steps must be at least {NUM_SPANS}, and the other sizes at least 1, got {received}")
    path = options.json and report.prepare_output(options.json)
    jax.config.update("jax_enable_x64", True)
    exact = compute(options, None, jnp.float64)
    dtypes = {"float32": (jnp.float32, jnp.float32), "bfloat16": (jnp.bfloat16, jnp.float32)}
    results: dict[str, Any] = {}
    for name, (dtype, param_dtype) in dtypes.items():
        rounded = compute(options, dtype, param_dtype)
        errors = {array: relative_rms_error(rounded[array], exact[array]) for array in exact}
        spans = zip(np.array_split(rounded["outputs"], NUM_SPANS), np.array_split(exact["outputs"], NUM_SPANS))
        span_errors = [relative_rms_error(a, b) for a, b in spans]
        results[name] = {"relative_rms_error": errors, "of_outputs_by_span": span_errors}
    sizes = f"T={options.steps} B={options.batch_size} I={options.input_size} H={options.hidden_size}"
    sizes += f", forget bias {options.forget_bias:g}"
    rows = [(array, *(f"{results[n]['relative_rms_error'][array]:.2e}" for n in results)) for array in exact]
    report.print_table(console, f"root-mean-square error relative to float64, {sizes}", ("", *results), rows)
    rows = [
        (f"{span + 1} of {NUM_SPANS}", *(f"{results[n]['of_outputs_by_span'][span]:.2e}" for n in results))
        for span in range(NUM_SPANS)
    ]
    report.print_table(console, "outputs, by span of the sequence", ("", *results), rows)
    if path is not None:
        write_json(path, {"machine": describe_machine(), "sizes": sizes, **results})


def relative_rms_error(a: np.ndarray, reference: np.ndarray) -> float:
    """Returns the root-mean-square error of ``a`` divided by the root mean square of ``reference``."""
    return rms(a - reference) / rms(reference)


def rms(a: np.ndarray) -> float:
    """Returns the root mean square."""
    return float(np.sqrt(np.mean(np.square(a))))


if __name__ == "__main__":
    report.run_cli(main, Options)
