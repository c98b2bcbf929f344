"""Look inside from the command line.

python -m jaxlstm.diagnostics vanishing                          why an LSTM learns over long spans, in one figure
python -m jaxlstm.diagnostics inspect runs/NAME --text "..."     the gates of a trained run
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import Progress

from jaxlstm.diagnostics import gate_statistics, plots, trace
from jaxlstm.training import inspect_run, vanishing_gradient
from jaxlstm.training.config import check_seed, help_text
from jaxlstm.training.metrics import say


@dataclass(frozen=True)
class Vanishing:
    """Train a vanilla network and LSTMs on the adding task, and draw the gradient through time and the learning."""

    out: Path = Path("vanishing.png")
    """The figure: PNG, PDF or SVG by its ending."""
    steps: int = 100
    """Length of a sequence: the span over which the gradient has to reach."""
    hidden: int = 64
    """Hidden units."""
    updates: int = 1600
    """Updates of training for each network."""
    batch: int = 32
    """Sequences of one update."""
    seed: int = 0
    """Seed of weights and data."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("hidden", 1), ("updates", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        check_seed(self.seed)

    def run(self, console: Console) -> None:
        """Train, draw, say."""
        out = unused(self.out)
        learners = {}
        with Progress(console=console, disable=not console.is_terminal) as bar:
            for name, (lstm, learning_rate) in vanishing_gradient.contestants(self.hidden).items():
                task = bar.add_task(f"{name:20}", total=self.updates)
                learners[name] = vanishing_gradient.learn(
                    lstm,
                    steps=self.steps,
                    updates=self.updates,
                    batch=self.batch,
                    learning_rate=learning_rate,
                    seed=self.seed,
                    tell=lambda updates, error: bar.update(task, completed=updates),  # noqa: B023  (called at once)
                )
        title = f"The adding task over {self.steps} steps, {self.hidden} units"
        plots.draw_vanishing(learners, title=title).savefig(out, dpi=150)
        say(console, vanishing_gradient.sentence(learners, self.steps))
        say(console, str(out))


@dataclass(frozen=True)
class Inspect:
    """Draw the gates, the cell states and the eigenvalues of a trained character model, and say what they mean."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of train.py."""
    text: str
    """What the network reads: up to 120 characters fit the picture of the gates, more go into the rest."""
    layer: int = 0
    """Layer, from 0."""
    out: Path | None = None
    """Folder for the pictures, new or empty. By default one in the folder of the run, named by the time of day."""

    def run(self, console: Console) -> None:
        """Trace, draw, say."""
        model, params, ids = inspect_run.load(self.run_dir, self.text)
        if not 0 <= self.layer < model.lstm.num_layers:
            raise ValueError(f"--layer must be one of 0 to {model.lstm.num_layers - 1}, got {self.layer}")
        folder = self.out or self.run_dir / time.strftime("inspect-%Y-%m-%d-%H%M%S")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} is not an empty folder; pictures never replace others")
        found = trace(model.lstm, params.lstm, params.embedding[ids])
        steps = found.layers[self.layer].forward
        shown = jax.tree.map(lambda a: a[: len(self.text[:120])], steps)
        drawn = {
            "gates": plots.draw_gates(shown, self.text[:120]),
            "eigenvalues": plots.draw_eigenvalues(model.lstm, params.lstm, layer=self.layer),
        }
        if steps.c is not None:
            drawn["cell_states"] = plots.draw_cell_states(
                steps.c, self.text, inspect_run.telling_units(steps.c, self.text)
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
        say(console, gate_statistics.memory(found).report)
        say(console, f"{folder}: {', '.join(f'{name}.png' for name in drawn)}")


def unused(path: Path) -> Path:
    """``path``, if it can be written without replacing anything."""
    if path.exists():
        raise ValueError(f"--out {path} exists; a picture never replaces another file")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path} is in no folder that exists")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ``arguments`` are those of the process where None."""
    commands = {"vanishing": Vanishing, "inspect": Inspect}
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m jaxlstm.diagnostics", description=help_text(__doc__ or ""), args=arguments
        )
        command.run(Console())
    except (ValueError, OSError) as error:
        raise SystemExit(f"jaxlstm.diagnostics: {error}") from None
    except KeyboardInterrupt:
        print("jaxlstm.diagnostics: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
