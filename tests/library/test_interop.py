"""Weights of other frameworks: there and back bit by bit, and what their own networks compute with them.

PyTorch's computations are in `test_torch`.
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
from cases import random_params, slow_but
from foreign import assert_close, compare

import jaxlstm
from jaxlstm import interop

RECORDED = np.load(interop_cases.RECORDED)
ROOT = Path(__file__).parent.parent.parent
FORMATS = ("torch", "keras", "flax_nnx", "flax_linen", "haiku", "equinox", "cudnn")
RECORDED_CASES = [name for name, case in interop_cases.CASES.items() if case[0] in interop_cases.NOT_INSTALLED]
LIVE_CASES = [name for name in interop_cases.CASES if name not in RECORDED_CASES]
# The others are slow tests.
FAST = (
    "haiku both deep", "equinox both deep", "keras both deep", "keras rnn", "linen both deep", "nnx both",
    "cudnn both deep",
)  # fmt: skip
OPTIONS = {
    "one layer": {},
    "deep": {"num_layers": 3},
    "both": {"bidirectional": True},
    "both deep": {"bidirectional": True, "num_layers": 2},
}


def installed(name):
    return importlib.util.find_spec(name) is not None


def skip_without(name):
    """Equinox is the one whose objects are made, and so has to be there."""
    if name == "equinox" and not installed(name):
        pytest.skip("equinox is not installed")


def needs(name):
    return pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")


def network(name):
    """The network of a case, in float64, and its way in and out."""
    library, options, arguments = interop_cases.CASES[name]
    lstm = jaxlstm.LSTM(interop_cases.INPUT, interop_cases.HIDDEN, param_dtype=jnp.float64, **options)
    there = {"cell": arguments["cell"]} if library == "flax_nnx" else {}
    return (
        lstm,
        lambda weights: getattr(interop, f"from_{library}")(lstm, weights),
        lambda params: getattr(interop, f"to_{library}")(lstm, params, **there),
    )


class Cell(NamedTuple):
    """A stand-in for `equinox.nn.LSTMCell`, of which only the names matter."""

    weight_ih: np.ndarray
    weight_hh: np.ndarray
    bias: np.ndarray | None = None


def recorded(name):
    """Weights and their gradient in the form of the library, and all other arrays."""
    prefix = f"{name}:"
    arrays = {key.removeprefix(prefix): RECORDED[key] for key in RECORDED.files if key.startswith(prefix)}

    def form(part):
        own = {key.removeprefix(part): arrays[key] for key in arrays if key.startswith(part)}
        library, options, _ = interop_cases.CASES[name]
        if library == "keras":
            return list(own.values())
        groups = {}
        for key, array in own.items():
            *group, last = key.split("|")
            groups.setdefault(tuple(group), {})[last] = array
        if library == "haiku":
            return {module: own for (module,), own in groups.items()}
        cells = [Cell(**own) for own in groups.values()]
        if options.get("bidirectional"):
            cells = list(zip(cells[::2], cells[1::2]))
        return cells if len(cells) > 1 else cells[0]

    return form("weights:"), form("gradient:"), {key: array for key, array in arrays.items() if ":" not in key}


@lru_cache
def computed(name):
    return interop_cases.compute(name)


def same(a, b):
    """Equal bit by bit: structure, dtype, and the sign of zero."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view("u1"), np.asarray(y).view("u1")), a, b)
    assert jax.tree.map(jnp.result_type, a) == jax.tree.map(jnp.result_type, b)


# What the other libraries compute


@pytest.mark.parametrize("name", slow_but(FAST, RECORDED_CASES))
def test_another_library_computes_the_same_as_recorded(name):
    lstm, there, _ = network(name)
    weights, gradient, arrays = recorded(name)
    compare(lstm, there, weights, gradient, arrays)


@pytest.mark.parametrize("name", slow_but(FAST, LIVE_CASES))
def test_another_library_computes_the_same(name):
    lstm, there, _ = network(name)
    weights, gradient, arrays, _ = computed(name)
    compare(lstm, there, weights, gradient, arrays, biases=2 if name.startswith("cudnn") else 1)


