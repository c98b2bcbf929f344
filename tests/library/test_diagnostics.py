"""What is seen of a run is the run; what is said of its gradients is exact."""

import subprocess
import sys
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from rich.console import Console
from tolerance import tolerance

import jaxlstm
from jaxlstm import diagnostics
from jaxlstm.diagnostics import plots
from jaxlstm.diagnostics.__main__ import Inspect, main
from jaxlstm.diagnostics.jaxpr_probe import look
from jaxlstm.training import config as options
from jaxlstm.training import inspect_run, train_step, vanishing_gradient
from jaxlstm.training import saturation as watch
from jaxlstm.training.metrics import write_json
from jaxlstm.training.tasks import language

STEPS, B, INPUT, H = 5, 2, 3, 4
BOUND = tolerance(np.float64, 1000)


def network(key=0, **options):
    lstm = jaxlstm.LSTM(INPUT, H, param_dtype=jnp.float64, **options)
    params = lstm.init(jax.random.key(key))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    leaves = [a + 0.4 * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves)]
    return lstm, jax.tree.unflatten(tree, leaves)


def inputs(*batch):
    return jax.random.normal(jax.random.key(7), (STEPS, *batch, INPUT), jnp.float64)


MARKS = {
    "lengths": jnp.array([5, 3]),
    "mask": jnp.ones((STEPS, B), bool).at[1, 0].set(False),
    "resets": jnp.zeros((STEPS, B), bool).at[3, 0].set(True).at[2, 1].set(True),
}


def equal(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **BOUND), a, b)


TRACED = [
    {},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    {"cell": "peephole", "layer_norm": True},
    {"cell": "cifg", "zoneout_h": 0.2, "zoneout_c": 0.3},
    {"cell": "rnn", "num_layers": 2},
    {"learned_state": True, "remat": 2},
]
FAST = [(True, TRACED[2])]


@pytest.mark.parametrize(
    ("reverse", "options"),
    [
        pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow], id=f"{case[0]}-{case[1]}")
        for case in product((False, True), TRACED)
    ],
)
def test_a_trace_is_the_run(options, reverse):
    lstm, params = network(**options)
    xs = inputs(B)
    trace = diagnostics.trace(lstm, params, xs, **MARKS, reverse=reverse)
    ys, state = lstm(params, xs, **MARKS, reverse=reverse)
    equal((trace.ys, trace.state), (ys, state))
    taken = np.array([[1, 1], [0, 1], [1, 1], [1, 0], [1, 0]], bool)
    np.testing.assert_array_equal(trace.taken, taken)
    for layer in trace.layers:
        assert len(layer.all) == lstm.num_directions
        for leaf in jax.tree.leaves(layer):
            assert (np.asarray(leaf)[~taken] == 0).all()
    top = [steps.h for steps in trace.layers[-1].all]
    equal(jnp.concatenate(top, -1), ys)


@pytest.mark.parametrize("cell", ["lstm", "cifg", "peephole"])
def test_the_gates_are_those_of_the_equations(cell):
    lstm, params = network(cell=cell)
    xs = inputs(B)
    state = jaxlstm.State(*jax.random.normal(jax.random.key(3), (2, 1, B, H), jnp.float64))
    (steps,) = diagnostics.trace(lstm, params, xs, state).layers[0].all
    assert list(steps.gates) == list("ifgo")
    w, xs, steps = jax.tree.map(np.asarray, (params.layers[0].forward, xs, steps))
    h, c = np.concatenate([state.h, steps.h[:-1]]), np.concatenate([state.c, steps.c[:-1]])
    z = dict(
        zip(
            "fgo" if cell == "cifg" else "ifgo",
            np.split(xs @ w.w_x.T + h @ w.w_h.T + w.b, lstm.resolved_cell.num_gates, -1),
        )
    )
    if cell == "peephole":
        z = {"i": z["i"] + w.w_c[0] * c, "f": z["f"] + w.w_c[1] * c, "g": z["g"], "o": z["o"] + w.w_c[2] * steps.c}
    wanted = {name: np.tanh(a) if name == "g" else 1 / (1 + np.exp(-a)) for name, a in z.items()}
    if cell == "cifg":
        wanted["i"] = 1 - wanted["f"]
    equal(steps.gates, wanted)
    equal(steps.c, wanted["f"] * c + wanted["i"] * wanted["g"])
    equal(steps.m, wanted["o"] * np.tanh(steps.c))


