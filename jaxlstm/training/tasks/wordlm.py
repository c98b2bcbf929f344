"""Word language modeling with the recipe of AWD-LSTM (Merity, Keskar & Socher 2018).

The text consists of words separated by blanks, one sentence per line, as in the files of the Penn Treebank. ``--data``
is one such file, whose last tenth is for validation, or a folder with one file ``*train*`` and one file ``*valid*``.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data.text import EMBEDDED, END, UNKNOWN, DataError, WordVocabulary, load_text
from jaxlstm.training.tasks import language
from jaxlstm.training.tasks.task import LoadParams, Task, unused_options

DEFAULTS: dict[str, Any] = {
    "embedding": 200,
    "hidden": 400,
    "projection": 200,
    "tied": True,
    "dropout": 0.4,
    "input_dropout": 0.3,
    "embedding_dropout": 0.1,
    "variational": True,
    "weight_drop": 0.3,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
    "batch": 20,
    "window": 35,
    "optimizer": "asgd",
    "learning_rate": 20.0,
    "clip": 0.25,
    "weight_decay": 1.2e-6,
    "max_steps": 6000,
    "valid_every": 100,
}
UNUSED = unused_options("data", "window", "embedding", "softmax", "activation_regularization")


def make(options: Options) -> Task:
    """Returns the task on the text of ``--data``."""
    train_text, valid_text = load_texts(options.data)
    vocabulary = WordVocabulary.from_text(train_text)
    train_ids, valid_ids = vocabulary.encode(train_text), vocabulary.encode(valid_text)
    return language.make_language_task(
        options,
        vocabulary,
        train_ids,
        valid_ids,
        description=f"{len(train_ids):,} words to train on, {len(valid_ids):,} to validate, "
        f"{len(vocabulary):,} distinct",
        title=f"words of {Path(options.data).stem}: LSTM",
        loss_unit="nats per word",
        unit_name="words",
        format_loss=lambda loss: f"{loss:.4f} nats  perplexity {math.exp(min(loss, 99)):.2f}",
        sample_length=60,
        extra_config={"vocabulary": list(vocabulary.words)},
        notes=(*language.table_notes(options.data), *unknown_word_notes(vocabulary, train_ids, valid_ids)),
    )


def unknown_word_notes(vocabulary: WordVocabulary, train_ids: np.ndarray, valid_ids: np.ndarray) -> tuple[str, ...]:
    """Returns a line for the user if most words of a part are not in the vocabulary: `UNKNOWN` is easy to predict."""
    unknown, end = (vocabulary.words.index(word) for word in (UNKNOWN, END))
    train, valid = (
        (ids[ids != end] == unknown).mean() if (ids != end).any() else 0.0 for ids in (train_ids, valid_ids)
    )
    if max(train, valid) <= 0.5:
        return ()
    return (
        f"{train:.0%} of the words to train on and {valid:.0%} of those to validate on are unknown ({UNKNOWN}: fewer "
        "than two occurrences), so the loss says little; --task charlm suits languages without spaces between words",
    )


def load_texts(source: str) -> tuple[str, str]:
    """Returns the training text and the validation text.

    Raises:
      DataError: if a text cannot be read, is one line, or is a folder without one of the two files.
    """
    folder = Path(source)
    if folder.is_dir():
        train, valid = (sorted(folder.glob(f"*{part}*")) for part in ("train", "valid"))
        if len(train) != 1 or len(valid) != 1:
            raise DataError(f"{folder} must hold one file *train* and one *valid*, got {train + valid}")
        return load_text(str(train[0])), load_text(str(valid[0]))
    text = load_text(source)
    if source == EMBEDDED:  # prose: lower-case it and separate words from punctuation
        text = "\n".join(" ".join(re.findall(r"\w+|[^\w\s]", line.lower())) for line in text.splitlines() if line)
    lines = text.splitlines()
    cut = int(len(lines) * 0.9)
    if cut == 0:
        raise DataError(
            f"{source} is one line: words are split by lines, nine tenths to train on and one tenth to validate on; or "
            "pass a folder with a file *train* and a file *valid* to --data"
        )
    return "\n".join(lines[:cut]), "\n".join(lines[cut:])


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
    """Returns the prompt, by default a line break, and its continuation; see `language.generate_text`."""
    prompt = "\n" if prompt is None else prompt
    vocabulary = WordVocabulary(tuple(config["vocabulary"]))
    continuation = language.generate_text(
        run_options, vocabulary, load_params, prompt=prompt, length=length, key=key, temperature=temperature
    )
    return f"{prompt} {continuation}"
