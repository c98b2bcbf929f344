"""The Flax modules compute what the network computes, inside Flax's own scans, transforms and optimizers."""

import re
import subprocess
import sys
from functools import lru_cache, partial
from typing import Any, NamedTuple

import cases
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from tolerance import tolerance

import jaxlstm
import jaxlstm.flax

STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = np.array([6, 4, 1])
SINGLE = jaxlstm.LSTM(INPUT, HIDDEN, param_dtype="float64")
STACKED = jaxlstm.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True, proj_size=3, param_dtype="float64")
XS = np.random.default_rng(0).standard_normal((STEPS, BATCH, INPUT))
INPUTS = XS.swapaxes(0, 1)  # batch-major, as Flax has them


def random_params(lstm, seed=0):
    return jax.tree.map(jnp.asarray, cases.random_params(lstm, np.random.default_rng(seed), lstm.param_dtype))


def random_state(lstm):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), lstm.state_shapes((BATCH,)))


def batch_major(ys):
    return ys.swapaxes(0, 1)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance(np.float64, 100))


class NnxApi:
    """The modules of nnx behind the interface that the tests of both APIs use."""

    def network(self, lstm, params, **options):
        return jaxlstm.flax.LSTM(lstm, params=params, **options)

    def rnn_of_cell(self, lstm, params):
        """Returns `LSTMCell` in the `RNN` of Flax."""
        return nnx.RNN(jaxlstm.flax.LSTMCell(lstm, params=params))

    def flax_rnn(self, params):
        """Returns Flax's own cell in its `RNN`, with the same weights."""
        weights = params.layers[0].forward
        cell = nnx.OptimizedLSTMCell(INPUT, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        cell.dense_i.kernel[...] = weights.w_x.T
        cell.dense_h.kernel[...] = weights.w_h.T
        cell.dense_h.bias[...] = weights.b
        return nnx.RNN(cell)

    def flax_gru(self):
        """Returns Flax's GRU cell with random weights in its `RNN`, and the same weights as parameters."""
        cell = nnx.GRUCell(
            INPUT, HIDDEN, param_dtype=jnp.float64, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)
        )
        slabs = np.split(cell.dense_i.bias[...], 3)
        b = np.concatenate([*slabs, np.zeros(HIDDEN)])  # no bias of the candidate's part that reads h
        weights = jaxlstm.Weights(cell.dense_i.kernel[...].T, cell.dense_h.kernel[...].T, jnp.asarray(b))
        return nnx.RNN(cell), jaxlstm.Params((jaxlstm.Layer(weights),))

    def bidirectional(self, forward, backward):
        return nnx.Bidirectional(forward, backward)

    def apply(self, module, *args, **options):
        return module(*args, **options)

    def jitted_apply(self, module, *args, **options):
        """Applies the module in one compiled program; ``options`` other than arrays are static."""
        arrays = {name: options.pop(name) for name in ("initial_carry", "seq_lengths") if name in options}
        graph, state = nnx.split(module)
        return jax.jit(lambda state, args, arrays: nnx.merge(graph, state)(*args, **arrays, **options))(
            state, args, arrays
        )

    def step(self, module, state, x):
        return module.step(state, x)

    def gradient(self, module, loss):
        """Returns the gradient of ``loss(apply)`` with respect to the parameters, as a list."""
        gradient = nnx.jit(nnx.grad(lambda m: loss(lambda *args, **options: m(*args, **options))))(module)
        leaves = jax.tree.leaves(nnx.to_pure_dict(gradient))
        assert len(leaves) == len(jax.tree.leaves(nnx.state(module, nnx.Param)))
        return leaves


class BoundModule(NamedTuple):
    """A linen module together with its variables."""

    module: nn.Module
    variables: dict[str, Any]