def test_any_batch_axes_and_none():
    lstm, params = network(num_layers=2)
    xs = inputs(2, 3)
    many = diagnostics.trace(lstm, params, xs)
    one = diagnostics.trace(lstm, params, xs[:, 1, 2])
    equal(jax.tree.map(lambda a: a[:, 1, 2], many.layers), one.layers)


def nudged_run(params, xs, where=None, amount=0.0):
    """Two layers of the LSTM in NumPy, with lengths and resets, something added to one h or c as it is computed."""
    lengths, resets = np.asarray(MARKS["lengths"]), np.asarray(MARKS["resets"])
    ys = np.zeros((STEPS, B, H), complex)
    for b in range(B):
        h, c = np.zeros((2, H), complex), np.zeros((2, H), complex)
        for t in range(lengths[b]):
            if resets[t, b]:
                h[:], c[:] = 0, 0
            x = xs[t, b]
            for n, layer in enumerate(params.layers):
                w = layer.forward
                i, f, g, o = np.split(w.w_x @ x + w.w_h @ h[n] + w.b, 4)
                i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
                c[n] = f * c[n] + i * np.tanh(g)
                if where and where[:4] == ("c", n, t, b):
                    c[n, where[4]] += amount
                h[n] = o * np.tanh(c[n])
                if where and where[:4] == ("h", n, t, b):
                    h[n, where[4]] += amount
                x = h[n]
            ys[t, b] = x
    return ys


def test_gradients_with_respect_to_every_state():
    """Against the complex step, which has no error of differences, on a loop that shares no code."""
    lstm, params = network(num_layers=2)
    xs, weight = inputs(B), np.random.default_rng(0).standard_normal((STEPS, B, H))
    marks = {name: MARKS[name] for name in ("lengths", "resets")}

    def loss(ys):
        return (ys**3 * weight).sum()

    flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: loss(ys), **marks, jacobian=None)
    arrays = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(flow.loss, loss(nudged_run(arrays, np.asarray(xs))).real, **BOUND)
    for n in range(2):
        for name in "hc":
            derivative = np.zeros((STEPS, B, H))
            for t, b, u in np.ndindex(STEPS, B, H):
                derivative[t, b, u] = loss(nudged_run(arrays, np.asarray(xs), (name, n, t, b, u), 1e-30j)).imag / 1e-30
            wanted = np.linalg.norm(derivative, axis=-1)
            np.testing.assert_allclose(getattr(flow.layers[n].forward, name), wanted, **BOUND)
            assert (wanted[3:, 1] == 0).all()  # past the length
            assert (wanted[:3, 1] > 0).any()
    assert flow.jacobian is flow.network_jacobian is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frobenius", "spectral"])
def test_jacobians_of_the_last_state(kind):
    """Against JAX's own Jacobian of the rest of the run, as one matrix."""
    lstm, params = network(num_layers=2, proj_size=3, implementation="scan")
    xs, steps = inputs(B), 3
    marks = {name: a if name == "lengths" else a[:steps] for name, a in MARKS.items()}
    marks["lengths"] = jnp.array([3, 2])
    marks["resets"] = marks["resets"].at[1, 1].set(True)
    flow = diagnostics.gradient_flow(lstm, params, xs[:steps], lambda ys: (ys**2).sum(), **marks, jacobian=kind)
    mask = marks["mask"] & (np.arange(steps)[:, None] < np.array([3, 2]))

    for t in range(steps):
        part = {"mask": mask[: t + 1], "resets": marks["resets"][: t + 1]}
        rest = {"mask": mask[t + 1 :], "resets": marks["resets"][t + 1 :]}
        _, state = lstm(params, xs[: t + 1], **part)
        blocks = jax.jacobian(lambda state: lstm(params, xs[t + 1 : steps], state, **rest)[1])(state)  # noqa: B023
        for b in range(B):
            matrix = np.block([[a[:, b, :, :, b].reshape(a.shape[0] * a.shape[2], -1) for a in row] for row in blocks])
            assert matrix.shape == (14, 14)
            wanted = np.linalg.norm(matrix, 2 if kind == "spectral" else "fro")
            np.testing.assert_allclose(flow.network_jacobian[t, b], wanted, **BOUND)


