"""Weights of other frameworks: round trips bit by bit, parity with their own networks, names, errors and files.

Parity with PyTorch is in `test_torch`, with ONNX Runtime in `test_onnx`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import interop_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_params
from framework_parity import assert_close, assert_parity
from time_limit import time_limit

import jaxlstm
from jaxlstm import interop

RECORDED = np.load(interop_cases.RECORDED)
ROOT = Path(__file__).parent.parent.parent
FRAMEWORKS = ("torch", "keras", "flax_nnx", "flax_linen", "haiku", "equinox", "cudnn")
RECORDED_CASES = [
    name for name, (library, *_) in interop_cases.CASES.items() if library in interop_cases.RECORDED_LIBRARIES
]
LIVE_CASES = [name for name in interop_cases.CASES if name not in RECORDED_CASES]
# One case of each library and cell in the default tier; the others are slow.
DEFAULT_CASES = (
    "haiku both deep", "equinox both deep", "equinox gru both deep", "keras both deep", "keras gru both deep",
    "keras rnn", "linen both deep", "linen gru both deep", "nnx both", "nnx gru both deep",
)  # fmt: skip


def mark_slow(names):
    return [pytest.param(name, marks=[] if name in DEFAULT_CASES else [pytest.mark.slow]) for name in names]


def is_installed(name):
    return importlib.util.find_spec(name) is not None


def needs(name):
    return pytest.mark.skipif(not is_installed(name), reason=f"{name} is not installed")


def marked_frameworks():
    """All frameworks; only `to_equinox` creates objects of its framework, which must be installed."""
    return [pytest.param(name, marks=[needs(name)] if name == "equinox" else []) for name in FRAMEWORKS]


def from_framework(name, lstm, weights, **options):
    return getattr(interop, f"from_{name}")(lstm, weights, **options)


def to_framework(name, lstm, params, **options):
    return getattr(interop, f"to_{name}")(lstm, params, **options)


def float32_params(lstm, seed=0):
    return jax.tree.map(jnp.asarray, random_params(lstm, np.random.default_rng(seed), np.float32))


def assert_bitwise_equal(actual, expected):
    """Asserts that two trees have the same structure, dtypes and bits, including the sign of zero."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a).view("u1"), np.asarray(b).view("u1")),
        actual,
        expected,
    )
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)


# Parity with the networks of other libraries


class Conversions(NamedTuple):
    """The network of a case in float64, with the conversions of its weights."""

    lstm: jaxlstm.LSTM
    to_params: object
    to_weights: object


def conversions(name):
    library, options, arguments = interop_cases.CASES[name]
    lstm = jaxlstm.LSTM(interop_cases.INPUT, interop_cases.HIDDEN, param_dtype=jnp.float64, **options)
    cell_class = {"cell": arguments["cell_class"]} if library == "flax_nnx" else {}
    return Conversions(
        lstm,
        lambda weights: from_framework(library, lstm, weights),
        lambda params: to_framework(library, lstm, params, **cell_class),
    )


def num_biases(name):
    """Returns the number of biases that the library of a case adds up."""
    library, options, _ = interop_cases.CASES[name]
    is_keras_gru = library == "keras" and options.get("cell") == "gru"
    return 2 if name == "haiku rnn" or library == "cudnn" or (is_keras_gru and options.get("use_bias", True)) else 1


class EquinoxCell(NamedTuple):
    """Stands in for `LSTMCell` and `GRUCell` of Equinox, which `from_equinox` recognizes by the names of its arrays."""

    weight_ih: np.ndarray
    weight_hh: np.ndarray
    bias: np.ndarray | None = None
    bias_n: np.ndarray | None = None


def load_recorded(name):
    """Returns weights and their gradient with the structure of the library, and all other arrays."""
    prefix = f"{name}:"
    arrays = {key.removeprefix(prefix): RECORDED[key] for key in RECORDED.files if key.startswith(prefix)}

    def restore_structure(part):
        flat = {key.removeprefix(part): arrays[key] for key in arrays if key.startswith(part)}
        library, options, _ = interop_cases.CASES[name]
        if library == "keras":
            return list(flat.values())
        modules = {}
        for key, array in flat.items():
            *module, array_name = key.split("|")
            modules.setdefault(tuple(module), {})[array_name] = array
        if library == "haiku":
            return {module_name: module_arrays for (module_name,), module_arrays in modules.items()}
        cells = [EquinoxCell(**module_arrays) for module_arrays in modules.values()]
        if options.get("bidirectional"):
            cells = list(zip(cells[::2], cells[1::2]))
        return cells if len(cells) > 1 else cells[0]

    other_arrays = {key: array for key, array in arrays.items() if ":" not in key}
    return restore_structure("weights:"), restore_structure("gradient:"), other_arrays


@lru_cache
def compute(name):
    return interop_cases.compute(name)


@pytest.mark.parametrize("name", mark_slow(RECORDED_CASES))
def test_lstm_matches_recorded_library(name):
    lstm, to_params, _ = conversions(name)
    assert_parity(lstm, to_params, *load_recorded(name), num_biases=num_biases(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_slow(LIVE_CASES))
def test_lstm_matches_installed_library(name):
    lstm, to_params, _ = conversions(name)
    computed = compute(name)
    weights, gradient, arrays = computed.weights, computed.weight_gradient, computed.arrays
    without_bias = ("n_h",) if name.startswith("nnx gru") else ()
    assert_parity(lstm, to_params, weights, gradient, arrays, num_biases(name), without_bias=without_bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_slow(LIVE_CASES))
def test_installed_library_accepts_converted_weights(name):
    _, to_params, to_weights = conversions(name)
    computed = compute(name)
    weights = to_weights(to_params(computed.weights))
    assert jax.tree.structure(weights) == jax.tree.structure(computed.weights)
    arrays = computed.arrays
    state = {key: arrays[key] for key in ("h", "c") if key in arrays}
    assert_close(computed.rerun(weights), (state, arrays["ys"]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[needs("equinox")] if n.startswith("equinox") else [])
        for n in RECORDED_CASES
        if num_biases(n) == 1  # two biases are added
    ],
)
def test_recorded_weights_round_trip(name):
    _, to_params, to_weights = conversions(name)
    recorded_weights, _, _ = load_recorded(name)
    weights = interop_cases.flatten(to_weights(to_params(recorded_weights)))
    expected = interop_cases.flatten(recorded_weights)
    assert weights.keys() == expected.keys()
    for key, array in expected.items():
        # Exact, except for the forget gate of haiku: adding and subtracting 1 rounds its bias.
        np.testing.assert_allclose(weights[key], array, rtol=0, atol=2e-16 if key.endswith("|b") else 0)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(is_installed, interop_cases.RECORDED_LIBRARIES)), reason="a library is not installed")
