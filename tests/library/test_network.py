"""The base class of `jaxlstm.LSTM` and `jaxlstm.ConvLSTM`: one step, configuration, parameters and public names."""

import subprocess
import sys
import typing
import warnings
from dataclasses import replace
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm

B, T, I, H = 3, 4, 2, 5  # noqa: E741  (the letter of the shape table)
NETWORKS = {
    "lstm": jaxlstm.LSTM(I, H, num_layers=2, param_dtype=jnp.float64),
    "learned state": jaxlstm.LSTM(I, H, num_layers=2, proj_size=3, learned_state=True, param_dtype=jnp.float64),
    "rnn": jaxlstm.LSTM(I, H, cell="rnn", learned_state=True, param_dtype=jnp.float64),
    "conv": jaxlstm.ConvLSTM(I, H, (3,), num_layers=2, param_dtype=jnp.float64),
    "conv learned state": jaxlstm.ConvLSTM(I, H, (3,), learned_state=True, param_dtype=jnp.float64),
}


def random_inputs(network, seed=0):
    rng = np.random.default_rng(seed)
    params = cases.random_params(network, rng)
    xs = rng.standard_normal((T, B, *network.feature_shape(I)))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), network.state_shapes((B,)))
    return params, xs, state


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance(np.float64, T * H))


@pytest.mark.parametrize("name", NETWORKS)
def test_step_with_reset_equals_call_with_resets(name):
    network = NETWORKS[name]
    params, xs, state = random_inputs(network)
    resets = np.random.default_rng(1).random((T, B)) < 0.5
    expected = network(params, xs, state, resets=resets)

    def step(state, inputs):
        x, reset = inputs
        return network.step(params, state, x, reset=reset)

    last, ys = jax.lax.scan(step, jax.tree.map(jnp.asarray, state), (xs, resets))
    assert_equal((ys, last), expected)
    assert_equal(network.step(params, state, xs[0], reset=np.zeros(B, bool)), network.step(params, state, xs[0]))


def test_step_is_a_scan_body():
    network = NETWORKS["lstm"]
    params, xs, state = random_inputs(network)
    last, ys = jax.lax.scan(partial(network.step, params), jax.tree.map(jnp.asarray, state), xs)
    assert_equal((ys, last), network(params, xs, state))


def test_step_names_a_wrong_reset():
    network = NETWORKS["lstm"]
    params, xs, state = random_inputs(network)
    with pytest.raises(ValueError, match=r"reset must have shape \[3\], got \[2\]"):
        network.step(params, state, xs[0], reset=np.zeros(2, bool))
    with pytest.raises(TypeError, match=r"reset must be boolean, got int64\[3\]"):
        network.step(params, state, xs[0], reset=np.zeros(3, int))


@pytest.mark.parametrize("name", ["lstm", "rnn", "conv"])
def test_state_may_be_a_plain_tuple(name):
    network = NETWORKS[name]
    params, xs, state = random_inputs(network)
    assert_equal(network(params, xs, tuple(state)), network(params, xs, state))
    result = network.step(params, tuple(state), xs[0])
    assert isinstance(result[0], jaxlstm.State)
    assert_equal(result, network.step(params, state, xs[0]))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_last_outputs_equals_each_sequence_alone(bidirectional):
    lstm = jaxlstm.LSTM(I, H, bidirectional=bidirectional, param_dtype=jnp.float64)
    params, xs, _ = random_inputs(lstm)
    lengths = np.array([T, 0, 2])
    ys, state = lstm(params, xs, lengths=lengths)
    last = jaxlstm.last_outputs(ys, lengths, bidirectional=bidirectional)
    assert_equal(last, np.concatenate([np.where(lengths[:, None] > 0, h, 0) for h in state.h], axis=-1))
    assert_equal(last[0], jaxlstm.last_outputs(ys[:, 0], bidirectional=bidirectional))
    assert not last[1].any()
    assert_equal(jaxlstm.last_outputs(ys[:, 0], lengths[0] + 7, bidirectional=bidirectional), last[0])
    assert_equal(jaxlstm.last_outputs(ys[:0], bidirectional=bidirectional), np.zeros_like(last))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_final_state_has_the_last_outputs_of_masked_sequences(bidirectional):
    """The docstring of `last_outputs` says so."""
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=bidirectional)
    xs = jax.random.normal(jax.random.key(1), (5, 2, 3))
    mask = np.array([[True, False, True, False, False], [False, True, True, True, True]]).T
    ys, state = lstm(lstm.init(jax.random.key(0)), xs, mask=mask)
    assert_equal(state.h[-1 - bidirectional], jnp.stack([ys[2, 0, :4], ys[4, 1, :4]]))
    if bidirectional:
        assert_equal(state.h[-1], jnp.stack([ys[0, 0, 4:], ys[1, 1, 4:]]))
    assert_equal(jaxlstm.last_outputs(ys)[0], np.zeros(ys.shape[-1]))