@pytest.mark.parametrize(
    "options", [pytest.param({"bidirectional": True}, marks=pytest.mark.slow), {"cell": "rnn", "num_layers": 2}]
)
def test_jacobians_of_layers(options):
    """That of a layer is that of a network of one layer; backward in time, of the sequence turned around."""
    lstm, params = network(**options)
    xs = inputs()
    flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: ys.sum())
    trace = diagnostics.trace(lstm, params, xs)
    for n, layer in enumerate(flow.jacobian):
        below = xs if n == 0 else trace.layers[n - 1].forward.h
        for d, norms in enumerate(layer.all):
            weights = params.layers[n].directions[d]
            kind = {"cell": options["cell"]} if "cell" in options else {}
            alone = jaxlstm.LSTM(weights.w_x.shape[1], H, param_dtype=jnp.float64, **kind)
            turned = below[::-1] if d else below
            one = jaxlstm.Params((jaxlstm.Layer(weights),))
            wanted = diagnostics.gradient_flow(alone, one, turned, lambda ys: ys.sum()).network_jacobian
            equal(norms[::-1] if d else norms, wanted)
            assert norms[0 if d else -1] == pytest.approx((H * (1 if kind else 2)) ** 0.5)  # of the identity
    assert (flow.network_jacobian is None) == lstm.bidirectional


def test_gradient_flow_compiles_and_keeps_memory_linear():
    lstm, params = network()

    def temporary(steps):
        xs = jax.ShapeDtypeStruct((steps, B, INPUT), jnp.float64)

        def run(xs):
            flow = diagnostics.gradient_flow(lstm, params, xs, lambda ys: (ys**2).sum())
            return flow.layers[0].forward.c, flow.network_jacobian

        return jax.jit(run).lower(xs).compile().memory_analysis().temp_size_in_bytes

    small, middle, large = (temporary(n) for n in (100, 200, 400))
    assert large - middle < 2.2 * (middle - small) < 5 * 100 * B * 50 * H * 8


def test_a_cell_of_ones_own():
    def minimal(z, c):
        f, g = z
        f = checkpoint_name(jax.nn.sigmoid(f), "f")
        c = f * c + (1 - f) * jnp.tanh(g)
        return c, jnp.tanh(c)

    for gates in (minimal, jax.jit(minimal)):
        z, c = jax.random.normal(jax.random.key(0), (2, H)), jnp.ones(H)
        (new, m), named = look(gates, z, c, {})
        equal((new, m), minimal(z, c))
        assert list(named) == ["f"]
        equal(named["f"], jax.nn.sigmoid(z[0]))
        # What is added to c is there before the output is computed from it.
        (nudged, m), _ = look(gates, z, c, {}, nudge=jnp.full(H, 0.5))
        equal((nudged, m), (new + 0.5, jnp.tanh(new + 0.5)))
    lstm = jaxlstm.LSTM(INPUT, H, cell=jaxlstm.Cell(minimal, num_gates=2, forget_gate=0))
    trace = diagnostics.trace(lstm, lstm.init(jax.random.key(0)), jnp.ones((STEPS, INPUT)))
    assert diagnostics.memory(trace).layers[0].forward.time_constant.shape == (H,)


def made_up_trace(f, i, c, m, taken):
    steps = diagnostics.Steps({"i": i, "f": f, "g": np.ones_like(f)}, c, m, m)
    return diagnostics.Trace((diagnostics.Directions(steps),), taken, m, None)


