"""The Flax modules: the numbers of the network, in the hands of Flax."""

from functools import partial
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
ONE = jaxlstm.LSTM(INPUT, HIDDEN, param_dtype="float64")
DEEP = jaxlstm.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True, proj_size=3, param_dtype="float64")
XS = np.random.default_rng(0).standard_normal((STEPS, BATCH, INPUT))
INPUTS = XS.swapaxes(0, 1)


def random_params(lstm, seed=0):
    return jax.tree.map(jnp.asarray, cases.random_params(lstm, np.random.default_rng(seed), lstm.param_dtype))


def random_state(lstm):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), lstm.initial_state(BATCH))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance(np.float64, 100))


class Nnx:
    """The modules of nnx, driven by the tests that hold for both."""

    framework = nnx

    def network(self, lstm, params, **options):
        return jaxlstm.flax.LSTM(lstm, params=params, **options)

    def cells(self, lstm, params):
        """Our cell in Flax's scan, and Flax's own with the same weights."""
        w = params.layers[0].forward
        theirs = nnx.OptimizedLSTMCell(INPUT, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        theirs.dense_i.kernel[...] = w.w_x.T
        theirs.dense_h.kernel[...] = w.w_h.T
        theirs.dense_h.bias[...] = w.b
        return nnx.RNN(jaxlstm.flax.LSTMCell(lstm, params=params)), nnx.RNN(theirs)

    def both_ways(self, forward, backward):
        return nnx.Bidirectional(forward, backward)

    def run(self, module, *args, **options):
        return module(*args, **options)

    def gradient(self, module, loss):
        """With respect to the network's parameters."""
        state = nnx.grad(lambda m: loss(lambda *args, **options: m(*args, **options)))(module)
        leaves = jax.tree.leaves(nnx.to_pure_dict(state))
        assert len(leaves) == len(jax.tree.leaves(nnx.state(module, nnx.Param)))
        return leaves


class Bound(NamedTuple):
    """A linen module together with its variables."""

    module: nn.Module
    variables: dict[str, Any]


class Linen:
    """Those of linen."""

    framework = nn

    def network(self, lstm, params, **options):
        module = jaxlstm.flax.linen.LSTM(lstm, **options)
        given = jax.eval_shape(partial(module.init, deterministic=True), jax.random.key(0), INPUTS)
        assert jax.tree.structure(given["params"]["lstm"]) == jax.tree.structure(params)
        return Bound(module, {"params": {"lstm": params}})

    def cells(self, lstm, params):
        ours = nn.RNN(jaxlstm.flax.linen.LSTMCell(lstm))
        given = jax.eval_shape(ours.init, jax.random.key(0), INPUTS)
        assert jax.tree.structure(given["params"]["cell"]["lstm"]) == jax.tree.structure(params)
        w = params.layers[0].forward
        theirs = {}
        for n, gate in enumerate("ifgo"):
            rows = slice(n * HIDDEN, (n + 1) * HIDDEN)
            theirs[f"i{gate}"] = {"kernel": w.w_x[rows].T}
            theirs[f"h{gate}"] = {"kernel": w.w_h[rows].T, "bias": w.b[rows]}
        peer = nn.RNN(nn.OptimizedLSTMCell(HIDDEN, param_dtype=jnp.float64))
        return (
            Bound(ours, {"params": {"cell": {"lstm": params}}}),
            Bound(peer, {"params": {"cell": theirs}}),
        )

    def both_ways(self, forward, backward):
        module = nn.Bidirectional(forward.module.clone(), backward.module.clone())
        names = {"forward_rnn": forward.variables["params"], "backward_rnn": backward.variables["params"]}
        return Bound(module, {"params": names})

    def run(self, module, *args, **options):
        return module.module.apply(module.variables, *args, **options)

    def gradient(self, module, loss):
        def of(variables):
            return loss(lambda *args, **options: module.module.apply(variables, *args, **options))

        return jax.tree.leaves(jax.grad(of)(module.variables))


both = pytest.mark.parametrize("kind", [Nnx(), Linen()], ids=["nnx", "linen"])


@both
def test_a_network_gives_the_numbers_of_the_configuration(kind):
    params, state = random_params(DEEP), random_state(DEEP)
    rnn = kind.network(DEEP, params)
    ys, last = DEEP(params, XS, state, lengths=LENGTHS)
    options = {"initial_carry": state, "seq_lengths": LENGTHS}
    equal(kind.run(rnn, INPUTS, return_carry=True, **options), (last, ys.swapaxes(0, 1)))
    equal(kind.run(rnn, XS, time_major=True, **options), ys)
    params = random_params(ONE)
    rnn = kind.network(ONE, params)
    equal(kind.run(rnn, INPUTS), ONE(params, XS)[0].swapaxes(0, 1))
    equal(kind.run(rnn, INPUTS[0]), ONE(params, XS[:, 0])[0])
    rng = np.random.default_rng(1)
    marks = {"mask": rng.random((STEPS, BATCH)) < 0.7, "resets": rng.random((STEPS, BATCH)) < 0.3}
    ys, _ = ONE(params, XS, **marks)
    equal(kind.run(rnn, XS, time_major=True, **marks), ys)
    equal(kind.run(rnn, INPUTS, **{name: a.T for name, a in marks.items()}), ys.swapaxes(0, 1))


@both
@pytest.mark.parametrize("lengths", [pytest.param(None, marks=pytest.mark.slow), LENGTHS])
def test_backward_in_time(kind, lengths):
    params = random_params(ONE)
    rnn = kind.network(ONE, params, reverse=True, time_major=True)
    ys, _ = ONE(params, XS, lengths=lengths, reverse=True)
    equal(kind.run(rnn, XS, seq_lengths=lengths, keep_order=True), ys)
    if lengths is not None:  # of a dtype that has nothing below nought, and one of them past the end
        over = np.where(lengths == np.max(lengths), STEPS + 2, lengths).astype(np.uint32)
        whole = np.minimum(over, STEPS).astype(int)
        equal(kind.run(rnn, XS, seq_lengths=over), kind.run(rnn, XS, seq_lengths=whole))
    _, theirs = kind.cells(ONE, params)  # what they write behind a length is their own
    taken = np.arange(STEPS)[:, None] < (STEPS if lengths is None else lengths)
    wanted = kind.run(theirs, XS, seq_lengths=lengths, reverse=True, time_major=True)
    close(kind.run(rnn, XS, seq_lengths=lengths), jnp.where(taken[..., None], wanted, 0))


@both
def test_options_set_in_the_constructor(kind):
    params = random_params(ONE)
    rnn = kind.network(ONE, params, time_major=True, return_carry=True, reverse=True, keep_order=True)
    ys, last = ONE(params, XS, reverse=True)
    equal(kind.run(rnn, XS), (last, ys))


@both
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"seq_lengths": LENGTHS, "reverse": True, "keep_order": True}],
)
def test_a_cell_in_the_scan_of_flax_equals_flaxs_own(kind, options):
    params, state = random_params(ONE), random_state(ONE)
    ours, theirs = kind.cells(ONE, params)
    carry = (state.c[0], state.h[0])
    options = {"return_carry": True, **options}
    close(kind.run(ours, INPUTS, **options), kind.run(theirs, INPUTS, **options))
    last, ys = kind.run(ours, XS, initial_carry=carry, time_major=True, **options)
    close((last, ys), kind.run(theirs, XS, initial_carry=carry, time_major=True, **options))
    _, wanted = ONE(params, XS, state, lengths=options.get("seq_lengths"), reverse="reverse" in options)
    close(last, (wanted.c[0], wanted.h[0]))


