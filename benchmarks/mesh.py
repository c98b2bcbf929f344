"""The training step over several devices against one: python benchmarks/mesh.py --out benchmarks/results

Runs train.py, in turns, on one device, with the batch over two, with the hidden units over two, and as two processes
that speak over loopback; characters per second, medians of the records but the first. On a machine without accelerators
the devices are made of the CPU, and one of them has the use of all cores.
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import report
from measuring import at_least_one, machine
from rich.console import Console

from jaxlstm.training.metrics import write_json

ROOT = Path(__file__).parent.parent
MESHES = {
    "one device": [[]],
    "data=2": [["--mesh", "data=2"]],
    "model=2": [["--mesh", "model=2"]],
    "data=2, two processes": [["--mesh", "data=2", "--processes", "2", "--process", str(n)] for n in range(2)],
}
EVERY, RECORDS = 10, 4  # steps between records; records


@dataclass(frozen=True)
class Options:
    """The training step over several devices against one."""

    out: Path | None = None
    """Folder for mesh.json."""
    rounds: int = 2
    """Times that each is run, in turns."""
    sizes: tuple[str, ...] = ("128,32", "512,32", "512,128", "1024,32")
    """Hidden units and rows of the batch."""


def speeds(processes: Sequence[Sequence[str]], options: Sequence[str]) -> list[float]:
    """Characters per second of each record but the first, of a run by one process or more."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        run = Path(folder) / "run"
        bounds = ["--max-steps", EVERY * RECORDS, "--log-every", EVERY, "--valid-every", EVERY * RECORDS]
        common = [sys.executable, ROOT / "train.py", "--run-dir", run, "--diagnose", "0", *bounds, *options]
        started = [
            subprocess.Popen(
                [str(word) for word in [*common, *its, *(["--coordinator", address] if len(processes) > 1 else [])]],
                stdout=subprocess.DEVNULL,
            )
            for its in processes
        ]
        codes = [each.wait() for each in started]
        if any(codes):
            raise ValueError(f"a run of train.py failed, with {' '.join([*processes[0], *options])}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["characters_per_second"] for row in rows if row["split"] == "train"][1:]


def parse(size: str) -> tuple[int, int]:
    """Hidden units and rows.

    Raises:
      ValueError: with what was received, where it is anything else.
    """
    numbers = size.split(",")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"a size is hidden units and rows, such as 128,32, got {size}")
    return int(numbers[0]), int(numbers[1])


def main(options: Options, console: Console) -> None:
    """Measure and report."""
    path = options.out and report.to_be_written(options.out / "mesh.json")
    found = []
    for hidden, batch in [parse(size) for size in options.sizes]:
        times: dict[str, list[float]] = {name: [] for name in MESHES}
        for _ in range(at_least_one(options.rounds)):
            for name, processes in MESHES.items():
                times[name] += speeds(processes, ["--hidden", str(hidden), "--batch", str(batch)])
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: round(value / medians["one device"], 3) for name, value in medians.items()}
        found.append({"hidden": hidden, "batch": batch, "characters_per_second": medians, "of_one_device": ratios})
        console.print(f"hidden {hidden}, batch {batch}: {ratios}", markup=False, highlight=False, soft_wrap=True)
    if path is not None:
        write_json(path, {"machine": machine(), "window": 64, "runs": found})


if __name__ == "__main__":
    report.obey(main, Options)
