"""What the training loop costs besides the compiled step: python benchmarks/loop.py --out benchmarks/results

The default run of train.py against the same compiled step called in a bare loop, in turns; seconds per step, medians.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from measuring import machine
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from jaxlstm import memory, training
from jaxlstm.checkpoints import Checkpoints
from jaxlstm.options import Options
from jaxlstm.tasks import TASKS

STEPS, BLOCK = 300, 50


def bare(options: Options) -> list[float]:
    """Seconds per step of the compiled step alone, one figure for each block of steps but the first."""
    task = TASKS[options.task].make(options)
    optimizer = training.optimizer(
        train.RATE["adamw"], warmup=options.warmup, weight_decay=options.weight_decay, clip=options.clip
    )
    params = task.init(jax.random.key(0))
    state = training.start(params, optimizer, task.carry(params), jax.random.key(1))
    step = training.make_step(task.loss, optimizer)
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


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for loop.json")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    memory.keep_freed()  # as train.py does
    times: dict[str, list[float]] = {"bare": [], "whole": [], "whole, diagnose 0": [], "saving": []}
    for _ in range(arguments.rounds):
        times["bare"] += bare(Options())
        for name, diagnose in (("whole", Options().diagnose), ("whole, diagnose 0", 0)):
            seconds, waited = whole(Options(diagnose=diagnose))
            times[name] += seconds
            times["saving"].append(waited)
    median = {name: statistics.median(values) for name, values in times.items()}
    outside = (median["whole"] + median["saving"]) / median["bare"] - 1
    print(json.dumps(median, indent=2))
    print(
        f"outside the compiled step: {outside:.1%} of its time, of which saving {median['saving'] / median['bare']:.1%}"
    )
    if arguments.out:
        result = {"machine": machine(), "seconds_per_step": times, "median": median, "outside": outside}
        (arguments.out / "loop.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
