"""Fixed points, Lyapunov exponents and effective memory of networks with known or independently computed ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import random_params

import jaxlstm
from jaxlstm import diagnostics

H = 3


def make_network(cell, **options):
    lstm = jaxlstm.LSTM(2, H, cell=cell, param_dtype=jnp.float64, **options)
    return lstm, random_params(lstm, np.random.default_rng(0))


def run(lstm, params, num_steps, batch=(), seed=1):
    """Returns random inputs and the state after them."""
    xs = jnp.asarray(np.random.default_rng(seed).standard_normal((num_steps, *batch, 2)))
    return xs, lstm(params, xs)[1]


def numbers(state):
    """The numbers in a state without a batch, in the order of its arrays."""
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(state)])


@pytest.mark.slow
def test_fixed_points_of_a_bistable_unit():
    """The unit h = tanh(2 h) rests at 0, where it is unstable, and at two points on either side."""
    rnn = jaxlstm.RNN(1, 1, cell="rnn", param_dtype=jnp.float64)
    params = jax.tree.map(jnp.zeros_like, rnn.init(jax.random.key(0)))
    layer = params.layers[0]
    params = params._replace(layers=(layer._replace(forward=layer.forward._replace(w_h=jnp.full((1, 1), 2.0))),))
    starts = jaxlstm.State(jnp.array([[[-0.9], [0.05], [0.8]]]), None)
    points = diagnostics.fixed_points(rnn, params, jnp.zeros(1), starts)
    root = scipy.optimize.brentq(lambda h: np.tanh(2 * h) - h, 0.5, 1)
    np.testing.assert_allclose(points.states.h[0, :, 0], [-root, 0, root], atol=1e-9)
    slope = 2 * (1 - root**2)
    np.testing.assert_allclose(points.eigenvalues[:, 0], [slope, 2, slope], rtol=1e-6)
    np.testing.assert_allclose(points.time_constants[1], 1 / np.log(2), rtol=1e-6)
    assert (points.speed < 1e-20).all()


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm"])
def test_fixed_points_are_at_rest_with_the_eigenvalues_of_finite_differences(cell):
    lstm, params = make_network(cell, num_layers=2 if cell == "gru" else 1)
    x = jnp.array([0.5, -1.0])
    starts = run(lstm, params, 5, (4,))[1]
    points = diagnostics.fixed_points(lstm, params, x, starts)
    n = int(np.argmin(points.speed))
    assert points.speed[n] < 1e-18
    state = jax.tree.map(lambda a: a[:, n], points.states)
    unravel = jax.flatten_util.ravel_pytree(state)[1]

    def step(s):
        return numbers(lstm(params, x[None], unravel(s))[1])  # a call, where the search uses the step

    s = jax.flatten_util.ravel_pytree(state)[0]
    np.testing.assert_allclose(step(s), s, atol=1e-8)
    eps = 1e-6
    matrix = np.stack([(step(s + eps * e) - step(s - eps * e)) / (2 * eps) for e in jnp.eye(len(s))], 1)
    np.testing.assert_allclose(points.jacobian[n], matrix, atol=1e-6)
    magnitudes = np.sort(np.abs(np.linalg.eigvals(matrix)))[::-1]
    np.testing.assert_allclose(np.abs(points.eigenvalues[n]), magnitudes, atol=1e-4)


@pytest.mark.slow
def test_lyapunov_exponents_of_a_diagonal_network_are_mean_logarithms_of_its_factors():
    """The state of a minGRU is multiplied by 1 - u of its unit, where u depends on the input alone."""
    lstm, params = make_network("mingru")
    xs, _ = run(lstm, params, 3000)
    w = params.layers[0].forward
    u = 1 / (1 + np.exp(-(np.asarray(xs) @ np.asarray(w.w_x).T + np.asarray(w.b))[:, :H]))
    expected = np.sort(np.log(1 - u[200:]).mean(0))[::-1]
    exponents = diagnostics.lyapunov_exponents(lstm, params, xs, warmup=200)
    np.testing.assert_allclose(exponents, expected, atol=2e-3)
    largest = diagnostics.lyapunov_exponents(lstm, params, xs, warmup=200, num_exponents=1)
    np.testing.assert_allclose(largest, exponents[:1], atol=1e-8)


@pytest.mark.slow
def test_lyapunov_exponents_at_a_fixed_point_are_logarithms_of_the_eigenvalues():
    lstm, params = make_network("lstm")
    x = jnp.array([0.5, -1.0])
    points = diagnostics.fixed_points(lstm, params, x, run(lstm, params, 5, (4,))[1])
    n = int(np.argmin(points.speed))
    assert np.abs(points.eigenvalues[n]).max() < 1  # the state stays there
    state = jax.tree.map(lambda a: a[:, n], points.states)
    exponents = diagnostics.lyapunov_exponents(lstm, params, jnp.tile(x, (1000, 1)), state, warmup=500)
    magnitudes = np.abs(points.eigenvalues[n])
    np.testing.assert_allclose(exponents[:2].mean(), np.log(magnitudes[:2]).mean(), atol=1e-3)
    np.testing.assert_allclose(exponents.sum(), np.log(np.abs(np.linalg.det(points.jacobian[n]))), rtol=1e-5)


@pytest.mark.slow
def test_effective_memory_equals_runs_of_the_last_steps():
    lstm, params = make_network("lstm")
    xs, state = run(lstm, params, 9, (2,))
    memory = diagnostics.effective_memory(lstm, params, xs, state, spans=[1, 4, 8])
    whole = lstm(params, xs, state)[0][-1]
    shorter = [lstm(params, xs[-span:])[0][-1] for span in (1, 4, 8)]
    expected = [np.linalg.norm(ys - whole) / np.linalg.norm(whole) for ys in shorter]
    np.testing.assert_allclose(memory.change, expected, rtol=1e-10)


def test_effective_memory_of_a_known_decay():
    """A linear unit that halves at each step sums a geometric series over the steps that it has seen."""
    rnn = jaxlstm.RNN(1, 1, cell="indrnn", param_dtype=jnp.float64)
    params = jax.tree.map(jnp.ones_like, rnn.init(jax.random.key(0)))
    forward = params.layers[0].forward._replace(w_h=jnp.full((1, 1), 0.5), b=jnp.zeros(1))
    params = params._replace(layers=(jaxlstm.Layer(forward),))
    memory = diagnostics.effective_memory(rnn, params, jnp.ones((21, 1)), threshold=0.1)
    assert memory.spans.tolist() == [1, 2, 4, 8, 16]
    np.testing.assert_allclose(memory.change, (0.5**memory.spans - 0.5**21) / (1 - 0.5**21), rtol=1e-9)
    assert memory.steps == 4
    assert memory._replace(threshold=1e-9).steps is None


def test_draw_fixed_points_and_effective_memory_draw_their_numbers():
    eigenvalues = np.array([[0.5 + 0.5j, 0.1], [2.0, -0.3j]])
    points = diagnostics.FixedPoints(jaxlstm.State(jnp.zeros((1, 2, 2)), None), jnp.zeros(2), jnp.eye(2), eigenvalues)
    figure = diagnostics.plots.draw_fixed_points(points)
    for axes, values in zip(figure.axes, eigenvalues):
        np.testing.assert_allclose(axes.collections[0].get_offsets() @ [1, 1j], values)
    assert "largest 2.00" in figure.axes[1].get_title()
    memory = diagnostics.EffectiveMemory(np.array([1, 2, 4]), np.array([0.5, 0.1, 0.0]), 0.2)
    (axes,) = diagnostics.plots.draw_effective_memory({"a": memory}).axes
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.5, 0.1, np.nan])
    assert axes.lines[1].get_ydata()[0] == 0.2


@pytest.mark.slow
def test_dynamics_reject_wrong_arguments():
    lstm, params = make_network("lstm")
    both = jaxlstm.LSTM(2, H, bidirectional=True, param_dtype=jnp.float64)
    slstm, slstm_params = make_network("slstm")
    both_params = both.init(jax.random.key(0))
    xs, x = jnp.zeros((5, 2)), jnp.zeros(2)
    for call, message in (
        (lambda: diagnostics.fixed_points(lstm, params, x, lstm.initial_state()), r"one batch axis, h \(L, N, P\)"),
        (lambda: diagnostics.fixed_points(both, both_params, x, both.initial_state(1)), "bidirectional"),
        (lambda: diagnostics.fixed_points(slstm, slstm_params, x, slstm.initial_state(1)), "starts must be finite"),
        (lambda: diagnostics.lyapunov_exponents(lstm, params, xs[:, None]), "expected one sequence"),
        (lambda: diagnostics.lyapunov_exponents(both, both_params, xs), "a unidirectional network"),
        (lambda: diagnostics.lyapunov_exponents(slstm, slstm_params, xs), "the initial state must be finite"),
        (lambda: diagnostics.lyapunov_exponents(lstm, params, xs, num_exponents=7), "must be at most 6"),
        (lambda: diagnostics.lyapunov_exponents(lstm, params, xs, warmup=5), "warmup less than 5 steps"),
        (lambda: diagnostics.effective_memory(both, both_params, xs), "a unidirectional network"),
        (lambda: diagnostics.effective_memory(lstm, params, xs, spans=[5]), "integers from 1 to 4"),
        (lambda: diagnostics.effective_memory(lstm, params, xs, spans=[2, 1]), "ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
