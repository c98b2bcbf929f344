"""A linear probe and its control task."""

import numpy as np
import pytest

from jaxlstm import diagnostics
from jaxlstm.diagnostics import ProbeData

RIDGE = 300.0  # changes the answers


def draw_data(rng, size, num_types=40, features=30):
    """States that hold the class of their step, and random numbers besides."""
    labels = rng.integers(0, 3, size)
    states = rng.standard_normal((size, features)) + 1.5 * np.eye(3, features)[labels]
    return ProbeData(states, labels, rng.integers(0, num_types, size))


def accuracy_by_least_squares(train, test, train_labels, test_labels):
    """The reference solves the augmented system of ridge regression, one class at a time."""
    mean, scale = train.features.mean(0), train.features.std(0)
    x, x_test = (train.features - mean) / scale, (test.features - mean) / scale
    padded = np.concatenate([x, RIDGE**0.5 * np.eye(x.shape[1])])
    scores = []
    for label in range(3):
        y = (train_labels == label).astype(float)
        y_padded = np.concatenate([y - y.mean(), np.zeros(x.shape[1])])
        scores.append(x_test @ np.linalg.lstsq(padded, y_padded, rcond=None)[0] + y.mean())
    return (np.argmax(scores, 0) == test_labels).mean()


def test_probe_equals_ridge_regression_on_both_tasks():
    rng = np.random.default_rng(0)
    train, test = draw_data(rng, 300), draw_data(rng, 200)
    result = diagnostics.probe(train, test, ridge=RIDGE, seed=3)
    assert result.task == accuracy_by_least_squares(train, test, train.labels, test.labels)
    names = np.unique(np.concatenate([train.types, test.types]))
    random_labels = dict(zip(names, np.random.default_rng(3).choice(train.labels, len(names))))
    control = [np.array([random_labels[name] for name in data.types]) for data in (train, test)]
    assert result.control == accuracy_by_least_squares(train, test, *control)
    assert result.selectivity == result.task - result.control > 0.2
    assert diagnostics.probe(train, test, seed=3) != result  # the default is another ridge
    assert result.majority == (test.labels == np.bincount(train.labels).argmax()).mean()


def test_probe_of_states_that_hold_only_the_type_is_not_selective():
    rng = np.random.default_rng(0)
    types = np.array(list("abcdefgh"))[rng.integers(0, 8, 400)]
    states = (types[:, None] == np.unique(types)).astype(float)
    data = ProbeData(states, (types > "d").astype(int), types)
    result = diagnostics.probe(data, data)
    assert result.task == result.control == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": np.ones(5)}, ValueError, r"train.features must have shape \(N, F\)"),
        ({"labels": np.zeros(4, int)}, ValueError, r"train.labels must have shape \[5\], one per state, got \[4\]"),
        ({"labels": np.zeros(5)}, TypeError, "train.labels must be integers, got float64"),
        ({"labels": np.ones(5, int)}, ValueError, r"two classes or more, got \[1\]"),
        ({"features": np.ones((5, 2))}, ValueError, "test has 3 features, expected 2 as train"),
    ],
)
def test_probe_rejects_wrong_data(change, error, message):
    data = ProbeData(np.ones((5, 3)), np.array([0, 1, 0, 1, 0]), np.zeros(5, int))
    with pytest.raises(error, match=message):
        diagnostics.probe(data._replace(**change), data)


def test_probe_rejects_a_ridge_of_zero():
    data = ProbeData(np.ones((5, 3)), np.array([0, 1, 0, 1, 0]), np.zeros(5, int))
    with pytest.raises(ValueError, match="ridge"):
        diagnostics.probe(data, data, ridge=0.0)
