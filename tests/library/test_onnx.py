"""Parity with ONNX Runtime: from recorded vectors everywhere, and live where it is installed."""

import dataclasses
import importlib.util
import io
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import onnx_cases
import pytest
from cases import slow_but
from onnx_cases import random_params
from tolerance import tolerance

import jaxlstm
from jaxlstm.interop import from_onnx, to_onnx
from jaxlstm.interop import onnx as ours

RECORDED = np.load(onnx_cases.RECORDED)


def installed(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def some_params(lstm):
    return jax.tree.map(jnp.asarray, random_params(lstm, np.random.default_rng(0)))


def compare(lstm, params, arrays, outputs):
    """Our outputs against those of the operator."""
    state = jaxlstm.State(arrays["initial_h"], arrays.get("initial_c")) if "initial_h" in arrays else None
    ys, last = lstm(params, arrays["xs"], state, lengths=arrays.get("lengths"))
    wanted = outputs["ys"], jaxlstm.State(outputs["h"], outputs.get("c"))
    assert ys.shape == wanted[0].shape
    for a, b in zip(jax.tree.leaves((ys, last)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerance(np.float32, 100))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", onnx_cases.CASES)
def test_recorded(name):
    """The operator's arrays are read, and written again, where onnx is not installed too."""
    lstm, _ = onnx_cases.network(name)
    arrays = recorded(name)
    expected = jax.eval_shape(lstm.init, jax.random.key(0))
    layers = []
    for n, layer in enumerate(expected.layers):
        held = {key: arrays[f"{key}.{n}"] for key in "WRBP" if f"{key}.{n}" in arrays}
        layers.append(ours._from_operator(lstm, f"operator {n}", held, layer))
        again = ours._to_operator(lstm, layers[-1])
        for key in held:
            if key == "B":
                first, second = np.split(held[key], 2, axis=1)
                assert np.all(first)
                assert np.all(second)
                np.testing.assert_array_equal(again[key], np.concatenate([first + second, 0 * second], axis=1))
            else:
                np.testing.assert_array_equal(again[key], held[key])
        assert ("B" in held) == lstm.use_bias
    compare(lstm, jaxlstm.Params(tuple(layers)), arrays, arrays)


FAST = ("everything", "cifg", "rnn relu")
LIVE = slow_but(FAST, onnx_cases.CASES)


@installed("onnx", "onnxruntime")
@pytest.mark.parametrize("name", LIVE)
def test_live(name):
    import onnx

    lstm, given = onnx_cases.network(name)
    model = onnx_cases.random_model(name)
    foreign = from_onnx(lstm, model)  # two biases come in
    params = random_params(lstm, np.random.default_rng(7))
    written = to_onnx(lstm, params, **given)
    equal(from_onnx(lstm, written), jax.tree.map(jnp.asarray, params))
    for weights, each in ((foreign, model), (params, written)):
        onnx.checker.check_model(each, full_check=True)
        for steps, batch in ((1, 1), (7, 4)):  # both axes are free
            arrays = onnx_cases.inputs(name, steps, batch)
            compare(lstm, weights, arrays, onnx_cases.compute(each, arrays))
    for key, value in onnx_cases.compute(model, onnx_cases.inputs(name)).items():
        np.testing.assert_allclose(value, recorded(name)[key], **tolerance(np.float32, 100))


@installed("onnx")
def test_the_names_and_sizes_of_inputs_and_outputs():
    lstm, given = onnx_cases.network("everything")
    model = to_onnx(lstm, some_params(lstm), **given)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    state = [4, "B", 5]
    inputs = {"xs": ["T", "B", 4], "initial_h": state, "initial_c": state, "lengths": ["B"]}
    assert shapes(model.graph.input) == inputs
    assert shapes(model.graph.output) == {"ys": ["T", "B", 10], "h": state, "c": state}
    model = to_onnx(lstm, some_params(lstm))
    assert list(shapes(model.graph.input)) == ["xs"]


@installed("onnx")
def test_float64():
    import onnx

    lstm = jaxlstm.LSTM(3, 4, bidirectional=True, param_dtype="float64")
    params = some_params(lstm)
    model = to_onnx(lstm, params)
    onnx.checker.check_model(model, full_check=True)
    equal(from_onnx(lstm, model), params)
    narrow = jaxlstm.LSTM(3, 4, bidirectional=True)
    with pytest.raises(TypeError, match="operator 0: W is float64, which param_dtype=float32 does not hold exactly"):
        from_onnx(narrow, model)
    assert from_onnx(lstm, to_onnx(narrow, some_params(narrow))).layers[0].forward.b.dtype == "float64"


@pytest.mark.slow
@installed("onnx", "torch")
def test_a_model_that_torch_exported():
    import onnx
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LSTM(4, 5, num_layers=2, bidirectional=True))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(6, 2, 3),), file, dynamo=False)
    lstm = jaxlstm.LSTM(4, 5, num_layers=2, bidirectional=True)
    params = from_onnx(lstm, onnx.load_from_string(file.getvalue()))
    xs = torch.randn(6, 2, 4)
    ys, (h, c) = module[1](xs)
    outputs = {key: value.detach().numpy() for key, value in {"ys": ys, "h": h, "c": c}.items()}
    compare(lstm, params, {"xs": xs.numpy()}, outputs)


