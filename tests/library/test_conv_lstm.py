"""The convolutional LSTM against its float64 NumPy oracle, and what has to hold of any recurrence."""

import math
import pickle
import re
from functools import lru_cache

import convolutional_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import slow_but
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerance import narrow_operands, tolerance

import jaxlstm
from jaxlstm import conv_lstm

T, B, I, H = 4, 3, 2, 2  # noqa: E741  (the alphabet's letter)
LENGTHS = np.array([T, 0, T - 1])
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool)
RESETS = np.array([[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
EVERYTHING = {"lengths": LENGTHS, "mask": MASK, "resets": RESETS}

# Name: spatial shape, options of the network, options of the call.
CASES = {
    "1-D, two layers": ((4,), {"num_layers": 2}, {}),
    "1-D, kernel 1, no bias": ((3,), {"kernel_size": 1, "use_bias": False}, EVERYTHING),
    "1-D, kernel wider than space, remat": ((2,), {"kernel_size": 5, "remat": 3}, EVERYTHING),
    "2-D": ((3, 2), {}, EVERYTHING),
    "2-D, peephole, both directions": ((2, 3), {"cell": "peephole", "bidirectional": True}, EVERYTHING),
    "2-D, mixed kernel, two layers both directions": (
        (2, 2), {"kernel_size": (3, 1), "num_layers": 2, "bidirectional": True}, {**EVERYTHING, "reverse": True},
    ),
    "3-D, mixed kernel, peephole, unroll": (
        (1, 2, 2), {"kernel_size": (1, 3, 3), "cell": "peephole", "unroll": 2}, {"resets": RESETS, "reverse": True},
    ),
}  # fmt: skip
# The others are slow; two of them are looked at again below, in other dtypes and in the form of other platforms.
FAST = (
    "1-D, kernel 1, no bias",
    "2-D, mixed kernel, two layers both directions",
    "3-D, mixed kernel, peephole, unroll",
)


def network(name, **options):
    spatial, fixed, _ = CASES[name]
    return jaxlstm.ConvLSTM(I, H, spatial, **{"param_dtype": jnp.float64, **fixed, **options})


def random_params(conv, rng, dtype=np.float64):
    """Weights of deviation 0.5, biases and peepholes included, so that every one of them matters."""
    shapes = jax.eval_shape(conv.init, jax.random.key(0))
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), shapes)


@lru_cache
def material(name):
    """Random weights, inputs and a nonzero initial state, and weights of a loss over all that comes back."""
    conv = network(name)
    rng = np.random.default_rng(len(name))
    params = random_params(conv, rng)
    xs = rng.standard_normal((T, B, *conv.spatial_shape, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.initial_state((B,)))
    ys = rng.standard_normal((T, B, *conv.spatial_shape, conv.num_directions * H))
    last = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    return params, xs, state, (ys, last)


def loss(result, cotangents):
    """A scalar in which every number that a network returns has a weight of its own."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(cotangents), strict=True)
    return sum((a * b).sum(tuple(range(-b.ndim, 0))) for a, b in pairs)


@lru_cache
def expected(name):
    """What the oracle says: ``(ys, state)`` and the gradient of `loss` with respect to ``(params, xs, state)``."""
    spatial, _, options = CASES[name]
    *arguments, cotangents = material(name)
    leaves, tree = jax.tree.flatten(tuple(arguments))

    def run(leaves):
        params, xs, state = jax.tree.unflatten(tree, leaves)
        ys, h, c = convolutional_oracle.network(params, xs, state.h, state.c, axes=len(spatial), **options)
        return ys, jaxlstm.State(h, c)

    slopes = oracle.gradient(lambda leaves: loss(run(leaves), cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, slopes)


def terms(name):
    """Additions behind one number: the longest chain of sums, over time, batch, positions, channels and taps."""
    conv = network(name)
    return material(name)[1].size * math.prod(conv.kernel_size) * conv.num_layers * conv.num_directions


def assert_close(actual, wanted, bounds):
    """Close leaf by leaf; the absolute tolerance counts in the largest number of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(wanted)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = {**bounds, "atol": bounds["atol"] * max(1.0, float(np.abs(b).max(initial=0)))}
        np.testing.assert_allclose(a, b, **bound, err_msg=jax.tree_util.keystr(path))


def same(a, b):
    assert_close(a, b, tolerance(np.float64, 1000))


@pytest.mark.parametrize("name", slow_but(FAST, CASES))
def test_outputs_state_and_gradients(name):
    params, xs, state, cotangents = material(name)

    def run(*arguments):
        result = network(name)(*arguments, **CASES[name][2])
        return loss(result, cotangents), result

    slopes, result = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(params, xs, state)
    wanted, gradient = expected(name)
    assert_close(result, wanted, tolerance(np.float64, terms(name)))
    assert_close(slopes, gradient, tolerance(np.float64, terms(name)))


def test_the_form_for_loops_of_other_platforms(monkeypatch):
    """The platform picks the form of the convolution in the loop; here is the one that it does not pick on a CPU."""
    name = "1-D, kernel wider than space, remat"

    def convolutions():
        jax.clear_caches()
        return str(jax.make_jaxpr(network(name))(*material(name)[:2])).count("conv_general_dilated")

    before = convolutions()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions() > before
    test_outputs_state_and_gradients(name)
    jax.clear_caches()


@pytest.mark.parametrize(("spatial", "kernel"), [((4,), (3,)), ((2, 5), (5, 3)), ((3, 1, 2), (1, 3, 5))])
@pytest.mark.parametrize("form", [conv_lstm.convolution, conv_lstm.product_of_patches])
def test_convolution(form, spatial, kernel):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((*kernel, 2, 3)), rng.standard_normal((2, 2, *spatial, 2))
    wanted = convolutional_oracle.convolve(w, x, len(kernel))
    same(form(w, x, jnp.float64, jnp.float64), wanted)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_narrow_dtypes(dtype):
    """Outputs in ``dtype``, state in float32, all within rounding of the operands."""
    name = "2-D, peephole, both directions"
    conv = network(name, param_dtype=jnp.float32, dtype=dtype)
    *arguments, cotangents = material(name)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tuple(arguments))
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), cotangents)

    def run(*arguments):
        ys, state = conv(*arguments, **EVERYTHING)
        return loss((ys.astype(jnp.float32), state), wide), (ys, state)

    slopes, (ys, state) = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*narrow)
    assert ys.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves((state, slopes))} == {jnp.dtype(jnp.float32)}
    bounds = narrow_operands(dtype, T) if dtype == jnp.bfloat16 else tolerance(dtype, terms(name))
    wanted, gradient = expected(name)
    assert_close((ys, state), wanted, bounds)
    assert_close(slopes, gradient, bounds)


