"""Cells beside the LSTM: sources, states, heads, diagonal recurrence, and the errors of what they do not support."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random_params
from tolerance import tolerance

import jaxlstm
from jaxlstm.cells import CELLS, Cell, sigmoid
from jaxlstm.initializers import power_law_forget_bias
from jaxlstm.recurrence.gates import evaluate_cell

T, B, INPUT_SIZE, H, S = 6, 3, 2, 4, 3
OPTIONS = {"ea": {"static_size": S}}
NETWORKS = {
    name: jaxlstm.RNN(INPUT_SIZE, H, cell=name, param_dtype=jnp.float64, **OPTIONS.get(name, {})) for name in CELLS
}
NETWORKS["heads"] = replace(NETWORKS["slstm"], heads=2)


def inputs(network, seed=0):
    """Draws parameters, inputs and the static features, if there are any, in float64."""
    rng = np.random.default_rng(seed)
    options = {} if network.static_size is None else {"static": rng.standard_normal((B, S))}
    return random_params(network, rng), rng.standard_normal((T, B, INPUT_SIZE)), options


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("lstm", {"w_x": (16, 2), "w_h": (16, 4), "b": (16,)}),
        ("gru", {"w_x": (12, 2), "w_h": (12, 4), "b": (16,)}),
        ("minlstm", {"w_x": (12, 2), "b": (12,)}),
        ("indrnn", {"w_x": (4, 2), "w_h": (4, 1), "b": (4,)}),
        ("paralstm", {"w_x": (12, 2), "w_h": (12, 1), "b": (12,), "w_c": (2, 4)}),
        ("heads", {"w_x": (16, 2), "w_h": (16, 2), "b": (16,)}),
        ("ea", {"w_x": (12, 2), "w_h": (12, 4), "b": (16,), "w_s": (4, 3)}),
    ],
)
def test_weights_exist_only_for_gates_that_read_them(name, shapes):
    weights = NETWORKS[name].init(jax.random.key(0)).layers[0].forward
    assert {field: a.shape for field, a in weights._asdict().items() if a is not None} == shapes


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("lstm", "cifg")])
def test_step_of_every_cell_equals_call(name):
    network = NETWORKS[name]
    params, xs, options = inputs(network)
    ys, state = jax.jit(network)(params, xs, **options)
    step = partial(network.step, params, **options)
    last, steps = jax.lax.scan(step, network.initial_state((B,)), jnp.asarray(xs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, 16)), (steps, last), (ys, state))


@pytest.mark.parametrize("name", CELLS)
def test_affine_is_declared_rightly(name):
    """An affine function has no curvature: its differences at equal steps of the states are equal."""
    cell, rng = CELLS[name], np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((cell.num_gates, H)))
    peepholes = jnp.asarray(rng.standard_normal((len(cell.peepholes), H))) if cell.peepholes else None
    reads_h = jnp.asarray([0.3 if n in cell.slabs_reading("h") else 0.0 for n in range(cell.num_gates)])
    start, shift = ({s: 0.5 + rng.random(H) for s in (*cell.initial_values, "h")} for _ in range(2))
    shift["h"] = np.array([-30.0, 30.0, -3.0, 3.0])  # so that rectified units change their sign

    def run(amount):
        states = {s: jnp.asarray(start[s] + amount * shift[s]) for s in start}
        h = states.pop("h")
        c, y = evaluate_cell(
            cell, z + jnp.outer(reads_h, h), cell.pack_states(states), peepholes, h=h if cell.reads_h else None
        )
        return np.concatenate([np.ravel(a) for a in (*jax.tree.leaves(c), y)])

    curvature = np.abs(run(2.0) - 2 * run(1.0) + run(0.0)).max()
    assert bool(curvature < 1e-12) == cell.affine


@pytest.mark.parametrize("implementation", ["scan", "fused"])
@pytest.mark.parametrize("name", ["slstm", pytest.param("heads", marks=pytest.mark.slow)])
def test_reset_to_infinite_state_is_exact_and_differentiable(name, implementation):
    """A reset equals a new sequence, and the gradients of both are the same and finite."""
    network = replace(NETWORKS[name], implementation=implementation)
    params, xs, _ = inputs(network)
    resets = np.zeros((T, B), bool)
    resets[[0, 3]] = True

    def loss(params, xs):
        return (network(params, xs, resets=resets)[0] ** 2).sum()

    def loss_of_parts(params, xs):
        return sum((network(params, part)[0] ** 2).sum() for part in (xs[:3], xs[3:]))

    expected, actual = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, xs) for f in (loss_of_parts, loss))
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(actual))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, 64)), actual, expected)
    backward = network(params, xs, resets=resets, reverse=True)[1].c
    assert (backward["m"] == -jnp.inf).all()
    assert (backward["n"] == 0).all()


@pytest.mark.parametrize("implementation", ["scan", "fused"])
def test_slstm_with_large_pre_activations_is_finite(implementation):
    """exp(200) overflows float32; the stabilizer keeps every exponent at or below 0."""
    network = jaxlstm.RNN(INPUT_SIZE, H, cell="slstm", implementation=implementation)
    params = jax.tree.map(lambda a: jnp.full(a.shape, 100.0, a.dtype), network.param_shapes())
    xs = jnp.ones((T, B, INPUT_SIZE))
    value, gradient = jax.value_and_grad(lambda params: network(params, xs)[0].sum())(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(gradient))


@pytest.mark.parametrize("implementation", ["scan", "fused"])
def test_minlstm_with_shut_gates_is_finite(implementation):
    """Both gates are 0 in float32, and their ratio is not."""
    network = jaxlstm.RNN(INPUT_SIZE, H, cell="minlstm", implementation=implementation)
    params = jax.tree.map(lambda a: jnp.full(a.shape, -100.0, a.dtype), network.param_shapes())
    value, gradient = jax.value_and_grad(lambda params: network(params, jnp.ones((T, B, INPUT_SIZE)))[0].sum())(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(gradient))


@pytest.mark.parametrize("implementation", ["scan", "fused"])
def test_gradient_of_static_features_equals_oracle(implementation):
    network = replace(NETWORKS["ea"], implementation=implementation)
    params, xs, options = inputs(network)
    weights = np.random.default_rng(1).standard_normal((T, B, H))

    def loss(static):
        return (network(params, xs, static=static)[0] * weights).sum()

    def oracle_loss(arrays):
        zeros = np.zeros((1, B, H))
        ys, *_ = oracle.network(params, xs, zeros, zeros, cell="ea", static=arrays[0])
        return (ys * weights).sum((-3, -2, -1))

    (expected,) = oracle.gradient(oracle_loss, [options["static"]])
    np.testing.assert_allclose(jax.grad(loss)(options["static"]), expected, **tolerance(np.float64, 64))


@pytest.mark.parametrize("implementation", ["scan", "fused"])
def test_vmap_over_static_features_equals_batch(implementation):
    network = replace(NETWORKS["ea"], implementation=implementation)
    params, xs, options = inputs(network)

    def run(xs, static):
        return network(params, xs, static=static)[0]

    expected = run(xs, options["static"])
    actual = jax.vmap(run, (1, 0), 1)(xs, options["static"])
    np.testing.assert_allclose(actual, expected, **tolerance(np.float64, 16))


def test_own_gru_equals_gru():
    own = Cell(
        gates={"r": sigmoid, "z": sigmoid, "a": None, "b": None},
        output=lambda r, z, a, b, h: (1 - z) * jnp.tanh(a + r * b) + z * h,
        reads={"a": ("x",), "b": ("h",)},
    )
    gru = NETWORKS["gru"]
    params, xs, _ = inputs(gru)
    expected, actual = (network(params, xs) for network in (gru, replace(gru, cell=own)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, 16)), actual, expected)


def test_classes_differ_in_default_cell_alone():
    params, xs, _ = inputs(NETWORKS["gru"])
    gru = jaxlstm.GRU(INPUT_SIZE, H, param_dtype=jnp.float64)
    assert gru.resolved_cell == jaxlstm.LSTM(INPUT_SIZE, H, cell="gru").resolved_cell == NETWORKS["gru"].resolved_cell
    assert repr(gru) == "GRU(2, 4, param_dtype=float64)"
    ys, state = gru(params, xs)
    assert state.c is None
    np.testing.assert_array_equal(ys, NETWORKS["gru"](params, xs)[0])
    assert jaxlstm.RNN(INPUT_SIZE, H).resolved_cell == jaxlstm.LSTM(INPUT_SIZE, H, cell="rnn").resolved_cell


def test_power_law_forget_bias_equals_values_by_hand():
    bias = power_law_forget_bias(4, 1, heads=2)(jax.random.key(0), (24,), jnp.float32)
    first = [5, 5 - 12 * 0.5**0.3, -7]
    np.testing.assert_allclose(bias, [0] * 6 + first * 2 + [0] * 12, rtol=1e-6)
    last = jaxlstm.RNN(INPUT_SIZE, 3, cell="slstm", num_layers=2).init(jax.random.key(0)).layers[1].forward.b
    np.testing.assert_allclose(last[3:6], [5, 5 - 12 * 0.5**1.6, -7], rtol=1e-6)
    flat = jaxlstm.RNN(INPUT_SIZE, 3, cell="slstm", forget_bias=2).init(jax.random.key(0)).layers[0].forward.b
    np.testing.assert_array_equal(flat, [0] * 3 + [2] * 3 + [0] * 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "gru", "proj_size": 2}, "proj_size=2 needs a cell with functions that do not take h"),
        ({"cell": "gru", "recurrent_dropout": 0.1}, "recurrent_dropout=0.1 needs a cell with a candidate"),
        ({"cell": "slstm", "zoneout_c": 0.1}, "zoneout_c=0.1 needs a cell with one cell state"),
        ({"cell": "slstm", "learned_state": True}, "learned_state=True needs a cell with finite initial states"),
        ({"cell": "slstm", "heads": 3}, "hidden_size must be a multiple of heads=3, got 4"),
        ({"cell": "lstm", "heads": 2, "proj_size": 2}, "heads=2 does not support proj_size=2"),
        ({"cell": "minlstm", "heads": 2}, "heads=2 needs a cell with dense recurrent weights"),
        ({"cell": "indrnn", "heads": 2}, "heads=2 needs a cell with dense recurrent weights"),
        ({"cell": "indrnn", "proj_size": 2}, "proj_size=2 needs dense recurrent weights"),
        ({"cell": "ea"}, "cell='ea' reads static features; set static_size to their number"),
        ({"cell": "lstm", "static_size": 2}, "static_size=2 needs a cell with a gate that reads static features"),
        ({"cell": "ea", "static_size": 2, "layer_norm": True}, "layer_norm=True does not support a cell that reads"),
    ],
)
def test_network_rejects_option_that_the_cell_does_not_support(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxlstm.RNN(INPUT_SIZE, H, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": {"x": ("x",)}}, "reads of the cell must name its gates f, g, got 'x'"),
        ({"reads": {"f": ()}}, "gate 'f' must read some of x, h, static, as a tuple, got ()"),
        ({"reads": {"f": ("x", "x")}}, "gate 'f' must read some of x, h, static, as a tuple, got ('x', 'x')"),
        ({"reads": {"f": ("h",), "g": ("h",)}}, "at least one gate of the cell must read x, got none"),
        ({"state": {"f": 0.0}}, "names of gates must be different identifiers, not h or a state, got 'f'"),
        ({"state": {"c": float("nan")}}, "the initial value of state 'c' must be a number, got nan"),
        ({"state": {}}, "a cell has states if it has an update: got state=none and an update"),
        ({"state": {"c": 0.0, "n": 0.0}}, "update of the cell must return a tuple of 2 states"),
    ],
)
def test_network_rejects_wrong_declaration_of_a_cell(change, message):
    cell = Cell(gates={"f": sigmoid, "g": None}, update=lambda f, g, c: f * c + g, output=lambda c: c)
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxlstm.RNN(INPUT_SIZE, H, cell=replace(cell, **change))


def test_call_rejects_missing_and_unexpected_static_features():
    params, xs, options = inputs(NETWORKS["ea"])
    with pytest.raises(ValueError, match=re.escape("static must have shape [3, 3] with cell='ea', got none")):
        NETWORKS["ea"](params, xs)
    with pytest.raises(ValueError, match=re.escape("static must have shape [3, 3], got [2, 3]")):
        NETWORKS["ea"](params, xs, static=options["static"][:2])
    params, xs, _ = inputs(NETWORKS["gru"])
    with pytest.raises(ValueError, match=re.escape("static must have no static features with cell='gru'")):
        NETWORKS["gru"](params, xs, **options)


def test_state_of_several_slabs_is_checked_by_name():
    network = NETWORKS["slstm"]
    params, xs, _ = inputs(network)
    state = network.initial_state((B,))
    with pytest.raises(ValueError, match=re.escape("state.c must be a dict of the states c, n, m; got a dict of 'c'")):
        network(params, xs, (state.h, {"c": state.c["c"]}))
    wrong = state.c | {"m": jnp.zeros((1, B, 2))}
    with pytest.raises(ValueError, match=re.escape("state.c['m'] must have shape [1, 3, 4], got [1, 3, 2]")):
        network(params, xs, (state.h, wrong))


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("newton", "implementation='newton' does not support a cell with gates that do not read both x and h"),
        (jaxlstm.recurrence.scan.Scan(concatenate=True), "Scan(concatenate=True) does not support a cell with gates"),
        (jaxlstm.recurrence.fused.Fused(hoist_inputs=False), "Fused(hoist_inputs=False) does not support recur"),
    ],
    ids=["newton", "scan", "fused"],
)
def test_backend_names_what_it_lacks(implementation, message):
    network = replace(NETWORKS["mingru"], implementation=implementation)
    params, xs, _ = inputs(network)
    with pytest.raises(ValueError, match=re.escape(message)):
        network(params, xs)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["batch", "feature"])
@pytest.mark.parametrize("hoist_inputs", [True, False])
def test_layouts_of_a_gru_agree(order, hoist_inputs):
    network = NETWORKS["gru"]
    params, xs, _ = inputs(network)

    def gradient(implementation):
        return jax.grad(lambda p: (replace(network, implementation=implementation)(p, xs)[0] ** 2).sum())(params)

    actual = gradient(jaxlstm.recurrence.fused.Fused(order=order, hoist_inputs=hoist_inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, 64)), actual, gradient("scan"))


def test_convolutional_network_rejects_cell_of_another_form():
    with pytest.raises(ValueError, match=re.escape("ConvLSTM does not support a cell with gates that do not read")):
        jaxlstm.ConvLSTM(INPUT_SIZE, H, (4,), cell=CELLS["minlstm"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reads", (("f", "x"),), "gate 'f' must read some of x, h, static, as a tuple, got 'x'"),
        ("reads", (("f", ("y",)),), "gate 'f' must read some of x, h, static, as a tuple, got ('y',)"),
        ("recurrent", "block", "recurrent of the cell must be one of 'dense', 'diagonal'"),
    ],
)
def test_network_rejects_wrong_types_in_a_cell(name, value, message):
    """The tests check annotations at run time, so the field is set after the cell is made."""
    cell = replace(CELLS["lstm"])
    object.__setattr__(cell, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxlstm.RNN(INPUT_SIZE, H, cell=cell)