@pytest.mark.parametrize("name", slow_but(FAST, LIVE_CASES))
def test_another_library_takes_what_goes_out(name):
    _, there, back = network(name)
    weights, _, arrays, run = computed(name)
    out = back(there(weights))
    assert jax.tree.structure(out) == jax.tree.structure(weights)
    state = {key: arrays[f"{key}0"] for key in ("h", "c")}
    assert_close(run(out, state, arrays["xs"]), ({"h": arrays["h"], "c": arrays["c"]}, arrays["ys"]))


@pytest.mark.parametrize("name", RECORDED_CASES)
def test_what_goes_out_has_the_form_of_what_came_in(name):
    _, there, back = network(name)
    library, *_ = interop_cases.CASES[name]
    skip_without(library)
    weights, _, _ = recorded(name)
    out = back(there(weights))
    assert interop_cases.flat(out).keys() == interop_cases.flat(weights).keys()
    for key, array in interop_cases.flat(weights).items():
        # But for haiku's 1, which is added and taken off, what came in goes out as it was.
        np.testing.assert_allclose(interop_cases.flat(out)[key], array, rtol=0, atol=2e-16 if key.endswith("|b") else 0)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(installed, interop_cases.NOT_INSTALLED)), reason="one is not installed")
def test_the_record_is_what_the_libraries_compute_now(tmp_path):
    """In a process of its own, since Keras changes global configuration."""
    path = tmp_path / "now.npz"
    run_alone(Path(interop_cases.__file__).name, str(path))
    now = np.load(path)
    assert now.files == RECORDED.files
    for key in now.files:
        np.testing.assert_allclose(now[key], RECORDED[key], rtol=1e-10, atol=1e-12)


def run_alone(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# There and back


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_the_same_bit_by_bit(name, options, dtype):
    skip_without(name)
    lstm = jaxlstm.LSTM(3, 4, param_dtype=dtype, **OPTIONS[options])
    params = awkward_params(lstm, name)
    same(getattr(interop, f"from_{name}")(lstm, getattr(interop, f"to_{name}")(lstm, params)), params)


def awkward_params(lstm, name):
    """Random parameters, zeros of either sign and a number that is not a normal one among them."""
    rng = np.random.default_rng(0)

    def spoil(weights):
        w_x, b = np.array(weights.w_x), np.array(weights.b)
        w_x[0, :2] = -0.0, jnp.finfo(w_x.dtype).smallest_subnormal
        b[:3] = 0.0, -0.0, jnp.finfo(b.dtype).smallest_subnormal
        if name == "haiku":  # 1 is taken off these, which is exact from 0.5 on
            forget = slice(lstm.hidden_size, 2 * lstm.hidden_size)
            b[forget] = 0.5 + np.abs(b[forget])
        return weights._replace(w_x=jnp.asarray(w_x), b=jnp.asarray(b))

    params = random_params(lstm, rng, jnp.dtype(lstm.param_dtype))
    return params._replace(layers=tuple(jaxlstm.Layer(*map(spoil, layer.directions)) for layer in params.layers))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch", {"use_bias": False, "num_layers": 2}),
        ("torch", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ("torch", {"cell": "rnn", "activation": "relu", "bidirectional": True}),
        ("torch", {"cell": "rnn", "use_bias": False}),
        ("keras", {"use_bias": False, "bidirectional": True}),
        ("keras", {"cell": "rnn", "activation": "sigmoid", "num_layers": 2}),
        ("equinox", {"use_bias": False, "num_layers": 2}),
    ],
)
def test_options_go_there_and_back(name, options):
    skip_without(name)
    lstm = jaxlstm.LSTM(3, 4, **options)
    params = random_params(lstm, np.random.default_rng(0), np.float32)
    same(
        getattr(interop, f"from_{name}")(lstm, getattr(interop, f"to_{name}")(lstm, params)),
        jax.tree.map(jnp.asarray, params),
    )


def test_drawn_parameters_go_through_haiku_bit_by_bit():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2)
    params = lstm.init(jax.random.key(0))
    same(interop.from_haiku(lstm, interop.to_haiku(lstm, params)), params)


