"""The training step over several devices against one: python benchmarks/mesh.py --out benchmarks/results

Runs train.py, in turns, on one device, with the batch over two, with the hidden units over two, and as two processes
that speak over loopback; characters per second, medians of the records but the first. On a machine without accelerators
the devices are made of the CPU, and one of them has the use of all cores.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import machine

from jaxlstm.reporting import write_json

ROOT = Path(__file__).parent.parent
MESHES = {
    "one device": [[]],
    "data=2": [["--mesh", "data=2"]],
    "model=2": [["--mesh", "model=2"]],
    "data=2, two processes": [["--mesh", "data=2", "--processes", "2", "--process", str(n)] for n in range(2)],
}
EVERY, RECORDS = 10, 4  # steps between records; records


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
            raise RuntimeError(f"a run failed: {[*processes[0], *options]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["characters_per_second"] for row in rows if row["split"] == "train"][1:]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for mesh.json")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["128,32", "512,32", "512,128", "1024,32"],
        help="hidden units and rows of the batch",
    )
    arguments = parser.parse_args()
    found = []
    for hidden, batch in [map(int, size.split(",")) for size in arguments.sizes]:
        times: dict[str, list[float]] = {name: [] for name in MESHES}
        for _ in range(arguments.rounds):
            for name, processes in MESHES.items():
                times[name] += speeds(processes, ["--hidden", str(hidden), "--batch", str(batch)])
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: round(value / medians["one device"], 3) for name, value in medians.items()}
        found.append({"hidden": hidden, "batch": batch, "characters_per_second": medians, "of_one_device": ratios})
        print(f"hidden {hidden}, batch {batch}: {ratios}", flush=True)
    if arguments.out:
        write_json(arguments.out / "mesh.json", {"machine": machine(), "window": 64, "runs": found})


if __name__ == "__main__":
    main()
