"""Initial weights and biases: distributions, scales and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import narrow_operands, tolerance

import jaxlstm
from jaxlstm import initializers

key = jax.random.key(0)


def test_glorot_uniform_draws_each_gate_separately():
    w = np.asarray(initializers.glorot_uniform()(key, (4 * 300, 200), jnp.float64)).reshape(4, 300, 200)
    bound = (6 / (200 + 300)) ** 0.5
    assert np.abs(w).max() <= bound
    # A uniform variable has its bound over sqrt(3) as standard deviation; five standard errors of 60,000 draws.
    for gate in w:
        assert abs(gate.std() / (bound / 3**0.5) - 1) < 5 * (0.2 / gate.size) ** 0.5
    assert len({gate[0, 0] for gate in w}) == 4


@pytest.mark.parametrize(
    ("columns", "dtype"), [(6, jnp.float64), (4, jnp.float64), (9, jnp.float64), (9, jnp.float32), (4, jnp.bfloat16)]
)
def test_orthogonal_draws_each_gate_separately(columns, dtype):
    w = initializers.orthogonal()(key, (4 * 6, columns), dtype)
    assert w.dtype == dtype
    for gate in np.asarray(w, np.float64).reshape(4, 6, columns):
        square = gate @ gate.T if columns >= 6 else gate.T @ gate
        bounds = narrow_operands(dtype, 6) if dtype == jnp.bfloat16 else tolerance(dtype, 6)
        np.testing.assert_allclose(square, np.eye(len(square)), **bounds)


def test_forget_bias_sets_slab_of_forget_gate():
    np.testing.assert_array_equal(initializers.forget_bias()(key, (12,), jnp.float32), [0] * 3 + [1] * 3 + [0] * 6)
    np.testing.assert_array_equal(initializers.forget_bias(value=2.5)(key, (4,), jnp.float32), [0, 2.5, 0, 0])
    np.testing.assert_array_equal(initializers.forget_bias(1, None)(key, (3,), jnp.float32), [0, 0, 0])


def test_init_sets_forget_bias_to_1_in_every_layer():
    lstm = jaxlstm.LSTM(2, 3, num_layers=2, bidirectional=True)
    for layer in lstm.init(key).layers:
        for weights in layer.directions:
            np.testing.assert_array_equal(weights.b, [0] * 3 + [1] * 3 + [0] * 6)
    np.testing.assert_array_equal(jaxlstm.LSTM(2, 3, cell="rnn").init(key).layers[0].forward.b, [0, 0, 0])


@pytest.mark.parametrize("init", [initializers.glorot_uniform(), initializers.orthogonal()])
def test_per_gate_rejects_size_that_is_no_multiple_of_gates(init):
    with pytest.raises(ValueError, match="axis 0 must be a multiple of the 4 gates, got 10"):
        init(key, (10, 3), jnp.float32)


def test_forget_bias_rejects_size_that_is_no_multiple_of_gates():
    with pytest.raises(ValueError, match="the bias must be a multiple of the 4 gates, got 10"):
        initializers.forget_bias()(key, (10,), jnp.float32)


def test_init_sets_learned_state_and_peepholes_to_0():
    params = jaxlstm.LSTM(2, 3, cell="peephole", learned_state=True).init(key)
    for a in (params.state.h, params.state.c, params.layers[0].forward.w_c):
        assert a.size > 0
        assert not np.any(a)


def test_init_sets_gains_of_layer_norm_to_1():
    norm = jaxlstm.LSTM(2, 3, layer_norm=True).init(key).layers[0].forward.norm
    assert all(np.all(np.asarray(a) == 1) for a in (norm.x, norm.h, norm.c))
    assert not np.any(norm.b_c)


def test_init_is_reproducible_with_one_key_per_array():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=3)
    a, b = lstm.init(key), lstm.init(key)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    drawn = [leaf.ravel()[0].item() for leaf in jax.tree.leaves(a) if leaf.ndim > 1]
    assert len(set(drawn)) == len(drawn)
    assert {leaf.dtype for leaf in jax.tree.leaves(a)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, lstm.init(jax.random.PRNGKey(0)), lstm.init(jax.random.PRNGKey(0)))


def test_init_uses_forget_bias_of_configuration():
    b = jaxlstm.LSTM(3, 5, forget_bias=-2.5).init(key).layers[0].forward.b
    np.testing.assert_array_equal(np.asarray(b).reshape(4, 5)[1], -2.5)
    assert np.count_nonzero(b) == 5
    assert not np.asarray(jaxlstm.LSTM(3, 5, forget_bias=0).init(key).layers[0].forward.b).any()


@pytest.mark.parametrize("cell", ["lstm", "peephole", "cifg"])
def test_chrono_spreads_time_scales_up_to_longest(cell):
    longest, units = 50, 4000
    b = np.asarray(jaxlstm.LSTM(1, units, cell=cell, chrono=longest, proj_size=1).init(key).layers[0].forward.b)
    slabs = dict(zip(("f", "g", "o") if cell == "cifg" else ("i", "f", "g", "o"), b.reshape(-1, units)))
    spans = np.exp(np.asarray(slabs["f"], np.float64))
    assert spans.min() >= 1 - 1e-6
    assert spans.max() <= longest - 1 + 1e-4
    # Uniform in [1, 49]: mean 25, standard deviation 48 / sqrt(12); five standard errors.
    assert abs(spans.mean() - 25) < 5 * 48 / 12**0.5 / units**0.5
    if "i" in slabs:
        np.testing.assert_array_equal(slabs["i"], -slabs["f"])
    assert not slabs["g"].any()
    assert not slabs["o"].any()