def test_haikus_forget_gate_rounds_by_half_a_unit_and_only_below_one_half():
    lstm = jaxlstm.LSTM(1, 1000)
    rng = np.random.default_rng(0)
    params = random_params(lstm, rng, np.float32)
    for low, high, bound in [(0.5, 2.0, 0.0), (2.0, 1e6, 0.0), (-0.5, 0.5, 2.0**-24), (-3.0, -1.0, 2.0**-23)]:
        b = np.asarray(rng.uniform(low, high, 4000), np.float32)
        mine = params._replace(layers=(jaxlstm.Layer(params.layers[0].forward._replace(b=jnp.asarray(b))),))
        (back,) = interop.from_haiku(lstm, interop.to_haiku(lstm, mine)).layers
        error = np.abs(np.asarray(back.forward.b, np.float64) - b).max()
        assert error <= bound, (low, high)
        assert (error > 0) == (bound > 0)


@needs("equinox")
def test_equinox_cells_step_as_ours():
    import equinox

    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, param_dtype=jnp.float64)
    params = random_params(lstm, np.random.default_rng(0))
    (pair, _) = interop.to_equinox(lstm, params)
    assert all(isinstance(cell, equinox.nn.LSTMCell) for cell in pair)
    one = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)
    x, h, c = (np.random.default_rng(1).standard_normal(n) for n in (3, 4, 4))
    for cell, weights in zip(pair, params.layers[0].directions):
        state, _ = one.step(jaxlstm.Params((jaxlstm.Layer(weights),)), jaxlstm.State(h[None], c[None]), x)
        assert_close(cell(x, (h, c)), (state.h[0], state.c[0]))


@needs("torch")
def test_tensors_of_pytorch_come_in_and_go_out():
    import torch

    for dtype in ("float32", "bfloat16"):
        module = torch.nn.LSTM(3, 4, 2, bidirectional=True, dtype=getattr(torch, dtype))
        lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, param_dtype=dtype)
        own = dict(module.named_parameters())  # which need a gradient, unlike those of the state_dict
        params = interop.from_torch(lstm, own)
        same(interop.from_torch(lstm, module.state_dict()), params)
        out = interop.to_torch(lstm, params)
        assert list(out) == list(module.state_dict())
        if dtype == "bfloat16":  # which `torch.from_numpy` does not know
            back = {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in out.items()}
        else:
            back = {name: torch.from_numpy(array) for name, array in out.items()}
        module.load_state_dict(back)
        same(interop.from_torch(lstm, module.state_dict()), params)


# Names


def test_pytorch_names_have_any_prefix():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True)
    params = random_params(lstm, np.random.default_rng(0), np.float32)
    own = interop.to_torch(lstm, params)
    assert list(own)[:4] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert list(own)[4] == "weight_ih_l0_reverse"
    others = {"decoder.weight": np.zeros(3), "encoder.embed.weight": np.zeros(7), "steps": np.array(3)}
    for prefix in ("", "encoder.lstm.", "module.a.b."):
        state_dict = {**others, **{prefix + name: array for name, array in own.items()}}
        same(interop.from_torch(lstm, state_dict), jax.tree.map(jnp.asarray, params))
        same(interop.from_torch(lstm, state_dict, prefix=prefix), jax.tree.map(jnp.asarray, params))
    two = {f"{prefix}.{name}": array for prefix in ("encoder.lstm", "decoder") for name, array in own.items()}
    message = "state_dict has 2 LSTMs, choose one of them: prefix='encoder.lstm.', 'decoder.'"
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_torch(lstm, two)
    same(interop.from_torch(lstm, two, prefix="decoder"), jax.tree.map(jnp.asarray, params))
    with pytest.raises(ValueError, match=r"no name in it is 'weight_ih_l0' or ends in '\.weight_ih_l0'"):
        interop.from_torch(lstm, others)