def test_recorded_vectors_match_installed_libraries(tmp_path):
    """Runs in a subprocess, because Keras changes global configuration."""
    path = tmp_path / "vectors.npz"
    run_python(Path(interop_cases.__file__).name, str(path))
    computed = np.load(path)
    assert computed.files == RECORDED.files
    for key in computed.files:
        np.testing.assert_allclose(computed[key], RECORDED[key], rtol=1e-10, atol=1e-12)


def run_python(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3}, {"bidirectional": True}, {"bidirectional": True, "num_layers": 2}],
    ids=["one layer", "three layers", "bidirectional", "two layers bidirectional"],
)
@pytest.mark.parametrize("name", marked_frameworks())
def test_round_trip_is_bitwise_equal(name, options, dtype):
    lstm = jaxlstm.LSTM(3, 4, param_dtype=dtype, **options)
    params = params_with_special_values(lstm, name)
    assert_bitwise_equal(from_framework(name, lstm, to_framework(name, lstm, params)), params)


def params_with_special_values(lstm, name):
    """Returns random parameters that include zeros of both signs and subnormal numbers."""

    def set_special_values(weights):
        w_x, b = np.array(weights.w_x), np.array(weights.b)
        w_x[0, :2] = -0.0, jnp.finfo(w_x.dtype).smallest_subnormal
        b[:3] = 0.0, -0.0, jnp.finfo(b.dtype).smallest_subnormal
        if name == "haiku":  # subtracts 1 from the forget gate, which is exact for a bias of at least 0.5
            forget_gate = slice(lstm.hidden_size, 2 * lstm.hidden_size)
            b[forget_gate] = 0.5 + np.abs(b[forget_gate])
        return weights._replace(w_x=jnp.asarray(w_x), b=jnp.asarray(b))

    params = jax.tree.map(jnp.asarray, random_params(lstm, np.random.default_rng(0), jnp.dtype(lstm.param_dtype)))
    layers = [jaxlstm.Layer(*map(set_special_values, layer.directions)) for layer in params.layers]
    return params._replace(layers=tuple(layers))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch", {"use_bias": False, "num_layers": 2}),
        ("torch", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ("torch", {"cell": "rnn", "activation": "relu", "bidirectional": True}),
        ("torch", {"cell": "rnn", "use_bias": False}),
        ("keras", {"use_bias": False, "bidirectional": True}),
        ("torch", {"cell": "gru", "bidirectional": True}),
        ("torch", {"cell": "gru", "use_bias": False}),
        ("keras", {"cell": "gru", "num_layers": 2}),
        ("keras", {"cell": "gru", "use_bias": False}),
        ("flax_linen", {"cell": "gru", "num_layers": 2, "bidirectional": True}),
        pytest.param("equinox", {"cell": "gru", "num_layers": 2, "bidirectional": True}, marks=needs("equinox")),
        pytest.param("equinox", {"cell": "gru", "use_bias": False}, marks=needs("equinox")),
        ("keras", {"cell": "rnn", "activation": "sigmoid", "num_layers": 2}),
        ("haiku", {"cell": "rnn", "activation": "relu", "num_layers": 2, "bidirectional": True}),
        pytest.param("equinox", {"use_bias": False, "num_layers": 2}, marks=needs("equinox")),
    ],
)
def test_supported_options_round_trip(name, options):
    lstm = jaxlstm.LSTM(3, 4, **options)
    params = float32_params(lstm)
    assert_bitwise_equal(from_framework(name, lstm, to_framework(name, lstm, params)), params)


def test_haiku_round_trip_of_initial_params_is_bitwise_equal():
    lstm = jaxlstm.LSTM(3, 3)
    params = lstm.init(jax.random.key(0))
    assert_bitwise_equal(interop.from_haiku(lstm, interop.to_haiku(lstm, params)), params)


@pytest.mark.parametrize(
    ("low", "high", "max_error"),
    [(0.5, 2.0, 0.0), (2.0, 1e6, 0.0), (-0.5, 0.5, 2.0**-24), (-3.0, -1.0, 2.0**-23)],
)
def test_haiku_forget_gate_rounds_by_half_a_unit_below_one_half(low, high, max_error):
    lstm = jaxlstm.LSTM(1, 100)
    (layer,) = float32_params(lstm).layers
    b = np.asarray(np.random.default_rng(0).uniform(low, high, 400), np.float32)
    params = jaxlstm.Params((jaxlstm.Layer(layer.forward._replace(b=jnp.asarray(b))),))
    (converted,) = interop.from_haiku(lstm, interop.to_haiku(lstm, params)).layers
    error = np.abs(np.asarray(converted.forward.b, np.float64) - b).max()
    assert error <= max_error
    assert (error > 0) == (max_error > 0)