class LinenApi:
    """The modules of linen behind the same interface."""

    def network(self, lstm, params, **options):
        module = jaxlstm.flax.linen.LSTM(lstm, **options)
        shapes = jax.eval_shape(partial(module.init, deterministic=True), jax.random.key(0), INPUTS)
        assert jax.tree.structure(shapes["params"]["lstm"]) == jax.tree.structure(params)
        return BoundModule(module, {"params": {"lstm": params}})

    def rnn_of_cell(self, lstm, params):
        module = nn.RNN(jaxlstm.flax.linen.LSTMCell(lstm))
        shapes = jax.eval_shape(module.init, jax.random.key(0), INPUTS)
        assert jax.tree.structure(shapes["params"]["cell"]["lstm"]) == jax.tree.structure(params)
        return BoundModule(module, {"params": {"cell": {"lstm": params}}})

    def flax_rnn(self, params):
        weights = params.layers[0].forward
        cell_params = {}
        for n, gate in enumerate("ifgo"):
            rows = slice(n * HIDDEN, (n + 1) * HIDDEN)
            cell_params[f"i{gate}"] = {"kernel": weights.w_x[rows].T}
            cell_params[f"h{gate}"] = {"kernel": weights.w_h[rows].T, "bias": weights.b[rows]}
        module = nn.RNN(nn.OptimizedLSTMCell(HIDDEN, param_dtype=jnp.float64))
        return BoundModule(module, {"params": {"cell": cell_params}})

    def flax_gru(self):
        module = nn.RNN(nn.GRUCell(HIDDEN, param_dtype=jnp.float64, bias_init=nn.initializers.normal()))
        variables = jax.jit(module.init)(jax.random.key(0), INPUTS)
        dense = variables["params"]["cell"]

        def stack(names, array):
            return jnp.concatenate([dense[name][array].T for name in names])

        w_x, w_h = stack(("ir", "iz", "in"), "kernel"), stack(("hr", "hz", "hn"), "kernel")
        weights = jaxlstm.Weights(w_x, w_h, stack(("ir", "iz", "in", "hn"), "bias"))
        return BoundModule(module, variables), jaxlstm.Params((jaxlstm.Layer(weights),))

    def bidirectional(self, forward, backward):
        module = nn.Bidirectional(forward.module.clone(), backward.module.clone())
        names = {"forward_rnn": forward.variables["params"], "backward_rnn": backward.variables["params"]}
        return BoundModule(module, {"params": names})

    def apply(self, bound, *args, **options):
        return bound.module.apply(bound.variables, *args, **options)

    def jitted_apply(self, bound, *args, **options):
        arrays = {name: options.pop(name) for name in ("initial_carry", "seq_lengths") if name in options}
        return jax.jit(lambda variables, args, arrays: bound.module.apply(variables, *args, **arrays, **options))(
            bound.variables, args, arrays
        )

    def step(self, bound, state, x):
        return bound.module.apply(bound.variables, state, x, method="step")

    def gradient(self, bound, loss):
        def loss_of_variables(variables):
            return loss(lambda *args, **options: bound.module.apply(variables, *args, **options))

        return jax.tree.leaves(jax.jit(jax.grad(loss_of_variables))(bound.variables))


both_apis = pytest.mark.parametrize("api", [NnxApi(), LinenApi()], ids=["nnx", "linen"])


@both_apis
def test_network_matches_lstm(api):
    params, state = random_params(STACKED), random_state(STACKED)
    module = api.network(STACKED, params)
    rng = np.random.default_rng(1)
    step_arrays = {"mask": rng.random((STEPS, BATCH)) < 0.7, "resets": rng.random((STEPS, BATCH)) < 0.3}
    ys, new_state = STACKED(params, XS, state, lengths=LENGTHS, **step_arrays)
    options = {"initial_carry": state, "seq_lengths": LENGTHS}
    assert_equal(api.apply(module, XS, time_major=True, **options, **step_arrays), ys)
    transposed = {name: a.T for name, a in step_arrays.items()}
    carry, outputs = api.apply(module, INPUTS, return_carry=True, **options, **transposed)
    assert_equal((carry, outputs), (new_state, batch_major(ys)))


