"""`--implementation`: the backend of the training step, measured or named, kept for resumed runs."""

import contextlib
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from training_runs import default_jax, read_metrics, run_command, write_config

from jaxlstm import checksum
from jaxlstm.autotuning import Trial, Tuning
from jaxlstm.recurrence.fused import Fused
from jaxlstm.recurrence.scan import Scan
from jaxlstm.training import backend, loop, run_directory
from jaxlstm.training.config import Options, load_config
from jaxlstm.training.loop import Trainer
from jaxlstm.training.tasks import TASKS

RUN = [
    *("--task", "adding", "--window", "5", "--hidden", "4", "--batch", "6", "--layers", "1", "--run-dir", "run"),
    *("--log-every", "1", "--valid-every", "2", "--save-every", "2", "--diagnose", "0", "--max-steps"),
]
CHOICE = Fused("feature", False, 2)


@pytest.fixture
def measure(monkeypatch):
    """Replaces the measurement, which gives ``CHOICE``; returns the calls."""
    calls = []

    def tune(lstm, xs_shape, *, training, seconds, experimental):
        calls.append((xs_shape, training, seconds, experimental))
        table = (Trial(f"{CHOICE!r}, unroll=2", 1e-3, 9, 0.0, False, "chosen"), Trial("fused", 2e-3, 9, 0.0, True))
        chosen = replace(lstm, implementation=CHOICE, unroll=2)
        return Tuning(chosen, table, xs_shape, training, backend.device_name(), jax.__version__)

    monkeypatch.setattr(backend, "tune", tune)
    return calls


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "run") if row["split"] == "train"]


