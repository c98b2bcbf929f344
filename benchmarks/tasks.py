"""Measures the documented results of the tasks of `train.py`.

python benchmarks/tasks.py digits                       one run, written to benchmarks/results/MACHINE/task-digits.json
python benchmarks/tasks.py adding "--cell lstm" "--cell rnn --learning-rate 1e-3"     two runs with these options
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, machine_slug

from jaxlstm.training.metrics import write_json

ROOT = Path(__file__).parent.parent


def run_task(task: str, options: str) -> dict[str, Any]:
    """Runs ``train.py`` once and returns its command, its summary and its validation metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        arguments = ["--task", task, *shlex.split(options)]
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--run-dir", str(run_dir)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"tasks.py: train.py failed with {shlex.join(arguments)}")
        return read_run(run_dir, arguments)


def read_run(run_dir: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the command, the summary and the validation metrics of a run of ``train.py`` that has ended."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "command": shlex.join(["python", "train.py", *arguments]),
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "validation": [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == "valid"],
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("options", nargs="*", default=[""], help="options of a run of train.py, as one argument")
    parser.add_argument("--name", help="name of the file after task-; default: the task")
    args = parser.parse_args()
    runs = [run_task(args.task, options) for options in args.options]
    name = f"task-{args.name or args.task}.json"
    path = ROOT / "benchmarks" / "results" / machine_slug() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": describe_machine(), "runs": runs})


if __name__ == "__main__":
    main()