@needs("equinox")
def test_equinox_cells_match_step():
    import equinox

    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, param_dtype=jnp.float64)
    params = random_params(lstm, np.random.default_rng(0))
    (pair, _) = interop.to_equinox(lstm, params)
    assert all(isinstance(cell, equinox.nn.LSTMCell) for cell in pair)
    single = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)
    x, h, c = (np.random.default_rng(1).standard_normal(n) for n in (3, 4, 4))
    for cell, weights in zip(pair, params.layers[0].directions):
        state, _ = single.step(jaxlstm.Params((jaxlstm.Layer(weights),)), jaxlstm.State(h[None], c[None]), x)
        assert_close(cell(x, (h, c)), (state.h[0], state.c[0]))


@needs("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_tensors_round_trip(dtype):
    import torch

    module = torch.nn.LSTM(3, 4, 2, bidirectional=True, dtype=getattr(torch, dtype))
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, param_dtype=dtype)
    with_gradients = dict(module.named_parameters())  # the tensors of the state_dict need no gradient
    params = interop.from_torch(lstm, with_gradients)
    assert_bitwise_equal(interop.from_torch(lstm, module.state_dict()), params)
    arrays = interop.to_torch(lstm, params)
    assert list(arrays) == list(module.state_dict())
    if dtype == "bfloat16":  # which `torch.from_numpy` does not accept
        tensors = {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in arrays.items()}
    else:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module.load_state_dict(tensors)
    assert_bitwise_equal(interop.from_torch(lstm, module.state_dict()), params)


# Names


@pytest.mark.parametrize("prefix", [5, b"lstm"])
def test_from_torch_rejects_prefix_that_is_not_a_string(prefix):
    with pytest.raises(TypeError, match=r"^prefix must be a str or None, got "):
        interop.from_torch(SINGLE, interop.to_torch(SINGLE, PARAMS), prefix=prefix)


def test_from_torch_finds_lstm_by_prefix():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True)
    params = float32_params(lstm)
    state_dict = interop.to_torch(lstm, params)
    assert list(state_dict)[:4] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert list(state_dict)[4] == "weight_ih_l0_reverse"
    other_arrays = {"decoder.weight": np.zeros(3), "encoder.embed.weight": np.zeros(7), "steps": np.array(3)}
    for prefix in ("", "encoder.lstm.", "module.a.b."):
        model = {**other_arrays, **{prefix + name: array for name, array in state_dict.items()}}
        assert_bitwise_equal(interop.from_torch(lstm, model), params)
        assert_bitwise_equal(interop.from_torch(lstm, model, prefix=prefix), params)
    two = {f"{prefix}.{name}": array for prefix in ("encoder.lstm", "decoder") for name, array in state_dict.items()}
    message = "state_dict has 2 recurrent modules; choose one with prefix=: 'encoder.lstm.', 'decoder.'"
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_torch(lstm, two)
    assert_bitwise_equal(interop.from_torch(lstm, two, prefix="decoder"), params)
    with pytest.raises(ValueError, match=r"no name is 'weight_ih_l0' or ends in '\.weight_ih_l0'"):
        interop.from_torch(lstm, other_arrays)


TWO_LAYERS = jaxlstm.LSTM(3, 4, num_layers=2, param_dtype=jnp.float64)


def test_from_flax_linen_finds_cells_in_every_structure():
    from flax import linen

    params = jax.tree.map(jnp.asarray, random_params(TWO_LAYERS, np.random.default_rng(0)))
    first, second = interop.to_flax_linen(TWO_LAYERS, params)["params"].values()
    embed = {"embedding": np.zeros((7, 3))}

    class CompactModel(linen.Module):
        @linen.compact
        def __call__(self, xs):
            for _ in range(2):
                xs = linen.RNN(linen.OptimizedLSTMCell(4))(xs)
            return linen.Dense(2)(xs)

    shapes = jax.eval_shape(CompactModel().init, jax.random.key(0), jnp.zeros((5, 3), jnp.float32))["params"]
    assert set(shapes) == {"OptimizedLSTMCell_0", "OptimizedLSTMCell_1", "Dense_0"}
    compact = {"OptimizedLSTMCell_1": second["cell"], "Embed_0": embed, "OptimizedLSTMCell_0": first["cell"]}
    for variables in (
        {"params": compact},
        [first, second],
        [first["cell"], second["cell"]],
        {"rnns_1": second, "rnns_0": first, "embed": embed},
        {"params": {"a": {"lstm2": second, "lstm1": first}}},
        jax.tree.map(lambda array: linen.Partitioned(array, (None,) * array.ndim), [first, second]),
    ):
        assert_bitwise_equal(interop.from_flax_linen(TWO_LAYERS, variables), params)


def test_from_flax_nnx_finds_cells_in_every_structure():
    from flax import nnx

    params = jax.tree.map(jnp.asarray, random_params(TWO_LAYERS, np.random.default_rng(0)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            cells = [nnx.LSTMCell(size, 4, rngs=rngs, keep_rngs=True, param_dtype=jnp.float64) for size in (3, 4)]
            self.rnns = nnx.List([nnx.RNN(cell) for cell in cells])
            self.head = nnx.Linear(4, 2, rngs=rngs)

    with pytest.warns(UserWarning, match="keep_rngs"):
        model = Model(nnx.Rngs(0))
    for rnn, state in zip(model.rnns, interop.to_flax_nnx(TWO_LAYERS, params)):
        nnx.update(rnn, state)
    for module in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model, nnx.Param)), list(model.rnns)):
        assert_bitwise_equal(interop.from_flax_nnx(TWO_LAYERS, module), params)


@pytest.mark.parametrize("name", marked_frameworks())
def test_more_than_ten_layers_round_trip(name):
    lstm = jaxlstm.LSTM(2, 2, num_layers=12, bidirectional=True)
    params = params_with_special_values(lstm, name)
    assert_bitwise_equal(from_framework(name, lstm, to_framework(name, lstm, params)), params)


