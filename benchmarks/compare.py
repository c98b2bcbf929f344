"""Measure this library and its peers on the same work.

python benchmarks/compare.py                                  every section, with the figures and a picture written
python benchmarks/compare.py shapes --rounds 21               one section, more rounds
python benchmarks/compare.py shapes --shapes 128,32,128,256 --only torch haiku
python benchmarks/compare.py --quick --out /tmp/quick         does everything work? tiny sizes, figures mean nothing
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import report
import tyro
from measuring import ceiling, interleaved, machine, slug
from peers import (
    BUILDERS,
    FLAX,
    JAX_PEERS,
    ONE_BY_ONE,
    OURS,
    OURS_BF16,
    REMAT,
    SCAN,
    SPREAD,
    TORCH,
    TORCH_BF16,
    Contestant,
    Field,
    Shape,
)
from rich.console import Console

from jaxlstm.training.metrics import write_json

Section = Literal["shapes", "growth", "vmap", "memory", "compile"]
Times = dict[str, dict[str, float]]
SHAPES = (
    Shape(128, 32, 128, 256),
    Shape(128, 64, 512, 512),
    Shape(512, 1, 64, 128),
    Shape(1024, 16, 32, 64),
    Shape(64, 32, 1024, 1024),
)
QUICK = (Shape(8, 2, 4, 8), Shape(6, 1, 3, 5))


@dataclass(frozen=True)
class Options:
    """Measure this library and its peers on the same work."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = ("shapes", "growth", "vmap", "memory", "compile")
    """What to measure."""
    rounds: int = 11
    """Times that each contestant is called, in turns; median and quartiles are of these."""
    shapes: tuple[str, ...] = ()
    """Shapes T,B,I,H for the sections shapes and vmap. By default the five that the results are given for."""
    only: tuple[str, ...] = ()
    """Words: peers whose name contains one of them. By default all that are installed."""
    out: Path = Path(__file__).parent / "results"
    """Folder for NAME.json and NAME.png."""
    name: str | None = None
    """Name of the files. By default after the device, as in cpu-2core; with --quick, cpu-2core-quick."""
    cpu_devices: int = 2
    """Devices that a CPU is shown as, for the contestant that spreads the batch; the others use one of them."""
    quick: bool = False
    """Tiny sizes and few rounds, to see that everything works."""