@both
def test_gradients_agree(kind):
    params = random_params(ONE)
    weight = np.random.default_rng(3).standard_normal((BATCH, STEPS, HIDDEN))

    def loss(run):
        return (run(INPUTS) * weight).sum()

    def of_params(params):
        return (ONE(params, XS)[0].swapaxes(0, 1) * weight).sum()

    wanted = sorted(jax.tree.leaves(jax.grad(of_params)(params)), key=jnp.shape)
    close(sorted(kind.gradient(kind.network(ONE, params), loss), key=jnp.shape), wanted)
    ours, _ = kind.cells(ONE, params)
    close(sorted(kind.gradient(ours, loss), key=jnp.shape), wanted)


@pytest.mark.slow
@both
def test_both_directions_by_flax(kind):
    """Flax's Bidirectional around networks, and around cells, is one network in two directions."""
    whole = jaxlstm.LSTM(INPUT, HIDDEN, bidirectional=True, param_dtype="float64")
    params = random_params(whole)
    forward, backward = (jaxlstm.Params((jaxlstm.Layer(w),)) for w in params.layers[0].directions)
    ys, last = whole(params, XS, lengths=LENGTHS)
    outputs = ys.swapaxes(0, 1)
    networks = kind.both_ways(kind.network(ONE, forward), kind.network(ONE, backward))
    carry, got = kind.run(networks, INPUTS, seq_lengths=LENGTHS, return_carry=True)
    close(got, outputs)
    close(jax.tree.map(lambda *a: jnp.concatenate(a), *carry), last)
    taken = (np.arange(STEPS) < LENGTHS[:, None])[..., None]
    cells = kind.both_ways(kind.cells(ONE, forward)[0], kind.cells(ONE, backward)[0])
    carry, got = kind.run(cells, INPUTS, seq_lengths=LENGTHS, return_carry=True)
    close(jnp.where(taken, got, 0), outputs)
    close(carry, [(last.c[d], last.h[d]) for d in (0, 1)])


