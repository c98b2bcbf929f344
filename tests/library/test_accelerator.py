"""`benchmarks/accelerator.py`: stages that hang, crash or fail are recorded as such, and a dry run has every stage."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlstm.recurrence.scan import Scan

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of ``benchmarks``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def stage(accelerator, name, code, limit=20.0):
    """Makes a stage from Python code that has the path of its results in ``path``."""
    code = f"import json, os, pathlib, signal, sys, time\npath = pathlib.Path(sys.argv[-1])\n{code}"
    return accelerator.Stage(name, limit, [sys.executable, "-S", "-c", code])


@pytest.mark.slow
def test_run_stages_records_hang_crash_and_failure(load, tmp_path):
    accelerator = load("accelerator")
    written = "path.write_text(json.dumps({'first': 1}))\n"
    stages = [
        stage(accelerator, "good", written),
        stage(accelerator, "hang", f"{written}time.sleep(60)", 3.0),
        stage(accelerator, "crash", f"{written}os.kill(os.getpid(), signal.SIGSEGV)"),
        stage(accelerator, "failure", "raise ValueError('the cause')"),
    ]
    results, states = {}, []

    def write():
        states.append({name: entry["status"] for name, entry in results.items()})

    accelerator.run_stages(stages, results, write, time.monotonic() + 60, tmp_path)
    assert {name: entry["status"] for name, entry in results.items()} == {
        "good": "ok",
        "hang": "timeout",
        "crash": "crashed",
        "failure": "failed",
    }
    assert [results[name]["result"] for name in ("good", "hang", "crash", "failure")] == [{"first": 1}] * 3 + [None]
    assert results["crash"]["error"] == "ended by signal SIGSEGV"
    assert results["failure"]["error"] == "ValueError: the cause"
    assert results["failure"]["stderr"].startswith("Traceback")
    assert states[0] == dict.fromkeys(results, "not reached") | {"good": "ok"}  # written after each stage


def test_run_stages_ends_with_the_whole_run(load, tmp_path):
    accelerator = load("accelerator")
    stages = [stage(accelerator, "long", "time.sleep(60)", 60.0), stage(accelerator, "late", "")]
    results = {}
    start = time.monotonic()
    accelerator.run_stages(stages, results, lambda: None, start + 0.2, tmp_path)
    assert time.monotonic() - start < 30
    assert [results[name]["status"] for name in ("long", "late")] == ["timeout", "not reached"]


def test_marks_name_the_fastest_backend_in_bfloat16(load):
    accelerator = load("accelerator")

    def times(infer, train):
        return {"infer": {"median_ms": infer}, "train": {"median_ms": train}}

    benchmarks = {
        "jaxlstm fused": times(1.0, 1.0),
        "jaxlstm fused bf16": times(3.0, 5.0),
        "jaxlstm pallas bf16": {"infer": {"median_ms": 1.9}},
        "torch bfloat16": times(0.5, 0.5),
        "jaxlstm scan bf16": {"missing": "a reason"},
    }
    stages = {f"timing {accelerator.MARKS_SHAPE}": {"result": {"benchmarks": benchmarks}}}
    marks = accelerator.compare_with_marks(stages)
    assert (marks["infer"]["best"], marks["infer"]["reached"]) == ("jaxlstm pallas bf16", True)
    assert (marks["train"]["best"], marks["train"]["median_ms"]) == ("jaxlstm fused bf16", 5.0)
    assert accelerator.compare_with_marks({}) == {}


def test_stages_fit_into_the_whole_run(load, tmp_path):
    """Something is left for training even if every other stage takes as long as it may."""
    accelerator = load("accelerator")
    *others, last = accelerator.list_stages(dry=False, work=tmp_path)
    assert last.name == "train"
    assert sum(each.limit for each in others) <= accelerator.WHOLE_RUN - 20
    assert accelerator.WHOLE_RUN <= 9 * 60 - 15


@pytest.mark.slow
def test_wrong_backend_is_found(load, tmp_path, monkeypatch):
    parity = load("accelerator_parity")
    monkeypatch.setattr(parity, "DRY_PAIRS", (("plain", "float32"),))
    assert list(parity.write_references(tmp_path, dry=True)) == ["plain"]

    def wrong(cell, directions, context):
        outputs, states = Scan()(cell, directions, context)
        return [y + jnp.asarray(1e-4, y.dtype) for y in outputs], states

    ((*_, verdict),) = parity.check_backend(wrong, tmp_path, dry=True)
    assert verdict["verdict"] == "wrong"
    assert verdict["error"] > verdict["tolerance"] > 1e-6
    ((*_, verdict),) = parity.check_backend("scan", tmp_path, dry=True)
    assert verdict["verdict"] == "equal"


@pytest.mark.slow
def test_dry_run_has_every_stage(load, tmp_path):
    accelerator, parity = load("accelerator"), load("accelerator_parity")
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "dry.json").read_text())
    assert results["dry"] is results["complete"] is True
    stages = results["stages"]
    assert list(stages) == [each.name for each in accelerator.list_stages(dry=True, work=tmp_path)]
    assert {name: entry["status"] for name, entry in stages.items()} == dict.fromkeys(stages, "ok"), done.stdout
    assert stages["device"]["result"]["backend"] == "cpu"
    for backend in parity.BACKENDS:
        cases = stages[f"parity {backend}"]["result"]["cases"]
        verdicts = {name: each["verdict"] for name, by_precision in cases.items() for each in by_precision.values()}
        refuses = {"cudnn": set(verdicts), "pallas": set(verdicts), "newton": {"minlstm"}}
        refuses["associative"] = set(verdicts) - {"minlstm"}
        expected = {name: "refused" if name in refuses.get(backend, ()) else "equal" for name in verdicts}
        assert verdicts == expected, backend
        assert set(verdicts) == {"lengths, mask, resets", "minlstm"}
    (timing,) = (entry for name, entry in stages.items() if name.startswith("timing"))
    fused = timing["result"]["benchmarks"]["jaxlstm fused bf16"]
    assert min(fused["infer"]["median_ms"], fused["train"]["median_ms"]) > 0
    assert "cudnn" in timing["result"]["benchmarks"]["jaxlstm cudnn"]["missing"]
    for name, variants in (("unroll", 2), ("command buffer", 1), ("vmap", 2)):
        (by_variant,) = stages[name]["result"].values()
        assert len(by_variant) == variants
        assert all(each["train"]["median_ms"] > 0 for each in by_variant.values())
    assert stages["memory"]["result"]["temporary"]["jaxlstm fused"] > 0
    assert stages["autotune"]["result"]["table"][0]["note"] == "chosen"
    assert stages["train"]["result"]["validation_bits_per_character"] > 0
    assert (tmp_path / "dry.png").stat().st_size > 10_000