def test_from_haiku_orders_more_than_ten_layers_by_number():
    lstm = jaxlstm.LSTM(2, 2, num_layers=12, bidirectional=True)
    params = float32_params(lstm)
    modules = interop.to_haiku(lstm, params)
    (layer,) = interop.from_haiku(jaxlstm.LSTM(4, 2), {"lstm/linear": modules["lstm_23/linear"]}).layers
    np.testing.assert_array_equal(layer.forward.w_x, params.layers[11].backward.w_x)
    converted = interop.from_haiku(lstm, dict(sorted(modules.items())))
    for converted_layer, expected_layer in zip(converted.layers, params.layers, strict=True):
        for weights, expected in zip(converted_layer.directions, expected_layer.directions, strict=True):
            np.testing.assert_array_equal(weights.w_h, expected.w_h)


def test_from_haiku_finds_modules_by_name():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2)
    params = params_with_special_values(lstm, "haiku")
    linear = {"w": np.zeros((4, 2), np.float32), "b": np.zeros(2, np.float32)}
    first, second = interop.to_haiku(lstm, params, name="a/~/lstm"), interop.to_haiku(lstm, params, name="b/lstm")
    assert list(first) == ["a/~/lstm/linear", "a/~/lstm_1/linear"]
    assert_bitwise_equal(interop.from_haiku(lstm, {**first, "linear": linear, "a/linear": linear}), params)
    assert_bitwise_equal(interop.from_haiku(lstm, interop.to_haiku(lstm, params, name="core"), name="core"), params)
    message = r"one stack of 2 cells for num_layers=2 .*; found 'a/~/lstm/linear', .*'b/lstm_1/linear'"
    with pytest.raises(ValueError, match=message):
        interop.from_haiku(lstm, {**first, **second})
    assert_bitwise_equal(interop.from_haiku(lstm, {**first, **second}, name="b/lstm"), params)


