"""The commands ``train`` and ``sample``, and predictions of a run: process set-up, command line, errors in one line."""

import argparse
import atexit
import contextlib
import dataclasses
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import jax
import tyro
from rich.console import Console

from jaxlstm import validation
from jaxlstm.errors import first_line
from jaxlstm.training import config, params_file
from jaxlstm.training.arguments import check_arguments, option_types, split_arguments
from jaxlstm.training.config import Options
from jaxlstm.training.data.text import cache_folder
from jaxlstm.training.loop import Trainer
from jaxlstm.training.malloc import keep_freed_memory
from jaxlstm.training.memory import check_memory
from jaxlstm.training.metrics import print_line
from jaxlstm.training.output import check_written, make_output_lenient, printable
from jaxlstm.training.processes import end_process
from jaxlstm.training.run_directory import KNOWN_DATA, lacks_config
from jaxlstm.training.stop_signals import (
    Interrupted,
    raise_on_stop_signals,
    repeat_ignored_signal,
    skip_teardown_if_interrupted,
)
from jaxlstm.training.tasks import TASKS
from jaxlstm.training.tasks.task import LanguageTaskModule, PredictingTaskModule

DESCRIPTION = """Train a recurrent network, by default a character language model on real text.

{command}                                   2 to 4 minutes on two cores
{command} --data my.txt --max-seconds 600   a text file of your own
{command} --data tinyshakespeare --max-seconds 600
{command} --resume runs/NAME                resume after a stop or a crash
{command} --sample runs/NAME --prompt "The " --length 500
{command} --predict runs/NAME --data new.csv --out predictions.csv
{command} --task NAME --help                the options of another task
"""


def train_main(arguments: Sequence[str], prog: str = "jaxlstm train") -> None:
    """Runs the training command; sets up the process first.

    Args:
      arguments: the command line without the program's name.
      prog: name of the program, for help and errors.
    """
    set_up_process()
    run_cli(arguments, Console(), prog)


def run_cli(arguments: Sequence[str], console: Console, prog: str = "train.py") -> None:
    """Parses the options, then trains, samples or predicts; a mistake ends the process with one line."""
    command = f"python {prog}" if prog.endswith(".py") else prog
    with one_line_errors(prog):
        options = parse(arguments, prog)
        if not use_run(options, console):
            Trainer(options, console, command).run()


def use_run(options: Options, console: Console) -> bool:
    """Samples or predicts with a run, if the options name one for it; returns whether they do."""
    if options.sample is not None:
        sample(options, console)
    elif options.predict is not None:
        predict(options, console)
    else:
        return False
    return True


def set_up_process() -> None:
    """Configures output, signals, memory, logging and the compilation cache; for programs, not for libraries."""
    raise_on_stop_signals()
    atexit.register(skip_teardown_if_interrupted)
    make_output_lenient()
    keep_freed_memory()
    for name in ("absl", "asyncio"):  # Orbax logs, in each of its threads, errors that it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _handle_unraisable
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _handle_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeats stop signals, and ignores an error of TensorStore's threads after a failed write that was raised."""
    if not repeat_ignored_signal(unraisable) and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Ends the process with one line for mistakes of the user and failures of the machine, and for stop signals."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
        end_process(prog, str(error) or "out of memory")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not jax.distributed.is_initialized():
            raise
        end_process(prog, first_line(error))
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        end_process(prog, "interrupted", 128 + number)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        end_process(prog, "failed", 1)


def parse(arguments: Sequence[str], prog: str = "train.py") -> Options:
    """Returns the options of a command line; omitted ones have the defaults of the task, or of the run that it names.

    Raises:
      ValueError: for a value outside its limit, an option that the task does not use, or one that differs from the
        run to resume or to predict with.
    """
    early = _parse_early(arguments)
    if early.predict:
        return _parse_predict(arguments, early.predict, prog)
    configured = early.resume if early.resume and not lacks_config(early.resume) else None
    defaults = config.load_config(configured, "--resume")[0] if configured else _task_defaults(early)
    _check_flags(arguments, defaults.task)
    options = _parse_groups(arguments, defaults, prog)
    if options.out is not None:
        raise ValueError(f"--out {options.out} is the file that --predict writes; --predict names a run directory")
    if configured and (mismatches := config.differences(config.to_json(options), config.to_json(defaults))):
        raise ValueError(f"--resume {early.resume} continues with the options of that run: {mismatches[0]}")
    if early.resume and options.run_dir is not None:
        raise ValueError(
            f"--resume {early.resume} continues in that folder and cannot be combined with --run-dir {options.run_dir}"
        )
    _check_encoding(options)
    return options


