"""Loads a trained character model, and finds the units that track properties of a text."""

import itertools
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm.diagnostics.gate_statistics import correlated_units
from jaxlstm.training import params_file
from jaxlstm.training.config import load_config
from jaxlstm.training.data.text import CharVocabulary
from jaxlstm.training.models.language_model import LanguageModel, LanguageModelParams
from jaxlstm.training.tasks.language import build_language_model


def load_character_model(run_dir: Path, text: str) -> tuple[LanguageModel, LanguageModelParams, np.ndarray]:
    """Returns the model of a run of ``--task charlm``, its best parameters, and the ids of ``text``, ``(T,)``.

    Raises:
      ValueError: if ``run_dir`` is not the folder of such a run, or the text is empty or has characters outside the
        vocabulary.
    """
    options, config = load_config(run_dir, "RUN_DIR")
    if options.task != "charlm":
        raise ValueError(f"{run_dir} is a run of --task {options.task}; expected a run of --task charlm")
    if not text:
        raise ValueError("--text must have at least one character")
    vocabulary = CharVocabulary(config["vocabulary"])
    model = build_language_model(options, len(vocabulary))
    return model, params_file.load_params(run_dir / params_file.BEST, model.init), vocabulary.encode(text)


def text_properties(text: str) -> dict[str, np.ndarray]:
    """Returns properties of a text that a unit may track, one number per character: ``(T,)`` each."""
    characters = np.array(list(text))
    is_newline = characters == "\n"
    line_number = np.cumsum(is_newline) - is_newline
    line_starts = np.concatenate([[0], np.flatnonzero(is_newline) + 1])
    line_position = np.arange(len(text)) - line_starts[line_number]
    inside_quotes = np.cumsum(characters == '"') % 2
    opens, closes = (np.isin(characters, list(brackets)).astype(int) for brackets in ("([{", ")]}"))
    depth = np.cumsum(opens - closes)
    word_position = [n for _, group in itertools.groupby(text, str.isalnum) for n, _ in enumerate(group)]
    return {
        "position in the line": line_position,
        "inside quotes": inside_quotes,
        "inside brackets": depth > 0,
        "position in the word": np.where(np.char.isalnum(characters), word_position, -1),
    }


def most_predictive_units(c: Float[ArrayLike, "T H"], text: str) -> dict[int, str]:
    """Returns, for each property that varies in the text, the unit that correlates most with it, and a plot title.

    Args:
      c: cell states of one layer and direction.
      text: T characters, the inputs.

    Returns:
      Titles by unit. A unit that is chosen for several properties has one title; without any property, unit 0.
    """
    titles: dict[int, str] = {}
    for name, values in text_properties(text).items():
        if values.min() == values.max():
            continue
        units, correlations = correlated_units(np.tanh(np.asarray(c)), values)
        unit = int(units[0])
        label = f"{name} (correlation {correlations[0]:+.2f})"
        titles[unit] = f"{titles[unit]}, {label}" if unit in titles else f"unit {unit}: {label}"
    return titles or {0: "unit 0"}
