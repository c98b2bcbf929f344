"""Compare jaxlstm with its peers at random shapes: python benchmarks/shapes.py --out benchmarks/results

The shapes are drawn from a log-uniform distribution with fixed seeds. The rules in `jaxlstm.recurrence.layout` were
chosen by measurements at some of them; the others were measured afterwards, to see whether the rules hold.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import report
from compare import load_sections, to_json
from machine import describe_machine, jax_slug, machine_slug
from peers import JAX_PEERS, JAXLSTM, JAXLSTM_SCAN, TORCH, Benchmark, Registry, Shape, build_jaxlstm, jax_benchmark
from rich.console import Console
from timing import check_rounds, time_interleaved

import jaxlstm
from jaxlstm.training.metrics import write_json

Split = Literal["fit", "held-out"]
SEEDS = {"fit": range(100), "held-out": range(100, 120)}
RANGES = {"num_steps": (16, 2048), "batch_size": (1, 256), "input_size": (8, 1024), "hidden_size": (8, 1024)}
MIN_WORK, MAX_WORK = 1e7, 1e10  # multiplications and additions of the matrix products of one forward pass
MAX_NUMBERS = 2**24  # in the inputs and in the outputs
KINDS = {"train": "training step", "infer": "inference"}
AUTOTUNED = "jaxlstm autotune"
# Numerator, and the candidates for the denominator: the fastest one.
RATIOS = {
    "the best JAX library": (JAXLSTM, tuple(JAX_PEERS)),
    "PyTorch": (JAXLSTM, (TORCH,)),
    "jaxlstm scan": (JAXLSTM, (JAXLSTM_SCAN,)),
    "the best JAX library, autotuned": (AUTOTUNED, tuple(JAX_PEERS)),
    "PyTorch, autotuned": (AUTOTUNED, (TORCH,)),
}


BARS = {"the best JAX library": "#0072B2", "PyTorch": "#B34700"}  # references in the picture, with their colors


@dataclass(frozen=True)
class Options:
    """Compare jaxlstm with other LSTM implementations at random shapes."""

    split: Split = "held-out"
    """Shapes: those that the rules were chosen by, or the others."""
    rounds: int = 9
    """Calls of each benchmark, interleaved; results are medians."""
    only: tuple[str, ...] = ()
    """Include only peers whose name contains one of these words. Default: all installed peers."""
    autotune: float = 0.0
    """Seconds of `jaxlstm.autotune` for the training step and again for inference, at each shape; 0 leaves it out."""
    max_shapes: int = 20
    """Measure only this many shapes of the split."""
    out: Path | None = None
    """Folder for shapes-NAME.json and shapes-NAME.png."""
    name: str | None = None
    """Name in the files. Default: JAX's version, such as jax-0.12."""


def draw_shape(seed: int) -> Shape:
    """Returns the random shape of a seed."""
    rng = np.random.default_rng(seed)
    while True:
        sizes = {n: round(math.exp(rng.uniform(math.log(low), math.log(high)))) for n, (low, high) in RANGES.items()}
        shape = Shape(**sizes)
        steps, features = shape.num_steps * shape.batch_size, shape.input_size + shape.hidden_size
        work = 8 * steps * shape.hidden_size * features
        if MIN_WORK <= work <= MAX_WORK and steps * max(shape.input_size, shape.hidden_size) <= MAX_NUMBERS:
            return shape


def build_autotuned(shape: Shape, seconds: float) -> Benchmark:
    """Builds the layer as `jaxlstm.autotune` chooses it, once for the training step and once for inference."""
    lstm = jaxlstm.LSTM(shape.input_size, shape.hidden_size)
    xs_shape = (shape.num_steps, shape.batch_size, shape.input_size)
    benchmarks = {}
    for training in (True, False):
        tuned = jaxlstm.autotune(lstm, xs_shape, training=training, seconds=seconds).lstm
        build = partial(build_jaxlstm, implementation=tuned.implementation, unroll=tuned.unroll)
        benchmarks[training] = jax_benchmark(build, AUTOTUNED, shape)
    return replace(benchmarks[True], infer=benchmarks[False].infer)


def measure(shape: Shape, registry: Registry, rounds: int, autotune: float = 0.0) -> dict[str, Any]:
    """Times training step and inference of every benchmark at one shape; ``autotune`` in seconds, or 0."""
    jax.clear_caches()
    benchmarks = registry.build((JAXLSTM, JAXLSTM_SCAN, *JAX_PEERS, TORCH), shape)
    if autotune:
        tuned = build_autotuned(shape, autotune)
        tuned.check()
        benchmarks.append(tuned)
    return {kind: time_interleaved({b.name: getattr(b, kind) for b in benchmarks}, rounds) for kind in KINDS}


