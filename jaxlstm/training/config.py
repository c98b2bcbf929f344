"""Options of a training run: names, defaults, limits, help texts, and their form in ``config.json``."""

import dataclasses
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jaxlstm import checksum
from jaxlstm.cells import CellName
from jaxlstm.json_types import check_entries
from jaxlstm.recurrence.backends import ImplementationName
from jaxlstm.training.data import text
from jaxlstm.training.data.formal_languages import LanguageName
from jaxlstm.training.optimizer import DEFAULT_PEAK
from jaxlstm.training.sharding import parse_mesh

CONFIG = "config.json"  # in the run directory
Limit = Literal["positive", "size", "layers", "non-negative", "fraction"]
MAX_SIZE = 2**31 - 1  # of an axis; larger ones are mistakes that no machine can hold
MAX_LAYERS = 100  # tracing takes time and memory for each layer


def _option(default: Any, help_text: str, limit: Limit | None = None) -> Any:
    """Declares an option with its default, its line of ``--help`` and the limit that `Options` checks."""
    return dataclasses.field(default=default, metadata={"help": help_text, "limit": limit})


@dataclass(frozen=True)
class Options:
    """Options of one command line of ``train.py``; `groups` sorts them for ``--help``.

    Raises:
      ValueError: if a value is outside its limit.
    """

    # Data and task.
    task: Literal["charlm", "wordlm", "adding", "copy", "digits", "forecast", "formal", "classify"] = _option(
        "charlm",
        "Task: characters or words of a text, adding or copying over --window steps, digits, a time series, a formal "
        "language, labels of sequences.",
    )
    data: str = _option(
        text.EMBEDDED,
        "Text: python-reference, tinyshakespeare (downloaded) or a UTF-8 file; for forecast a CSV file with dates; "
        "for classify an .npz file of padded arrays, or a .jsonl or CSV file of text and label.",
    )
    batch: int = _option(32, "Batch size: sequences, or parallel streams of text, per step.", "size")
    window: int = _option(
        64,
        "Steps per sequence; for text, characters or words per stream and step (truncated backpropagation).",
        "size",
    )
    horizon: int = _option(26, "Steps to forecast.", "size")
    season: int = _option(52, "Steps of one season: the baseline forecast repeats the last one.", "size")

    time: str | None = _option(
        None, "Column of times in the CSV file. Default: date, time, ..., or the only one of dates."
    )
    target: str | None = _option(
        None, "Columns to forecast, separated by commas. Default: all columns of numbers that do not count rows."
    )
    series: str | None = _option(
        None, "Column whose cells tell several series apart, all forecast by one model. Default: one series."
    )
    future: str | None = _option(None, "Columns of numbers known in the future, separated by commas.")
    static: str | None = _option(None, "Columns that are constant in each series, separated by commas.")
    quantiles: str = _option("0.1,0.5,0.9", "Quantiles to forecast, separated by commas, with 0.5.")
    delimiter: str | None = _option(None, "Separator of cells. Default: the most frequent of , ; | and tab.")
    decimal: Literal[".", ","] = _option(".", "Decimal separator.")
    date_format: str | None = _option(
        None, "Format of dates, such as %d.%m.%y. Default: ISO 8601 or a common form, recognized."
    )

    language: LanguageName = _option("parity", "Regular language whose strings are classified.")

    pooling: Literal["last", "mean", "max"] = _option(
        "last", "What the linear layer reads of the outputs: the last, their mean, or the largest of each feature."
    )
    class_weights: Literal["equal", "balanced"] = _option(
        "equal", "Weights of the classes in the loss: equal, or balanced, so that rare classes count as much as others."
    )

    # Model.
    cell: CellName = _option(
        "lstm", "Cell of the network: LSTM, its forms with peepholes or coupled gates (cifg), GRU and others."
    )
    hidden: int = _option(512, "Hidden size of each layer.", "size")
    layers: int = _option(1, "Number of layers.", "layers")
    residual: bool = _option(
        False,
        "Add each layer's outputs to its inputs, which are normalized; for deep stacks. --dropout then applies to "
        "everything that is added.",
    )
    bidirectional: bool = _option(False, "Add a direction that runs backward in time; not for language models.")
    embedding: int = _option(64, "Embedding size.", "size")
    projection: int | None = _option(None, "Size to project each layer's outputs to. Default: no projection.", "size")
    tied: bool = _option(False, "Share the softmax weights with the embedding, whose size must equal the output size.")
    layer_norm: bool = _option(False, "Normalize the pre-activations and cell states of each layer.")
    chrono: int | None = _option(
        None, "Longest dependency in steps, for the initial gate biases. Default: set by adding and copy.", "size"
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "Dtype of matrix products; parameters, sums and state stay float32."
    )

    implementation: Literal["auto", ImplementationName] | None = _option(
        None,
        "Backend of the training step; associative, newton, pallas and cudnn are experimental. auto measures which is "
        "the fastest, for 20 seconds or a twentieth of --max-seconds, before the first step. Default: auto on GPUs and "
        "TPUs, fused on CPUs.",
    )

    # Training.
    max_steps: int | None = _option(
        None, "Limit of the run in steps (updates). Default: 1,200 without --max-seconds, else none.", "positive"
    )
    max_seconds: float | None = _option(
        None,
        "Limit of the run in seconds, compilation and validation included; resumed runs continue the count.",
        "positive",
    )
    optimizer: Literal["adamw", "asgd"] = _option(
        "adamw", "AdamW, or SGD that averages the parameters once validation stops improving (AWD-LSTM)."
    )
    learning_rate: float | None = _option(
        None, "Peak learning rate. Default: 4e-3 for adamw, 0.3 for asgd.", "positive"
    )
    warmup: float = _option(
        0.02, "Fraction of the run with a rising learning rate; AdamW's then falls along a cosine.", "fraction"
    )
    weight_decay: float = _option(0.01, "Decoupled weight decay of matrices.", "non-negative")
    clip: float = _option(1.0, "Largest global gradient norm; larger gradients are scaled down.", "positive")
    max_skipped: int = _option(
        10, "Consecutive steps with a non-finite loss or gradient, each skipped, before the run fails.", "positive"
    )
    seed: int = _option(0, "Seed of initial weights, dropout and data order.", "non-negative")

    # Regularization.
    dropout: float = _option(0.4, "Dropout rate of each layer's outputs, in [0, 1).", "fraction")
    input_dropout: float = _option(
        0.0, "Dropout rate of the first layer's inputs, one mask per window, in [0, 1).", "fraction"
    )
    embedding_dropout: float = _option(
        0.0, "Rate at which whole embeddings are dropped, one mask per window, in [0, 1).", "fraction"
    )
    variational: bool = _option(False, "Use one mask per window for --dropout too.")
    recurrent_dropout: float = _option(0.0, "Dropout rate of the cell candidates, in [0, 1).", "fraction")
    weight_drop: float = _option(0.0, "Dropout rate of the recurrent weights, in [0, 1).", "fraction")
    zoneout_h: float = _option(0.0, "Zoneout rate of the outputs, in [0, 1).", "fraction")
    zoneout_c: float = _option(0.0, "Zoneout rate of the cell states, in [0, 1).", "fraction")
    activation_regularization: float = _option(
        0.0, "Weight of activation regularization, the mean squared output; AWD-LSTM uses 2.", "non-negative"
    )
    temporal_activation_regularization: float = _option(
        0.0, "Weight of the mean squared change of the output per step; AWD-LSTM uses 1.", "non-negative"
    )

    # Run and output.
    run_dir: Path | None = _option(None, "Run directory, new or empty. Default: runs/ and the current time.")
    resume: Path | None = _option(
        None, "Run directory to resume from its latest checkpoint; only limits, intervals and outputs may change."
    )
    log_every: int = _option(50, "Interval in steps between rows of the training loss.", "positive")
    valid_every: int = _option(500, "Interval in steps between validations.", "positive")
    save_every: int = _option(
        200,
        "Largest number of steps lost by a crash; a checkpoint starts every half of it, three are kept.",
        "positive",
    )
    diagnose: int = _option(
        250,
        "Interval in steps between rows of gate saturation and gradient norms per layer; from then on each validation "
        "also writes gates and gradient flow of a fixed sample to diagnosis.jsonl; 0 turns both off.",
        "non-negative",
    )
    tensorboard: bool = _option(False, "Write the metrics for TensorBoard too.")
    profile: int | None = _option(
        None, "Number of steps to profile, from the third on, for TensorBoard and ui.perfetto.dev.", "positive"
    )

    # Devices.
    mesh: str | None = _option(
        None, "Device mesh such as data=4,model=2: batch split over data, hidden units over model."
    )
    coordinator: str | None = _option(
        None, "Address and port of process 0, for several processes; auto asks the cluster (SLURM, TPU, ...)."
    )
    processes: int = _option(
        1, "Number of processes, all started with the same options except --process, one run directory.", "positive"
    )
    process: int = _option(0, "Index of this process, from 0.", "non-negative")

    # Prediction.
    predict: Path | None = _option(
        None,
        "Run directory: write predictions for --data, by default the data of the run, with its best parameters instead "
        "of training.",
    )
    out: Path | None = _option(None, "CSV file that --predict writes.")

    # Sampling.
    sample: Path | None = _option(None, "Run directory: write text with its best parameters instead of training.")
    prompt: str | None = _option(
        None, "Beginning of the text. Default: a line break, or a character of a text without line breaks."
    )
    length: int = _option(500, "Characters or words to write.", "size")
    temperature: float = _option(
        0.8, "Divisor of the logits: lower is safer, 0 always takes the most likely character.", "non-negative"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_limit(flag(field.name), getattr(self, field.name), field.metadata["limit"])
        check_seed(self.seed)

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate in use: ``learning_rate``, or the default of the optimizer."""
        return DEFAULT_PEAK[self.optimizer] if self.learning_rate is None else self.learning_rate


# `--help` shows the options in groups: the first option of each, in the order of `Options`.
FIRST_OF_GROUP = {
    "task": "data",
    "cell": "model",
    "max_steps": "training",
    "run_dir": "run",
    "mesh": "devices",
    "predict": "prediction",
    "sample": "sampling",
}
CHANGEABLE_ON_RESUME = (
    "data",  # the file may have moved; its content is compared
    "max_steps",
    "max_seconds",
    "log_every",
    "valid_every",
    "save_every",
    "max_skipped",
    "diagnose",
    "mesh",
    "tensorboard",
    "profile",
)
# With --predict all other options are the ones of the run; these say how to read another file.
CHANGEABLE_ON_PREDICT = ("data", "delimiter", "decimal", "date_format")
# No influence on training, so neither saved nor compared.
NOT_PART_OF_A_RUN = (
    "coordinator",
    "processes",
    "process",
    "run_dir",
    "resume",
    "predict",
    "out",
    "sample",
    "prompt",
    "length",
    "temperature",
)


# Types of the entries of config.json; some tasks save more, such as language models their vocabulary.
CONFIG_TYPES: dict[str, Any] = {"options": dict[str, Any], "about": str, "fingerprint": str, "versions": dict[str, str]}
BACKEND_TYPES: dict[str, Any] = {"backend": dict[str, Any]}  # if it was measured, see `jaxlstm.training.backend`
TASK_TYPES: dict[str, dict[str, Any]] = {
    "charlm": {"vocabulary": str},
    "wordlm": {"vocabulary": list[str]},
    "classify": {
        "classes": list[str],  # empty for regression
        "vocabulary": str,  # characters; empty for numbers
        "scaling": dict[str, list[float]],
    },
    "forecast": {"scaling": dict[str, Any]},
}


def splits_units(options: Options) -> bool:
    """Returns whether ``--mesh`` splits the hidden units over devices, which takes the backend "tensor_parallel"."""
    return options.mesh is not None and parse_mesh(options.mesh)["model"] > 1


def groups() -> dict[str, list[dataclasses.Field[Any]]]:
    """Returns the options by group."""
    result: dict[str, list[dataclasses.Field[Any]]] = {}
    group = ""
    for field in dataclasses.fields(Options):
        group = FIRST_OF_GROUP.get(field.name, group)
        result.setdefault(group, []).append(field)
    return result


def flag(name: str) -> str:
    """Returns the command-line flag of an option: ``run_dir`` gives ``--run-dir``."""
    return f"--{name.replace('_', '-')}"


def check_limit(name: str, value: Any, limit: Limit | None) -> None:
    """Checks a number against a limit; None passes.

    Raises:
      ValueError: names the option, the value and the limit.
    """
    if limit is None or value is None:
        return
    if limit in ("positive", "size", "layers") and not 0 < value < math.inf:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    maximum = {"size": MAX_SIZE, "layers": MAX_LAYERS}.get(limit, math.inf)
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum:,}, got {reprlib.repr(value)}")
    if limit == "non-negative" and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    if limit == "fraction" and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_seed(seed: int) -> None:
    """Checks that `jax.random.key` accepts a seed.

    Raises:
      ValueError: if it is too large.
    """
    if seed >= 2**63:
        raise ValueError(f"--seed must be less than 2**63, got {seed}")


def saved_types() -> dict[str, Any]:
    """Returns the types of the options that are part of a run, by name."""
    return {name: hint for name, hint in get_type_hints(Options).items() if name not in NOT_PART_OF_A_RUN}


def to_json(options: Options) -> dict[str, Any]:
    """Returns the options that are part of a run as JSON values, for ``config.json``, with the learning rate in use."""
    return {name: getattr(options, name) for name in saved_types()} | {"learning_rate": options.peak_learning_rate}


def load_config(run_dir: Path, flag: str) -> tuple[Options, dict[str, Any]]:
    """Reads the configuration of a run.

    Args:
      run_dir: the run directory.
      flag: the option that named it, for error messages.

    Returns:
      The run's options, and all of ``config.json``.

    Raises:
      ValueError: if the folder is not a run directory, or its configuration is damaged, has an unknown or a missing
        key, or a value of another type.
    """
    path = run_dir / CONFIG
    try:
        config = checksum.read_checked_json(path)
    except OSError as error:
        raise ValueError(f"{flag} {run_dir} is not the folder of a run: {path}: {error.strerror}") from None
    check_entries(config.get("options"), saved_types(), f"{path}: options")
    check_entries(config, entry_types(config) | TASK_TYPES.get(config["options"]["task"], {}), str(path))
    try:
        return Options(**config["options"]), config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def entry_types(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the types of the entries of a configuration, except for `TASK_TYPES`."""
    return CONFIG_TYPES | (BACKEND_TYPES if "backend" in values else {})


def differences(
    received: dict[str, Any], expected: dict[str, Any], changeable: tuple[str, ...] = CHANGEABLE_ON_RESUME
) -> list[str]:
    """Lists the differences of two runs, such as ``--hidden is 256, expected 512``.

    Args:
      received: options of one run, as `to_json` gives them.
      expected: options of the other run.
      changeable: options that are not compared.
    """
    return [
        f"{flag(name)} is {received.get(name)}, expected {value}"
        for name, value in expected.items()
        if name not in (*changeable, *NOT_PART_OF_A_RUN) and received.get(name) != value
    ]
