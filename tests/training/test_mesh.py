"""Training on several devices and processes gives the numbers of one device."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from rich.console import Console
from training_runs import ENVIRONMENT, ROOT, TEXT, default_jax, read_metrics, run_process

from jaxlstm.training import sharding, train_step
from jaxlstm.training.checkpointing import Checkpoints
from jaxlstm.training.config import Options
from jaxlstm.training.loop import Trainer

SMALL = [
    "--hidden", "16", "--embedding", "8", "--batch", "8", "--window", "16", "--dropout", "0.2", "--valid-every", "10",
]  # fmt: skip
RUN = ["--data", "text.txt", "--max-steps", "20", "--log-every", "5", "--save-every", "5", *SMALL]


@pytest.mark.slow
def test_tensor_parallel_on_eight_devices():
    """Outputs, states and gradients agree, with one collective per step, forward and backward."""
    program = [sys.executable, str(ROOT / "tests" / "mesh_program.py")]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (plain, projection), split_batch = (json.loads(line.replace("'", '"')) for line in done.stdout.strip().splitlines())
    assert plain == [["all-gather"], ["reduce-scatter"]]
    assert projection == [["all-reduce"], ["all-reduce"]]
    assert split_batch == [[], []]  # the fused recurrence with only the batch split


def test_parse_mesh():
    assert sharding.parse_mesh("data=4,model=2") == {"data": 4, "model": 2}
    assert sharding.parse_mesh("model=3") == {"data": 1, "model": 3}
    for wrong in ("data", "data=0", "rows=2", "data=2,data=2", "data=2,,", "data=-1"):
        with pytest.raises(ValueError, match="--mesh takes axes and sizes such as data=4,model=2, got"):
            sharding.parse_mesh(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        (None, "adamw"),
        ("data=2", "asgd"),
        ("model=2", "adamw"),
    ],
)
def test_step_keeps_the_sharding_of_its_state_and_compiles_once(tmp_path, monkeypatch, caplog, mesh, optimizer):
    """Initial, trained and restored states have the same layout, so a resumed run adds floats in the same order."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    sizes = sharding.parse_mesh(mesh) if mesh else None
    devices = jax.make_mesh(tuple(sizes.values()), sharding.AXES, axis_types=(AxisType.Auto,) * 2) if sizes else None
    monkeypatch.setattr(sharding, "initialize_devices", lambda *_: devices)
    options = Options(
        data=str(tmp_path / "text.txt"), hidden=4, embedding=4, batch=4, window=4, mesh=mesh, optimizer=optimizer
    )
    with default_jax(), Checkpoints(tmp_path / "checkpoints") as checkpoints, contextlib.ExitStack() as exit_stack:
        trainer = Trainer(options, Console(quiet=True))
        trainer.setup_task(exit_stack)
        trainer.setup_state()
        initial = trainer.state
        layout = jax.tree.map(lambda a: a.sharding, initial)
        if mesh == "model=2":
            assert layout.params.lstm.layers[0].forward.w_h.spec == PartitionSpec("model")
        trainer.check_step()
        batch = jax.tree.map(sharding.place_batch(devices), next(trainer.task.batches(0)))

        def check_steps(state):
            caplog.clear()
            with jax.log_compiles():
                for _ in range(2):
                    with trainer.mesh_context():
                        state, _ = trainer.train_step(state, batch, 0.5)
                    state = train_step.maybe_start_averaging(state, [1.0] * 7)
                    if mesh:
                        assert jax.tree.map(lambda a: a.sharding, state) == layout
            compiled = [record for record in caplog.messages if record.startswith("Compiling jit(step)")]
            assert len(compiled) == 1
            return state

        state = check_steps(initial)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        trainer.setup_state()  # initial states are donated
        restored = checkpoints.restore(trainer.state)
        if mesh:
            assert jax.tree.map(lambda a: a.sharding, restored) == layout
        check_steps(restored)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.slow
def test_runs_on_eight_devices_and_in_two_processes_equal_a_run_on_one(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run_process(*RUN, "--run-dir", "one", cwd=tmp_path)
    run_process(*RUN, "--run-dir", "eight", "--mesh", "data=4,model=2", cwd=tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-4)
    run_two_processes(tmp_path, *RUN, "--run-dir", "two", "--mesh", "data=2,model=2")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir()) == ["16", "18", "20"]
    # One process resumes the run of two, on another mesh.
    done = run_process("--resume", "two", "--max-steps", "25", "--mesh", "data=2", cwd=tmp_path)
    assert "resumed after step 20" in done.stdout
    assert read_metrics(tmp_path / "two")[-1]["step"] == 25
    # Two processes resume their own run.
    run_two_processes(tmp_path, "--resume", "two", "--max-steps", "30", "--mesh", "data=2,model=2")
    assert read_metrics(tmp_path / "two")[-1]["step"] == 30


@pytest.mark.slow
def test_resume_on_a_mesh_is_exact_and_a_refused_one_changes_nothing(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    limits = ["--max-steps", "20", "--log-every", "1", "--save-every", "4", *SMALL]
    run_process("--data", "text.txt", "--run-dir", "a", "--mesh", "data=2,model=2", *limits, cwd=tmp_path)
    expected = losses(tmp_path / "a")
    for later in ("18", "20"):  # as if killed before step 18
        shutil.rmtree(tmp_path / "a" / "checkpoints" / later)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    program = [sys.executable, str(ROOT / "train.py"), "--resume", "a", "--mesh", "model=5"]
    refused = subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr == "train.py: --hidden 16 is not divisible by model=5 of --mesh\n"
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    assert "resumed after step 16" in run_process("--resume", "a", cwd=tmp_path).stdout
    assert losses(tmp_path / "a") == expected


def run_two_processes(folder, *arguments):
    """Runs the command in two processes connected over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    connection = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments, *connection, "--process", str(n)],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:  # a process waits forever for another one that died
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "resumed" in printed[0] or "step     20" in printed[0]
    assert not re.search("^step", printed[1], re.MULTILINE)  # other output may be warnings of XLA


@pytest.mark.slow
def test_coordinator_auto_asks_the_cluster(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    slurm = {"JOB_ID": "65001", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    few = ["--data", "text.txt", "--max-steps", "2", *SMALL, "--coordinator", "auto", "--run-dir"]
    environment = ENVIRONMENT | {f"SLURM_{name}": value for name, value in slurm.items()}
    program = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run([*program, *few, "a"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "summary.json").exists()
    alone = subprocess.run([*program, *few, "b"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert alone.returncode == 1
    assert "--coordinator auto finds no cluster that JAX knows" in alone.stderr
    assert "Traceback" not in alone.stderr
