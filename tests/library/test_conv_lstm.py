"""The convolutional LSTM against its float64 NumPy oracle, its properties and its errors."""

import math
import pickle
import re
from dataclasses import replace
from functools import lru_cache

import convolutional_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from parity import assert_close, assert_within
from tolerance import narrow_operands, tolerance

import jaxlstm
from jaxlstm import conv_lstm
from jaxlstm.dropout import dropout, regularizer_key

T, B, I, H = 4, 3, 2, 2  # noqa: E741 (shape letter)
LENGTHS = np.array([T, 0, T - 1])
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool)
RESETS = np.array([[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
ALL_MASKS = {"lengths": LENGTHS, "mask": MASK, "resets": RESETS}

# Name: spatial shape, options of the network, options of the call.
CASES = {
    "1-D two layers": ((4,), {"num_layers": 2}, {}),
    "1-D kernel 1 no bias": ((3,), {"kernel_size": 1, "use_bias": False}, ALL_MASKS),
    "1-D kernel wider than field remat": ((2,), {"kernel_size": 5, "remat": 3}, ALL_MASKS),
    "2-D": ((3, 2), {}, ALL_MASKS),
    "2-D peephole bidirectional": ((2, 3), {"cell": "peephole", "bidirectional": True}, ALL_MASKS),
    "2-D mixed kernel learned state bidirectional": (
        (2, 2), {"kernel_size": (3, 1), "learned_state": True, "bidirectional": True},
        {**ALL_MASKS, "reverse": True},
    ),
    "3-D mixed kernel peephole unroll": (
        (1, 2, 2), {"kernel_size": (1, 3, 3), "cell": "peephole", "unroll": 2}, {"resets": RESETS, "reverse": True},
    ),
}  # fmt: skip


def network(name, **options):
    """Makes the network of a case; in float64 unless ``param_dtype`` is given."""
    spatial, fixed, _ = CASES[name]
    return jaxlstm.ConvLSTM(I, H, spatial, **{"param_dtype": jnp.float64, **fixed, **options})


@lru_cache
def random_args(name):
    """Draws parameters, inputs, a nonzero initial state, and weights of a loss over all results."""
    conv = network(name)
    rng = np.random.default_rng(len(name))
    params = random_params(conv, rng)
    xs = rng.standard_normal((T, B, *conv.spatial_axes, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.state_shapes((B,)))
    ys = rng.standard_normal((T, B, *conv.spatial_axes, conv.num_directions * H))
    last = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    return params, xs, state, (ys, last)


def loss(result, cotangents):
    """Computes a scalar in which every number that a network returns has its own weight."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(cotangents), strict=True)
    return sum((a * b).sum(tuple(range(-b.ndim, 0))) for a, b in pairs)


@lru_cache
def expected(name):
    """Computes by the oracle ``(ys, state)`` and the gradient of `loss` with respect to ``(params, xs, state)``."""
    spatial, _, options = CASES[name]
    *args, cotangents = random_args(name)
    leaves, tree = jax.tree.flatten(tuple(args))

    def run(leaves):
        params, xs, state = jax.tree.unflatten(tree, leaves)
        ys, h, c = convolutional_oracle.network(params, xs, state.h, state.c, axes=len(spatial), **options)
        return ys, jaxlstm.State(h, c)

    gradient = oracle.gradient(lambda leaves: loss(run(leaves), cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, gradient)


def num_terms(name):
    """Bounds the number of additions behind one result, over time, batch, positions, channels and taps."""
    conv = network(name)
    return random_args(name)[1].size * math.prod(conv.kernel_size) * conv.num_layers * conv.num_directions


def assert_same(a, b):
    """Compares trees up to rounding in float64."""
    assert_close(a, b, np.float64, 1000)


def assert_identical(a, b):
    """Compares trees bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@lru_cache
def compile_gradient(name, conv):
    """Compiles the gradient by ``(params, xs, state)`` and the results of a case once for all tests."""
    *_, cotangents = random_args(name)

    def run(*args):
        result = conv(*args, **CASES[name][2])
        return loss(result, cotangents), result

    return jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))


def check_outputs_and_gradients(name, conv):
    """Compares outputs, final state and every gradient with the oracle."""
    *args, _ = random_args(name)
    gradient, result = compile_gradient(name, conv)(*args)
    expected_result, expected_gradient = expected(name)
    assert_close(result, expected_result, np.float64, num_terms(name))
    assert_close(gradient, expected_gradient, np.float64, num_terms(name))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_oracle(name):
    check_outputs_and_gradients(name, network(name))


def test_convolutions_of_other_platforms_equal_oracle(monkeypatch):
    """The loop uses patches on a CPU and convolutions elsewhere."""
    name = "2-D"

    def num_convolutions(conv):
        return str(jax.make_jaxpr(conv)(*random_args(name)[:2])).count("conv_general_dilated")

    on_cpu = num_convolutions(network(name))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    conv = network(name, unroll=2)  # another configuration, so that no program traced for the CPU is reused
    assert num_convolutions(conv) > on_cpu
    check_outputs_and_gradients(name, conv)


@pytest.mark.parametrize(("spatial", "kernel"), [((4,), (3,)), ((2, 5), (5, 3)), ((3, 1, 2), (1, 3, 5))])
@pytest.mark.parametrize("convolve", [conv_lstm.convolve, conv_lstm.convolve_by_patches])
def test_convolve_equals_oracle(convolve, spatial, kernel):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((*kernel, 2, 3)), rng.standard_normal((2, 2, *spatial, 2))
    assert_same(convolve(w, x, jnp.float64, jnp.float64), convolutional_oracle.convolve(w, x, len(kernel)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes_equal_oracle(dtype):
    """Outputs are in ``dtype``, state and gradients in float32, all within the rounding of the operands."""
    name = "2-D peephole bidirectional"
    conv = network(name, param_dtype=jnp.float32, dtype=dtype)
    *args, cotangents = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_args(name))

    def run(*args):
        ys, state = conv(*args, **ALL_MASKS)
        return loss((ys.astype(jnp.float32), state), cotangents), (ys, state)

    gradient, (ys, state) = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*args)
    assert ys.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves((state, gradient))} == {jnp.dtype(jnp.float32)}
    bounds = narrow_operands(dtype, T) if dtype == jnp.bfloat16 else tolerance(dtype, num_terms(name))
    expected_result, expected_gradient = expected(name)
    assert_within((ys, state), expected_result, bounds)
    assert_within(gradient, expected_gradient, bounds)


def test_bfloat16_rounds_only_operands_of_convolutions():
    """Rounding kernels, inputs and h beforehand changes nothing; rounding the bias or the cell state does."""
    conv = jaxlstm.ConvLSTM(I, H, 3, dtype=jnp.bfloat16)
    rng = np.random.default_rng(11)
    params = random_params(conv, rng, np.float32)
    xs = rng.standard_normal((T, B, 3, I)).astype(np.float32)
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), conv.state_shapes((B,)))
    w = params.layers[0].forward

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32))

    def with_weights(**weights):
        return jaxlstm.Params((jaxlstm.Layer(w._replace(**weights)),))

    wanted = conv(params, xs, state)
    kernels = with_weights(w_x=rounded(w.w_x), w_h=rounded(w.w_h))
    assert_identical(conv(kernels, rounded(xs), state._replace(h=rounded(state.h))), wanted)
    for other in (conv(with_weights(b=rounded(w.b)), xs, state), conv(params, xs, state._replace(c=rounded(state.c)))):
        assert np.any(np.asarray(other[1].c) != np.asarray(wanted[1].c))