@both_apis
@pytest.mark.parametrize("batch_shape", [(), (BATCH,)])
def test_network_accepts_any_number_of_batch_axes(api, batch_shape):
    params = random_params(SINGLE)
    xs = XS if batch_shape else XS[:, 0]
    ys, _ = SINGLE(params, xs)
    assert_equal(api.apply(api.network(SINGLE, params), np.moveaxis(xs, 0, -2)), jnp.moveaxis(ys, 0, -2))


@pytest.mark.slow
@both_apis
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
def test_reversed_network_matches_lstm_and_flax(api, lengths):
    params = random_params(SINGLE)
    module = api.network(SINGLE, params, reverse=True, time_major=True)
    ys, _ = SINGLE(params, XS, lengths=lengths, reverse=True)
    assert_equal(api.apply(module, XS, seq_lengths=lengths, keep_order=True), ys)
    expected = api.jitted_apply(api.flax_rnn(params), XS, seq_lengths=lengths, reverse=True, time_major=True)
    is_valid = np.arange(STEPS)[:, None] < (STEPS if lengths is None else lengths)  # Flax does not zero the padding
    assert_close(api.apply(module, XS, seq_lengths=lengths), jnp.where(is_valid[..., None], expected, 0))


@both_apis
def test_reversed_network_accepts_unsigned_lengths_past_the_end(api):
    module = api.network(SINGLE, random_params(SINGLE), reverse=True, time_major=True)
    too_long = np.where(LENGTHS == STEPS, STEPS + 2, LENGTHS).astype(np.uint32)
    assert_equal(api.apply(module, XS, seq_lengths=too_long), api.apply(module, XS, seq_lengths=LENGTHS))


@both_apis
def test_network_options_are_defaults_of_the_call(api):
    params = random_params(SINGLE)
    module = api.network(SINGLE, params, time_major=True, return_carry=True, reverse=True, keep_order=True)
    ys, state = SINGLE(params, XS, reverse=True)
    assert_equal(api.apply(module, XS), (state, ys))


@both_apis
@pytest.mark.parametrize("name", ["time_major", "return_carry", "reverse", "keep_order", "deterministic"])
def test_network_rejects_options_that_are_not_bools(api, name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 'no'"):
        api.apply(api.network(SINGLE, random_params(SINGLE), **{name: "no"}), INPUTS)


@both_apis
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"seq_lengths": LENGTHS, "reverse": True, "keep_order": True}],
    ids=["forward", "reversed"],
)
def test_cell_in_flax_rnn_matches_flax_cell(api, options):
    params, state = random_params(SINGLE), random_state(SINGLE)
    module, flax_module = api.rnn_of_cell(SINGLE, params), api.flax_rnn(params)
    options = {"return_carry": True, "initial_carry": (state.c[0], state.h[0]), **options}
    carry, ys = api.jitted_apply(module, XS, time_major=True, **options)
    assert_close((carry, ys), api.jitted_apply(flax_module, XS, time_major=True, **options))
    _, expected = SINGLE(params, XS, state, lengths=options.get("seq_lengths"), reverse="reverse" in options)
    assert_close(carry, (expected.c[0], expected.h[0]))


@pytest.mark.slow
@both_apis
def test_cell_starts_from_the_default_carry_of_flax(api):
    params = random_params(SINGLE)
    module, flax_module = api.rnn_of_cell(SINGLE, params), api.flax_rnn(params)
    options = {"return_carry": True, "seq_lengths": LENGTHS}
    assert_close(api.jitted_apply(module, INPUTS, **options), api.jitted_apply(flax_module, INPUTS, **options))


LOSS_WEIGHT = np.random.default_rng(3).standard_normal((BATCH, STEPS, HIDDEN))


