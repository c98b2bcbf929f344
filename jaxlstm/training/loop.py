"""The training loop: `Trainer`, whose methods are the phases of a run."""

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxlstm.checksum import write_checked_json
from jaxlstm.training import backend, params_file, run_directory, saturation, sharding, train_step
from jaxlstm.training.checkpointing import Checkpoints
from jaxlstm.training.config import CONFIG, Options
from jaxlstm.training.memory import check_memory, num_bytes
from jaxlstm.training.metrics import Report, draw_curves, print_line, summary_writer
from jaxlstm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxlstm.training.playback import Diagnosis
from jaxlstm.training.processes import check_same_data, connected_processes
from jaxlstm.training.profiling import StepProfiler
from jaxlstm.training.run_directory import RunRecord
from jaxlstm.training.stop_signals import catch_stop_signals
from jaxlstm.training.tasks import TASKS
from jaxlstm.training.tasks.task import LanguageTaskModule, PredictingTaskModule
from jaxlstm.training.train_step import StepMetrics, TrainState

# Options that are off in validation.
REGULARIZERS = (
    "dropout",
    "input_dropout",
    "embedding_dropout",
    "recurrent_dropout",
    "weight_drop",
    "zoneout_h",
    "zoneout_c",
)
DEFAULT_MAX_STEPS = 1200  # of a run without --max-steps and --max-seconds


class Limits(NamedTuple):
    """Limits of a run; infinite if it has none of the kind."""

    steps: float
    seconds: float

    def progress(self, step: int, seconds: float, reserve: float) -> float:
        """Returns the completed fraction of the run.

        Args:
          step: the current step.
          seconds: wall-clock seconds of the run so far.
          reserve: seconds left for the last validation.
        """
        return min(1.0, max(step / self.steps, seconds / max(self.seconds - reserve, 1e-9)))


def make_limits(max_steps: int | None, max_seconds: float | None) -> Limits:
    """Returns the limits that ``--max-steps`` and ``--max-seconds`` give."""
    return Limits(max_steps or (math.inf if max_seconds else DEFAULT_MAX_STEPS), max_seconds or math.inf)


