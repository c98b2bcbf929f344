"""Checks and times every backend on an accelerator, in one command of at most nine minutes, without network.

python benchmarks/accelerator.py --out benchmarks/results       writes DEVICE/accelerator.json and a picture
python benchmarks/accelerator.py --dry --out /tmp/dry           the same stages on a CPU with tiny sizes, as a test
python benchmarks/accelerator.py --draw benchmarks/results/DEVICE/accelerator.json          only the picture

Each stage is a process of `accelerator_stages.py` under its own time limit: a hang, a crash or a missing package ends
one stage. The results so far are written every few seconds, so a run that is cut leaves a complete file. Needs jaxlstm
with its base dependencies; training needs optax, the picture matplotlib, and flax and PyTorch are timed if installed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerator_parity import BACKENDS
from accelerator_stages import DRY_TIMING_SHAPES, TIMING_SHAPES

from jaxlstm.atomic_write import atomic_write

STAGES_FILE = Path(__file__).with_name("accelerator_stages.py")
WHOLE_RUN = 525.0  # seconds for all stages; the rest of nine minutes is for the picture and the start
SLOWER = 5.0  # a busy CPU may be, than the accelerator that the limits are for
WRITE_INTERVAL = 5.0  # seconds between updates of the file during a stage
MARKS = {  # largest median in ms at (T, B, I, H) = (1024, 16, 768, 768) in bfloat16 on an H100
    "infer": 2.0,
    "train": 5.2,
}
MARKS_SHAPE = "1024,16,768,768"


@dataclass(frozen=True)
class Stage:
    """A process that writes its results to a JSON file.

    Args:
      name: key in the results.
      limit: seconds after which the process is killed.
      command: program and arguments; the path of its results file is appended.
      environment: variables in addition to this process's.
    """

    name: str
    limit: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def list_stages(*, dry: bool, work: Path) -> list[Stage]:
    """Returns all stages in their order."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),  # some stages compile the same programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if dry:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    else:
        environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}  # PyTorch needs some of the memory, too
    while_flag = "--xla_gpu_enable_command_buffer=+WHILE"

    def stage(name: str, limit: float, *arguments: str, **more: str) -> Stage:
        limit = limit * SLOWER if dry else limit
        options = [f"--work={work}", f"--limit={limit}", *(["--dry"] if dry else [])]
        command = [sys.executable, str(STAGES_FILE), *arguments, *options]
        return Stage(name, limit, command, environment | more)

    flags = f"{environment.get('XLA_FLAGS', '')} {while_flag}".strip()
    shapes = DRY_TIMING_SHAPES if dry else TIMING_SHAPES
    return [
        stage("device", 30, "device"),
        stage("reference", 25, "reference", JAX_PLATFORMS="cpu", JAX_ENABLE_X64="1"),
        *(stage(f"parity {name}", 25, "parity", name) for name in BACKENDS),
        *(stage(f"timing {shape}", 40 if n == 0 else 28, "timing", str(shape)) for n, shape in enumerate(shapes)),
        stage("unroll", 30, "unroll"),
        stage("command buffer", 18, "command_buffer", XLA_FLAGS=flags),
        stage("vmap", 18, "vmap"),
        stage("memory", 20, "memory"),
        stage("autotune", 35, "autotune"),
        stage("train", 120, "train"),
    ]


def run_stages(
    stages: Sequence[Stage], results: dict[str, Any], write: Callable[[], None], deadline: float, folder: Path
) -> None:
    """Runs the stages one after the other and adds an entry to ``results`` for each, also for those not reached.

    An entry has ``status``, ``seconds``, ``limit_s``, ``result`` with all that the stage wrote, and for a stage that
    did not succeed ``error`` and the end of its standard error. The status is ``ok``, ``failed`` (it exited with an
    error), ``crashed`` (a signal ended it), ``timeout`` (killed at its limit), ``running``, or ``not reached``.

    Args:
      stages: the stages.
      results: entries by name of the stage.
      write: called after each change of ``results``.
      deadline: value of `time.monotonic` at which the last stage is killed.
      folder: for the files of the stages.
    """
    for stage in stages:
        results[stage.name] = {"status": "not reached"}
    for number, stage in enumerate(stages):
        limit = min(stage.limit, deadline - time.monotonic())
        if limit <= 0:
            break
        entry = results[stage.name] = {"status": "running", "limit_s": round(limit, 1)}
        run_stage(stage, limit, entry, write, folder / str(number))
        write()
        print(f"{stage.name}: {entry['status']}, {entry['seconds']} s {entry.get('error', '')}".rstrip(), flush=True)