def test_operands_are_rounded_to_bfloat16_and_nothing_else_is():
    """Rounding what meets in a convolution beforehand changes nothing; rounding the cell state or the bias does."""
    conv = jaxlstm.ConvLSTM(I, H, 3, dtype=jnp.bfloat16)
    rng = np.random.default_rng(11)
    params = random_params(conv, rng, np.float32)
    xs = rng.standard_normal((T, B, 3, I)).astype(np.float32)
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), conv.initial_state(B))

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32))

    def with_weights(**weights):
        return jaxlstm.Params((jaxlstm.Layer(params.layers[0].forward._replace(**weights)),))

    w = params.layers[0].forward
    kernels = with_weights(w_x=rounded(w.w_x), w_h=rounded(w.w_h))
    wanted = conv(params, xs, state)
    jax.tree.map(np.testing.assert_array_equal, conv(kernels, rounded(xs), state._replace(h=rounded(state.h))), wanted)
    for other in (conv(with_weights(b=rounded(w.b)), xs, state), conv(params, xs, state._replace(c=rounded(state.c)))):
        assert np.any(np.asarray(other[1].c) != np.asarray(wanted[1].c))


def test_bfloat16_outputs_leave_the_loop_in_float32():
    conv = jaxlstm.ConvLSTM(I, H, 3, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(conv.init, jax.random.key(0)), jax.ShapeDtypeStruct((T, B, 3, I), jnp.float32)
    jaxpr = str(jax.make_jaxpr(conv)(*shapes))
    assert re.search(r"f32\[4,3,3,2\] = scan", jaxpr), jaxpr
    assert not re.search(r"bf16\[4,3,3,2\] = scan", jaxpr)


def test_kernel_1_at_one_position_is_the_lstm():
    options = {"num_layers": 2, "bidirectional": True, "param_dtype": jnp.float64}
    conv = jaxlstm.ConvLSTM(I, H, 1, kernel_size=1, **options)
    lstm = jaxlstm.LSTM(I, H, **options)
    rng = np.random.default_rng(0)
    params = random_params(conv, rng)
    dense = jax.tree.map(lambda a: a if a.ndim == 1 else a[0].T, params)
    xs = rng.standard_normal((T, B, 1, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.initial_state(B))
    ys, last = conv(params, xs, state, **EVERYTHING)
    wanted = lstm(dense, xs[:, :, 0], jax.tree.map(lambda a: a[:, :, 0], state), **EVERYTHING)
    same((ys[:, :, 0], jax.tree.map(lambda a: a[:, :, 0], last)), wanted)


def test_positions_do_not_mix_beyond_the_kernel():
    """With one step and a kernel of 3, a change at one corner reaches its neighbours and nothing else."""
    conv = jaxlstm.ConvLSTM(1, 2, (4, 5), param_dtype=jnp.float64)
    params = random_params(conv, np.random.default_rng(0))
    xs = np.zeros((1, 4, 5, 1))
    xs[0, 0, 4] = 1.0
    changed = np.asarray(conv(params, xs)[0] != conv(params, 0 * xs)[0]).any((0, -1))
    np.testing.assert_array_equal(np.argwhere(changed), [[0, 3], [0, 4], [1, 3], [1, 4]])


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_sequence_cut_in_two_with_the_state_carried_equals_one_run(reverse):
    conv = network("2-D, peephole, both directions", bidirectional=False)
    rng = np.random.default_rng(1)
    params, xs = random_params(conv, rng), rng.standard_normal((T, B, 2, 3, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.initial_state((B,)))
    whole = conv(params, xs, state, mask=MASK, resets=RESETS, reverse=reverse)
    outputs = {}
    for piece in [slice(0, 3), slice(3, T)][:: -1 if reverse else 1]:
        options = {"mask": MASK[piece], "resets": RESETS[piece], "reverse": reverse}
        outputs[piece.start], state = conv(params, xs[piece], state, **options)
    same(whole, (np.concatenate([outputs[0], outputs[3]]), state))


@pytest.mark.parametrize("bidirectional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_packed_row_equals_its_sequences_run_apart(bidirectional):
    conv = network("2-D", bidirectional=bidirectional)
    rng = np.random.default_rng(2)
    params, xs = random_params(conv, rng), rng.standard_normal((T, 3, 2, I))
    packed, _ = conv(params, xs, resets=np.array([True, False, False, True]))
    same(packed, np.concatenate([conv(params, xs[:3])[0], conv(params, xs[3:])[0]]))


def test_what_lies_behind_a_mask_reaches_nothing():
    name = "2-D, mixed kernel, two layers both directions"
    conv = network(name)
    params, xs, state, cotangents = material(name)
    taken = MASK & (np.arange(T)[:, None] < LENGTHS)
    poisoned = np.where(taken[..., None, None, None], xs, np.nan)

    @jax.jit
    def run(*arguments):
        def total(*arguments):
            result = conv(*arguments, mask=MASK, lengths=LENGTHS)
            return loss(result, cotangents), result

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arguments)

    clean = run(params, xs, state)
    jax.tree.map(np.testing.assert_array_equal, clean, run(params, poisoned, state))
    (_, (ys, last)), (_, slopes, _) = clean
    assert np.all(np.isfinite(ys))
    assert not np.any(np.asarray(ys)[~taken])
    assert not np.any(np.asarray(slopes)[~taken])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 1], b[:, 1]), last, state)  # of length 0