def test_from_flax_nnx_refuses_other_activations():
    from flax import nnx

    lstm = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)

    def create(cell_class, **options):
        return cell_class(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    for cell_class in (nnx.LSTMCell, nnx.OptimizedLSTMCell):
        same = create(cell_class, gate_fn=lambda x: 0.5 * (jnp.tanh(0.5 * x) + 1))
        interop.from_flax_nnx(lstm, nnx.RNN(same))
        hard, relu = create(cell_class, gate_fn=nnx.hard_sigmoid), create(cell_class, activation_fn=nnx.relu)
        for module, message in (
            (hard, f"flax nnx cell '{cell_class.__name__}' has gate_fn=hard_sigmoid, expected sigmoid"),
            (create(cell_class, gate_fn=1), f"flax nnx cell '{cell_class.__name__}' has gate_fn=1, expected sigmoid"),
            (nnx.RNN(relu), "flax nnx cell 'cell' has activation_fn=relu, expected tanh"),
            ([relu], "flax nnx cell '0' has activation_fn=relu, expected tanh"),
        ):
            with pytest.raises(ValueError, match=message):
                interop.from_flax_nnx(lstm, module)


def test_from_flax_nnx_refuses_other_activations_of_a_gru():
    from flax import nnx

    gru = jaxlstm.GRU(3, 4, param_dtype=jnp.float64)
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    interop.from_flax_nnx(gru, nnx.GRUCell(3, 4, **options))
    with pytest.raises(ValueError, match="flax nnx cell 'GRUCell' has activation_fn=relu, expected tanh"):
        interop.from_flax_nnx(gru, nnx.GRUCell(3, 4, activation_fn=nnx.relu, **options))


def test_from_haiku_takes_a_single_bias_of_vanilla_rnn():
    lstm = jaxlstm.LSTM(3, 4, cell="rnn", activation="relu")
    params = float32_params(lstm)
    modules = interop.to_haiku(lstm, params)
    assert list(modules) == ["vanilla_rnn/linear", "vanilla_rnn/linear_1"]
    del modules["vanilla_rnn/linear_1"]["b"]
    assert_bitwise_equal(interop.from_haiku(lstm, modules), params)


# Errors

SINGLE = jaxlstm.LSTM(3, 4)
PARAMS = params_with_special_values(SINGLE, "haiku")
TORCH = interop.to_torch(SINGLE, PARAMS)
KERAS = interop.to_keras(SINGLE, PARAMS)
LINEN = interop.to_flax_linen(SINGLE, PARAMS)["params"]["cell"]
NNX = interop.to_flax_nnx(SINGLE, PARAMS, cell="OptimizedLSTMCell")["cell"]
HAIKU = interop.to_haiku(SINGLE, PARAMS)["lstm/linear"]
CUDNN = interop.to_cudnn(SINGLE, PARAMS)
EQUINOX = EquinoxCell(TORCH["weight_ih_l0"], TORCH["weight_hh_l0"], TORCH["bias_ih_l0"])
WEIGHTS = {
    "torch": TORCH,
    "keras": KERAS,
    "flax_nnx": NNX,
    "flax_linen": LINEN,
    "haiku": {"lstm/linear": HAIKU},
    "equinox": EQUINOX,
    "cudnn": CUDNN,
}


def test_from_framework_accepts_weights_of_the_error_cases():
    for name, weights in WEIGHTS.items():
        from_framework(name, SINGLE, weights)


@pytest.mark.parametrize(
    ("option", "value", "frameworks"),
    [
        ("cell", "peephole", FRAMEWORKS),
        ("cell", "cifg", FRAMEWORKS),
        ("cell", "rnn", ("flax_nnx", "flax_linen", "equinox", "cudnn")),
        ("cell", "gru", ("haiku", "cudnn")),
        *[("cell", cell, FRAMEWORKS) for cell in ("slstm", "minlstm", "mingru", "indrnn", "paralstm")],
        ("heads", 2, FRAMEWORKS),
        ("layer_norm", True, FRAMEWORKS),
        ("learned_state", True, FRAMEWORKS),
        ("proj_size", 2, FRAMEWORKS[1:]),
        ("proj_size", 4, FRAMEWORKS),  # PyTorch requires a projection smaller than H
        ("use_bias", False, ("flax_nnx", "flax_linen", "haiku", "cudnn")),
    ],
)
def test_unsupported_option_is_named(option, value, frameworks):
    lstm = jaxlstm.LSTM(3, 4, **{option: value})
    params = float32_params(lstm)
    for name in frameworks:
        message = re.escape(f"{name.replace('_', ' ')} weights do not support {option}={value!r}")
        with pytest.raises(ValueError, match=message):
            to_framework(name, lstm, params)
        for weights in (WEIGHTS[name], [] if name == "keras" else {}):  # options are checked before weights
            with pytest.raises(ValueError, match=message):
                from_framework(name, lstm, weights)


@pytest.mark.parametrize(("option", "value"), [("activation", "sigmoid"), ("proj_size", 2)])
def test_torch_names_unsupported_option_of_rnn(option, value):
    lstm = jaxlstm.LSTM(3, 4, cell="rnn", **{option: value})
    with pytest.raises(ValueError, match=f"torch weights do not support {option}={value!r}"):
        interop.to_torch(lstm, float32_params(lstm))


def test_torch_rejects_user_defined_cell():
    lstm = jaxlstm.LSTM(3, 4, cell=SINGLE.resolved_cell)
    with pytest.raises(ValueError, match=r"torch weights do not support cell=Cell\("):
        interop.to_torch(lstm, float32_params(lstm))


GRU = jaxlstm.GRU(3, 4)
GRU_WEIGHTS = {name: to_framework(name, GRU, float32_params(GRU)) for name in ("torch", "keras", "flax_linen")}


def nnx_gru_params():
    """Random parameters without the bias that nnx's GRUCell does not have."""
    (layer,) = float32_params(GRU).layers
    weights = layer.forward
    return jaxlstm.Params((jaxlstm.Layer(weights._replace(b=weights.b.at[-GRU.hidden_size :].set(0.0))),))


GRU_WEIGHTS["flax_nnx"] = interop.to_flax_nnx(GRU, nnx_gru_params())
b_r, b_z, b_n, b_h = np.split(np.arange(16, dtype=np.float32), 4)
GRU_WEIGHTS["equinox"] = EquinoxCell(
    GRU_WEIGHTS["torch"]["weight_ih_l0"], GRU_WEIGHTS["torch"]["weight_hh_l0"], np.concatenate([b_r, b_z, b_n]), b_h
)


@pytest.mark.parametrize(
    ("name", "lstm_message", "gru_message"),
    [
        (
            "torch",
            "'weight_ih_l0' must have shape [16, 3], got [12, 3]: 3 gates of 4 units, of another cell; expected 4",
            "must have shape [12, 3], got [16, 3]: 4 gates of 4 units, of another cell; expected 3",
        ),
        (
            "keras",
            "'kernel of layer 0, forward' must have shape [3, 16], got [3, 12]",
            "'kernel of layer 0, forward' must have shape [3, 12], got [3, 16]",
        ),
        ("flax_linen", "one stack of 1 cell", "one stack of 1 cell"),
        ("flax_nnx", "dense_h/bias' of shape [16] is missing", "dense_i/bias' of shape [12] is missing"),
        ("equinox", "'bias_n' is not part of this network", "'bias_n' of shape [4] is missing"),
    ],
)
def test_weights_of_another_cell_are_refused_in_one_line(name, lstm_message, gru_message):
    assert from_framework(name, GRU, GRU_WEIGHTS[name]).layers[0].forward.b.shape == (16,)
    for lstm, weights, message in ((SINGLE, GRU_WEIGHTS, lstm_message), (GRU, WEIGHTS, gru_message)):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            from_framework(name, lstm, weights[name])
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="must have shape"):
        to_framework(name, GRU, PARAMS)
    with pytest.raises(ValueError, match="must have shape"):
        to_framework(name, SINGLE, nnx_gru_params())


