"""The options of a run, as they are typed and as ``config.json`` keeps them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlstm.lstm import RATES
from jaxlstm.training.data import text as data


@dataclass(frozen=True)
class Options:
    """Train a character language model, an LSTM, on real text."""

    task: Literal["charlm", "wordlm", "adding", "copy", "digits", "forecast"] = "charlm"
    """What is learnt: the next character or word of a text (charlm, wordlm), memory over --window steps (adding,
    copy), digits from the rows of their images, or the next --horizon steps of a time series (forecast)."""
    data: str = data.EMBEDDED
    """Text: python-reference (inside every CPython), tinyshakespeare (fetched once), or the path of a UTF-8 file. Of
    --task forecast: the path of a CSV file with a header and a column of dates."""
    run_dir: Path | None = None
    """Folder for everything the run leaves behind; new or empty. By default runs/ and the time of day."""
    resume: Path | None = None
    """Folder of a run to go on with, from its latest checkpoint and with its options. Only bounds and intervals (in
    steps) may be given anew."""
    seed: int = 0
    """Seed of the initial weights, of dropout and of the order of the data."""

    max_steps: int | None = None
    """Bound on the run, in steps (updates). Without any bound: 1,200."""
    max_seconds: float | None = None
    """Bound on the run, in seconds of wall clock, compilation and validation included; a resumed run counts on."""

    embedding: int = 64
    """Size of a character's embedding."""
    hidden: int = 512
    """Hidden units of a layer."""
    layers: int = 1
    """Number of layers."""
    cell: Literal["lstm", "peephole", "cifg", "rnn"] = "lstm"
    """Kind of cell: LSTM, with peepholes, with coupled input and forget gate, or vanilla."""
    bidirectional: bool = False
    """A second direction, backward in time; not for language models."""
    chrono: int | None = None
    """Longest dependency expected, in steps: draws the biases of forget and input gate for it. By default that of
    --task adding and copy, and none of the others."""
    layer_norm: bool = False
    """Normalise the layers' pre-activations and cell states."""
    projection: int | None = None
    """Size to which each layer's outputs are projected. By default none: the outputs are the hidden units."""
    tied: bool = False
    """Softmax weights tied to the embedding, whose size is then that of the outputs (see --projection)."""

    dropout: float = 0.4
    """Share of each layer's outputs dropped in training, in [0, 1)."""
    input_dropout: float = 0.0
    """Share of the embeddings' elements dropped, by one mask for a whole window, in [0, 1)."""
    embedding_dropout: float = 0.0
    """Share of the characters or words whose embedding is dropped wherever they stand in a window, in [0, 1)."""
    variational: bool = False
    """One mask for a whole window for --dropout too."""
    recurrent_dropout: float = 0.0
    """Share of the candidates dropped, in [0, 1)."""
    weight_drop: float = 0.0
    """Share of the recurrent weights dropped at each step of training, in [0, 1)."""
    zoneout_h: float = 0.0
    """Share of the units whose output stays as it was, in [0, 1)."""
    zoneout_c: float = 0.0
    """Share of the units whose cell state stays as it was, in [0, 1)."""
    activation: float = 0.0
    """Weight of the mean square of the outputs in the loss; AWD-LSTM has 2."""
    temporal_activation: float = 0.0
    """Weight of the mean square of the outputs' change from step to step in the loss; AWD-LSTM has 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; parameters, sums and state stay float32."""

    batch: int = 32
    """Streams of text trained side by side."""
    window: int = 64
    """Characters per stream and step: the span of truncated backpropagation through time."""
    horizon: int = 26
    """Steps to forecast at once."""
    season: int = 52
    """Steps after which a time series is expected to repeat itself: what a forecast is measured against."""
    optimizer: Literal["adamw", "asgd"] = "adamw"
    """AdamW, or SGD whose parameters are averaged once validation stops getting better (AWD-LSTM)."""
    learning_rate: float | None = None
    """Peak of the learning rate. By default 4e-3 for AdamW and 0.3 for SGD."""
    warmup: float = 0.02
    """Share of the run in which the learning rate rises to its peak; AdamW's goes down from there by a cosine."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices."""
    clip: float = 1.0
    """Largest global norm of a gradient; a longer one is scaled down to it."""

    log_every: int = 50
    """Steps between two records of the training loss."""
    valid_every: int = 500
    """Steps between two passes over the whole validation text."""
    save_every: int = 200
    """Steps that a crash costs at most. A checkpoint is begun every half of that, and not before the last one is whole;
    the latest three are kept."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, each skipped and counted, after which the run gives up."""

    diagnose: int = 250
    """Steps between two records of saturated gates and gradient norms, layer by layer; 0 for none."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""
    profile: int | None = None
    """Steps to trace, from the third on: for TensorBoard and, as perfetto_trace.json.gz, for ui.perfetto.dev."""

    mesh: str | None = None
    """Devices to train on, as in data=4,model=2: the batch lies over data, the hidden units over model."""
    coordinator: str | None = None
    """Address and port of the first process, for a run of more than one; auto asks the cluster (SLURM, TPU, ...)."""
    processes: int = 1
    """Number of processes, each started with the same options but for --process. They share the folder of the run."""
    process: int = 0
    """Which of the processes this is, from 0."""

    sample: Path | None = None
    """Folder of a finished run: write text with its best parameters instead of training."""
    prompt: str = "\n"
    """What a sample goes on from."""
    length: int = 500
    """Characters of a sample."""
    temperature: float = 0.8
    """Divides the logits of a sample: lower is safer, 0 takes the likeliest character each time."""

    def __post_init__(self) -> None:
        counts = (
            "embedding",
            "hidden",
            "layers",
            "batch",
            "window",
            "length",
            "horizon",
            "season",
            "processes",
            *INTERVALS,
        )
        for name in (*counts, "projection", "chrono", "profile", "max_steps", "max_seconds", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
        numbers = ("temperature", "weight_decay", "seed", "process", "activation", "temporal_activation", "diagnose")
        for name in numbers:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be finite and not negative, got {getattr(self, name)}"
                )
        check_seed(self.seed)
        for name in ("warmup", "embedding_dropout", *(name for name in RATES if name != "output_dropout")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")


INTERVALS = ("log_every", "valid_every", "save_every", "max_skipped")
MAY_CHANGE = ("max_steps", "max_seconds", "diagnose", "mesh", "tensorboard", "profile", *INTERVALS)  # when resumed
OF_THE_MACHINES = ("coordinator", "processes", "process")
OF_ONE_COMMAND = ("run_dir", "resume", "sample", "prompt", "length", "temperature")
NOT_KEPT = (*OF_THE_MACHINES, *OF_ONE_COMMAND)  # have no part in training


def check_seed(seed: int) -> None:
    """A seed that `jax.random.key` takes.

    Raises:
      ValueError: if it is too large.
    """
    if seed >= 2**63:
        raise ValueError(f"--seed must be less than 2**63, got {seed}")


def help_text(text: str) -> str:
    """A module's docstring for tyro, which runs the lines of a paragraph together: every line is one."""
    return "\n\n".join(filter(None, text.splitlines()))


def to_json(options: Options) -> dict[str, Any]:
    """The options as ``config.json`` has them."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def of_run(folder: Path, flag: str) -> tuple[Options, dict[str, Any]]:
    """The options of the run in a folder, and its whole configuration.

    Raises:
      ValueError: if it is not the folder of a run; the message names the option ``flag`` that gave it.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Options)}.difference(NOT_KEPT)
        return Options(**{name: value for name, value in config["options"].items() if name in known}), config
    except OSError as error:
        raise ValueError(f"{flag} {folder} is not the folder of a run: {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error!r}") from None


def differences(options: Options, kept: dict[str, Any]) -> list[str]:
    """What of the options is not as in a run: ``--hidden is 256, expected 512``; what may change is left out."""
    mine = to_json(options)
    fixed = (name for name in mine if name not in (*MAY_CHANGE, *NOT_KEPT))
    return [
        f"--{name.replace('_', '-')} is {kept.get(name)}, expected {mine[name]}"
        for name in fixed
        if kept.get(name) != mine[name]
    ]