@pytest.mark.parametrize(
    ("options", "batch"), [({"cell": "peephole", "num_layers": 2}, ()), ({"use_bias": False}, (B,))]
)
def test_steps_equal_the_sequence(options, batch):
    conv = network("2-D", **options)
    rng = np.random.default_rng(3)
    params, xs = random_params(conv, rng), rng.standard_normal((T, *batch, 3, 2, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.initial_state(batch))
    whole = conv(params, xs, state)
    outputs = []
    for x in xs:
        state, y = conv.step(params, state, x)
        outputs.append(y)
    same(whole, (np.stack(outputs), state))


def test_any_batch_axes_and_vmap():
    name = "2-D, peephole, both directions"
    conv = network(name)
    params, xs, state, _ = material(name)
    wanted = conv(params, xs, state, **EVERYTHING)

    def one(x, state, length, mask, resets):
        return conv(params, x, state, lengths=length, mask=mask, resets=resets)

    mapped = jax.jit(jax.vmap(one, (1, 1, 0, 1, 1), out_axes=1))(xs, state, LENGTHS, MASK, RESETS)
    same(mapped, wanted)
    folded = conv(
        params,
        xs[:, None, :, None],
        jax.tree.map(lambda a: a[:, None, :, None], state),
        lengths=LENGTHS[None, :, None],
        mask=MASK[:, None, :, None],
        resets=RESETS[:, None, :, None],
    )
    same(jax.tree.map(lambda a: a[:, 0, :, 0], folded), wanted)


@pytest.mark.slow
def test_ensembles_of_parameters_are_mapped():
    conv = network("2-D")
    xs = material("2-D")[1]
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda *a: np.stack(a), *(random_params(conv, rng) for _ in range(3)))

    def run(params):
        return (conv(params, xs)[0] ** 2).sum()

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(run)))(params)
    alone = jax.jit(jax.value_and_grad(run))(jax.tree.map(lambda a: a[2], params))
    same((values[2], jax.tree.map(lambda a: a[2], slopes)), alone)