@installed("onnx")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_size": 2}, "ONNX has no place for proj_size=2"),
        ({"layer_norm": True}, "ONNX has no place for layer_norm=True"),
        ({"learned_state": True}, "ONNX has no place for learned_state=True"),
        ({"cell": jaxlstm.Cell(lambda z, c: (z[0] * c, z[0]), num_gates=1)}, "ONNX has no operator for a cell of your"),
    ],
)
def test_parameters_that_the_operator_cannot_hold_are_refused(options, message):
    import onnx

    lstm = jaxlstm.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match="^" + message):
        to_onnx(lstm, some_params(lstm))
    with pytest.raises(ValueError, match="^" + message):
        from_onnx(lstm, onnx.ModelProto())


@installed("onnx")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoneout_c": 0.5}, "ONNX has no place for zoneout_c=0.5, which acts without a key too"),
        ({"zoneout_h": 0.5, "cell": "rnn"}, "ONNX has no place for zoneout_h=0.5"),
        (
            {"param_dtype": "bfloat16"},
            "param_dtype=bfloat16: ONNX's operators sum in it, which takes float32 or float64",
        ),
        ({"dtype": "bfloat16"}, "dtype=bfloat16, param_dtype=float32: ONNX's operators have one dtype"),
    ],
)
def test_what_the_operator_cannot_compute_is_refused_on_the_way_out_alone(options, message):
    lstm = jaxlstm.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match="^" + message):
        to_onnx(lstm, some_params(lstm))
    plain = dataclasses.replace(lstm, zoneout_h=0.0, zoneout_c=0.0, dtype=None, param_dtype="float32")
    wide = dataclasses.replace(lstm, param_dtype="float32")
    equal(from_onnx(wide, to_onnx(plain, some_params(plain))), some_params(plain))


@installed("onnx")
def test_regularisers_that_need_a_key_are_no_obstacle():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, dropout=0.5, weight_drop=0.5, recurrent_dropout=0.5)
    params = some_params(lstm)
    equal(from_onnx(lstm, to_onnx(lstm, params)), params)


@installed("onnx")
def test_a_model_of_another_configuration_is_refused():
    import onnx

    lstm = jaxlstm.LSTM(3, 4, num_layers=2)
    model = to_onnx(lstm, some_params(lstm))

    def other(**options):
        return jaxlstm.LSTM(**{"input_size": 3, "hidden_size": 4, "num_layers": 2} | options)

    def refused(message, lstm=lstm, model=model, error=ValueError):
        with pytest.raises(error, match=message):
            from_onnx(lstm, model)

    refused("num_layers=1, but the model has 2 LSTM operators", other(num_layers=1))
    refused("num_layers=2, but the model has 0 RNN operators", other(cell="rnn"))
    refused(r"LSTM operator 0: W must have shape \[1, 16, 5\], got \[1, 16, 3\]", other(input_size=5))
    refused("direction must be 'bidirectional' for this configuration, got 'forward'", other(bidirectional=True))
    refused(r"B has no place in this configuration, got float32\[1, 32\]", other(use_bias=False))
    refused(r"P is missing; expected shape \[1, 12\]", other(cell="peephole"))
    refused("cell='cifg' needs an input gate whose weights are minus the forget gate's", other(cell="cifg"))
    refused("model must be an onnx.ModelProto, got str 'model.onnx'", model="model.onnx", error=TypeError)

    def changed(**attributes):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        node = next(node for node in copy.graph.node if node.op_type == "LSTM")
        node.attribute.extend(onnx.helper.make_attribute(*each) for each in attributes.items())
        return copy

    refused("LSTM operator 0: clip must be None for this configuration, got 3.0", model=changed(clip=3.0))
    refused("input_forget must be 0 for this configuration, got 1", model=changed(input_forget=1))
    missing = changed()
    del missing.graph.initializer[:]
    refused("LSTM operator 0: W is 'W.0', which is no constant of the model", model=missing)
    hard = changed()
    node = next(node for node in hard.graph.node if node.op_type == "LSTM")
    attribute = next(a for a in node.attribute if a.name == "activations")
    attribute.strings[1] = b"relu"
    refused("activations must be .*, got .'Sigmoid', 'Relu', 'Tanh'.", model=hard)


@installed("onnx")
def test_parameters_of_another_configuration_are_refused():
    lstm = jaxlstm.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"params.layers\[0\].forward.w_x must have shape"):
        to_onnx(lstm, some_params(jaxlstm.LSTM(2, 4)))


def test_without_onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    lstm = jaxlstm.LSTM(3, 4)
    with pytest.raises(ImportError, match=r"pip install 'jaxlstm\[onnx\]'"):
        to_onnx(lstm, some_params(lstm))
    with pytest.raises(ImportError, match=r"pip install 'jaxlstm\[onnx\]'"):
        from_onnx(lstm, None)
