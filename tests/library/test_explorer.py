"""The page of `jaxlstm.diagnostics.explore`: its arrays, gradients, order of units, size and errors."""

import base64
import hashlib
import json
import re
import zlib
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

import jaxlstm
from jaxlstm import diagnostics
from jaxlstm.diagnostics import explorer

# of dist/uPlot.iife.min.js in the package uplot 1.6.32 of npm
UPLOT_SHA256 = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
T, H, V = 12, 5, 4  # steps, units, classes
W_OUT = jax.random.normal(jax.random.key(9), (V, H), jnp.float32)
TARGETS = np.random.default_rng(0).integers(0, V, T)


def logits(ys):
    return ys @ W_OUT.T.astype(ys.dtype)


def make(network=None, num_steps=T):
    lstm = jaxlstm.LSTM(3, H) if network is None else network
    return (
        lstm,
        lstm.init(jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (num_steps, lstm.input_size), jnp.float32),
    )


def read(page):
    """Returns the header of a page and its arrays by name."""
    header, packed = (re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)[1] for name in ("header", "arrays"))
    header, content = json.loads(header), zlib.decompress(base64.b64decode(packed))
    arrays = {}
    for name, (dtype, shape) in header["arrays"].items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name], content = np.frombuffer(content[:size], dtype).reshape(shape), content[size:]
    assert not content
    return header, arrays


def decode(header, arrays, name):
    """Returns the values of a name and the largest error that rounding may have."""
    part = arrays[name].T / header["levels"]
    if f"scale {name}" not in arrays:
        return part, 0.5 / header["levels"]
    scale = arrays[f"scale {name}"]
    return (2 * part - 1) * scale, scale / header["levels"]


@pytest.mark.parametrize(("levels", "layer"), [(254, 0), pytest.param(14, 1, marks=pytest.mark.slow)])
def test_explore_values_are_the_recorded_ones_within_rounding(monkeypatch, levels, layer):
    monkeypatch.setattr(explorer, "LEVELS", (levels,))
    lstm, params, xs = make(jaxlstm.LSTM(3, H, num_layers=layer + 1))
    header, arrays = read(diagnostics.explore(lstm, params, xs, layer=layer))
    recorded = diagnostics.trace(lstm, params, xs).layers[layer].forward
    assert header["levels"] == levels
    assert list(header["values"]) == ["i", "f", "g", "o", "c", "h"]
    for name in header["values"]:
        expected = np.asarray(recorded.gates[name] if name in "ifgo" else getattr(recorded, name))
        values, error = decode(header, arrays, name)
        assert (np.abs(values - expected) <= error * 1.001 + 1e-6).all(), name
    mean_log = np.log(np.asarray(recorded.gates["f"], np.float64)).mean(0)
    np.testing.assert_allclose(arrays["timeConstants"], -1 / mean_log, rtol=1e-4)


@pytest.mark.slow
def test_explore_gradients_match_jax_grad():
    lstm, params, xs = make(jaxlstm.LSTM(3, H, num_layers=2))
    arrays = read(diagnostics.explore(lstm, params, xs, logits=logits, targets=TARGETS))[1]
    norms = arrays["gradients"].astype(np.float64) * arrays["gradientScale"][:, None]
    assert (arrays["gradients"].max(1)[1:] == 1).all()  # each step has its own scale
    assert norms.shape == (T, explorer.GRADIENT_STEPS)

    def loss(state, before, t):
        ys, _ = lstm(params, xs[before + 1 : t + 1], state)
        return -jax.nn.log_softmax(logits(ys[-1]))[TARGETS[t]]

    for t, before in [(4, 3), (11, 3)]:
        _, state = lstm(params, xs[: before + 1])
        leaves = jax.tree.leaves(jax.grad(loss)(state, before, t))
        expected = np.sqrt(sum(float((np.asarray(a, np.float64) ** 2).sum()) for a in leaves))
        assert norms[t, t - 1 - before] == pytest.approx(
            expected, rel=2e-3, abs=1e-7 * float(arrays["gradientScale"][t])
        )
    assert not norms[np.arange(T)[:, None] - np.arange(norms.shape[1]) <= 0].any()  # before the first state


@pytest.mark.slow
def test_explore_predictions_are_the_most_probable_classes():
    lstm, params, xs = make()
    header, arrays = read(diagnostics.explore(lstm, params, xs, logits=logits, targets=TARGETS, classes="abcd"))
    scores = np.exp(np.asarray(lstm(params, xs)[0], np.float64) @ np.asarray(W_OUT, np.float64).T)
    probabilities = scores / scores.sum(-1, keepdims=True)
    assert header["classes"] == list("abcd")
    np.testing.assert_array_equal(arrays["topClasses"], np.argsort(-probabilities, -1))
    np.testing.assert_allclose(arrays["topProbabilities"], -np.sort(-probabilities, -1), rtol=1e-3)
    np.testing.assert_allclose(arrays["surprise"], -np.log(probabilities[np.arange(T), TARGETS]), rtol=1e-5)