def test_cells_of_flax_are_found_in_every_form():
    from flax import linen, nnx

    lstm = jaxlstm.LSTM(3, 4, num_layers=2, param_dtype=jnp.float64)
    params = jax.tree.map(jnp.asarray, random_params(lstm, np.random.default_rng(0)))
    first, second = interop.to_flax_linen(lstm, params)["params"].values()
    embed = {"embedding": np.zeros((7, 3))}

    class Compact(linen.Module):
        @linen.compact
        def __call__(self, xs):
            for _ in range(2):
                xs = linen.RNN(linen.OptimizedLSTMCell(4))(xs)
            return linen.Dense(2)(xs)

    named = jax.eval_shape(Compact().init, jax.random.key(0), jnp.zeros((5, 3), jnp.float32))["params"]
    assert set(named) == {"OptimizedLSTMCell_0", "OptimizedLSTMCell_1", "Dense_0"}
    compact = {"OptimizedLSTMCell_1": second["cell"], "Embed_0": embed, "OptimizedLSTMCell_0": first["cell"]}
    for form in (
        {"params": compact},
        [first, second],
        [first["cell"], second["cell"]],
        {"rnns_1": second, "rnns_0": first, "embed": embed},
        {"params": {"a": {"lstm2": second, "lstm1": first}}},
    ):
        same(interop.from_flax_linen(lstm, form), params)
    boxed = jax.tree.map(lambda array: linen.Partitioned(array, (None,) * array.ndim), [first, second])
    same(interop.from_flax_linen(lstm, boxed), params)

    class Model(nnx.Module):
        def __init__(self, rngs):
            cells = [nnx.LSTMCell(width, 4, rngs=rngs, keep_rngs=True, param_dtype=jnp.float64) for width in (3, 4)]
            self.rnns = nnx.List([nnx.RNN(cell) for cell in cells])
            self.head = nnx.Linear(4, 2, rngs=rngs)

    with pytest.warns(UserWarning, match="keep_rngs"):
        model = Model(nnx.Rngs(0))
    for rnn, state in zip(model.rnns, interop.to_flax_nnx(lstm, params)):
        nnx.update(rnn, state)
    for form in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model, nnx.Param)), list(model.rnns)):
        same(interop.from_flax_nnx(lstm, form), params)


@pytest.mark.parametrize("name", FORMATS)
def test_more_than_ten_layers_go_there_and_back(name):
    skip_without(name)
    lstm = jaxlstm.LSTM(2, 2, num_layers=12, bidirectional=True, param_dtype=jnp.float32)
    params = jax.tree.map(jnp.asarray, awkward_params(lstm, name))
    same(getattr(interop, f"from_{name}")(lstm, getattr(interop, f"to_{name}")(lstm, params)), params)


def test_more_than_ten_layers_of_haiku_are_in_the_order_of_their_numbers():
    lstm = jaxlstm.LSTM(2, 2, num_layers=12, bidirectional=True)
    params = jax.tree.map(jnp.asarray, random_params(lstm, np.random.default_rng(0), np.float32))
    out = interop.to_haiku(lstm, params)
    (layer,) = interop.from_haiku(jaxlstm.LSTM(4, 2), {"lstm/linear": out["lstm_23/linear"]}).layers
    np.testing.assert_array_equal(layer.forward.w_x, params.layers[11].backward.w_x)
    weights = [w for layer in interop.from_haiku(lstm, dict(sorted(out.items()))).layers for w in layer.directions]
    for w, own in zip(weights, [w for layer in params.layers for w in layer.directions]):
        np.testing.assert_array_equal(w.w_h, own.w_h)


def test_haikus_modules_have_any_name():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2)
    params = lstm.init(jax.random.key(0))
    linear = {"w": np.zeros((4, 2), np.float32), "b": np.zeros(2, np.float32)}
    one, other = interop.to_haiku(lstm, params, name="a/~/lstm"), interop.to_haiku(lstm, params, name="b/lstm")
    assert list(one) == ["a/~/lstm/linear", "a/~/lstm_1/linear"]
    same(interop.from_haiku(lstm, {**one, "linear": linear, "a/linear": linear}), params)
    same(interop.from_haiku(lstm, interop.to_haiku(lstm, params, name="core"), name="core"), params)
    with pytest.raises(
        ValueError, match=r"2 of them for num_layers=2 .*; found 'a/~/lstm/linear', .*'b/lstm_1/linear'"
    ):
        interop.from_haiku(lstm, {**one, **other})
    same(interop.from_haiku(lstm, {**one, **other}, name="b/lstm"), params)


