"""The tasks of memory are what their papers say."""

import numpy as np
import pytest

from jaxlstm.training.data import synthetic


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_adding(steps):
    inputs, targets = synthetic.adding(np.random.default_rng(0), steps, 500)
    numbers, marks = inputs[..., 0], inputs[..., 1]
    assert inputs.shape == (steps, 500, 2)
    assert inputs.dtype == targets.dtype == np.float32
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    # one mark in each half
    np.testing.assert_array_equal(marks[: steps // 2].sum(0), 1)
    np.testing.assert_array_equal(marks[steps // 2 :].sum(0), 1)
    assert set(np.unique(marks)) <= {0, 1}
    first, second = (np.argmax(half, 0) for half in (marks[: steps // 2], marks[steps // 2 :]))
    rows = np.arange(500)
    np.testing.assert_allclose(targets, numbers[first, rows] + numbers[steps // 2 + second, rows], rtol=1e-6)
    assert set(first) == set(range(steps // 2))  # every place is drawn


def test_the_constant_answer_to_adding():
    targets = synthetic.adding(np.random.default_rng(0), 10, 100_000).targets
    np.testing.assert_allclose(((targets - 1) ** 2).mean(), synthetic.ADDING_BASELINE, rtol=0.01)


def test_copying():
    inputs, targets = synthetic.copying(np.random.default_rng(0), 7, 500, length=3)
    assert inputs.shape == targets.shape == (13, 500)
    symbols = inputs[:3]
    assert set(np.unique(symbols)) == set(range(1, 9))
    np.testing.assert_array_equal(targets[-3:], symbols)
    np.testing.assert_array_equal(targets[:-3], 0)
    np.testing.assert_array_equal(inputs[3:9], 0)
    np.testing.assert_array_equal(inputs[9], 9)  # the last of seven steps between symbols and answer
    np.testing.assert_array_equal(inputs[10:], 0)


@pytest.mark.parametrize("task", [synthetic.adding, synthetic.copying])
def test_draws_repeat_and_differ(task):
    one, same, other = (task(np.random.default_rng(seed), 20, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.inputs, same.inputs)
    assert (one.inputs != other.inputs).any()
