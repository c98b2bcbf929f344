"""Compare the experimental parallel-in-time backend with the default backend.

python benchmarks/newton.py                 as T, H and B grow, one at a time; writes results/MACHINE/newton.*
python benchmarks/newton.py --quick         a smoke test; its figures mean nothing
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import report
from machine import describe_machine, machine_slug
from peers import Shape
from rich.console import Console
from timing import time_interleaved

import jaxlstm
from jaxlstm.experimental.newton import Newton
from jaxlstm.experimental.newton_stats import newton_stats
from jaxlstm.training.metrics import write_json

BACKENDS = {"fused": "fused", "full": Newton("full"), "diagonal": Newton("diagonal")}
STYLES = {"full": ("#0072B2", "o"), "diagonal": ("#D55E00", "s")}  # color, marker
MAX_JACOBIAN_SIZE = 2**28  # entries of all Jacobians, 1 GiB; a mode that needs more is left out
TOLERANCE = 1e-3  # relative to the largest entry of an array


@dataclass(frozen=True)
class Options:
    """Compare the experimental parallel-in-time backend with the default backend."""

    rounds: int = 7
    """Calls of each backend, interleaved; results are the median and the quartiles of these."""
    out: Path = Path(__file__).parent / "results"
    """Folder for newton-NAME.json and newton-NAME.png."""
    name: str | None = None
    """Name of the files. Default: the device."""
    quick: bool = False
    """Smoke test with tiny sizes and two rounds."""


def shapes_by_axis(quick: bool) -> dict[str, list[Shape]]:
    """Returns the shapes to measure, by the letter of the size that grows; I = H."""
    if quick:
        return {"T": [Shape(8, 1, 2, 2), Shape(16, 1, 2, 2)]}
    return {
        "T": [Shape(steps, 1, 4, 4) for steps in (64, 1024, 16384)],
        "H": [Shape(1024, 1, size, size) for size in (1, 4, 16, 64)],
        "B": [Shape(1024, batch_size, 4, 4) for batch_size in (1, 8, 64)],
    }


def jacobian_size(backend: str | Newton, shape: Shape) -> int:
    """Returns the number of entries in the Jacobians of all steps, 0 for a backend without Jacobians."""
    if isinstance(backend, str):
        return 0
    per_step = (2 * shape.hidden_size) ** 2 if backend.mode == "full" else 4 * shape.hidden_size
    return shape.num_steps * shape.batch_size * per_step


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times the training step and inference of each backend, and counts Newton iterations.

    Outputs and gradients of every backend are checked against ``"fused"`` first.
    """
    jax.clear_caches()
    xs = jax.random.normal(jax.random.key(1), (shape.num_steps, shape.batch_size, shape.input_size))
    params = jaxlstm.LSTM(shape.input_size, shape.hidden_size).init(jax.random.key(0))
    calls: dict[str, dict[str, Callable[[], Any]]] = {"train": {}, "infer": {}}
    iterations, expected = {}, None
    for name, backend in BACKENDS.items():
        if jacobian_size(backend, shape) > MAX_JACOBIAN_SIZE:
            continue
        lstm = jaxlstm.LSTM(shape.input_size, shape.hidden_size, implementation=backend)

        def loss(params: Any, xs: Any, lstm: jaxlstm.LSTM = lstm) -> Any:
            return (lstm(params, xs)[0] ** 2).sum()

        train, infer = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(lstm.__call__)
        calls["train"][name] = lambda f=train: jax.block_until_ready(f(params, xs))
        calls["infer"][name] = lambda f=infer: jax.block_until_ready(f(params, xs))
        ys, grads = calls["infer"][name]()[0], calls["train"][name]()[1]
        expected = (ys, grads) if expected is None else expected
        for a, b in zip(jax.tree.leaves((ys, grads)), jax.tree.leaves(expected)):
            assert jnp.abs(a - b).max() <= TOLERANCE * jnp.abs(b).max() > 0, (name, shape)
        if isinstance(backend, Newton):
            (stats,) = newton_stats(lstm, params, xs)
            iterations[name] = int(stats.iterations.max())
            assert stats.sequential_steps.max() == 0, (name, shape)
    times = {kind: time_interleaved(kind_calls, rounds) for kind, kind_calls in calls.items()}
    sizes = {"T": shape.num_steps, "B": shape.batch_size, "H": shape.hidden_size}
    return {**sizes, "iterations": iterations, **times}


def print_results(console: Console, axis: str, results: list[dict[str, Any]]) -> None:
    """Prints tables of the training step and of inference as one size grows."""
    for kind, title in (("train", "training step"), ("infer", "inference")):
        rows = []
        for result in results:
            medians = [result[kind][name]["median_ms"] if name in result[kind] else None for name in BACKENDS]
            ratios = [None if median is None else median / medians[0] for median in medians[1:]]
            counts = [result["iterations"].get(name) for name in STYLES]
            rows.append((result["T"], result["B"], result["H"], *medians, *ratios, *counts))
        columns = ("T", "B", "H", "fused ms", "full ms", "diagonal ms", "full/fused", "diagonal/fused", "it.", "it.")
        report.print_table(console, f"growing {axis}: {title}", columns, rows)


def draw_results(path: Path, results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Draws the time relative to ``"fused"`` as each size grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (axis, points) in zip(figure.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items()):
        for kind, style, label in (("train", "-", "training step"), ("infer", "--", "inference")):
            for name, (color, marker) in STYLES.items():
                line = [
                    (p[axis], p[kind][name]["median_ms"] / p[kind]["fused"]["median_ms"])
                    for p in points
                    if name in p[kind]
                ]
                axes.plot(*zip(*line), style, color=color, marker=marker, label=f"{name}, {label}")
        axes.axhline(1, color="black", linewidth=1.2)
        fixed = ", ".join(f"{other}={points[0][other]}" for other in "TBH" if other != axis)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"{axis}   ({fixed})", fontsize=11)
        axes.grid(color="#cccccc", linewidth=0.6)
    first = figure.axes[0]
    first.set_ylabel("time relative to fused\n(above 1: slower than fused)", fontsize=11)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def main(options: Options, console: Console) -> None:
    """Measures all shapes, prints tables and writes the results and the picture."""
    name = f"{options.name or 'newton'}{'-quick' if options.quick else ''}"
    path = report.prepare_output(options.out / machine_slug() / f"{name}.json")
    rounds = 2 if options.quick else options.rounds
    results: dict[str, list[dict[str, Any]]] = {}
    by_shape: dict[Shape, dict[str, Any]] = {}
    for axis, shapes in shapes_by_axis(options.quick).items():
        for shape in shapes:
            if shape not in by_shape:
                by_shape[shape] = measure(shape, rounds)
        results[axis] = [by_shape[shape] for shape in shapes]
        print_results(console, axis, results[axis])
    machine = describe_machine()
    write_json(path, {"machine": machine, "rounds": rounds, "found": results})
    is_cpu = machine["backend"] == "cpu"
    device = f"{machine['cores']} cores of {machine['cpu']}" if is_cpu else machine["device"]
    draw_results(path.with_suffix(".png"), results, f'implementation="newton" on {device}, float32, I = H')


if __name__ == "__main__":
    report.run_cli(main, Options)