def test_from_keras_refuses_a_gru_with_its_reset_gate_before_the_product():
    """With ``reset_after=False`` there is one bias."""
    kernel, recurrent_kernel, biases = GRU_WEIGHTS["keras"]
    message = (
        "keras weight 'bias of layer 0, forward' of shape [12] is of a GRU with reset_after=False, whose reset gate is "
        "applied before the product with W_h; expected reset_after=True"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        interop.from_keras(GRU, [kernel, recurrent_kernel, biases[0]])


def test_haiku_says_why_it_refuses_a_gru():
    message = (
        "haiku weights do not support cell='gru': hk.GRU applies its reset gate before the product with W_h, "
        "jaxlstm.GRU after it"
    )
    gru = {"w_i": np.zeros((3, 12)), "w_h": np.zeros((4, 12)), "b": np.zeros(12)}
    for convert, value in ((interop.to_haiku, float32_params(GRU)), (interop.from_haiku, {"gru": gru})):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            convert(GRU, value)
    with pytest.raises(ValueError, match=r"one stack of 1 cell .*; found none$"):
        interop.from_haiku(SINGLE, {"gru": gru})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_nnx_gru_round_trips_without_the_bias_that_it_does_not_have(dtype):
    lstm = jaxlstm.GRU(3, 4, param_dtype=dtype)
    params = jax.tree.map(lambda a: a.astype(dtype), nnx_gru_params())
    assert_bitwise_equal(interop.from_flax_nnx(lstm, interop.to_flax_nnx(lstm, params)), params)
    (layer,) = params.layers
    b = layer.forward.b.at[-1].set(0.5)
    message = (
        "flax nnx GRUCell has no bias that its reset gate multiplies; expected zeros for gate n_h, the last 4 values "
        "of b, got values up to 0.5"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        interop.to_flax_nnx(lstm, jaxlstm.Params((jaxlstm.Layer(layer.forward._replace(b=b)),)))
    with pytest.raises(ValueError, match=r"^cell must be one of 'GRUCell'; got 'LSTMCell'$"):
        interop.to_flax_nnx(lstm, params, cell="LSTMCell")


@needs("torch")
def test_from_torch_reads_a_gru_cell_of_installed_torch():
    import torch

    cell = torch.nn.GRUCell(3, 4)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    params = interop.from_torch(GRU, cell.state_dict())
    new_state, _ = GRU.step(params, jaxlstm.State(h.numpy()[None], None), x.numpy())
    np.testing.assert_allclose(new_state.h[0], cell(x, h).detach().numpy(), rtol=1e-5, atol=1e-6)
    names = {name.removesuffix("_l0"): torch.from_numpy(a) for name, a in interop.to_torch(GRU, params).items()}
    cell.load_state_dict(names)
    assert_bitwise_equal(interop.from_torch(GRU, cell.state_dict()), params)


def test_haiku_names_unsupported_activation_of_rnn():
    lstm = jaxlstm.LSTM(3, 4, cell="rnn")  # hk.VanillaRNN has relu
    with pytest.raises(ValueError, match="haiku weights do not support activation=None"):
        interop.to_haiku(lstm, float32_params(lstm))


def with_prefix(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def test_from_torch_takes_an_lstm_cell():
    cell = {name.removesuffix("_l0"): array for name, array in TORCH.items()}
    assert_bitwise_equal(interop.from_torch(SINGLE, cell), PARAMS)
    assert_bitwise_equal(interop.from_torch(SINGLE, with_prefix("decoder.cell.", cell)), PARAMS)
    with pytest.raises(ValueError, match=r"weight 'weight_ih' is of a cell, .*; expected weights for num_layers=2"):
        interop.from_torch(jaxlstm.LSTM(3, 4, num_layers=2), cell)
    with pytest.raises(ValueError, match=r"state_dict has 2 recurrent modules; choose one with prefix=: 'a\.', 'b\.'"):
        interop.from_torch(SINGLE, with_prefix("a.", cell) | with_prefix("b.", TORCH))


@pytest.mark.parametrize("raw_prefix", ["rnns.0.module.", "rnns.0."], ids=["beside the copies", "in the parent"])
@pytest.mark.parametrize("has_copy", [True, False])
def test_from_torch_takes_the_trained_weights_of_weight_drop(raw_prefix, has_copy):
    model = with_prefix("rnns.0.module.", TORCH)
    dropped = model.pop("rnns.0.module.weight_hh_l0") * 0
    model[f"{raw_prefix}weight_hh_l0_raw"] = TORCH["weight_hh_l0"]
    if has_copy:
        model["rnns.0.module.weight_hh_l0"] = dropped
    assert_bitwise_equal(interop.from_torch(SINGLE, model), PARAMS)
    assert_bitwise_equal(interop.from_torch(SINGLE, model, prefix="rnns.0.module"), PARAMS)


@needs("safetensors")
def test_load_safetensors_takes_the_trained_weights_of_weight_drop(tmp_path):
    from safetensors.numpy import save_file

    model = with_prefix("module.", TORCH) | {"module.weight_hh_l0": TORCH["weight_hh_l0"] * 0}
    save_file(model | {"weight_hh_l0_raw": TORCH["weight_hh_l0"]}, tmp_path / "model.safetensors")
    assert_bitwise_equal(interop.load_safetensors(SINGLE, tmp_path / "model.safetensors"), PARAMS)


@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize(
    "names", [("{}_g", "{}_v"), ("parametrizations.{}.original0", "parametrizations.{}.original1")]
)
def test_from_torch_names_the_tensors_of_weight_norm(weight, names):
    first, second = (name.format(weight) for name in names)
    state_dict = without(TORCH, weight) | {first: np.ones((16, 1), np.float32), second: TORCH[weight]}
    message = f"torch weight '{weight}' is computed from '{first}', '{second}': remove the weight norm"
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_torch(SINGLE, state_dict)
    with pytest.raises(ValueError, match="state_dict has 2 recurrent modules"):
        interop.from_torch(SINGLE, with_prefix("encoder.", state_dict) | with_prefix("decoder.", TORCH))


class MetaTensor:
    """Stands in for a tensor on PyTorch's meta device."""

    is_meta = True

    def detach(self):
        return self

    def cpu(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


def test_from_torch_names_a_tensor_on_the_meta_device():
    message = "torch weight 'bias_hh_l0' is on the meta device, which has no values; load the weights first"
    with pytest.raises(ValueError, match=message):
        interop.from_torch(SINGLE, TORCH | {"bias_hh_l0": MetaTensor()})


@needs("torch")
def test_from_torch_reads_or_refuses_modules_of_installed_torch():
    import torch

    lstm, cell = jaxlstm.LSTM(3, 4), torch.nn.LSTMCell(3, 4)
    x, h, c = (torch.randn(2, size) for size in (3, 4, 4))
    state = jaxlstm.State(h.numpy()[None], c.numpy()[None])
    new_state, _ = lstm.step(interop.from_torch(lstm, cell.state_dict()), state, x.numpy())
    expected_h, expected_c = (a.detach().numpy() for a in cell(x, (h, c)))
    np.testing.assert_allclose(new_state.h[0], expected_h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_state.c[0], expected_c, rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        on_meta = torch.nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="torch weight 'weight_ih_l0' is on the meta device"):
        interop.from_torch(lstm, on_meta.state_dict())
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.LSTM(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="torch weight 'weight_hh_l0' is computed from 'parametrizations"):
        interop.from_torch(lstm, normed.state_dict())


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("torch", without(TORCH, "bias_hh_l0"), ValueError, "torch weight 'bias_hh_l0' of shape [16] is missing"),
        (
            "torch", {**TORCH, "weight_hr_l0": np.zeros((2, 4))},
            ValueError, "torch weight 'weight_hr_l0' is not part of this network, got float64[2, 4]",
        ),
        (
            "torch", {**TORCH, "weight_ih_l1": TORCH["weight_hh_l0"]},
            ValueError, "torch weight 'weight_ih_l1' is not part of this network, got float32[16, 4]",
        ),
        (
            "torch", {**TORCH, "weight_ih_l0": TORCH["weight_hh_l0"]},
            ValueError, "torch weight 'weight_ih_l0' must have shape [16, 3], got [16, 4]",
        ),
        (
            "torch", {**TORCH, "bias_ih_l0": np.zeros(16)},
            TypeError, "torch weight 'bias_ih_l0' is float64, which param_dtype=float32 cannot represent exactly",
        ),
        (
            "torch", {**TORCH, "bias_ih_l0": np.zeros(16, int)},
            TypeError, "torch weight 'bias_ih_l0' must be floating-point, got int64[16]",
        ),
        (
            "torch", {**TORCH, "bias_ih_l0": 16 * [0.0]},
            TypeError, "torch weight 'bias_ih_l0' must be an array, got list",
        ),
        ("torch", KERAS, TypeError, "state_dict must be a mapping of names to arrays, got list"),
        ("keras", KERAS[:2], ValueError, "keras weight 'bias of layer 0, forward' of shape [16] is missing"),
        (
            "keras", [*KERAS, KERAS[0]],
            ValueError, "keras weight 'number 3' is not part of this network, got float32[3, 16]",
        ),
        (
            "keras", [KERAS[1], KERAS[0], KERAS[2]],
            ValueError, "keras weight 'kernel of layer 0, forward' must have shape [3, 16], got [4, 16]",
        ),
        ("keras", TORCH, TypeError, "weights must be the list get_weights(), got dict"),
        ("flax_linen", without(LINEN, "if"), ValueError, "flax linen weight 'if/kernel' of shape [3, 4] is missing"),
        (
            "flax_linen", {"cell": {**LINEN, "ii": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4)}}},
            ValueError, "flax linen weight 'cell/ii/bias' is not part of this network, got float64[4]",
        ),
        (
            "flax_linen", [{"cell": LINEN}, {"cell": LINEN}],
            ValueError,
            "flax linen weights must contain one stack of 1 cell for num_layers=1 and bidirectional=False; "
            "found '0/cell', '1/cell'",
        ),
        ("flax_linen", {"params": {}}, ValueError, "bidirectional=False; found none"),
        (
            "flax_nnx", {**NNX, "dense_i": {"kernel": np.zeros((3, 12), np.float32)}},
            ValueError, "flax nnx weight 'dense_i/kernel' must have shape [3, 16], got [3, 12]",
        ),
        ("flax_nnx", LINEN, ValueError, "flax nnx weight 'if_/kernel' of shape [3, 4] is missing"),
        (
            "haiku", {"lstm/linear": {**HAIKU, "w": np.zeros((8, 16), np.float32)}},
            ValueError, "haiku weight 'lstm/linear/w' must have shape [7, 16], got [8, 16]",
        ),
        ("haiku", {"gru/linear": HAIKU}, ValueError, "bidirectional=False; found none"),
        ("equinox", EQUINOX._replace(bias=None), ValueError, "equinox weight 'bias' of shape [16] is missing"),
        ("cudnn", CUDNN[:-1], ValueError, "cudnn weights must be a vector of shape [144], got float32[143]"),
        ("cudnn", CUDNN[None], ValueError, "cudnn weights must be a vector of shape [144], got float32[1, 144]"),
        (
            "cudnn", CUDNN.astype(np.float64),
            TypeError, "is float64, which param_dtype=float32 cannot represent exactly",
        ),
    ],
)  # fmt: skip
def test_wrong_array_is_named_in_one_line(name, weights, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        from_framework(name, SINGLE, weights)
    assert "\n" not in str(raised.value)


def test_from_flax_rejects_cells_of_different_stacks():
    """The sizes of inputs and h are equal, so that only the paths of the cells differ from a stack."""
    square = jaxlstm.LSTM(4, 4)
    cell = interop.to_flax_linen(square, float32_params(square))["params"]["cell"]
    two_layers = jaxlstm.LSTM(4, 4, num_layers=2)
    for variables in (
        {"encoder": cell, "decoder": cell},
        {"forward_rnn": {"cell": cell}, "backward_rnn": {"cell": cell}},
    ):
        with pytest.raises(ValueError, match="must contain one stack of 2 cells for num_layers=2"):
            interop.from_flax_linen(two_layers, variables)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_to_framework_rejects_other_networks_and_params(name):
    other_params = float32_params(jaxlstm.LSTM(3, 5))
    with pytest.raises(ValueError, match=r"w_x must have shape \[16, 3\], got \[20, 3\]"):
        to_framework(name, SINGLE, other_params)
    with pytest.raises(TypeError, match=r"lstm must be a jaxlstm\.LSTM, got ConvLSTM"):
        to_framework(name, jaxlstm.ConvLSTM(1, 2, (3,)), other_params)


def test_from_torch_accepts_narrower_dtypes_exactly():
    half = {name: array.astype(np.float16) for name, array in TORCH.items()}
    (layer,) = interop.from_torch(SINGLE, half).layers
    assert layer.forward.w_x.dtype == jnp.float32
    np.testing.assert_array_equal(layer.forward.w_x, half["weight_ih_l0"].astype(np.float32))
    # float16 cannot represent 1 + 2**-11: the biases must be added in the wider dtype.
    half["bias_ih_l0"][:], half["bias_hh_l0"][:] = 1.0, 2.0**-11
    (layer,) = interop.from_torch(SINGLE, half).layers
    np.testing.assert_array_equal(layer.forward.b, np.full(16, 1.0 + 2.0**-11, np.float32))
    with pytest.raises(TypeError, match="is float16, which param_dtype=bfloat16 cannot represent exactly"):
        interop.from_torch(jaxlstm.LSTM(3, 4, param_dtype=jnp.bfloat16), half)
    (layer,) = interop.from_torch(jaxlstm.LSTM(3, 4, param_dtype=jnp.float64), TORCH).layers
    assert layer.forward.w_x.dtype == jnp.float64


def test_from_torch_needs_x64_for_float64():
    lstm = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"param_dtype is float64, which needs jax\.config"):
        interop.from_torch(lstm, TORCH)