def test_bfloat16_outputs_are_cast_after_loop():
    conv = jaxlstm.ConvLSTM(I, H, 3, dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(conv)(conv.param_shapes(), jax.ShapeDtypeStruct((T, B, 3, I), jnp.float32)))
    assert re.search(r"f32\[4,3,3,2\] = scan", jaxpr), jaxpr
    assert not re.search(r"bf16\[4,3,3,2\] = scan", jaxpr)


@pytest.mark.slow
def test_kernel_1_at_one_position_equals_lstm():
    options = {"num_layers": 2, "bidirectional": True, "param_dtype": jnp.float64}
    conv = jaxlstm.ConvLSTM(I, H, 1, kernel_size=1, **options)
    lstm = jaxlstm.LSTM(I, H, **options)
    rng = np.random.default_rng(0)
    params = random_params(conv, rng)
    dense = jax.tree.map(lambda a: a if a.ndim == 1 else a[0].T, params)
    xs = rng.standard_normal((T, B, 1, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.state_shapes((B,)))
    ys, last = conv(params, xs, state, **ALL_MASKS)
    wanted = lstm(dense, xs[:, :, 0], jax.tree.map(lambda a: a[:, :, 0], state), **ALL_MASKS)
    assert_same((ys[:, :, 0], jax.tree.map(lambda a: a[:, :, 0], last)), wanted)


def test_one_step_mixes_positions_within_kernel_only():
    """With one step and a kernel of 3, a change at a corner reaches its neighbors only."""
    conv = jaxlstm.ConvLSTM(1, 2, (4, 5), param_dtype=jnp.float64)
    params = random_params(conv, np.random.default_rng(0))
    xs = np.zeros((1, 4, 5, 1))
    xs[0, 0, 4] = 1.0
    changed = np.asarray(conv(params, xs)[0] != conv(params, 0 * xs)[0]).any((0, -1))
    np.testing.assert_array_equal(np.argwhere(changed), [[0, 3], [0, 4], [1, 3], [1, 4]])


@pytest.mark.parametrize("reverse", [False, True])
def test_sequence_cut_in_two_equals_whole(reverse):
    conv = network("2-D peephole bidirectional", bidirectional=False)
    rng = np.random.default_rng(1)
    params, xs = random_params(conv, rng), rng.standard_normal((T, B, 2, 3, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.state_shapes((B,)))
    whole = conv(params, xs, state, mask=MASK, resets=RESETS, reverse=reverse)
    outputs = {}
    for part in (slice(2, T), slice(0, 2)) if reverse else (slice(0, 2), slice(2, T)):
        options = {"mask": MASK[part], "resets": RESETS[part], "reverse": reverse}
        outputs[part.start], state = conv(params, xs[part], state, **options)
    assert_same(whole, (np.concatenate([outputs[0], outputs[2]]), state))


def test_packed_sequences_equal_separate_sequences():
    conv = network("2-D", bidirectional=True)
    rng = np.random.default_rng(2)
    params, xs = random_params(conv, rng), rng.standard_normal((T, 3, 2, I))
    packed, _ = conv(params, xs, resets=np.array([True, False, True, False]))
    assert_same(packed, np.concatenate([conv(params, xs[:2])[0], conv(params, xs[2:])[0]]))


@pytest.mark.slow
def test_learned_state_starts_sequences_and_is_trained():
    conv = jaxlstm.ConvLSTM(I, H, 3, bidirectional=True, learned_state=True, param_dtype=jnp.float64)
    rng = np.random.default_rng(5)
    params, xs = random_params(conv, rng), rng.standard_normal((T, B, 3, I))
    state = conv.initial_state(B, params)
    assert state.h.shape == state.c.shape == (2, B, 3, H)

    def run(params):
        result = conv(params, xs)
        return (result[0] ** 2).sum(), result

    gradient, result = jax.jit(jax.grad(run, has_aux=True))(params)
    assert_same(result, conv(params, xs, state))
    assert all(np.all(np.asarray(a) != 0) for a in jax.tree.leaves(gradient.state))


def test_skipped_inputs_reach_no_output_or_gradient():
    name = "2-D mixed kernel learned state bidirectional"
    params, xs, state, _ = random_args(name)
    step_mask = MASK & (np.arange(T)[:, None] < LENGTHS)
    xs_with_nan = np.where(step_mask[..., None, None, None], xs, np.nan)
    run = compile_gradient(name, network(name))
    wanted = run(params, xs, state)
    assert_identical(run(params, xs_with_nan, state), wanted)
    (_, xs_gradient, _), (ys, last) = wanted
    assert np.all(np.isfinite(ys))
    assert not np.any(np.asarray(ys)[~step_mask])
    assert not np.any(np.asarray(xs_gradient)[~step_mask])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 1], b[:, 1]), last, state)  # of length 0


