"""Every figure and number of lstm.md and gallery.md, from runs made here and now: python docs/make.py

It trains the default character model and the three networks of the adding task: some six minutes on two cores. The
figures go to docs/figures, the numbers to docs/figures/numbers.json and between their marks in the pages.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlstm import diagnostics
from jaxlstm.diagnostics import plots
from jaxlstm.training import inspect_run, vanishing_gradient
from jaxlstm.training.data import synthetic

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
MARKED = re.compile(r"(<!-- (\w+) -->)[^<]*(<!-- -->)")
TEXT = """The statement "x = (1, 2)" binds a name:
    def f(a, b=(3, 4)):
        return "a string" + str([a, b])
See also "the import statement" (section 7.11).
"""
STEPS, HIDDEN, UPDATES = 100, 64, 1600


def character_model() -> dict[str, str]:
    """The default run of train.py, and what is in its network as it reads `TEXT`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run([sys.executable, DOCS.parent / "train.py", "--run-dir", run], check=True)
        shutil.copy(run / "curves.png", FIGURES / "learning.png")
        summary = json.loads((run / "summary.json").read_text())
        model, params, ids = inspect_run.load(run, TEXT)
    trace = diagnostics.trace(model.lstm, params.lstm, params.embedding[ids])
    steps = trace.layers[0].forward
    shown = steps._replace(
        gates={name: a[:80] for name, a in steps.gates.items()}, c=steps.c[:80], m=steps.m[:80], h=steps.h[:80]
    )
    save("gates", plots.draw_gates(shown, TEXT[:80]))
    telling = inspect_run.telling_units(steps.c, TEXT)
    save("cell_states", plots.draw_cell_states(steps.c, TEXT, telling))
    memory = diagnostics.memory(trace)
    units = memory.layers[0].forward
    middle, long = np.quantile(units.time_constant, (0.5, 0.9), method="nearest")
    shares = {
        f"{gate}_{word}": f"{getattr(units, word)[gate].mean():.0%}" for gate in "ifo" for word in ("shut", "open")
    }
    return shares | {
        "loss": f"{summary['valid_loss']:.3f}",
        "hidden": str(len(units.dead)),
        "median_constant": f"{middle:.1f}",
        "long_constant": f"{long:.1f}",
        "dead": str(int(units.dead.sum())),
        "frozen": str(int(units.frozen.sum())),
        "report": "\n\n" + "".join(f"    {line}\n" for line in memory.report.splitlines()) + "\n",
    }


def adding_task() -> dict[str, str]:
    """The vanishing gradient and its cure, as ``python -m jaxlstm.diagnostics vanishing`` shows it."""
    networks = vanishing_gradient.contestants(HIDDEN)
    learners = {
        name: vanishing_gradient.learn(lstm, steps=STEPS, updates=UPDATES, batch=32, learning_rate=rate, seed=0)
        for name, (lstm, rate) in networks.items()
    }
    save("vanishing", plots.draw_vanishing(learners, title=f"The adding task over {STEPS} steps, {HIDDEN} units"))
    numbers = {"steps": str(STEPS), "updates": f"{UPDATES:,}", "adding_hidden": str(HIDDEN)}
    probe = synthetic.adding(np.random.default_rng(1), STEPS, 1)
    for short, name in (("rnn", "vanilla RNN"), ("zero", "LSTM, forget bias 0"), ("one", "LSTM, forget bias 1")):
        learner, (lstm, _) = learners[name], networks[name]
        numbers |= {
            f"{short}_error": f"{learner.errors[-1]:.4f}",
            f"{short}_before": power(learner.before[0] / learner.before[-1]),
            f"{short}_after": power(learner.after[0] / learner.after[-1]),
        }
        for when, params in zip(("before", "after"), learner.params):
            flow = diagnostics.gradient_flow(
                lstm, params.network, probe.inputs, lambda ys: (ys**2).sum(), jacobian="spectral"
            )
            numbers[f"{short}_jacobian_{when}"] = power(float(flow.network_jacobian[0, 0]))
            if short != "rnn":
                f = diagnostics.trace(lstm, params.network, probe.inputs).layers[0].forward.gates["f"]
                numbers[f"{short}_along_c_{when}"] = power(float(np.prod(np.asarray(f, np.float64), 0).max()))
    vanilla, lstm = "vanilla RNN", "LSTM, forget bias 1"
    for file, name, trained_yet in (("rnn_before", vanilla, 0), ("rnn_after", vanilla, 1), ("lstm_after", lstm, 1)):
        params = learners[name].params[trained_yet].network
        save(f"eigenvalues_{file}", plots.draw_eigenvalues(networks[name][0], params))
    return numbers


def power(value: float) -> str:
    """A number as people write it: 0.53, 17, or 7×10⁻¹⁴."""
    if 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 1 else f"{value:.3g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def save(name: str, figure: Any) -> None:
    """A figure of the pages."""
    figure.savefig(FIGURES / f"{name}.png", dpi=110)


def main() -> None:
    """All of it."""
    FIGURES.mkdir(exist_ok=True)
    numbers = character_model() | adding_task()
    numbers["jax"] = jax.__version__
    (FIGURES / "numbers.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKED.sub(lambda m: f"{m[1]}{numbers[m[2]]}{m[3]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