class Comparison:
    """One run of the script: the settings, those who take part, and what has been found."""

    def __init__(self, options: Options, console: Console) -> None:
        self.console = console
        self.quick = options.quick
        self.rounds = min(options.rounds, 3) if options.quick else options.rounds
        self.field = Field(options.only, self.say)
        if options.shapes:
            self.shapes = tuple(map(Shape.parse, options.shapes))
        else:
            self.shapes = QUICK if options.quick else SHAPES

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def time(self, contestants: Sequence[Contestant], kind: str) -> Times:
        """Times of ``"train"`` or ``"infer"``, with the ratios of medians to ours and to PyTorch's."""
        times = interleaved({c.name: getattr(c, kind) for c in contestants}, self.rounds)
        for row in times.values():
            for ratio, reference in (("to_ours", OURS), ("to_torch_float32", TORCH)):
                if reference in times:
                    row[ratio] = round(row["median_ms"] / times[reference]["median_ms"], 4)
        return times

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table on the terminal."""
        report.table(self.console, title, columns, rows)


def measure_shapes(run: Comparison) -> dict[str, Any]:
    """Everybody, training step and inference, at each shape."""
    names = [name for name in BUILDERS if name not in (REMAT, ONE_BY_ONE)]
    found = []
    for shape in run.shapes:
        jax.clear_caches()
        contestants = run.field.build(names, shape)
        times = {kind: run.time(contestants, kind) for kind in ("train", "infer")}
        found.append({"shape": sizes(shape), **times})
        for kind, title in (("train", "training step"), ("infer", "inference")):
            rows = [
                (name, t["median_ms"], f"{t['q1_ms']:.2f} to {t['q3_ms']:.2f}", t["to_ours"], t.get("to_torch_float32"))
                for name, t in times[kind].items()
            ]
            columns = ("", "median ms", "quartiles ms", "/ jaxlstm", "/ torch f32")
            run.table(f"T,B,I,H = {shape}: {title}", columns, rows)
    means = {kind: geometric_means(found, kind) for kind in ("train", "infer")}
    rows = [(name.replace("_", " "), means["train"][name], means["infer"][name]) for name in means["train"]]
    run.table("Geometric means over shapes", ("ratio of medians", "training step", "inference"), rows)
    return {"shapes": found, "geometric_means": means}


def geometric_means(found: Sequence[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """Ours against the best JAX library at each shape, and against PyTorch; None where nobody was there.

    "Over devices" is the batch over all of them, at the shapes whose batch divides, and one device at the others;
    "on one or all" is the faster of the two at each shape.
    """

    def medians(names: Sequence[str]) -> list[float]:
        """Of the best of ``names`` at each shape."""
        present = [[shape[kind][name]["median_ms"] for name in names if name in shape[kind]] for shape in found]
        return [min(times, default=math.nan) for times in present]

    def ratios(ours: Sequence[float], *theirs: str) -> list[float]:
        return [a / b for a, b in zip(ours, medians(theirs))]

    ours = medians([OURS])
    over_devices = [one if math.isnan(many) else many for one, many in zip(ours, medians([SPREAD]))]
    faster = medians([OURS, SPREAD])
    against_jax = ratios(ours, *JAX_PEERS)
    means = {
        "ours_over_best_jax": statistics.geometric_mean(against_jax),
        "ours_over_best_jax_at_worst_shape": max(against_jax) if not any(map(math.isnan, against_jax)) else math.nan,
        "ours_over_torch_float32": statistics.geometric_mean(ratios(ours, TORCH)),
        "ours_bf16_over_torch_bf16": statistics.geometric_mean(ratios(medians([OURS_BF16]), TORCH_BF16)),
        "scan_over_fused": statistics.geometric_mean(ratios(medians([SCAN]), OURS)),
        "ours_over_devices_over_best_jax": statistics.geometric_mean(ratios(over_devices, *JAX_PEERS)),
        "ours_over_devices_over_torch_float32": statistics.geometric_mean(ratios(over_devices, TORCH)),
        "ours_on_one_or_all_over_best_jax": statistics.geometric_mean(ratios(faster, *JAX_PEERS)),
        "ours_on_one_or_all_over_torch_float32": statistics.geometric_mean(ratios(faster, TORCH)),
    }
    return {name: None if math.isnan(mean) else round(mean, 4) for name, mean in means.items()}


def measure_growth(run: Comparison) -> dict[str, Any]:
    """The training step as T, B and H grow, one at a time."""
    base = QUICK[0] if run.quick else Shape(128, 32, 128, 128)
    upto = {"steps": (32, 1024), "rows": (1, 256), "units": (32, 1024)}
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, (first, last) in upto.items():
        sizes_taken = (2, 4) if run.quick else [2**n for n in range(first.bit_length() - 1, last.bit_length())]
        found[axis] = []
        rows = []
        for size in sizes_taken:
            shape = base._replace(**{axis: size})
            jax.clear_caches()
            times = run.time(run.field.build([OURS, SCAN, TORCH, *FLAX], shape), "train")
            medians = {name: row["median_ms"] for name, row in times.items()}
            best = min((name for name in FLAX if name in medians), key=medians.__getitem__, default="-")
            found[axis].append({"shape": sizes(shape), "best_flax": best, "train": times})
            ours, scan, torch, flax = map(medians.get, (OURS, SCAN, TORCH, best))
            rows.append((str(shape), ours, scan, torch, flax, ratio(ours, torch), ratio(ours, flax), best))
        columns = ("T,B,I,H", "fused ms", "scan ms", "torch ms", "flax ms", "fused/torch", "fused/flax", "best flax")
        run.table(f"Training step, growing {axis}", columns, rows)
    return found


def measure_vmap(run: Comparison) -> dict[str, Any]:
    """The training step of the call for one sequence under `jax.vmap`, against the batched call."""
    found = []
    for shape in run.shapes:
        jax.clear_caches()
        times = run.time(run.field.build([OURS, ONE_BY_ONE], shape), "train")
        found.append({"shape": sizes(shape), "train": times, "vmap_over_batched": times[ONE_BY_ONE]["to_ours"]})
    rows = [
        (str(shape), *(f["train"][name]["median_ms"] for name in (OURS, ONE_BY_ONE)), f["vmap_over_batched"])
        for shape, f in zip(run.shapes, found)
    ]
    run.table("jax.vmap, training step", ("T,B,I,H", "batched ms", "vmap ms", "vmap / batched"), rows)
    return {"shapes": found}


def measure_memory(run: Comparison) -> dict[str, Any]:
    """Temporary memory of the compiled training step, as XLA plans it."""
    shape = QUICK[0] if run.quick else Shape(1024, 32, 256, 256)
    array = 4 * shape.steps * shape.rows * shape.units
    found: dict[str, dict[str, float]] = {}
    for contestant in run.field.build([OURS, REMAT, SCAN, *JAX_PEERS], shape, run=False):
        if contestant.lower is not None:
            size = contestant.lower().compile().memory_analysis().temp_size_in_bytes
            found[contestant.name] = {"temporary_bytes": size, "arrays": round(size / array, 3)}
    rows = [(name, row["temporary_bytes"] / 2**20, row["arrays"]) for name, row in found.items()]
    title = f"Temporary memory of the training step, T,B,I,H = {shape}"
    run.table(title, ("", "MiB", "arrays of T*B*H float32"), rows)
    return {"shape": sizes(shape), "array_bytes": array, "train": found}


def measure_compile(run: Comparison) -> dict[str, Any]:
    """Seconds to trace, lower and compile the training step, from empty caches."""
    shape = QUICK[0] if run.quick else SHAPES[0]
    contestants = [c for c in run.field.build([OURS, SCAN, OURS_BF16, *JAX_PEERS], shape, run=False) if c.lower]
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contestants}
    repeats = 1 if run.quick else 5
    for n in range(repeats + 1):
        for contestant in contestants:
            both = lower_and_compile(contestant)
            if n > 0:  # the first time warms Python and the compiler
                seconds[contestant.name].append(both)
    found = {
        name: {
            "lower_s": round(statistics.median(lower for lower, _ in times), 4),
            "compile_s": round(statistics.median(compiled for _, compiled in times), 4),
            "total_s": round(statistics.median(map(sum, times)), 4),
        }
        for name, times in seconds.items()
    }
    rows = [(name, *row.values()) for name, row in found.items()]
    run.table(
        f"Compiling the training step, T,B,I,H = {shape}", ("", "trace and lower s", "compile s", "total s"), rows
    )
    return {"shape": sizes(shape), "repeats": repeats, "train": found}


def lower_and_compile(contestant: Contestant) -> tuple[float, float]:
    """Seconds to trace and lower the training step, and to compile it, from empty caches."""
    assert contestant.lower is not None
    jax.clear_caches()
    began = time.perf_counter()
    lowered = contestant.lower()
    between = time.perf_counter()
    lowered.compile()
    return between - began, time.perf_counter() - between


def sizes(shape: Shape) -> dict[str, int]:
    """A shape as JSON, under the letters that the library uses."""
    return dict(zip("TBIH", shape))


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b`` where there are both."""
    return None if a is None or b is None else round(a / b, 4)


