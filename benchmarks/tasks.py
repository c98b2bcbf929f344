"""The stated results of `train.py`'s tasks: run each with its defaults and write down what came out, and on what.

python benchmarks/tasks.py adding copying digits forecast wordlm    into benchmarks/results/task-NAME.json
python benchmarks/tasks.py adding --cells lstm rnn                  two cells at the same budget
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import machine

from jaxlstm.reporting import write_json

ROOT = Path(__file__).parent.parent


def result(task: str, cell: str) -> dict[str, Any]:
    """Summary and validation figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), "--task", task, "--cell", cell, "--run-dir", str(run)]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            "command": " ".join(["python", "train.py", *command[2:-2]]),
            "summary": json.loads((run / "summary.json").read_text()),
            "validation": [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == "valid"],
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--cells", nargs="+", default=["lstm"])
    arguments = parser.parse_args()
    for task in arguments.tasks:
        results = {cell: result(task, cell) for cell in arguments.cells}
        write_json(ROOT / "benchmarks" / "results" / f"task-{task}.json", {"machine": machine(), **results})


if __name__ == "__main__":
    main()
