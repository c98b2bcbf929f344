"""The commands ``inspect``, ``explore`` and ``vanishing``: views of trained networks and of gradients through time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from jaxlstm import validation
from jaxlstm.atomic_write import atomic_write
from jaxlstm.diagnostics import explore, gate_statistics, gradient_advice, plots, trace
from jaxlstm.training import cli, inspect_run, playback, vanishing_gradient, vanishing_plots
from jaxlstm.training.cli import help_text
from jaxlstm.training.config import check_limit, check_seed, load_config
from jaxlstm.training.data.text import read_text
from jaxlstm.training.memory import check_memory
from jaxlstm.training.metrics import print_line

DESCRIPTION = """Look inside recurrent networks.

{prog} vanishing                          why an LSTM learns over long spans, in one figure
{prog} inspect runs/NAME --text "..."     the gates of a trained network
{prog} explore runs/NAME --text FILE      a page with its units, predictions and gradients
"""
SHOWN_CHARACTERS = 120  # in the figure of the gates
EXPLORED_CHARACTERS = 2000  # in the page of `Explore`


@dataclass(frozen=True)
class Vanishing:
    """Train a vanilla RNN and LSTMs on the adding task; draw their gradients through time and learning curves."""

    out: Path = Path("vanishing.png")
    """File of the figure, ending in .png, .pdf or .svg."""
    steps: int = 100
    """Length of a sequence: the span that the gradient has to reach over."""
    hidden: int = 64
    """Hidden size."""
    updates: int = 1600
    """Training updates of each network."""
    batch: int = 32
    """Batch size."""
    seed: int = 0
    """Seed of weights and data."""

    def check(self) -> None:
        """Checks the numbers; tyro would print an error of the constructor as a box.

        Raises:
          ValueError: names the first option that is out of range.
        """
        for name, minimum in (("steps", 2), ("hidden", 1), ("updates", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, got {getattr(self, name)}")
            if name != "seed":
                check_limit(f"--{name}", getattr(self, name), "size")
        check_seed(self.seed)

    def run(self, console: Console) -> None:
        """Trains the networks, draws the figure and prints its numbers."""
        self.check()
        out = check_new_file(self.out, ".png", ".pdf", ".svg")
        recurrent_weights, outputs = 4 * self.hidden**2, self.steps * self.batch * self.hidden
        check_memory(4 * (recurrent_weights + outputs), "--hidden, --steps or --batch")
        results = {}
        with Progress(console=console, disable=not console.is_terminal) as bar:
            for name, (lstm, learning_rate) in vanishing_gradient.compared_networks(self.hidden).items():
                results[name] = vanishing_gradient.train_network(
                    lstm,
                    steps=self.steps,
                    updates=self.updates,
                    batch_size=self.batch,
                    learning_rate=learning_rate,
                    seed=self.seed,
                    on_progress=_progress_callback(bar, name, self.updates),
                )
        title = f"The adding task over {self.steps} steps, hidden size {self.hidden}"
        vanishing_plots.draw_vanishing(results, title=title).savefig(out, dpi=150)
        print_line(console, vanishing_gradient.format_summary(results, self.steps))
        print_line(console, str(out))


def _progress_callback(bar: Progress, name: str, updates: int) -> Callable[[int, float], None]:
    """Adds a progress bar for one network and returns the function that updates it."""
    bar_task = bar.add_task(f"{name:20}", total=updates)
    return lambda completed, _: bar.update(bar_task, completed=completed)


@dataclass(frozen=True)
class Inspect:
    """Draw gates, cell states and eigenvalues of a trained character model, and print statistics of its gates."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    text: str
    """Input text; the figure of the gates shows its first 120 characters."""
    layer: int = 0
    """Layer, from 0."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Folder of the figures, new or empty. Default: a folder in the run directory named by the time."""

    def run(self, console: Console) -> None:
        """Traces the network, draws the figures and prints the statistics."""
        model, params, ids = inspect_run.load_character_model(self.run_dir, self.text)
        validation.index_below("--layer", self.layer, model.lstm.num_layers)
        folder = self.out or self.run_dir / time.strftime("inspect-%Y-%m-%d-%H%M%S")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} is not an empty folder; pictures never replace others")
        traced = trace(model.lstm, params.lstm, params.embedding[ids])
        steps = traced.layers[self.layer].forward
        text = self.text[:SHOWN_CHARACTERS]
        figures = {
            "gates": plots.draw_gates(jax.tree.map(lambda a: a[: len(text)], steps), text),
            "eigenvalues": plots.draw_eigenvalues(model.lstm, params.lstm, layer=self.layer),
        }
        if steps.c is not None:
            titles = inspect_run.unit_titles(inspect_run.property_units(steps.c, self.text))
            figures["cell_states"] = plots.draw_cell_states(steps.c, self.text, titles)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
        print_line(console, gate_statistics(traced).report)
        norms = inspect_run.recorded_gradient_norms(self.run_dir)
        if np.isfinite(norms).any():
            clip = load_config(self.run_dir, "RUN_DIR")[0].clip
            print_line(console, gradient_advice(norms, clip=clip).report)
        print_line(console, f"{folder}: {', '.join(f'{name}.png' for name in figures)}")


