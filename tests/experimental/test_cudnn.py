"""cuDNN's recurrence where there is no GPU: packing and bookkeeping against JAX's own reference, lowering for CUDA."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn
from jax.interpreters import mlir
from test_parity import assert_close, terms

import jaxlstm
from jaxlstm.experimental import cudnn

PLAIN = {"plain": ["one layer", "two layers", "two layers bidirectional", "no bias", "dropout"]}
INPUTS = PLAIN | {"lengths": ["two layers bidirectional"], "reverse": ["one layer", "two layers"]}
INPUTS |= {"lengths reverse": ["one layer", "two layers bidirectional"]}
FAST = [("plain", "no bias"), ("lengths reverse", "two layers bidirectional")]


def reference(x, h, c, weights, lengths, inputs, units, layers, dropout, bidirectional, precision):
    """What `rnn.lstm` computes, by the module's own unpacking and its own equations."""
    arrays = rnn.unpack_lstm_weights(weights, inputs, units, layers, bidirectional)
    assert precision == jax.lax.Precision.HIGH
    return rnn.lstm_ref(x, h, c, *arrays, lengths, inputs, units, layers, dropout, bidirectional)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cudnn, "_on_cuda", lambda: True)
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


@pytest.fixture
def as_if_with_cuda(as_if_on_a_gpu):
    """Traced and lowered as on a GPU: sizes and descriptors, which cuDNN itself would give, are made up."""
    gpu = rnn.gpu_rnn
    as_if_on_a_gpu.setattr(gpu, "compute_rnn_workspace_reserve_space_sizes", lambda *sizes: (1, 1), raising=False)

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
    ("inputs", "configuration"),
    cases.slow_but(FAST, [(inputs, name) for inputs, names in INPUTS.items() for name in names]),
)
def test_against_the_oracle_with_the_reference_in_place_of_cudnn(configuration, inputs, as_if_on_a_gpu):
    as_if_on_a_gpu.setattr(rnn, "lstm", reference)
    case = cases.make(configuration, inputs)
    wanted = cases.expected(configuration, inputs)
    lstm = jaxlstm.LSTM(3, 5, implementation="cudnn", **cases.CONFIGURATIONS[configuration])
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (case.params, case.xs, case.state))
    cotangents = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), case.cotangents)

    def loss(*arguments):
        result = lstm(*arguments, **case.options)
        return cases.loss(*result, cotangents), result

    slopes, result = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*narrow)
    assert_close((result, slopes), wanted, np.float32, terms(case))


def test_the_packed_weights_unpack():
    layer = cases.make("bidirectional", "plain").params.layers[0]
    packed = cudnn.pack(layer.directions)
    assert packed.shape == (rnn.get_num_params_in_lstm(3, 5, 1, True),)
    unpacked = rnn.unpack_lstm_weights(packed, 3, 5, 1, True)
    for d, w in enumerate(layer.directions):
        for array, want in zip(unpacked, (w.w_x, w.w_h, w.b, np.zeros_like(w.b))):
            np.testing.assert_array_equal(array[d], want)


LSTM = partial(jaxlstm.LSTM, 3, 4, implementation="cudnn")


def call(lstm, **options):
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.eval_shape(partial(lstm, **options), params, jax.ShapeDtypeStruct((6, 2, 3), lstm.param_dtype))


@pytest.mark.parametrize(
    ("lstm", "options", "what"),
    [
        ({"cell": "peephole"}, {}, "a cell other than 'lstm'"),
        ({"proj_size": 2}, {}, "a projection"),
        ({"layer_norm": True}, {}, "layer normalisation"),
        ({"param_dtype": jnp.float64}, {}, "a dtype other than float32"),
        ({"dtype": jnp.bfloat16}, {}, "a dtype other than float32"),
        ({"zoneout_c": 0.1}, {}, "zoneout"),
        ({"recurrent_dropout": 0.1}, {"key": jax.random.key(0)}, "recurrent dropout"),
        ({"remat": 2}, {}, "remat"),
        ({}, {"resets": jnp.ones((6, 2), bool)}, "resets"),
        ({}, {"mask": jnp.ones((6, 2), bool)}, "a mask; lengths it takes"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(lstm, options, what, as_if_with_cuda):
    with pytest.raises(ValueError, match=re.escape(f"implementation='cudnn' does not take {what}")):
        call(LSTM(**lstm), **options)
    call(LSTM(recurrent_dropout=0.1, dropout=0.1), lengths=jnp.zeros(2, int))  # without a key, dropout is none


def test_it_needs_a_gpu():
    with pytest.raises(ValueError, match="implementation='cudnn' needs an NVIDIA GPU, got the backend 'cpu'"):
        call(LSTM())


def test_derivatives_and_maps_that_it_lacks_raise(as_if_with_cuda):
    lstm = LSTM()
    params = lstm.init(jax.random.key(0))
    xs = jnp.ones((6, 2, 3), jnp.float32)

    def loss(xs):
        return (lstm(params, xs)[0] ** 2).sum()

    with pytest.raises(ValueError, match=r"implementation='cudnn' does not take jax\.vmap"):
        jax.eval_shape(jax.vmap(loss), xs[None])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(loss, (x,), (x,))).trace(xs).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match=r"rnn_(fwd|bwd)"):
        jax.eval_shape(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()), xs)


OTHERS = [
    pytest.param(*row, marks=pytest.mark.slow) for row in (("highest", False), ("high", True), ("float32", False))
]


ALL = [(3, 4, 2, 2, 6, 0.0, True)]  # input and hidden size, layers, batch, steps, dropout, bidirectional
EACH = [(3, 4, 1, 2, 6, 0.0, True), (8, 4, 1, 2, 6, 0.0, True)]


@pytest.mark.parametrize(("dropout", "calls"), [(0.0, ALL), (0.5, EACH)])
@pytest.mark.parametrize(("precision", "tf32"), [(None, True), *OTHERS])
def test_lowers_for_cuda_with_one_call_for_all_layers(precision, tf32, dropout, calls, as_if_with_cuda):
    lstm = LSTM(num_layers=2, bidirectional=True, dropout=dropout)
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
        assert text.count(repr((*sizes, tf32))[:-1]) == 2


def test_no_steps_and_no_rows(as_if_with_cuda):
    for steps, rows in ((0, 2), (6, 0)):
        lstm = LSTM(num_layers=2, bidirectional=True)
        ys, state = jax.eval_shape(lstm, lstm.init(jax.random.key(0)), jnp.ones((steps, rows, 3), jnp.float32))
        assert ys.shape == (steps, rows, 8)
        assert state.c.shape == (4, rows, 4)
