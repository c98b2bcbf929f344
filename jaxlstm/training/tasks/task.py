"""The contract between the training loop and a task, and the options that only some tasks use."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jax import Array

from jaxlstm.params import State
from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.train_step import Loss

OptionGroup = Literal[
    "data",
    "window",
    "embedding",
    "softmax",
    "activation_regularization",
    "forecasting",
    "language",
    "classification",
]

# Options that not every task uses, by group. All other options apply to every task.
OPTION_GROUPS: dict[OptionGroup, tuple[str, ...]] = {
    "data": ("data",),
    "window": ("window",),
    "embedding": ("embedding",),
    "softmax": ("tied", "embedding_dropout"),
    "activation_regularization": ("activation_regularization", "temporal_activation_regularization"),
    "forecasting": (
        *("horizon", "season", "time", "target", "series", "future", "static", "quantiles"),
        *("delimiter", "decimal", "date_format"),
    ),
    "language": ("language",),
    "classification": ("pooling", "class_weights"),
}


def unused_options(*used: OptionGroup) -> tuple[str, ...]:
    """Returns the options that a task does not use, given the groups that it uses."""
    return tuple(name for group, names in OPTION_GROUPS.items() if group not in used for name in names)


def no_carry(params: Any) -> None:
    """Returns None: batches do not continue each other."""
    del params


def no_arguments(batch: Any) -> dict[str, Array | None]:
    """Returns no further arguments."""
    del batch
    return {}


def no_sample(params: Any, key: Array) -> str:
    """Returns an empty text."""
    del params, key
    return ""


def no_metrics(params: Any, folder: Path) -> dict[str, float]:
    """Returns no metrics."""
    del params, folder
    return {}


def no_figures(params: Any, folder: Path) -> None:
    """Draws nothing."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, model, loss and metrics of a task; parameters are the pytree that ``init`` returns."""

    description: str  # one line about the data
    title: str  # title of the learning curves
    loss_unit: str  # unit of the loss, such as "nats per character"
    unit_name: str  # plural name of the units that speed is measured in, such as "characters"
    units_per_step: int  # units in a training batch
    validation_units: int  # units in the validation data
    format_loss: Callable[[float], str]  # formats a loss with its unit
    init: Callable[[Array], Any]  # parameters from a PRNG key
    init_carry: Callable[[Any], Any] = no_carry  # params -> recurrent state before the first batch, or None
    batches: Callable[[int], Iterator[Any]]  # endless batches after skipping the given number of them
    make_loss: Callable[[RNN], Loss]  # the loss with the LSTM of the model, or one with another backend
    lstm: RNN  # the recurrent network; its parameters are the field ``lstm`` of the model's
    lstm_inputs: Callable[[Any, Any, Any], tuple[Array, State | None]]  # (params, carry, batch) -> (xs, initial state)
    lstm_arguments: Callable[[Any], dict[str, Array | None]] = (
        no_arguments  # batch -> mask and static features of the call
    )
    evaluate: Callable[[Any], dict[str, float]]  # params -> validation metrics; the lowest "loss" is the best
    sample: Callable[[Any, Array], str] = no_sample  # (params, key) -> text to show after each validation
    test: Callable[[Any, Path], dict[str, float]] = no_metrics  # (best params, run folder) -> test metrics at the end
    draw: Callable[[Any, Path], None] = no_figures  # (best params, run folder): draws figures at the end of the run
    notes: tuple[str, ...] = ()  # lines about the data, printed before the description
    fingerprint: str = ""  # hash of data read from files; a resumed run must have the same
    extra_config: Mapping[str, Any] = field(default_factory=dict)  # entries of config.json besides the options

    @property
    def loss(self) -> Loss:
        """The loss of the model."""
        return self.make_loss(self.lstm)


# Returns the best parameters of a run, given the function that initializes them from a key.
LoadParams = Callable[[Callable[[Array], Any]], Any]


class TaskModule(Protocol):
    """A module that defines a task."""

    DEFAULTS: dict[str, Any]  # defaults of `Options` that differ for this task
    UNUSED: tuple[str, ...]  # options without effect on this task: an error if given

    def make(self, options: Options) -> Task:
        """Returns the task with the given options."""
        ...


@runtime_checkable
class LanguageTaskModule(TaskModule, Protocol):
    """A module that defines a task whose model generates text."""

    def generate_text(
        self,
        run_options: Options,
        config: Mapping[str, Any],
        load_params: LoadParams,
        *,
        prompt: str | None,
        length: int,
        key: Array,
        temperature: float,
    ) -> str:
        """Returns the prompt, or one that suits the vocabulary if it is None, and its continuation."""
        ...


@runtime_checkable
class PredictingTaskModule(TaskModule, Protocol):
    """A module that defines a task whose runs predict from another file: ``train.py --predict``."""

    def predict(
        self,
        options: Options,
        config: Mapping[str, Any],
        load_params: LoadParams,
        out: Path,
    ) -> str:
        """Writes the predictions of a trained run.

        Args:
          options: options of the run, with ``data`` and the options on reading it of this command.
          config: the run's ``config.json``, with the task's ``extra_config``.
          load_params: returns the best parameters of the run, given the function that initializes them.
          out: the CSV file to write.

        Returns:
          One or more lines for the user.
        """
        ...