@pytest.mark.slow
def test_last_outputs_of_a_conv_lstm_takes_its_lengths():
    conv = jaxlstm.ConvLSTM(1, 2, (3, 4))
    xs = np.random.default_rng(0).standard_normal((5, 2, 3, 4, 1)).astype(np.float32)
    lengths = np.array([3, 0])
    ys, state = conv(conv.init(jax.random.key(0)), xs, lengths=lengths)
    last = jaxlstm.last_outputs(ys, lengths)
    assert_equal(last[0], state.h[0, 0])
    assert_equal(last[1], np.zeros_like(last[1]))


def test_last_outputs_ignores_padding():
    ys = jnp.ones((T, B, 2)).at[2:].set(jnp.nan)
    lengths = jnp.array([1, 2, 0])
    gradient = jax.grad(lambda ys: jaxlstm.last_outputs(ys, lengths).sum())(ys)
    np.testing.assert_array_equal(jaxlstm.last_outputs(ys, lengths), [[1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(gradient[:, :, 0], [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((np.zeros(3),), {}, ValueError, r"ys must have shape \(T, \*batch, outputs\), got \[3\]"),
        ((np.zeros((4, 3)),), {"bidirectional": True}, ValueError, "must have an even number of outputs, got 3"),
        ((np.zeros((4, 3, 2)), np.zeros(2, int)), {}, ValueError, r"lengths must have shape \[3\], got \[2\]"),
        ((np.zeros((4, 3, 2), int),), {}, TypeError, "ys must be floating-point"),
    ],
)
def test_last_outputs_names_wrong_arguments(args, options, error, message):
    with pytest.raises(error, match=message):
        jaxlstm.last_outputs(*args, **options)


def test_options_may_be_numpy_scalars():
    network = jaxlstm.LSTM(np.int32(3), np.int64(4), bidirectional=np.True_, zoneout_h=np.float32(0.5))
    assert network == jaxlstm.LSTM(3, 4, bidirectional=True, zoneout_h=0.5)
    assert hash(network) == hash(jaxlstm.LSTM(3, 4, bidirectional=True, zoneout_h=0.5))


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (jaxlstm.LSTM(64, 256), "LSTM(64, 256)"),
        (jaxlstm.LSTM(3, 4, num_layers=2, dtype=jnp.bfloat16), "LSTM(3, 4, num_layers=2, dtype=bfloat16)"),
        (jaxlstm.LSTM(3, 4, param_dtype=jnp.float64, cell="cifg"), "LSTM(3, 4, cell='cifg', param_dtype=float64)"),
        (jaxlstm.LSTM(3, 4, implementation="scan"), "LSTM(3, 4, implementation='scan')"),
        (jaxlstm.ConvLSTM(1, 2, 8), "ConvLSTM(1, 2, (8,))"),
        (jaxlstm.ConvLSTM(1, 2, (8, 9), kernel_size=5), "ConvLSTM(1, 2, (8, 9), kernel_size=(5, 5))"),
        (jaxlstm.ConvLSTM(1, 2, 8, num_layers=2), "ConvLSTM(1, 2, (8,), num_layers=2)"),
    ],
)
def test_repr_shows_what_differs_from_the_defaults(network, text):
    assert repr(network) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_num_parameters_counts_the_arrays_of_init(name, capsys):
    network = NETWORKS[name]
    params = network.init(jax.random.key(0))
    assert network.num_parameters == sum(a.size for a in jax.tree.leaves(params))
    network.summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == repr(network)
    assert lines[-1].split() == ["total", "float64", f"{network.num_parameters:,}"]
    assert len(lines) == 2 + len(jax.tree.leaves(params))
    assert lines[1].startswith("layers[0].forward.w_x")
    assert str(params.layers[0].forward.w_x.shape) in lines[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxlstm.LSTM(3, 4, dropout=0.5), "dropout option adds dropout after all but last recurrent layer"),
        (lambda: jaxlstm.ConvLSTM(3, 4, 5, dropout=0.5), "got dropout=0.5 and num_layers=1"),
        (lambda: jaxlstm.LSTM(3, 4, num_layers=2, variational=True), "variational option gives the dropout"),
    ],
)
def test_dropout_without_effect_warns_once_at_the_caller(make, message):
    def several():
        for _ in range(3):
            make()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        several()
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert message in str(caught[0].message)
    assert caught[0].filename == __file__


def test_dropout_with_an_effect_does_not_warn():
    jaxlstm.LSTM(3, 4, num_layers=2, dropout=0.5, variational=True)
    jaxlstm.LSTM(3, 4, input_dropout=0.5, output_dropout=0.5)


