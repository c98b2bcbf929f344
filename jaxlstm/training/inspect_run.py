"""A trained character model, and which of its units follow what in a text."""

import itertools
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm.diagnostics.gate_statistics import following
from jaxlstm.training import config as options
from jaxlstm.training import train_step
from jaxlstm.training.data import text as data
from jaxlstm.training.models.language_model import LanguageModel, LanguageModelParams
from jaxlstm.training.tasks import language


def load(run_dir: Path, text: str) -> tuple[LanguageModel, LanguageModelParams, np.ndarray]:
    """The model of a run of ``train.py``, its best parameters, and a text in its alphabet.

    Raises:
      ValueError: if the folder is not of a run of a character model, or the text is empty or has other characters.
    """
    run, config = options.of_run(run_dir, "RUN_DIR")
    if run.task != "charlm":
        raise ValueError(f"the characters of a text are read by a run of --task charlm; {run_dir} is of {run.task}")
    if not text:
        raise ValueError("--text must have at least one character")
    vocabulary = data.Vocabulary(config["vocabulary"])
    model = language.build(run, len(vocabulary))
    return model, train_step.load_params(run_dir / train_step.BEST, model.init), vocabulary.encode(text)


def signals(text: str) -> dict[str, np.ndarray]:
    """What a unit may keep track of, a number per character: ``(T,)`` each."""
    characters = np.array(list(text))
    newline = characters == "\n"
    line = np.cumsum(newline) - newline  # the number of the line that a character is in
    starts = np.concatenate([[0], np.flatnonzero(newline) + 1])
    position = np.arange(len(text)) - starts[line]
    quote = np.cumsum(characters == '"') % 2
    depth = np.cumsum(np.isin(characters, list("([{")).astype(int) - np.isin(characters, list(")]}")))
    word = [n for _, run in itertools.groupby(text, str.isalnum) for n, _ in enumerate(run)]
    return {
        "position in the line": position,
        "inside quotes": quote,
        "inside brackets": depth > 0,
        "position in the word": np.where(np.char.isalnum(characters), word, -1),
    }


def telling_units(c: Float[ArrayLike, "T H"], text: str) -> dict[int, str]:
    """For each signal that varies in the text, the unit that follows it most closely, with a title for its picture."""
    titles: dict[int, str] = {}
    for name, signal in signals(text).items():
        if signal.min() == signal.max():
            continue
        units, correlations = following(np.tanh(np.asarray(c)), signal)
        unit = int(units[0])
        says = f"{name} (correlation {correlations[0]:+.2f})"
        titles[unit] = f"{titles[unit]}, {says}" if unit in titles else f"unit {unit}: {says}"
    return titles or {0: "unit 0"}
