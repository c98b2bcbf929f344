"""Character language modeling: predict the next character from all characters before it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data.text import CharVocabulary, split
from jaxlstm.training.data.token_cache import load_characters
from jaxlstm.training.tasks import language
from jaxlstm.training.tasks.task import LoadParams, Task, unused_options

DEFAULTS: dict[str, Any] = {}  # the defaults of `Options` are meant for this task
UNUSED = unused_options("data", "window", "embedding", "softmax", "activation_regularization")


def make(options: Options) -> Task:
    """Returns the task on the text of ``--data``; the last tenth is for validation."""
    ids, vocabulary = load_characters(options.data)
    train_ids, valid_ids = split(ids)
    return language.make_language_task(
        options,
        vocabulary,
        train_ids,
        valid_ids,
        description=f"{len(train_ids):,} characters to train on, {len(valid_ids):,} to validate, "
        f"{len(vocabulary)} distinct",
        title=f"{Path(options.data).stem}: LSTM",
        loss_unit="nats per character",
        unit_name="characters",
        format_loss=lambda loss: f"{loss:.4f} nats  {loss / math.log(2):.4f} bits/char",
        sample_length=200,
        extra_config={"vocabulary": vocabulary.characters},
        notes=language.table_notes(options.data),
    )


def generate_text(
    run_options: Options,
    config: Mapping[str, Any],
    load_params: LoadParams,
    *,
    prompt: str | None,
    length: int,
    key: Array,
    temperature: float,
) -> str:
    """Returns the prompt and its continuation; see `jaxlstm.training.tasks.language.generate_text`.

    Without a prompt the text continues a newline, or else a blank, or else the first character of the vocabulary.
    """
    vocabulary = CharVocabulary(config["vocabulary"])
    if prompt is None:
        prompt = next(c for c in ("\n", " ", vocabulary.characters[0]) if c in vocabulary.characters)
    continuation = language.generate_text(
        run_options, vocabulary, load_params, prompt=prompt, length=length, key=key, temperature=temperature
    )
    return prompt + continuation
