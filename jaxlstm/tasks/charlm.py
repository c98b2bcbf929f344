"""The next character of a text, from all characters before it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxlstm
from jaxlstm import data
from jaxlstm.language_model import LanguageModel, evaluate, generate, training_loss
from jaxlstm.options import Options
from jaxlstm.tasks.task import Task

DEFAULTS: dict[str, Any] = {}  # those of `Options`


def make(options: Options) -> Task:
    """The task on the text that the options name."""
    text = data.load_text(options.data)
    vocabulary = data.Vocabulary.of(text)
    train_ids, valid_ids = data.split(vocabulary.encode(text))
    if len(valid_ids) < 2:
        raise data.DataError(f"{len(text)} characters are too few: the last tenth is for validation")
    data.training_windows(train_ids, options.batch, options.window, options.seed)  # complains before anything is made
    model = build(options, len(vocabulary))
    opening = jnp.asarray(valid_ids[:1])

    def batches(start: int) -> Iterator[data.Window]:
        return data.training_windows(train_ids, options.batch, options.window, options.seed, start)

    def show(params: Any, key: Array) -> str:
        return vocabulary.decode(np.asarray(generate(model, params, opening, 200, key, options.temperature)))

    return Task(
        about=f"{len(train_ids):,} characters to train on, {len(valid_ids):,} to validate, {len(vocabulary)} different",
        title=f"{Path(options.data).stem}: LSTM",
        unit="nats per character",
        counted="characters",
        per_step=options.batch * options.window,
        evaluated=len(valid_ids) - 1,
        say=lambda loss: f"{loss:.4f} nats  {loss / math.log(2):.4f} bits/char",
        init=model.init,
        carry=lambda params: model.lstm.initial_state((options.batch,), params.lstm),
        batches=batches,
        loss=training_loss(model, activation=options.activation, temporal_activation=options.temporal_activation),
        evaluate=lambda params: {"loss": evaluate(model, params, valid_ids, batch=options.batch)},
        show=show,
        kept=(("vocabulary", vocabulary.characters),),
    )


def build(options: Options, vocabulary_size: int) -> LanguageModel:
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
    return LanguageModel(vocabulary_size, lstm, options.dropout, options.tied)


def write(
    run: Options, config: dict[str, Any], load: Any, *, prompt: str, length: int, key: Array, temperature: float
) -> str:
    """Text that goes on from ``prompt``.

    Args:
      run: options of the run.
      config: its configuration.
      load: gives its parameters for the function that initialises them.
      prompt: at least one character.
      length: number of characters to write.
      key: PRNG key.
      temperature: divides the logits.
    """
    vocabulary = data.Vocabulary(config["vocabulary"])
    start = jnp.asarray(vocabulary.encode(prompt))
    model = build(run, len(vocabulary))
    ids = generate(model, load(model.init), start, length, key, temperature)
    return prompt + vocabulary.decode(np.asarray(ids))