def test_forward_mode():
    name = "2-D, peephole, both directions"
    *arguments, cotangents = material(name)
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), tuple(arguments))

    def run(*arguments):
        return loss(network(name)(*arguments, **EVERYTHING), cotangents)

    slope = jax.jit(lambda *a: jax.jvp(run, a, direction)[1])(*arguments)
    wanted = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), expected(name)[1], direction)))
    np.testing.assert_allclose(slope, wanted, rtol=1e-10)


def test_dropout_between_layers():
    """Without a key none; with one, the outputs of each layer but the last are dropped and scaled, reproducibly."""
    name, rate = "1-D, two layers", 0.4
    conv = network(name, dropout=rate)
    params, xs, state, _ = material(name)
    jax.tree.map(np.testing.assert_array_equal, conv(params, xs, state), network(name)(params, xs, state))
    key = jax.random.key(5)
    mask = jaxlstm.dropout.dropout_mask(jax.random.fold_in(key, 1), rate, (T, B, 4, H), jnp.float64)
    assert 0 < np.mean(mask == 0) < 1
    ys, h, c = convolutional_oracle.network(params, xs, state.h, state.c, axes=1, between=[np.asarray(mask)])
    same(conv(params, xs, state, key=key), (ys, jaxlstm.State(h, c)))


def test_a_cell_of_ones_own_and_one_compilation_per_shape():
    traced = []

    def coupled(z, c):  # the input gate is one minus the forget gate
        traced.append(z.shape)
        f, o = jax.nn.sigmoid(z[:2])
        c = f * c + (1 - f) * jnp.tanh(z[2])
        return c, o * jnp.tanh(c)

    conv = network("2-D", cell=jaxlstm.Cell(coupled, num_gates=3, forget_gate=0))
    xs, state = material("2-D")[1:3]
    params = random_params(conv, np.random.default_rng(8))
    assert params.layers[0].forward.w_h.shape == (3, 3, H, 3 * H)
    assert conv(params, xs)[0].shape == (T, B, 3, 2, H)
    assert traced[0] == (3, B, 3, 2, H)
    step = jax.jit(jax.grad(lambda params, xs: conv(params, xs)[0].sum()))
    for call in (
        lambda xs: conv(params, xs),
        lambda xs: step(params, xs),
        lambda xs: conv.step(params, state, xs[0]),
    ):
        call(xs)
        before = len(traced)
        call(xs + 1)
        assert len(traced) == before
    conv(params, xs[:-1])
    assert len(traced) > before
    vanilla = network("2-D", cell=jaxlstm.cells.RNN["tanh"])
    assert vanilla(random_params(vanilla, np.random.default_rng(9)), xs)[1].c is None