@pytest.mark.parametrize(
    ("options", "batch"), [({"cell": "peephole", "num_layers": 2}, ()), ({"use_bias": False}, (B,))]
)
def test_step_by_step_equals_sequence(options, batch):
    conv = network("2-D", **options)
    rng = np.random.default_rng(3)
    params, xs = random_params(conv, rng), rng.standard_normal((T, *batch, 3, 2, I))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), conv.state_shapes(batch))
    whole = conv(params, xs, state)
    outputs = []
    for x in xs:
        state, y = conv.step(params, state, x)
        outputs.append(y)
    assert_same(whole, (np.stack(outputs), state))


def test_batch_axes_and_vmap_equal_batch():
    name = "2-D peephole bidirectional"
    conv = network(name)
    params, xs, state, _ = random_args(name)
    wanted = expected(name)[0]

    def run_sequence(x, state, length, mask, resets):
        return conv(params, x, state, lengths=length, mask=mask, resets=resets)

    mapped = jax.jit(jax.vmap(run_sequence, (1, 1, 0, 1, 1), out_axes=1))(xs, state, LENGTHS, MASK, RESETS)
    assert_same(mapped, wanted)
    three_axes = conv(
        params,
        xs[:, None, :, None],
        jax.tree.map(lambda a: a[:, None, :, None], state),
        lengths=LENGTHS[None, :, None],
        mask=MASK[:, None, :, None],
        resets=RESETS[:, None, :, None],
    )
    assert_same(jax.tree.map(lambda a: a[:, 0, :, 0], three_axes), wanted)


