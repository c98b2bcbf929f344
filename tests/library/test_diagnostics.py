"""Recorded values, gradient norms, Jacobians, unit statistics and plots of a network."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_params
from matplotlib.figure import Figure
from tolerance import tolerance

import jaxlstm
from jaxlstm import cells, diagnostics
from jaxlstm.diagnostics import plots
from jaxlstm.primitives.pytrees import tree_index

STEPS, B, INPUT, H = 5, 2, 3, 4
BOUND = tolerance(np.float64, 1000)
MASKS = {
    "lengths": jnp.array([5, 3]),
    "mask": jnp.ones((STEPS, B), bool).at[1, 0].set(False),
    "resets": jnp.zeros((STEPS, B), bool).at[3, 0].set(True).at[2, 1].set(True),
}
STEP_MASK = np.array([[1, 1], [0, 1], [1, 1], [1, 0], [1, 0]], bool)  # of lengths and mask


def make_network(key=0, **options):
    lstm = jaxlstm.LSTM(INPUT, H, param_dtype=jnp.float64, **options)
    return lstm, random_params(lstm, np.random.default_rng(key))


def draw_inputs(*batch):
    return np.random.default_rng(7).standard_normal((STEPS, *batch, INPUT))


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **BOUND), a, b)


CONFIGURATIONS = [
    {},
    {"bidirectional": True, "proj_size": 2},
    {"cell": "peephole", "layer_norm": True},
    {"cell": "cifg", "zoneout_h": 0.2, "zoneout_c": 0.3},
    {"cell": "rnn", "num_layers": 2},
    {"learned_state": True, "remat": 2},
]


@pytest.mark.parametrize(
    ("options", "reverse"),
    [
        pytest.param(options, reverse, marks=[] if reverse == n % 2 else pytest.mark.slow, id=f"{options}-{reverse}")
        for n, options in enumerate(CONFIGURATIONS)
        for reverse in (False, True)
    ],
)
def test_trace_equals_the_call(options, reverse):
    lstm, params = make_network(**options)
    xs = draw_inputs(B)
    trace = diagnostics.trace(lstm, params, xs, **MASKS, reverse=reverse)
    assert_close((trace.ys, trace.state), lstm(params, xs, **MASKS, reverse=reverse))
    np.testing.assert_array_equal(trace.step_mask, STEP_MASK)
    for layer in trace.layers:
        assert len(layer.directions) == lstm.num_directions
        for leaf in jax.tree.leaves(layer):
            assert (np.asarray(leaf)[~STEP_MASK] == 0).all()
    top = [values.h for values in trace.layers[-1].directions]
    assert_close(np.concatenate(top, -1), trace.ys)


@pytest.mark.parametrize("cell", ["lstm", "cifg", "peephole"])
def test_trace_gates_satisfy_the_equations(cell):
    lstm, params = make_network(cell=cell)
    xs = draw_inputs(B)
    state = jaxlstm.State(*np.random.default_rng(3).standard_normal((2, 1, B, H)))
    (values,) = diagnostics.trace(lstm, params, xs, state).layers[0].directions
    assert list(values.gates) == list(lstm.resolved_cell.activations)
    w, xs, values = jax.tree.map(np.asarray, (params.layers[0].forward, xs, values))
    h, c = np.concatenate([state.h, values.h[:-1]]), np.concatenate([state.c, values.c[:-1]])
    slabs = np.split(xs @ w.w_x.T + h @ w.w_h.T + w.b, lstm.resolved_cell.num_gates, -1)
    z = dict(zip(lstm.resolved_cell.activations, slabs))
    if cell == "peephole":
        z = {"i": z["i"] + w.w_c[0] * c, "f": z["f"] + w.w_c[1] * c, "g": z["g"], "o": z["o"] + w.w_c[2] * values.c}
    expected = {name: np.tanh(a) if name == "g" else 1 / (1 + np.exp(-a)) for name, a in z.items()}
    assert_close(values.gates, expected)
    i = expected.get("i", 1 - expected["f"])
    assert_close(values.c, expected["f"] * c + i * expected["g"])
    assert_close(values.cell_output, expected["o"] * np.tanh(values.c))


def test_trace_accepts_any_batch_axes():
    lstm, params = make_network(num_layers=2)
    xs = draw_inputs(2, 3)
    batched = diagnostics.trace(lstm, params, xs)
    single = diagnostics.trace(lstm, params, xs[:, 1, 2])
    assert_close(jax.tree.map(lambda a: a[:, 1, 2], batched.layers), single.layers)


@pytest.mark.slow
def test_trace_of_a_user_defined_cell_has_its_gates():
    minimal = jaxlstm.Cell(
        gates={"f": cells.sigmoid, "n": cells.tanh},
        update=lambda f, n, c: f * c + (1 - f) * n,
        output=lambda c: jnp.tanh(c),
        forget_gate="f",
    )
    lstm = jaxlstm.LSTM(INPUT, H, cell=minimal, param_dtype=jnp.float64)
    trace = diagnostics.trace(lstm, lstm.init(jax.random.key(0)), jnp.ones((STEPS, INPUT)))
    values = trace.layers[0].forward
    assert list(values.gates) == ["f", "n"]
    f, n = values.gates.values()
    c = jnp.concatenate([jnp.zeros((1, H), values.c.dtype), values.c])
    assert_close(values.c, f * c[:-1] + (1 - f) * n)
    assert_close(values.cell_output, jnp.tanh(values.c))
    assert diagnostics.gate_statistics(trace).layers[0].forward.time_constant.shape == (H,)


def perturbed_outputs(params, xs, where=None, amount=0.0, multiplied=None):
    """Runs two layers in NumPy, with lengths and resets, and adds ``amount`` to one number of h or c.

    Returns the outputs, and the h that ``W_h`` multiplied in each layer at each step; ``multiplied`` replaces them.
    """
    lengths, resets = np.asarray(MASKS["lengths"]), np.asarray(MASKS["resets"])
    ys, read = np.zeros((STEPS, B, H), complex), np.zeros((2, STEPS, B, H), complex)
    for b in range(B):
        h, c = np.zeros((2, H), complex), np.zeros((2, H), complex)
        for t in range(lengths[b]):
            if resets[t, b]:
                h[:], c[:] = 0, 0
            x = xs[t, b]
            for n, layer in enumerate(params.layers):
                w = layer.forward
                read[n, t, b] = h[n] if multiplied is None else multiplied[n, t, b]
                i, f, g, o = np.split(w.w_x @ x + w.w_h @ read[n, t, b] + w.b, 4)
                i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
                c[n] = f * c[n] + i * np.tanh(g)
                if where and where[:4] == ("c", n, t, b):
                    c[n, where[4]] += amount
                h[n] = o * np.tanh(c[n])
                if where and where[:4] == ("h", n, t, b):
                    h[n, where[4]] += amount
                x = h[n]
            ys[t, b] = x
    return ys, read


def test_gradient_flow_equals_complex_step_derivatives():
    """The complex step has no cancellation error, and the loop shares no code with the library."""
    lstm, params = make_network(num_layers=2)
    xs, weight = draw_inputs(B), np.random.default_rng(0).standard_normal((STEPS, B, H))
    masks = {name: MASKS[name] for name in ("lengths", "resets")}

    def loss(ys):
        return (ys**3 * weight).sum()

    flow = diagnostics.gradient_flow(lstm, params, xs, loss, **masks, jacobian=None)
    arrays, xs = jax.tree.map(np.asarray, (params, xs))
    ys, read = perturbed_outputs(arrays, xs)
    np.testing.assert_allclose(flow.loss, loss(ys).real, **BOUND)
    for n, name in itertools.product(range(2), "hc"):
        derivative = np.zeros((2, STEPS, B, H))  # in all, and with a constant h in the product with W_h
        for part, t, b, unit in np.ndindex(derivative.shape):
            ys, _ = perturbed_outputs(arrays, xs, (name, n, t, b, unit), 1e-30j, read if part else None)
            derivative[part, t, b, unit] = loss(ys).imag / 1e-30
        gradients = (derivative[0], derivative[1], derivative[0] - derivative[1])
        for norms, gradient in zip((flow.layers, flow.elementwise, flow.through_w_h), gradients):
            np.testing.assert_allclose(getattr(norms[n].forward, name), np.linalg.norm(gradient, axis=-1), **BOUND)
        assert (derivative[0][3:, 1] == 0).all()  # past the length
        assert (derivative[0][:3, 1] != 0).any()
    assert flow.jacobian is flow.network_jacobian is None


def lstm_by_hand(w, x, multiplied_h, h, c):
    """One step with the h that ``W_h`` multiplies as an argument of its own; w_c has the peepholes of i, f and o."""
    del h
    z = jnp.split(w.w_x @ x + w.w_h @ multiplied_h + w.b, 4)
    w_c = jnp.zeros((3, H)) if w.w_c is None else w.w_c
    f = jax.nn.sigmoid(z[1] + w_c[1] * c)
    c = f * c + jax.nn.sigmoid(z[0] + w_c[0] * c) * jnp.tanh(z[2])
    return jax.nn.sigmoid(z[3] + w_c[2] * c) * jnp.tanh(c), c


def gru_by_hand(w, x, multiplied_h, h, c):
    r_x, u_x, n_x = jnp.split(w.w_x @ x, 3)
    r_h, u_h, n_h = jnp.split(w.w_h @ multiplied_h, 3)
    b_r, b_u, b_n_x, b_n_h = jnp.split(w.b, 4)
    r, u = jax.nn.sigmoid(r_x + r_h + b_r), jax.nn.sigmoid(u_x + u_h + b_u)
    return u * h + (1 - u) * jnp.tanh(n_x + b_n_x + r * (n_h + b_n_h)), c


def rnn_by_hand(w, x, multiplied_h, h, c):
    del h
    return jnp.tanh(w.w_x @ x + w.w_h @ multiplied_h + w.b), c


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "step"),
    [("lstm", lstm_by_hand), ("peephole", lstm_by_hand), ("gru", gru_by_hand), ("rnn", rnn_by_hand)],
)
def test_gradient_flow_parts_equal_products_of_dense_jacobians(cell, step):
    """Each step has a dense Jacobian with, and one without, the path through ``W_h``."""
    lstm, params = make_network(cell=cell)
    xs, w, weight = draw_inputs(), params.layers[0].forward, np.random.default_rng(1).standard_normal((STEPS, H))
    flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: (weight * ys).sum(), jacobian=None)
    states = [jnp.zeros((2, H))]  # h and c
    jacobians = {"all": [], "elementwise": []}

    def stacked_step(x, multiplied_h, state):
        return jnp.stack(step(w, x, multiplied_h, *state))

    for x in xs:
        h = states[-1][0]
        multiplied, direct = jax.jacobian(stacked_step, (1, 2))(x, h, states[-1])
        direct = direct.reshape(2 * H, 2 * H)
        jacobians["elementwise"].append(direct)
        jacobians["all"].append(direct.at[:, :H].add(multiplied.reshape(2 * H, H)))
        states.append(stacked_step(x, h, states[-1]))

    def show(c, t):  # c_t is perturbed before h_t is computed from it
        w_c = jnp.zeros(H) if w.w_c is None else w.w_c[2]
        z_o = jnp.split(w.w_x @ xs[t] + w.w_h @ states[t][0] + w.b, lstm.resolved_cell.num_gates)[-1]
        return jax.nn.sigmoid(z_o + w_c * c) * jnp.tanh(c)

    gradients = {"all": [], "elementwise": []}
    for name, factors in jacobians.items():
        after = np.zeros(2 * H)
        for t in reversed(range(STEPS)):
            total_h = after[:H] + weight[t]
            total_c = after[H:] if cell == "gru" else after[H:] + total_h @ jax.jacobian(show)(states[t + 1][1], t)
            gradients[name].insert(0, (total_h, total_c))
            after = np.concatenate([total_h, after[H:]]) @ np.asarray(factors[t])
    rest = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(gradients["all"], gradients["elementwise"])]
    for norms, expected in (
        (flow.layers, gradients["all"]),
        (flow.elementwise, gradients["elementwise"]),
        (flow.through_w_h, rest),
    ):
        values = norms[0].forward
        np.testing.assert_allclose(values.h, [np.linalg.norm(h) for h, _ in expected], **BOUND)
        if lstm.resolved_cell.has_cell_state:
            np.testing.assert_allclose(values.c, [np.linalg.norm(c) for _, c in expected], **BOUND)
    if cell == "rnn":
        np.testing.assert_allclose(flow.elementwise[0].forward.h, np.linalg.norm(weight, axis=-1), **BOUND)


@pytest.mark.slow
def test_gradient_flow_norms_do_not_underflow():
    lstm = jaxlstm.LSTM(INPUT, H)
    params, xs = lstm.init(jax.random.key(0)), jnp.ones((2, INPUT), jnp.float32)
    small, large = (
        diagnostics.gradient_flow(lstm, params, xs, lambda ys, scale=scale: scale * ys.sum(), jacobian=None)
        for scale in (1e-30, 1.0)
    )
    np.testing.assert_allclose(small.layers[0].forward.c * 1e30, large.layers[0].forward.c, rtol=1e-5)


@pytest.mark.slow
def test_gradient_flow_along_c_is_the_product_of_forget_gates():
    lstm, params = make_network()
    xs = draw_inputs()
    flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: (ys[-1] ** 2).sum(), jacobian=None)
    gates = diagnostics.trace(lstm, params, xs).layers[0].forward.gates
    later = np.cumprod(np.asarray(gates["f"])[::-1], 0)[::-1]  # f_t ... f_T
    last = jax.grad(lambda c: ((gates["o"][-1] * jnp.tanh(c)) ** 2).sum())
    c = diagnostics.trace(lstm, params, xs).layers[0].forward.c[-1]
    expected = np.linalg.norm(np.concatenate([later[1:], np.ones((1, H))]) * np.asarray(last(c)), axis=-1)
    np.testing.assert_allclose(flow.elementwise[0].forward.c, expected, **BOUND)


@pytest.mark.slow
def test_gradient_flow_network_jacobian_equals_jax_jacobian():
    """The reference is the Jacobian by JAX of the rest of the sequence, as one matrix."""
    lstm, params = make_network(num_layers=2, proj_size=3, implementation="scan")
    xs, steps = draw_inputs(B), 3
    masks = {name: a if name == "lengths" else a[:steps] for name, a in MASKS.items()}
    masks["lengths"] = jnp.array([3, 2])
    masks["resets"] = masks["resets"].at[1, 1].set(True)
    mask = masks["mask"] & (np.arange(steps)[:, None] < np.array([3, 2]))

    def final_state(state, t):
        return lstm(params, xs[t:steps], state, mask=mask[t:], resets=masks["resets"][t:])[1]

    def flow(norm):
        return diagnostics.gradient_flow(lstm, params, xs[:steps], jnp.sum, **masks, jacobian=norm)

    network_jacobians = {"fro": flow("frobenius").network_jacobian, 2: flow("spectral").network_jacobian}
    for t in range(steps):
        _, state = lstm(params, xs[: t + 1], mask=mask[: t + 1], resets=masks["resets"][: t + 1])
        blocks = jax.jacobian(final_state)(state, t + 1)
        for b in range(B):
            matrix = np.block([[a[:, b, :, :, b].reshape(a.shape[0] * a.shape[2], -1) for a in row] for row in blocks])
            assert matrix.shape == (14, 14)
            for order, norms in network_jacobians.items():
                np.testing.assert_allclose(norms[t, b], np.linalg.norm(matrix, order), **BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True}, {"cell": "rnn", "num_layers": 2, "dropout": 0.5}],
    ids=str,
)
def test_gradient_flow_of_a_layer_equals_the_flow_of_a_network_of_one_layer(options):
    """A direction that runs backward in time is compared on the reversed sequence."""
    lstm, params = make_network(**options)
    xs = draw_inputs()
    flow = diagnostics.gradient_flow(lstm, params, xs, jnp.sum)
    trace = diagnostics.trace(lstm, params, xs)
    for n, layer in enumerate(params.layers):
        layer_inputs = xs if n == 0 else trace.layers[n - 1].forward.h
        for d, weights in enumerate(layer.directions):
            single = jaxlstm.LSTM(weights.w_x.shape[1], H, cell=lstm.cell, param_dtype=jnp.float64)
            order = slice(None, None, -1) if d else slice(None)
            single_params = jaxlstm.Params((jaxlstm.Layer(weights),))
            expected = diagnostics.gradient_flow(single, single_params, layer_inputs[order], jnp.sum)
            jacobian = flow.jacobian[n].directions[d][order]
            assert_close(jacobian, expected.network_jacobian)
            assert jacobian[-1] == pytest.approx((H * (1 if lstm.cell == "rnn" else 2)) ** 0.5)  # of the identity
            if n == lstm.num_layers - 1:
                norms = tree_index(flow.layers[n].directions[d], order)
                assert_close(norms, expected.layers[0].forward)
    assert (flow.network_jacobian is None) == lstm.bidirectional


def test_gradient_flow_in_reverse_equals_the_flow_of_the_reversed_sequence():
    lstm, params = make_network(learned_state=True)
    xs = draw_inputs(B)
    flow = diagnostics.gradient_flow(lstm, params, xs, jnp.sum, reverse=True, jacobian=None)
    expected = diagnostics.gradient_flow(lstm, params, xs[::-1], jnp.sum, jacobian=None)
    assert_close(jax.tree.map(jnp.flipud, flow.layers), expected.layers)


@pytest.mark.slow
def test_gradient_flow_compiles_with_memory_linear_in_time():
    lstm, params = make_network()

    @jax.jit
    def norms(xs):
        flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: (ys**2).sum())
        return flow.layers[0].forward.c, flow.network_jacobian

    def temporary_bytes(steps):
        xs = jax.ShapeDtypeStruct((steps, B, INPUT), jnp.float64)
        return norms.lower(xs).compile().memory_analysis().temp_size_in_bytes

    small, middle, large = (temporary_bytes(steps) for steps in (100, 200, 400))
    assert large - middle < 2.2 * (middle - small) < 5 * 100 * B * 50 * H * 8


def make_trace(f, i, c, cell_output, step_mask):
    values = diagnostics.DirectionTrace({"i": i, "f": f, "g": np.ones_like(f)}, c, cell_output, cell_output)
    return diagnostics.Trace((diagnostics.PerDirection(values),), step_mask, cell_output, None, cells.LSTM)


def test_gate_statistics_of_known_values():
    f = np.array([[0.5, 0.95, 1.0], [0.5, 0.05, 1.0], [0.0, 0.0, 0.0]])  # (T, H); the last step is skipped
    c = np.array([[0.3, 0.2, 5.0], [0.1, 0.9, 5.0], [0.0, 0.0, 0.0]])
    cell_output = np.array([[0.3, 0.001, 0.1], [0.1, -0.01, 0.1], [9.0, 9.0, 9.0]])
    statistics = diagnostics.gate_statistics(make_trace(f, 1 - f, c, cell_output, np.array([True, True, False])))
    units = statistics.layers[0].forward
    np.testing.assert_allclose(units.time_constant, [1 / np.log(2), 1 / np.log(2), np.inf])
    np.testing.assert_allclose(units.shut["f"], [0, 0.5, 0])
    np.testing.assert_allclose(units.open["f"], [0, 0.5, 1])
    np.testing.assert_allclose(units.open["i"], [0, 0.5, 0])
    assert "g" not in units.open
    np.testing.assert_array_equal(units.dead, [False, True, False])
    np.testing.assert_array_equal(units.frozen, [False, False, True])
    np.testing.assert_array_equal(units.saturated["f"], [False, False, True])
    assert "layer 0: 3 units, 2 steps" in statistics.report
    assert "gate f: shut at 17% of the steps, open at 50%" in statistics.report
    assert "1 of 3 units are dead" in statistics.report


def test_gate_statistics_report_names_remedies_only_when_needed():
    f = np.full((200, 4), 0.5)
    saturated = make_trace(f, np.full((200, 4), 0.99), f, np.zeros((200, 4)), np.ones(200, bool))
    report = diagnostics.gate_statistics(saturated).report
    for words in ("raise forget_bias", "4 of 4 units are saturated", "try fewer units"):
        assert words in report
    rng = np.random.default_rng(0)
    healthy = make_trace(np.full((200, 4), 0.98), rng.random((200, 4)), *rng.random((2, 200, 4)), np.ones(200, bool))
    for words in ("raise forget_bias", "try fewer units"):
        assert words not in diagnostics.gate_statistics(healthy).report


def test_gate_statistics_of_a_cell_without_gates():
    lstm, params = make_network(cell="rnn", bidirectional=True)
    statistics = diagnostics.gate_statistics(diagnostics.trace(lstm, params, draw_inputs(B)))
    assert statistics.layers[0].backward.time_constant is statistics.layers[0].backward.frozen is None
    assert "layer 0, backward" in statistics.report


def test_gate_statistics_of_a_saturated_vanilla_network():
    h = np.array([[0.95, 0.5], [-0.99, 0.95]])
    values = diagnostics.DirectionTrace({}, None, h, h)
    trace = diagnostics.Trace((diagnostics.PerDirection(values),), np.ones(2, bool), h, None, cells.RNN["tanh"])
    statistics = diagnostics.gate_statistics(trace)
    np.testing.assert_array_equal(statistics.layers[0].forward.saturated["output"], [True, False])
    assert "output: 1 of 2 units are saturated" in statistics.report
    relu = diagnostics.gate_statistics(trace._replace(cell=cells.RNN["relu"]))
    assert relu.layers[0].forward.saturated == {}


def test_correlated_units_are_ranked_by_magnitude():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((50, 2))
    values = np.stack([rng.standard_normal((50, 2)), -3 * signal + 1, np.ones((50, 2)), signal**3], -1)
    units, correlations = diagnostics.correlated_units(values, signal)
    assert units.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(correlations[0], -1)
    np.testing.assert_allclose(correlations[1], np.corrcoef((signal**3).ravel(), signal.ravel())[0, 1])
    assert correlations[-1] == 0


def test_held_out_unit_is_scored_on_other_data():
    rng = np.random.default_rng(0)
    signal, test_signal = rng.standard_normal((2, 20))
    noise, test_noise = rng.standard_normal((2, 20, 500))
    lucky = diagnostics.held_out_unit(noise, signal, test_noise, test_signal)
    correlations = [np.corrcoef(noise[:, n], signal)[0, 1] for n in range(500)]
    assert lucky.unit == np.argmax(np.abs(correlations))
    assert lucky.chosen == pytest.approx(correlations[lucky.unit])
    assert lucky.held_out == pytest.approx(np.corrcoef(test_noise[:, lucky.unit], test_signal)[0, 1])
    assert abs(lucky.held_out) < 0.5 < abs(lucky.chosen)
    with pytest.raises(ValueError, match="test_values must have 500 units as values, got 3"):
        diagnostics.held_out_unit(noise, signal, test_noise[:, :3], test_signal)


def test_diagnostics_reject_wrong_arguments():
    lstm, params = make_network()
    xs = draw_inputs()
    values = np.zeros((STEPS, H))
    all_skipped = make_trace(values, values, values, values, np.zeros(STEPS, bool))
    for call, message in (
        (lambda: diagnostics.trace(lstm, params, jnp.ones((0, INPUT))), "at least one step"),
        (lambda: diagnostics.trace(lstm, params, jnp.ones((STEPS, INPUT + 1))), r"xs must have shape"),
        (
            lambda: jax.eval_shape(lambda: diagnostics.gradient_flow(lstm, params, xs, lambda ys: ys)),
            r"loss must return a scalar, got shape \[5, 4\]",
        ),
        (lambda: diagnostics.gradient_flow(lstm, params, xs, jnp.sum, jacobian="l1"), "'frobenius', 'spectral'"),
        (lambda: diagnostics.gate_statistics(all_skipped), "at least one valid step, but all 5 are skipped"),
        (
            lambda: diagnostics.correlated_units(np.ones((5, 4, 3)), np.ones((4, 5))),
            r"signal must have shape \[5, 4\], got \[4, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    conv = jaxlstm.ConvLSTM(1, 2, (3, 3), kernel_size=3)
    with pytest.raises(TypeError, match=r"must be a jaxlstm.LSTM, got ConvLSTM"):
        diagnostics.trace(conv, None, jnp.ones((2, 3, 3, 1)))


def test_draw_gates_draws_the_chosen_units_over_the_characters():
    i, f, g, o, c, cell_output = np.random.default_rng(0).random((6, STEPS, H))
    values = diagnostics.DirectionTrace({"f": f, "g": g, "i": i, "o": o}, c, cell_output, cell_output)
    figure = plots.draw_gates(values, "a\nb c", units=[2, 0])
    panels = [axes for axes in figure.axes if axes.get_ylabel()]
    assert [axes.get_ylabel() for axes in panels][:2] == ["input gate i", "forget gate f"]
    np.testing.assert_allclose(panels[1].images[0].get_array(), f[:, [2, 0]].T)
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["a", "↵", "b", "·", "c"]
    ranking = np.argsort(-f.mean(0), kind="stable")
    images = [axes.images[0] for axes in plots.draw_gates(values, "a\nb c").axes if axes.get_ylabel()]
    np.testing.assert_allclose(images[1].get_array(), f[:, ranking].T)


def test_draw_cell_states_wraps_the_text():
    c = np.random.default_rng(0).standard_normal((STEPS, H))
    (axes, _) = plots.draw_cell_states(c, "a\nb c", {3: "counts"}, width=2).axes
    grid = axes.images[0].get_array()
    a = np.tanh(c)[:, 3]
    expected = [[a[0], a[1]], [a[2], a[3]], [a[4], np.nan]]  # a row ends at a line break or at the width
    np.testing.assert_allclose(np.ma.filled(grid, np.nan), expected)
    assert [text.get_text() for text in axes.texts] == ["a", "↵", "b", "·", "c"]
    with pytest.raises(ValueError, match=r"c must have shape \(2, H\), a row per character, got \[5, 4\]"):
        plots.draw_cell_states(c, "ab", [0])


def test_draw_norms_are_relative_to_the_last_step():
    axes = Figure().subplots()
    norms = {"a": np.array([0.0, 1.0, 4.0]), "b": np.array([2.0, 1.0, 1.0])}
    parts = {"a": np.array([0.0, 0.0, 2.0]), "b": np.array([1.0, 1.0, 1.0])}
    plots.draw_norms(axes, norms, parts=parts, title="title")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [np.nan, 0.25, 1])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [2, 1, 1])
    np.testing.assert_allclose(axes.lines[2].get_ydata(), [np.nan, np.nan, 0.5])
    assert [line.get_label() for line in axes.lines[:2]] == ["a", "b"]
    assert [line.get_color() for line in axes.lines[2:]] == [line.get_color() for line in axes.lines[:2]]


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"cell": "rnn"}, {"cell": "cifg"}], ids=str)
def test_draw_eigenvalues_of_every_gate(options):
    lstm, params = make_network(**options)
    w = params.layers[0].forward
    matrix = np.asarray(w.w_h if w.w_p is None else w.w_h @ w.w_p)
    figure = plots.draw_eigenvalues(lstm, params)
    assert len(figure.axes) == len(matrix) // H
    for block, axes in zip(np.split(matrix, len(matrix) // H), figure.axes):
        drawn = axes.collections[0].get_offsets() @ [1, 1j]
        np.testing.assert_allclose(np.sort_complex(drawn), np.sort_complex(np.linalg.eigvals(block)), atol=1e-9)


@pytest.mark.parametrize(
    ("place", "message"),
    [({"layer": 2}, "layer must be 0, the only one; got 2"), ({"direction": -1}, "direction must be")],
)
def test_draw_eigenvalues_rejects_a_missing_layer_or_direction(place, message):
    with pytest.raises(ValueError, match=message):
        plots.draw_eigenvalues(*make_network(), **place)


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"plotting needs matplotlib, which is not installed: pip install 'jaxlstm\[train\]'"
    ):
        plots.draw_eigenvalues(*make_network())
