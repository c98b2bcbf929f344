"""The next character of a text, from all characters before it."""

import math
from pathlib import Path
from typing import Any

from jaxlstm.training.config import Options
from jaxlstm.training.data import text as data
from jaxlstm.training.tasks import language
from jaxlstm.training.tasks.task import OF_SERIES, Task

DEFAULTS: dict[str, Any] = {}  # those of `Options`
UNUSED = OF_SERIES


def make(options: Options) -> Task:
    """The task on the text that the options name."""
    ids, vocabulary = data.characters(options.data)
    train_ids, valid_ids = data.split(ids)
    if len(valid_ids) < 2:
        raise data.DataError(f"{len(ids)} characters are too few: the last tenth is for validation")
    return language.task(
        options,
        vocabulary,
        train_ids,
        valid_ids,
        about=f"{len(train_ids):,} characters to train on, {len(valid_ids):,} to validate, {len(vocabulary)} different",
        title=f"{Path(options.data).stem}: LSTM",
        unit="nats per character",
        counted="characters",
        say=lambda loss: f"{loss:.4f} nats  {loss / math.log(2):.4f} bits/char",
        kept=(("vocabulary", vocabulary.characters),),
    )


def write(run: Options, config: dict[str, Any], load: Any, *, prompt: str, **how: Any) -> str:
    """The prompt and what follows it; see `jaxlstm.training.tasks.language.write`."""
    return prompt + language.write(run, data.Vocabulary(config["vocabulary"]), load, prompt=prompt, **how)
