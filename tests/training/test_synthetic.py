"""The synthetic tasks follow the definitions of their papers."""

import numpy as np
import pytest

from jaxlstm.training.data import synthetic


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_adding_marks_one_number_in_each_half_and_sums_them(steps):
    inputs, targets = synthetic.adding(np.random.default_rng(0), steps, 500)
    numbers, markers = inputs[..., 0], inputs[..., 1]
    assert inputs.shape == (steps, 500, 2)
    assert inputs.dtype == targets.dtype == np.float32
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    np.testing.assert_array_equal(markers[: steps // 2].sum(0), 1)
    np.testing.assert_array_equal(markers[steps // 2 :].sum(0), 1)
    assert set(np.unique(markers)) <= {0, 1}
    first, second = (np.argmax(half, 0) for half in (markers[: steps // 2], markers[steps // 2 :]))
    sequences = np.arange(500)
    expected = numbers[first, sequences] + numbers[steps // 2 + second, sequences]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert set(first) == set(range(steps // 2))  # every position occurs


def test_adding_baseline_is_the_error_of_the_constant_answer():
    targets = synthetic.adding(np.random.default_rng(0), 10, 100_000).targets
    np.testing.assert_allclose(((targets - 1) ** 2).mean(), synthetic.ADDING_BASELINE, rtol=0.01)


def test_copying_repeats_the_symbols_after_the_delay():
    inputs, targets = synthetic.copying(np.random.default_rng(0), 7, 500, length=3)
    assert inputs.shape == targets.shape == (13, 500)
    symbols = inputs[:3]
    assert set(np.unique(symbols)) == set(range(1, 9))
    np.testing.assert_array_equal(targets[-3:], symbols)
    np.testing.assert_array_equal(targets[:-3], 0)
    np.testing.assert_array_equal(inputs[3:9], 0)
    np.testing.assert_array_equal(inputs[9], 9)  # the cue is the last of the seven steps of the delay
    np.testing.assert_array_equal(inputs[10:], 0)


@pytest.mark.parametrize("draw", [synthetic.adding, synthetic.copying])
def test_batches_repeat_with_the_same_seed_only(draw):
    batch, same, other = (draw(np.random.default_rng(seed), 20, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(batch.inputs, same.inputs)
    assert (batch.inputs != other.inputs).any()
