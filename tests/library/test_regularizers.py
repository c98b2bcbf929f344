"""Regularizers: distribution of their masks, scale, gradient, and the network without a key."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close

import jaxlstm
from jaxlstm import activation_regularization
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout

T, B, I, H = 40, 30, 4, 8  # noqa: E741 (shape letter)
key = jax.random.key(3)
every_backend = pytest.mark.parametrize("implementation", cases.BACKENDS)
OPTIONS = {
    "dropout": {"dropout": 0.3, "num_layers": 2},
    "variational": {"dropout": 0.3, "num_layers": 2, "variational": True},
    "input_dropout": {"input_dropout": 0.3},
    "output_dropout": {"output_dropout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_drop": {"weight_drop": 0.3},
    "zoneout_h": {"zoneout_h": 0.3},
    "zoneout_c": {"zoneout_c": 0.3},
}


def network(**options):
    return jaxlstm.LSTM(I, H, param_dtype=jnp.float64, **options)


def random_args(lstm, num_steps=T, batch_size=B):
    """Draws parameters and inputs."""
    rng = np.random.default_rng(1)
    return cases.random_params(lstm, rng), rng.standard_normal((num_steps, batch_size, I))


def assert_same(a, b):
    """Compares trees up to rounding in float64."""
    assert_close(a, b, np.float64, T * H)


def assert_share(mask, share):
    """Compares the share of True with a probability, within five standard errors."""
    mask = np.asarray(mask)
    assert abs(mask.mean() - share) < 5 * (share * (1 - share) / mask.size) ** 0.5


@pytest.mark.parametrize("name", OPTIONS)
def test_key_determines_masks(name):
    lstm = network(**OPTIONS[name])
    params, xs = random_args(lstm, 6, 3)
    ys = [lstm(params, xs, key=jax.random.key(n))[0] for n in (0, 0, 1)]
    np.testing.assert_array_equal(ys[0], ys[1])
    assert np.abs(np.asarray(ys[0] - ys[2])).max() > 1e-3


@every_backend
@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("zoneout")])
def test_regularizer_has_no_effect_without_key(name, implementation):
    """Compares the programs before they are compiled."""
    options = {k: v for k, v in OPTIONS[name].items() if k == "num_layers"}

    def program(**options):
        lstm = network(implementation=implementation, **options)
        xs = jax.ShapeDtypeStruct((6, 3, I), jnp.float64)
        return jax.jit(lambda params, xs: lstm(params, xs)).lower(lstm.param_shapes(), xs).as_text()

    assert program(**OPTIONS[name]) == program(**options)


def test_dropout_shares_mask_over_time_on_request():
    x = jnp.ones((T, B, H))
    shared = np.asarray(dropout(key, 0.3, x, over_time=False))
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))
    assert len({tuple(row) for row in shared[0]}) > 1
    assert_share(shared[0] > 0, 0.7)
    np.testing.assert_allclose(np.unique(shared), [0, 1 / 0.7], rtol=1e-6)
    separate = np.asarray(dropout(key, 0.3, x))
    assert_share(separate > 0, 0.7)
    assert (separate[0] != separate[1]).any()


def test_output_dropout_has_one_mask_for_all_steps():
    lstm = network(output_dropout=0.5)
    params, xs = random_args(lstm)
    dropped, state = lstm(params, xs, key=key)
    plain, last = lstm(params, xs)
    ratio = np.asarray(dropped / plain)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), atol=1e-12)
    assert_share(ratio[0] > 1, 0.5)
    assert_same(state, last)  # the state is not dropped


@pytest.mark.parametrize("size", [H, None])
def test_draw_masks_draws_new_masks_at_every_step(size):
    inputs, rates = jnp.ones((T, B, I)), RegularizerRates(recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1)
    masks = draw_masks(key, rates, 2, inputs, H, size)
    assert masks.zoneout_mask_h.shape == (2, T, B, H)
    assert_share(masks.zoneout_mask_h, 0.2)
    assert (masks.zoneout_mask_h[0, 0] != masks.zoneout_mask_h[0, 1]).any()
    assert (masks.zoneout_mask_h[0] != masks.zoneout_mask_h[1]).any()
    if size is None:  # a cell without a cell state
        assert masks.zoneout_mask_c is None
        return
    assert_share(masks.candidate_mask, 0.7)
    assert_share(masks.zoneout_mask_c, 0.1)
    assert draw_masks(None, rates, 2, inputs, H, H) == (None, None, None)
    assert draw_masks(key, RegularizerRates(), 2, inputs, H, H) == (None, None, None)


@every_backend
def test_zoneout_keeps_old_values_at_its_rate(implementation):
    """With a key units keep their old value at random; without one they mix both values by the rate."""
    rate = 0.3
    lstm = network(zoneout_h=rate, zoneout_c=rate, implementation=implementation)
    params, xs = random_args(lstm, 1, 4000)
    xs = np.broadcast_to(xs[:, :1], xs.shape)
    state = jax.tree.map(lambda a: a + 0.5, lstm.initial_state(4000))
    _, random = lstm(params, xs, state, key=key)
    _, expected = lstm(params, xs, state)
    _, plain = network(implementation=implementation)(params, xs, state)
    for a, e, p in zip(random, expected, plain):
        kept = np.asarray(a) == 0.5
        assert_share(kept, rate)
        np.testing.assert_allclose(np.asarray(a)[~kept], np.asarray(p)[~kept], rtol=1e-12)
        np.testing.assert_allclose(e, rate * 0.5 + (1 - rate) * np.asarray(p), rtol=1e-12)


@every_backend
def test_recurrent_dropout_drops_candidates_only(implementation):
    """With every candidate dropped and an open forget gate, c stays the same (Semeniuta et al. 2016, section 3)."""
    lstm = network(recurrent_dropout=0.999999, implementation=implementation)
    params, xs = random_args(lstm, 3, 2)
    initial = jax.tree.map(lambda a: a + 1.0, lstm.initial_state(2))
    bias = params.layers[0].forward.b.reshape(4, H).copy()
    bias[1] = 50.0  # forget gates open
    weights = params.layers[0].forward._replace(b=bias.reshape(-1))
    _, state = lstm(params._replace(layers=(jaxlstm.Layer(weights),)), xs, initial, key=key)
    np.testing.assert_allclose(state.c, 1.0, rtol=1e-9)


def test_weight_drop_drops_recurrent_weights_and_their_gradient():
    lstm = network(weight_drop=0.5)
    params, xs = random_args(lstm)
    gradient = jax.jit(jax.grad(lambda p: (lstm(p, xs, key=key)[0] ** 2).sum()))(params).layers[0].forward
    dropped = np.asarray(gradient.w_h) == 0
    assert_share(dropped, 0.5)
    assert np.all(np.asarray(gradient.w_x) != 0)
    # Equal to the network without these weights and with the others doubled.
    w = params.layers[0].forward
    by_hand = params._replace(layers=(jaxlstm.Layer(w._replace(w_h=np.where(dropped, 0, 2 * w.w_h))),))
    assert_same(network()(by_hand, xs), lstm(params, xs, key=key))


def test_input_dropout_drops_gradient_of_dropped_inputs():
    lstm = network(input_dropout=0.4)
    params, xs = random_args(lstm)
    dropped = np.asarray(jax.jit(jax.grad(lambda x: (lstm(params, x, key=key)[0] ** 2).sum()))(xs)) == 0
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:1], dropped.shape))
    assert_share(dropped[0], 0.4)


@pytest.mark.parametrize("options", [{"cell": "peephole"}, {"cell": "cifg", "layer_norm": True}, {"zoneout_h": 0.2}])
def test_step_by_step_equals_sequence(options):
    lstm = network(num_layers=2, learned_state=True, zoneout_c=0.1, **options)
    params, xs = random_args(lstm, 5, 3)
    ys, last = lstm(params, xs)
    state, outputs = lstm.initial_state(3, params), []
    for x in xs:
        state, y = lstm.step(params, state, x)
        outputs.append(y)
    assert_same((ys, last), (np.stack(outputs), state))


@pytest.mark.slow
def test_learned_state_starts_sequences_and_is_trained():
    lstm = network(bidirectional=True, learned_state=True, proj_size=3)
    params, xs = random_args(lstm, 6, 3)
    state = lstm.initial_state((3,), params)
    assert state.h.shape == (2, 3, 3)
    assert_same(lstm(params, xs), lstm(params, xs, state))
    gradient = jax.jit(jax.grad(lambda p: (lstm(p, xs)[0] ** 2).sum()))(params).state
    assert all(np.all(np.asarray(a) != 0) for a in jax.tree.leaves(gradient))
    # Two packed sequences equal each by itself.
    resets = np.zeros((6, 3), bool)
    resets[[0, 3]] = True
    packed, _ = lstm(params, xs, resets=resets)
    assert_same(packed, np.concatenate([lstm(params, xs[:3])[0], lstm(params, xs[3:])[0]]))


def test_layer_norm_removes_scale_of_weights():
    lstm = network(layer_norm=True)
    params, xs = random_args(lstm)
    w = params.layers[0].forward
    scaled = params._replace(layers=(jaxlstm.Layer(w._replace(w_x=1e3 * w.w_x, w_h=1e3 * w.w_h)),))
    for a, b in zip(jax.tree.leaves(lstm(params, xs)), jax.tree.leaves(lstm(scaled, xs))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # up to the epsilon under the root


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_activation_regularization_equals_values_by_hand(dtype):
    ys = np.asarray([[[3.0, 4.0]], [[3.0, 0.0]], [[0.0, 0.0]]], dtype)  # (T, B, P) = (3, 1, 2)
    mask = np.array([[True], [True], [False]])
    activation = jax.jit(activation_regularization.activation)
    temporal_activation = jax.jit(activation_regularization.temporal_activation)
    assert float(activation(ys)) == pytest.approx((9 + 16 + 9) / 6)
    assert float(temporal_activation(ys)) == pytest.approx((16 + 9) / 4)
    assert float(activation(ys, mask)) == pytest.approx((9 + 16 + 9) / 4)
    assert float(temporal_activation(ys, mask)) == pytest.approx(16 / 2)
    # A change counts if both of its steps do.
    assert float(temporal_activation(ys, mask[::-1])) == pytest.approx(9 / 2)
    assert float(activation(ys, np.zeros((3, 1), bool))) == 0
    assert float(temporal_activation(ys[:1])) == 0
    gradient = jax.jit(jax.grad(lambda y: activation(y, mask) + temporal_activation(y, mask)))
    with_nan = np.where(np.arange(3)[:, None, None] == 2, np.asarray(np.nan, dtype), ys)
    np.testing.assert_array_equal(np.asarray(gradient(with_nan), float), np.asarray(gradient(ys), float))


@pytest.mark.parametrize("term", [activation_regularization.activation, activation_regularization.temporal_activation])
def test_activation_regularization_rejects_wrong_mask(term):
    ys = jnp.ones((4, 4, 3), jnp.float32)
    for shape in ((4,), (4, 1), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"mask must have shape \[4, 4\], got"):
            term(ys, jnp.ones(shape, bool))
    with pytest.raises(TypeError, match="mask must be boolean, got float32"):
        term(ys, jnp.ones((4, 4), jnp.float32))


@pytest.mark.slow
def test_activation_regularization_counts_beyond_int32():
    def mean(mask):
        return jax.jit(lambda a: activation_regularization.activation(jnp.broadcast_to(a, (2**11, 2**10, 2**10)), mask))

    with jax.enable_x64(False):
        for mask in (None, jnp.ones((2**11, 2**10), bool)):
            assert mean(mask)(jnp.float32(1)) == pytest.approx(1, rel=1e-3)
