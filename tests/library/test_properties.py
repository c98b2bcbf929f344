"""Properties of any recurrence, for any weights."""

import pickle
from dataclasses import replace
from functools import lru_cache

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
from parity import assert_close

import jaxlstm
from jaxlstm.dropout import dropout_mask

NUM_STEPS, BATCH_SIZE, INPUT_SIZE, HIDDEN_SIZE = 6, 3, 2, 4
every_backend = pytest.mark.parametrize("implementation", cases.BACKENDS)
step_masks = hnp.arrays(bool, (NUM_STEPS, BATCH_SIZE))


def network(implementation=None, **options):
    return jaxlstm.LSTM(INPUT_SIZE, HIDDEN_SIZE, param_dtype=jnp.float64, implementation=implementation, **options)


def random_args(lstm):
    """Draws parameters, inputs and an initial state."""
    rng = np.random.default_rng(0)
    params = cases.random_params(lstm, rng)
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), lstm.state_shapes((BATCH_SIZE,)))
    return params, rng.standard_normal((NUM_STEPS, BATCH_SIZE, INPUT_SIZE)), state


def assert_same(a, b):
    """Compares trees up to rounding in float64."""
    assert_close(a, b, np.float64, NUM_STEPS * HIDDEN_SIZE)


def assert_identical(a, b):
    """Compares trees bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def row(tree, b):
    """Selects one sequence of a state ``(L*D, B, .)``."""
    return jax.tree.map(lambda a: a[:, b], tree)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@settings(max_examples=25, deadline=None)
@given(mask=step_masks, resets=step_masks, cut=st.sampled_from([0, 3, NUM_STEPS]))
def test_sequence_cut_in_two_equals_whole(implementation, reverse, mask, resets, cut):
    lstm = network(implementation)
    params, xs, state = random_args(lstm)
    whole = lstm(params, xs, state, mask=mask, resets=resets, reverse=reverse)
    outputs = {}
    for part in (slice(cut, None), slice(cut)) if reverse else (slice(cut), slice(cut, None)):
        options = {"mask": mask[part], "resets": resets[part], "reverse": reverse}
        outputs[part.start], state = lstm(params, xs[part], state, **options)
    assert_same(whole, (np.concatenate([outputs[None], outputs[cut]]), state))


@every_backend
def test_packed_sequences_equal_separate_sequences(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, _ = random_args(lstm)
    resets = np.zeros((NUM_STEPS, BATCH_SIZE), bool)
    resets[[0, 1, 2, 3]] = True
    packed, _ = lstm(params, xs, resets=resets)
    separate = [lstm(params, xs[part])[0] for part in (slice(1), slice(1, 2), slice(2, 3), slice(3, 6))]
    assert_same(packed, np.concatenate(separate))


@lru_cache
def loss_and_gradient(lstm):
    """Compiles a loss over all results, the results and the gradient once for all masks."""

    def loss(args, options):
        ys, state = lstm(*args, **options)
        return sum((a**2).sum() for a in jax.tree.leaves((ys, state))), (ys, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@every_backend
@settings(max_examples=25, deadline=None)
@given(mask=step_masks, lengths=hnp.arrays(np.int32, (BATCH_SIZE,), elements=st.integers(0, NUM_STEPS)))
def test_skipped_inputs_reach_no_output_or_gradient(implementation, mask, lengths):
    lstm = network(implementation, bidirectional=True)
    params, xs, state = random_args(lstm)
    step_mask = mask & (np.arange(NUM_STEPS)[:, None] < lengths)
    options = {"mask": mask, "lengths": lengths}
    expected = loss_and_gradient(lstm)((params, xs, state), options)
    xs_with_nan = np.where(step_mask[..., None], xs, np.nan)
    assert_identical(loss_and_gradient(lstm)((params, xs_with_nan, state), options), expected)
    (_, (ys, last)), (_, xs_gradient, _) = expected
    assert not np.any(np.asarray(ys)[~step_mask])
    assert not np.any(np.asarray(xs_gradient)[~step_mask])
    rows = ~step_mask.any(0)
    assert_identical(row(last, rows), row(state, rows))


@every_backend
def test_length_zero_returns_initial_state_despite_resets(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, state = random_args(lstm)
    resets = np.ones((NUM_STEPS, BATCH_SIZE), bool)
    ys, last = lstm(params, xs, state, lengths=np.zeros(BATCH_SIZE, int), resets=resets)
    assert not np.any(ys)
    assert_identical(last, state)


@every_backend
def test_reverse_equals_flipped_sequences(implementation):
    lstm = network(implementation)
    params, xs, state = random_args(lstm)
    lengths = np.array([NUM_STEPS, 3, 0])
    ys, last = lstm(params, xs, state, lengths=lengths, reverse=True)
    for b, length in enumerate(lengths):
        flipped, last_of_row = lstm(params, xs[:length, b][::-1], row(state, b))
        assert_same((ys[:length, b], row(last, b)), (flipped[::-1], last_of_row))


@every_backend
@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "use_bias": False}, {"cell": "rnn"}])
def test_step_by_step_equals_sequence(implementation, options):
    params, xs, state = random_args(network(num_layers=2, **options))
    expected = network(implementation, num_layers=2, **options)(params, xs, state)
    lstm = network(num_layers=2, **options)  # a step does not depend on the backend
    outputs = []
    for x in xs:
        state, y = lstm.step(params, state, x)
        outputs.append(y)
    assert_same((np.stack(outputs), state), expected)


@every_backend
def test_jit_equals_eager_with_static_configuration(implementation):
    lstm = network(implementation)
    args = random_args(lstm)
    expected = lstm(*args)
    assert_same(jax.jit(lstm)(*args), expected)
    assert_same(jax.jit(lambda lstm, *args: lstm(*args), static_argnums=0)(lstm, *args), expected)


@every_backend
def test_call_and_step_compile_once_per_shape(implementation):
    traced = []

    def update(i, f, g, c):
        traced.append(c.shape)
        return f * c + i * g

    lstm = network(implementation, cell=replace(jaxlstm.cells.LSTM, update=update))
    params, xs, state = random_args(lstm)
    gradient = jax.jit(jax.grad(lambda params, xs: lstm(params, xs, state)[0].sum()))
    for call in (
        lambda xs: lstm(params, xs, state),
        lambda xs: gradient(params, xs),
        lambda xs: lstm.step(params, state, xs[0]),
    ):
        call(xs)
        num_traces = len(traced)
        call(xs + 1)
        assert len(traced) == num_traces
        call(np.concatenate([xs, xs], 1)[:, :BATCH_SIZE] * 2)
        assert len(traced) == num_traces
    lstm(params, xs[:-1], state)
    assert len(traced) > num_traces


@every_backend
def test_dropout_has_no_effect_with_one_layer(implementation):
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        lstm = network(implementation, dropout=0.4)
    args = random_args(lstm)
    assert_identical(lstm(*args, key=jax.random.key(5)), lstm(*args))


def test_dropout_mask_has_its_rate_and_scale():
    n, rate = 200_000, 0.3
    mask = np.asarray(dropout_mask(jax.random.key(0), rate, (n,), jnp.float64))
    assert set(np.unique(mask)) == {0.0, 1 / (1 - rate)}
    # Five standard deviations of the share of zeros among n independent elements.
    assert abs((mask == 0).mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


@every_backend
def test_remat_reduces_memory(implementation):
    """Without remat memory grows with time; with it, one chunk and the states between chunks remain."""
    xs = jax.ShapeDtypeStruct((1024, 2, 16), jnp.float32)

    def temporary_bytes(remat):
        lstm = jaxlstm.LSTM(16, 16, remat=remat, implementation=implementation)
        gradient = jax.jit(jax.grad(lambda params, xs: (lstm(params, xs)[0] ** 2).sum()))
        return gradient.lower(lstm.param_shapes(), xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32) < temporary_bytes(None) / 2


def test_params_and_state_survive_serialization():
    lstm = network(num_layers=2, bidirectional=True, proj_size=2)
    params, _, state = random_args(lstm)
    for tree in (params, state):
        assert_identical(pickle.loads(pickle.dumps(tree)), tree)
        zeros = jax.tree.map(np.zeros_like, tree)
        assert_identical(flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(tree)), tree)
    assert pickle.loads(pickle.dumps(lstm)) == lstm
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert ".layers[1].backward.w_h" in names


def test_optax_update_reduces_loss():
    lstm = network(proj_size=2)
    params, xs, state = random_args(lstm)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def loss_and_updated_params(params):
        loss, gradient = jax.value_and_grad(lambda params: (lstm(params, xs, state)[0] ** 2).sum())(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return loss, optax.apply_updates(params, updates)

    loss, params = loss_and_updated_params(params)
    assert loss_and_updated_params(params)[0] < loss


@every_backend
def test_empty_sequence_returns_initial_state(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, state = random_args(lstm)
    ys, last = lstm(params, xs[:0], state)
    assert ys.shape == (0, BATCH_SIZE, 2 * HIDDEN_SIZE)
    assert_identical(last, state)
    gradient, state_gradient = jax.jit(jax.grad(lambda p, s: lstm(p, xs[:0], s)[1].c.sum(), (0, 1)))(params, state)
    assert not any(np.any(a) for a in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(state_gradient.c, 1)


@every_backend
def test_empty_batch_returns_empty_arrays(implementation):
    lstm = network(implementation, bidirectional=True)
    params, xs, _ = random_args(lstm)
    ys, last = lstm(params, xs[:, :0])
    assert ys.shape == (NUM_STEPS, 0, 2 * HIDDEN_SIZE)
    assert last.h.shape == (2, 0, HIDDEN_SIZE)


def test_vmap_maps_ensemble_of_parameters():
    lstm = network("scan")
    params, xs, _ = random_args(lstm)
    params = jax.tree.map(lambda a: np.stack([a, 2 * a, -a]), params)
    ys, _ = jax.vmap(lstm, (0, None))(params, xs)
    assert_same(ys[2], lstm(jax.tree.map(lambda a: a[2], params), xs)[0])