@both
def test_one_step(kind):
    params, state = random_params(ONE), random_state(ONE)
    rnn = kind.network(ONE, params)
    args = (state, XS[0])
    got = rnn.step(*args) if isinstance(kind, Nnx) else rnn.module.apply(rnn.variables, *args, method="step")
    equal(got, ONE.step(params, *args))


@both
def test_a_cell_without_cell_state_carries_h_alone(kind):
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, cell="rnn", param_dtype="float64")
    params = random_params(lstm)
    if isinstance(kind, Nnx):
        rnn = nnx.RNN(jaxlstm.flax.LSTMCell(lstm, params=params))
    else:
        rnn = Bound(nn.RNN(jaxlstm.flax.linen.LSTMCell(lstm)), {"params": {"cell": {"lstm": params}}})
    ys, last = lstm(params, XS)
    close(kind.run(rnn, INPUTS, return_carry=True), (last.h[0], ys.swapaxes(0, 1)))


@both
def test_regularisers_draw_from_the_stream_of_dropout(kind):
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, output_dropout=0.5, param_dtype="float64")
    params = random_params(lstm)
    rnn = kind.network(lstm, params)
    whole = kind.run(rnn, INPUTS, deterministic=True)
    equal(whole, lstm(params, XS)[0].swapaxes(0, 1))

    def draws(seed):
        rngs = nnx.Rngs(dropout=seed) if isinstance(kind, Nnx) else {"dropout": jax.random.key(seed)}
        return kind.run(rnn, INPUTS, deterministic=False, rngs=rngs)

    dropped = draws(1)
    assert 0 < (dropped == 0).sum() < dropped.size
    close(jnp.where(dropped == 0, 0, dropped / 2), jnp.where(dropped == 0, 0, whole))
    equal(dropped, draws(1))
    assert (dropped != draws(2)).any()


def test_nnx_draws_from_its_own_stream_until_it_is_told_not_to():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, recurrent_dropout=0.5, param_dtype="float64")
    params = random_params(lstm)
    rnn = jaxlstm.flax.LSTM(lstm, params=params, rngs=nnx.Rngs(dropout=1))
    first, second = rnn(INPUTS), rnn(INPUTS)
    assert (first != second).any()
    key = nnx.Rngs(dropout=1).dropout.fork()()
    equal(first, lstm(params, XS, key=key)[0].swapaxes(0, 1))
    equal(rnn(INPUTS, rngs=key), first)
    twice = nnx.Bidirectional(rnn, jaxlstm.flax.LSTM(lstm, params=params, rngs=nnx.Rngs(dropout=2)))
    assert (twice(INPUTS)[..., :HIDDEN] != twice(INPUTS)[..., :HIDDEN]).any()
    rnn.eval()
    equal(rnn(INPUTS), lstm(params, XS)[0].swapaxes(0, 1))
    rnn.train()
    assert (rnn(INPUTS) != first).any()
    equal(nnx.view(rnn, deterministic=True)(INPUTS), lstm(params, XS)[0].swapaxes(0, 1))
    # Bidirectional hands down a stream for carries that is the same in every module: nothing is drawn from it.
    bare = jaxlstm.flax.LSTM(lstm, params=params)
    with pytest.raises(ValueError, match="the regularisers need rngs"):
        nnx.Bidirectional(bare, bare)(INPUTS)
    equal(bare(INPUTS, deterministic=True), lstm(params, XS)[0].swapaxes(0, 1))
    assert not nnx.state(jaxlstm.flax.LSTM(ONE, rngs=nnx.Rngs(0)), nnx.RngState)  # nothing to draw, no stream


def test_linen_must_be_told():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, recurrent_dropout=0.5)
    rnn = jaxlstm.flax.linen.LSTM(lstm)
    with pytest.raises(ValueError, match="deterministic"):
        rnn.init(jax.random.key(0), INPUTS)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        rnn.apply({"params": {"lstm": random_params(lstm)}}, INPUTS, deterministic=False)


