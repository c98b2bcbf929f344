"""Train a recurrent network, by default a character language model on real text.

python train.py                                   the Python language reference, about two minutes on two cores
python train.py --data my.txt --max-seconds 600   a text of your own
python train.py --data tinyshakespeare --max-seconds 600
python train.py --resume runs/NAME                go on after a stop, a crash or a power cut
python train.py --sample runs/NAME --prompt "The " --length 500 --temperature 0.8
"""

import argparse
import contextlib
import dataclasses
import logging
import math
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from jaxlstm.training import config as configuration
from jaxlstm.training import malloc, sharding, train_step
from jaxlstm.training import saturation as watch
from jaxlstm.training.checkpointing import CheckpointError, Checkpoints
from jaxlstm.training.config import Options
from jaxlstm.training.data.text import cache_folder
from jaxlstm.training.metrics import Report, draw_curves, say, write_json
from jaxlstm.training.tasks import TASKS
from jaxlstm.training.tasks.task import Task

RATE = {"adamw": 4e-3, "asgd": 0.3}  # peak of the learning rate


TRACED_FROM = 3  # the step: those before it are compiled, or wait for that


@dataclass
class Record:
    """What the loop knows besides the state of training; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of wall clock so far
    rows: int = 0  # of metrics.jsonl
    best_step: int = 0
    valid_losses: list[float] = field(default_factory=list)
    valid_seconds: float = 0.0  # of the last validation
    losses: list[float] = field(default_factory=list)  # of the steps since the last row


def train(options: Options, console: Console) -> None:
    """One run, from the data to the summary."""
    with contextlib.ExitStack() as until_the_end:
        run(options, console, until_the_end)


def run(options: Options, console: Console, until_the_end: contextlib.ExitStack) -> None:
    """See `train`."""
    began = time.perf_counter()
    mesh = sharding.begin(options.mesh, options.coordinator, options.processes, options.process)
    first = jax.process_index() == 0  # the one of many processes that shows and writes

    if mesh is not None and options.batch % mesh.shape["data"]:
        raise ValueError(f"--batch {options.batch} does not lie evenly over data={mesh.shape['data']} of --mesh")

    # The task, the optimiser, and the state before the first step.
    task = TASKS[options.task].make(options)
    optimizer = train_step.optimizer(
        options.learning_rate or RATE[options.optimizer],
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        clip=options.clip,
        kind=options.optimizer,
    )
    key = jax.random.key(options.seed)
    k_init, k_steps = jax.random.split(key)
    params = task.init(k_init)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = train_step.start(params, optimizer, task.carry(params), k_steps, averaged=options.optimizer == "asgd")
    state = sharding.place_state(mesh, state)
    step_function = train_step.make_step(task.loss, optimizer)
    look_inside = watch.saturation(task.lstm, task.reads)
    device, count = jax.devices()[0], 1 if mesh is None else mesh.size

    # The folder of the run, and where the run is.
    folder = options.resume or new_folder(options, first)
    if first:
        until_the_end.enter_context(alone_in(folder))
    checkpoints = Checkpoints(folder / "checkpoints")
    if not first:
        folder, console = copy_of(folder), Console(quiet=True)
    record = Record()
    if options.resume and checkpoints.steps():
        state, record = restore(checkpoints, options, task, state)
    kept = {"options": configuration.to_json(options), "about": task.about, "fingerprint": task.fingerprint}
    write_json(folder / "config.json", kept | dict(task.kept))
    say(
        console,
        f"{task.about}; {parameters:,} parameters on {f'{count} x ' if count > 1 else ''}"
        f"{device.device_kind} ({device.platform})"
        + (f"; resumed after step {record.step:,}" if options.resume else ""),
    )

    # The loop.
    max_steps = options.max_steps or (math.inf if options.max_seconds else 1200)
    max_seconds = options.max_seconds or math.inf
    if record.step >= max_steps:
        say(console, f"nothing is left to do: step {record.step:,} is the last one by --max-steps {max_steps}")
    best_loss = min(record.valid_losses, default=math.inf)
    step, before, inherited = record.step, record.seconds, len(record.losses)
    progress, stop, outcomes = 0.0, 0, []
    half = max(1, options.save_every // 2)  # while one checkpoint is being written, the one before it is whole

    def spent() -> float:
        return before + time.perf_counter() - began

    def validate() -> None:
        nonlocal best_loss, state
        start = time.perf_counter()
        trained = sharding.everywhere(state.trained)
        figures = task.evaluate(trained)
        if state.average is not None:
            figures |= {"averaged_steps": int(state.average.steps)}
        speed = task.evaluated / (time.perf_counter() - start)
        loss = finite(figures["loss"], step)
        record.valid_losses.append(loss)
        if best := loss < best_loss:
            best_loss, record.best_step = loss, step
            train_step.save_params(folder / train_step.BEST, trained)
        report.valid(step, figures, speed, best=best, sample=task.show(trained, jax.random.fold_in(key, step)))
        state = train_step.begin_average(state, record.valid_losses)
        record.valid_seconds = time.perf_counter() - start

    def save() -> None:
        losses = record.losses + [float(outcome.loss) for outcome in outcomes]
        now = dataclasses.replace(record, step=step, seconds=spent(), rows=len(report.rows), losses=losses)
        checkpoints.save(step, state, kept | {"loop": dataclasses.asdict(now)})
        if options.save_every == 1:
            checkpoints.wait()

    stopped = catch_signals()
    report = Report(folder, console, task.counted, task.say, record.rows, tensorboard=options.tensorboard)
    with checkpoints, report:
        trace = Trace(folder / "profile", options.profile)
        batches = train_step.prefetch(task.batches(step), sharding.place_batch(mesh))
        clock = time.perf_counter()
        report.begin(min(1.0, max(step / max_steps, spent() / max_seconds)))
        while step < max_steps and progress < 1:
            now, stop = sharding.agreed(spent(), stopped[0] if stopped else 0)
            if stop:
                break
            batch = next(batches)
            step += 1
            # The clock leaves room for the last validation, as long as the one before it.
            left = max(max_seconds - record.valid_seconds, 1e-9)
            progress = min(1.0, max(step / max_steps, now / left))
            diagnosing = options.diagnose > 0 and step % options.diagnose == 0
            trace.at(step - record.step)
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                seen = look_inside(state.params, state.carry, batch) if diagnosing else {}
                state, outcome = step_function(state, batch, progress)
            outcomes.append(outcome)
            if diagnosing:
                report.diagnosis(step, watch.figures(seen, outcome.gradient))
            if len(outcomes) > 1:
                check(outcomes[-2], step - 1, options)  # at most one step ahead of the device: the clock is true
            if step % options.log_every == 0 or progress == 1:
                check(outcome, step, options)
                losses = np.array(record.losses + [float(outcome.loss) for outcome in outcomes])
                mean = float(np.mean(losses[np.isfinite(losses)])) if np.isfinite(losses).any() else math.nan
                speed = (len(losses) - inherited) * task.per_step / (time.perf_counter() - clock)
                report.train(step, mean, speed, progress, int(outcome.skipped))
                record.losses, outcomes, inherited, clock = [], [], 0, time.perf_counter()
            paused = time.perf_counter()
            if step % options.valid_every == 0 or progress == 1:
                validate()
            if step % half == 0 or progress == 1:
                save()
            clock += time.perf_counter() - paused
        trace.end()
        if stop:
            save()
            checkpoints.wait()
            name = signal.Signals(stop).name
            report.say(f"{name} received; stopped after step {step:,}; saved: python train.py --resume {folder}")
        if record.best_step == 0:
            validate()
        checkpoints.wait()

    # What is left of the run.
    best = train_step.load_params(folder / train_step.BEST, task.init)
    tested = task.test(best)
    task.draw(best, folder)
    summary = {
        "valid_loss": best_loss,
        **tested,
        "best_step": record.best_step,
        "steps": step,
        "parameters": parameters,
        "wall_seconds": spent(),
        "device": f"{device.device_kind} ({device.platform})",
    }
    write_json(folder / "summary.json", summary)
    title = f"{task.title} of {parameters:,} parameters"
    draw_curves(folder / "curves.png", report.rows, title, task.unit)
    say(
        console,
        f"best validation loss {task.say(best_loss)} at step {record.best_step:,}; {spent():.0f} s\n{folder}"
        + "".join(f"; {name} {value:.4g}" for name, value in tested.items())
        + (f": python train.py --sample {folder}" if hasattr(TASKS[options.task], "write") else ""),
    )
    if stop:
        raise SystemExit(128 + stop)


@dataclass
class Trace:
    """A profile of some steps, in a folder."""

    folder: Path
    steps: int | None  # None for no profile
    running: bool = False

    def at(self, step: int) -> None:
        """Begin or end before this step, counted from the first one of the process."""
        if self.steps and step == TRACED_FROM:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        elif self.steps and step == TRACED_FROM + self.steps:
            self.end()

    def end(self) -> None:
        """Write what was traced."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


