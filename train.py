"""Train a character language model, an LSTM, on real text.

python train.py                                   the Python language reference, about three minutes on two cores
python train.py --data my.txt --max-seconds 600   a text of your own
python train.py --data tinyshakespeare --max-seconds 600
python train.py --sample runs/NAME --prompt "The " --length 500 --temperature 0.8
"""

import dataclasses
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import jaxlstm
from jaxlstm import data, training
from jaxlstm.language_model import LanguageModel, generate
from jaxlstm.model import RATES
from jaxlstm.reporting import Report, draw_curves, write_json

CHECKPOINT = "best.msgpack"  # the best parameters, in the folder of a run
RATE = {"adamw": 4e-3, "asgd": 0.3}  # peak of the learning rate
OF_THE_MODEL = (  # options that a sample needs, those of training left out; zoneout is a mean at evaluation
    *("embedding", "hidden", "layers", "cell", "layer_norm", "projection", "tied", "dtype", "zoneout_h", "zoneout_c"),
)


@dataclass(frozen=True)
class Options:
    """Train a character language model, an LSTM, on real text."""

    data: str = data.EMBEDDED
    """Text: python-reference (inside every CPython), tinyshakespeare (fetched once), or the path of a UTF-8 file."""
    run_dir: Path | None = None
    """Folder for everything the run leaves behind; new or empty. By default runs/ and the time of day."""
    seed: int = 0
    """Seed of the initial weights, of dropout and of the order of the data."""

    max_steps: int | None = None
    """Bound on the run, in steps (updates). Without any bound: 1,200."""
    max_seconds: float | None = None
    """Bound on the run, in seconds of wall clock, compilation and validation included."""

    embedding: int = 64
    """Size of a character's embedding."""
    hidden: int = 512
    """Hidden units of a layer."""
    layers: int = 1
    """Number of layers."""
    cell: Literal["lstm", "peephole", "cifg", "rnn"] = "lstm"
    """Kind of cell: LSTM, with peepholes, with coupled input and forget gate, or vanilla."""
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

    sample: Path | None = None
    """Folder of a finished run: write text with its best parameters instead of training."""
    prompt: str = "\n"
    """What a sample goes on from."""
    length: int = 500
    """Characters of a sample."""
    temperature: float = 0.8
    """Divides the logits of a sample: lower is safer, 0 takes the likeliest character each time."""

    def __post_init__(self) -> None:
        counts = ("embedding", "hidden", "layers", "batch", "window", "log_every", "valid_every", "length")
        for name in (*counts, "projection", "max_steps", "max_seconds", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
        for name in ("temperature", "weight_decay", "seed", "activation", "temporal_activation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", *(name for name in RATES if name != "output_dropout")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")


def build(options: Options, vocabulary: data.Vocabulary) -> LanguageModel:
    """The model that the options describe."""
    lstm = jaxlstm.LSTM(
        options.embedding,
        options.hidden,
        num_layers=options.layers,
        dtype=jnp.dtype(options.dtype),
        cell=options.cell,
        layer_norm=options.layer_norm,
        proj_size=options.projection,
        dropout=options.dropout,
        input_dropout=options.input_dropout,
        variational=options.variational,
        recurrent_dropout=options.recurrent_dropout,
        weight_drop=options.weight_drop,
        zoneout_h=options.zoneout_h,
        zoneout_c=options.zoneout_c,
    )
    return LanguageModel(len(vocabulary), lstm, options.dropout, options.tied)


def train(options: Options, console: Console) -> None:
    """One run, from the text to the summary."""
    began = time.perf_counter()

    # The text, its alphabet, and the model for it.
    text = data.load_text(options.data)
    vocabulary = data.Vocabulary.of(text)
    train_ids, valid_ids = data.split(vocabulary.encode(text))
    if len(valid_ids) < 2:
        raise data.DataError(f"{len(text)} characters are too few: the last tenth is for validation")
    windows = data.training_windows(train_ids, options.batch, options.window, options.seed)
    model = build(options, vocabulary)
    optimizer = training.optimizer(
        options.learning_rate or RATE[options.optimizer],
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        clip=options.clip,
        kind=options.optimizer,
    )
    key = jax.random.key(options.seed)
    state = training.start(model, optimizer, options.batch, key, averaged=options.optimizer == "asgd")
    step_function = training.make_step(
        model, optimizer, activation=options.activation, temporal_activation=options.temporal_activation
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = jax.devices()[0]

    # The folder of the run.
    folder = options.run_dir or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--run-dir {folder} is not an empty folder; a run never writes over another")
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()}
    write_json(folder / "config.json", {"options": config, "vocabulary": vocabulary.characters})
    console.print(
        f"{len(train_ids):,} characters to train on, {len(valid_ids):,} to validate, {len(vocabulary)} different; "
        f"{parameters:,} parameters on {device.device_kind} ({device.platform})",
        highlight=False,
        soft_wrap=True,
    )

    # The loop.
    max_steps = options.max_steps or (math.inf if options.max_seconds else 1200)
    max_seconds = options.max_seconds or math.inf
    per_step = options.batch * options.window
    step, progress, valid_seconds = 0, 0.0, 0.0
    best_loss, best_step = math.inf, 0
    losses: list[jax.Array] = []
    valid_losses: list[float] = []

    def validate() -> None:
        nonlocal best_loss, best_step, valid_seconds, state
        start = time.perf_counter()
        loss = finite(training.evaluate(model, state.trained, valid_ids, batch=options.batch), step)
        valid_losses.append(loss)
        speed = (len(valid_ids) - 1) / (time.perf_counter() - start)
        if best := loss < best_loss:
            best_loss, best_step = loss, step
            training.save_params(folder / CHECKPOINT, state.trained)
        ids = generate(model, state.trained, opening, 200, jax.random.fold_in(key, step), options.temperature)
        report.valid(step, loss, speed, best=best, sample=vocabulary.decode(np.asarray(ids)))
        state = training.begin_average(state, valid_losses)
        valid_seconds = time.perf_counter() - start

    opening = jnp.asarray(valid_ids[:1])
    stopped = catch_signals()
    with Report(folder, console) as report:
        clock = time.perf_counter()
        while progress < 1 and not stopped:
            window = next(windows)
            step += 1
            spent = time.perf_counter() - began
            # The clock leaves room for the last validation, as long as the one before it.
            progress = min(1.0, max(step / max_steps, spent / max(max_seconds - valid_seconds, 1e-9)))
            state, loss = step_function(state, window.inputs, window.targets, window.first, progress)
            losses.append(loss)
            if len(losses) > 1:
                losses[-2].block_until_ready()  # at most one step ahead of the device, so that the clock is true
            if step % options.log_every == 0 or progress == 1:
                mean = finite(float(np.mean(jax.device_get(losses))), step)
                speed = len(losses) * per_step / (time.perf_counter() - clock)
                report.train(step, mean, speed, progress)
                losses, clock = [], time.perf_counter()
            if step % options.valid_every == 0 or progress == 1:
                paused = time.perf_counter()
                validate()
                clock += time.perf_counter() - paused
        if stopped:
            report.say(f"{stopped[0].name} received; stopped after step {step:,}")
            if best_step == 0:
                validate()

    # What is left of the run.
    summary = {
        "valid_loss": best_loss,
        "best_step": best_step,
        "steps": step,
        "parameters": parameters,
        "wall_seconds": time.perf_counter() - began,
        "device": f"{device.device_kind} ({device.platform})",
    }
    write_json(folder / "summary.json", summary)
    draw_curves(folder / "curves.png", report.rows, f"{Path(options.data).stem}: LSTM of {parameters:,} parameters")
    console.print(
        f"best validation loss {best_loss:.4f} nats ({best_loss / math.log(2):.4f} bits per character) at step "
        f"{best_step:,}; {summary['wall_seconds']:.0f} s\n{folder}: python train.py --sample {folder}",
        highlight=False,
        soft_wrap=True,
    )
    if stopped:
        raise SystemExit(128 + stopped[0])


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


def finite(loss: float, step: int) -> float:
    """``loss``, or the end of the run if it is not a number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}; the best parameters so far are kept")
    return loss


def sample(options: Options, console: Console) -> None:
    """Text from the best parameters of a finished run."""
    assert options.sample is not None
    path = options.sample / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        run = Options(**{name: config["options"][name] for name in OF_THE_MODEL})
        vocabulary = data.Vocabulary(config["vocabulary"])
    except OSError as error:
        raise ValueError(f"--sample {options.sample} is not the folder of a run: {path}: {error.strerror}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error!r}") from None
    if not options.prompt:
        raise ValueError("--prompt must have at least one character")
    prompt = jnp.asarray(vocabulary.encode(options.prompt))
    model = build(run, vocabulary)
    params = training.load_params(options.sample / CHECKPOINT, model)
    ids = generate(model, params, prompt, options.length, jax.random.key(options.seed), options.temperature)
    console.print(options.prompt + vocabulary.decode(np.asarray(ids)), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The command line."""
    console = Console()
    try:
        options = tyro.cli(Annotated[Options, tyro.conf.OmitArgPrefixes], description=__doc__)
        (train if options.sample is None else sample)(options, console)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from None


if __name__ == "__main__":
    main()
