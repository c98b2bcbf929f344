"""The residual stack against a float64 NumPy oracle, its properties and its errors."""

import itertools
import pickle
import re
import warnings
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random_params
from parity import assert_close, assert_within
from tolerance import narrow_operands

import jaxlstm
from jaxlstm.dropout import dropout, regularizer_key

T, B = 5, 3
LENGTHS = np.array([T, 0, T - 2])
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
RESETS = np.array([[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
ALL_MASKS = {"lengths": LENGTHS, "mask": MASK, "resets": RESETS}

# Name: input size, options of the network, options of the call.
CASES = {
    "three layers": (3, {"num_layers": 3}, {}),
    "feed-forward": (3, {"num_layers": 2, "feed_forward": 6}, ALL_MASKS),
    "input of the width, no bias": (4, {"use_bias": False, "feed_forward": 2}, {**ALL_MASKS, "reverse": True}),
    "bidirectional projection learned state": (
        3, {"num_layers": 2, "feed_forward": 5, "bidirectional": True, "proj_size": 2, "learned_state": True},
        ALL_MASKS,
    ),
    "gru": (3, {"num_layers": 2, "cell": "gru", "layer_norm": True, "remat": 2}, {"resets": RESETS}),
    "static": (3, {"num_layers": 2, "cell": "ea", "static_size": 2}, {"lengths": LENGTHS}),
    "dropout": (
        3, {"num_layers": 2, "feed_forward": 6, "dropout": 0.4, "input_dropout": 0.3, "output_dropout": 0.2},
        {**ALL_MASKS, "key": jax.random.key(7)},
    ),
    "variational": (
        3, {"num_layers": 1, "feed_forward": 6, "dropout": 0.4, "variational": True}, {"key": jax.random.key(7)},
    ),
}  # fmt: skip
QUICK = [("feed-forward", "fused")]
TABLE = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(CASES, ("scan", "fused"))
]


def network(name, **options):
    """Makes the network of a case; in float64 unless ``param_dtype`` is given."""
    input_size, fixed, _ = CASES[name]
    return jaxlstm.ResidualStack(input_size, 4, **{"param_dtype": jnp.float64, **fixed, **options})


@lru_cache
def random_args(name):
    """Draws parameters, inputs, a nonzero initial state, and weights of a loss over all results."""
    stack = network(name)
    rng = np.random.default_rng(len(name))
    params = random_params(stack, rng)
    xs = rng.standard_normal((T, B, stack.input_size))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), stack.state_shapes((B,)))
    ys = rng.standard_normal((T, B, stack.num_directions * stack.output_size))
    return params, xs, state, (ys, jax.tree.map(lambda a: rng.standard_normal(a.shape), state))


def call_options(name):
    options = dict(CASES[name][2])
    if network(name).static_size is not None:
        options["static"] = np.random.default_rng(1).standard_normal((B, 2))
    return options


