"""Compares cells on regular languages, trained on strings of up to 40 symbols and tested on 41 to 256.

python benchmarks/formal.py                                        lstm and rnn, all languages
python benchmarks/formal.py --cells lstm peephole cifg rnn         other cells
python benchmarks/formal.py --learning-rates 1e-2 1e-3             two runs per cell and language
"""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
from machine import describe_machine, machine_slug
from rich.console import Console

from jaxlstm.cells import CellName
from jaxlstm.training.data.formal_languages import LANGUAGES, LanguageName
from jaxlstm.training.metrics import write_json
from jaxlstm.training.tasks.formal import TABLE

ROOT = Path(__file__).parent.parent
# The color-blind safe palette of Okabe and Ito.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
LENGTHS_PER_POINT = 8  # of the figure


@dataclass(frozen=True)
class Options:
    """Compare cells on regular languages, all with the same hidden size, batches, steps and learning rates."""

    cells: tuple[CellName, ...] = ("lstm", "rnn")
    """Cells to compare."""
    languages: tuple[LanguageName, ...] = tuple(LANGUAGES)
    """Languages to train on."""
    learning_rates: tuple[float, ...] = (1e-2,)
    """Learning rates of each cell; the one with the lowest loss on lengths up to 40 is shown."""
    max_steps: int = 5000
    """Updates of each run."""
    seed: int = 0
    """Seed of each run."""
    out: Path = Path(__file__).parent / "results"
    """Folder for formal.json and formal.md. Runs in formal.json of the same command, machine and versions are kept."""
    figure: Path = ROOT / "docs" / "figures" / "formal.png"
    """File of the figure."""


def train_arguments(options: Options, cell: str, language: str, learning_rate: float) -> list[str]:
    """Returns the arguments of ``train.py`` for one run."""
    arguments = f"--task formal --language {language} --cell {cell} --learning-rate {learning_rate:g}"
    return shlex.split(f"{arguments} --max-steps {options.max_steps} --seed {options.seed}")


def run(arguments: list[str]) -> dict[str, Any]:
    """Runs ``train.py`` once and returns its summary, its accuracy on lengths of training and the one by length."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--run-dir", str(run_dir), "--diagnose", "0"]
        if subprocess.run(command).returncode:
            raise SystemExit(f"formal.py: train.py failed with {shlex.join(arguments)}")
        summary = json.loads((run_dir / "summary.json").read_text())
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        best = next(row for row in rows if row["split"] == "valid" and row["step"] == summary["best_step"])
        return {
            "command": shlex.join(["python", "train.py", *arguments]),
            "summary": {name: value for name, value in summary.items() if name != "sha256"},
            "valid_accuracy": best["accuracy"],
            **json.loads((run_dir / TABLE).read_text()),
        }


def previous_runs(path: Path, machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the runs in a file of results by command; none if they are of another machine or other versions."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"machine": None, "runs": []}
    return {result["command"]: result for result in results["runs"] if results["machine"] == machine}


def markdown(options: Options, shown: dict[tuple[str, str], dict[str, Any]], machine: dict[str, Any]) -> str:
    """Returns the accuracies as a table with one row per cell."""
    rates = ", ".join(f"{rate:g}" for rate in options.learning_rates)
    if len(options.learning_rates) > 1:
        rates = f"the one of {rates} with the lowest loss on the short strings"
    lines = [
        "Accuracy in percent on strings of up to 40 symbols, as in training, and on strings of 41 to 256. "
        f"{options.max_steps:,} updates, seed {options.seed}, learning rate {rates}. {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['device']}, JAX {machine['versions']['jax']}.",
        "",
        "| " + " | ".join(["cell", "parameters", *(name.replace("_", " ") for name in options.languages)]) + " |",
        "| " + " | ".join(["---"] * (2 + len(options.languages))) + " |",
    ]
    for cell in options.cells:
        results = [shown[cell, language] for language in options.languages]
        sizes = sorted({result["summary"]["parameters"] for result in results})
        parameters = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        scores = [f"{100 * r['valid_accuracy']:.1f}, {100 * r['summary']['test_accuracy']:.1f}" for r in results]
        lines.append("| " + " | ".join([cell, parameters, *scores]) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, options: Options, shown: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Draws accuracy by length: one panel per language, one line per cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(options.languages), 3.6), layout="constrained")
    panels = figure.subplots(1, len(options.languages), sharey=True, squeeze=False)[0]
    for axes, language in zip(panels, options.languages):
        for n, cell in enumerate(options.cells):
            lengths, accuracy = (np.array(shown[cell, language][name]) for name in ("length", "accuracy"))
            bins = (lengths - lengths[0]) // LENGTHS_PER_POINT
            points = [(lengths[bins == b].mean(), accuracy[bins == b].mean()) for b in np.unique(bins)]
            style = {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4}
            axes.plot(*zip(*points), label=cell, linewidth=1.4, **style)
        axes.axhline(1 / LANGUAGES[language].num_classes, color="#777777", linewidth=1, linestyle="--", label="chance")
        axes.set(title=language.replace("_", " "), xlabel="length", ylim=(0, 1.03))
        axes.grid(color="#cccccc", linewidth=0.6)
    panels[0].set_ylabel(f"accuracy (means of {LENGTHS_PER_POINT} lengths)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), frameon=False)
    figure.suptitle("Strings longer than in training (up to 40 symbols)")
    figure.savefig(path, dpi=150)


def main(options: Options, console: Console) -> None:
    """Trains and tests all cells, writes the results after each run, then the table and the figure."""
    path, figure = (
        report.prepare_output(options.out / machine_slug() / "formal.json"),
        report.prepare_output(options.figure),
    )
    machine = describe_machine()
    runs = previous_runs(path, machine)
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for language in options.languages:
        for cell in options.cells:
            candidates = []
            for learning_rate in options.learning_rates:
                arguments = train_arguments(options, cell, language, learning_rate)
                command = shlex.join(["python", "train.py", *arguments])
                if command not in runs:
                    runs[command] = run(arguments)
                    write_json(path, {"machine": machine, "runs": list(runs.values())})
                candidates.append(runs[command])
            shown[cell, language] = min(candidates, key=lambda result: result["summary"]["valid_loss"])
    table = markdown(options, shown, machine)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(figure, options, shown)
    report.print_line(console, table)


if __name__ == "__main__":
    report.run_cli(main, Options)
