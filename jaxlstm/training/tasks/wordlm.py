"""The next word of a text, after the recipe of AWD-LSTM (Merity, Keskar & Socher 2018).

Text is words and blanks, one sentence a line, as in the Penn Treebank's files. ``--data`` is one such file, whose last
tenth is for validation, or a folder with a file ``*train*`` and a file ``*valid*`` in it.
"""

import math
import re
from pathlib import Path
from typing import Any

from jaxlstm.training.config import Options
from jaxlstm.training.data import text as data
from jaxlstm.training.tasks import language
from jaxlstm.training.tasks.task import OF_SERIES, Task

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
UNUSED = OF_SERIES


def make(options: Options) -> Task:
    """The task on the text that the options name."""
    train_text, valid_text = texts(options.data)
    words = data.Words.of(train_text)
    train_ids, valid_ids = words.encode(train_text), words.encode(valid_text)
    if len(valid_ids) < 2:
        raise data.DataError(f"{len(valid_ids)} words are too few to validate on")
    return language.task(
        options,
        words,
        train_ids,
        valid_ids,
        about=f"{len(train_ids):,} words to train on, {len(valid_ids):,} to validate, {len(words):,} different",
        title=f"words of {Path(options.data).stem}: LSTM",
        unit="nats per word",
        counted="words",
        say=lambda loss: f"{loss:.4f} nats  perplexity {math.exp(min(loss, 99)):.2f}",
        kept=(("vocabulary", list(words.words)),),
    )


def texts(source: str) -> tuple[str, str]:
    """Text to train on and to validate on.

    Raises:
      DataError: if it cannot be had, is one line, or is a folder without either part.
    """
    folder = Path(source)
    if folder.is_dir():
        found = [sorted(folder.glob(f"*{part}*")) for part in ("train", "valid")]
        if any(len(paths) != 1 for paths in found):
            raise data.DataError(f"{folder} must hold one file *train* and one *valid*, got {found[0] + found[1]}")
        train, valid = (data.load_text(str(paths[0])) for paths in found)
        return train, valid
    text = data.load_text(source)
    if source == data.EMBEDDED:  # prose: words and marks apart, in small letters
        text = "\n".join(" ".join(re.findall(r"\w+|[^\w\s]", line.lower())) for line in text.splitlines() if line)
    lines = text.splitlines()
    cut = int(len(lines) * 0.9)
    if cut == 0:
        raise data.DataError(
            f"{source} is one line: words are split by lines into nine tenths to train on and one to validate on; or "
            "--data is a folder with a file *train* and a file *valid*"
        )
    return "\n".join(lines[:cut]), "\n".join(lines[cut:])


def write(run: Options, config: dict[str, Any], load: Any, *, prompt: str, **how: Any) -> str:
    """The prompt and what follows it; see `jaxlstm.training.tasks.language.write`."""
    return f"{prompt} {language.write(run, data.Words(tuple(config['vocabulary'])), load, prompt=prompt, **how)}"
