"""Time that the training loop adds to the compiled step: python benchmarks/loop.py --out benchmarks/results

Compares the default run of train.py with the same compiled step in a bare loop, in turns; medians of seconds per step.
"""

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import report
from machine import describe_machine, machine_slug
from rich.console import Console
from timing import check_rounds

from jaxlstm.training import train_step
from jaxlstm.training.checkpointing import Checkpoints
from jaxlstm.training.config import Options
from jaxlstm.training.loop import Trainer
from jaxlstm.training.malloc import keep_freed_memory
from jaxlstm.training.metrics import write_json
from jaxlstm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxlstm.training.tasks import TASKS

NUM_STEPS, BLOCK = 300, 50


@dataclass(frozen=True)
class LoopOptions:
    """Time that the training loop adds to the compiled step."""

    out: Path | None = None
    """Folder for loop.json."""
    rounds: int = 3
    """Number of times that each is run, in turns."""


def time_bare_step(options: Options) -> list[float]:
    """Returns seconds per step of the compiled step alone, for each block of steps but the first."""
    task = TASKS[options.task].make(options)
    schedule = learning_rate_schedule(options.optimizer, options.peak_learning_rate, options.warmup)
    optimizer = make_optimizer(schedule, weight_decay=options.weight_decay, clip=options.clip, name=options.optimizer)
    params = task.init(jax.random.key(0))
    state = train_step.init_train_state(params, optimizer, task.init_carry(params), jax.random.key(1))
    step = train_step.make_step(task.loss, optimizer)
    batches = jax.device_put(list(itertools.islice(task.batches(0), BLOCK)))
    seconds = []
    for _ in range(NUM_STEPS // BLOCK):
        start = time.perf_counter()
        for batch in batches:
            state, metrics = step(state, batch, 0.5)
            metrics.loss.block_until_ready()
        seconds.append((time.perf_counter() - start) / BLOCK)
    return seconds[1:]


def time_run(options: Options) -> tuple[list[float], float]:
    """Returns seconds per step in a run of `Trainer`, and the seconds per step that it waited for saving."""
    waits: list[float] = []
    save = Checkpoints.save

    def timed_save(self: Checkpoints, *arguments: Any) -> None:
        start = time.perf_counter()
        save(self, *arguments)
        waits.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_options = replace(options, run_dir=run_dir, max_steps=NUM_STEPS, valid_every=NUM_STEPS)
        with mock.patch.object(Checkpoints, "save", timed_save):
            Trainer(run_options, Console(quiet=True)).run()
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["characters_per_second"] for row in rows if row["split"] == "train"]
    return [options.batch * options.window / speed for speed in speeds[1:]], sum(waits) / NUM_STEPS


def main(loop_options: LoopOptions, console: Console) -> None:
    """Measures, prints and writes the times."""
    path = loop_options.out and report.prepare_output(loop_options.out / machine_slug() / "loop.json")
    keep_freed_memory()  # as train.py does
    times: dict[str, list[float]] = {"bare": [], "whole": [], "whole, diagnose 0": [], "saving": []}
    for _ in range(check_rounds(loop_options.rounds)):
        times["bare"] += time_bare_step(Options())
        for name, diagnose in (("whole", Options().diagnose), ("whole, diagnose 0", 0)):
            seconds, waited = time_run(Options(diagnose=diagnose))
            times[name] += seconds
            times["saving"].append(waited)
    median = {name: statistics.median(values) for name, values in times.items()}
    outside = (median["whole"] + median["saving"]) / median["bare"] - 1
    report.print_table(
        console, "seconds per step", ("", "median"), [(n, f"{value:.6f}") for n, value in median.items()]
    )
    saving = median["saving"] / median["bare"]
    console.print(
        f"outside the compiled step: {outside:.1%} of its time, of which saving {saving:.1%}", highlight=False
    )
    if path is not None:
        result = {"machine": describe_machine(), "seconds_per_step": times, "median": median, "outside": outside}
        write_json(path, result)


if __name__ == "__main__":
    report.run_cli(main, LoopOptions)