# What is refused


@pytest.mark.parametrize(
    ("option", "value", "formats"),
    [
        ("cell", "peephole", FORMATS),
        ("cell", "cifg", FORMATS),
        ("cell", "rnn", ("flax_nnx", "flax_linen", "haiku", "equinox", "cudnn")),
        ("layer_norm", True, FORMATS),
        ("learned_state", True, FORMATS),
        ("proj_size", 2, FORMATS[1:]),
        ("proj_size", 4, FORMATS),  # PyTorch's must be smaller than h
        ("use_bias", False, ("flax_nnx", "flax_linen", "haiku", "cudnn")),
    ],
)
def test_an_option_without_a_place_is_refused_by_name(option, value, formats):
    lstm = jaxlstm.LSTM(3, 4, **{option: value})
    plain = jaxlstm.LSTM(3, 4)
    for name in formats:
        message = re.escape(f"{name.replace('_', ' ')} has no place for {option}={value!r}")
        with pytest.raises(ValueError, match=message):
            getattr(interop, f"to_{name}")(lstm, lstm.init(jax.random.key(0)))
        foreign = (
            getattr(interop, f"to_{name}")(plain, plain.init(jax.random.key(0))) if name != "equinox" else Cell(1, 1)
        )
        with pytest.raises(ValueError, match=message):
            getattr(interop, f"from_{name}")(lstm, foreign)
        nothing = [] if name == "keras" else {}
        with pytest.raises(ValueError, match=message):  # before anything else
            getattr(interop, f"from_{name}")(lstm, nothing)


def test_options_of_pytorchs_rnn_are_refused_by_name():
    for options in ({"activation": "sigmoid"}, {"proj_size": 2}):
        lstm = jaxlstm.LSTM(3, 4, cell="rnn", **options)
        ((option, value),) = options.items()
        with pytest.raises(ValueError, match=f"torch has no place for {option}={value!r}"):
            interop.to_torch(lstm, lstm.init(jax.random.key(0)))
    cell = jaxlstm.Cell(lambda z, c: (z[0] * c, z[1] * c), num_gates=2)
    lstm = jaxlstm.LSTM(3, 4, cell=cell)
    with pytest.raises(ValueError, match=r"torch has no place for cell=Cell\("):
        interop.to_torch(lstm, lstm.init(jax.random.key(0)))


