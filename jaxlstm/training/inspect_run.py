"""Loads a trained character model, and finds the units that track properties of a text."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxlstm.diagnostics.gate_statistics import ChosenUnit, held_out_unit
from jaxlstm.training import params_file
from jaxlstm.training.config import load_config
from jaxlstm.training.data.text import CharVocabulary
from jaxlstm.training.metrics import parse_row, read_lines
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


def recorded_gradient_norms(run_dir: Path) -> np.ndarray:
    """Returns the global gradient norms before clipping that a run recorded in ``metrics.jsonl``, ``(N,)``.

    The norm of a row is NaN if the gradient was not finite.
    """
    rows = map(parse_row, read_lines(run_dir / "metrics.jsonl"))
    norms = []
    for row in rows:
        if row is not None and row["split"] == "diagnosis":
            parts = [value for name, value in row.items() if name.startswith("gradient.")]
            norms.append(np.linalg.norm([np.nan if value is None else value for value in parts]))
    return np.array(norms)


def text_properties(text: str) -> dict[str, np.ndarray]:
    """Returns properties of a text that a unit may track, one number per character: ``(T,)`` each.

    Quotes and brackets are counted from the start of a paragraph, so that one without its partner ends with it.
    """
    characters = np.array(list(text))
    is_newline = characters == "\n"
    line_number = np.cumsum(is_newline) - is_newline
    line_starts = np.concatenate([[0], np.flatnonzero(is_newline) + 1])
    line_position = np.arange(len(text)) - line_starts[line_number]
    paragraphs = [0, *(match.end() for match in re.finditer(r"\n\n+", text)), len(text)]
    depth, inside_quotes = np.zeros((2, len(text)), int)
    for start, stop in itertools.pairwise(paragraphs):
        part = characters[start:stop]
        inside_quotes[start:stop] = np.cumsum(part == '"') % 2
        height = np.cumsum(np.isin(part, list("([{")).astype(int) - np.isin(part, list(")]}")))
        depth[start:stop] = height - np.minimum.accumulate(np.minimum(height, 0))  # not below 0
    word_position = [n for _, group in itertools.groupby(text, str.isalnum) for n, _ in enumerate(group)]
    return {
        "position in the line": line_position,
        "inside quotes": inside_quotes,
        "inside brackets": (depth > 0).astype(int),
        "position in the word": np.where(np.char.isalnum(characters), word_position, -1),
    }


def property_units(c: Float[ArrayLike, "T H"], text: str) -> dict[str, ChosenUnit]:
    """Returns the unit that correlates most with each property of a text, chosen on its first half.

    A property that does not vary in both halves is left out.

    Args:
      c: cell states of one layer and direction.
      text: T characters, the inputs.
    """
    states, half = np.tanh(np.asarray(c)), len(text) // 2
    return {
        name: held_out_unit(states[:half], values[:half], states[half:], values[half:])
        for name, values in text_properties(text).items()
        if len(set(values[:half].tolist())) > 1 and len(set(values[half:].tolist())) > 1
    }


def unit_titles(units: Mapping[str, ChosenUnit]) -> dict[int, str]:
    """Returns the titles of a plot of units by their number, or a title of unit 0 if there are none.

    They have the correlation on the data of the choice and on held-out data.
    """
    titles: dict[int, str] = {}
    for name, (unit, chosen, held_out) in units.items():
        label = f"{name} (correlation {chosen:+.2f}, held out {held_out:+.2f})"
        titles[unit] = f"{titles[unit]}, {label}" if unit in titles else f"unit {unit}: {label}"
    return titles or {0: "unit 0"}
