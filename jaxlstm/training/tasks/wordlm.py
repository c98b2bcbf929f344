"""Word language modeling with the recipe of AWD-LSTM (Merity, Keskar & Socher 2018).

The text consists of words separated by blanks, one sentence per line, as in the files of the Penn Treebank. ``--data``
is one such file, whose last tenth is for validation, or a folder with one file ``*train*`` and one file ``*valid*``.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax import Array

from jaxlstm.training.config import Options
from jaxlstm.training.data.text import EMBEDDED, DataError, WordVocabulary, load_text
from jaxlstm.training.tasks import language
from jaxlstm.training.tasks.task import Task, unused_options

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
    "activation": 2.0,
    "temporal_activation": 1.0,
    "batch": 20,
    "window": 35,
    "optimizer": "asgd",
    "learning_rate": 20.0,
    "clip": 0.25,
    "weight_decay": 1.2e-6,
    "max_steps": 6000,
    "valid_every": 100,
}
UNUSED = unused_options("data", "window", "embedding", "activation_regularization")


def make(options: Options) -> Task:
    """Returns the task on the text of ``--data``."""
    train_text, valid_text = load_texts(options.data)
    vocabulary = WordVocabulary.from_text(train_text)
    train_ids, valid_ids = vocabulary.encode(train_text), vocabulary.encode(valid_text)
    if len(valid_ids) < 2:
        raise DataError(f"{len(valid_ids)} words are too few to validate on")
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
    load_params: Callable[[Callable[[Array], Any]], Any],
    *,
    prompt: str,
    length: int,
    key: Array,
    temperature: float,
) -> str:
    """Returns the prompt and its continuation; see `jaxlstm.training.tasks.language.generate_text`."""
    vocabulary = WordVocabulary(tuple(config["vocabulary"]))
    continuation = language.generate_text(
        run_options, vocabulary, load_params, prompt=prompt, length=length, key=key, temperature=temperature
    )
    return f"{prompt} {continuation}"
