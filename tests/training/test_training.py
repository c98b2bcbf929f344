"""The training step, the optimizer, the files of parameters, and the language model."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlstm
from jaxlstm.training import train_step
from jaxlstm.training.data import text as data
from jaxlstm.training.models.language_model import (
    LanguageModel,
    evaluate,
    generate,
    restart_carry,
    training_loss,
)
from jaxlstm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxlstm.training.params_file import load_params, save_params


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax needs the default promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


TEXT = np.array([0, 1, 2, 3, 2, 1, 4] * 60, np.int32)


def make_model(dropout=0.0, num_layers=1):
    return LanguageModel(5, jaxlstm.LSTM(8, 16, num_layers=num_layers, dropout=dropout), dropout)


def adam(rate=1e-2):
    return make_optimizer(learning_rate_schedule("adamw", rate, 0.0), weight_decay=0.0, clip=1.0)


def init_state(m, optimizer, batch, *, seed=0, averaged=False):
    k_init, k_steps = jax.random.split(jax.random.key(seed))
    params = m.init(k_init)
    return train_step.init_train_state(params, optimizer, m.lstm.initial_state((batch,)), k_steps, averaged=averaged)


@partial(jax.jit, static_argnums=0)
def apply(m, params, tokens):
    """Returns the logits."""
    return m(params, tokens)[0]


@jax.jit
def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def nats(logits, targets):
    return np.asarray(cross_entropy(logits, targets))


def test_evaluate_equals_the_mean_of_one_pass_over_the_text():
    m = make_model()
    params = m.init(jax.random.key(0))
    ids = TEXT[:150]
    losses = nats(apply(m, params, ids[:-1]), ids[1:])
    # One stream makes the same predictions; several start with a window of context, so only the far past is missing.
    assert evaluate(m, params, ids, batch_size=1, window=8) == pytest.approx(losses.mean(), rel=1e-6)
    assert evaluate(m, params, ids, batch_size=4, window=64) == pytest.approx(losses.mean(), rel=1e-4)


def test_step_carries_the_state_to_the_next_window():
    """Two steps with a learning rate of 0 give the losses of one pass over both windows."""
    m = make_model(num_layers=2)
    windows = data.training_windows(TEXT, 4, 8, seed=0)
    optimizer = adam(0.0)
    state = init_state(m, optimizer, 4, seed=0)
    params = jax.tree.map(jnp.copy, state.params)
    step = train_step.make_step(training_loss(m), optimizer)
    first, second = next(windows), next(windows)
    assert first.restart
    assert not second.restart
    whole = nats(
        apply(m, params, np.concatenate([first.inputs, second.inputs])), np.concatenate([first.targets, second.targets])
    )
    state, metrics = step(state, first, 0.5)
    assert float(metrics.loss) == pytest.approx(whole[:8].mean(), rel=1e-5)
    carry = jax.tree.map(jnp.copy, state.carry)
    state, metrics = step(state, second, 0.5)
    assert float(metrics.loss) == pytest.approx(whole[8:].mean(), rel=1e-5)
    # A window that restarts the streams drops the carried state.
    alone = nats(apply(m, params, first.inputs), first.targets).mean()
    state, metrics = step(state, first, 0.5)
    assert float(metrics.loss) == pytest.approx(alone, rel=1e-5)
    assert jax.tree.structure(carry) == jax.tree.structure(state.carry)


@pytest.mark.slow
def test_language_model_learns_generates_and_is_saved(tmp_path):
    m = make_model(dropout=0.1, num_layers=2)
    optimizer = adam()
    state = init_state(m, optimizer, 8, seed=1)
    step = train_step.make_step(training_loss(m), optimizer)
    windows = data.training_windows(TEXT, 8, 14, seed=0)
    total = 250
    for n in range(total):
        state, _ = step(state, next(windows), (n + 1) / total)
    # The text has period 7; after a first 2 or 1 the next character follows from the one before.
    loss = evaluate(m, state.params, TEXT, batch_size=2, window=14)
    assert loss < 0.05
    drawn = generate(m, state.params, jnp.asarray(TEXT[:7]), 70, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(drawn, np.tile(TEXT[:7], 10))

    path = tmp_path / "best.safetensors"
    save_params(path, m.init(jax.random.key(2)))
    save_params(path, state.params)
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
    again = load_params(path, m.init)
    assert jax.tree.structure(again) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, again, state.params)


def test_load_params_refuses_missing_damaged_and_other_files(tmp_path):
    m = make_model(num_layers=2)
    path = tmp_path / "best.safetensors"
    with pytest.raises(ValueError, match=r"no checkpoint .*best.safetensors: No such file"):
        load_params(path, m.init)
    save_params(path, m.init(jax.random.key(0)))
    other = LanguageModel(6, jaxlstm.LSTM(8, 16, num_layers=2))
    with pytest.raises(ValueError, match=r"of another model: b_out is float32\[5\], expected float32\[6\]"):
        load_params(path, other.init)
    for layers in (1, 3):
        with pytest.raises(ValueError, match=r"is of another model: lstm.layers.[12].forward.b is "):
            load_params(path, LanguageModel(5, jaxlstm.LSTM(8, 16, num_layers=layers)).init)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best.safetensors is damaged"):
            load_params(path, m.init)


def test_step_skips_and_counts_non_finite_gradients():
    m = make_model()
    optimizer = make_optimizer(learning_rate_schedule("asgd", 0.5, 0.0), weight_decay=0.0, clip=1.0, name="asgd")

    def scaled_loss(params, carry, batch, key):
        window, factor = batch
        total, (value, carry) = training_loss(m)(params, carry, window, key)
        carry = jax.tree.map(lambda a: a * factor, carry)
        return total * factor, (value * factor, carry)

    def infinite_loss(params, carry, batch, key):
        """Returns an infinite loss with a finite gradient."""
        window, factor = batch
        total, aux = training_loss(m)(params, carry, window, key)
        return total + jax.lax.stop_gradient(factor - 1), aux

    windows = data.training_windows(TEXT, 4, 8, seed=0)
    scaled_step, infinite_step = (train_step.make_step(loss, optimizer) for loss in (scaled_loss, infinite_loss))
    for step, bad in ((scaled_step, np.nan), (scaled_step, np.inf), (infinite_step, np.inf)):
        state = init_state(m, optimizer, 4, averaged=True)
        state = train_step.maybe_start_averaging(state, [3.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.5])
        counts = []
        for factor in (1.0, bad, bad, 1.0, bad):
            before = jax.device_get((state.params, state.average, state.carry, state.opt_state.inner_state))
            state, metrics = step(state, (next(windows), np.float32(factor)), 0.5)
            after = jax.device_get((state.params, state.average, state.carry, state.opt_state.inner_state))
            same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before))]
            assert (all(same)) == (factor != 1.0)
            assert step is infinite_step or math.isfinite(metrics.loss) == (factor == 1.0)
            counts.append((int(metrics.skipped), int(metrics.consecutive_skipped)))
        assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
        assert int(state.average.steps) == 2


@pytest.mark.slow
def test_averaging_starts_when_validation_stops_improving():
    m = make_model()
    optimizer = make_optimizer(learning_rate_schedule("asgd", 0.5, 0.0), weight_decay=0.0, clip=1.0, name="asgd")
    state = init_state(m, optimizer, 4, seed=0, averaged=True)
    step = train_step.make_step(training_loss(m), optimizer)
    windows = data.training_windows(TEXT, 4, 8, seed=0)
    state, _ = step(state, next(windows), 0.1)
    jax.tree.map(np.testing.assert_array_equal, state.eval_params, state.params)
    falling = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    for losses in (falling, [1.0, 2.0, 3.0], [9.0, *falling[2:], 7.5]):  # improving; too few; still below 9
        assert not train_step.maybe_start_averaging(state, losses).average.started
    state = train_step.maybe_start_averaging(state, [3.0, *falling[1:6], 3.5])
    assert state.average.started
    seen = []
    for n in range(4):
        state, _ = step(state, next(windows), 0.2 + 0.1 * n)
        seen.append(jax.tree.map(np.asarray, state.params))
    mean = jax.tree.map(lambda *each: np.mean(each, 0), *seen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.eval_params, mean)
    assert np.abs(np.asarray(state.eval_params.embedding - state.params.embedding)).max() > 1e-4
    # A state without an average is returned unchanged.
    plain = init_state(m, optimizer, 4, seed=0)
    assert train_step.maybe_start_averaging(plain, [3.0, *falling[1:6], 3.5]) is plain
    assert plain.eval_params is plain.params


def test_sgd_learning_rate_is_constant_after_the_warm_up():
    with_warmup = make_optimizer(learning_rate_schedule("asgd", 0.5, 0.1), weight_decay=0.0, clip=1e9, name="asgd")
    params = jnp.zeros(3, jnp.float32)
    no_warmup = make_optimizer(learning_rate_schedule("asgd", 0.5, 0.0), weight_decay=0.0, clip=1e9, name="asgd")
    for optimizer, progress, rate in (
        (with_warmup, 0.05, 0.25),
        (with_warmup, 0.1, 0.5),
        (with_warmup, 1.0, 0.5),
        (no_warmup, 0.1, 0.5),
    ):
        update, _ = optimizer.update(2 * jnp.ones(3, jnp.float32), optimizer.init(params), params, progress=progress)
        np.testing.assert_allclose(update, -2 * rate, rtol=1e-5)


@pytest.mark.slow
def test_activation_regularization_shrinks_outputs_and_is_not_in_the_reported_loss():
    m = make_model()
    optimizer = adam(0.02)
    window = next(data.training_windows(TEXT, 4, 8, seed=0))

    def size_after(steps, **weights):
        state = init_state(m, optimizer, 4, seed=0)
        step = train_step.make_step(training_loss(m, **weights), optimizer)
        state, first = step(state, window, 0.0)
        for _ in range(steps):
            state, _ = step(state, window, 0.5)
        ys = m.outputs(state.params, window.inputs)[0]
        return float(first.loss), float((ys**2).mean()), float(((ys[1:] - ys[:-1]) ** 2).mean())

    plain, small, slow = (size_after(20, **w) for w in ({}, {"activation": 50.0}, {"temporal_activation": 50.0}))
    assert plain[0] == small[0] == slow[0]
    assert small[1] < 0.3 * plain[1]
    assert slow[2] < 0.3 * plain[2]


@pytest.mark.slow
def test_embedding_dropout_drops_all_occurrences_of_a_token():
    vocabulary, rate = 400, 0.3
    m = LanguageModel(vocabulary, jaxlstm.LSTM(8, 8, proj_size=8), tied=True, embedding_dropout=rate)
    params = m.init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).permutation(np.tile(np.arange(vocabulary), 3)).reshape(100, 12))
    shares = np.asarray(m.embed(params, tokens, jax.random.key(1)) / params.embedding[tokens])
    of_token = np.array([shares[tokens == token].ravel() for token in range(vocabulary)])
    kept = np.isclose(of_token, 1 / (1 - rate))
    assert np.all(kept.all(1) | (of_token == 0).all(1))
    assert abs((~kept).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / vocabulary)
    np.testing.assert_array_equal(m.embed(params, tokens), params.embedding[tokens])
    # The loss of each window draws a new mask; dropped tokens can still be predicted.
    window = data.Window(tokens, tokens, np.bool_(True))
    state = m.lstm.initial_state((12,))
    loss = jax.jit(lambda params, key: training_loss(m)(params, state, window, key)[0])
    assert loss(params, jax.random.key(2)) != loss(params, jax.random.key(3))
    whole = LanguageModel(vocabulary, m.lstm, tied=True)
    logits = apply(m, params, tokens)
    assert logits.shape == (100, 12, vocabulary)
    np.testing.assert_array_equal(logits, apply(whole, params, tokens))


@pytest.mark.slow
def test_tied_weights_are_one_array_with_the_sum_of_gradients():
    m = LanguageModel(5, jaxlstm.LSTM(8, 16, proj_size=8), tied=True)
    params = m.init(jax.random.key(0))
    assert params.w_out is None
    tokens = jnp.asarray(TEXT[:9])

    def loss(params, w_out):
        return (m.logits(params._replace(w_out=w_out), m.outputs(params, tokens)[0]) ** 2).sum()

    tied = jax.jit(jax.grad(loss))(params, None).embedding
    of_params, of_w_out = jax.jit(jax.grad(loss, (0, 1)))(params, params.embedding)
    np.testing.assert_allclose(tied, of_params.embedding + of_w_out, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="embedding of the size of the LSTM's outputs, got 8 and 16"):
        LanguageModel(5, jaxlstm.LSTM(8, 16), tied=True)


@pytest.mark.slow
def test_generate_draws_from_the_softmax_at_the_temperature():
    """Only the bias is nonzero, so tokens drawn at temperature t follow softmax(bias / t)."""
    m = make_model()
    params = jax.tree.map(jnp.zeros_like, m.init(jax.random.key(0)))
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    params = params._replace(b_out=jnp.asarray(logits))
    for temperature in (0.5, 1.0, 2.0):
        n = 20_000
        drawn = generate(m, params, jnp.zeros(1, jnp.int32), n, jax.random.key(0), temperature)
        fraction = np.bincount(np.asarray(drawn), minlength=5) / n
        expected = np.asarray(jax.nn.softmax(logits / np.float32(temperature)))
        assert np.all(np.abs(fraction - expected) < 5 * np.sqrt(expected * (1 - expected) / n))
    drawn = generate(m, params, jnp.zeros(1, jnp.int32), 10, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(drawn, 2)


def test_learning_rate_follows_progress():
    """The first update of Adam has the size of the learning rate, for any gradient."""
    schedule = learning_rate_schedule("adamw", 0.5, 0.1)
    optimizer = make_optimizer(schedule, weight_decay=0.0, clip=1e9)
    params = jnp.zeros(3, jnp.float32)

    def rate(progress):
        update, _ = optimizer.update(jnp.ones(3, jnp.float32), optimizer.init(params), params, progress=progress)
        return -float(update[0])

    assert rate(0.05) == pytest.approx(0.25, rel=1e-5)
    assert rate(0.1) == pytest.approx(0.5, rel=1e-5)
    half = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rate(0.55) == pytest.approx(half, rel=1e-4)
    assert rate(1.0) == pytest.approx(0.005, rel=1e-4)
    for progress in (0.05, 0.1, 0.55, 1.0):  # the metrics record the schedule of the optimizer
        assert rate(progress) == pytest.approx(float(schedule(progress)), rel=1e-6)


@pytest.mark.parametrize(
    "network",
    [
        jaxlstm.LSTM(3, 4, cell="peephole", learned_state=True, layer_norm=True, proj_size=2),
        jaxlstm.ConvLSTM(2, 3, (4,), cell="peephole", learned_state=True),
    ],
    ids=["LSTM", "ConvLSTM"],
)
def test_optimizer_decays_by_role_and_not_by_number_of_axes(network):
    params = {"lstm": network.init(jax.random.key(0)), "embedding": jnp.ones((3, 2)), "b_out": jnp.ones((2, 2))}
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = make_optimizer(learning_rate_schedule("adamw", 1.0, 0.0), weight_decay=0.1, clip=1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, progress=0.0)
    leaves = jax.tree_util.tree_flatten_with_path(updates)[0]
    decayed = {jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-1] for path, a in leaves if a.any()}
    assert decayed == {"w_x", "w_h", "embedding"} | ({"w_p"} if isinstance(network, jaxlstm.LSTM) else set())
    assert sum(not a.any() for _, a in leaves) >= 5


def test_optimizer_decays_matrices_and_clips_gradients():
    decayed = make_optimizer(learning_rate_schedule("adamw", 1.0, 0.0), weight_decay=0.1, clip=1.0)
    params = {"w": jnp.full((2, 2), 3.0, jnp.float32), "b": jnp.full(2, 3.0, jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zeros, decayed.init(params), params, progress=0.0)
    np.testing.assert_allclose(updates["w"], -0.3, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)
    long = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), params)
    _, state = decayed.update(long, decayed.init(params), params, progress=0.0)
    mean = optax.tree.get(state, "mu")
    # Adam's first moment is a tenth of the clipped gradient, whose norm is 1.
    assert float(optax.tree.norm(mean)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("restart", [True, False])
def test_a_window_starts_from_the_initial_state_of_the_cell_or_from_the_carried_one(restart):
    """The stabilizer of an sLSTM starts at minus infinity, not at zero."""
    m = LanguageModel(5, jaxlstm.RNN(8, 16, cell="slstm"))
    window = data.Window(TEXT[:8].reshape(4, 2), TEXT[1:9].reshape(4, 2), np.bool_(restart))
    params = m.init(jax.random.key(0))
    initial = m.lstm.initial_state((2,))
    carry = jax.tree.map(jnp.ones_like, initial)
    start = restart_carry(m, params, carry, window)
    jax.tree.map(np.testing.assert_array_equal, start, initial if restart else carry)