lstm = jaxlstm.LSTM(3, 4)
params = lstm.init(jax.random.key(0))
TORCH = interop.to_torch(lstm, params)
KERAS = interop.to_keras(lstm, params)
LINEN = interop.to_flax_linen(lstm, params)["params"]["cell"]
NNX = interop.to_flax_nnx(lstm, params, cell="OptimizedLSTMCell")["cell"]
HAIKU = interop.to_haiku(lstm, params)["lstm/linear"]
CUDNN = interop.to_cudnn(lstm, params)


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("torch", without(TORCH, "bias_hh_l0"), ValueError, "torch weight 'bias_hh_l0' of shape [16] is missing"),
        (
            "torch", {**TORCH, "weight_hr_l0": np.zeros((2, 4))},
            ValueError, "torch weight 'weight_hr_l0' is not one of this configuration, got float64[2, 4]",
        ),
        (
            "torch", {**TORCH, "weight_ih_l1": TORCH["weight_hh_l0"]},
            ValueError, "torch weight 'weight_ih_l1' is not one of this configuration, got float32[16, 4]",
        ),
        (
            "torch", {**TORCH, "weight_ih_l0": TORCH["weight_hh_l0"]},
            ValueError, "torch weight 'weight_ih_l0' must have shape [16, 3], got [16, 4]",
        ),
        (
            "torch", {**TORCH, "bias_ih_l0": np.zeros(16)},
            TypeError, "torch weight 'bias_ih_l0' is float64, which param_dtype=float32 does not hold exactly",
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
            ValueError, "keras weight 'number 3' is not one of this configuration, got float32[3, 16]",
        ),
        (
            "keras", [KERAS[1], KERAS[0], KERAS[2]],
            ValueError, "keras weight 'kernel of layer 0, forward' must have shape [3, 16], got [4, 16]",
        ),
        ("keras", TORCH, TypeError, "weights must be the list of get_weights(), got dict"),
        ("flax_linen", without(LINEN, "if"), ValueError, "flax linen weight 'if/kernel' of shape [3, 4] is missing"),
        (
            "flax_linen", {"cell": {**LINEN, "ii": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4)}}},
            ValueError, "flax linen weight 'cell/ii/bias' is not one of this configuration, got float64[4]",
        ),
        (
            "flax_linen", [{"cell": LINEN}, {"cell": LINEN}],
            ValueError,
            "flax linen weights must be the cells of one stack, 1 of them for num_layers=1 and bidirectional=False; "
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
        (
            "equinox", Cell(TORCH["weight_ih_l0"], TORCH["weight_hh_l0"]),
            ValueError, "equinox weight 'bias' of shape [16] is missing",
        ),
        ("cudnn", CUDNN[:-1], ValueError, "cudnn weights must be a vector of shape [144], got float32[143]"),
        ("cudnn", CUDNN[None], ValueError, "cudnn weights must be a vector of shape [144], got float32[1, 144]"),
        ("cudnn", CUDNN.astype(np.float64), TypeError, "is float64, which param_dtype=float32 does not hold exactly"),
    ],
)  # fmt: skip
def test_a_wrong_array_is_one_line_that_names_it(name, weights, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        getattr(interop, f"from_{name}")(lstm, weights)
    assert "\n" not in str(raised.value)


def test_cells_that_are_not_one_stack_are_not_taken_for_one():
    """Where h has the size of the inputs, no shape would tell."""
    square = jaxlstm.LSTM(4, 4)
    cell = interop.to_flax_linen(square, square.init(jax.random.key(0)))["params"]["cell"]
    deep = jaxlstm.LSTM(4, 4, num_layers=2)
    for form in ({"encoder": cell, "decoder": cell}, {"forward_rnn": {"cell": cell}, "backward_rnn": {"cell": cell}}):
        with pytest.raises(ValueError, match="must be the cells of one stack, 2 of them for num_layers=2"):
            interop.from_flax_linen(deep, form)


def test_parameters_of_another_network_are_refused():
    other = jaxlstm.LSTM(3, 5).init(jax.random.key(0))
    for name in FORMATS:
        with pytest.raises(ValueError, match=r"w_x must have shape \[16, 3\], got \[20, 3\]"):
            getattr(interop, f"to_{name}")(lstm, other)
        with pytest.raises(TypeError, match=r"lstm must be a jaxlstm\.LSTM, got ConvLSTM"):
            getattr(interop, f"to_{name}")(jaxlstm.ConvLSTM(1, 2, (3,)), other)


def test_a_narrower_dtype_comes_in_exactly_and_a_wider_one_where_it_is_asked_for():
    half = {name: array.astype(np.float16) for name, array in TORCH.items()}
    (layer,) = interop.from_torch(lstm, half).layers
    assert layer.forward.w_x.dtype == jnp.float32
    np.testing.assert_array_equal(layer.forward.w_x, half["weight_ih_l0"].astype(np.float32))
    # 1 + 2**-11 has more digits than float16: the biases are added in the wider dtype.
    half["bias_ih_l0"][:], half["bias_hh_l0"][:] = 1.0, 2.0**-11
    (layer,) = interop.from_torch(lstm, half).layers
    np.testing.assert_array_equal(layer.forward.b, np.full(16, 1.0 + 2.0**-11, np.float32))
    with pytest.raises(TypeError, match="is float16, which param_dtype=bfloat16 does not hold exactly"):
        interop.from_torch(jaxlstm.LSTM(3, 4, param_dtype=jnp.bfloat16), half)
    (layer,) = interop.from_torch(jaxlstm.LSTM(3, 4, param_dtype=jnp.float64), TORCH).layers
    assert layer.forward.w_x.dtype == jnp.float64


def test_float64_comes_in_only_where_it_is_switched_on():
    wide = jaxlstm.LSTM(3, 4, param_dtype=jnp.float64)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"param_dtype is float64, which needs jax\.config"):
        interop.from_torch(wide, TORCH)


