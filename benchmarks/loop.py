"""What the training loop costs besides the compiled step: python benchmarks/loop.py --out benchmarks/results

The default run of train.py against the same compiled step called in a bare loop, in turns; seconds per step, medians.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import report
from measuring import at_least_one, machine
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from jaxlstm.training import malloc, train_step
from jaxlstm.training.checkpointing import Checkpoints
from jaxlstm.training.config import Options
from jaxlstm.training.metrics import write_json
from jaxlstm.training.tasks import TASKS

STEPS, BLOCK = 300, 50


@dataclass(frozen=True)
class Measured:
    """What the training loop costs besides the compiled step."""

    out: Path | None = None
    """Folder for loop.json."""
    rounds: int = 3
    """Times that each is run, in turns."""


def bare(options: Options) -> list[float]:
    """Seconds per step of the compiled step alone, one figure for each block of steps but the first."""
    task = TASKS[options.task].make(options)
    optimizer = train_step.optimizer(
        train.RATE["adamw"], warmup=options.warmup, weight_decay=options.weight_decay, clip=options.clip
    )
    params = task.init(jax.random.key(0))
    state = train_step.start(params, optimizer, task.carry(params), jax.random.key(1))
    step = train_step.make_step(task.loss, optimizer)
    batches = jax.device_put(list(itertools.islice(task.batches(0), BLOCK)))
    seconds = []
    for _ in range(STEPS // BLOCK):
        began = time.perf_counter()
        for batch in batches:
            state, outcome = step(state, batch, 0.5)
            outcome.loss.block_until_ready()
        seconds.append((time.perf_counter() - began) / BLOCK)
    return seconds[1:]


def whole(options: Options) -> tuple[list[float], float]:
    """The same within a run of train.py, and the seconds that its saves kept it waiting, per step."""
    waited = 0.0
    save = Checkpoints.save

    def timed(self: Checkpoints, *arguments: Any) -> None:
        nonlocal waited
        began = time.perf_counter()
        save(self, *arguments)
        waited += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        asked = replace(options, run_dir=run, max_steps=STEPS, valid_every=STEPS)
        with mock.patch.object(Checkpoints, "save", timed):
            train.train(asked, Console(quiet=True))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["characters_per_second"] for row in rows if row["split"] == "train"]
    return [options.batch * options.window / speed for speed in speeds[1:]], waited / STEPS


def main(measured: Measured, console: Console) -> None:
    """Measure and report."""
    path = measured.out and report.to_be_written(measured.out / "loop.json")
    malloc.keep_freed()  # as train.py does
    times: dict[str, list[float]] = {"bare": [], "whole": [], "whole, diagnose 0": [], "saving": []}
    for _ in range(at_least_one(measured.rounds)):
        times["bare"] += bare(Options())
        for name, diagnose in (("whole", Options().diagnose), ("whole, diagnose 0", 0)):
            seconds, waited = whole(Options(diagnose=diagnose))
            times[name] += seconds
            times["saving"].append(waited)
    median = {name: statistics.median(values) for name, values in times.items()}
    outside = (median["whole"] + median["saving"]) / median["bare"] - 1
    report.table(console, "seconds per step", ("", "median"), [(n, f"{value:.6f}") for n, value in median.items()])
    saving = median["saving"] / median["bare"]
    console.print(
        f"outside the compiled step: {outside:.1%} of its time, of which saving {saving:.1%}", highlight=False
    )
    if path is not None:
        result = {"machine": machine(), "seconds_per_step": times, "median": median, "outside": outside}
        write_json(path, result)


if __name__ == "__main__":
    report.obey(main, Measured)