def test_public_names_are_listed_and_loaded_lazily():
    code = """
import sys, jaxlstm
lazy = ["diagnostics", "interop", "flax", "export", "packing", "training", "experimental"]
assert not [name for name in lazy if f"jaxlstm.{name}" in sys.modules]
assert {*jaxlstm.__all__, *lazy, "__version__"} <= set(dir(jaxlstm))
assert not [name for name in dir(jaxlstm) if name.startswith("_") and name != "__version__"]
for name in lazy:
    assert getattr(jaxlstm, name).__name__ == f"jaxlstm.{name}"
for name in dir(jaxlstm):
    getattr(jaxlstm, name)
assert jaxlstm.recurrence.fused.Fused() == jaxlstm.recurrence.fused.run
assert jaxlstm.recurrence.scan.Scan() == jaxlstm.recurrence.scan.run
assert not hasattr(jaxlstm.recurrence, "pallas")
try:
    jaxlstm.lstn
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout == "module 'jaxlstm' has no attribute 'lstn'\n"


def cell(**fields):
    """Options with a cell that is wrong in some fields."""
    return {"cell": replace(jaxlstm.Cell({"a": None}, lambda c: c, lambda a, c: a + c), **fields)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cell": lambda a, c: a}, TypeError, "declare it: jaxlstm.Cell"),
        (
            cell(update=lambda a, c: c + np.ones((1, 4), "f")),
            ValueError,
            "update of the cell failed on arrays \\[2, 3\\]",
        ),
        (cell(update=lambda a, c: c.sum(0, keepdims=True) + a), ValueError, "got the operation 'reduce_sum'"),
        (cell(gates={"a": jax.nn.softmax}), ValueError, "the activation of gate 'a' .* got the operation 'reduce_max'"),
        (cell(output=lambda c: jnp.cumsum(c, 0)), ValueError, "output of the cell .* got the operation 'cumsum'"),
        (cell(output=lambda c: c[::-1]), ValueError, "output of the cell .* got the operation 'rev'"),
        (cell(output=lambda c: c * jax.lax.broadcasted_iota(c.dtype, c.shape, 1)), ValueError, "operation 'iota'"),
        (cell(update=lambda a, c: (a, c)), ValueError, "update of the cell must be elementwise .* returned tuple"),
        (cell(update=lambda a, other: a), ValueError, "update of the cell takes 'other', which is not one of a, c"),
        (cell(update=None), ValueError, "a cell has states if it has an update: got state=c"),
        (cell(update=lambda c: c), ValueError, "gate 'a' of the cell is read neither by update nor by output"),
        (cell(output=lambda c: sum(np.ones(2)[:3], c)), ValueError, "output of the cell failed on arrays"),
        (cell(gates={"a": jnp.sum}), ValueError, "the activation of gate 'a' must be elementwise .* returned \\[\\]"),
        (
            cell(gates={"c": None}),
            ValueError,
            "names of gates must be different identifiers, not h or a state",
        ),
    ],
)
def test_wrong_cell_is_reported_when_the_network_is_made(options, error, message):
    with pytest.raises(error, match=message):
        jaxlstm.LSTM(3, 4, **options)


def test_functions_of_an_lstm_name_another_network():
    conv = jaxlstm.ConvLSTM(1, 2, 8)
    with pytest.raises(TypeError, match=r"lstm must be a jaxlstm\.LSTM, got ConvLSTM"):
        jaxlstm.recurrence.explain(conv, (3, 8, 1))
    with pytest.raises(TypeError, match=r"lstm must be a jaxlstm\.LSTM, got ConvLSTM"):
        jaxlstm.export.sequence(conv, conv.init(jax.random.key(0)))


def test_cell_names_are_those_of_the_cells():
    assert set(typing.get_args(jaxlstm.cells.CellName)) == {*jaxlstm.cells.CELLS, "rnn"}


def test_star_import_needs_no_optional_package():
    code = "import sys; sys.modules['flax'] = None; from jaxlstm import *; print(LSTM.__name__, 'training' in dir())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "LSTM False\n"


def test_submodules_of_submodules_are_loaded_on_first_use():
    code = "import jaxlstm; print(jaxlstm.experimental.newton.Newton.__name__, jaxlstm.diagnostics.plots.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "Newton jaxlstm.diagnostics.plots\n"


def test_functions_of_a_result_name_another_object(tmp_path):
    lstm = jaxlstm.LSTM(3, 4)
    with pytest.raises(TypeError, match=r"trace must be the result of jaxlstm\.diagnostics\.trace, got float64\[2\]"):
        jaxlstm.diagnostics.gate_statistics(np.ones(2))
    with pytest.raises(TypeError, match=r"program must be an exported program, .*, got LSTM"):
        jaxlstm.export.save(lstm, tmp_path / "program")


def test_package_without_flax_can_still_be_listed():
    code = "import sys; sys.modules['flax'] = None; import jaxlstm; print(hasattr(jaxlstm, 'flax')); jaxlstm.flax"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n"
    assert "jaxlstm.flax needs flax, which is not installed: pip install 'jaxlstm[flax]'" in result.stderr


def test_backends_may_be_callables():
    """A hashable callable with the signature of a backend is used like a named one."""
    calls = []

    def backend(cell, directions, context):
        calls.append(len(directions))
        return jaxlstm.recurrence.backends.get_backend("scan")(cell, directions, context)

    lstm = jaxlstm.LSTM(I, H, bidirectional=True, param_dtype=jnp.float64, implementation=backend)
    params, xs, state = random_inputs(lstm)
    expected = jaxlstm.LSTM(I, H, bidirectional=True, param_dtype=jnp.float64)(params, xs, state)
    assert_equal(lstm(params, xs, state), expected)
    assert calls == [2]
