"""Each regulariser does what its paper promises: the masks' distribution, the scale, evaluation, the gradient."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm import activation_regularization
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout

T, B, H = 40, 30, 8
key = jax.random.key(3)
each = pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
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
    return jaxlstm.LSTM(4, H, param_dtype=jnp.float64, **options)


def material(lstm, steps=T, rows=B):
    rng = np.random.default_rng(1)
    return cases.random_params(lstm, rng), rng.standard_normal((steps, rows, 4))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance(np.float64, T * H))


def within_five_errors(mask, share):
    mask = np.asarray(mask)
    assert abs(mask.mean() - share) < 5 * (share * (1 - share) / mask.size) ** 0.5


@pytest.mark.parametrize("name", OPTIONS)
def test_a_key_repeats_and_another_differs(name):
    lstm = network(**OPTIONS[name])
    params, xs = material(lstm, 6, 3)
    ys = [lstm(params, xs, key=jax.random.key(n))[0] for n in (0, 0, 1)]
    np.testing.assert_array_equal(ys[0], ys[1])
    assert np.abs(np.asarray(ys[0] - ys[2])).max() > 1e-3


@each
@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("zoneout")])
def test_without_a_key_it_is_the_identity(name, implementation):
    options = {k: v for k, v in OPTIONS[name].items() if k == "num_layers"}
    lstm, plain = (network(implementation=implementation, **o) for o in (OPTIONS[name], options))
    params, xs = material(lstm, 6, 3)
    for a, b in zip(jax.tree.leaves(lstm(params, xs)), jax.tree.leaves(plain(params, xs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_variational_masks_are_the_same_at_every_step_and_differ_between_rows():
    x = jnp.ones((T, B, H))
    ones = np.asarray(dropout(key, 0.3, x, over_time=False))
    np.testing.assert_array_equal(ones, np.broadcast_to(ones[:1], ones.shape))
    assert len({tuple(row) for row in ones[0]}) > 1
    within_five_errors(ones[0] > 0, 0.7)
    np.testing.assert_allclose(np.unique(ones), [0, 1 / 0.7], rtol=1e-6)
    every = np.asarray(dropout(key, 0.3, x))
    within_five_errors(every > 0, 0.7)
    assert (every[0] != every[1]).any()


def test_outputs_are_dropped_by_one_mask_for_the_sequence():
    lstm = network(output_dropout=0.5)
    params, xs = material(lstm)
    dropped, state = lstm(params, xs, key=key)
    plain, last = lstm(params, xs)
    ratio = np.asarray(dropped / plain)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), atol=1e-12)
    within_five_errors(ratio[0] > 1, 0.5)
    close(state, last)  # what is dropped on the way out is not dropped from the state


@pytest.mark.parametrize("size", [H, None])
def test_noise_inside_the_recurrence_is_drawn_anew_at_every_step(size):
    noise = draw_masks(key, RegularizerRates(recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1), (2, T, B), H, size)
    within_five_errors(noise.zoneout_mask_h, 0.2)
    assert (noise.zoneout_mask_h[0, 0] != noise.zoneout_mask_h[0, 1]).any()
    assert (noise.zoneout_mask_h[0] != noise.zoneout_mask_h[1]).any()
    if size is None:  # a cell without a cell state
        assert noise.zoneout_mask_c is None
        return
    within_five_errors(noise.candidate_mask, 0.7)
    within_five_errors(noise.zoneout_mask_c, 0.1)
    assert draw_masks(None, RegularizerRates(0.3, 0.2, 0.1), (2, T, B), H, H) == (None, None, None)
    assert draw_masks(key, RegularizerRates(), (2, T, B), H, H) == (None, None, None)


@each
def test_zoneout_holds_units_by_chance_and_by_expectation_without_a_key(implementation):
    """Krueger et al. 2017, equation 3: over many draws one step is on average what evaluation gives."""
    rate = 0.3
    lstm = network(zoneout_h=rate, zoneout_c=rate, implementation=implementation)
    params, xs = material(lstm, 1, 4000)
    xs = np.broadcast_to(xs[:, :1], xs.shape)
    state = jax.tree.map(lambda a: a + 0.5, lstm.initial_state(4000))
    _, drawn = lstm(params, xs, state, key=key)
    _, expected = lstm(params, xs, state)
    _, plain = network(implementation=implementation)(params, xs, state)
    for a, e, p in zip(drawn, expected, plain):
        held = np.asarray(a) == 0.5
        within_five_errors(held, rate)
        np.testing.assert_allclose(np.asarray(a)[~held], np.asarray(p)[~held], rtol=1e-12)
        np.testing.assert_allclose(e, rate * 0.5 + (1 - rate) * np.asarray(p), rtol=1e-12)


@each
def test_recurrent_dropout_leaves_the_memory_alone(implementation):
    """With every candidate dropped, c is what the forget gate leaves of it (Semeniuta et al. 2016, section 3)."""
    lstm = network(recurrent_dropout=0.999999, implementation=implementation)
    params, xs = material(lstm, 3, 2)
    start = jax.tree.map(lambda a: a + 1.0, lstm.initial_state(2))
    bias = params.layers[0].forward.b.reshape(4, H).copy()
    bias[1] = 50.0  # forget gates open
    weights = params.layers[0].forward._replace(b=bias.reshape(-1))
    _, state = lstm(params._replace(layers=(jaxlstm.Layer(weights),)), xs, start, key=key)
    np.testing.assert_allclose(state.c, 1.0, rtol=1e-9)


def test_weight_drop_zeroes_recurrent_weights_and_keeps_their_gradient_zero():
    lstm = network(weight_drop=0.5)
    params, xs = material(lstm)
    slope = jax.grad(lambda p: (lstm(p, xs, key=key)[0] ** 2).sum())(params).layers[0].forward
    dropped = np.asarray(slope.w_h) == 0
    within_five_errors(dropped, 0.5)
    assert np.all(np.asarray(slope.w_x) != 0)
    # The network without them, the others doubled, is the same network.
    w = params.layers[0].forward
    by_hand = params._replace(layers=(jaxlstm.Layer(w._replace(w_h=np.where(dropped, 0, 2 * w.w_h))),))
    close(network()(by_hand, xs), lstm(params, xs, key=key))


def test_the_gradient_flows_through_the_kept_inputs_only():
    lstm = network(input_dropout=0.4)
    params, xs = material(lstm)
    slope = np.asarray(jax.grad(lambda x: (lstm(params, x, key=key)[0] ** 2).sum())(xs))
    none = slope == 0
    np.testing.assert_array_equal(none, np.broadcast_to(none[:1], none.shape))
    within_five_errors(none[0], 0.4)


@pytest.mark.parametrize("options", [{"cell": "peephole"}, {"cell": "cifg", "layer_norm": True}, {"zoneout_h": 0.2}])
def test_a_step_at_a_time_equals_the_call(options):
    lstm = network(num_layers=2, learned_state=True, zoneout_c=0.1, **options)
    params, xs = material(lstm, 5, 3)
    ys, last = lstm(params, xs)
    state, outputs = lstm.initial_state(3, params), []
    for x in xs:
        state, y = lstm.step(params, state, x)
        outputs.append(y)
    close((ys, last), (np.stack(outputs), state))


@each
def test_a_learned_state_is_where_a_sequence_starts_and_is_trained(implementation):
    lstm = network(num_layers=2, bidirectional=True, learned_state=True, proj_size=3, implementation=implementation)
    params, xs = material(lstm, 6, 3)
    given = lstm.initial_state((3,), params)
    assert given.h.shape == (4, 3, 3)
    close(lstm(params, xs), lstm(params, xs, given))
    slope = jax.grad(lambda p: (lstm(p, xs)[0] ** 2).sum())(params).state
    assert all(np.all(np.asarray(a) != 0) for a in jax.tree.leaves(slope))
    # Two sequences packed in a row equal each alone.
    resets = np.zeros((6, 3), bool)
    resets[[0, 4]] = True
    packed, _ = lstm(params, xs, resets=resets)
    close(packed, np.concatenate([lstm(params, xs[:4])[0], lstm(params, xs[4:])[0]]))


def test_layer_norm_makes_the_step_blind_to_the_scale_of_weights():
    lstm = network(layer_norm=True)
    params, xs = material(lstm)
    w = params.layers[0].forward
    scaled = params._replace(layers=(jaxlstm.Layer(w._replace(w_x=1e3 * w.w_x, w_h=1e3 * w.w_h)),))
    for a, b in zip(jax.tree.leaves(lstm(params, xs)), jax.tree.leaves(lstm(scaled, xs))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # but for epsilon under the root


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float64, marks=pytest.mark.slow), jnp.bfloat16])
def test_activation_terms(dtype):
    ys = jnp.asarray([[[3.0, 4.0]], [[3.0, 0.0]], [[0.0, 0.0]]], dtype)  # (T, B, P) = (3, 1, 2)
    assert float(activation_regularization.activation(ys)) == pytest.approx((9 + 16 + 9) / 6)
    assert float(activation_regularization.temporal_activation(ys)) == pytest.approx((16 + 9) / 4)
    mask = jnp.array([[True], [True], [False]])
    assert float(activation_regularization.activation(ys, mask)) == pytest.approx((9 + 16 + 9) / 4)
    assert float(activation_regularization.temporal_activation(ys, mask)) == pytest.approx(16 / 2)
    assert float(activation_regularization.temporal_activation(ys, mask[::-1])) == pytest.approx(
        9 / 2
    )  # both steps have to count
    assert float(activation_regularization.activation(ys, jnp.zeros((3, 1), bool))) == 0
    assert float(activation_regularization.temporal_activation(ys[:1])) == 0
    slope = jax.grad(
        lambda y: activation_regularization.activation(y, mask) + activation_regularization.temporal_activation(y, mask)
    )
    poisoned = slope(ys.at[2].set(jnp.nan))
    np.testing.assert_array_equal(np.asarray(poisoned, float), np.asarray(slope(ys), float))


@pytest.mark.parametrize("term", [activation_regularization.activation, activation_regularization.temporal_activation])
def test_a_mask_of_activation_terms_is_one_for_every_step(term):
    ys = jnp.ones((4, 4, 3), jnp.float32)
    for shape in ((4,), (4, 1), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"mask must have shape \[4, 4\], got"):
            term(ys, jnp.ones(shape, bool))
    with pytest.raises(TypeError, match="mask must be boolean, got float32"):
        term(ys, jnp.ones((4, 4), jnp.float32))


@pytest.mark.slow
def test_activation_terms_count_more_numbers_than_int32_holds():
    def mean(mask):
        return jax.jit(lambda a: activation_regularization.activation(jnp.broadcast_to(a, (2**11, 2**10, 2**10)), mask))

    with jax.enable_x64(False):
        for mask in (None, jnp.ones((2**11, 2**10), bool)):
            assert mean(mask)(jnp.float32(1)) == pytest.approx(1, rel=1e-3)