def test_memory():
    f = np.array([[0.5, 0.95, 1.0], [0.5, 0.05, 1.0], [0.0, 0.0, 0.0]])  # (STEPS, H); the last step is not taken
    c = np.array([[0.3, 0.2, 5.0], [0.1, 0.9, 5.0], [0.0, 0.0, 0.0]])
    m = np.array([[0.3, 0.001, 0.1], [0.1, -0.01, 0.1], [9.0, 9.0, 9.0]])
    memory = diagnostics.memory(made_up_trace(f, 1 - f, c, m, np.array([True, True, False])))
    units = memory.layers[0].forward
    np.testing.assert_allclose(units.time_constant, [1 / np.log(2), 1 / np.log(2), np.inf])
    np.testing.assert_allclose(units.shut["f"], [0, 0.5, 0])
    np.testing.assert_allclose(units.open["f"], [0, 0.5, 1])
    np.testing.assert_allclose(units.open["i"], [0, 0.5, 0])
    assert "g" not in units.open
    np.testing.assert_array_equal(units.dead, [False, True, False])
    np.testing.assert_array_equal(units.frozen, [False, False, True])
    assert "layer 0: 3 units, 2 steps" in memory.report
    assert "gate f: shut at 17% of the steps, open at 50%" in memory.report
    assert "1 of 3 units are dead" in memory.report


def test_the_report_says_what_to_do():
    f = np.full((200, 4), 0.5)
    stuck = made_up_trace(f, np.full((200, 4), 0.99), f, np.zeros((200, 4)), np.ones(200, bool))
    report = diagnostics.memory(stuck).report
    for words in ("raise forget_bias", "4 of 4 hardly ever leave saturation", "try fewer units"):
        assert words in report
    rng = np.random.default_rng(0)
    healthy = made_up_trace(np.full((200, 4), 0.98), rng.random((200, 4)), *rng.random((2, 200, 4)), np.ones(200, bool))
    for words in ("raise forget_bias", "try fewer units"):
        assert words not in diagnostics.memory(healthy).report


def test_a_cell_without_gates_has_little_to_report():
    lstm, params = network(cell="rnn", bidirectional=True)
    memory = diagnostics.memory(diagnostics.trace(lstm, params, inputs(B)))
    assert memory.layers[0].backward.time_constant is memory.layers[0].backward.frozen is None
    assert "layer 0, backward" in memory.report


def test_following():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((50, 2))
    values = np.stack([rng.standard_normal((50, 2)), -3 * signal + 1, np.ones((50, 2)), signal**3], -1)
    units, correlations = diagnostics.following(values, signal)
    assert units.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(correlations[0], -1)
    np.testing.assert_allclose(correlations[1], np.corrcoef((signal**3).ravel(), signal.ravel())[0, 1])
    assert correlations[-1] == 0


