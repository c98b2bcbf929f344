"""Formal languages: classes agree with a second definition and depend on the symbols before the end only."""

import itertools
import json

import jax
import numpy as np
import pytest
from training_runs import read_metrics, read_summary, train

import jaxlstm
from jaxlstm.training.cli import parse
from jaxlstm.training.data.formal_languages import LANGUAGES
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks import formal

# By language: a character per symbol, and the class of a string of them.
ORACLES = {
    "parity": ("01", lambda string: string.count("1") % 2),
    "even_pairs": ("01", lambda string: sum(a + b in ("01", "10") for a, b in itertools.pairwise(string)) % 2),
    "cycle_navigation": ("-0+", lambda string: (string.count("+") - string.count("-")) % 5),
    "modular_arithmetic": ("01234+-*", lambda string: eval(string) % 5),
}


def decode(name, strings):
    """Returns the strings of a batch, cut at their lengths."""
    characters = np.array(list(ORACLES[name][0]))[strings.inputs.argmax(-1)]
    return ["".join(column[:length]) for column, length in zip(characters.T, strings.lengths)]


def draw(name, size, *, longest=15, num_steps=20, seed=0):
    language, rng = LANGUAGES[name], np.random.default_rng(seed)
    return language.draw(rng, rng.choice(language.lengths(1, longest), size), num_steps)


@pytest.mark.parametrize("name", LANGUAGES)
def test_classes_agree_with_the_oracle(name):
    strings = draw(name, 2000)
    num_symbols, num_classes = LANGUAGES[name].num_symbols, LANGUAGES[name].num_classes
    assert strings.inputs.shape == (20, 2000, num_symbols)
    assert strings.inputs.dtype == np.float32
    assert strings.lengths.dtype == strings.classes.dtype == np.int32
    assert (strings.inputs.sum(-1) == 1).all()
    assert set(np.unique(strings.inputs)) == {0, 1}
    expected = [ORACLES[name][1](string) for string in decode(name, strings)]
    np.testing.assert_array_equal(strings.classes, expected)
    assert set(expected) == set(range(num_classes))


@pytest.mark.parametrize("name", ["parity", "even_pairs", "cycle_navigation"])
def test_classes_of_all_short_strings_agree_with_the_oracle(name):
    language, (characters, oracle) = LANGUAGES[name], ORACLES[name]
    symbols = np.array([*itertools.product(range(language.num_symbols), repeat=7)]).T
    classes = language.prefix_classes(symbols)
    for column, column_classes in zip(symbols.T, classes.T):
        string = "".join(characters[symbol] for symbol in column)
        assert [*column_classes] == [oracle(string[:length]) for length in range(1, 8)]


@pytest.mark.parametrize(
    ("name", "string", "expected"),
    [  # examples in the published code of the paper
        ("parity", "1010100", 1),
        ("parity", "01111", 0),
        ("even_pairs", "001110", 0),
        ("even_pairs", "0101001", 1),
        ("cycle_navigation", "+-0--", 3),
        ("cycle_navigation", "+++-", 2),
        ("modular_arithmetic", "1+2*3", 2),
        ("modular_arithmetic", "1-1-1", 4),
        ("modular_arithmetic", "0*1+4*3-2", 0),
    ],
)
def test_classes_agree_with_the_examples_of_the_paper(name, string, expected):
    symbols = np.array([[ORACLES[name][0].index(character)] for character in string])
    assert LANGUAGES[name].prefix_classes(symbols)[-1, 0] == expected


@pytest.mark.parametrize("name", LANGUAGES)
def test_lengths_are_drawn_per_string_from_the_whole_range(name):
    batch = next(formal.make(parse(["--task", "formal", "--language", name, "--batch", "2000"])).batches(0))
    expected = range(1, 40, 2) if name == "modular_arithmetic" else range(1, 41)
    assert set(batch.lengths) == set(expected)
    assert batch.inputs.shape[:2] == (40, 2000)


@pytest.mark.parametrize("name", LANGUAGES)
def test_class_is_independent_of_length_and_last_symbol(name):
    language = LANGUAGES[name]
    for length in (19, 21):
        strings = language.draw(np.random.default_rng(0), np.full(20_000, length, np.int32), length)
        last = strings.inputs[-1].argmax(-1)
        for symbol in np.unique(last):
            frequencies = np.bincount(strings.classes[last == symbol], minlength=language.num_classes)
            np.testing.assert_allclose(frequencies / frequencies.sum(), 1 / language.num_classes, atol=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_logits_depend_on_the_symbols_of_the_string_only(bidirectional):
    strings = draw("parity", 20)
    model = SequenceRegressor(jaxlstm.LSTM(2, 5, bidirectional=bidirectional), 2)
    params, call = model.init(jax.random.key(0)), jax.jit(model)
    logits = call(params, strings.inputs, strings.lengths)
    is_past_the_end = np.arange(20)[:, None, None] >= strings.lengths[:, None]
    np.testing.assert_array_equal(
        call(params, np.where(is_past_the_end, np.float32(np.nan), strings.inputs), strings.lengths), logits
    )
    alone = model(params, strings.inputs[: strings.lengths[0], 0])
    np.testing.assert_allclose(logits[0], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_even_pairs_is_learned_and_generalizes_to_longer_strings(tmp_path):
    options = "--task formal --language even_pairs --window 10 --hidden 16 --batch 64 --max-steps 300"
    train([*options.split(), "--learning-rate", "0.03", "--diagnose", "0", "--run-dir", tmp_path / "run"])
    summary, table = read_summary(tmp_path / "run"), json.loads((tmp_path / "run" / formal.TABLE).read_text())
    assert [row["accuracy"] for row in read_metrics(tmp_path / "run") if row["split"] == "valid"][-1] > 0.98
    assert summary["test_accuracy"] > 0.9
    assert table["length"] == [*range(10, 257)]
    assert summary["test_accuracy"] == pytest.approx(np.mean(table["accuracy"][1:]))