def loss(result, cotangents):
    """Computes a scalar in which every number that a network returns has its own weight."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(cotangents), strict=True)
    return sum((a * b).sum((-3, -2, -1)) for a, b in pairs)


def per_unit(vector, like):
    """Adds axes of steps and sequences to ``(..., units)``."""
    return vector.reshape(*vector.shape[:-1], *[1] * (like.ndim - vector.ndim), vector.shape[-1])


def over_steps(w, xs):
    """Multiplies ``w (..., m, n)`` by every vector of ``xs (..., T, B, n)``."""
    return np.einsum("...ij,...tbj->...tbi", w, xs)


def normalize(x, gain):
    x = x - x.mean(-1, keepdims=True)
    return per_unit(gain, x) * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def drop_factors(stack, key):
    """Draws the factors of dropout: of the inputs, of the summands by layer and part, and of the outputs."""
    if key is None:
        return 1.0, lambda n, number: 1.0, 1.0
    width = stack.num_directions * stack.output_size

    def draw(key, rate, size, over_time):
        return np.asarray(dropout(key, rate, jnp.ones((T, B, size)), over_time=over_time))

    def summand(n, number):
        return draw(regularizer_key(key, n, number), stack.dropout, width, not stack.variational)

    inputs = draw(regularizer_key(key, 0, 3), stack.input_dropout, stack.input_size, False)
    return inputs, summand, draw(regularizer_key(key, 0, 4), stack.output_dropout, width, False)


def run_oracle(stack, params, xs, state, *, key=None, reverse=False, **options):
    """Computes ``(ys, state)`` by the equations of `jaxlstm.residual`, one recurrent layer of the oracle at a time."""
    step_mask = np.array(options.get("mask", np.ones((T, B), bool)))
    if "lengths" in options:
        step_mask &= np.arange(T)[:, None] < options["lengths"]
    residual, directions = params.residual, stack.num_directions
    input_factor, factor, output_factor = drop_factors(stack, key)
    stream = np.where(step_mask[..., None], xs, 0) * input_factor
    if residual.w_in is not None:
        stream = over_steps(residual.w_in, stream)
    states = []
    for n, (layer, block) in enumerate(zip(params.layers, residual.blocks)):
        rows = slice(n * directions, (n + 1) * directions)
        learned = None if params.state is None else jax.tree.map(lambda a, r=rows: a[..., r, :], params.state)
        c = oracle.each_state(lambda a, r=rows: a[..., r, :, :], state.c)
        ys, *last = oracle.network(
            jaxlstm.Params((layer,), learned), normalize(stream, block.norm), state.h[..., rows, :, :], c,
            cell=stack.cell, reverse=reverse, **options,
        )  # fmt: skip
        states.append(last)
        stream = stream + factor(n, 5) * ys
        if (part := block.feed_forward) is not None:
            hidden = over_steps(part.w_up, normalize(stream, part.norm))
            hidden = gelu(hidden if part.b_up is None else hidden + per_unit(part.b_up, hidden))
            added = over_steps(part.w_down, hidden)
            added = added if part.b_down is None else added + per_unit(part.b_down, added)
            stream = stream + factor(n, 6) * added
    ys = np.where(step_mask[..., None], normalize(stream, residual.norm), 0) * output_factor
    h, c = (None if a[0] is None else concatenate(a) for a in zip(*states))
    return ys, jaxlstm.State(h, c)


def concatenate(arrays):
    """Concatenates states over layers, whose leading axes may differ."""
    leading = np.broadcast_shapes(*(a.shape[:-3] for a in arrays))
    return np.concatenate([np.broadcast_to(a, (*leading, *a.shape[-3:])) for a in arrays], axis=-3)


@lru_cache
def expected(name):
    """Computes by the oracle ``(ys, state)`` and the gradient of `loss` with respect to ``(params, xs, state)``."""
    *args, cotangents = random_args(name)
    leaves, tree = jax.tree.flatten(tuple(args))

    def run(leaves):
        return run_oracle(network(name), *jax.tree.unflatten(tree, leaves), **call_options(name))

    gradient = oracle.gradient(lambda leaves: loss(run(leaves), cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, gradient)


def num_terms(name):
    """Bounds the number of additions behind one result; the factor is for layer normalization, as in `parity`."""
    stack = network(name)
    return 5**4 * random_args(name)[1].size * stack.num_layers * stack.num_directions


def assert_same(a, b):
    """Compares trees up to rounding in float64."""
    assert_close(a, b, np.float64, 10_000)


def value_and_gradient(stack, name):
    *_, cotangents = random_args(name)

    def run(*args):
        result = stack(*args, **call_options(name))
        return loss(result, cotangents), result

    return jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("name", "implementation"), TABLE)
def test_outputs_and_gradients_equal_oracle(name, implementation):
    *args, _ = random_args(name)
    gradient, result = value_and_gradient(network(name, implementation=implementation), name)(*args)
    expected_result, expected_gradient = expected(name)
    assert_close(result, expected_result, np.float64, num_terms(name))
    assert_close(gradient, expected_gradient, np.float64, num_terms(name))


@pytest.mark.slow
def test_bfloat16_equals_oracle():
    name = "feed-forward"
    stack = network(name, param_dtype=jnp.float32, dtype=jnp.bfloat16)
    args = jax.tree.map(lambda a: np.asarray(a, np.float32), random_args(name)[:3])
    ys, state = stack(*args, **ALL_MASKS)
    assert ys.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert_within((ys, state), expected(name)[0], narrow_operands(jnp.bfloat16, 4 * T))


@pytest.mark.parametrize("name", ["feed-forward", pytest.param("gru", marks=pytest.mark.slow)])
def test_step_by_step_equals_sequence(name):
    stack = network(name)
    params, xs, state, _ = random_args(name)
    whole = stack(params, xs, state, resets=RESETS)
    step, outputs = jax.jit(stack.step), []
    for x, reset in zip(xs, RESETS):
        state, y = step(params, state, x, reset=reset)
        outputs.append(y)
    assert_same(whole, (np.stack(outputs), state))


def test_skipped_inputs_reach_no_output_or_gradient():
    name = "bidirectional projection learned state"
    params, xs, state, _ = random_args(name)
    step_mask = MASK & (np.arange(T)[:, None] < LENGTHS)
    run = value_and_gradient(network(name), name)
    wanted = run(params, xs, state)
    jax.tree.map(np.testing.assert_array_equal, run(params, np.where(step_mask[..., None], xs, np.nan), state), wanted)
    (_, xs_gradient, _), (ys, last) = wanted
    assert np.all(np.isfinite(ys))
    assert not np.any(np.asarray(ys)[~step_mask])
    assert not np.any(np.asarray(xs_gradient)[~step_mask])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 1], b[:, 1]), last, state)  # of length 0


@pytest.mark.slow
def test_sequence_cut_in_two_equals_whole():
    stack = network("feed-forward")
    params, xs, state, _ = random_args("feed-forward")
    whole = stack(params, xs, state)
    first, middle = stack(params, xs[:2], state)
    second, last = stack(params, xs[2:], middle)
    assert_same(whole, (np.concatenate([first, second]), last))


@pytest.mark.slow
def test_vmap_equals_batch():
    name = "bidirectional projection learned state"
    stack = network(name)
    params, xs, state, _ = random_args(name)

    def run(x, state, length, mask, resets):
        return stack(params, x, state, lengths=length, mask=mask, resets=resets)

    mapped = jax.vmap(run, (1, 1, 0, 1, 1), out_axes=1)(xs, state, LENGTHS, MASK, RESETS)
    assert_same(mapped, expected(name)[0])


@pytest.mark.slow
def test_layers_without_outputs_pass_inputs_on():
    """With recurrent layers and feed-forward parts of zeros, the outputs are the normalized inputs."""
    stack = jaxlstm.ResidualStack(4, 4, num_layers=2, feed_forward=3, param_dtype=jnp.float64)
    params = jax.tree.map(jnp.zeros_like, stack.init(jax.random.key(0)))
    params = params._replace(residual=params.residual._replace(norm=jnp.ones(4)))
    xs = np.random.default_rng(0).standard_normal((T, B, 4))
    assert_same(stack(params, xs)[0], normalize(xs, np.ones(4)))


@pytest.mark.slow
def test_init_draws_independent_arrays_with_unit_gains():
    stack = jaxlstm.ResidualStack(16, 32, num_layers=2, feed_forward=64)
    params = stack.init(jax.random.key(0))
    residual, first = params.residual, params.residual.blocks[0]
    assert np.all(residual.norm == 1)
    assert np.all(first.norm == 1)
    assert not np.any(first.feed_forward.b_up)
    bound = np.sqrt(6 / (64 + 32))
    assert 0.95 * bound < np.abs(first.feed_forward.w_up).max() <= bound
    assert np.abs(residual.w_in).max() <= np.sqrt(6 / (16 + 32))
    matrices = [a for a in jax.tree.leaves(params) if a.ndim == 2]
    assert len({np.asarray(a).tobytes() for a in matrices}) == len(matrices) == 9
    assert stack.num_parameters == sum(a.size for a in jax.tree.leaves(params))


def test_configuration_is_hashable_and_compares_by_value(capsys):
    stack = jaxlstm.ResidualStack(3, 4, num_layers=2, feed_forward=np.int64(8))
    assert hash(stack) == hash(replace(stack))
    assert stack == pickle.loads(pickle.dumps(stack))
    assert repr(stack) == "ResidualStack(3, 4, num_layers=2, feed_forward=8)"
    stack.summary()
    assert re.search(r"residual.blocks\[1\].feed_forward.w_up +\(8, 4\) +32", capsys.readouterr().out)


def test_dropout_of_one_layer_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxlstm.ResidualStack(3, 4, dropout=0.5, variational=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feed_forward": 0}, ValueError, "feed_forward"),
        ({"feed_forward": "4H"}, TypeError, "feed_forward"),
        ({"hidden_size": 0}, ValueError, "hidden_size"),
    ],
)
def test_wrong_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        jaxlstm.ResidualStack(**{"input_size": 3, "hidden_size": 4} | options)


def test_parameters_of_plain_stack_raise():
    stack, lstm = jaxlstm.ResidualStack(4, 4), jaxlstm.LSTM(4, 4)
    xs = jnp.ones((T, B, 4))
    with pytest.raises(ValueError, match=re.escape("params.residual.blocks[0].norm is missing")):
        stack(lstm.init(jax.random.key(0)), xs)
    with pytest.raises(ValueError, match=re.escape("params.residual.blocks[0].norm is not a parameter of this")):
        lstm(stack.init(jax.random.key(0)), xs)


def test_functions_for_plain_stacks_refuse_residual_stack():
    stack = jaxlstm.ResidualStack(4, 4)
    params, xs = stack.init(jax.random.key(0)), jnp.ones((T, B, 4))
    with pytest.raises(ValueError, match="residual"):
        jaxlstm.interop.to_torch(stack, params)
    with pytest.raises(ValueError, match="plain stacks"):
        jaxlstm.export.to_c(stack, params)
    with pytest.raises(ValueError, match="set jacobian=None"):
        jaxlstm.diagnostics.gradient_flow(stack, params, xs, jnp.sum)


@pytest.mark.slow
def test_trace_records_layers():
    name = "feed-forward"
    params, xs, state, _ = random_args(name)
    traced = jaxlstm.diagnostics.trace(network(name), params, xs, state, **ALL_MASKS)
    assert_close((traced.ys, traced.state), expected(name)[0], np.float64, num_terms(name))
    assert len(traced.layers) == 2


@pytest.mark.slow
def test_gradient_reaches_first_step_of_deep_stack():
    """Eight plain layers pass less of the gradient down to the inputs than eight residual ones."""
    xs = np.random.default_rng(0).standard_normal((T, B, 8))

    def input_gradient(network):
        params = network.init(jax.random.key(0))
        return float(jnp.linalg.norm(jax.grad(lambda xs: network(params, xs)[0][..., 0].sum())(xs)))

    plain, residual = (
        input_gradient(make(8, 8, num_layers=8, param_dtype=jnp.float64))
        for make in (jaxlstm.LSTM, jaxlstm.ResidualStack)
    )
    assert residual > 100 * plain


@pytest.mark.slow
def test_tuning_saves_and_loads_residual_stack(tmp_path):
    stack = jaxlstm.ResidualStack(3, 4, feed_forward=5)
    tuning = jaxlstm.autotune(stack, (4, 2, 3), seconds=2)
    tuning.save(tmp_path / "tuning.json")
    assert jaxlstm.load_tuning(tmp_path / "tuning.json").lstm == tuning.lstm
    assert tuning.lstm.feed_forward == 5