def test_initialisation():
    conv = jaxlstm.ConvLSTM(3, 6, (4, 5), kernel_size=(3, 5), cell="peephole", num_layers=2, param_dtype=jnp.float64)
    init = jax.jit(conv.init)
    params = init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, init(jax.random.key(0)))
    for layer, inputs in zip(params.layers, (3, 6)):
        w = layer.forward
        assert w.w_x.shape == (3, 5, inputs, 24)
        bound = (6 / (15 * (inputs + 6))) ** 0.5
        assert 0.9 * bound < np.abs(w.w_x).max() <= bound
        for gate in np.split(np.asarray(w.w_h).reshape(15 * 6, 24), 4, axis=1):
            np.testing.assert_allclose(gate.T @ gate, np.eye(6), **tolerance(np.float64, 90))
        assert len(set(np.asarray(w.w_h)[0, 0, 0, ::6].tolist())) == 4
        np.testing.assert_array_equal(w.b, [0] * 6 + [1] * 6 + [0] * 12)
        np.testing.assert_array_equal(w.w_c, np.zeros((3, 4, 5, 6)))
    half = jax.jit(jaxlstm.ConvLSTM(3, 6, 4, use_bias=False, param_dtype=jnp.bfloat16).init)(jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert half.layers[0].forward.b is half.layers[0].forward.w_c is None


@pytest.mark.slow
def test_remat_keeps_less():
    xs = jnp.ones((256, 2, 8, 4), jnp.float32)

    def temporary(remat):
        conv = jaxlstm.ConvLSTM(4, 4, 8, remat=remat)
        step = jax.jit(jax.grad(lambda p: (conv(p, xs)[0] ** 2).sum()))
        return step.lower(jax.eval_shape(conv.init, jax.random.key(0))).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(None) / 2


@pytest.mark.slow
def test_batch_over_two_devices():
    conv = network("2-D", cell="peephole")
    _, xs, _, (cotangents, _) = material("2-D")
    params, xs, cotangents = random_params(conv, np.random.default_rng(7)), xs[:, :2], cotangents[:, :2]
    options = {"lengths": LENGTHS[:2], "mask": MASK[:, :2], "resets": RESETS[:, :2]}

    def total(params, xs, options):
        return (conv(params, xs, **options)[0] * cotangents).sum()

    wanted = jax.device_get(jax.jit(jax.grad(total, (0, 1)))(params, xs, options))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def put(a, *spec):
            return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

        placed = {name: put(a, *([None] if a.ndim == 2 else []), "data") for name, a in options.items()}
        cotangents = put(cotangents, None, "data")
        actual = jax.jit(jax.grad(total, (0, 1)))(jax.tree.map(put, params), put(xs, None, "data"), placed)
    same(jax.device_get(actual), wanted)


def test_empty_sequences_and_batches():
    conv = network("2-D", bidirectional=True)
    params, xs = random_params(conv, np.random.default_rng(10)), material("2-D")[1]
    state = jax.tree.map(lambda a: a + 1, conv.initial_state((B,)))
    ys, last = conv(params, xs[:0], state)
    assert ys.shape == (0, B, 3, 2, 2 * H)
    jax.tree.map(np.testing.assert_array_equal, last, state)
    ys, last = conv(params, xs[:, :0])
    assert ys.shape == (T, 0, 3, 2, 2 * H)
    assert last.h.shape == (2, 0, 3, 2, H)


def test_configurations_compare_and_survive():
    a = jaxlstm.ConvLSTM(3, 4, 8, dtype="bfloat16")
    b = jaxlstm.ConvLSTM(np.int64(3), 4, (8,), kernel_size=(3,), dtype=jnp.bfloat16)
    assert a == b == pickle.loads(pickle.dumps(a))
    assert hash(a) == hash(b)
    assert a.initial_state(2).h.shape == (1, 2, 8, 4)
    assert jaxlstm.ConvLSTM(3, 4, [8, 8]) == jaxlstm.ConvLSTM(3, 4, (8, 8), kernel_size=(3, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"spatial_shape": ()}, ValueError, "spatial_shape must be 1 to 3 sizes of at least 1, got ()"),
        ({"spatial_shape": (2, 2, 2, 2)}, ValueError, "spatial_shape must be 1 to 3 sizes of at least 1, got (2, 2"),
        ({"spatial_shape": (4, 0)}, ValueError, "spatial_shape must be 1 to 3 sizes of at least 1, got (4, 0)"),
        ({"spatial_shape": 2.5}, TypeError, "spatial_shape must be an int or a tuple of ints, got 2.5"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd, so that a position is the middle of what it sees"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be one size or one for each of 2 spatial axes, got (3,)"),
        ({"kernel_size": "3"}, TypeError, "kernel_size must be an int or a tuple of ints, got '3'"),
        ({"cell": "rnn"}, ValueError, "cell must be one of 'lstm', 'peephole', 'cifg'; got 'rnn'"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be True or False, got 1"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in [0, 1), got 1.0"),
        ({"dtype": jnp.int32}, TypeError, "dtype must be a floating-point dtype, got int32"),
        ({"remat": 0}, ValueError, "remat must be at least 1, got 0"),
    ],
)
def test_wrong_configurations(options, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        jaxlstm.ConvLSTM(**{"input_size": 3, "hidden_size": 4, "spatial_shape": (4, 5), **options})
    assert "\n" not in str(caught.value)


CONV = jaxlstm.ConvLSTM(3, 4, (5, 6))
PARAMS = jax.eval_shape(CONV.init, jax.random.key(0))
XS = jnp.zeros((7, 2, 5, 6, 3), jnp.float32)


def zeros(shapes):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def call(**changes):
    return lambda: CONV(**{"params": zeros(PARAMS), "xs": XS, **changes})


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (call(xs=XS[..., :2]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [7, 2, 5, 6, 2]"),
        (call(xs=XS[:, :, :4]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [7, 2, 4, 6, 3]"),
        (call(xs=XS[0, 0]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [5, 6, 3]"),
        (call(xs=XS.astype(int)), TypeError, "xs must be floating-point, got int64[7, 2, 5, 6, 3]"),
        (call(state=CONV.initial_state()), ValueError, "state.h must have shape [1, 2, 5, 6, 4], got [1, 5, 6, 4]"),
        (call(lengths=jnp.zeros(3, int)), ValueError, "lengths must have shape [2], got [3]"),
        (call(mask=jnp.ones((2, 7), bool)), ValueError, "mask must have shape [7, 2], got [2, 7]"),
        (call(resets=jnp.ones((7, 2), int)), TypeError, "resets must be boolean, got int64[7, 2]"),
        (call(reverse=1), TypeError, "reverse must be True or False, got 1"),
        (call(key=0), TypeError, "key must be one PRNG key such as jax.random.key(0), got int 0"),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), cell="peephole")(zeros(PARAMS), XS),
            ValueError,
            "params.layers[0].forward.w_c is missing; expected shape [3, 5, 6, 4]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), kernel_size=5)(zeros(PARAMS), XS),
            ValueError,
            "params.layers[0].forward.w_x must have shape [5, 5, 3, 16], got [3, 3, 3, 16]",
        ),
        (
            lambda: CONV.step(zeros(PARAMS), CONV.initial_state(2), XS[0, :, :4]),
            ValueError,
            "x must have shape (*batch, 5, 6, 3), got [2, 4, 6, 3]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, 5, bidirectional=True).step(None, None, XS),
            ValueError,
            "step is for one direction",
        ),
    ],
)
def test_wrong_calls(action, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        jax.eval_shape(action)
    assert "\n" not in str(caught.value)