def new_folder(options: Options, first: bool) -> Path:
    """The folder of a run that begins; the first of many processes makes it."""
    folder = options.run_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if jax.process_count() > 1 and options.run_dir is None:
        raise ValueError("many processes need --run-dir or --resume: one folder for all of them")
    if not first:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--run-dir {folder} is not an empty folder; a run never writes over another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The folder of a run, for one process at a time; the system lets go of it however the process ends.

    Windows has no such lock: there nothing keeps another process out.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / "lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {folder}: {path} is locked") from None
        yield


def copy_of(folder: Path) -> Path:
    """A folder to be thrown away with what a run has left so far, but for its checkpoints."""
    copy = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(".partial"):
            shutil.copy(path, copy)
    return copy


def restore(
    checkpoints: Checkpoints, options: Options, task: Task, state: train_step.TrainState
) -> tuple[train_step.TrainState, Record]:
    """The state and the record in the latest checkpoint, once it is one of this configuration."""
    step, kept = checkpoints.record()
    try:
        others = configuration.differences(options, kept["options"])
        if kept["about"] != task.about:
            others.append(f"the data are {kept['about']}, expected {task.about}")
        elif kept["fingerprint"] != task.fingerprint:
            others.append(f"the data of --data {options.data} have changed since it began")
        record = Record(**kept["loop"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoints.folder / str(step)} is not one of train.py: {error!r}"
        ) from None
    if others:
        raise CheckpointError(f"checkpoint {checkpoints.folder / str(step)} is of another run: {others[0]}")
    return checkpoints.restore(state), record