@pytest.mark.parametrize("name", ["torch", "keras", "haiku", "cudnn"])
def test_conversion_copies_memory(name):
    params = jax.tree.map(jnp.array, PARAMS)
    weights = to_framework(name, SINGLE, params)
    converted = from_framework(name, SINGLE, weights)
    snapshot = jax.tree.map(np.array, converted)
    for array in jax.tree.leaves(weights):
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array += 1
    assert_bitwise_equal(jax.tree.map(np.asarray, converted), snapshot)
    assert_bitwise_equal(params, PARAMS)


def test_interop_imports_no_framework():
    frameworks = ("torch", "keras", "flax", "haiku", "equinox", "onnx", "safetensors", "xlstm")
    code = f"import sys, jaxlstm.interop; print([name for name in {frameworks} if name in sys.modules])"
    assert run_python("-c", code).strip() == "[]"


@pytest.mark.parametrize(
    ("package", "function", "call"),
    [
        ("equinox", "to_equinox", lambda path: interop.to_equinox(SINGLE, PARAMS)),
        ("safetensors", "save_safetensors", lambda path: interop.save_safetensors(SINGLE, PARAMS, path)),
        ("safetensors", "load_safetensors", lambda path: interop.load_safetensors(SINGLE, path)),
    ],
)
def test_package_not_installed_names_the_extra(monkeypatch, tmp_path, package, function, call):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
    message = f"{function} needs {package}, which is not installed: pip install 'jaxlstm[interop]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        call(tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


