"""The stated results of `train.py`'s tasks: run one of them, as often as wanted, and write down what came out.

python benchmarks/tasks.py digits                                   into benchmarks/results/task-digits.json
python benchmarks/tasks.py adding "--cell lstm" "--cell rnn --learning-rate 1e-3"     two runs, each with its options
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import machine

from jaxlstm.training.metrics import write_json

ROOT = Path(__file__).parent.parent


def result(task: str, options: str) -> dict[str, Any]:
    """Summary and validation figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        typed = ["--task", task, *shlex.split(options)]
        if subprocess.run([sys.executable, str(ROOT / "train.py"), *typed, "--run-dir", str(run)]).returncode:
            raise SystemExit(f"tasks.py: a run of train.py failed, with {shlex.join(typed)}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            "command": shlex.join(["python", "train.py", *typed]),
            "summary": json.loads((run / "summary.json").read_text()),
            "validation": [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == "valid"],
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("options", nargs="*", default=[""], help="of each run, as one argument")
    arguments = parser.parse_args()
    runs = [result(arguments.task, options) for options in arguments.options]
    write_json(ROOT / "benchmarks" / "results" / f"task-{arguments.task}.json", {"machine": machine(), "runs": runs})


if __name__ == "__main__":
    main()