def test_nnx_splits_merges_and_trains():
    rnn = jaxlstm.flax.LSTM(ONE, rngs=nnx.Rngs(0))
    equal(jax.tree.leaves(rnn.params), jax.tree.leaves(ONE.init(nnx.Rngs(0).params())))
    graph, state = nnx.split(rnn)
    equal(nnx.merge(graph, state)(INPUTS), rnn(INPUTS))
    equal(jax.jit(lambda state: nnx.merge(graph, state)(INPUTS))(state), rnn(INPUTS))
    optimizer = nnx.Optimizer(rnn, optax.sgd(3.0), wrt=nnx.Param)

    @nnx.jit
    def step(rnn, optimizer):
        loss, gradient = nnx.value_and_grad(lambda rnn: ((rnn(INPUTS) - 0.1) ** 2).mean())(rnn)
        optimizer.update(rnn, gradient)
        return loss

    losses = [float(step(rnn, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_learned_state_is_trained_through_the_scan_of_flax():
    lstm = jaxlstm.LSTM(INPUT, HIDDEN, learned_state=True, param_dtype="float64")
    params = random_params(lstm)
    ys, _ = lstm(params, XS)
    rnn = nnx.RNN(jaxlstm.flax.LSTMCell(lstm, params=params))
    close(rnn(INPUTS), ys.swapaxes(0, 1))
    gradient = nnx.grad(lambda rnn: rnn(INPUTS).sum())(rnn)
    wanted = jax.grad(lambda params: lstm(params, XS)[0].sum())(params)
    close(nnx.to_pure_dict(gradient)["cell"]["params"]["state"], wanted.state._asdict())
    with pytest.raises(ValueError, match="learned_state=True needs the whole sequence"):
        nn.RNN(jaxlstm.flax.linen.LSTMCell(lstm)).init(jax.random.key(0), INPUTS)


def test_carries_that_are_drawn():
    cell = jaxlstm.flax.LSTMCell(ONE, rngs=nnx.Rngs(0))
    c, h = cell.initialize_carry((BATCH, INPUT), nnx.Rngs(3), nnx.initializers.normal())
    assert c.shape == h.shape == (BATCH, HIDDEN)
    assert (c != h).all()
    with pytest.raises(ValueError, match="carry_init needs rngs"):
        cell.initialize_carry((BATCH, INPUT), carry_init=nnx.initializers.normal())
    equal(cell.initialize_carry((INPUT,)), (np.zeros(HIDDEN), np.zeros(HIDDEN)))


SHARDING = {"w_x": ("model", None), "norm.c": ("model",)}


def test_sharding():
    lstm = jaxlstm.LSTM(INPUT, 4, layer_norm=True, param_dtype="float64")
    params = random_params(lstm)
    wanted = PartitionSpec("model", None), PartitionSpec("model"), PartitionSpec()
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))):
        rnn = jaxlstm.flax.LSTM(lstm, params=params, sharding=SHARDING)
        cell = jaxlstm.flax.LSTMCell(lstm, params=params, sharding={"b": ("model",)})
    for layer in nnx.get_partition_spec(nnx.state(rnn))["params"]["layers"].values():
        w = layer["forward"]
        assert (w["w_x"].get_value(), w["norm"]["c"].get_value()) == wanted[:2]
        assert not w["w_h"].get_value()
    w = rnn.params.layers[0].forward.w_x[...]
    assert w.sharding.spec == wanted[0]
    assert len(w.sharding.device_set) == 2
    assert cell.params.layers[0].forward.b[...].sharding.spec == wanted[1]
    wide = jaxlstm.flax.linen.LSTM(lstm, sharding=SHARDING)
    boxes = jax.eval_shape(wide.init, jax.random.key(0), INPUTS)
    for layer in nn.get_partition_spec(boxes)["params"]["lstm"].layers:
        assert (layer.forward.w_x, layer.forward.norm.c, layer.forward.w_h) == wanted
    boxed = jax.tree.unflatten(jax.tree.structure(boxes), jax.tree.leaves(params))
    close(wide.apply(boxed, INPUTS), lstm(params, XS)[0].swapaxes(0, 1))


def test_what_is_refused():
    def refused(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            jaxlstm.flax.LSTMCell(*args, **{"rngs": nnx.Rngs(0)} | options)

    refused("a cell is one layer in one direction, got num_layers=2", jaxlstm.LSTM(3, 4, num_layers=2))
    refused("a cell is one layer in one direction, got bidirectional=True", jaxlstm.LSTM(3, 4, bidirectional=True))
    refused("zoneout_h=0.1 needs the whole sequence", jaxlstm.LSTM(3, 4, zoneout_h=0.1))
    refused("sharding names 'kernel'; the parameters are 'w_x', 'w_h', 'b'", ONE, sharding={"kernel": ("model",)})
    refused("neither params nor rngs", ONE, rngs=None, error=TypeError)
    with pytest.raises(ValueError, match="a cell is one layer"):
        jaxlstm.flax.linen.LSTMCell(DEEP).init(jax.random.key(0), None, INPUTS)
    rnn = jaxlstm.flax.LSTM(ONE, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"inputs must have shape \(\*batch, T, 4\), got \[4\]"):
        rnn(INPUTS[0, 0])
    with pytest.raises(TypeError, match=r"state must be a jaxlstm.State\(h, c\), got tuple"):
        rnn(INPUTS, initial_carry=(jnp.zeros((BATCH, HIDDEN)), jnp.zeros((BATCH, HIDDEN))))