def run_stage(stage: Stage, limit: float, entry: dict[str, Any], write: Callable[[], None], prefix: Path) -> None:
    """Runs one stage and fills its entry; see `run_stages`."""
    output, errors = prefix.with_suffix(".json"), prefix.with_suffix(".err")
    start = time.monotonic()
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [*stage.command, str(output)],
            stdout=log,
            stderr=log,
            env=os.environ | stage.environment,
            process_group=0,  # so that its own processes are killed with it
        )
        try:
            while process.poll() is None and (left := start + limit - time.monotonic()) > 0:
                try:
                    process.wait(min(left, WRITE_INTERVAL))
                except subprocess.TimeoutExpired:
                    entry["result"] = read_json(output)
                    write()
            timed_out = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    entry["seconds"] = round(time.monotonic() - start, 1)
    entry["result"] = read_json(output)
    if timed_out:
        entry |= {"status": "timeout", "error": f"killed after {limit:.0f} s"}
    elif code < 0:
        entry |= {"status": "crashed", "error": f"ended by signal {signal.Signals(-code).name}"}
    else:
        entry["status"] = "ok" if code == 0 else "failed"
    if entry["status"] != "ok":
        tail = errors.read_text(encoding="utf-8", errors="replace")[-3000:]
        entry["stderr"] = tail
        entry.setdefault("error", (tail.strip().splitlines() or [f"exit status {code}"])[-1])


def read_json(path: Path) -> Any:
    """Returns the content of a file that a stage replaces as a whole; None before it exists."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by a value as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def compare_with_marks(stages: dict[str, Any]) -> dict[str, Any]:
    """Returns, for each mark, the fastest backend of jaxlstm in bfloat16 at the marks' shape; empty without times."""
    benchmarks = ((stages.get(f"timing {MARKS_SHAPE}") or {}).get("result") or {}).get("benchmarks", {})
    result: dict[str, Any] = {}
    for kind, mark in MARKS.items():
        times = {
            name: entry[kind]["median_ms"]
            for name, entry in benchmarks.items()
            if name.startswith("jaxlstm") and "bf16" in name and kind in entry
        }
        if times:
            best = min(times, key=times.__getitem__)
            result[kind] = {"mark_ms": mark, "best": best, "median_ms": times[best], "reached": times[best] <= mark}
    return result


def draw(results: dict[str, Any], path: Path) -> str:
    """Draws the times of all benchmarks and returns one line that says so, or that matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed; draw it elsewhere with accelerator.py --draw FILE.json"
    timed = {
        name.removeprefix("timing "): entry["result"]["benchmarks"]
        for name, entry in results["stages"].items()
        if name.startswith("timing ") and (entry.get("result") or {}).get("benchmarks")
    }
    figure = Figure(figsize=(4 + 2.6 * len(timed), 8), layout="constrained")
    axes = figure.subplots(2, max(len(timed), 1), squeeze=False)
    for column, (shape, benchmarks) in enumerate(timed.items()):
        for row, kind in enumerate(("infer", "train")):
            bars = {name: entry[kind] for name, entry in benchmarks.items() if kind in entry}
            ax = axes[row, column]
            medians = [bar["median_ms"] for bar in bars.values()]
            low = [max(bar["median_ms"] - bar["q1_ms"], 0) for bar in bars.values()]
            high = [max(bar["q3_ms"] - bar["median_ms"], 0) for bar in bars.values()]
            colors = ["#0072B2" if name.startswith("jaxlstm") else "#D55E00" for name in bars]
            ax.barh(list(bars), medians, xerr=(low, high), color=colors)
            ax.invert_yaxis()
            ax.set_title(f"{'forward' if kind == 'infer' else 'forward and backward'}\nT,B,I,H = {shape}", fontsize=9)
            ax.set_xlabel("ms, median and quartiles")
            ax.tick_params(labelsize=7)
    device = (results["stages"].get("device", {}).get("result") or {}).get("device", "unknown device")
    figure.suptitle(f"{device}{', tiny sizes: the times mean nothing' if results['dry'] else ''}")
    figure.savefig(path, dpi=110)
    return f"wrote {path}"


def device_slug(results: dict[str, Any]) -> str:
    """Returns a file name for results of the device that the first stage found."""
    device = (results["stages"]["device"].get("result") or {}).get("device", "unknown")
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run_all(out: Path, *, dry: bool) -> Path:
    """Runs all stages and returns the path of the results.

    Raises:
      SystemExit: if there is no accelerator, unless ``dry``.
    """
    deadline = time.monotonic() + WHOLE_RUN
    stages: dict[str, Any] = {}
    results = {"dry": dry, "started": datetime.now(UTC).isoformat(timespec="seconds"), "complete": False}
    results |= {"stages": stages}
    with tempfile.TemporaryDirectory() as work:
        first, *rest = list_stages(dry=dry, work=Path(work))
        run_stages([first], stages, lambda: None, deadline, Path(work))
        if not dry and (stages["device"].get("result") or {}).get("backend") == "cpu":
            raise SystemExit("accelerator.py: JAX found no accelerator; --dry runs all stages on a CPU")
        path = out / "dry.json" if dry else out / device_slug(results) / "accelerator.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(work) / "rest"
        folder.mkdir()
        run_stages(rest, stages, lambda: write_json(path, results), deadline, folder)
    results |= {"marks": compare_with_marks(stages), "complete": True}
    results["picture"] = draw(results, path.with_suffix(".png"))
    write_json(path, results)
    print(results["picture"])
    return path


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU; the times mean nothing")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="draw the picture of results, and run nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the stage that runs, too
    if args.draw:
        print(draw(json.loads(args.draw.read_text(encoding="utf-8")), args.draw.with_suffix(".png")))
        return
    print(f"wrote {run_all(args.out, dry=args.dry)}")


if __name__ == "__main__":
    main()
