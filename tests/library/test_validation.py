"""Errors for wrong options and arguments: one line with the received and the expected value."""

import dataclasses
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm.recurrence import explain


def zero_params(*sizes, **options):
    """Returns parameters of another configuration."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jaxlstm.LSTM(*sizes, **options).param_shapes())


lstm = jaxlstm.LSTM(3, 4, num_layers=2)
params = jax.tree.map(jnp.asarray, cases.random_params(lstm, np.random.default_rng(0), np.float32))
xs = jnp.ones((5, 2, 3), jnp.float32)
state = jaxlstm.State(jnp.full((2, 2, 4), 0.5, jnp.float32), jnp.full((2, 2, 4), -1.0, jnp.float32))


class Foreign:
    """An array of a library with dtypes unknown to NumPy."""

    shape = (5, 2, 3)
    dtype = type("Dtype", (), {"__str__": lambda _: "f32"})()


PLAIN = jaxlstm.Cell({"a": None, "b": None}, lambda b, c: b * c, lambda a, c: a * c)


def invalid_cell(**fields):
    """Makes a cell that the run-time type checker of the tests would reject."""
    cell = dataclasses.replace(PLAIN)
    for name, value in fields.items():
        object.__setattr__(cell, name, value)
    return cell


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size must be an integer, got 2.5"),
        ({"num_layers": True}, TypeError, "num_layers must be an integer, got True"),
        ({"proj_size": -1}, ValueError, "proj_size must be at least 1, got -1"),
        ({"unroll": 0}, ValueError, "unroll must be at least 1, got 0"),
        ({"remat": 0}, ValueError, "remat must be at least 1, got 0"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be True or False, got 1"),
        ({"use_bias": "no"}, TypeError, "use_bias must be True or False, got 'no'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in [0, 1), got 1.0"),
        ({"dropout": "0.5"}, TypeError, r"dropout must be a number in [0, 1), got '0.5'"),
        ({"dtype": "float99"}, TypeError, "dtype must be a floating-point dtype, got 'float99'"),
        ({"dtype": jnp.int32}, TypeError, "dtype must be a floating-point dtype, got int32"),
        ({"param_dtype": None}, TypeError, "param_dtype must be a floating-point dtype, got None"),
        ({"cell": "gruu"}, ValueError, "cell must be one of 'lstm', 'peephole', 'cifg', 'gru', "),
        ({"cell": "GRU"}, ValueError, "; got 'GRU'; did you mean 'gru'"),
        ({"activation": "relu"}, ValueError, "activation='relu' belongs to cell='rnn', got cell='lstm'"),
        ({"cell": "rnn", "activation": "gelu"}, ValueError, "activation must be one of 'tanh', 'relu', 'sigmoid'"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of"),
        ({"zoneout_h": -0.1}, ValueError, "zoneout_h must be in [0, 1), got -0.1"),
        ({"weight_drop": None}, TypeError, "weight_drop must be a number in [0, 1), got None"),
        ({"layer_norm": 1}, TypeError, "layer_norm must be True or False, got 1"),
        ({"forget_bias": "1"}, TypeError, "forget_bias must be a number, got '1'"),
        ({"forget_bias": float("nan")}, ValueError, "forget_bias must be finite, got nan"),
        ({"forget_bias": 2.0, "use_bias": False}, ValueError, "forget_bias=2.0 needs a bias, got use_bias=False"),
        ({"chrono": 2}, ValueError, "chrono must be at least 3, got 2"),
        ({"chrono": 9, "forget_bias": 0.0}, ValueError, "chrono and forget_bias both set the bias of the forget gate"),
        (
            {"cell": "rnn", "recurrent_dropout": 0.1},
            ValueError,
            "recurrent_dropout=0.1 needs a cell with a candidate, got cell='rnn'",
        ),
        (
            {"cell": "rnn", "zoneout_c": 0.1},
            ValueError,
            "zoneout_c=0.1 needs a cell with one cell state, got cell='rnn'",
        ),
        (
            {"cell": "rnn", "forget_bias": 0.0},
            ValueError,
            "forget_bias=0.0 needs a cell with a forget gate, got cell='rnn'",
        ),
        ({"cell": "rnn", "chrono": 10}, ValueError, "chrono=10 needs a cell with a forget gate, got cell='rnn'"),
        (
            {"cell": PLAIN, "recurrent_dropout": 0.5},
            ValueError,
            "recurrent_dropout=0.5 needs a cell with a candidate",
        ),
        (
            {"cell": dataclasses.replace(PLAIN, forget_gate="d")},
            ValueError,
            "forget_gate of the cell must be one of its gates a, b, got 'd'",
        ),
        (
            {"cell": dataclasses.replace(PLAIN, peepholes=("a", "d"))},
            ValueError,
            "peepholes of the cell must be some of its gates a, b, got ('a', 'd')",
        ),
        (
            {"cell": invalid_cell(candidate=0.0)},
            ValueError,
            "candidate of the cell must be one of its gates a, b, got 0.0",
        ),
        (
            {"cell": jaxlstm.Cell({"a": None}, lambda a: a, peepholes=("a",))},
            ValueError,
            "peepholes of the cell need one cell state, got none",
        ),
        ({"cell": invalid_cell(gates=5)}, TypeError, "gates of the cell must be a dict of activations by name"),
        ({"cell": dataclasses.replace(PLAIN, gates={})}, TypeError, "gates of the cell must be a dict of activations"),
        ({"cell": invalid_cell(output=5)}, TypeError, "output of the cell must be a function, got int 5"),
        ({"cell": invalid_cell(gates=(("a", 5),))}, TypeError, "the activation of gate 'a' must be a function or None"),
    ],
)
def test_lstm_rejects_wrong_option(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jaxlstm.LSTM(**{"input_size": 3, "hidden_size": 4, **options})


def call(**changes):
    return lambda: lstm(**{"params": params, "xs": xs, **changes})


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (call(xs=xs[..., :2]), ValueError, "xs must have shape (T, *batch, 3), got [5, 2, 2]"),
        (call(xs=jnp.zeros(3, jnp.float32)), ValueError, "xs must have shape (T, *batch, 3), got [3]"),
        (
            call(xs=jnp.moveaxis(xs, -1, 1)),
            ValueError,
            "got [5, 3, 2]; move the axis of the features to the end: jnp.moveaxis(xs, 1, -1)",
        ),
        (
            call(xs=jnp.zeros((5, 2, 3), jnp.int32)),
            TypeError,
            "xs must be floating-point, got int32[5, 2, 3]; token ids",
        ),
        (call(xs=None), TypeError, "xs must be an array, got NoneType"),
        (
            call(xs=Foreign()),
            TypeError,
            "xs must be an array of JAX or NumPy, got test_validation's Foreign f32[5, 2, 3]",
        ),
        (call(lengths=Foreign()), TypeError, "lengths must be an array of JAX or NumPy, got test_validation's Foreign"),
        (
            call(params=jax.tree.map(lambda a: Foreign(), params)),
            TypeError,
            "params.layers[0].forward.w_x must be an array of JAX or NumPy, got test_validation's Foreign",
        ),
        (
            call(xs=jax.ShapeDtypeStruct((5, 2, 3), jnp.float32)),
            TypeError,
            "xs must be an array of JAX or NumPy, got jax's ShapeDtypeStruct float32[5, 2, 3]",
        ),
        (call(xs=[[1.0], [2.0, 3.0]]), TypeError, "xs must be an array, got list: "),
        (call(lengths=2**70), TypeError, f"lengths must be an array, got int {2**70}: "),
        (call(lengths=(5, None)), TypeError, "lengths must be an array, got tuple: "),
        (call(xs=state), TypeError, "xs must be an array, got State"),
        (call(lengths=[5, None]), TypeError, "lengths must be an array, got list: "),
        (call(state=state.h), TypeError, "state must be a jaxlstm.State(h, c) or a tuple (h, c), got float32[2, 2, 4]"),
        (call(state=(*state, state.c)), TypeError, "state must be a jaxlstm.State(h, c) or a tuple (h, c), got tuple"),
        (call(state=(state.h[:1], state.c)), ValueError, "state.h must have shape [2, 2, 4], got [1, 2, 4]"),
        (call(state=state._replace(h=state.h[:1])), ValueError, "state.h must have shape [2, 2, 4], got [1, 2, 4]"),
        (call(state=state._replace(c=None)), ValueError, "state.c must be an array [2, 2, 4]; got NoneType"),
        (call(lengths=jnp.zeros(3, int)), ValueError, "lengths must have shape [2], got [3]"),
        (call(lengths=jnp.zeros(2, jnp.float32)), TypeError, "lengths must be integer, got float32[2]"),
        (call(mask=jnp.ones((2, 5), bool)), ValueError, "mask must have shape [5, 2], got [2, 5]"),
        (call(mask=jnp.ones((5, 2), jnp.float32)), TypeError, "mask must be boolean, got float32[5, 2]"),
        (call(resets=jnp.ones(5, bool)), ValueError, "resets must have shape [5, 2], got [5]"),
        (call(resets=jnp.ones((5, 2), int)), TypeError, "resets must be boolean, got int64[5, 2]"),
        (call(reverse=1), TypeError, "reverse must be True or False, got 1"),
        (call(key=0), TypeError, "key must be one PRNG key such as jax.random.key(0), got int 0"),
        (call(key=Foreign()), TypeError, "key must be one PRNG key such as jax.random.key(0), got f32[5, 2, 3]"),
        (call(key=jax.random.split(jax.random.key(0))), TypeError, "key must be one PRNG key"),
        (
            call(key=jnp.zeros(3, jnp.uint32)),
            TypeError,
            "key must be one PRNG key such as jax.random.key(0), got uint32[3]",
        ),
        (call(params=list(params)), TypeError, "params must be a jaxlstm.Params as made by init, got list"),
        (
            call(params=zero_params(3, 5, num_layers=2)),
            ValueError,
            "params.layers[0].forward.w_x must have shape [16, 3], got [20, 3]",
        ),
        (
            call(params=zero_params(3, 4)),
            ValueError,
            "params.layers[1].forward.w_x is missing; expected shape [16, 4]",
        ),
        (
            call(params=zero_params(3, 4, num_layers=2, bidirectional=True)),
            ValueError,
            "params.layers[1].forward.w_x must have shape [16, 4], got [16, 8]",
        ),
        (
            call(params=zero_params(3, 4, num_layers=2, proj_size=4)),
            ValueError,
            "params.layers[0].forward.w_p is not a parameter of this configuration, got float32[4, 4]",
        ),
        (
            call(params=jax.tree.map(lambda a: a.astype(jnp.float64), params)),
            TypeError,
            "params.layers[0].forward.w_x is float64, wider than the float32 of this configuration; set param_dtype",
        ),
        (
            call(params=jax.tree.map(lambda a: a.astype(jnp.int32), params)),
            TypeError,
            "params.layers[0].forward.w_x must be floating-point, got int32[16, 3]",
        ),
        (lambda: lstm.init(0), TypeError, "key must be one PRNG key"),
        (
            lambda: lstm.step(params, state, xs),
            ValueError,
            "got [2, 2, 4] (x, of shape [5, 2, 3], is one step; calling",
        ),
        (
            lambda: lstm.step(params, xs[0], state),
            TypeError,
            "step takes params, state and x in this order, got state=float32[2, 3] and x=State",
        ),
        (lambda: lstm.step(params, state, xs[0, :, :1]), ValueError, "x must have shape (*batch, 3), got [2, 1]"),
        (
            lambda: jaxlstm.LSTM(3, 4, bidirectional=True).step(params, state, xs[0]),
            ValueError,
            "step does not support bidirectional=True: the backward direction needs the whole sequence",
        ),
        (
            lambda: jaxlstm.LSTM(3, 4, cell="rnn").step(params, state, xs[0]),
            ValueError,
            "params.layers[0].forward.w_x must have shape [4, 3]",
        ),
        (lambda: lstm.initial_state((2, -1)), ValueError, "batch_shape must be sizes of at least 0, got (2, -1)"),
    ],
)
def test_lstm_rejects_wrong_argument(action, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        action()
    assert "\n" not in str(caught.value)
    # The same message while tracing.
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(action)


@pytest.mark.parametrize("network", [jaxlstm.LSTM(1, 1), jaxlstm.ConvLSTM(1, 1, 1, kernel_size=1)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "uint64", "int64"])
def test_lengths_accept_any_integer_dtype(network, dtype):
    """The dtype holds every length, but not always the number of steps."""
    lengths = np.array([100, 5, 0, np.iinfo(dtype).max], dtype)
    num_steps = 70_000 if dtype == "int16" else 300
    xs = jnp.ones((num_steps, 4, *network.feature_shape(1)), jnp.float32)
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), network.param_shapes())
    ys, _ = network(params, xs, lengths=lengths)
    num_outputs = np.count_nonzero(np.asarray(ys).reshape(num_steps, 4), axis=0)
    np.testing.assert_array_equal(num_outputs, np.minimum(lengths.astype(object), num_steps).astype(int))


def test_cell_without_cell_state_rejects_one():
    rnn = jaxlstm.LSTM(3, 4, cell="rnn")
    with pytest.raises(ValueError, match=re.escape("state.c must be None: this cell has no cell state; got float32")):
        rnn(zero_params(3, 4, cell="rnn"), xs, (jnp.zeros((1, 2, 4)), jnp.zeros((1, 2, 4), jnp.float32)))
    message = "state must be a jaxlstm.State(h, None) or a tuple (h, None), got {}: this cell has no cell state"
    h = jnp.zeros((1, 2, 4), jnp.float32)
    for wrong_state, received in ((h, "float32[1, 2, 4]"), ((h,), "tuple")):
        with pytest.raises(TypeError, match=f"^{re.escape(message.format(received))}$"):
            rnn(zero_params(3, 4, cell="rnn"), xs, wrong_state)


def test_float64_raises_without_x64():
    wide = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match=r"param_dtype is float64, which needs jax\.config"):
            wide.init(jax.random.key(0))
        with pytest.raises(ValueError, match="dtype is float64, which needs"):
            jaxlstm.LSTM(3, 4, dtype="float64")(params, xs)
    finally:
        jax.config.update("jax_enable_x64", True)


def test_lstm_accepts_numpy_scalars():
    options = {
        "num_layers": 2,
        "bidirectional": True,
        "layer_norm": False,
        "dropout": 0.5,
        "forget_bias": 2.0,
        "remat": 3,
    }
    numpy_options = {
        "num_layers": np.int32(2),
        "bidirectional": np.True_,
        "layer_norm": np.False_,
        "dropout": np.float32(0.5),
        "forget_bias": np.int64(2),
        "remat": np.uint8(3),
    }
    a, b = jaxlstm.LSTM(3, 4, **options), jaxlstm.LSTM(np.int64(3), np.int16(4), **numpy_options)
    assert a == b
    assert hash(a) == hash(b)
    assert b.bidirectional is True
    assert isinstance(b.dropout, float)


@pytest.mark.parametrize("create", [np.array, jnp.array, jnp.bfloat16])
def test_lstm_accepts_numbers_as_arrays_without_axes(create):
    network = jaxlstm.LSTM(3, 4, num_layers=2, dropout=create(0.5), forget_bias=create(2.0))
    assert network == jaxlstm.LSTM(3, 4, num_layers=2, dropout=0.5, forget_bias=2.0)
    assert isinstance(network.dropout, float)


@pytest.mark.parametrize("value", [jnp.array([0.5]), np.array(True), jnp.array(0.5j), np.array("0.5")])
def test_lstm_rejects_arrays_that_are_not_one_number(value):
    with pytest.raises(TypeError, match=r"^dropout must be a number in \[0, 1\), got "):
        jaxlstm.LSTM(3, 4, num_layers=2, dropout=value)


def test_lstm_rejects_a_traced_number():
    with pytest.raises(TypeError, match=r"^dropout must be a number in \[0, 1\), got "):
        jax.jit(lambda rate: jaxlstm.LSTM(3, 4, num_layers=2, dropout=rate).init(jax.random.key(0)))(0.5)


def test_configurations_with_equal_dtypes_are_equal():
    a, b = jaxlstm.LSTM(3, 4, dtype="bfloat16"), jaxlstm.LSTM(3, 4, dtype=jnp.bfloat16)
    assert a == b
    assert hash(a) == hash(b)


def test_call_accepts_lists_tuples_and_other_float_dtypes():
    """Lengths as a list or a tuple, a plain tuple as the state, wider inputs, and a narrower state and parameters."""
    wanted = lstm(params, xs, state, lengths=np.array([5, 0]))
    jax.tree.map(np.testing.assert_array_equal, lstm(params, xs, (state.h, state.c), lengths=[5, 0]), wanted)
    jax.tree.map(np.testing.assert_array_equal, lstm(params, xs, state, lengths=(5, 0)), wanted)
    narrow_params, narrow_state = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, tuple(state)))
    last = lstm(narrow_params, np.zeros((5, 2, 3)), narrow_state, lengths=[5, 0], reverse=np.False_)[1]
    assert isinstance(last, jaxlstm.State)
    assert last.h.dtype == last.c.dtype == jnp.float32


def test_step_accepts_tuple_as_state():
    wanted = lstm.step(params, state, xs[0])
    jax.tree.map(np.testing.assert_array_equal, lstm.step(params, (state.h, state.c), xs[0]), wanted)


def test_initial_state_accepts_int_as_batch_shape():
    assert lstm.initial_state(2).h.shape == lstm.initial_state((2,)).h.shape == (2, 2, 4)


def test_learned_state_needs_params():
    network = jaxlstm.LSTM(3, 4, learned_state=True)
    with pytest.raises(ValueError, match="initial_state needs params, which hold the state with learned_state=True"):
        network.initial_state(2)
    with pytest.raises(ValueError, match=re.escape("params.state.h is missing; expected shape [1, 4]")):
        network(zero_params(3, 4), xs)


@pytest.mark.parametrize("use", ["explain", "export", "autotune"])
def test_functions_do_not_repeat_the_warnings_of_a_network(use):
    """They make networks with other options from the user's, whose warnings were given; pytest raises any other."""
    with pytest.warns(UserWarning, match="dropout option"):
        lstm = jaxlstm.LSTM(2, 3, dropout=0.5)
    {
        "explain": lambda: explain(lstm, (4, 2)),
        "export": lambda: jaxlstm.export.sequence(lstm, lstm.init(jax.random.key(0))),
        "autotune": lambda: jaxlstm.autotune(lstm, (4, 1, 2), training=False, seconds=0.1),
    }[use]()
