"""What language models of characters and of words have in common."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data import text as data
from jaxlstm.training.models.build import network
from jaxlstm.training.models.language_model import LanguageModel, carried, evaluate, generate, training_loss
from jaxlstm.training.tasks.task import Task


class Alphabet(Protocol):
    """Text to ids and back."""

    def __len__(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids."""
        ...


def build(options: Options, vocabulary_size: int, *, remember: int | None = None) -> LanguageModel:
    """The model that the options describe; ``remember`` as in `jaxlstm.training.models.build.network`."""
    if options.bidirectional:
        raise ValueError("--bidirectional would let a language model see what it has to predict")
    lstm = network(options, options.embedding, remember=remember)
    return LanguageModel(vocabulary_size, lstm, options.dropout, options.tied, options.embedding_dropout)


def task(options: Options, alphabet: Alphabet, train_ids: np.ndarray, valid_ids: np.ndarray, **described: Any) -> Task:
    """Truncated backpropagation through time over ``train_ids``, measured on ``valid_ids``.

    Args:
      options: of the run.
      alphabet: of the ids.
      train_ids: text to train on.
      valid_ids: text to validate on.
      **described: the fields of `Task` that say what it is: ``about``, ``title``, ``unit``, ``counted``, ``say``,
        ``kept``.
    """
    windows = (train_ids, options.batch, options.window, options.seed)
    data.training_windows(*windows)  # complains before anything is made
    model = build(options, len(alphabet))
    opening = jnp.asarray(valid_ids[:1])

    def batches(start: int) -> Iterator[data.Window]:
        return data.training_windows(*windows, start)

    def show(params: Any, key: Array) -> str:
        length = 200 if described["counted"] == "characters" else 60
        return alphabet.decode(np.asarray(generate(model, params, opening, length, key, options.temperature)))

    return Task(
        per_step=options.batch * options.window,
        evaluated=len(valid_ids) - 1,
        init=model.init,
        carry=lambda params: model.lstm.initial_state((options.batch,), params.lstm),
        batches=batches,
        loss=training_loss(model, activation=options.activation, temporal_activation=options.temporal_activation),
        lstm=model.lstm,
        reads=lambda params, carry, window: (params.embedding[window.inputs], carried(carry, window)),
        evaluate=lambda params: {"loss": evaluate(model, params, valid_ids, batch=options.batch)},
        show=show,
        fingerprint=data.fingerprint(train_ids, valid_ids, repr(alphabet)),
        **described,
    )


def write(
    run: Options, alphabet: Alphabet, load: Any, *, prompt: str, length: int, key: Array, temperature: float
) -> str:
    """Text that goes on from ``prompt``.

    Args:
      run: options of the run.
      alphabet: of its text.
      load: gives its parameters for the function that initialises them.
      prompt: at least one character.
      length: number of tokens to write.
      key: PRNG key.
      temperature: divides the logits.

    Raises:
      ValueError: for a prompt that is empty or not of this alphabet.
    """
    start = jnp.asarray(alphabet.encode(prompt))
    if not start.size:
        raise ValueError(f"--prompt must have at least one character or word, got {prompt!r}")
    model = build(run, len(alphabet))
    return alphabet.decode(np.asarray(generate(model, load(model.init), start, length, key, temperature)))
