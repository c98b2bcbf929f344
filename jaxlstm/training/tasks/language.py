"""The parts that character and word language models share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data.text import DataError, Window, fingerprint, training_windows
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.language_model import LanguageModel, evaluate, generate, restart_carry, training_loss
from jaxlstm.training.tasks.task import LoadParams, Task


@runtime_checkable
class Vocabulary(Protocol):
    """A mapping between text and token ids."""

    def __len__(self) -> int:
        """Returns the number of tokens."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of a text."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of token ids."""
        ...


def build_language_model(
    options: Options, vocabulary_size: int, *, longest_dependency: int | None = None
) -> LanguageModel:
    """Returns the language model that the options describe.

    Args:
      options: options of the run.
      vocabulary_size: V.
      longest_dependency: passed to `jaxlstm.training.models.build.build_lstm`.

    Raises:
      ValueError: for ``--bidirectional``.
    """
    if options.bidirectional:
        raise ValueError("--bidirectional would let a language model see the tokens that it has to predict")
    lstm = build_lstm(options, options.embedding, longest_dependency=longest_dependency)
    return LanguageModel(
        vocabulary_size, lstm, options.dropout, options.tied, options.embedding_dropout, options.variational
    )


def make_language_task(
    options: Options,
    vocabulary: Vocabulary,
    train_ids: np.ndarray,
    valid_ids: np.ndarray,
    *,
    description: str,
    title: str,
    loss_unit: str,
    unit_name: str,
    format_loss: Callable[[float], str],
    sample_length: int,
    extra_config: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> Task:
    """Returns the task of truncated backpropagation through time over ``train_ids``, validated on ``valid_ids``.

    Args:
      options: options of the run.
      vocabulary: vocabulary of the ids.
      train_ids: token ids of the training text.
      valid_ids: token ids of the validation text.
      description: field of `Task`, as are ``title``, ``loss_unit``, ``unit_name``, ``format_loss``, ``extra_config``.
      title: see `Task`.
      loss_unit: see `Task`.
      unit_name: see `Task`.
      format_loss: see `Task`.
      sample_length: tokens of the text sampled after each validation.
      extra_config: the vocabulary; also part of the fingerprint.
      notes: see `Task`; also part of the errors.

    Raises:
      DataError: if the training text is shorter than one window, or there are no two tokens to validate on.
    """

    def batches(start: int) -> Iterator[Window]:
        return training_windows(train_ids, options.batch, options.window, options.seed, start, unit_name=unit_name)

    try:
        batches(0)  # raises before any array is allocated if the text is too short
        if len(valid_ids) < 2:
            raise DataError(f"{len(valid_ids)} {unit_name} are too few to validate on: use a longer text")
    except DataError as error:
        raise DataError("; ".join([str(error), *notes])) from None
    notes = (*notes, *repetition_notes(vocabulary, train_ids, valid_ids, unit_name))
    model = build_language_model(options, len(vocabulary))
    regularization = {
        "activation": options.activation_regularization,
        "temporal_activation": options.temporal_activation_regularization,
    }
    first_token = jnp.asarray(valid_ids[:1])

    def sample(params: Any, key: Array) -> str:
        ids = generate(model, params, first_token, sample_length, key, options.temperature)
        return vocabulary.decode(np.asarray(ids))

    return Task(
        description=description,
        title=title,
        loss_unit=loss_unit,
        unit_name=unit_name,
        units_per_step=options.batch * options.window,
        validation_units=len(valid_ids) - 1,
        format_loss=format_loss,
        init=model.init,
        init_carry=lambda params: model.lstm.initial_state((options.batch,), params.lstm),
        batches=batches,
        make_loss=lambda lstm: training_loss(replace(model, lstm=lstm), **regularization),
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, window: (
            params.embedding[window.inputs],
            restart_carry(model, params, carry, window),
        ),
        evaluate=lambda params: {"loss": evaluate(model, params, valid_ids, batch_size=options.batch)},
        sample=sample,
        fingerprint=fingerprint(train_ids, valid_ids, repr(extra_config)),
        extra_config=extra_config,
        notes=notes,
    )


def repetition_notes(
    vocabulary: Vocabulary, train_ids: np.ndarray, valid_ids: np.ndarray, unit_name: str
) -> tuple[str, ...]:
    """Returns a line for the user per part whose targets are one repeated token: it is easy to predict."""
    return tuple(
        f"all {len(targets):,} {unit_name} to {purpose} are {vocabulary.decode(targets[:1])!r}, so the loss says little"
        for targets, purpose in ((train_ids[1:], "train on"), (valid_ids[1:], "validate on"))
        if targets.min() == targets.max()
    )


def table_notes(source: str) -> tuple[str, ...]:
    """Returns a line for the user if the text is a table by its name."""
    if Path(source).suffix.lower() not in (".csv", ".tsv"):
        return ()
    return (f"{source} is a table by its name: it is read as text; --task forecast forecasts its columns",)


def generate_text(
    run_options: Options,
    vocabulary: Vocabulary,
    load_params: LoadParams,
    *,
    prompt: str,
    length: int,
    key: Array,
    temperature: float,
) -> str:
    """Returns text that continues ``prompt``.

    Args:
      run_options: options of the trained run.
      vocabulary: vocabulary of the trained run.
      load_params: returns the trained parameters, given the function that initializes them.
      prompt: at least one character or word.
      length: number of tokens to generate.
      key: PRNG key.
      temperature: divides the logits; 0 takes the most likely token.

    Raises:
      ValueError: if the prompt is empty or has characters outside the vocabulary.
    """
    prompt_ids = jnp.asarray(vocabulary.encode(prompt))
    if not prompt_ids.size:
        raise ValueError(f"--prompt must have at least one character or word, got {prompt!r}")
    model = build_language_model(run_options, len(vocabulary))
    params = load_params(model.init)
    return vocabulary.decode(np.asarray(generate(model, params, prompt_ids, length, key, temperature)))
