"""What has to hold of any recurrence, whatever its weights."""

import pickle

import cases
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerance import tolerance

import jaxlstm

T, B, H = 6, 3, 5
each = pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
steps = hnp.arrays(bool, (T, B))


def network(implementation, **options):
    return jaxlstm.LSTM(4, H, param_dtype=jnp.float64, implementation=implementation, **options)


def material(lstm, seed=0):
    rng = np.random.default_rng(seed)
    params = cases.random_params(lstm, rng)
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), lstm.initial_state((B,)))
    return params, rng.standard_normal((T, B, 4)), state


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance(np.float64, T * H))


@each
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.slow), True])
@settings(max_examples=25, deadline=None)
@given(mask=steps, resets=steps, cut=st.integers(0, T))
def test_a_sequence_cut_in_two_with_the_state_carried_equals_one_run(implementation, reverse, mask, resets, cut):
    lstm = network(implementation, num_layers=2)
    params, xs, state = material(lstm)
    whole, last = lstm(params, xs, state, mask=mask, resets=resets, reverse=reverse)
    outputs = [np.zeros(0)] * 2
    for n in (1, 0) if reverse else (0, 1):
        piece = (slice(0, cut), slice(cut, T))[n]
        options = {"mask": mask[piece], "resets": resets[piece], "reverse": reverse}
        outputs[n], state = lstm(params, xs[piece], state, **options)
    same((whole, last), (np.concatenate(outputs), state))


@each
@pytest.mark.parametrize("bidirectional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_packed_row_equals_its_sequences_run_apart(implementation, bidirectional):
    lstm = network(implementation, bidirectional=bidirectional, num_layers=2)
    params, xs, _ = material(lstm)
    resets = np.zeros((T, B), bool)
    resets[[0, 2, 5]] = True
    packed, _ = lstm(params, xs, resets=resets)
    apart = [lstm(params, xs[piece])[0] for piece in (slice(0, 2), slice(2, 5), slice(5, 6))]
    same(packed, np.concatenate(apart))


@each
@settings(max_examples=25, deadline=None)
@given(mask=steps, lengths=hnp.arrays(np.int32, (B,), elements=st.integers(0, T)))
def test_what_lies_behind_a_mask_reaches_nothing(implementation, mask, lengths):
    lstm = network(implementation, bidirectional=True, num_layers=2)
    params, xs, state = material(lstm)
    taken = mask & (np.arange(T)[:, None] < lengths)
    poisoned = np.where(taken[..., None], xs, np.nan)

    def loss(params, xs, state):
        ys, last = lstm(params, xs, state, mask=mask, lengths=lengths)
        return sum((a**2).sum() for a in jax.tree.leaves((ys, last))), (ys, last)

    clean = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, xs, state)
    dirty = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, poisoned, state)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    (_, (ys, last)), (_, slopes, _) = clean
    assert not np.any(np.asarray(ys)[~taken])
    assert not np.any(np.asarray(slopes)[~taken])
    untouched = ~taken.any(0)
    np.testing.assert_array_equal(np.asarray(last.c)[:, untouched], state.c[:, untouched])
    np.testing.assert_array_equal(np.asarray(last.h)[:, untouched], state.h[:, untouched])


@each
def test_length_zero_returns_the_initial_state_even_over_a_reset(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, state = material(lstm)
    ys, last = lstm(params, xs, state, lengths=np.zeros(B, int), resets=np.ones((T, B), bool))
    assert not np.any(ys)
    jax.tree.map(np.testing.assert_array_equal, last, state)


@each
def test_reverse_equals_running_each_sequence_backward(implementation):
    lstm = network(implementation)
    params, xs, state = material(lstm)
    lengths = np.array([6, 3, 1])
    ys, last = lstm(params, xs, state, lengths=lengths, reverse=True)
    for b, length in enumerate(lengths):
        alone = jax.tree.map(lambda a: a[:, b], state)  # noqa: B023
        flipped, end = lstm(params, xs[:length, b][::-1], alone)
        same((ys[:length, b], jax.tree.map(lambda a: a[:, b], last)), (flipped[::-1], end))  # noqa: B023


@each
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"cell": "rnn"}, {"use_bias": False}])
def test_steps_equal_the_sequence(implementation, options):
    lstm = network(implementation, num_layers=2, **options)
    params, xs, state = material(lstm)
    ys, last = lstm(params, xs, state)
    outputs = []
    for x in xs:
        state, y = lstm.step(params, state, x)
        outputs.append(y)
    same((ys, last), (np.stack(outputs), state))


@each
def test_jit_and_eager_agree_and_the_configuration_is_a_static_argument(implementation):
    lstm = network(implementation, num_layers=2)
    params, xs, state = material(lstm)
    same(jax.jit(lstm)(params, xs, state), lstm(params, xs, state))
    same(jax.jit(lambda f, *a: f(*a), static_argnums=0)(lstm, params, xs, state), lstm(params, xs, state))


