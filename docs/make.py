"""Recomputes every figure and number of lstm.md and gallery.md: ``python docs/make.py``.

Trains the default character model and the three networks of the adding task, about eight minutes on two cores. Writes
the figures to docs/figures, and the numbers to docs/figures/numbers.json and to their marks in the pages. ``--run-dir``
takes a finished run of ``train.py`` without options instead of training the character model.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxlstm import diagnostics
from jaxlstm.diagnostics import plots
from jaxlstm.training import inspect_run, vanishing_gradient, vanishing_plots
from jaxlstm.training.data import synthetic
from jaxlstm.training.data.text import split
from jaxlstm.training.data.token_cache import load_characters
from jaxlstm.training.models.language_model import LanguageModel, LanguageModelParams

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
MARKED_NUMBER = re.compile(r"(<!-- (\w+) -->)[^<]*(<!-- -->)")
TEXT = """The statement "x = (1, 2)" binds a name:
    def f(a, b=(3, 4)):
        return "a string" + str([a, b])
See also "the import statement" (section 7.11).
"""
SHOWN_CHARACTERS = 80  # of TEXT, in the figure of the gates
NUM_CHARACTERS, NUM_UNTRAINED = 12_000, 8  # of the validation text; networks to compare the trained one with
TYPE_LENGTH = 3  # characters that have one random label in the control task of a probe
NUM_STEPS, HIDDEN_SIZE, NUM_UPDATES = 100, 64, 1600  # of the adding task
NETWORKS = {"rnn": "vanilla RNN", "zero": "LSTM, forget bias 0", "one": "LSTM, forget bias 1"}  # prefix of the numbers


@contextlib.contextmanager
def default_run(run_dir: Path | None) -> Iterator[Path]:
    """Yields the folder of a run of train.py without options: ``run_dir``, or a new one if it is None."""
    if run_dir is not None:
        yield run_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        subprocess.run([sys.executable, DOCS.parent / "train.py", "--run-dir", run_dir], check=True)
        yield run_dir


def character_model(run_dir: Path) -> dict[str, str]:
    """Traces the model of a run on `TEXT`; draws figures and returns numbers by name."""
    shutil.copy(run_dir / "curves.png", FIGURES / "learning.png")
    summary = json.loads((run_dir / "summary.json").read_text())
    model, params, ids = inspect_run.load_character_model(run_dir, TEXT)
    trace = diagnostics.trace(model.lstm, params.lstm, params.embedding[ids])
    layer = trace.layers[0].forward
    shown = jax.tree.map(lambda a: a[:SHOWN_CHARACTERS], layer)
    save_figure("gates", plots.draw_gates(shown, TEXT[:SHOWN_CHARACTERS]))
    characters, vocabulary = load_characters("python-reference")
    held_out = vocabulary.decode(np.asarray(split(characters)[1][:NUM_CHARACTERS]))
    networks = [params, *(model.init(jax.random.key(n)) for n in range(NUM_UNTRAINED))]
    studies = [property_study(model, network, held_out, vocabulary.encode(held_out)) for network in networks]
    titles = inspect_run.unit_titles(studies[0][0])
    save_figure("cell_states", plots.draw_cell_states(layer.c, TEXT, titles))
    statistics = diagnostics.gate_statistics(trace)
    units = statistics.layers[0].forward
    median, long = np.quantile(units.time_constant, (0.5, 0.9), method="nearest")
    fractions = {
        f"{gate}_{extreme}": f"{getattr(units, extreme)[gate].mean():.0%}"
        for gate in "ifo"
        for extreme in ("shut", "open")
    }
    return fractions | {
        "characters": f"{NUM_CHARACTERS // 2:,}",
        "untrained": str(NUM_UNTRAINED),
        "property_table": unit_table([units for units, _ in studies]),
        "probe_table": probe_table([probes for _, probes in studies]),
        "loss": f"{summary['valid_loss']:.3f}",
        "hidden": str(len(units.dead)),
        "median_constant": f"{median:.1f}",
        "long_constant": f"{long:.1f}",
        "dead": str(int(units.dead.sum())),
        "frozen": str(int(units.frozen.sum())),
        "report": "\n\n" + "".join(f"    {line}\n" for line in statistics.report.splitlines()) + "\n",
    }


def property_study(
    model: LanguageModel, params: LanguageModelParams, text: str, ids: np.ndarray
) -> tuple[dict[str, diagnostics.ChosenUnit], dict[str, diagnostics.ProbeAccuracy]]:
    """Returns the chosen unit and the probe of each property of a text, fitted on its first half."""
    layer = diagnostics.trace(model.lstm, params.lstm, params.embedding[ids]).layers[0].forward
    types = np.array([text[max(0, n + 1 - TYPE_LENGTH) : n + 1] for n in range(len(text))])
    probes = {}
    for name, values in inspect_run.text_properties(text).items():
        labels = np.minimum(values // 10 if name == "position in the line" else values, 8)
        data = diagnostics.ProbeData(np.asarray(layer.h), labels, types)
        halves = (diagnostics.ProbeData(*(a[part] for a in data)) for part in np.split(np.arange(len(text)), 2))
        probes[name] = diagnostics.probe(*halves)
    return inspect_run.property_units(layer.c, text), probes


def unit_table(studies: list[dict[str, diagnostics.ChosenUnit]]) -> str:
    """Returns a table of the units of the trained network, which is the first, and of the others."""
    rows = ["| property | by the choice | held out | untrained, held out |", "| --- | --- | --- | --- |"]
    for name, unit in studies[0].items():
        others = sorted(abs(study[name].held_out) for study in studies[1:])
        rows.append(
            f"| {name} | {abs(unit.chosen):.2f} | {abs(unit.held_out):.2f} | {others[0]:.2f} to {others[-1]:.2f} |"
        )
    return "\n\n" + "\n".join(rows) + "\n\n"


def probe_table(studies: list[dict[str, diagnostics.ProbeAccuracy]]) -> str:
    """Returns a table of the probes of the trained network, which is the first, and of the others."""
    rows = ["| property | most frequent class | trained | control | untrained |", "| --- | --- | --- | --- | --- |"]
    for name, trained in studies[0].items():
        others = sorted(study[name].task for study in studies[1:])
        figures = f"{trained.majority:.0%} | {trained.task:.0%} | {trained.control:.0%}"
        rows.append(f"| {name} | {figures} | {others[0]:.0%} to {others[-1]:.0%} |")
    return "\n\n" + "\n".join(rows) + "\n\n"


def adding_task() -> dict[str, str]:
    """Trains the networks of ``jaxlstm vanishing``; draws figures and returns numbers by name."""
    networks = vanishing_gradient.compared_networks(HIDDEN_SIZE)
    results = {
        name: vanishing_gradient.train_network(
            lstm, steps=NUM_STEPS, updates=NUM_UPDATES, batch_size=32, learning_rate=learning_rate, seed=0
        )
        for name, (lstm, learning_rate) in networks.items()
    }
    title = f"The adding task over {NUM_STEPS} steps, {HIDDEN_SIZE} units"
    save_figure("vanishing", vanishing_plots.draw_vanishing(results, title=title))
    numbers = {"steps": str(NUM_STEPS), "updates": f"{NUM_UPDATES:,}", "adding_hidden": str(HIDDEN_SIZE)}
    probe = synthetic.adding(np.random.default_rng(1), NUM_STEPS, 1)
    for prefix, name in NETWORKS.items():
        result, (lstm, _) = results[name], networks[name]
        numbers[f"{prefix}_error"] = f"{result.errors[-1]:.4f}"
        for when, norms, elementwise, params in (
            ("before", result.gradient_norms_before, result.elementwise_norms_before, result.params_before),
            ("after", result.gradient_norms_after, result.elementwise_norms_after, result.params_after),
        ):
            numbers[f"{prefix}_{when}"] = format_number(norms[0] / norms[-1])
            if prefix != "rnn":
                numbers[f"{prefix}_elementwise_{when}"] = format_number(elementwise[0] / norms[-1])
            flow = diagnostics.gradient_flow(
                lstm, params.lstm, probe.inputs, lambda ys: (ys**2).sum(), jacobian="spectral"
            )
            numbers[f"{prefix}_jacobian_{when}"] = format_number(float(flow.network_jacobian[0, 0]))
            if prefix != "rnn":
                f = diagnostics.trace(lstm, params.lstm, probe.inputs).layers[0].forward.gates["f"]
                product = np.prod(np.asarray(f, np.float64), 0)
                numbers[f"{prefix}_along_c_{when}"] = format_number(float(product.max()))
    for file, prefix, when in (
        ("rnn_before", "rnn", "before"),
        ("rnn_after", "rnn", "after"),
        ("lstm_after", "one", "after"),
    ):
        name = NETWORKS[prefix]
        params = results[name].params_before if when == "before" else results[name].params_after
        save_figure(f"eigenvalues_{file}", plots.draw_eigenvalues(networks[name][0], params.lstm))
    return numbers


def format_number(value: float) -> str:
    """Formats a number as 0.53, 17, or 7×10⁻¹⁴."""
    if 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 1 else f"{value:.3g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def save_figure(name: str, figure: Figure) -> None:
    """Writes a figure of the pages."""
    figure.savefig(FIGURES / f"{name}.png", dpi=110)


def main() -> None:
    """Writes all figures and numbers."""
    parser = argparse.ArgumentParser(description="Recomputes every figure and number of lstm.md and gallery.md.")
    parser.add_argument("--run-dir", type=Path, help="a finished run of train.py without options, instead of training")
    FIGURES.mkdir(exist_ok=True)
    with default_run(parser.parse_args().run_dir) as run_dir:
        numbers = character_model(run_dir) | adding_task()
    numbers["jax"] = jax.__version__
    (FIGURES / "numbers.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        text = MARKED_NUMBER.sub(lambda match: f"{match[1]}{numbers[match[2]]}{match[3]}", text)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