def test_cluster_order_keeps_the_clusters_of_scipy_together():
    values = np.random.default_rng(0).standard_normal((40, 3))[:, np.arange(30) % 3]
    values = values + 0.8 * np.random.default_rng(1).standard_normal((40, 30))
    order = explorer.cluster_order(values)
    assert sorted(order) == list(range(30))
    tree = linkage(squareform(1 - np.abs(np.corrcoef(values.T)), checks=False), "average")
    for number in (2, 3, 5, 10):
        labels = fcluster(tree, number, "maxclust")[order]
        assert (np.diff(labels) != 0).sum() == len(set(labels)) - 1  # each cluster is one interval


def test_cluster_order_accepts_constant_units():
    assert sorted(explorer.cluster_order(np.zeros((4, 3)))) == [0, 1, 2]


def test_explore_labels_do_not_end_the_script():
    lstm, params, xs = make()
    labels = ["</script><b>"] * T
    page = diagnostics.explore(lstm, params, xs, labels=labels, title="<i>{{SCRIPT}}")
    assert read(page)[0]["labels"] == labels
    assert "</script><b>" not in page
    assert "<title>&lt;i&gt;{{SCRIPT}}</title>" in page
    own = page.replace("https://github.com/leeoniya/uPlot", "", 1)  # in the first comment of the drawing library
    assert not re.search(r"https?:|src=|url\(", own)  # refers to nothing outside


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, "layer must be 0, the only one; got 1"),
        ({"layer": "0"}, "layer must be an integer, got '0'"),
        ({"layer": 0.0}, "layer must be an integer, got 0.0"),
        ({"title": 3}, "title must be a text, got int 3"),
        ({"labels": 5}, "labels must be a sequence of texts, got int 5"),
        ({"properties": [1] * T}, "properties must be a dict of numbers per step, by name, got list"),
        ({"properties": {"depth": ["a"] * T}}, "property 'depth' must be numbers, got list"),
        ({"logits": logits, "targets": [True] * T}, "targets must be integer, got bool[12]"),
        ({"logits": 1, "targets": TARGETS}, "logits must be a function from outputs (T, D*P) to logits (T, V), got"),
        ({"logits": lambda ys: logits(ys)[:3], "targets": TARGETS}, "return (T, V) with T=12, got shape [3, 4]"),
        ({"logits": lambda ys: ys[:, 0], "targets": TARGETS}, "return (T, V) with T=12, got shape [12]"),
        ({"labels": "abc"}, "labels must have one entry per step of xs, 12, got shape [3]"),
        ({"properties": {"depth": [1]}}, "depth must have one entry per step of xs, 12, got shape [1]"),
        ({"logits": logits}, "logits and targets belong together"),
        ({"logits": logits, "targets": [0]}, "targets must have one entry per step of xs, 12, got shape [1]"),
        ({"logits": logits, "targets": [V] * T}, "targets must be 0 to 3, got 4 to 4"),
        ({"logits": logits, "targets": TARGETS, "classes": "ab"}, "one entry per logit, 4, got shape [2]"),
        ({"properties": {"depth": [np.nan] * T}}, "finite numbers, but property depth has"),
    ],
)
def test_explore_rejects_wrong_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        diagnostics.explore(*make(), **options)


def test_explore_rejects_a_batch():
    lstm, params, xs = make()
    with pytest.raises(ValueError, match=r"one sequence \(T, I\) without batch axes, got shape \[12, 1, 3\]"):
        diagnostics.explore(lstm, params, xs[:, None])


def test_explore_rejects_a_page_that_is_too_large(monkeypatch):
    monkeypatch.setattr(explorer, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="1,000 bytes, too few for 12 steps of 5 units"):
        diagnostics.explore(*make())


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        jaxlstm.LSTM(3, H, bidirectional=True),
        jaxlstm.LSTM(3, H, cell="slstm"),
        jaxlstm.LSTM(3, 7, proj_size=H),
        jaxlstm.RNN(3, H, cell="rnn"),
        jaxlstm.ResidualStack(3, H, num_layers=2),
    ],
    ids=repr,
)
def test_explore_shows_every_kind_of_network(network):
    lstm, params, xs = make(network)
    width = 2 * H if lstm.bidirectional else H
    header, arrays = read(diagnostics.explore(lstm, params, xs, logits=lambda ys: ys[:, :V], targets=TARGETS))
    units = 7 if lstm.hidden_size == 7 else width
    assert {arrays[name].shape for name in header["values"]} == {(units, T)}
    assert ("gradients" in arrays) is not lstm.bidirectional
    assert ("timeConstants" in arrays) is (lstm.cell in ("lstm",))
    name = "h" if "h" in header["values"] else "output"
    directions = diagnostics.trace(lstm, params, xs).layers[0].directions
    expected = np.concatenate([np.asarray(d.h if name == "h" else d.cell_output) for d in directions], -1)
    values, error = decode(header, arrays, name)
    assert (np.abs(values - expected) <= error * 1.001 + 1e-6).all()