@pytest.mark.slow
def test_measured_backend_is_kept_and_a_resumed_run_is_the_same_program(tmp_path, measure, monkeypatch):
    printed = run_command(*RUN, 6, "--implementation", "auto", cwd=tmp_path)
    assert printed.splitlines()[0] == (
        "backend Fused(order='feature', hoist_inputs=False, chunk_size=2), unroll=2, the fastest of 2 measured: "
        "1 ms instead of 2 ms by default"
    )
    assert measure == [((5, 6, 2), True, 20.0, True)]
    options = {"order": "feature", "hoist_inputs": False, "chunk_size": 2}
    saved = {"implementation": {"class": "Fused", "options": options}, "unroll": 2, "device": backend.device_name()}
    assert config_of(tmp_path)["backend"] == saved
    whole = losses(tmp_path)
    for step in (5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    built = []
    monkeypatch.setattr(loop.backend, "with_backend", lambda *args: built.append(with_backend(*args)) or built[-1])
    printed = run_command("--resume", "run", cwd=tmp_path)
    assert "resumed after step 4" in printed
    assert "measured" not in printed
    assert len(measure) == 1
    assert [(lstm.implementation, lstm.unroll) for lstm in built] == [(CHOICE, 2)]
    assert config_of(tmp_path)["backend"] == saved
    np.testing.assert_array_equal(losses(tmp_path), whole)
    assert "--implementation is scan, expected auto" in run_command(
        "--resume", "run", "--implementation", "scan", cwd=tmp_path, fails=True
    )


def config_of(folder):
    return json.loads((folder / "run" / "config.json").read_text())


with_backend = backend.with_backend


def trainer_of(**options):
    """A trainer with data and state, before its run directory."""
    trainer = Trainer(Options(task="adding", batch=6, window=5, hidden=4, **options), loop.Console(quiet=True))
    with default_jax(), contextlib.ExitStack() as exit_stack:
        trainer.setup_task(exit_stack)
        trainer.setup_state()
    trainer.saved_backend, trainer.is_complete = None, False
    return trainer


@pytest.mark.slow
def test_backend_of_another_device_is_measured_again(measure):
    trainer = trainer_of(implementation="auto")
    saved = {"implementation": "scan", "unroll": 3, "device": "TPU v9"}
    trainer.saved_backend = saved
    trainer.setup_backend()
    assert trainer.lstm.implementation == CHOICE
    trainer.saved_backend = saved | {"device": backend.device_name()}
    trainer.setup_backend()
    assert (trainer.lstm.implementation, trainer.lstm.unroll) == ("scan", 3)
    assert len(measure) == 1
    trainer.saved_backend, trainer.is_complete = saved, True
    trainer.setup_backend()
    assert trainer.backend == saved
    assert len(measure) == 1


@pytest.mark.slow
def test_measurement_takes_at_most_a_twentieth_of_the_run(measure):
    trainer_of(implementation="auto", max_seconds=60.0).setup_backend()
    assert measure[0][2] == pytest.approx(3.0)


def test_real_measurement_finds_a_backend():
    trainer = trainer_of(implementation="auto", max_seconds=1.0)
    trainer.setup_backend()
    assert trainer.backend["device"] == backend.device_name()
    assert trainer.lstm.implementation is not None
    assert trainer.lstm == backend.with_backend(trainer.task.lstm, json.loads(json.dumps(trainer.backend)))
    assert trainer.task.lstm.implementation is None  # validation and sampling keep the default


@pytest.mark.parametrize(
    "task",
    [
        "adding",
        *(pytest.param(name, marks=pytest.mark.slow) for name in TASKS if name != "adding"),
    ],
)
def test_named_backend_is_of_the_training_step(task, monkeypatch):
    """The loss of every task calls the network that it is made with."""
    options = Options(**{"task": task, "hidden": 4, "batch": 3, "embedding": 5, "implementation": "scan"}
                      | {name: value for name, value in TASKS[task].DEFAULTS.items() if name == "data"})  # fmt: skip
    made = TASKS[task].make(options)
    lstm = backend.named_backend(options, made.lstm)
    assert (lstm.implementation, made.lstm.implementation) == ("scan", None)
    with default_jax():
        params = jax.eval_shape(made.init, jax.random.key(0))
        carry = jax.eval_shape(made.init_carry, params)
        args = (params, carry, next(made.batches(0)), jax.random.key(0))
        used = []
        scan = Scan.__call__
        monkeypatch.setattr(Scan, "__call__", lambda self, *args: used.append(self) or scan(self, *args))
        jax.clear_caches()
        jax.eval_shape(made.loss, *args)
        assert not used
        jax.eval_shape(made.make_loss(lstm), *args)
        assert len(used) == (2 if task == "forecast" else 1)  # encoder and decoder


def test_backend_is_measured_by_default_on_accelerators_only(monkeypatch):
    named = Options(implementation="fused")
    assert not backend.is_measured(Options())
    assert backend.is_measured(Options(implementation="auto"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert backend.is_measured(Options())
    assert backend.is_measured(Options(mesh="data=2"))
    assert not backend.is_measured(named)
    assert not backend.is_measured(Options(mesh="model=2", implementation="auto"))


def test_named_backend_must_support_the_mesh():
    lstm = TASKS["adding"].make(Options(task="adding", window=5, mesh="data=1,model=2")).lstm
    assert lstm.implementation == "tensor_parallel"
    for name in (None, "auto", "tensor_parallel"):
        assert backend.named_backend(Options(mesh="model=2", implementation=name), lstm) == lstm
    message = "--implementation fused cannot split hidden units over --mesh model=2; expected tensor_parallel"
    with pytest.raises(ValueError, match=message):
        backend.named_backend(Options(mesh="model=2", implementation="fused"), lstm)
    one = Options(task="adding", window=5, mesh="data=2,model=1", implementation="fused")
    assert backend.named_backend(one, TASKS["adding"].make(one).lstm).implementation == "fused"


@pytest.mark.slow
def test_mesh_measures_the_shapes_of_one_device(measure):
    trainer = trainer_of(implementation="auto")
    mesh = jax.make_mesh((2, 1), ("data", "model"))
    backend.measure_backend(trainer.options, trainer.task, trainer.state, mesh)
    assert measure == [((5, 3, 2), True, 20.0, False)]


def test_all_processes_get_the_choice_of_the_first(monkeypatch):
    """The broadcast is replaced by a list that process 0 writes and process 1 reads."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    broadcast = lambda buffer: sent.append(buffer) or sent[0]  # noqa: E731
    monkeypatch.setattr(backend.multihost_utils, "broadcast_one_to_all", broadcast)
    choice = {"implementation": {"class": "Fused", "options": vars(CHOICE)}, "unroll": 2, "device": "é"}
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert backend.from_first_process(lambda index=index: choice if index == 0 else {}["nothing"]) == choice
    assert sent[0].shape == sent[1].shape


def test_damaged_backend_is_refused():
    lstm = TASKS["adding"].make(Options(task="adding", window=5)).lstm
    for saved, message in (
        ({"implementation": "scan", "unroll": 2}, "backend has no key 'device'"),
        ({"implementation": "scan", "unroll": "2", "device": ""}, "backend: unroll must be int, got '2'"),
        ({"implementation": "x", "unroll": 2, "device": ""}, "implementation must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.with_backend(lstm, saved)


def test_config_has_a_backend_only_if_it_was_measured(tmp_path):
    options = Options(task="adding", window=5)
    task, saved = TASKS["adding"].make(options), {"implementation": "scan", "unroll": 2, "device": ""}
    assert "backend" not in run_directory.saved_config(options, task)
    assert run_directory.saved_config(options, task, saved)["backend"] == saved
    for value in (None, saved):
        checksum.write_checked_json(tmp_path / "config.json", run_directory.saved_config(options, task, value))
        assert load_config(tmp_path, "--resume")[1].get("backend") == value
    write_config(tmp_path, options, backend=3)
    with pytest.raises(ValueError, match="backend must be dict"):
        load_config(tmp_path, "--resume")