def catch_signals() -> list[signal.Signals]:
    """An empty list that holds the signal once Ctrl-C or SIGTERM came: the run then ends after the step it is at.

    A second one ends it at once.
    """
    caught: list[signal.Signals] = []

    def note(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        for kind, usual in usually.items():
            signal.signal(kind, usual)

    usually = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    return caught


def check(outcome: train_step.Outcome, step: int, options: Options) -> None:
    """Wait for a step; the end of the run if too many in a row, up to this one, were skipped."""
    if int(outcome.in_a_row) >= options.max_skipped:
        raise FloatingPointError(
            f"loss or gradient was not finite at {int(outcome.in_a_row)} steps in a row, up to step {step:,}; "
            "they changed nothing, and the best parameters so far are kept"
        )


def finite(loss: float, step: int) -> float:
    """``loss``, or the end of the run if it is not a number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss} at step {step:,}; the best parameters so far are kept")
    return loss


def sample(options: Options, console: Console) -> None:
    """Text from the best parameters of a finished run."""
    assert options.sample is not None
    run, config = configuration.of_run(options.sample, "--sample")
    task = TASKS[run.task]
    if not hasattr(task, "write"):
        raise ValueError(f"--sample needs a run of a language model; {options.sample} is one of --task {run.task}")
    text = task.write(
        run,
        config,
        partial(train_step.load_params, options.sample / train_step.BEST),
        prompt=options.prompt,
        length=options.length,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
    )
    console.file.write(text + "\n")  # as it is, which Rich would not leave it: tabs, :x:


def parse(arguments: list[str]) -> Options:
    """The options of a command line: those typed, and for the rest the task's defaults or what a run to resume had."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="charlm")
    first.add_argument("--resume", type=Path)
    first.add_argument("--optimizer")
    known, _ = first.parse_known_args(arguments)
    if known.resume:
        default, _ = configuration.of_run(known.resume, "--resume")
    else:
        task = TASKS.get(known.task)
        values = {"task": known.task} | task.DEFAULTS if task else {}
        if known.optimizer not in (None, values.get("optimizer", Options.optimizer)):
            values.pop("learning_rate", None)  # it is one for the other optimiser
        default = Options(**values)
    options: Any = tyro.cli(
        Annotated[Options, tyro.conf.OmitArgPrefixes],
        description=configuration.help_text(__doc__ or ""),
        args=arguments,
        default=default,
    )
    if known.resume and (others := configuration.differences(options, configuration.to_json(default))):
        raise ValueError(f"--resume {known.resume} goes on with the options of that run: {others[0]}")
    if known.resume and options.run_dir is not None:
        raise ValueError(
            f"--resume {known.resume} goes on in that folder, and has no use for --run-dir {options.run_dir}"
        )
    for name in TASKS[options.task].UNUSED:
        if (value := getattr(options, name)) != getattr(default, name):
            raise ValueError(f"--task {options.task} has no use for --{name.replace('_', '-')}, got {value}")
    return options


def say_unless_raised(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python's own way with errors that nobody can catch, but for one.

    Where an array of a checkpoint cannot be written, which is raised, TensorStore's threads come back with the others
    and find nobody waiting.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def obey(arguments: list[str], console: Console) -> None:
    """A command line; a mistake, or what the machine refuses, ends the process with one line."""
    try:
        options = parse(arguments)
        (train if options.sample is None else sample)(options, console)
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
        raise SystemExit(f"train.py: {str(error) or 'out of memory'}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SystemExit(f"train.py: {str(error).strip().splitlines()[0]}") from None
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def main() -> None:
    """The command."""
    malloc.keep_freed()
    for noisy in ("absl", "asyncio"):  # Orbax logs, thread by thread, what is also raised
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    sys.unraisablehook = say_unless_raised
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    obey(sys.argv[1:], Console())


if __name__ == "__main__":
    main()
