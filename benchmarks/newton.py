"""Where the parallel-in-time recurrence beats the fused one, and where it does not.

python benchmarks/newton.py                 as T, H and B grow, one at a time; figures and a picture in results/
python benchmarks/newton.py --quick         does everything work? the figures mean nothing
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import report
from measuring import interleaved, machine, slug
from rich.console import Console

import jaxlstm
from jaxlstm.diagnostics import newton_effort
from jaxlstm.recurrence import Newton
from jaxlstm.training.metrics import write_json

CONTESTANTS = {"fused": "fused", "full": Newton("full"), "diagonal": Newton("diagonal")}
COLOURS = {"full": ("#0072B2", "o"), "diagonal": ("#D55E00", "s")}
LARGEST = 2**28  # numbers in all Jacobians of a run, 1 GiB: where more are needed, a contestant is left out


class Work(NamedTuple):
    """One layer over a batch of sequences."""

    steps: int  # T
    rows: int  # B
    units: int  # H, and I


@dataclass(frozen=True)
class Options:
    """Where the parallel-in-time recurrence beats the fused one."""

    rounds: int = 7
    """Times that each contestant is called, in turns; median and quartiles are of these."""
    out: Path = Path(__file__).parent / "results"
    """Folder for newton-NAME.json and .png."""
    name: str | None = None
    """Name of the files, by default after the device."""
    quick: bool = False
    """Tiny sizes and few rounds, to see that everything works."""


def growth(quick: bool) -> dict[str, list[Work]]:
    """The works, by what grows."""
    if quick:
        return {"T": [Work(8, 1, 2), Work(16, 1, 2)]}
    return {
        "T": [Work(steps, 1, 4) for steps in (64, 1024, 16384)],
        "H": [Work(1024, 1, units) for units in (1, 4, 16, 64)],
        "B": [Work(1024, rows, 4) for rows in (1, 8, 64)],
    }


def numbers(options: Any, work: Work) -> int:
    """Numbers in the Jacobians of all steps."""
    if isinstance(options, Newton):
        each = (2 * work.units) ** 2 if options.mode == "full" else 4 * work.units
        return work.steps * work.rows * each
    return 0


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Times of a training step and of inference, and the iterations that the method took."""
    jax.clear_caches()
    xs = jax.random.normal(jax.random.key(1), (work.steps, work.rows, work.units))
    params = jaxlstm.LSTM(work.units, work.units).init(jax.random.key(0))
    calls: dict[str, dict[str, Callable[[], Any]]] = {"train": {}, "infer": {}}
    iterations, wanted = {}, None
    for name, options in CONTESTANTS.items():
        if numbers(options, work) > LARGEST:
            continue
        lstm = jaxlstm.LSTM(work.units, work.units, implementation=options)

        def loss(params: Any, xs: Any, lstm: jaxlstm.LSTM = lstm) -> Any:
            return (lstm(params, xs)[0] ** 2).sum()

        train, infer = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(lstm.__call__)
        calls["train"][name] = lambda f=train: jax.block_until_ready(f(params, xs))
        calls["infer"][name] = lambda f=infer: jax.block_until_ready(f(params, xs))
        ys, gradient = calls["infer"][name]()[0], calls["train"][name]()[1]
        wanted = (ys, gradient) if wanted is None else wanted
        for a, b in zip(jax.tree.leaves((ys, gradient)), jax.tree.leaves(wanted)):
            assert jnp.abs(a - b).max() <= 1e-3 * jnp.abs(b).max() > 0, (name, work)
        if isinstance(options, Newton):
            effort = newton_effort(lstm, params, xs)
            iterations[name] = int(effort[0].iterations.max())
            assert effort[0].sequential.max() == 0, (name, work)
    times = {kind: interleaved(c, rounds) for kind, c in calls.items()}
    return {"T": work.steps, "B": work.rows, "H": work.units, "iterations": iterations, **times}


def show(console: Console, axis: str, found: list[dict[str, Any]]) -> None:
    """A table of what was measured as one size grew."""
    for kind, title in (("train", "training step"), ("infer", "inference")):
        rows = []
        for f in found:
            medians = [f[kind][name]["median_ms"] if name in f[kind] else None for name in CONTESTANTS]
            ratios = [None if m is None else m / medians[0] for m in medians[1:]]
            counts = [f["iterations"].get(name) for name in COLOURS]
            rows.append((f["T"], f["B"], f["H"], *medians, *ratios, *counts))
        columns = ("T", "B", "H", "fused ms", "full ms", "diagonal ms", "full/fused", "diagonal/fused", "it.", "it.")
        report.table(console, f"growing {axis}: {title}", columns, rows)


def draw(path: Path, found: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Time relative to the fused recurrence as each size grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (axis, points) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items()):
        for kind, style, label in (("train", "-", "training step"), ("infer", "--", "inference")):
            for name, (colour, marker) in COLOURS.items():
                line = [
                    (p[axis], p[kind][name]["median_ms"] / p[kind]["fused"]["median_ms"])
                    for p in points
                    if name in p[kind]
                ]
                axes.plot(*zip(*line), style, color=colour, marker=marker, label=f"{name}, {label}")
        axes.axhline(1, color="black", linewidth=1.2)
        fixed = ", ".join(f"{other}={points[0][other]}" for other in "TBH" if other != axis)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"{axis}   ({fixed})", fontsize=11)
        axes.grid(color="#cccccc", linewidth=0.6)
    first = figure.axes[0]
    first.set_ylabel("time relative to fused\n(above 1: slower than it)", fontsize=11)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def main(options: Options, console: Console) -> None:
    """Measure, show, draw, write."""
    name = f"newton-{options.name or slug()}{'-quick' if options.quick else ''}"
    path = report.to_be_written(options.out / f"{name}.json")
    rounds = 2 if options.quick else options.rounds
    found, measured = {}, {}
    for axis, works in growth(options.quick).items():
        for work in works:
            if work not in measured:
                measured[work] = measure(work, rounds)
        found[axis] = [measured[work] for work in works]
        show(console, axis, found[axis])
    on = machine()
    write_json(path, {"machine": on, "rounds": rounds, "found": found})
    device = f"{on['cores']} cores of {on['cpu']}" if on["backend"] == "cpu" else on["device"]
    draw(path.with_suffix(".png"), found, f'implementation="newton" on {device}, float32, I = H')


if __name__ == "__main__":
    report.obey(main, Options)
