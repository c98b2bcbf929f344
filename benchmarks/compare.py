"""Compare jaxlstm with other LSTM implementations on equal work.

python benchmarks/compare.py                                  every section; writes figures and a picture
python benchmarks/compare.py shapes --rounds 21               one section, more rounds
python benchmarks/compare.py shapes --shapes 128,32,128,256 --only torch haiku
python benchmarks/compare.py shapes --cell gru
python benchmarks/compare.py --quick --out /tmp/quick         a smoke test with tiny sizes; its figures mean nothing
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import report
import tyro
from machine import describe_machine, jax_slug, machine_slug
from peers import (
    JAXLSTM,
    JAXLSTM_BF16,
    JAXLSTM_REMAT,
    JAXLSTM_SCAN,
    JAXLSTM_SHARDED,
    JAXLSTM_VMAP,
    TORCH,
    TORCH_BF16,
    Benchmark,
    CellName,
    Registry,
    Shape,
)
from rich.console import Console
from timing import matmul_gflops, time_interleaved

from jaxlstm.training.metrics import write_json

Section = Literal["shapes", "growth", "vmap", "memory", "compile"]
Kind = Literal["train", "infer"]
Times = dict[str, dict[str, float]]  # benchmark -> {median_ms, q1_ms, q3_ms, to_ours, to_torch_float32}
SHAPES = (
    Shape(128, 32, 128, 256),
    Shape(128, 64, 512, 512),
    Shape(512, 1, 64, 128),
    Shape(1024, 16, 32, 64),
    Shape(64, 32, 1024, 1024),
)
QUICK_SHAPES = (Shape(8, 2, 4, 8), Shape(6, 1, 3, 5))
GROWTH_BASE = Shape(128, 32, 128, 128)
GROWTH = {  # key in the results -> (field of Shape, first size, last size); sizes double
    "steps": ("num_steps", 32, 1024),
    "rows": ("batch_size", 1, 256),
    "units": ("hidden_size", 32, 1024),
}


@dataclass(frozen=True)
class Options:
    """Compare jaxlstm with other LSTM implementations on equal work."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = ("shapes", "growth", "vmap", "memory", "compile")
    """Sections to measure."""
    rounds: int = 11
    """Calls of each benchmark, interleaved; results are the median and the quartiles of these."""
    shapes: tuple[str, ...] = ()
    """Shapes T,B,I,H for the sections shapes and vmap. Default: the five shapes of the recorded results."""
    cell: CellName = "lstm"
    """Cell of the layer."""
    only: tuple[str, ...] = ()
    """Include only peers whose name contains one of these words. Default: all installed peers."""
    out: Path = Path(__file__).parent / "results"
    """Folder for MACHINE/NAME.json and MACHINE/NAME.png."""
    name: str | None = None
    """Name of the files. Default: compare-jax-0.12, with -gru or -quick after --cell gru or --quick."""
    cpu_devices: int = 2
    """JAX devices on a CPU, for the benchmark that shards the batch; the others use one of them."""
    quick: bool = False
    """Smoke test with tiny sizes and at most three rounds."""