@lru_cache
def gradient_of_lstm():
    def loss(params):
        return (batch_major(SINGLE(params, XS)[0]) * LOSS_WEIGHT).sum()

    return jax.jit(jax.grad(loss))(random_params(SINGLE))


@both_apis
def test_gradients_match_lstm(api):
    params = random_params(SINGLE)

    def loss(apply):
        return (apply(INPUTS) * LOSS_WEIGHT).sum()

    expected = sorted(jax.tree.leaves(gradient_of_lstm()), key=jnp.shape)
    for module in (api.network(SINGLE, params), api.rnn_of_cell(SINGLE, params)):
        assert_close(sorted(api.gradient(module, loss), key=jnp.shape), expected)


@pytest.mark.slow
@both_apis
def test_flax_bidirectional_matches_bidirectional_lstm(api):
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, bidirectional=True, param_dtype="float64")
    params = random_params(lstm)
    forward, backward = (jaxlstm.Params((jaxlstm.Layer(w),)) for w in params.layers[0].directions)
    ys, state = lstm(params, XS, lengths=LENGTHS)
    networks = api.bidirectional(api.network(SINGLE, forward), api.network(SINGLE, backward))
    carry, outputs = api.apply(networks, INPUTS, seq_lengths=LENGTHS, return_carry=True)
    assert_close(outputs, batch_major(ys))
    assert_close(jax.tree.map(lambda *a: jnp.concatenate(a), *carry), state)
    cells = api.bidirectional(api.rnn_of_cell(SINGLE, forward), api.rnn_of_cell(SINGLE, backward))
    carry, outputs = api.jitted_apply(cells, INPUTS, seq_lengths=LENGTHS, return_carry=True)
    is_valid = (np.arange(STEPS) < LENGTHS[:, None])[..., None]
    assert_close(jnp.where(is_valid, outputs, 0), batch_major(ys))
    assert_close(carry, [(state.c[d], state.h[d]) for d in (0, 1)])


@both_apis
def test_network_step_matches_lstm_step(api):
    params, state = random_params(SINGLE), random_state(SINGLE)
    assert_equal(api.step(api.network(SINGLE, params), state, XS[0]), SINGLE.step(params, state, XS[0]))


@both_apis
@pytest.mark.parametrize("cell", ["rnn", "gru", "slstm", "minlstm", "mingru", "indrnn", "paralstm"])
def test_every_cell_runs_in_flax_rnn(api, cell):
    lstm = jaxlstm.RNN(INPUT, HIDDEN, cell=cell, param_dtype="float64")
    params = random_params(lstm)
    ys, state = lstm(params, XS, lengths=LENGTHS)
    carry, outputs = api.jitted_apply(api.rnn_of_cell(lstm, params), INPUTS, seq_lengths=LENGTHS, return_carry=True)
    h, c = jax.tree.map(lambda a: a[0], state)
    expected = h if c is None else (c, h)
    assert jax.tree.structure(carry) == jax.tree.structure(expected)
    assert_close(carry, expected)
    is_valid = (np.arange(STEPS) < LENGTHS[:, None])[..., None]  # Flax does not zero the padding
    assert_close(jnp.where(is_valid, outputs, 0), batch_major(ys))


@pytest.mark.slow
@both_apis
@pytest.mark.parametrize("reverse", [False, True])
def test_gru_cell_in_flax_rnn_matches_flax_gru_cell(api, reverse):
    gru = jaxlstm.GRU(INPUT, HIDDEN, param_dtype="float64")
    flax_module, params = api.flax_gru()
    options = {"initial_carry": random_state(gru).h[0], "seq_lengths": LENGTHS, "return_carry": True}
    options |= {"reverse": reverse, "keep_order": reverse}
    expected = api.jitted_apply(flax_module, INPUTS, **options)
    assert_close(api.jitted_apply(api.rnn_of_cell(gru, params), INPUTS, **options), expected)


