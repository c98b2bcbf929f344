"""The training step, evaluation, sampling and checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlstm
from jaxlstm.training import train_step
from jaxlstm.training.data import text as data
from jaxlstm.training.models.language_model import LanguageModel, evaluate, generate, training_loss


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax relies on JAX's usual promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


TEXT = np.array([0, 1, 2, 3, 2, 1, 4] * 60, np.int32)


def model(dropout=0.0):
    return LanguageModel(5, jaxlstm.LSTM(8, 16, num_layers=2, dropout=dropout), dropout)


def adam(rate=1e-2):
    return train_step.optimizer(rate, warmup=0.0, weight_decay=0.0, clip=1.0)


def begin(m, optimizer, batch, *, seed=0, averaged=False):
    k_init, k_steps = jax.random.split(jax.random.key(seed))
    params = m.init(k_init)
    return train_step.start(params, optimizer, m.lstm.initial_state((batch,)), k_steps, averaged=averaged)


def nats(logits, targets):
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def test_evaluation_equals_the_mean_over_one_pass_through_the_text():
    m = model()
    params = m.init(jax.random.key(0))
    ids = TEXT[:150]
    losses = nats(m(params, jnp.asarray(ids[:-1]))[0], ids[1:])
    # One stream: the very same predictions. Several: each is led in by a window, so only the far past is missing.
    assert evaluate(m, params, ids, batch=1, window=8) == pytest.approx(losses.mean(), rel=1e-6)
    assert evaluate(m, params, ids, batch=4, window=64) == pytest.approx(losses.mean(), rel=1e-4)


def test_the_state_is_carried_and_its_gradient_stops():
    """Two steps at rate 0 give the losses of one long run; the second one's gradient is its own window's alone."""
    m = model()
    windows = data.training_windows(TEXT, 4, 8, seed=0)
    optimizer = adam(0.0)
    state = begin(m, optimizer, 4, seed=0)
    params = jax.tree.map(jnp.copy, state.params)
    step = train_step.make_step(training_loss(m), optimizer)
    first, second = next(windows), next(windows)
    assert first.first
    assert not second.first
    whole = nats(
        m(params, np.concatenate([first.inputs, second.inputs]))[0], np.concatenate([first.targets, second.targets])
    )
    state, outcome = step(state, first, 0.5)
    assert float(outcome.loss) == pytest.approx(whole[:8].mean(), rel=1e-5)
    carry = jax.tree.map(jnp.copy, state.carry)
    state, outcome = step(state, second, 0.5)
    assert float(outcome.loss) == pytest.approx(whole[8:].mean(), rel=1e-5)
    # A window that begins the streams does not see what was carried.
    alone = nats(m(params, jnp.asarray(first.inputs))[0], first.targets).mean()
    state, outcome = step(state, first, 0.5)
    assert float(outcome.loss) == pytest.approx(alone, rel=1e-5)
    assert jax.tree.structure(carry) == jax.tree.structure(state.carry)


@pytest.mark.slow
def test_it_learns_and_writes_what_it_has_learnt(tmp_path):
    m = model(dropout=0.1)
    optimizer = adam()
    state = begin(m, optimizer, 8, seed=1)
    step = train_step.make_step(training_loss(m), optimizer)
    windows = data.training_windows(TEXT, 8, 14, seed=0)
    total = 250
    for n in range(total):
        state, _ = step(state, next(windows), (n + 1) / total)
    # The text has period 7; after a first 2 or 1, what follows is known from the character before it.
    loss = evaluate(m, state.params, TEXT, batch=2, window=14)
    assert loss < 0.05
    drawn = generate(m, state.params, jnp.asarray(TEXT[:7]), 70, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(drawn, np.tile(TEXT[:7], 10))

    path = tmp_path / "best.msgpack"
    train_step.save_params(path, m.init(jax.random.key(2)))
    train_step.save_params(path, state.params)
    assert [p.name for p in tmp_path.iterdir()] == ["best.msgpack"]
    again = train_step.load_params(path, m.init)
    assert jax.tree.structure(again) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, again, state.params)


def test_a_checkpoint_that_is_not_one_of_this_model(tmp_path):
    m = model()
    path = tmp_path / "best.msgpack"
    with pytest.raises(ValueError, match=r"no checkpoint .*best.msgpack: No such file"):
        train_step.load_params(path, m.init)
    train_step.save_params(path, m.init(jax.random.key(0)))
    other = LanguageModel(6, jaxlstm.LSTM(8, 16, num_layers=2))
    with pytest.raises(ValueError, match=r"of another model: embedding has shape \(5, 8\), expected \(6, 8\)"):
        train_step.load_params(path, other.init)
    for layers in (1, 3):
        with pytest.raises(ValueError, match="is damaged or of another model"):
            train_step.load_params(path, LanguageModel(5, jaxlstm.LSTM(8, 16, num_layers=layers)).init)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best.msgpack is damaged or of another model: ."):
            train_step.load_params(path, m.init)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    m = model()
    optimizer = train_step.optimizer(0.5, warmup=0.0, weight_decay=0.0, clip=1.0, kind="asgd")

    def poisoned(params, carry, batch, key):
        window, factor = batch
        total, (value, carry) = training_loss(m)(params, carry, window, key)
        carry = jax.tree.map(lambda a: a * factor, carry)
        return total * factor, (value * factor, carry)

    def infinite(params, carry, batch, key):
        """Its loss is infinite, its gradient is not."""
        window, factor = batch
        total, aux = training_loss(m)(params, carry, window, key)
        return total + jax.lax.stop_gradient(factor - 1), aux

    windows = data.training_windows(TEXT, 4, 8, seed=0)
    for loss, bad in ((poisoned, np.nan), (poisoned, np.inf), (infinite, np.inf)):
        step = train_step.make_step(loss, optimizer)
        state = begin(m, optimizer, 4, averaged=True)
        state = train_step.begin_average(state, [3.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.5])
        counts = []
        for factor in (1.0, bad, bad, 1.0, bad):
            before = jax.device_get((state.params, state.average, state.carry, state.opt_state.inner_state))
            state, outcome = step(state, (next(windows), np.float32(factor)), 0.5)
            after = jax.device_get((state.params, state.average, state.carry, state.opt_state.inner_state))
            same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before))]
            assert (all(same)) == (factor != 1.0)
            assert loss is infinite or math.isfinite(outcome.loss) == (factor == 1.0)
            counts.append((int(outcome.skipped), int(outcome.in_a_row)))
        assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
        assert int(state.average.steps) == 2


def test_averaging_begins_when_validation_stops_getting_better_and_is_a_mean_over_steps():
    m = model()
    optimizer = train_step.optimizer(0.5, warmup=0.0, weight_decay=0.0, clip=1.0, kind="asgd")
    state = begin(m, optimizer, 4, seed=0, averaged=True)
    step = train_step.make_step(training_loss(m), optimizer)
    windows = data.training_windows(TEXT, 4, 8, seed=0)
    state, _ = step(state, next(windows), 0.1)
    jax.tree.map(np.testing.assert_array_equal, state.trained, state.params)
    falling = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    for losses in (falling, [1.0, 2.0, 3.0], [9.0, *falling[2:], 7.5]):  # getting better; too few; still below 9
        assert not train_step.begin_average(state, losses).average.began
    state = train_step.begin_average(state, [3.0, *falling[1:6], 3.5])
    assert state.average.began
    seen = []
    for n in range(4):
        state, _ = step(state, next(windows), 0.2 + 0.1 * n)
        seen.append(jax.tree.map(np.asarray, state.params))
    mean = jax.tree.map(lambda *each: np.mean(each, 0), *seen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.trained, mean)
    assert np.abs(np.asarray(state.trained.embedding - state.params.embedding)).max() > 1e-4
    # Without averaging there is nothing to begin.
    plain = begin(m, optimizer, 4, seed=0)
    assert train_step.begin_average(plain, [3.0, *falling[1:6], 3.5]) is plain
    assert plain.trained is plain.params


def test_sgd_keeps_its_learning_rate_after_the_warm_up():
    optimizer = train_step.optimizer(0.5, warmup=0.1, weight_decay=0.0, clip=1e9, kind="asgd")
    params = jnp.zeros(3, jnp.float32)
    at_once = train_step.optimizer(0.5, warmup=0.0, weight_decay=0.0, clip=1e9, kind="asgd")
    for made, progress, rate in (
        (optimizer, 0.05, 0.25),
        (optimizer, 0.1, 0.5),
        (optimizer, 1.0, 0.5),
        (at_once, 0.1, 0.5),
    ):
        update, _ = made.update(2 * jnp.ones(3, jnp.float32), made.init(params), params, progress=progress)
        np.testing.assert_allclose(update, -2 * rate, rtol=1e-5)


@pytest.mark.slow
def test_activation_terms_shrink_what_they_weigh_and_stay_out_of_the_reported_loss():
    m = model()
    optimizer = adam(0.02)
    window = next(data.training_windows(TEXT, 4, 8, seed=0))

    def size_after(steps, **weights):
        state = begin(m, optimizer, 4, seed=0)
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


def test_a_dropped_embedding_is_dropped_wherever_its_token_stands():
    vocabulary, rate = 400, 0.3
    m = LanguageModel(vocabulary, jaxlstm.LSTM(8, 8, proj_size=8), tied=True, embedding_dropout=rate)
    params = m.init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).permutation(np.tile(np.arange(vocabulary), 3)).reshape(100, 12))
    shares = np.asarray(m.inputs(params, tokens, jax.random.key(1)) / params.embedding[tokens])
    of_token = np.array([shares[tokens == token].ravel() for token in range(vocabulary)])
    kept = np.isclose(of_token, 1 / (1 - rate))
    assert np.all(kept.all(1) | (of_token == 0).all(1))
    assert abs((~kept).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / vocabulary)
    np.testing.assert_array_equal(m.inputs(params, tokens), params.embedding[tokens])
    # A window's loss draws a mask of its own; what is dropped there is still among what can be predicted.
    window = data.Window(tokens, tokens, np.bool_(True))
    state = m.lstm.initial_state((12,))
    reads = jax.jit(lambda params, key: training_loss(m)(params, state, window, key)[0])
    assert reads(params, jax.random.key(2)) != reads(params, jax.random.key(3))
    whole = LanguageModel(vocabulary, m.lstm, tied=True)
    assert m(params, tokens)[0].shape == (100, 12, vocabulary)
    np.testing.assert_array_equal(m(params, tokens)[0], whole(params, tokens)[0])


def test_tied_weights_are_one_array_with_one_gradient():
    m = LanguageModel(5, jaxlstm.LSTM(8, 16, proj_size=8), tied=True)
    params = m.init(jax.random.key(0))
    assert params.w_out is None
    tokens = jnp.asarray(TEXT[:9])

    def loss(params, w_out):
        return (m.logits(params._replace(w_out=w_out), m.outputs(params, tokens)[0]) ** 2).sum()

    tied = jax.grad(loss)(params, None).embedding
    apart = sum((jax.grad(loss)(params, params.embedding).embedding, jax.grad(loss, 1)(params, params.embedding)))
    np.testing.assert_allclose(tied, apart, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="embedding of the size of the LSTM's outputs, got 8 and 16"):
        LanguageModel(5, jaxlstm.LSTM(8, 16), tied=True)


def test_temperature_shapes_the_distribution():
    """Logits known from the bias alone: draws at temperature t follow softmax(logits / t)."""
    m = model()
    params = jax.tree.map(jnp.zeros_like, m.init(jax.random.key(0)))
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    params = params._replace(b_out=jnp.asarray(logits))
    for temperature in (0.5, 1.0, 2.0):
        n = 20_000
        drawn = generate(m, params, jnp.zeros(1, jnp.int32), n, jax.random.key(0), temperature)
        share = np.bincount(np.asarray(drawn), minlength=5) / n
        wanted = np.asarray(jax.nn.softmax(logits / np.float32(temperature)))
        assert np.all(np.abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / n))
    drawn = generate(m, params, jnp.zeros(1, jnp.int32), 10, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(drawn, 2)


def test_the_learning_rate_rises_and_falls_with_progress():
    """The first update of Adam has the size of the learning rate, whatever the gradient."""
    optimizer = train_step.optimizer(0.5, warmup=0.1, weight_decay=0.0, clip=1e9)
    params = jnp.zeros(3, jnp.float32)

    def rate(progress):
        update, _ = optimizer.update(jnp.ones(3, jnp.float32), optimizer.init(params), params, progress=progress)
        return -float(update[0])

    assert rate(0.05) == pytest.approx(0.25, rel=1e-5)
    assert rate(0.1) == pytest.approx(0.5, rel=1e-5)
    half = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rate(0.55) == pytest.approx(half, rel=1e-4)
    assert rate(1.0) == pytest.approx(0.005, rel=1e-4)


def test_weight_decay_is_for_matrices_and_long_gradients_are_clipped():
    decayed = train_step.optimizer(1.0, warmup=0.0, weight_decay=0.1, clip=1.0)
    params = {"w": jnp.full((2, 2), 3.0, jnp.float32), "b": jnp.full(2, 3.0, jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zeros, decayed.init(params), params, progress=0.0)
    np.testing.assert_allclose(updates["w"], -0.3, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)
    long = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), params)
    _, state = decayed.update(long, decayed.init(params), params, progress=0.0)
    mean = optax.tree.get(state, "mu")
    # Adam's first mean is a tenth of the clipped gradient, whose norm is 1.
    assert float(optax.tree.norm(mean)) == pytest.approx(0.1, rel=1e-5)