def _check_flags(arguments: Sequence[str], task: str) -> None:
    """Checks the names and the values of the options on a command line.

    Raises:
      ValueError: names an option that the task does not use, or the mistake that `check_arguments` finds.
    """
    for name, text, value in split_arguments(arguments, option_types(Options)):
        if name in TASKS[task].UNUSED:
            raise ValueError(f"--task {task} does not use {text}" + (f", got {value}" if value else ""))
    check_arguments(arguments, Options)


def parse_command(command: type, arguments: Sequence[str], prog: str) -> Any:
    """Returns the options of a command, a dataclass; see `jaxlstm.training.arguments.check_arguments`."""
    check_arguments(arguments, command)
    return tyro.cli(command, prog=prog, args=list(arguments))


def _parse_predict(arguments: Sequence[str], run_dir: Path, prog: str) -> Options:
    """Returns the options of a command with ``--predict``: the run's, except for the data and how to read them.

    Raises:
      ValueError: for an option that differs from the run, or a command that has no ``--out`` or does something else.
    """
    defaults = config.load_config(run_dir, "--predict")[0]
    _predicting_task(run_dir, defaults)
    _check_flags(arguments, defaults.task)
    options = _parse_groups(arguments, defaults, prog)
    for name in ("resume", "sample"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"--predict {run_dir} cannot be combined with {config.flag(name)} {value}")
    values = config.to_json(options), config.to_json(defaults)
    if mismatches := config.differences(*values, config.CHANGEABLE_ON_PREDICT):
        raise ValueError(f"--predict {run_dir} uses the options of that run: {mismatches[0]}")
    if options.out is None:
        raise ValueError(f"--predict {run_dir} needs --out FILE, the CSV file to write")
    if options.out.exists() and Path(options.data).exists() and options.out.samefile(options.data):
        raise ValueError(f"--out {options.out} is the file of --data; choose another name")
    return options


def _predicting_task(run_dir: Path, options: Options) -> PredictingTaskModule:
    """Returns the task of a run with these options.

    Raises:
      ValueError: if the task does not predict.
    """
    task = TASKS[options.task]
    if not isinstance(task, PredictingTaskModule):
        names = ", ".join(name for name, module in TASKS.items() if isinstance(module, PredictingTaskModule))
        raise ValueError(f"--predict needs a run of a task that predicts ({names}); {run_dir} is one of {options.task}")
    return task


def _check_encoding(options: Options) -> None:
    """Checks that texts and paths of a run are valid UTF-8, as config.json and Orbax need it.

    Raises:
      ValueError: names the first option that is not.
    """
    texts = {name: value for name, value in vars(options).items() if isinstance(value, str)}
    if options.sample is None:
        run_dir = options.resume or options.run_dir or Path("runs")
        texts["resume" if options.resume else "run_dir"] = str(run_dir.absolute())
        if options.data not in KNOWN_DATA:
            texts["data"] = str(Path(options.data).absolute())
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{config.flag(name)} must be valid UTF-8, got {text!r}; choose another name") from None