@pytest.mark.slow
def test_vmap_maps_ensemble_of_parameters():
    conv = network("2-D")
    xs = random_args("2-D")[1]
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda *a: np.stack(a), *(random_params(conv, rng) for _ in range(3)))

    def run(params):
        return (conv(params, xs)[0] ** 2).sum()

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(run)))(params)
    single = jax.jit(jax.value_and_grad(run))(jax.tree.map(lambda a: a[2], params))
    assert_same((values[2], jax.tree.map(lambda a: a[2], gradients)), single)


def test_forward_mode_equals_gradient_of_oracle():
    name = "2-D peephole bidirectional"
    *args, cotangents = random_args(name)
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), tuple(args))

    def run(*args):
        return loss(network(name)(*args, **ALL_MASKS), cotangents)

    slope = jax.jit(lambda *a: jax.jvp(run, a, direction)[1])(*args)
    wanted = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), expected(name)[1], direction)))
    np.testing.assert_allclose(slope, wanted, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.4, "variational": True}, {"dropout": 0.4, "input_dropout": 0.3, "output_dropout": 0.2}],
    ids=["variational", "input and output"],
)
def test_dropout_equals_oracle(options):
    name = "1-D two layers"
    conv = network(name, **options)
    params, xs, state, _ = random_args(name)
    assert_identical(conv(params, xs, state), network(name)(params, xs, state))
    key = jax.random.key(5)

    def draw(key, rate, channels, over_time):
        ones = jnp.ones((T, B, *conv.spatial_axes, channels))
        mask = np.asarray(dropout(key, rate, ones, over_time=over_time))
        assert (0 < np.mean(mask == 0) < 1) == (rate > 0)
        return mask

    between = draw(jax.random.fold_in(key, 1), conv.dropout, H, not conv.variational)
    assert np.all(between == between[:1]) == conv.variational
    layer_masks = [
        draw(regularizer_key(key, 0, 3), conv.input_dropout, I, False),
        between,
        draw(regularizer_key(key, 0, 4), conv.output_dropout, H, False),
    ]
    ys, h, c = convolutional_oracle.network(params, xs, state.h, state.c, axes=1, layer_masks=layer_masks)
    assert_same(conv(params, xs, state, key=key), (ys, jaxlstm.State(h, c)))


