"""Loading a trained character model, and the units that track properties of a text."""

import jax
import numpy as np
import pytest
from training_runs import write_config

from jaxlstm.training.config import Options
from jaxlstm.training.inspect_run import load_character_model, property_units, text_properties, unit_titles
from jaxlstm.training.params_file import BEST, save_params
from jaxlstm.training.tasks.language import build_language_model

TEXT = 'ab (c\n"d" e'


def test_text_properties_of_every_character():
    properties = text_properties(TEXT)
    assert properties["position in the line"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert properties["inside quotes"].tolist() == [0] * 6 + [1, 1, 0, 0, 0]
    assert properties["inside brackets"].tolist() == [0] * 3 + [1] * 8
    assert properties["position in the word"].tolist() == [0, 1, -1, -1, 0, -1, -1, 0, -1, -1, 0]


def test_text_properties_end_with_the_paragraph():
    properties = text_properties('a ") ("\n\n)(a "b')
    assert properties["inside brackets"].tolist() == [0] * 5 + [1] * 4 + [0] + [1] * 5
    assert properties["inside quotes"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_property_units_finds_a_planted_unit_and_scores_it_on_the_other_half():
    text = 'a "b" c (d)' * 2
    c = np.random.default_rng(0).standard_normal((len(text), 3))
    c[:, 1] = np.arctanh(-0.5 * text_properties(text)["inside quotes"])
    c[len(text) // 2 :, 1] *= -1
    units = property_units(c, text)
    assert units["inside quotes"].unit == 1
    assert units["inside quotes"][1:] == pytest.approx((-1, 1))
    title = "inside quotes (correlation -1.00, held out +1.00)"
    assert unit_titles({"inside quotes": units["inside quotes"]}) == {1: f"unit 1: {title}"}


def test_unit_titles_without_properties_have_unit_0():
    assert unit_titles(property_units(np.ones((1, 3)), "a")) == {0: "unit 0"}


def write_run(run_dir, task="charlm"):
    characters = '\n "()abc'
    options = Options(task=task, hidden=8, embedding=4)
    write_config(run_dir, options, **({"vocabulary": characters} if task == "charlm" else {}))
    params = build_language_model(options, len(characters)).init(jax.random.key(0))
    save_params(run_dir / BEST, params)
    return params


def test_load_character_model_returns_params_and_ids(tmp_path):
    written = write_run(tmp_path)
    _, params, ids = load_character_model(tmp_path, 'a"\n')
    assert ids.tolist() == [5, 2, 0]
    jax.tree.map(np.testing.assert_array_equal, params, written)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("digits", "a", "is a run of --task digits; expected a run of --task charlm"),
        ("charlm", "", "--text must have at least one character"),
        ("charlm", "az", "not in the vocabulary of 8 characters: 'z'"),
    ],
)
def test_load_character_model_rejects_other_runs_and_texts(tmp_path, task, text, message):
    write_run(tmp_path, task)
    with pytest.raises(ValueError, match=message):
        load_character_model(tmp_path, text)
