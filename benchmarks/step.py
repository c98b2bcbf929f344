"""Time one step for one sequence, as in streaming: python benchmarks/step.py --out benchmarks/results

Compares `LSTM.step` under `jax.jit` with a jitted function that returns its arguments, a scan over as many steps, the
same step in NumPy, ONNX Runtime and `torch.nn.LSTMCell`, and the C file that `jaxlstm.export.to_c` writes. Every result
is checked against the library first. Programs that are not installed are left out.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import report
from machine import describe_machine, jax_slug, machine_slug
from peers import load_torch
from rich.console import Console
from timing import check_rounds, time_interleaved

import jaxlstm
from jaxlstm.export import to_c
from jaxlstm.training.metrics import write_json

RUN_SEQUENCE = """
void net_run(int num_steps, const float *xs, float *ys)
{
    net_state s;
    net_reset(&s);
    for (int t = 0; t < num_steps; ++t) net_step(&s, xs + t * NET_INPUT_SIZE, ys + t * NET_OUTPUT_SIZE);
}
"""
C_FLAGS = ("-O3", "-O3 -march=native")
TOLERANCE = {"C int8": 0.1}  # relative to the largest output; 1e-4 otherwise
Sequence = Callable[[], Any]  # runs all steps and returns the outputs (T, H)


@dataclass(frozen=True)
class Options:
    """Time one step for one sequence, in microseconds."""

    out: Path | None = None
    """Folder for step.json."""
    rounds: int = 15
    """Rounds, interleaved."""
    num_steps: int = 1000
    """Steps of each call."""
    input_size: int = 16
    """I."""
    hidden_size: int = 64
    """H."""


def jax_sequences(lstm: jaxlstm.LSTM, params: jaxlstm.Params, xs: np.ndarray) -> dict[str, Sequence]:
    """Returns a jitted function that computes nothing, `LSTM.step`, and one scan."""
    rows = [jax.numpy.asarray(x) for x in xs]
    scan = jax.jit(lambda params, xs: lstm(params, xs)[0])
    nothing = jax.jit(lambda params, state, x: (state, x))
    step = jax.jit(lstm.step)

    def loop(function: Callable[..., Any]) -> list[Any]:
        state, ys = lstm.initial_state(()), []
        for x in rows:
            state, y = function(params, state, x)
            ys.append(y)
        return jax.block_until_ready(ys)

    return {
        "jit of a function that returns its arguments": lambda: loop(nothing),
        "jaxlstm step": lambda: loop(step),
        "jaxlstm call over all steps": lambda: jax.block_until_ready(scan(params, xs)),
    }


def numpy_sequence(params: jaxlstm.Params, xs: np.ndarray) -> Sequence:
    """Returns the equations of the LSTM in NumPy."""
    weights = params.layers[0].forward
    w_x, w_h, b = (np.asarray(a) for a in (weights.w_x, weights.w_h, weights.b))

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 0.5 + 0.5 * np.tanh(0.5 * z)

    def run() -> list[np.ndarray]:
        h = c = np.zeros(w_h.shape[1], np.float32)
        ys = []
        for x in xs:
            i, f, g, o = np.split(w_x @ x + w_h @ h + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            ys.append(h)
        return ys

    return run


def c_sequence(source: str, flags: str, xs: np.ndarray, hidden_size: int) -> Sequence:
    """Compiles a C file into a shared library; its loop over steps is in C.

    Raises:
      OSError: if there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.c"
        path.write_text(source + RUN_SEQUENCE)
        library = path.with_suffix(".so")
        command = ["gcc", "-std=c99", *flags.split(), "-shared", "-fPIC", "-o", library, path, "-lm"]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).net_run
    ys = np.empty((len(xs), hidden_size), np.float32)
    pointer = ctypes.POINTER(ctypes.c_float)

    def run() -> np.ndarray:
        function(len(xs), xs.ctypes.data_as(pointer), ys.ctypes.data_as(pointer))
        return ys

    return run


