"""The gates at their limits, and the cells against values worked by hand."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm import cells
from jaxlstm.recurrence.gates import evaluate_cell

OPEN, CLOSED = 1e3, -1e3  # pre-activations with a sigmoid of exactly 1 and 0
c = jnp.array([0.3, -1.7, 1e-5, 12.0], jnp.float32)


def z(i=0.0, f=0.0, g=0.0, o=0.0):
    return jnp.stack([jnp.full(4, value, jnp.float32) for value in (i, f, g, o)])


def lstm(z, c):
    return evaluate_cell(cells.LSTM, z, c)


def test_lstm_equals_values_by_hand():
    """At z = 0 every gate is 1/2 and the candidate 0; then a step with four different pre-activations."""
    after, h = lstm(z(), c)
    np.testing.assert_allclose(after, c / 2, rtol=1e-7)
    np.testing.assert_allclose(h, np.tanh(np.asarray(c) / 2) / 2, **tolerance(np.float32, 1))
    i, f, g, o = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.0)), math.tanh(2.0), 1 / (1 + math.exp(-3.0))
    after, h = lstm(z(0.5, -1.0, 2.0, 3.0), c)
    np.testing.assert_allclose(after, f * np.asarray(c, np.float64) + i * g, **tolerance(np.float32, 4))
    np.testing.assert_allclose(h, o * np.tanh(f * np.asarray(c, np.float64) + i * g), **tolerance(np.float32, 4))


def test_closed_forget_gate_erases_cell_state():
    after, _ = lstm(z(i=0.7, f=CLOSED, g=1.2), c)
    after_zeros, _ = lstm(z(i=0.7, f=CLOSED, g=1.2), jnp.zeros(4, jnp.float32))
    np.testing.assert_array_equal(after, after_zeros)


def test_open_forget_gate_preserves_cell_state_exactly():
    np.testing.assert_array_equal(lstm(z(i=CLOSED, f=OPEN, g=5.0, o=1.0), c)[0], c)


def test_closed_input_gate_blocks_candidate():
    np.testing.assert_array_equal(lstm(z(i=CLOSED, f=0.4, g=3.0), c)[0], lstm(z(i=CLOSED, f=0.4, g=-3.0), c)[0])


def test_closed_output_gate_returns_zeros():
    np.testing.assert_array_equal(lstm(z(i=1.0, f=1.0, g=1.0, o=CLOSED), c)[1], jnp.zeros(4, jnp.float32))


def test_open_output_gate_returns_tanh_of_cell_state():
    np.testing.assert_array_equal(lstm(z(i=CLOSED, f=OPEN, o=OPEN), c)[1], jnp.tanh(c))


@pytest.mark.parametrize("implementation", cases.BACKENDS)
def test_open_forget_gate_preserves_gradient_over_10_000_steps(implementation):
    lstm = jaxlstm.LSTM(2, 3, implementation=implementation)
    weights = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), lstm.param_shapes().layers[0].forward)
    bias = jnp.repeat(jnp.array([CLOSED, OPEN, 0.0, 0.0], jnp.float32), 3)
    params = jaxlstm.Params((jaxlstm.Layer(weights._replace(b=bias)),))
    state = jaxlstm.State(jnp.zeros((1, 3), jnp.float32), jnp.array([[0.1, -2.0, 30.0]], jnp.float32))
    cotangent = jnp.array([1.0, -0.37, 1e-6], jnp.float32)
    xs = jnp.ones((10_000, 2), jnp.float32)

    def loss(c):
        return (lstm(params, xs, state._replace(c=c))[1].c[0] * cotangent).sum()

    np.testing.assert_array_equal(jax.grad(loss)(state.c)[0], cotangent)
    np.testing.assert_array_equal(lstm(params, xs, state)[1].c, state.c)


@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 0.7, 4.0])
def test_rnn_equals_its_activation(value):
    z = jnp.full((1, 2), value, jnp.float64)
    expected = {"tanh": math.tanh(value), "relu": max(value, 0.0), "sigmoid": 1 / (1 + math.exp(-value))}
    for name, cell in cells.RNN.items():
        c, y = evaluate_cell(cell, z, None)
        assert c is None
        np.testing.assert_allclose(y, expected[name], rtol=1e-14)


def test_rnn_has_no_cell_state():
    lstm = jaxlstm.LSTM(2, 3, cell="rnn")
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), lstm.param_shapes())
    assert params.layers[0].forward.w_h.shape == (3, 3)
    assert lstm.initial_state((4,)).c is None
    _, state = lstm(params, jnp.ones((5, 4, 2), jnp.float32))
    assert state.c is None
    state, y = lstm.step(params, state, jnp.ones((4, 2), jnp.float32))
    assert state.c is None
    assert y.shape == (4, 3)


def test_step_has_gate_order_i_f_g_o():
    """Values worked by hand: another order of the gates or a transposed matrix changes them."""
    lstm = jaxlstm.LSTM(1, 1, param_dtype=jnp.float64)
    w_x, w_h, b = np.array([[0.1], [0.2], [0.3], [0.4]]), np.array([[0.5], [0.6], [0.7], [0.8]]), np.arange(4.0) / 10
    params = jaxlstm.Params((jaxlstm.Layer(jaxlstm.Weights(w_x, w_h, b)),))
    x, h, c = 2.0, -0.5, 0.25
    z = [w_x[k, 0] * x + w_h[k, 0] * h + b[k] for k in range(4)]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    c_after = sigmoid(z[1]) * c + sigmoid(z[0]) * math.tanh(z[2])
    h_after = sigmoid(z[3]) * math.tanh(c_after)
    state = jaxlstm.State(np.array([[h]]), np.array([[c]]))
    state, y = lstm.step(params, state, np.array([x]))
    np.testing.assert_allclose([y[0], state.h[0, 0], state.c[0, 0]], [h_after, h_after, c_after], rtol=1e-14)