@both_apis
def test_network_takes_static_features_and_cell_refuses_them(api):
    lstm = jaxlstm.RNN(INPUT, HIDDEN, cell="ea", static_size=2, param_dtype="float64")
    params = random_params(lstm)
    static = np.random.default_rng(4).standard_normal((BATCH, 2))
    module = jaxlstm.flax.LSTM(lstm, params=params)
    if isinstance(api, LinenApi):
        module = BoundModule(jaxlstm.flax.linen.LSTM(lstm), {"params": {"lstm": params}})
    ys, _ = lstm(params, XS, static=static)
    assert_equal(api.apply(module, INPUTS, static=static), batch_major(ys))
    with pytest.raises(ValueError, match=r"^static must have shape \[3, 2\] with cell='ea', got none"):
        api.apply(module, INPUTS)
    with pytest.raises(ValueError, match=r"^LSTMCell takes no static features, which cell='ea' reads; use LSTM"):
        api.rnn_of_cell(lstm, params)


@both_apis
def test_regularizers_draw_from_dropout_stream(api):
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, output_dropout=0.5, param_dtype="float64")
    params = random_params(lstm)
    module = api.network(lstm, params)
    deterministic = api.apply(module, INPUTS, deterministic=True)
    assert_equal(deterministic, batch_major(lstm(params, XS)[0]))

    def apply_with_seed(seed):
        rngs = nnx.Rngs(dropout=seed) if isinstance(api, NnxApi) else {"dropout": jax.random.key(seed)}
        return api.apply(module, INPUTS, deterministic=False, rngs=rngs)

    dropped = apply_with_seed(1)
    assert 0 < (dropped == 0).sum() < dropped.size
    assert_close(jnp.where(dropped == 0, 0, dropped / 2), jnp.where(dropped == 0, 0, deterministic))
    assert_equal(dropped, apply_with_seed(1))
    assert (dropped != apply_with_seed(2)).any()


def test_nnx_network_draws_from_its_own_stream_until_deterministic():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, recurrent_dropout=0.5, param_dtype="float64")
    params = random_params(lstm)
    module = jaxlstm.flax.LSTM(lstm, params=params, rngs=nnx.Rngs(dropout=1))
    deterministic = batch_major(lstm(params, XS)[0])
    first, second = module(INPUTS), module(INPUTS)
    assert (first != second).any()
    key = nnx.Rngs(dropout=1).dropout.fork()()
    assert_equal(first, batch_major(lstm(params, XS, key=key)[0]))
    assert_equal(module(INPUTS, rngs=key), first)
    module.eval()
    assert_equal(module(INPUTS), deterministic)
    module.train()
    assert (module(INPUTS) != first).any()
    assert_equal(nnx.view(module, deterministic=True)(INPUTS), deterministic)
    assert not nnx.state(jaxlstm.flax.LSTM(SINGLE, params=random_params(SINGLE), rngs=nnx.Rngs(0)), nnx.RngState)


def test_nnx_network_ignores_carry_stream_of_bidirectional():
    """`nnx.Bidirectional` passes the same stream for carries to both modules; regularizers must not draw from it."""
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, recurrent_dropout=0.5, param_dtype="float64")
    params = random_params(lstm)
    forward, backward = (jaxlstm.flax.LSTM(lstm, params=params, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 2))
    module = nnx.Bidirectional(forward, backward)
    assert (module(INPUTS)[..., :HIDDEN] != module(INPUTS)[..., :HIDDEN]).any()
    without_stream = jaxlstm.flax.LSTM(lstm, params=params)
    with pytest.raises(ValueError, match="regularizers need rngs"):
        nnx.Bidirectional(without_stream, without_stream)(INPUTS)
    assert_equal(without_stream(INPUTS, deterministic=True), batch_major(lstm(params, XS)[0]))


