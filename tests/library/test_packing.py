"""Packing: several examples in one row, separated by resets."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import tolerance

import jaxlstm
from jaxlstm import packing


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_pack_keeps_every_example_and_marks_its_first_step(lengths):
    examples = [np.full((n, 2), k + 1) for k, n in enumerate(lengths)]
    packed = packing.pack(examples, 9)
    for example, (start, row) in zip(examples, packed.places):
        np.testing.assert_array_equal(packed.values[start : start + len(example), row], example)
        assert packed.resets[start, row]
    assert packed.resets.sum() == len(examples)
    assert packed.mask.sum() == sum(lengths)
    np.testing.assert_array_equal(packed.mask, packed.values[..., 0] > 0)
    # No two rows fit into one.
    used = sorted(packed.mask.sum(0))
    assert len(used) == 1 or used[0] + used[1] > 9


def test_pack_accepts_lists():
    np.testing.assert_array_equal(packing.pack([[1, 2], [3]], 3).values, [[1], [2], [3]])


@pytest.mark.parametrize("examples", [[], [np.zeros((0, 3))], [np.zeros((8, 3))]])
def test_pack_rejects_examples_that_do_not_fit(examples):
    with pytest.raises(ValueError, match="must have 1 to 7 steps, got"):
        packing.pack(examples, 7)


@pytest.mark.parametrize("examples", [[np.zeros((2, 3)), np.zeros((2, 4))], [np.zeros(2), np.zeros(2, int)]])
def test_pack_rejects_examples_of_different_shape_or_dtype(examples):
    with pytest.raises(ValueError, match=r"examples must differ in nothing but their length, got .* and "):
        packing.pack(examples, 7)


@pytest.mark.slow  # test_properties has a row packed by hand
def test_lstm_on_packed_rows_equals_lstm_on_each_example():
    rng = np.random.default_rng(0)
    examples = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 2, 7, 1, 4)]
    packed = packing.pack(examples, 7)
    lstm = jaxlstm.LSTM(3, 4, bidirectional=True)
    params = lstm.init(jax.random.key(0))
    ys, _ = lstm(params, packed.values, resets=packed.resets, mask=packed.mask)
    assert ys.shape[1] == 3
    for example, (start, row) in zip(examples, packed.places):
        expected, _ = lstm(params, example)
        actual = ys[start : start + len(example), row]
        np.testing.assert_allclose(actual, expected, **tolerance(np.float32, len(example) * 4))