@dataclass(frozen=True)
class Explore:
    """Write a page that shows the units, predictions and gradients of a trained character model over a text.

    It also plays back the gates over the training, from the run's diagnosis.jsonl.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    text: Path
    """Text file in UTF-8; the page shows its first 2,000 characters."""
    layer: int = 0
    """Layer, from 0."""
    out: Path = Path("explorer.html")
    """File of the page, ending in .html."""

    def run(self, console: Console) -> None:
        """Traces the network and writes the page."""
        out = check_new_file(self.out, ".html")
        text = read_text(self.text)[: EXPLORED_CHARACTERS + 1]  # the last one is predicted only
        model, params, ids = inspect_run.load_character_model(self.run_dir, text)
        validation.index_below("--layer", self.layer, model.lstm.num_layers)
        if len(text) < 2:
            raise ValueError(f"--text {self.text} must have at least two characters: each predicts the next one")
        page = explore(
            model.lstm,
            params.lstm,
            params.embedding[ids[:-1]],
            labels=text[:-1],
            layer=self.layer,
            logits=partial(model.logits, params),
            targets=ids[1:],
            classes=list(load_config(self.run_dir, "RUN_DIR")[1]["vocabulary"]),
            properties=inspect_run.text_properties(text[:-1]),
            title=f"{self.run_dir.name}: {self.text.name}",
            training=playback.read_rows(self.run_dir),
        )
        with atomic_write(out, overwrite=False) as file:
            file.write(page.encode())
        print_line(console, f"{out}: {len(text) - 1:,} character{'s' if len(text) > 2 else ''}")


def check_new_file(path: Path, *endings: str) -> Path:
    """Returns the path of a new file, if it can be written without replacing one.

    Raises:
      ValueError: if it exists, has another ending, or its folder does not exist.
    """
    if path.exists():
        raise ValueError(f"--out {path} exists; the command never replaces a file")
    if path.suffix.lower() not in endings:
        *others, last = endings
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"--out must end in {expected}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: its folder does not exist")
    return path


COMMANDS: dict[str, Any] = {"vanishing": Vanishing, "inspect": Inspect, "explore": Explore}


def inspect_main(arguments: Sequence[str], prog: str = "jaxlstm inspect") -> None:
    """Runs the command ``jaxlstm inspect``."""
    _run(prog, partial(cli.parse_command, Inspect, arguments, prog))


def explore_main(arguments: Sequence[str], prog: str = "jaxlstm explore") -> None:
    """Runs the command ``jaxlstm explore``."""
    _run(prog, partial(cli.parse_command, Explore, arguments, prog))


def vanishing_main(arguments: Sequence[str], prog: str = "jaxlstm vanishing") -> None:
    """Runs the command ``jaxlstm vanishing``."""
    _run(prog, partial(cli.parse_command, Vanishing, arguments, prog))


def main(arguments: Sequence[str], prog: str = "python -m jaxlstm.diagnostics") -> None:
    """Runs ``python -m jaxlstm.diagnostics``, whose first argument is the command."""
    if arguments and arguments[0] in COMMANDS:
        prog = f"{prog} {arguments[0]}"
        _run(prog, partial(cli.parse_command, COMMANDS[arguments[0]], arguments[1:], prog))
    else:
        _run(prog, partial(_parse_without_command, arguments, prog))


def _parse_without_command(arguments: Sequence[str], prog: str) -> Any:
    """Shows the help of all commands.

    Raises:
      ValueError: if the arguments begin with no command and no option.
    """
    if not arguments:
        raise ValueError(f"expected a command, one of {', '.join(COMMANDS)} (--help describes them)")
    if not arguments[0].startswith("-"):
        validation.choice("the command", arguments[0], COMMANDS)
    description = help_text(DESCRIPTION.format(prog=prog))
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=prog, description=description, args=list(arguments))


def _run(prog: str, parse: Callable[[], Any]) -> None:
    cli.set_up_process()
    with cli.one_line_errors(prog):
        parse().run(Console())