# Files


@needs("safetensors")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_safetensors_file_round_trips(tmp_path, dtype):
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, param_dtype=dtype)
    params = params_with_special_values(lstm, "torch")
    path = tmp_path / "weights.safetensors"
    interop.save_safetensors(lstm, params, path)
    assert_bitwise_equal(interop.load_safetensors(lstm, str(path)), params)
    assert list(tmp_path.iterdir()) == [path]


@needs("safetensors")
def test_save_safetensors_rejects_overwrite_that_is_not_a_bool(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("something else")
    with pytest.raises(TypeError, match=r"^overwrite must be True or False, got 'no'$"):
        interop.save_safetensors(SINGLE, PARAMS, path, overwrite="no")
    assert path.read_text() == "something else"


@needs("safetensors")
@pytest.mark.skipif(os.name == "nt", reason="no named pipes on Windows")
def test_load_safetensors_refuses_a_named_pipe_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with time_limit(20), pytest.raises(OSError, match="not a regular file"):
        interop.load_safetensors(SINGLE, tmp_path / "pipe")


@needs("safetensors")
def test_load_safetensors_reads_only_arrays_of_the_lstm(tmp_path, monkeypatch):
    import safetensors
    from safetensors.numpy import save_file

    class RecordingFile:
        """Records the names of the tensors that are read."""

        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            names_read.append(name)
            return self.file.get_tensor(name)

    safe_open, names_read = safetensors.safe_open, []
    monkeypatch.setattr(safetensors, "safe_open", RecordingFile)

    path = tmp_path / "model.safetensors"
    tensors = {f"{prefix}.{name}": array for prefix in ("encoder", "decoder") for name, array in TORCH.items()}
    save_file({**tensors, "embed.weight": np.zeros((7, 3), np.float32)}, path)
    assert_bitwise_equal(interop.load_safetensors(SINGLE, path, prefix="decoder"), PARAMS)
    assert sorted(names_read) == sorted(f"decoder.{name}" for name in TORCH)
    with pytest.raises(
        ValueError, match=r"state_dict has 2 recurrent modules; choose one with prefix=: '\w+\.', '\w+\.'"
    ):
        interop.load_safetensors(SINGLE, path)


@needs("safetensors")
def test_save_safetensors_replaces_file_only_with_overwrite(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("other content")
    with pytest.raises(FileExistsError, match=r"weights\.safetensors exists; overwrite=True replaces it"):
        interop.save_safetensors(SINGLE, PARAMS, path)
    assert path.read_text() == "other content"
    interop.save_safetensors(SINGLE, PARAMS, path, overwrite=True)
    assert_bitwise_equal(interop.load_safetensors(SINGLE, path), PARAMS)


@needs("safetensors")
@pytest.mark.parametrize("failing_call", ["fsync", "replace"])
def test_save_safetensors_is_atomic(tmp_path, monkeypatch, failing_call):
    path = tmp_path / "weights.safetensors"
    path.write_text("other content")

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing_call, disk_full)
    with pytest.raises(OSError, match="no space left"):
        interop.save_safetensors(SINGLE, PARAMS, path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "other content"


@needs("safetensors")
@needs("torch")
def test_safetensors_file_is_read_by_torch(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path / "weights.safetensors"
    interop.save_safetensors(SINGLE, PARAMS, path)
    module = torch.nn.LSTM(3, 4)
    module.load_state_dict(load_file(path))
    assert_bitwise_equal(interop.from_torch(SINGLE, module.state_dict()), PARAMS)
    save_file({f"lstm.{name}": tensor for name, tensor in module.state_dict().items()}, path)
    assert_bitwise_equal(interop.load_safetensors(SINGLE, path), PARAMS)