@pytest.mark.parametrize("name", ["torch", "keras", "haiku", "cudnn"])
def test_memory_is_not_shared(name):
    out = getattr(interop, f"to_{name}")(lstm, params)
    back = getattr(interop, f"from_{name}")(lstm, out)
    kept = jax.tree.map(np.array, back)
    for array in jax.tree.leaves(out):
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array += 1
    same(jax.tree.map(np.asarray, back), kept)
    same(params, lstm.init(jax.random.key(0)))


def test_nothing_foreign_is_imported():
    foreign = ("torch", "keras", "flax", "haiku", "equinox", "safetensors")
    code = f"import sys, jaxlstm.interop; print([name for name in {foreign} if name in sys.modules])"
    assert run_alone("-c", code).strip() == "[]"


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("equinox", lambda path: interop.to_equinox(lstm, params)),
        ("safetensors", lambda path: interop.save_safetensors(lstm, params, path)),
        ("safetensors", lambda path: interop.load_safetensors(lstm, path)),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, module, call):
    monkeypatch.setitem(sys.modules, module, None)  # which makes its import fail
    monkeypatch.setitem(sys.modules, f"{module}.numpy", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'jaxlstm[interop]'")):
        call(tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


# Files


@needs("safetensors")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_file_gives_back_what_was_saved(tmp_path, dtype):
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, param_dtype=dtype)
    params = awkward_params(lstm, "torch")
    path = tmp_path / "weights.safetensors"
    interop.save_safetensors(lstm, params, path)
    same(interop.load_safetensors(lstm, str(path)), params)
    assert list(tmp_path.iterdir()) == [path]


@needs("safetensors")
def test_of_a_file_only_what_is_the_lstms_is_read(tmp_path, monkeypatch):
    import safetensors
    from safetensors.numpy import save_file

    class Watched:
        def __init__(self, *arguments, **options):
            self.file = opened(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    opened, read = safetensors.safe_open, []
    monkeypatch.setattr(safetensors, "safe_open", Watched)

    path = tmp_path / "model.safetensors"
    tensors = {f"{prefix}.{name}": array for prefix in ("encoder", "decoder") for name, array in TORCH.items()}
    save_file({**tensors, "embed.weight": np.zeros((7, 3), np.float32)}, path)
    same(interop.load_safetensors(lstm, path, prefix="decoder"), params)
    assert sorted(read) == sorted(f"decoder.{name}" for name in TORCH)
    with pytest.raises(ValueError, match=r"state_dict has 2 LSTMs, choose one of them: prefix='\w+\.', '\w+\.'"):
        interop.load_safetensors(lstm, path)


@needs("safetensors")
def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("somebody's")
    with pytest.raises(FileExistsError, match=r"weights\.safetensors exists; overwrite=True replaces it"):
        interop.save_safetensors(lstm, params, path)
    assert path.read_text() == "somebody's"
    interop.save_safetensors(lstm, params, path, overwrite=True)
    same(interop.load_safetensors(lstm, path), params)


@needs("safetensors")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "weights.safetensors"
    path.write_text("what was there")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="no space left"):
        interop.save_safetensors(lstm, params, path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "what was there"


@needs("safetensors")
@needs("torch")
def test_pytorch_reads_the_file(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path / "weights.safetensors"
    interop.save_safetensors(lstm, params, path)
    module = torch.nn.LSTM(3, 4)
    module.load_state_dict(load_file(path))
    same(interop.from_torch(lstm, module.state_dict()), params)
    save_file({f"lstm.{name}": tensor for name, tensor in module.state_dict().items()}, path)
    same(interop.load_safetensors(lstm, path), params)