def _parse_early(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options that decide the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?", default="charlm", const="charlm")  # tyro reports a missing value
    parser.add_argument("--resume", nargs="?", type=Path)
    parser.add_argument("--predict", nargs="?", type=Path)
    parser.add_argument("--optimizer", nargs="?")
    return parser.parse_known_args(arguments)[0]


def _task_defaults(early: argparse.Namespace) -> Options:
    """Returns the default options of the task on the command line."""
    validation.choice("--task", early.task, TASKS)
    values: dict[str, Any] = {"task": early.task} | TASKS[early.task].DEFAULTS
    if early.optimizer not in (None, values.get("optimizer", Options.optimizer)):
        values.pop("learning_rate", None)  # chosen for the other optimizer
    return Options(**values)


def _parse_groups(arguments: Sequence[str], defaults: Options, prog: str) -> Options:
    """Parses with tyro, which shows each nested dataclass of options as a group; the flags stay flat."""
    groups: dict[str, Any] = {}
    default: dict[str, Any] = {}
    for group, fields in config.groups().items():
        typed = [(f.name, _annotation(f, getattr(defaults, f.name), defaults.task), f.default) for f in fields]
        groups[group] = dataclasses.make_dataclass(group, typed, frozen=True)
        groups[group].__doc__ = ""  # tyro would show the generated signature
        default[group] = groups[group](**{f.name: getattr(defaults, f.name) for f in fields})
    command_line: Any = dataclasses.make_dataclass("CommandLine", list(groups.items()), frozen=True)
    command = f"python {prog}" if prog.endswith(".py") else prog
    parsed: Any = tyro.cli(
        command_line,
        config=(tyro.conf.OmitArgPrefixes,),
        prog=prog,
        description=help_text(DESCRIPTION.format(command=command)),
        args=list(arguments),
        default=command_line(**default),
    )
    values = {}
    for group in groups:
        values |= vars(getattr(parsed, group))
    return Options(**values)


def _annotation(field: dataclasses.Field[Any], default: Any, task: str) -> Any:
    """Returns the type of an option with its help; an option that the task does not use has no help."""
    hint: Any = get_type_hints(Options)[field.name]
    text = field.metadata["help"]
    if default is not None:
        text = text.partition(" Default:")[0]  # it describes a run without a value
    shown_default = "" if default is None else f"(default: {str(default).strip() or repr(default)})"
    metavar = None
    if field.default is None:
        optional_type = next(t for t in get_args(hint) if t is not type(None))
        choices = get_args(optional_type)  # of a Literal
        metavar = f"{{{','.join(choices)}}}" if choices else optional_type.__name__.upper()
    shown = Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=shown_default)]
    return tyro.conf.Suppress[shown] if field.name in TASKS[task].UNUSED else shown


def help_text(text: str) -> str:
    """Returns a description for tyro, which joins the lines of a paragraph: each line becomes a paragraph."""
    return "\n\n".join(filter(None, text.splitlines()))


def sample(options: Options, console: Console, flag: str = "--sample") -> None:
    """Prints text generated with the best parameters of a run.

    Args:
      options: with ``sample``, the run directory, and ``prompt``, ``length``, ``temperature`` and ``seed``.
      console: its file receives the text unchanged, as Rich would interpret tabs and emoji codes; a terminal receives
        control characters spelled out.
      flag: the option that named the run directory, for error messages.

    Raises:
      ValueError: if the folder is not a run of a language model, or the prompt has unknown characters.
    """
    assert options.sample is not None
    check_memory(12 * options.length, "--length")  # ids, as an array and as a list
    run_options, run_config = config.load_config(options.sample, flag)
    task = TASKS[run_options.task]
    if not isinstance(task, LanguageTaskModule):
        raise ValueError(
            f"{flag} needs a run of a language model; {options.sample} is one of --task {run_options.task}"
        )
    text = task.generate_text(
        run_options,
        run_config,
        partial(params_file.load_params, options.sample / params_file.BEST),
        prompt=options.prompt,
        length=options.length,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
    )
    console.file.write((printable(text.replace("\r\n", "\n")) if console.is_terminal else text) + "\n")
    check_written(console.file)


def predict(options: Options, console: Console) -> None:
    """Writes the predictions of a run for ``data`` to the file ``out``, with the best parameters of the run.

    Args:
      options: options of the run with ``predict``, the run directory, ``data`` and ``out``, from `parse`.
      console: receives the lines of the task about the predictions.

    Raises:
      ValueError: if the folder is not a run of a task that predicts, or the data do not suit it.
    """
    assert options.predict is not None
    assert options.out is not None
    run_options, run_config = config.load_config(options.predict, "--predict")
    task = _predicting_task(options.predict, run_options)
    load_params = partial(params_file.load_params, options.predict / params_file.BEST)
    print_line(console, task.predict(dataclasses.replace(options, mesh=None), run_config, load_params, options.out))


@dataclass(frozen=True)
class Sample:
    """Write text with the best parameters of a run of a language model."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")] = None
    """Beginning of the text. Default: a line break, or a character of a text without line breaks."""
    length: int = Options.length
    """Characters or words to write."""
    temperature: float = Options.temperature
    """Divisor of the logits: lower is safer, 0 always takes the most likely character."""
    seed: int = Options.seed
    """Seed of the random draws."""


def sample_main(arguments: Sequence[str], prog: str = "jaxlstm sample") -> None:
    """Runs the command ``jaxlstm sample``."""
    set_up_process()
    with one_line_errors(prog):
        parsed = parse_command(Sample, arguments, prog)
        options = Options(
            sample=parsed.run_dir,
            prompt=parsed.prompt,
            length=parsed.length,
            temperature=parsed.temperature,
            seed=parsed.seed,
        )
        sample(options, Console(), flag="RUN_DIR")
