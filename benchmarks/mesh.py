"""Compare training over several devices with one: python benchmarks/mesh.py --out benchmarks/results

Runs train.py, interleaved, on one device, with the batch over two devices, with the hidden units over two devices, and
as two processes over loopback. Reports characters per second, the median of all records but the first of each run. On a
machine without accelerators the devices are created from the CPU, and the single device uses all cores.
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
from machine import describe_machine, machine_slug
from rich.console import Console
from timing import check_rounds

from jaxlstm.training.metrics import write_json

ROOT = Path(__file__).parent.parent
MESHES = {  # name -> options of each process
    "one device": [[]],
    "data=2": [["--mesh", "data=2"]],
    "model=2": [["--mesh", "model=2"]],
    "data=2, two processes": [["--mesh", "data=2", "--processes", "2", "--process", str(n)] for n in range(2)],
}
STEPS_PER_RECORD, NUM_RECORDS = 10, 4


@dataclass(frozen=True)
class Options:
    """Compare training over several devices with one."""

    out: Path | None = None
    """Folder for mesh.json."""
    rounds: int = 2
    """Runs of each mesh, interleaved."""
    sizes: tuple[str, ...] = ("128,32", "512,32", "512,128", "1024,32")
    """Hidden size and batch size of each comparison."""


def characters_per_second(processes: Sequence[Sequence[str]], options: Sequence[str]) -> list[float]:
    """Runs train.py and returns the speed of each record but the first.

    Args:
      processes: options of each process.
      options: of train.py, common to all processes.

    Raises:
      ValueError: if a process fails.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free_port.getsockname()[1]}"
        free_port.close()
        run_dir = Path(folder) / "run"
        num_steps = str(STEPS_PER_RECORD * NUM_RECORDS)
        bounds = ["--max-steps", num_steps, "--log-every", str(STEPS_PER_RECORD), "--valid-every", num_steps]
        command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(run_dir), "--diagnose", "0", *bounds]
        coordinator = ["--coordinator", address] if len(processes) > 1 else []
        started = [
            subprocess.Popen([*command, *options, *process_options, *coordinator], stdout=subprocess.DEVNULL)
            for process_options in processes
        ]
        exit_codes = [process.wait() for process in started]
        if any(exit_codes):
            raise ValueError(f"a run of train.py failed, with {' '.join([*processes[0], *options])}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["characters_per_second"] for row in rows if row["split"] == "train"][1:]


def parse_size(text: str) -> tuple[int, int]:
    """Parses ``hidden size,batch size``.

    Raises:
      ValueError: if ``text`` is not two positive integers.
    """
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"a size is a hidden size and a batch size, such as 128,32, got {text}")
    return int(numbers[0]), int(numbers[1])


def main(options: Options, console: Console) -> None:
    """Measures all sizes, prints ratios and writes the results."""
    path = options.out and report.prepare_output(options.out / machine_slug() / "mesh.json")
    results = []
    for hidden, batch in [parse_size(text) for text in options.sizes]:
        speeds: dict[str, list[float]] = {name: [] for name in MESHES}
        for _ in range(check_rounds(options.rounds)):
            for name, processes in MESHES.items():
                speeds[name] += characters_per_second(processes, ["--hidden", str(hidden), "--batch", str(batch)])
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        ratios = {name: round(value / medians["one device"], 3) for name, value in medians.items()}
        results.append({"hidden": hidden, "batch": batch, "characters_per_second": medians, "of_one_device": ratios})
        report.print_line(console, f"hidden {hidden}, batch {batch}: {ratios}")
    if path is not None:
        write_json(path, {"machine": describe_machine(), "window": 64, "runs": results})


if __name__ == "__main__":
    report.run_cli(main, Options)
