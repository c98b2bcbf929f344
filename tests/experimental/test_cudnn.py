"""The cuDNN backend without a GPU: parity with JAX's reference in place of cuDNN, and lowering for CUDA."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.experimental import rnn
from jax.interpreters import mlir

import jaxlstm
from jaxlstm.experimental import cudnn

pytestmark = pytest.mark.slow
CudnnLSTM = partial(jaxlstm.LSTM, 3, 4, implementation="cudnn")


def eval_shape(lstm, **options):
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.eval_shape(partial(lstm, **options), params, jax.ShapeDtypeStruct((6, 2, 3), lstm.param_dtype))


def test_cudnn_needs_a_gpu():
    with pytest.raises(ValueError, match="implementation='cudnn' needs an NVIDIA GPU, got the backend 'cpu'"):
        eval_shape(CudnnLSTM())


def test_cudnn_packed_weights_unpack():
    layer = cases.make("bidirectional", "plain").params.layers[0]
    packed = cudnn.pack_weights((layer,))
    assert packed.shape == (rnn.get_num_params_in_lstm(3, 5, 1, True),)
    unpacked = rnn.unpack_lstm_weights(packed, 3, 5, 1, True)
    for d, w in enumerate(layer.directions):
        for array, expected in zip(unpacked, (w.w_x, w.w_h, w.b, np.zeros_like(w.b)), strict=True):
            np.testing.assert_array_equal(array[d], expected)


# With JAX's reference in place of cuDNN


def reference_lstm(x, h, c, weights, lengths, inputs, units, layers, dropout, bidirectional, precision):
    """Computes `rnn.lstm` by the unpacking and the equations of the same module."""
    arrays = rnn.unpack_lstm_weights(weights, inputs, units, layers, bidirectional)
    assert precision == jax.lax.Precision.HIGH
    return rnn.lstm_ref(x, h, c, *arrays, lengths, inputs, units, layers, dropout, bidirectional)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(cudnn, "_has_cuda", lambda: True)
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


OTHER_CONFIGURATIONS = {
    "two layers bidirectional": {"num_layers": 2, "bidirectional": True},
    "no bias": {"use_bias": False},
    "lstm dropout": {"dropout": 0.4, "num_layers": 3},
}


@pytest.mark.parametrize(
    ("inputs", "configuration"),
    [
        ("plain", "one layer"),
        ("plain", "two layers"),
        ("plain", "two layers bidirectional"),
        ("plain", "no bias"),
        ("plain", "lstm dropout"),
        ("lengths", "two layers bidirectional"),
        ("reverse", "one layer"),
        ("reverse", "two layers"),
        ("lengths reverse", "one layer"),
        ("lengths reverse", "two layers bidirectional"),
    ],
)
def test_cudnn_equals_oracle(configuration, inputs, fake_gpu):
    fake_gpu.setattr(rnn, "lstm", reference_lstm)
    for name, options in OTHER_CONFIGURATIONS.items():
        fake_gpu.setitem(cases.CONFIGURATIONS, name, options)
    fake_gpu.setattr(cases, "WITH_KEY", (*cases.WITH_KEY, "lstm dropout"))
    case = cases.make(configuration, inputs)
    lstm = cases.network(configuration, "cudnn", param_dtype=jnp.float32)

    def to_float32(tree):
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)

    def loss(*args):
        result = lstm(*args, **case.options)
        return cases.loss(*result, to_float32(case.cotangents)), result

    args = to_float32((case.params, case.xs, case.state))
    gradient, result = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)
    expected = cases.expected(configuration, inputs)
    parity.assert_close((result, gradient), expected, np.float32, parity.num_terms(case))


# Lowered for CUDA


@pytest.fixture
def fake_cuda(fake_gpu):
    """Allows tracing and lowering for CUDA: invents the sizes and descriptors that cuDNN would return."""
    gpu = rnn.gpu_rnn
    fake_gpu.setattr(gpu, "compute_rnn_workspace_reserve_space_sizes", lambda *sizes: (1, 1), raising=False)

    class Descriptors:
        @staticmethod
        def build_rnn_descriptor(*sizes):
            return repr(sizes).encode()

    mlir.register_lowering(rnn.rnn_fwd_p, partial(gpu._rnn_fwd_lowering, Descriptors, "cu"), platform="cuda")
    mlir.register_lowering(rnn.rnn_bwd_p, partial(gpu._rnn_bwd_lowering, Descriptors, "cu"), platform="cuda")
    yield
    mlir.register_lowering(rnn.rnn_fwd_p, gpu.cudnn_rnn_lowering, platform="cuda")
    mlir.register_lowering(rnn.rnn_bwd_p, gpu.cudnn_rnn_bwd_lowering, platform="cuda")


@pytest.mark.parametrize(
    ("lstm_options", "call_options", "name"),
    [
        ({"cell": "peephole"}, {}, "a cell other than 'lstm'"),
        ({"proj_size": 2}, {}, "a projection"),
        ({"layer_norm": True}, {}, "layer normalization"),
        ({"param_dtype": jnp.float64}, {}, "a dtype other than float32"),
        ({"dtype": jnp.bfloat16}, {}, "a dtype other than float32"),
        ({"zoneout_c": 0.1}, {}, "zoneout"),
        ({"recurrent_dropout": 0.1}, {"key": jax.random.key(0)}, "recurrent dropout"),
        ({"remat": 2}, {}, "remat"),
        ({}, {"resets": jnp.ones((6, 2), bool)}, "resets"),
        ({}, {"mask": jnp.ones((6, 2), bool)}, "a mask; use lengths"),
        ({}, {"lengths": jnp.ones(2, int), "mask": jnp.ones((6, 2), bool)}, "a mask; use lengths"),
    ],
)
def test_cudnn_refuses_unsupported_options_by_name(lstm_options, call_options, name, fake_cuda):
    with pytest.raises(ValueError, match=re.escape(f"implementation='cudnn' does not support {name}")):
        eval_shape(CudnnLSTM(**lstm_options), **call_options)


def test_cudnn_supports_dropout_rates_without_a_key(fake_cuda):
    eval_shape(CudnnLSTM(num_layers=2, recurrent_dropout=0.1, dropout=0.1), lengths=jnp.zeros(2, int))


def test_cudnn_refuses_vmap_and_forward_mode_and_second_derivatives(fake_cuda):
    lstm = CudnnLSTM()
    params = lstm.init(jax.random.key(0))
    xs = jnp.ones((6, 2, 3), jnp.float32)

    def loss(xs):
        return (lstm(params, xs)[0] ** 2).sum()

    with pytest.raises(ValueError, match=r"implementation='cudnn' does not support jax\.vmap"):
        jax.eval_shape(jax.vmap(loss), xs[None])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(loss, (x,), (x,))).trace(xs).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match=r"rnn_(fwd|bwd)"):
        jax.eval_shape(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()), xs)


# Input and hidden size, layers, batch size, steps, dropout, bidirectional
ONE_CALL = [(3, 4, 2, 2, 6, 0.0, True)]
ONE_CALL_PER_LAYER = [(3, 4, 1, 2, 6, 0.0, True), (8, 4, 1, 2, 6, 0.0, True)]


@pytest.mark.parametrize(("dropout", "calls"), [(0.0, ONE_CALL), (0.5, ONE_CALL_PER_LAYER)])
@pytest.mark.parametrize(
    ("precision", "allow_tf32"), [(None, True), ("highest", False), ("high", True), ("float32", False)]
)
def test_cudnn_lowers_to_one_call_for_all_layers(precision, allow_tf32, dropout, calls, fake_cuda):
    lstm = CudnnLSTM(num_layers=2, bidirectional=True, dropout=dropout)
    params = lstm.init(jax.random.key(0))
    xs = jnp.ones((6, 2, 3), jnp.float32)

    def loss(params, xs, key):
        return (lstm(params, xs, lengths=jnp.array([6, 0]), key=key)[0] ** 2).sum()

    with jax.default_matmul_precision(precision):
        traced = jax.jit(jax.grad(loss)).trace(params, xs, jax.random.key(1))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"@cudnn_rnn_ffi\b", text)) == len(calls)
    assert len(re.findall(r"@cudnn_rnn_bwd_ffi\b", text)) == len(calls)
    for sizes in calls:
        assert text.count(repr((*sizes, allow_tf32))[:-1]) == 2


@pytest.mark.parametrize(("num_steps", "batch_size"), [(0, 2), (6, 0)])
def test_cudnn_supports_empty_sequences_and_batches(num_steps, batch_size, fake_cuda):
    lstm = CudnnLSTM(num_layers=2, bidirectional=True)
    params = lstm.init(jax.random.key(0))
    ys, state = jax.eval_shape(lstm, params, jnp.ones((num_steps, batch_size, 3), jnp.float32))
    assert ys.shape == (num_steps, batch_size, 8)
    assert state.c.shape == (4, batch_size, 4)