def test_linen_network_requires_deterministic_or_dropout_stream():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, recurrent_dropout=0.5)
    module = jaxlstm.flax.linen.LSTM(lstm)
    with pytest.raises(ValueError, match="deterministic"):
        jax.eval_shape(module.init, jax.random.key(0), INPUTS)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        module.apply({"params": {"lstm": random_params(lstm)}}, INPUTS, deterministic=False)


def test_nnx_network_splits_merges_and_trains():
    module = jaxlstm.flax.LSTM(SINGLE, rngs=nnx.Rngs(0))
    assert_equal(jax.tree.leaves(module.params), jax.tree.leaves(SINGLE.init(nnx.Rngs(0).params())))
    graph, state = nnx.split(module)
    outputs = module(INPUTS)
    assert_equal(nnx.merge(graph, state)(INPUTS), outputs)
    assert_equal(jax.jit(lambda state: nnx.merge(graph, state)(INPUTS))(state), outputs)
    optimizer = nnx.Optimizer(module, optax.sgd(3.0), wrt=nnx.Param)

    @nnx.jit
    def train_step(module, optimizer):
        loss, gradient = nnx.value_and_grad(lambda module: ((module(INPUTS) - 0.1) ** 2).mean())(module)
        optimizer.update(module, gradient)
        return loss

    losses = [float(train_step(module, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_nnx_cell_trains_learned_state():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, learned_state=True, param_dtype="float64")
    params = random_params(lstm)
    module = nnx.RNN(jaxlstm.flax.LSTMCell(lstm, params=params))

    def loss(module):
        outputs = module(INPUTS)
        return outputs.sum(), outputs

    def loss_of_params(params):
        outputs = batch_major(lstm(params, XS)[0])
        return outputs.sum(), outputs

    gradient, outputs = nnx.jit(nnx.grad(loss, has_aux=True))(module)
    expected_gradient, expected_outputs = jax.jit(jax.grad(loss_of_params, has_aux=True))(params)
    assert_close(outputs, expected_outputs)
    assert_close(nnx.to_pure_dict(gradient)["cell"]["params"]["state"], expected_gradient.state._asdict())


def test_linen_cell_rejects_learned_state():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, learned_state=True)
    with pytest.raises(ValueError, match="learned_state=True is not available in linen's LSTMCell; use LSTM"):
        nn.RNN(jaxlstm.flax.linen.LSTMCell(lstm)).init(jax.random.key(0), INPUTS)


def test_nnx_cell_draws_initial_carry():
    cell = jaxlstm.flax.LSTMCell(SINGLE, params=random_params(SINGLE))
    c, h = cell.initialize_carry((BATCH, INPUT), nnx.Rngs(3), nnx.initializers.normal())
    assert c.shape == h.shape == (BATCH, HIDDEN)
    assert (c != h).all()
    with pytest.raises(ValueError, match="carry_init needs rngs"):
        cell.initialize_carry((BATCH, INPUT), carry_init=nnx.initializers.normal())
    assert_equal(cell.initialize_carry((INPUT,)), (np.zeros(HIDDEN), np.zeros(HIDDEN)))


SHARDED = jaxlstm.LSTM(INPUT, 4, layer_norm=True, param_dtype="float64")
SHARDING = {"w_x": ("model", None), "norm.c": ("model",)}
EXPECTED_SPECS = PartitionSpec("model", None), PartitionSpec("model"), PartitionSpec()  # of w_x, norm.c and w_h


def test_nnx_modules_are_sharded():
    params = random_params(SHARDED)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))):
        module = jaxlstm.flax.LSTM(SHARDED, params=params, sharding=SHARDING)
        cell = jaxlstm.flax.LSTMCell(SHARDED, params=params, sharding={"b": ("model",)})
    for layer in nnx.get_partition_spec(nnx.state(module))["params"]["layers"].values():
        weights = layer["forward"]
        assert (weights["w_x"].get_value(), weights["norm"]["c"].get_value()) == EXPECTED_SPECS[:2]
        assert not weights["w_h"].get_value()
    w_x = module.params.layers[0].forward.w_x[...]
    assert w_x.sharding.spec == PartitionSpec("model", None)
    assert len(w_x.sharding.device_set) == 2
    assert cell.params.layers[0].forward.b[...].sharding.spec == PartitionSpec("model")


