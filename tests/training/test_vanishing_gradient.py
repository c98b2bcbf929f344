"""The comparison of a vanilla RNN with LSTMs on the adding task."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from training_runs import ENVIRONMENT

from jaxlstm.training import vanishing_gradient
from jaxlstm.training.vanishing_plots import draw_vanishing


@pytest.fixture(autouse=True)
def default_promotion():
    """Optax relies on JAX's default promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def train_all(hidden_size, **options):
    return {
        name: vanishing_gradient.train_network(lstm, learning_rate=rate, seed=0, **options)
        for name, (lstm, rate) in vanishing_gradient.compared_networks(hidden_size).items()
    }


@pytest.mark.parametrize(
    ("updates", "ends"),
    [(1, [1]), (20, list(range(1, 21))), (45, [*range(2, 45, 2), 45]), (1_620, [*range(50, 1_601, 50), 1_620])],
)
def test_learning_curve_ends_at_the_last_update(updates, ends):
    assert vanishing_gradient.chunk_ends(updates) == ends


@pytest.mark.slow
def test_figure_and_summary_show_the_results_of_training():
    results = train_all(4, steps=12, updates=60, batch_size=4)
    for result in results.values():
        assert result.updates.tolist() == list(range(3, 61, 3))
        assert result.gradient_norms_before.shape == result.gradient_norms_after.shape == (12,)
        assert (result.gradient_norms_before > 0).all()
        assert result.elementwise_norms_after[-1] == pytest.approx(result.gradient_norms_after[-1])
        assert not np.allclose(result.gradient_norms_before, result.gradient_norms_after)
    assert (results["vanilla RNN"].elementwise_norms_before[:-1] == 0).all()
    assert (results["LSTM, forget bias 1"].elementwise_norms_before > 0).all()
    bias_0, bias_1 = (results[f"LSTM, forget bias {b}"].gradient_norms_before for b in (0, 1))
    assert bias_0[0] / bias_0[-1] < 0.1 * bias_1[0] / bias_1[-1]
    figure = draw_vanishing(results)
    for axes, field in zip(figure.axes, ("gradient_norms_before", "gradient_norms_after")):
        for line, result in zip(axes.lines, results.values()):
            norms = getattr(result, field)
            np.testing.assert_allclose(line.get_ydata(), norms / norms[-1], rtol=1e-5)
    for line, result in zip(figure.axes[2].lines, results.values()):
        np.testing.assert_array_equal(line.get_xdata(), result.updates)
        np.testing.assert_array_equal(line.get_ydata(), result.errors)
    summary = vanishing_gradient.format_summary(results, 12)
    assert "After 60 updates on the adding task over 12 steps" in summary
    assert f"vanilla RNN: mean squared error {results['vanilla RNN'].errors[-1]:.4f}" in summary


@pytest.mark.slow
def test_lstms_learn_the_task_and_the_vanilla_rnn_does_not(tmp_path):
    """With the defaults of the command, in a process that compiles with optimization."""
    command = [sys.executable, "-m", "jaxlstm.diagnostics", "vanishing", "--out", str(tmp_path / "figure.png")]
    printed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=True).stdout
    error = re.compile(r"(vanilla RNN|LSTM, forget bias [01]): mean squared error ([\d.]+\d)")
    errors = {name: float(value) for name, value in error.findall(printed)}
    assert errors["LSTM, forget bias 1"] < 0.01
    assert errors["LSTM, forget bias 0"] < 0.01
    assert errors["vanilla RNN"] > 0.1