MEASURE: dict[str, Callable[[Comparison], dict[str, Any]]] = {
    "shapes": measure_shapes,
    "growth": measure_growth,
    "vmap": measure_vmap,
    "memory": measure_memory,
    "compile": measure_compile,
}


def earlier(path: Path, here: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Sections that an earlier run wrote on the same machine with the same versions."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["machine"] != here:
        say(f"{path} is of another machine or other versions: it is written anew")
        return {}
    return before["sections"]


def main(options: Options, console: Console) -> None:
    """Measure, show, write."""
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    run = Comparison(options, console)
    here = machine()
    name = options.name or (f"{slug()}-quick" if options.quick else slug())
    path = report.to_be_written(options.out / f"{name}.json")
    place = f"{here['cpu']}, {here['cores']} cores" if here["backend"] == "cpu" else here["device"]
    run.say(place + "".join(f", {package} {version}" for package, version in here["versions"].items() if version))
    sections = earlier(path, here, run.say)
    limit = ceiling(run.rounds, 256 if run.quick else 2048)
    run.say("large float32 product: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in limit.items()))
    for section in options.sections:
        header = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "rounds": run.rounds, "quick": run.quick}
        sections[section] = header | MEASURE[section](run) | {"skipped": dict(run.field.skipped)}
        write_json(path, {"machine": here, "ceiling": limit, "sections": sections})
        if section == "shapes":
            title = f"One LSTM layer: jaxlstm {here['versions']['jaxlstm']} and its peers on {place}"
            report.draw(path.with_suffix(".png"), sections[section]["shapes"], title)
    run.say(f"written: {path}")


if __name__ == "__main__":
    report.obey(main, Options)