@pytest.mark.slow
def test_explore_page_of_2000_steps_and_512_units_is_below_5_megabytes(monkeypatch):
    """Noise, which compresses worse than text: inputs, targets, and gradients in place of the slow real ones."""
    noise = np.random.default_rng(1).random((2000, explorer.GRADIENT_STEPS))
    monkeypatch.setattr(explorer, "loss_gradients", lambda *_: noise)
    lstm = jaxlstm.LSTM(64, 512)
    params, xs = lstm.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2000, 64), jnp.float32)
    targets = np.random.default_rng(0).integers(0, 100, 2000)
    page = diagnostics.explore(lstm, params, xs, logits=lambda ys: ys[:, :100], targets=targets)
    header, _ = read(page)
    assert len(page.encode()) < 5_000_000
    assert header["levels"] >= 28


def training_rows(network, num_rows):
    """Returns rows of ``diagnosis.jsonl`` for a network of one direction."""
    values = {"gates": {name: {"quantiles": [1 / 3] * 5, "shut": 0.0, "open": None} for name in "ifo"}}
    layers = [
        {"forward": values | {"time_constants": [None] * 5, "dead": 0.0, "gradient": [1e-9 / 3], "elementwise": [0]}}
    ]
    return [{"step": n + 1, "steps": [0], "layers": layers * network.num_layers} for n in range(num_rows)]


def test_explore_playback_has_up_to_100_moments_of_the_layer_with_four_digits():
    lstm, params, xs = make()
    header, _ = read(diagnostics.explore(lstm, params, xs, training=training_rows(lstm, 250)))
    assert "training" not in read(diagnostics.explore(lstm, params, xs))[0]
    steps = [row["step"] for row in header["training"]["rows"]]
    assert [len(steps), steps[0], steps[-1]] == [100, 1, 250]
    forward = header["training"]["rows"][7]["layer"]["forward"]
    assert forward["gates"]["f"]["quantiles"] == [0.3333] * 5
    assert forward["gradient"] == [3.333e-10]
    assert forward["time_constants"] == [None] * 5


@pytest.mark.parametrize("other", [jaxlstm.LSTM(3, H, num_layers=2), jaxlstm.GRU(3, H)], ids=["layers", "cell"])
def test_explore_refuses_rows_of_another_network(other):
    lstm, params, xs = make(other)
    with pytest.raises(ValueError, match=r"the row of step 1 of diagnosis\.jsonl does not describe "):
        diagnostics.explore(lstm, params, xs, training=training_rows(jaxlstm.LSTM(3, H), 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time_constants", None),
        ("time_constants", [1.0] * 4),
        ("gradient", None),
        ("gradient", "x"),
        ("gradient", [float("nan")]),
        ("elementwise", []),
        ("dead", "no"),
        ("dead", float("inf")),
        ("gates", {"f": 3}),
        ("gates", {"f": {"quantiles": [0.5] * 4, "shut": 0.0, "open": 0.0}}),
        ("gates", {"f": {"quantiles": [0.5] * 5, "shut": 0.0}, "i": {}}),
    ],
)
def test_explore_refuses_rows_with_damaged_entries(name, value):
    lstm, params, xs = make()
    rows = training_rows(lstm, 2)
    rows[1]["layers"] = [{"forward": rows[1]["layers"][0]["forward"] | {name: value}}]
    with pytest.raises(ValueError, match=r"the row of step 2 of diagnosis\.jsonl does not describe "):
        diagnostics.explore(lstm, params, xs, training=rows)


def test_explore_labels_are_texts_of_any_values():
    lstm, params, xs = make()
    labels = [3, None, b"x", "\ud800", np.int64(4), *range(T - 5)]
    header, _ = read(diagnostics.explore(lstm, params, xs, labels=labels))
    assert header["labels"][:5] == ["3", "None", "b'x'", "?", "4"]


@pytest.mark.parametrize("layers", [None, 5, [], [3], [{}], [{"forward": {}}], [{"forward": {"gates": 1}}]], ids=str)
def test_explore_refuses_damaged_rows(layers):
    lstm, params, xs = make()
    with pytest.raises(ValueError, match=r"the row of step 7 of diagnosis\.jsonl does not describe "):
        diagnostics.explore(lstm, params, xs, training=[{"step": 7, "steps": [0], "layers": layers}])


def test_page_contains_the_drawing_library_as_published_with_its_license():
    web = resources.files("jaxlstm.diagnostics").joinpath("web")
    library = web.joinpath("uPlot.iife.min.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() == UPLOT_SHA256
    lstm = jaxlstm.LSTM(2, 3)
    page = diagnostics.explore(lstm, lstm.init(jax.random.key(0)), jnp.ones((4, 2)))
    assert library.decode().strip() in page
    assert web.joinpath("uPlot.LICENSE").read_text(encoding="utf-8") in page