@each
def test_one_compilation_per_shape(implementation):
    traced = []

    def gates(z, c):
        traced.append(z.shape)
        return jaxlstm.cells.lstm(z, c)

    lstm = network(implementation, cell=jaxlstm.Cell(gates, num_gates=4, forget_gate=1))
    params, xs, state = material(lstm)
    step = jax.jit(jax.grad(lambda params, xs: lstm(params, xs, state)[0].sum()))
    for call in (
        lambda xs: lstm(params, xs, state),
        lambda xs: step(params, xs),
        lambda xs: lstm.step(params, state, xs[0]),
    ):
        call(xs)
        before = len(traced)
        call(xs + 1)
        assert len(traced) == before
        call(np.concatenate([xs, xs], 1)[:, :B] * 2)
        assert len(traced) == before
    lstm(params, xs[:-1], state)
    assert len(traced) > before


@each
def test_dropout_between_layers(implementation):
    """Without a key none; with one, the outputs of each layer but the last are dropped and scaled, reproducibly."""
    rate = 0.4
    lstm = network(implementation, num_layers=2, dropout=rate)
    params, xs, state = material(lstm)
    quiet = network(implementation, num_layers=2)(params, xs, state)
    jax.tree.map(np.testing.assert_array_equal, lstm(params, xs, state), quiet)
    key = jax.random.key(5)
    noisy = lstm(params, xs, state, key=key)
    jax.tree.map(np.testing.assert_array_equal, lstm(params, xs, state, key=key), noisy)
    assert np.any(np.asarray(lstm(params, xs, state, key=jax.random.key(6))[0]) != np.asarray(noisy[0]))
    # A lower layer whose output is known makes the mask visible: the upper layer sees y * mask.
    lower = network(implementation)
    below, _ = lower(jaxlstm.Params(params.layers[:1]), xs, jax.tree.map(lambda a: a[:1], state))
    slope = jax.grad(lambda y: lstm(params, y, state, key=key)[0].sum())(xs)
    assert np.isfinite(slope).all()
    mask = jaxlstm.dropout.dropout_mask(jax.random.fold_in(key, 1), rate, below.shape, below.dtype)
    upper = jaxlstm.LSTM(H, H, param_dtype=jnp.float64, implementation=implementation)
    ys, _ = upper(jaxlstm.Params(params.layers[1:]), below * mask, jax.tree.map(lambda a: a[1:], state))
    same(ys, noisy[0])
    # One layer has nothing between layers.
    single = network(implementation, dropout=rate)
    params, xs, state = material(single)
    jax.tree.map(np.testing.assert_array_equal, single(params, xs, state, key=key), single(params, xs, state))


def test_keep_mask_drops_at_its_rate_and_keeps_the_mean():
    n, rate = 200_000, 0.3
    mask = np.asarray(jaxlstm.dropout.dropout_mask(jax.random.key(0), rate, (n,), jnp.float64))
    assert set(np.unique(mask)) == {0.0, 1 / (1 - rate)}
    # The share dropped of n independent elements: within five standard deviations.
    assert abs((mask == 0).mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


@each
def test_remat_keeps_less(implementation):
    """Of memory that grows with time, a chunk's share and the states between chunks are left."""
    steps, batch, size = 1024, 2, 16
    xs = jnp.ones((steps, batch, size), jnp.float32)

    def temporary(remat):
        lstm = jaxlstm.LSTM(size, size, remat=remat, implementation=implementation)
        params = lstm.init(jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: (lstm(p, xs)[0] ** 2).sum()))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) < temporary(None) / 2


@each
def test_pytrees_survive(implementation):
    lstm = network(implementation, num_layers=2, bidirectional=True, proj_size=2)
    params, xs, state = material(lstm)
    for tree in (params, state):
        again = pickle.loads(pickle.dumps(tree))
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
        blank = jax.tree.map(np.zeros_like, tree)
        again = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(tree))
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert ".layers[1].backward.w_h" in names
    loss, gradient = jax.value_and_grad(lambda p: (lstm(p, xs, state)[0] ** 2).sum())(params)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        optimizer = optax.adam(1e-2)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        params = optax.apply_updates(params, updates)
    assert (lstm(params, xs, state)[0] ** 2).sum() < loss
    assert pickle.loads(pickle.dumps(lstm)) == lstm


@each
def test_empty_sequences_and_batches(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, state = material(lstm)
    ys, last = lstm(params, xs[:0], state)
    assert ys.shape == (0, B, 2 * H)
    jax.tree.map(np.testing.assert_array_equal, last, state)
    slopes = jax.grad(lambda p, s: lstm(p, xs[:0], s)[1].c.sum(), (0, 1))(params, state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes[0]))
    np.testing.assert_array_equal(slopes[1].c, 1)
    ys, last = lstm(params, xs[:, :0])
    assert ys.shape == (T, 0, 2 * H)
    assert last.h.shape == (2, 0, H)


def test_ensembles_of_parameters_are_mapped():
    lstm = network("scan")
    xs = material(lstm)[1]
    params = jax.vmap(lstm.init)(jax.random.split(jax.random.key(0), 4))
    ys, _ = jax.vmap(lstm, (0, None))(params, xs)
    third = jax.tree.map(lambda a: a[2], params)
    same(ys[2], lstm(third, xs)[0])