class Trainer:
    """Trains one run, from the data to the summary.

    `run` calls the phases in this order: `setup`, `fit` with `validate` and `save` at their intervals, and `finish`.

    Args:
      options: options of the run.
      console: console for progress and results.
      command: the command to print in hints on resuming and sampling.
    """

    def __init__(self, options: Options, console: Console, command: str = "python train.py") -> None:
        self.options = options
        self.console = console
        self.command = command
        self.start_time = time.perf_counter()
        self.limits = make_limits(options.max_steps, options.max_seconds)
        self.progress = 0.0  # completed fraction of the run
        self.stop_signal = 0  # the signal that ended the run early
        self.pending: list[StepMetrics] = []  # of the steps since the last row of metrics.jsonl

    def run(self) -> None:
        """Runs all phases.

        Raises:
          SystemExit: with 128 plus its number, if a signal ended the run; its results are written before.
        """
        with contextlib.ExitStack() as exit_stack:
            self.setup(exit_stack)
            if self.diagnosis is not None:
                exit_stack.enter_context(self.diagnosis)
            with self.checkpoints, self.report:
                self.fit()
            self.finish()
        if self.stop_signal:
            raise SystemExit(128 + self.stop_signal)

    def setup(self, exit_stack: contextlib.ExitStack) -> None:
        """Builds task, model and initial state, then creates or resumes the run directory.

        Everything that can refuse the options comes first: until `setup_output` an existing run directory is only read.
        """
        if self.options.tensorboard:
            summary_writer()
        self.setup_task(exit_stack)
        self.setup_state()
        self.check_step()
        self.setup_run_dir(exit_stack)
        self.setup_backend()
        self.setup_output()

    def setup_task(self, exit_stack: contextlib.ExitStack) -> None:
        """Connects processes and devices, and prepares the data."""
        options = self.options
        processes = connected_processes(options, self.command.removeprefix("python "))
        self.mesh = sharding.initialize_devices(options.mesh, exit_stack.enter_context(processes))
        self.num_devices = 1 if self.mesh is None else self.mesh.size
        device = jax.devices()[0]
        self.device = f"{device.device_kind} ({device.platform})"
        for option, axis in (("batch", "data"), ("hidden", "model")):
            size, devices = getattr(options, option), 1 if self.mesh is None else self.mesh.shape[axis]
            if size % devices:
                raise ValueError(f"--{option} {size} is not divisible by {axis}={devices} of --mesh")
        self.task = TASKS[options.task].make(options)
        check_same_data(self.task.fingerprint)
        self.lstm = backend.named_backend(options, self.task.lstm)

    def setup_state(self) -> None:
        """Initializes parameters and training state; the step is compiled at its first call."""
        options, task = self.options, self.task
        schedule = learning_rate_schedule(options.optimizer, options.peak_learning_rate, options.warmup)
        self.schedule = jax.jit(schedule)
        self.optimizer = optimizer = make_optimizer(
            schedule, weight_decay=options.weight_decay, clip=options.clip, name=options.optimizer
        )
        self.key = jax.random.key(options.seed)
        k_init, k_steps = jax.random.split(self.key)

        def init_state(k_init: jax.Array, k_steps: jax.Array) -> TrainState:
            params, averaged = task.init(k_init), options.optimizer == "asgd"
            return train_step.init_train_state(params, optimizer, task.init_carry(params), k_steps, averaged=averaged)

        shapes = jax.eval_shape(init_state, k_init, k_steps)
        gradients = shapes.params
        steps = 0 if "window" in TASKS[options.task].UNUSED else options.window
        outputs = jax.ShapeDtypeStruct(
            (options.layers, steps, options.batch, options.projection or options.hidden), options.dtype
        )
        check_memory(num_bytes((shapes, gradients, outputs)), "--hidden, --embedding, --layers, --batch or --window")
        self.num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
        self.state = sharding.place_state(self.mesh, init_state(k_init, k_steps))
        self.make_step()
        self.gate_saturation = saturation.gate_saturation(task.lstm, task.lstm_inputs, task.lstm_arguments)

    def make_step(self) -> None:
        """Makes the training step around `lstm`, the network of the task with the backend of the training step."""
        state_sharding = sharding.state_sharding(self.mesh, self.state)
        self.train_step = train_step.make_step(self.task.make_loss(self.lstm), self.optimizer, state_sharding)

    def check_step(self) -> None:
        """Traces the step on a first batch, so that options that it refuses are reported before anything is written."""
        batch = jax.tree.map(sharding.place_batch(self.mesh), next(self.task.batches(0)))
        with self.mesh_context():
            jax.eval_shape(self.train_step, self.state, batch, self.progress)

    def mesh_context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of all computations on the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def learning_rate(self, progress: float) -> float:
        """Returns the learning rate at a completed fraction of the run."""
        return float(self.schedule(progress))

    def setup_run_dir(self, exit_stack: contextlib.ExitStack) -> None:
        """Creates or resumes the run directory; of several processes, only process 0 writes to it."""
        options = self.options
        run_dir = options.resume or run_directory.create_run_dir(options, self.task)
        is_writer = jax.process_index() == 0
        if is_writer:
            exit_stack.enter_context(run_directory.lock_run_dir(run_dir))
            run_directory.check_paths(run_dir, options)
        self.checkpoints = Checkpoints(run_dir / "checkpoints")
        if not is_writer:
            run_dir, self.console = run_directory.temporary_copy(run_dir), Console(quiet=True)
        self.run_dir: Path = run_dir
        self.record = RunRecord()
        self.saved_backend: dict[str, Any] | None = None  # of the run before resuming
        if options.resume:
            self.resume(options.resume)
        self.is_complete = self.progress == 1
        self.first_step, self.previous_seconds = self.record.step, self.record.seconds
        self.num_restored_losses = len(self.record.losses)

    def resume(self, run_dir: Path) -> None:
        """Restores the latest checkpoint, if there is one, and prints what differs from the run so far."""
        options, task = self.options, self.task
        if not self.checkpoints.steps():
            run_directory.check_start(run_dir, options, task)
            if run_directory.lacks_config(run_dir):
                print_line(self.console, f"{run_dir} has no config.json yet: it gets the options of this command")
            return
        self.state, self.record, saved = run_directory.restore_run(self.checkpoints, options, task, self.state)
        self.saved_backend = saved.get("backend")
        if changes := run_directory.changed_versions(saved):
            print_line(self.console, f"resumed with other versions, so losses may differ slightly: {changes}")
        self.check_best_params()
        self.resume_progress(make_limits(saved["options"].get("max_steps"), saved["options"].get("max_seconds")))

    def check_best_params(self) -> None:
        """Reads the best parameters so far, which the end of the run needs.

        Starts without them if the file is missing, or was written by a validation after the checkpoint.

        Raises:
          ValueError: if they are damaged.
        """
        record, path = self.record, self.run_dir / params_file.BEST
        if record.best_step == 0:
            return
        problem = "is missing"
        if path.exists():
            params_file.load_params(path, self.task.init)
            if params_file.saved_digest(path) == record.best_digest:
                return
            problem = f"was replaced after step {record.step:,}"
        print_line(self.console, f"{path} {problem}: the next validation gives the best parameters")
        record.best_step, record.best_loss, record.best_digest = 0, None, ""

    def resume_progress(self, limits_before: Limits) -> None:
        """Continues the progress of the run; prints the change of the learning rate if the limits have changed."""
        record = self.record
        progress_before, self.progress = (
            limits.progress(record.step, record.seconds, record.valid_seconds)
            for limits in (limits_before, self.limits)
        )
        before, after = self.learning_rate(progress_before), self.learning_rate(self.progress)
        if before != after and self.progress < 1:
            print_line(
                self.console,
                f"the learning rate changes from {before:.2g} to {after:.2g}: with the new limits step "
                f"{record.step:,} is at {self.progress:.0%} of the run, before at {progress_before:.0%}",
            )

    def setup_backend(self) -> None:
        """Sets a measured backend, the same in all processes, unless the options name one or the default."""
        self.backend = self.saved_backend  # of a run that has ended, or None
        if not backend.is_measured(self.options):
            self.backend = None
        elif not self.is_complete:
            self.backend = backend.from_first_process(self.choose_backend)
            self.lstm = backend.with_backend(self.task.lstm, self.backend)
            self.make_step()

    def choose_backend(self) -> dict[str, Any]:
        """Returns the backend of the run before resuming, if its device was of the same kind, or measures one."""
        saved = self.saved_backend
        if saved is not None and backend.is_of_this_device(saved):
            return saved
        measured, line = backend.measure_backend(self.options, self.task, self.state, self.mesh)
        print_line(self.console, line)
        return measured

    def setup_output(self) -> None:
        """Writes ``config.json``, prints the first line and opens the metrics."""
        options, task, run_dir = self.options, self.task, self.run_dir
        self.config = run_directory.saved_config(options, task, self.backend)
        write_checked_json(run_dir / CONFIG, self.config | dict(task.extra_config))
        self.print_start()
        self.stop_signals = catch_stop_signals()
        self.report = Report(
            run_dir,
            self.console,
            task.unit_name,
            task.format_loss,
            self.record.rows,
            self.record.step,
            tensorboard=options.tensorboard,
        )
        self.diagnosis = None
        if options.diagnose:
            self.diagnosis = Diagnosis(run_dir, task, self.record.step, self.report.print_line)
        self.profiler = StepProfiler(run_dir / "profile", options.profile)

    def print_start(self) -> None:
        """Prints data, model and devices of the run."""
        devices = f"{self.num_devices} x {self.device}" if self.num_devices > 1 else self.device
        for note in self.task.notes:
            print_line(self.console, note)
        resumed = f"; resumed after step {self.record.step:,}" if self.options.resume else ""
        print_line(self.console, f"{self.task.description}; {self.num_parameters:,} parameters on {devices}{resumed}")
        if self.is_complete:
            by_steps = f"at step {self.record.step:,} and --max-steps is {self.limits.steps}"
            by_time = f"after {self.record.seconds:,.0f} s and --max-seconds is {self.limits.seconds:g}"
            ended = by_steps if self.record.step >= self.limits.steps else by_time
            print_line(self.console, f"nothing left to do: the run ended {ended}")
        elif not self.options.resume and any(getattr(self.options, name) for name in REGULARIZERS):
            print_line(self.console, "training losses are with dropout, validation losses without: they may be lower")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, those before resuming included; a complete run adds none."""
        if self.is_complete:
            return self.previous_seconds
        return self.previous_seconds + time.perf_counter() - self.start_time

    def fit(self) -> None:
        """Trains until the run reaches its limit or a signal arrives."""
        options, record = self.options, self.record
        save_interval = max(1, options.save_every // 2)  # while one checkpoint is written, the previous one is complete
        batches = train_step.prefetch(self.task.batches(record.step), sharding.place_batch(self.mesh))
        self.row_start_time = time.perf_counter()
        self.report.start_clock(self.progress)
        while self.progress < 1:
            received = self.stop_signals[0] if self.stop_signals else 0
            seconds, self.stop_signal = sharding.sync_stop(self.seconds, received)
            if self.stop_signal:
                break
            self.train_on_batch(next(batches), seconds)
            is_last = self.progress == 1
            if record.step % options.log_every == 0 or is_last:
                self.log_training_row()
            pause_start = time.perf_counter()
            if record.step % options.valid_every == 0 or is_last:
                self.validate()
            if record.step % save_interval == 0 or is_last:
                self.save()
            self.row_start_time += time.perf_counter() - pause_start  # not part of the training speed
        self.profiler.stop()
        if self.stop_signal:
            self.save_and_report_stop()
        if record.best_step == 0:
            self.validate()
        self.checkpoints.wait()

    def train_on_batch(self, batch: Any, seconds: float) -> None:
        """Makes one update.

        Args:
          batch: the batch, on the devices.
          seconds: wall-clock seconds of the run so far, the same in all processes.
        """
        record, interval = self.record, self.options.diagnose
        record.step += 1
        # The last validation is assumed to take as long as the previous one.
        self.progress = self.limits.progress(record.step, seconds, record.valid_seconds)
        diagnosing = interval > 0 and record.step % interval == 0
        self.profiler.before_step(record.step - self.first_step)
        with self.mesh_context():
            saturated = self.gate_saturation(self.state.params, self.state.carry, batch) if diagnosing else {}
            self.state, metrics = self.train_step(self.state, batch, self.progress)
        self.pending.append(metrics)
        if diagnosing:
            self.report.diagnosis_row(record.step, saturation.diagnosis_row(saturated, metrics.gradient_norms))
        if len(self.pending) > 1:  # waiting for the previous step keeps at most one step queued, and the clock true
            self.check_skipped(self.pending[-2], record.step - 1)

    def check_skipped(self, metrics: StepMetrics, step: int) -> None:
        """Waits for a step, and ends the run if too many consecutive steps up to it were skipped.

        Raises:
          FloatingPointError: if they reached ``--max-skipped``.
        """
        skipped = int(metrics.consecutive_skipped)
        if skipped >= self.options.max_skipped:
            raise FloatingPointError(
                f"loss or gradient was not finite at {skipped} steps in a row, up to step {step:,}; "
                "they changed nothing, and the best parameters so far are kept"
            )

    def log_training_row(self) -> None:
        """Records the mean training loss and the speed since the last row."""
        record, metrics = self.record, self.pending[-1]
        self.check_skipped(metrics, record.step)
        losses = np.array(self.losses_since_row())
        finite = losses[np.isfinite(losses)]
        mean = float(np.mean(finite)) if finite.size else math.nan
        num_units = (len(losses) - self.num_restored_losses) * self.task.units_per_step
        speed = num_units / (time.perf_counter() - self.row_start_time)
        learning_rate = self.learning_rate(self.progress)
        self.report.training_row(record.step, mean, speed, self.progress, learning_rate, int(metrics.skipped))
        record.losses, self.pending, self.num_restored_losses = [], [], 0
        self.row_start_time = time.perf_counter()

    def losses_since_row(self) -> list[float]:
        """Returns the losses of the steps since the last row, those restored from a checkpoint included."""
        return self.record.losses + [float(metrics.loss) for metrics in self.pending]

    def validate(self) -> None:
        """Evaluates the parameters on the validation data, saves the best ones, and may start averaging.

        Raises:
          FloatingPointError: if the validation loss is not finite.
        """
        start = time.perf_counter()
        task, record = self.task, self.record
        params = sharding.gather_to_host(self.state.eval_params)
        figures = task.evaluate(params)
        if self.state.average is not None:
            figures |= {"averaged_steps": int(self.state.average.steps)}
        speed = task.validation_units / (time.perf_counter() - start)
        loss = figures["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} at step {record.step:,}; the best parameters so far are kept"
            )
        record.valid_losses.append(loss)
        is_best = record.best_loss is None or loss < record.best_loss
        if is_best:
            record.best_step, record.best_loss = record.step, loss
            record.best_digest = params_file.save_params(self.run_dir / params_file.BEST, params)
        sample = task.sample(params, jax.random.fold_in(self.key, record.step))
        self.report.validation_row(record.step, figures, speed, is_best=is_best, sample=sample)
        if self.diagnosis is not None and record.step >= self.options.diagnose:
            self.diagnosis.write(record.step, params)
        self.state = train_step.maybe_start_averaging(self.state, record.valid_losses)
        record.valid_seconds = time.perf_counter() - start

    def save(self) -> None:
        """Starts to write a checkpoint of state and record, once the rows that it counts are on disk."""
        self.report.sync()
        if self.diagnosis is not None:
            self.diagnosis.sync()
        record = dataclasses.replace(
            self.record, seconds=self.seconds, rows=len(self.report.rows), losses=self.losses_since_row()
        )
        self.checkpoints.save(record.step, self.state, self.config | {"loop": dataclasses.asdict(record)})
        if self.options.save_every == 1:
            self.checkpoints.wait()

    def save_and_report_stop(self) -> None:
        """Writes a checkpoint after a signal and prints how to resume."""
        self.save()
        self.checkpoints.wait()
        name = signal.Signals(self.stop_signal).name
        self.report.print_line(f"{name} received; saved after step {self.record.step:,}; to go on:")
        self.report.print_line(f"{self.command} --resume {self.run_dir}", wrap=False)

    def finish(self) -> None:
        """Tests the best parameters and writes summary and figures."""
        task, record, run_dir = self.task, self.record, self.run_dir
        params = params_file.load_params(run_dir / params_file.BEST, task.init)
        test_figures = task.test(params, run_dir)
        summary = {
            "valid_loss": record.best_loss,
            **test_figures,
            "best_step": record.best_step,
            "steps": record.step,
            "parameters": self.num_parameters,
            "wall_seconds": self.seconds,
            "device": self.device,
        }
        write_checked_json(run_dir / "summary.json", summary)
        title = f"{task.title} of {self.num_parameters:,} parameters"
        draw_curves(run_dir / "curves.png", self.report.rows, title, task.loss_unit)
        task.draw(params, run_dir)
        best = f"best validation loss {task.format_loss(summary['valid_loss'])} at step {record.best_step:,}"
        tested = "".join(f"; {name} {value:.4g}" for name, value in test_figures.items())
        print_line(self.console, f"{best}; {self.seconds:.0f} s\n{run_dir}{tested}")
        module = TASKS[self.options.task]
        if isinstance(module, LanguageTaskModule):
            print_line(self.console, f"{self.command} --sample {run_dir}", wrap=False)
        elif isinstance(module, PredictingTaskModule):
            command = f"{self.command} --predict {run_dir} --data NEW --out predictions.csv"
            print_line(self.console, command, wrap=False)