def ratio_to_best(times: dict[str, dict[str, float]], reference: str) -> float | None:
    """Returns a ratio of medians, a key of `RATIOS`; None if a part of it was not measured."""
    ours, names = RATIOS[reference]
    medians = [times[name]["median_ms"] for name in names if name in times]
    return times[ours]["median_ms"] / min(medians) if medians and ours in times else None


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns geometric mean, quantiles and worst shape of the ratios, for each kind and reference."""
    summary: dict[str, Any] = {}
    for kind in KINDS:
        for reference in RATIOS:
            measured = [(ratio_to_best(result[kind], reference), result["shape"]) for result in results]
            ratios = [(ratio, tuple(shape.values())) for ratio, shape in measured if ratio is not None]
            if ratios:
                values = [ratio for ratio, _ in ratios]
                worst, shape = max(ratios)
                quantiles = dict(zip(("q10", "median", "q90"), np.percentile(values, (10, 50, 90))))
                row = {"geometric_mean": statistics.geometric_mean(values), **quantiles, "worst": worst}
                rounded = {name: round(float(value), 3) for name, value in row.items()}
                above_1 = sum(value > 1 for value in values)
                summary.setdefault(kind, {})[reference] = rounded | {"above_1": above_1, "worst_shape": shape}
    return summary


def draw(path: Path, summary: dict[str, Any], title: str) -> None:
    """Draws the geometric means of the ratios to the best JAX library and to PyTorch, with a line from 10 to 90 %."""
    from matplotlib.figure import Figure

    bars = [
        (f"{label}, over {reference}", color, summary[kind][reference])
        for kind, label in KINDS.items()
        for reference, color in BARS.items()
        if reference in summary.get(kind, {})
    ][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1.2)
    for place, (_, color, row) in enumerate(bars):
        mean = row["geometric_mean"]
        axes.barh(place, mean, color=color, height=0.7)
        axes.plot([row["q10"], row["q90"]], [place, place], color="black", linewidth=1.5)
        axes.text(0.02, place, f"{mean:.2f}", color="white", fontweight="bold", va="center")
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.set_xlim(0, max(1.25, *(1.05 * row["q90"] for *_, row in bars)))
    axes.set_xlabel("time of jaxlstm; 1 is the time of the other library, lower is faster")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options, console: Console) -> None:
    """Measures one split of the shapes; writes the results after each shape."""
    rounds = check_rounds(options.rounds)
    if not 0 <= options.autotune < math.inf:
        raise ValueError(f"autotune must be a number of seconds, or 0, got {options.autotune}")
    if options.max_shapes < 1:
        raise ValueError(f"max-shapes must be at least 1, got {options.max_shapes}")
    machine = describe_machine()
    name = f"shapes-{options.name or jax_slug()}.json"
    path = None if options.out is None else report.prepare_output(options.out / machine_slug() / name)
    registry = Registry(options.only, lambda text: report.print_line(console, text))
    splits: dict[str, Any] = {}
    if path is not None:
        splits = load_sections(path, machine, lambda text: report.print_line(console, text))
    results: list[dict[str, Any]] = []
    for seed in SEEDS[options.split][: options.max_shapes]:
        shape = draw_shape(seed)
        times = measure(shape, registry, rounds, options.autotune)
        results.append({"seed": seed, "shape": to_json(shape), **times})
        ratios = {kind: [ratio_to_best(times[kind], reference) for reference in RATIOS] for kind in KINDS}
        text = "; ".join(
            f"{label} {times[kind][JAXLSTM]['median_ms']:.2f} ms, "
            + ", ".join(f"{r:.2f} of {n}" for n, r in zip(RATIOS, ratios[kind]) if r is not None)
            for kind, label in KINDS.items()
        )
        report.print_line(console, f"{shape!s:>20}  {text}")
        date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        header = {"date": date, "rounds": rounds, "skipped": dict(registry.skipped), "summary": summarize(results)}
        splits[options.split] = header | {"shapes": results}
        if path is not None:
            write_json(path, {"machine": machine, "sections": splits})
    rows = [
        (f"{label}, over {reference}", *row.values())
        for kind, label in KINDS.items()
        for reference, row in summarize(results).get(kind, {}).items()
    ]
    columns = ("ratio of medians", "geometric mean", "10 %", "median", "90 %", "worst", "above 1", "worst shape")
    report.print_table(console, f"{len(results)} shapes ({options.split})", columns, rows)
    if path is not None:
        device = f"{machine['cpu']}, {machine['cores']} cores" if machine["backend"] == "cpu" else machine["device"]
        draw(
            path.with_suffix(".png"),
            summarize(results),
            f"{len(results)} random shapes, JAX {jax.__version__}, {device}",
        )
        report.print_line(console, f"written: {path}")


if __name__ == "__main__":
    report.run_cli(main, Options)