def test_input_and_output_dropout_have_one_mask_for_all_steps():
    name = "1-D two layers"
    conv = network(name, num_layers=1, input_dropout=0.3, output_dropout=0.2)
    _, xs, _, (cotangent, _) = random_args(name)
    params = random_params(conv, np.random.default_rng(13))

    def run(xs):
        ys, _ = conv(params, xs, key=jax.random.key(5))
        return (ys * cotangent).sum(), ys

    gradient, ys = jax.jit(jax.grad(run, has_aux=True))(xs)
    for dropped in (np.asarray(gradient) == 0, np.asarray(ys) == 0):
        np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:1], dropped.shape))
        assert 0 < dropped.mean() < 1


def test_custom_cell_compiles_once_per_shape():
    traced = []

    def update(f, g, c):
        traced.append(c.shape)
        return f * c + (1 - f) * g

    conv = network("2-D", cell=replace(jaxlstm.cells.CIFG, update=update))
    _, xs, state, _ = random_args("2-D")
    params = random_params(conv, np.random.default_rng(8))
    assert params.layers[0].forward.w_h.shape == (3, 3, H, 3 * H)
    assert conv(params, xs)[0].shape == (T, B, 3, 2, H)
    assert (B, 3, 2, H) in traced
    gradient = jax.jit(jax.grad(lambda params, xs: conv(params, xs)[0].sum()))
    for call in (
        lambda xs: conv(params, xs),
        lambda xs: gradient(params, xs),
        lambda xs: conv.step(params, state, xs[0]),
    ):
        call(xs)
        num_traces = len(traced)
        call(xs + 1)
        assert len(traced) == num_traces
    conv(params, xs[:-1])
    assert len(traced) > num_traces


def test_cell_without_cell_state_has_none():
    conv = network("2-D", cell=jaxlstm.cells.RNN["tanh"])
    _, state = conv(random_params(conv, np.random.default_rng(9)), random_args("2-D")[1])
    assert state.c is None


def test_init_draws_each_gate_separately():
    conv = jaxlstm.ConvLSTM(3, 6, (4, 5), kernel_size=(3, 5), cell="peephole", num_layers=2, param_dtype=jnp.float64)
    params = conv.init(jax.random.key(0))
    assert_identical(params, conv.init(jax.random.key(0)))
    for layer, channels in zip(params.layers, (3, 6)):
        w = layer.forward
        assert w.w_x.shape == (3, 5, channels, 24)
        bound = (6 / (15 * (channels + 6))) ** 0.5
        assert 0.9 * bound < np.abs(w.w_x).max() <= bound
        for gate in np.split(np.asarray(w.w_h).reshape(15 * 6, 24), 4, axis=1):
            np.testing.assert_allclose(gate.T @ gate, np.eye(6), **tolerance(np.float64, 90))
        assert len(set(np.asarray(w.w_h)[0, 0, 0, ::6].tolist())) == 4
        np.testing.assert_array_equal(w.b, [0] * 6 + [1] * 6 + [0] * 12)
        np.testing.assert_array_equal(w.w_c, np.zeros((3, 4, 5, 6)))