class Comparison:
    """Settings, benchmarks and console of one comparison.

    Args:
      options: of the command line.
      console: for progress and tables.
    """

    def __init__(self, options: Options, console: Console) -> None:
        self.console = console
        self.quick = options.quick
        self.rounds = min(options.rounds, 3) if options.quick else options.rounds
        self.registry = Registry(options.only, self.print_line, options.cell)
        if options.shapes:
            self.shapes = tuple(map(Shape.parse, options.shapes))
        else:
            self.shapes = QUICK_SHAPES if options.quick else SHAPES

    def print_line(self, text: str) -> None:
        """Prints one line."""
        report.print_line(self.console, text)

    def print_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints a table."""
        report.print_table(self.console, title, columns, rows)

    def time(self, benchmarks: Sequence[Benchmark], kind: Kind) -> Times:
        """Times training steps or inference, and adds the ratios of medians to jaxlstm and to PyTorch."""
        times = time_interleaved({b.name: getattr(b, kind) for b in benchmarks}, self.rounds)
        for row in times.values():
            for name, reference in (("to_ours", JAXLSTM), ("to_torch_float32", TORCH)):
                if reference in times:
                    row[name] = round(row["median_ms"] / times[reference]["median_ms"], 4)
        return times


def measure_shapes(comparison: Comparison) -> dict[str, Any]:
    """Times the training step and inference of every benchmark at each shape."""
    names = [name for name in comparison.registry.builders if name not in (JAXLSTM_REMAT, JAXLSTM_VMAP)]
    result = []
    for shape in comparison.shapes:
        jax.clear_caches()
        benchmarks = comparison.registry.build(names, shape)
        times = {kind: comparison.time(benchmarks, kind) for kind in ("train", "infer")}
        result.append({"shape": to_json(shape), **times})
        for kind, title in (("train", "training step"), ("infer", "inference")):
            rows = [
                (name, t["median_ms"], f"{t['q1_ms']:.2f} to {t['q3_ms']:.2f}", t["to_ours"], t.get("to_torch_float32"))
                for name, t in times[kind].items()
            ]
            columns = ("", "median ms", "quartiles ms", "/ jaxlstm", "/ torch f32")
            comparison.print_table(f"T,B,I,H = {shape}: {title}", columns, rows)
    means = {kind: geometric_means(result, kind, comparison.registry.jax_peers) for kind in ("train", "infer")}
    rows = [(name.replace("_", " "), means["train"][name], means["infer"][name]) for name in means["train"]]
    comparison.print_table("Geometric means over shapes", ("ratio of medians", "training step", "inference"), rows)
    return {"shapes": result, "geometric_means": means}


def geometric_means(results: Sequence[dict[str, Any]], kind: Kind, jax_peers: Iterable[str]) -> dict[str, float | None]:
    """Returns geometric means over shapes of ratios of medians; None if a benchmark is missing.

    The best JAX peer is selected at each shape. ``ours_over_devices`` uses the sharded batch at shapes whose batch
    divides, and one device at the others; ``ours_on_one_or_all`` uses the faster of the two at each shape.

    Args:
      results: one entry per shape, as in ``measure_shapes``.
      kind: ``"train"`` or ``"infer"``.
      jax_peers: names of the other JAX libraries.
    """

    def best_medians(*names: str) -> list[float]:
        """Returns the smallest median among ``names`` at each shape, NaN if none was measured."""
        present = [[shape[kind][name]["median_ms"] for name in names if name in shape[kind]] for shape in results]
        return [min(times, default=math.nan) for times in present]

    def ratios(numerators: Sequence[float], *names: str) -> list[float]:
        return [a / b for a, b in zip(numerators, best_medians(*names))]

    jaxlstm = best_medians(JAXLSTM)
    sharded = [one if math.isnan(many) else many for one, many in zip(jaxlstm, best_medians(JAXLSTM_SHARDED))]
    faster = best_medians(JAXLSTM, JAXLSTM_SHARDED)
    to_jax = ratios(jaxlstm, *jax_peers)
    mean = statistics.geometric_mean
    means = {
        "ours_over_best_jax": mean(to_jax),
        "ours_over_best_jax_at_worst_shape": max(to_jax) if not any(map(math.isnan, to_jax)) else math.nan,
        "ours_over_torch_float32": mean(ratios(jaxlstm, TORCH)),
        "ours_bf16_over_torch_bf16": mean(ratios(best_medians(JAXLSTM_BF16), TORCH_BF16)),
        "scan_over_fused": mean(ratios(best_medians(JAXLSTM_SCAN), JAXLSTM)),
        "ours_over_devices_over_best_jax": mean(ratios(sharded, *jax_peers)),
        "ours_over_devices_over_torch_float32": mean(ratios(sharded, TORCH)),
        "ours_on_one_or_all_over_best_jax": mean(ratios(faster, *jax_peers)),
        "ours_on_one_or_all_over_torch_float32": mean(ratios(faster, TORCH)),
    }
    return {name: None if math.isnan(value) else round(value, 4) for name, value in means.items()}


def measure_growth(comparison: Comparison) -> dict[str, Any]:
    """Times the training step as T, B and H grow, one at a time."""
    base = QUICK_SHAPES[0] if comparison.quick else GROWTH_BASE
    result: dict[str, list[dict[str, Any]]] = {}
    for axis, (field, first, last) in GROWTH.items():
        sizes = (2, 4) if comparison.quick else [2**n for n in range(first.bit_length() - 1, last.bit_length())]
        result[axis] = []
        rows = []
        for size in sizes:
            shape = base._replace(**{field: size})
            jax.clear_caches()
            benchmarks = comparison.registry.build([JAXLSTM, JAXLSTM_SCAN, TORCH, *comparison.registry.flax], shape)
            times = comparison.time(benchmarks, "train")
            medians = {name: row["median_ms"] for name, row in times.items()}
            best = min(
                (name for name in comparison.registry.flax if name in medians), key=medians.__getitem__, default="-"
            )
            result[axis].append({"shape": to_json(shape), "best_flax": best, "train": times})
            fused, scan, torch, flax = map(medians.get, (JAXLSTM, JAXLSTM_SCAN, TORCH, best))
            rows.append((str(shape), fused, scan, torch, flax, ratio(fused, torch), ratio(fused, flax), best))
        columns = ("T,B,I,H", "fused ms", "scan ms", "torch ms", "flax ms", "fused/torch", "fused/flax", "best flax")
        comparison.print_table(f"Training step, growing {axis}", columns, rows)
    return result


def measure_vmap(comparison: Comparison) -> dict[str, Any]:
    """Times the training step of the one-sequence call under `jax.vmap` and of the batched call."""
    result = []
    for shape in comparison.shapes:
        jax.clear_caches()
        times = comparison.time(comparison.registry.build([JAXLSTM, JAXLSTM_VMAP], shape), "train")
        entry = {"shape": to_json(shape), "train": times, "vmap_over_batched": times[JAXLSTM_VMAP]["to_ours"]}
        result.append(entry)
    rows = [
        (str(shape), *(r["train"][name]["median_ms"] for name in (JAXLSTM, JAXLSTM_VMAP)), r["vmap_over_batched"])
        for shape, r in zip(comparison.shapes, result)
    ]
    columns = ("T,B,I,H", "batched ms", "vmap ms", "vmap / batched")
    comparison.print_table("jax.vmap, training step", columns, rows)
    return {"shapes": result}


def measure_memory(comparison: Comparison) -> dict[str, Any]:
    """Reports the temporary memory of the compiled training step, as planned by XLA."""
    shape = QUICK_SHAPES[0] if comparison.quick else Shape(1024, 32, 256, 256)
    array_bytes = 4 * shape.num_steps * shape.batch_size * shape.hidden_size
    result: dict[str, dict[str, float]] = {}
    names = [JAXLSTM, JAXLSTM_REMAT, JAXLSTM_SCAN, *comparison.registry.jax_peers]
    for benchmark in comparison.registry.build(names, shape, execute=False):
        if benchmark.lower is not None:
            size = benchmark.lower().compile().memory_analysis().temp_size_in_bytes
            result[benchmark.name] = {"temporary_bytes": size, "arrays": round(size / array_bytes, 3)}
    rows = [(name, row["temporary_bytes"] / 2**20, row["arrays"]) for name, row in result.items()]
    title = f"Temporary memory of the training step, T,B,I,H = {shape}"
    comparison.print_table(title, ("", "MiB", "arrays of T*B*H float32"), rows)
    return {"shape": to_json(shape), "array_bytes": array_bytes, "train": result}


def measure_compile(comparison: Comparison) -> dict[str, Any]:
    """Times tracing, lowering and compilation of the training step, starting from empty caches."""
    shape = QUICK_SHAPES[0] if comparison.quick else SHAPES[0]
    names = [JAXLSTM, JAXLSTM_SCAN, JAXLSTM_BF16, *comparison.registry.jax_peers]
    benchmarks = [b for b in comparison.registry.build(names, shape, execute=False) if b.lower]
    seconds: dict[str, list[tuple[float, float]]] = {b.name: [] for b in benchmarks}
    repeats = 1 if comparison.quick else 5
    for n in range(repeats + 1):
        for benchmark in benchmarks:
            lower_and_compile = time_lower_and_compile(benchmark)
            if n > 0:  # the first repeat warms up Python and the compiler
                seconds[benchmark.name].append(lower_and_compile)
    result = {
        name: {
            "lower_s": round(statistics.median(lower for lower, _ in times), 4),
            "compile_s": round(statistics.median(compile for _, compile in times), 4),
            "total_s": round(statistics.median(map(sum, times)), 4),
        }
        for name, times in seconds.items()
    }
    rows = [(name, *row.values()) for name, row in result.items()]
    title = f"Compiling the training step, T,B,I,H = {shape}"
    comparison.print_table(title, ("", "trace and lower s", "compile s", "total s"), rows)
    return {"shape": to_json(shape), "repeats": repeats, "train": result}


def time_lower_and_compile(benchmark: Benchmark) -> tuple[float, float]:
    """Returns the seconds taken to trace and lower the training step, and to compile it, from empty caches."""
    assert benchmark.lower is not None
    jax.clear_caches()
    start = time.perf_counter()
    lowered = benchmark.lower()
    lowered_at = time.perf_counter()
    lowered.compile()
    return lowered_at - start, time.perf_counter() - lowered_at


def to_json(shape: Shape) -> dict[str, int]:
    """Returns the sizes by shape letter."""
    return dict(zip("TBIH", shape))


def ratio(a: float | None, b: float | None) -> float | None:
    """Returns ``a / b``, or None if either is None."""
    return None if a is None or b is None else round(a / b, 4)


MEASURE: dict[Section, Callable[[Comparison], dict[str, Any]]] = {
    "shapes": measure_shapes,
    "growth": measure_growth,
    "vmap": measure_vmap,
    "memory": measure_memory,
    "compile": measure_compile,
}


def load_sections(path: Path, machine: dict[str, Any], print_line: Callable[[str], None]) -> dict[str, Any]:
    """Returns the sections of an existing result of the same machine and versions; empty if there are none."""
    if not path.exists():
        return {}
    previous = json.loads(path.read_text(encoding="utf-8"))
    if previous["machine"] != machine:
        print_line(f"{path} is from another machine or other versions: replacing it")
        return {}
    return previous["sections"]


def main(options: Options, console: Console) -> None:
    """Measures the sections and writes the results after each."""
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    comparison = Comparison(options, console)
    machine = describe_machine()
    suffix = ("" if options.cell == "lstm" else f"-{options.cell}") + ("-quick" if options.quick else "")
    name = options.name or f"compare-{jax_slug()}{suffix}"
    path = report.prepare_output(options.out / machine_slug() / f"{name}.json")
    is_cpu = machine["backend"] == "cpu"
    device = f"{machine['cpu']}, {machine['cores']} cores" if is_cpu else machine["device"]
    versions = "".join(f", {package} {version}" for package, version in machine["versions"].items() if version)
    comparison.print_line(device + versions)
    sections = load_sections(path, machine, comparison.print_line)
    ceiling = matmul_gflops(comparison.rounds, 256 if comparison.quick else 2048)
    gflops = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in ceiling.items())
    comparison.print_line(f"large float32 matrix product: {gflops}")
    for section in options.sections:
        date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        header = {"date": date, "rounds": comparison.rounds, "quick": comparison.quick}
        result = MEASURE[section](comparison)
        sections[section] = header | result | {"skipped": dict(comparison.registry.skipped)}
        write_json(path, {"machine": machine, "ceiling": ceiling, "sections": sections})
        if section == "shapes":
            title = (
                f"One {options.cell.upper()} layer: jaxlstm {machine['versions']['jaxlstm']} and its peers on {device}"
            )
            report.draw_comparison(path.with_suffix(".png"), sections[section]["shapes"], title)
    comparison.print_line(f"written: {path}")


if __name__ == "__main__":
    report.run_cli(main, Options)