def test_wrong_input_is_one_clear_error():
    lstm, params = network()
    trace = diagnostics.trace(lstm, params, inputs(), lengths=jnp.array(0))
    for run, words in (
        (lambda: diagnostics.trace(lstm, params, jnp.ones((0, INPUT))), "at least one step"),
        (lambda: diagnostics.trace(lstm, params, jnp.ones((STEPS, INPUT + 1))), r"xs must have shape"),
        (
            lambda: diagnostics.gradient_flow(lstm, params, inputs(), lambda ys: ys),
            r"loss must return a scalar, got shape \[5, 4\]",
        ),
        (lambda: diagnostics.gradient_flow(lstm, params, inputs(), jnp.sum, jacobian="l1"), "'frobenius', 'spectral'"),
        (lambda: diagnostics.memory(trace), "no step of 5 was taken"),
        (lambda: diagnostics.following(np.ones((5, 3)), np.ones(4)), r"signal must have shape \[5\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            run()
    conv = jaxlstm.ConvLSTM(1, 2, (3, 3), kernel_size=3)
    with pytest.raises(TypeError, match=r"must be a jaxlstm.LSTM, got ConvLSTM"):
        diagnostics.trace(conv, conv.init(jax.random.key(0)), jnp.ones((2, 3, 3, 1)))


def test_saturated_gates_of_a_training_run():
    lstm, params = network(num_layers=2, bidirectional=True)

    class Model(NamedTuple):
        lstm: jaxlstm.Params

    xs = inputs(B) * 9
    shares = watch.saturation(lstm, lambda params, carry, batch: (batch, carry))(Model(params), None, xs)
    layers, total = diagnostics.memory(diagnostics.trace(lstm, params, xs)).layers, 0.0
    for n, layer in enumerate(layers):
        for direction in ("forward", "backward"):
            units = getattr(layer, direction)
            for gate in "ifo":
                for word in ("shut", "open"):
                    wanted = getattr(units, word)[gate].mean()
                    np.testing.assert_allclose(shares.pop(f"gates.{n}.{direction}.{gate}.{word}"), wanted, rtol=1e-6)
                    total += wanted
    assert not shares
    assert total > 1
    row = watch.figures({"a": jnp.ones(())}, {"b": jnp.zeros(())})
    assert row == {"a": 1.0, "gradient.b": 0.0}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_pictures_of_gates_and_cell_states():
    lstm, params = network()
    text = "a\nb c"
    steps = diagnostics.trace(lstm, params, inputs()).layers[0].forward
    figure = plots.draw_gates(steps, text, units=[2, 0])
    panels = [axes for axes in figure.axes if axes.get_ylabel()]
    assert [axes.get_ylabel() for axes in panels][:2] == ["input gate i", "forget gate f"]
    np.testing.assert_allclose(panels[1].images[0].get_array(), np.asarray(steps.gates["f"])[:, [2, 0]].T)
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["a", "↵", "b", "·", "c"]

    figure = plots.draw_cell_states(steps.c, text, {3: "counts"}, width=2)
    grid = figure.axes[0].images[0].get_array()
    c = np.tanh(steps.c)[:, 3]
    wanted = [[c[0], c[1]], [c[2], c[3]], [c[4], np.nan]]  # a line ends a row, so does its width
    np.testing.assert_allclose(np.ma.filled(grid, np.nan), wanted)
    assert texts(figure.axes[0]) == ["a", "↵", "b", "·", "c"]
    with pytest.raises(ValueError, match=r"c must have shape \(2, H\), a row per character, got \[5, 4\]"):
        plots.draw_cell_states(steps.c, "ab", [0])


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"cell": "rnn"}, {"cell": "cifg"}], ids=str)
def test_pictures_of_eigenvalues(options):
    lstm, params = network(**options)
    w = params.layers[0].forward
    square = np.asarray(w.w_h if w.w_p is None else w.w_h @ w.w_p)
    for place, message in (
        ({"layer": 2}, "layer must be one of 0 to 0, got 2"),
        ({"direction": -1}, "direction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.draw_eigenvalues(lstm, params, **place)
    figure = plots.draw_eigenvalues(lstm, params)
    assert len(figure.axes) == len(square) // H
    for block, axes in zip(np.split(square, len(square) // H), figure.axes):
        drawn = axes.collections[0].get_offsets() @ [1, 1j]
        np.testing.assert_allclose(np.sort_complex(drawn), np.sort_complex(np.linalg.eigvals(block)), atol=1e-9)


@pytest.mark.slow
def test_vanishing():
    """A few updates: the pieces fit, the numbers in the sentence are those of the curves."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        learners = {
            name: vanishing_gradient.learn(lstm, steps=12, updates=60, batch=4, learning_rate=rate, seed=0)
            for name, (lstm, rate) in vanishing_gradient.contestants(4).items()
        }
    for one in learners.values():
        assert one.updates.tolist() == [50, 100]
        assert one.before.shape == one.after.shape == (12,)
        assert (one.before > 0).all()
        assert not np.allclose(one.before, one.after)
    zero, forgets_nothing = (learners[f"LSTM, forget bias {b}"].before for b in (0, 1))
    assert zero[0] / zero[-1] < 0.1 * forgets_nothing[0] / forgets_nothing[-1]
    figure = plots.draw_vanishing(learners)
    for axes, field in zip(figure.axes, ("before", "after")):
        for line, one in zip(axes.lines, learners.values()):
            values = getattr(one, field)
            np.testing.assert_allclose(line.get_ydata(), values / values[-1], rtol=1e-5)
    words = vanishing_gradient.sentence(learners, 12)
    assert "After 100 updates on the adding task over 12 steps" in words
    assert f"vanilla RNN: mean squared error {learners['vanilla RNN'].errors[-1]:.4f}" in words


@pytest.mark.slow
def test_the_lstm_learns_what_the_vanilla_network_does_not():
    """With the defaults of ``python -m jaxlstm.diagnostics vanishing``."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        errors = {
            name: vanishing_gradient.learn(lstm, steps=100, updates=1600, batch=32, learning_rate=rate, seed=0).errors[
                -1
            ]
            for name, (lstm, rate) in vanishing_gradient.contestants(64).items()
        }
    assert errors["LSTM, forget bias 1"] < 0.01
    assert errors["LSTM, forget bias 0"] < 0.01
    assert errors["vanilla RNN"] > 0.1


def command(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "jaxlstm.diagnostics", *map(str, arguments)], capture_output=True, text=True
    )
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.slow
def test_the_command_draws_the_question_and_the_answer(tmp_path):
    small = ["--steps", "10", "--hidden", "4", "--updates", "50", "--batch", "2"]
    run = command("vanishing", "--out", tmp_path / "v.png", *small)
    assert run.returncode == 0, run.stderr
    assert "After 50 updates on the adding task over 10 steps" in run.stdout
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    again = command("vanishing", "--out", tmp_path / "v.png")
    assert again.returncode != 0
    assert "exists; a picture never replaces another file" in again.stderr


def test_what_a_unit_may_follow():
    text = 'ab (c\n"d" e'
    found = inspect_run.signals(text)
    assert found["position in the line"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert found["inside quotes"].tolist() == [0] * 6 + [1, 1, 0, 0, 0]
    assert found["inside brackets"].tolist() == [0] * 3 + [1] * 8
    assert found["position in the word"].tolist() == [0, 1, -1, -1, 0, -1, -1, 0, -1, -1, 0]
    c = np.random.default_rng(0).standard_normal((len(text), 3))
    c[:, 1] = -found["inside quotes"]
    assert inspect_run.telling_units(c, text)[1].startswith("unit 1: inside quotes (correlation -1.00)")
    assert inspect_run.telling_units(np.ones((1, 3)), "a") == {0: "unit 0"}
    rows = np.random.default_rng(0).standard_normal((5, 4, 3))
    assert diagnostics.following(rows, rows[..., 2])[0][0] == 2
    with pytest.raises(ValueError, match=r"signal must have shape \[5, 4\], got \[4, 5\]"):
        diagnostics.following(rows, rows[..., 2].T)


@pytest.fixture
def trained_run(tmp_path):
    """The folder of a run of a character model, as ``train.py`` leaves it, with weights as they are drawn."""
    asked = options.Options(hidden=8, embedding=4, layers=2)
    folder = tmp_path / "run"
    folder.mkdir()
    characters = '\n "()abc'
    write_json(folder / "config.json", {"options": options.to_json(asked), "vocabulary": characters})
    model = language.build(asked, len(characters))
    train_step.save_params(folder / train_step.BEST, model.init(jax.random.key(0)))
    return folder


def test_inspecting_a_run(trained_run, tmp_path, capsys):
    text = 'abc (ab)\n"c" a'
    out = tmp_path / "pictures"
    Inspect(trained_run, text, layer=1, out=out).run(Console())
    assert {path.name for path in out.iterdir()} == {"gates.png", "eigenvalues.png", "cell_states.png"}
    assert f"layer 1: 8 units, {len(text)} steps" in capsys.readouterr().out
    model, params, ids = inspect_run.load(trained_run, text)
    assert ids.tolist() == ['\n "()abc'.index(character) for character in text]
    jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0)))


def test_what_cannot_be_inspected_is_one_clear_line(trained_run, tmp_path, capsys):
    def said(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *map(str, arguments)])
        assert "\n" not in str(stop.value)
        return str(stop.value)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = trained_run
    assert "is not the folder of a run" in said(tmp_path / "no", "--text", "a")
    assert "not in the vocabulary of 8 characters: 'z'" in said(run, "--text", "az")
    assert "--text must have at least one character" in said(run, "--text", "")
    assert "--layer must be one of 0 to 1, got 2" in said(run, "--text", "a", "--layer", "2")
    assert "full is not an empty folder; pictures never replace others" in said(
        run, "--text", "a", "--out", tmp_path / "full"
    )
    whole = (run / train_step.BEST).read_bytes()
    (run / train_step.BEST).write_bytes(whole[:100])
    assert "best.msgpack is damaged or of another model" in said(run, "--text", "a")
    (run / train_step.BEST).unlink()
    assert "no checkpoint" in said(run, "--text", "a")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"charlm"', '"digits"'))
    assert "are read by a run of --task charlm" in said(run, "--text", "a")