def test_init_uses_param_dtype():
    conv = jaxlstm.ConvLSTM(3, 6, 4, use_bias=False, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(conv.init, jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert params.layers[0].forward.b is params.layers[0].forward.w_c is None


def test_init_sets_forget_bias_chrono_and_learned_state():
    def init(**options):
        return jaxlstm.ConvLSTM(1, 50, 2, kernel_size=1, **options).init(jax.random.key(0))

    params = init(forget_bias=-2.5, learned_state=True)
    np.testing.assert_array_equal(params.layers[0].forward.b, [0] * 50 + [-2.5] * 50 + [0] * 100)
    assert_identical(params.state, jaxlstm.State(*[np.zeros((1, 2, 50), np.float32)] * 2))
    b_i, b_f, b_g, b_o = np.split(np.asarray(init(chrono=9).layers[0].forward.b), 4)
    spans = np.exp(b_f)
    assert spans.min() >= 1 - 1e-6
    assert 6 < spans.max() <= 8 + 1e-4  # uniform in [1, 8]: all 50 are below 6 with probability 5e-8
    np.testing.assert_array_equal(b_i, -b_f)
    assert not b_g.any()
    assert not b_o.any()


@pytest.mark.slow
def test_remat_reduces_memory():
    xs = jax.ShapeDtypeStruct((256, 2, 8, 4), jnp.float32)

    def temporary_bytes(remat):
        conv = jaxlstm.ConvLSTM(4, 4, 8, remat=remat)
        gradient = jax.jit(jax.grad(lambda params, xs: (conv(params, xs)[0] ** 2).sum()))
        return gradient.lower(conv.param_shapes(), xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(None) / 2


@pytest.mark.slow
def test_batch_over_two_devices_equals_one_device():
    conv = network("2-D", cell="peephole")
    _, xs, _, (cotangents, _) = random_args("2-D")
    params, xs, cotangents = random_params(conv, np.random.default_rng(7)), xs[:, :2], cotangents[:, :2]
    options = {"lengths": LENGTHS[:2], "mask": MASK[:, :2], "resets": RESETS[:, :2]}

    def total(params, xs, cotangents, options):
        return (conv(params, xs, **options)[0] * cotangents).sum()

    wanted = jax.device_get(jax.jit(jax.grad(total, (0, 1)))(params, xs, cotangents, options))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def put(a, *spec):
            return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

        params = jax.tree.map(put, params)
        xs, cotangents = put(xs, None, "data"), put(cotangents, None, "data")
        options = {name: put(a, *([None] if a.ndim == 2 else []), "data") for name, a in options.items()}
        actual = jax.jit(jax.grad(total, (0, 1)))(params, xs, cotangents, options)
    assert_same(jax.device_get(actual), wanted)


def test_empty_sequences_and_batches_return_empty_arrays():
    conv = network("2-D", bidirectional=True)
    params, xs = random_params(conv, np.random.default_rng(10)), random_args("2-D")[1]
    state = jax.tree.map(lambda a: a + 1, conv.initial_state((B,)))
    ys, last = conv(params, xs[:0], state)
    assert ys.shape == (0, B, 3, 2, 2 * H)
    assert_identical(last, state)
    ys, last = conv(params, xs[:, :0])
    assert ys.shape == (T, 0, 3, 2, 2 * H)
    assert last.h.shape == (2, 0, 3, 2, H)


def test_configurations_compare_by_value():
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
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd, so that each position is the center of its patch"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": (3,)}, ValueError, "kernel_size must be one size or one for each of 2 spatial axes, got (3,)"),
        ({"kernel_size": "3"}, TypeError, "kernel_size must be an int or a tuple of ints, got '3'"),
        ({"cell": "rnn"}, ValueError, "cell must be one of 'lstm', 'peephole', 'cifg'; got 'rnn'"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be True or False, got 1"),
        ({"learned_state": 1}, TypeError, "learned_state must be True or False, got 1"),
        ({"variational": None}, TypeError, "variational must be True or False, got None"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
        ({"input_dropout": -0.1}, ValueError, "input_dropout must be in [0, 1), got -0.1"),
        ({"output_dropout": "0"}, TypeError, "output_dropout must be a number in [0, 1), got '0'"),
        ({"chrono": 2}, ValueError, "chrono must be at least 3, got 2"),
        ({"forget_bias": 2.0, "use_bias": False}, ValueError, "forget_bias=2.0 needs a bias, got use_bias=False"),
        (
            {"forget_bias": 2.0, "cell": jaxlstm.cells.RNN["tanh"]},
            ValueError,
            "forget_bias=2.0 needs a cell with a forget gate",
        ),
        ({"dtype": jnp.int32}, TypeError, "dtype must be a floating-point dtype, got int32"),
        ({"remat": 0}, ValueError, "remat must be at least 1, got 0"),
    ],
)
def test_conv_lstm_rejects_wrong_option(options, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        jaxlstm.ConvLSTM(**{"input_size": 3, "hidden_size": 4, "spatial_shape": (4, 5), **options})
    assert "\n" not in str(caught.value)


def zeros(shapes):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


CONV = jaxlstm.ConvLSTM(3, 4, (5, 6))
PARAMS = zeros(CONV.param_shapes())
XS = jnp.zeros((7, 2, 5, 6, 3), jnp.float32)


def call(**changes):
    return lambda: CONV(**{"params": PARAMS, "xs": XS, **changes})


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (call(xs=XS[..., :2]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [7, 2, 5, 6, 2]"),
        (call(xs=XS[:, :, :4]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [7, 2, 4, 6, 3]"),
        (call(xs=XS[0, 0]), ValueError, "xs must have shape (T, *batch, 5, 6, 3), got [5, 6, 3]"),
        (call(xs=XS.astype(int)), TypeError, "xs must be floating-point, got int64[7, 2, 5, 6, 3]"),
        (
            lambda: CONV(PARAMS, XS, CONV.initial_state()),
            ValueError,
            "state.h must have shape [1, 2, 5, 6, 4], got [1, 5, 6, 4]",
        ),
        (call(lengths=jnp.zeros(3, int)), ValueError, "lengths must have shape [2], got [3]"),
        (call(mask=jnp.ones((2, 7), bool)), ValueError, "mask must have shape [7, 2], got [2, 7]"),
        (call(resets=jnp.ones((7, 2), int)), TypeError, "resets must be boolean, got int64[7, 2]"),
        (call(reverse=1), TypeError, "reverse must be True or False, got 1"),
        (call(key=0), TypeError, "key must be one PRNG key such as jax.random.key(0), got int 0"),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), cell="peephole")(PARAMS, XS),
            ValueError,
            "params.layers[0].forward.w_c is missing; expected shape [3, 5, 6, 4]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), kernel_size=5)(PARAMS, XS),
            ValueError,
            "params.layers[0].forward.w_x must have shape [5, 5, 3, 16], got [3, 3, 3, 16]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), learned_state=True)(PARAMS, XS),
            ValueError,
            "params.state.h is missing; expected shape [1, 5, 6, 4]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, (5, 6), learned_state=True).initial_state(2),
            ValueError,
            "initial_state needs params, which hold the state with learned_state=True",
        ),
        (
            lambda: CONV.step(PARAMS, CONV.initial_state(2), XS[0, :, :4]),
            ValueError,
            "x must have shape (*batch, 5, 6, 3), got [2, 4, 6, 3]",
        ),
        (
            lambda: jaxlstm.ConvLSTM(3, 4, 5, bidirectional=True).step(None, None, XS),
            ValueError,
            "step does not support bidirectional=True",
        ),
    ],
)
def test_conv_lstm_rejects_wrong_argument(action, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        jax.eval_shape(action)
    assert "\n" not in str(caught.value)