def test_linen_network_is_sharded():
    params = random_params(SHARDED)
    module = jaxlstm.flax.linen.LSTM(SHARDED, sharding=SHARDING)
    shapes = jax.eval_shape(module.init, jax.random.key(0), INPUTS)
    for layer in nn.get_partition_spec(shapes)["params"]["lstm"].layers:
        assert (layer.forward.w_x, layer.forward.norm.c, layer.forward.w_h) == EXPECTED_SPECS
    variables = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(params))
    assert_close(module.apply(variables, INPUTS), batch_major(SHARDED(params, XS)[0]))


@pytest.mark.parametrize(
    ("lstm", "options", "message"),
    [
        (jaxlstm.LSTM(3, 4, num_layers=2), {}, "LSTMCell is one layer in one direction, got num_layers=2"),
        (jaxlstm.LSTM(3, 4, bidirectional=True), {}, "LSTMCell is one layer in one direction, got bidirectional=True"),
        (jaxlstm.LSTM(3, 4, zoneout_h=0.1), {}, "zoneout_h=0.1 needs the whole sequence; use LSTM"),
        (
            SINGLE,
            {"sharding": {"kernel": ("model",)}},
            "sharding names 'kernel'; expected names of parameters: 'w_x', 'w_h', 'b'",
        ),
    ],
)
def test_nnx_cell_rejects_unsupported_options(lstm, options, message):
    with pytest.raises(ValueError, match=message):
        jaxlstm.flax.LSTMCell(lstm, params=random_params(lstm), **options)


def test_nnx_modules_need_params_or_rngs():
    for module in (jaxlstm.flax.LSTM, jaxlstm.flax.LSTMCell):
        with pytest.raises(TypeError, match="expected params or rngs, got neither"):
            module(SINGLE)


def test_linen_cell_rejects_unsupported_options():
    with pytest.raises(ValueError, match="LSTMCell is one layer"):
        jaxlstm.flax.linen.LSTMCell(STACKED).init(jax.random.key(0), None, INPUTS)


def test_nnx_network_rejects_wrong_inputs():
    module = jaxlstm.flax.LSTM(SINGLE, params=random_params(SINGLE))
    with pytest.raises(ValueError, match=r"inputs must have shape \(\*batch, T, 4\), got \[4\]"):
        module(INPUTS[0, 0])


class OtherState(NamedTuple):
    """A named tuple in the order of Haiku's state."""

    hidden: Any
    cell: Any


SHORT = np.zeros((BATCH, HIDDEN - 1))
STATE = np.zeros((BATCH, HIDDEN))


@both_apis
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": np.ones((STEPS, BATCH), bool)}, ValueError, "mask must have shape [3, 6], got [6, 3]"),
        ({"resets": np.ones((BATCH, STEPS))}, TypeError, "resets must be boolean, got float64[3, 6]"),
        ({"seq_lengths": np.ones(4, int)}, ValueError, "seq_lengths must have shape [3], got [4]"),
        ({"time_major": "no"}, TypeError, "time_major must be True or False, got 'no'"),
        ({"return_carry": "no"}, TypeError, "return_carry must be True or False, got 'no'"),
        ({"reverse": 1}, TypeError, "reverse must be True or False, got 1"),
        ({"keep_order": "no"}, TypeError, "keep_order must be True or False, got 'no'"),
        ({"deterministic": "no"}, TypeError, "deterministic must be True or False, got 'no'"),
        ({"initial_carry": (STATE, STATE)}, TypeError, "initial_carry must be a jaxlstm.State(h, c), got tuple"),
        (
            {"initial_carry": jaxlstm.State(STATE, STATE)},
            ValueError, "initial_carry.h must have shape [1, 3, 5], got [3, 5]",
        ),
    ],
)  # fmt: skip
def test_network_checks_arguments_in_the_callers_terms(api, arguments, error, message):
    module = api.network(SINGLE, random_params(SINGLE))
    with pytest.raises(error, match=re.escape(message)):
        api.apply(module, INPUTS, **arguments)