def onnx_sequence(lstm: jaxlstm.LSTM, params: jaxlstm.Params, xs: np.ndarray) -> Sequence:
    """Returns ONNX Runtime on one thread, one step per call.

    Raises:
      ImportError: if it is not installed.
    """
    onnxruntime: Any = import_module("onnxruntime")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = jaxlstm.interop.to_onnx(lstm, params, with_state=True).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    zero = np.zeros((1, 1, lstm.hidden_size), np.float32)
    rows = xs[:, None, None]

    def run() -> list[Any]:
        h, c, ys = zero, zero, []
        for x in rows:
            y, h, c = (np.asarray(a) for a in session.run(None, {"xs": x, "initial_h": h, "initial_c": c}))
            ys.append(y[0, 0])
        return ys

    return run


def torch_sequence(lstm: jaxlstm.LSTM, params: jaxlstm.Params, xs: np.ndarray) -> Sequence:
    """Returns `torch.nn.LSTMCell` on one thread.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    torch = load_torch()[0]
    torch.set_num_threads(1)
    cell = torch.nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    weights = params.layers[0].forward
    with torch.no_grad():
        for name, a in (("weight_ih", weights.w_x), ("weight_hh", weights.w_h), ("bias_ih", weights.b)):
            getattr(cell, name).copy_(torch.from_numpy(np.array(a)))
        cell.bias_hh.zero_()
    rows = torch.from_numpy(xs)[:, None]

    def run() -> list[Any]:
        state, ys = None, []
        with torch.no_grad():
            for x in rows:
                state = cell(x, state)
                ys.append(state[0][0])
        return [y.numpy() for y in ys]

    return run


def build_sequences(options: Options, console: Console) -> dict[str, Sequence]:
    """Returns every benchmark whose program is installed, after checking its outputs."""
    lstm = jaxlstm.LSTM(options.input_size, options.hidden_size)
    params = lstm.init(jax.random.key(0))
    xs = np.random.default_rng(0).standard_normal((options.num_steps, options.input_size)).astype(np.float32)
    builders: dict[str, Callable[[], Sequence]] = {"NumPy": lambda: numpy_sequence(params, xs)}
    for name, quantize in (("C", None), ("C int8", "int8")):
        source = to_c(lstm, params, name="net", quantize=quantize)
        for flags in C_FLAGS:
            builders[f"{name}, gcc {flags}"] = lambda s=source, f=flags: c_sequence(s, f, xs, options.hidden_size)
    builders["ONNX Runtime"] = lambda: onnx_sequence(lstm, params, xs)
    builders["torch.nn.LSTMCell"] = lambda: torch_sequence(lstm, params, xs)
    sequences = jax_sequences(lstm, params, xs)
    for name, build in builders.items():
        try:
            sequences[name] = build()
        except (ImportError, OSError) as error:
            report.print_line(console, f"left out: {name}: {error}")
    expected = np.asarray(lstm(params, xs)[0])
    for name, sequence in list(sequences.items())[1:]:
        error = np.abs(np.stack([np.asarray(y) for y in sequence()]) - expected).max() / np.abs(expected).max()
        if error > TOLERANCE.get(name.split(",")[0], 1e-4):
            raise ValueError(f"{name} differs from the library by {error:.1e} of the largest output")
    return sequences


def main(options: Options, console: Console) -> None:
    """Measures, prints and writes the result."""
    path = (
        None if options.out is None else report.prepare_output(options.out / machine_slug() / f"step-{jax_slug()}.json")
    )
    check_rounds(options.rounds)
    sequences = build_sequences(options, console)
    for sequence in sequences.values():
        sequence()
    times = time_interleaved(sequences, options.rounds)
    microseconds = {
        name: {key.replace("_ms", "_us"): round(1e3 * value / options.num_steps, 3) for key, value in each.items()}
        for name, each in times.items()
    }
    title = f"One step, I={options.input_size}, H={options.hidden_size}, microseconds"
    rows = [(name, each["median_us"], each["q1_us"], each["q3_us"]) for name, each in microseconds.items()]
    report.print_table(console, title, ("program", "median", "first quartile", "third quartile"), rows)
    if path is not None:
        sizes = {"input_size": options.input_size, "hidden_size": options.hidden_size, "num_steps": options.num_steps}
        write_json(path, {"machine": describe_machine(), **sizes, "rounds": options.rounds, "step": microseconds})
        report.print_line(console, f"wrote {path}")


if __name__ == "__main__":
    report.run_cli(main, Options)
