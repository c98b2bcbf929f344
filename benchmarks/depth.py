"""Compares plain and residual stacks of several depths: validation loss of a character language model.

python benchmarks/depth.py --data tinyshakespeare
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine, machine_slug

from jaxlstm.training.metrics import write_json

ROOT = Path(__file__).parent.parent
SIZES = "--hidden 64 --embedding 64 --batch 16 --window 64 --dropout 0 --diagnose 0"
TRAINING = "--max-steps 800 --valid-every 800 --log-every 100"


def run(arguments: list[str], data: str) -> dict[str, Any]:
    """Runs ``train.py`` once and returns its command and results."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), "--data", data, *arguments, "--run-dir", str(run_dir)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"depth.py: train.py failed with {shlex.join(arguments)}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "command": shlex.join(["python", "train.py", "--data", Path(data).stem, *arguments]),
        "parameters": summary["parameters"],
        "valid_loss": summary["valid_loss"],
        "validation": [[row["step"], row["loss"]] for row in rows if row["split"] == "valid"],
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tinyshakespeare", help="the text, as for train.py")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--learning-rates", nargs="+", default=["1e-3", "4e-3"], help="the best of them counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / machine_slug() / "depth.json")
    args = parser.parse_args()
    runs = []
    for layers in args.layers:
        for stack in ("plain", "residual"):
            for rate in args.learning_rates:
                options = [*shlex.split(SIZES), *shlex.split(TRAINING), "--learning-rate", rate]
                options += ["--layers", str(layers), *(["--residual"] if stack == "residual" else [])]
                result = {"layers": layers, "stack": stack, "learning_rate": float(rate)} | run(options, args.data)
                runs.append(result)
                write_json(args.out, {"machine": describe_machine(), "runs": runs})
                print(f"{layers} layers, {stack}, {rate}: {result['valid_loss']:.4f} nats per character", flush=True)


if __name__ == "__main__":
    main()