@both_apis
def test_network_and_cell_promote_integer_inputs(api):
    params, integers = random_params(SINGLE), (3 * INPUTS).astype(int)
    for module in (api.network(SINGLE, params), api.rnn_of_cell(SINGLE, params)):
        outputs = api.apply(module, integers)
        assert outputs.dtype == jnp.float64
        assert_close(outputs, batch_major(SINGLE(params, batch_major(integers).astype(float))[0]))
    assert api.apply(api.network(SINGLE, params), integers > 0).dtype == jnp.float64


class NnxCell:
    def step(self, params, carry, x):
        return jaxlstm.flax.LSTMCell(SINGLE, params=params)(carry, x)


class LinenCell:
    def step(self, params, carry, x):
        return jaxlstm.flax.linen.LSTMCell(SINGLE).apply({"params": {"lstm": params}}, carry, x)


both_cells = pytest.mark.parametrize("cell", [NnxCell(), LinenCell()], ids=["nnx", "linen"])


@both_cells
def test_cell_takes_carry_by_position_and_by_name(cell):
    params, state = random_params(SINGLE), jax.tree.map(lambda a: a[0], random_state(SINGLE))
    (c, h), y = cell.step(params, (state.c, state.h), XS[0])
    for carry, expected in ((state, jaxlstm.State(h, c)), ([state.c, state.h], [c, h])):
        new_carry, output = cell.step(params, carry, XS[0])
        assert type(new_carry) is type(carry)
        assert_equal((new_carry, output), (expected, y))


@both_cells
@pytest.mark.parametrize(
    ("carry", "error", "message"),
    [
        (STATE, TypeError, "carry must be (c, h) or a jaxlstm.State(h, c), got float64[3, 5]"),
        ((STATE,), TypeError, "carry must be (c, h) or a jaxlstm.State(h, c), got tuple"),
        (OtherState(STATE, STATE), TypeError, "carry must be (c, h) or a jaxlstm.State(h, c), got OtherState"),
        ((STATE, SHORT), ValueError, "carry.h must have shape [3, 5], got [3, 4]"),
        ((SHORT, STATE), ValueError, "carry.c must have shape [3, 5], got [3, 4]"),
        (jaxlstm.State(STATE[None], STATE[None]), ValueError, "carry.h must have shape [3, 5], got [1, 3, 5]"),
        ((None, STATE), ValueError, "carry.c must be an array [3, 5]; got NoneType"),
        ((STATE.astype(int), STATE), TypeError, "carry.c must be floating-point, got int64[3, 5]"),
    ],
)
def test_cell_checks_carry(cell, carry, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cell.step(random_params(SINGLE), carry, XS[0])


def test_cell_without_cell_state_refuses_a_pair():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, cell="rnn", param_dtype="float64")
    with pytest.raises(TypeError, match=re.escape("carry must be h or a jaxlstm.State(h, c), got tuple")):
        jaxlstm.flax.LSTMCell(lstm, params=random_params(lstm))((STATE, STATE), XS[0])


def test_flax_not_installed_names_the_extra():
    """Runs in a subprocess, because Flax is already imported in this one."""
    code = "import sys; sys.modules['flax'] = None; import jaxlstm; import jaxlstm.flax"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = "ImportError: jaxlstm.flax needs flax, which is not installed: pip install 'jaxlstm[flax]'"
    assert process.stderr.strip().splitlines()[-1] == message
