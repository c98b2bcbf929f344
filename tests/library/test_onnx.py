"""Parity with ONNX Runtime: from recorded vectors, and live where it is installed."""

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
from tolerance import tolerance

import jaxlstm
from jaxlstm.interop import from_onnx, to_onnx
from jaxlstm.interop.onnx import operators_from_params, params_from_operators

RECORDED = np.load(onnx_cases.RECORDED)
# Live cases of the default tier: all inputs, the coupled gates, the GRU operator and the RNN operator.
DEFAULT_LIVE_CASES = ("everything", "cifg", "gru", "rnn relu")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def load_recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def random_params(lstm):
    return onnx_cases.random_params(lstm, np.random.default_rng(0))


def assert_outputs_match(lstm, params, arrays, expected):
    """Asserts that our outputs for the inputs in ``arrays`` equal the outputs of the model."""
    state = jaxlstm.State(arrays["initial_h"], arrays.get("initial_c")) if "initial_h" in arrays else None
    ys, new_state = lstm(params, arrays["xs"], state, lengths=arrays.get("lengths"))
    assert ys.shape == expected["ys"].shape
    expected_outputs = expected["ys"], jaxlstm.State(expected["h"], expected.get("c"))
    for a, b in zip(jax.tree.leaves((ys, new_state)), jax.tree.leaves(expected_outputs), strict=True):
        np.testing.assert_allclose(a, b, **tolerance(np.float32, 100))


def assert_params_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", onnx_cases.CASES)
def test_operator_weights_match_recorded_runtime(name):
    """The conversion of operator weights runs without onnx."""
    lstm, _ = onnx_cases.network(name)
    arrays = load_recorded(name)
    operators = [
        {key: arrays[f"{key}.{n}"] for key in "WRBP" if f"{key}.{n}" in arrays} for n in range(lstm.num_layers)
    ]
    params = params_from_operators(lstm, operators)
    for written, recorded in zip(operators_from_params(lstm, params), operators, strict=True):
        assert ("B" in recorded) == lstm.use_bias
        assert list(written) == list(recorded)
        for key, array in recorded.items():
            expected = array
            if key == "B":
                first, second = np.split(array, 2, axis=1)
                assert np.all(first)
                assert np.all(second)
                summed = 2 * lstm.hidden_size if lstm.cell == "gru" else None  # not the two biases of the candidate
                expected = np.concatenate([first, 0 * second], axis=1)
                expected[:, :summed][:, : first.shape[1]] += second[:, :summed]
                if summed:
                    expected[:, first.shape[1] + summed :] = second[:, summed:]
            np.testing.assert_array_equal(written[key], expected)
    assert_outputs_match(lstm, params, arrays, arrays)


@needs("onnx", "onnxruntime")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DEFAULT_LIVE_CASES else [pytest.mark.slow]) for n in onnx_cases.CASES]
)
def test_models_match_installed_runtime(name):
    import onnx

    lstm, model_options = onnx_cases.network(name)
    model_with_two_biases = onnx_cases.random_model(name)
    params = onnx_cases.random_params(lstm, np.random.default_rng(7))
    model = to_onnx(lstm, params, **model_options)
    assert_params_equal(from_onnx(lstm, model), jax.tree.map(jnp.asarray, params))
    for own_params, each in ((from_onnx(lstm, model_with_two_biases), model_with_two_biases), (params, model)):
        onnx.checker.check_model(each, full_check=True)
        for steps, batch in ((1, 1), (onnx_cases.STEPS, onnx_cases.BATCH)):  # both axes are free
            arrays = onnx_cases.inputs(name, steps, batch)
            assert_outputs_match(lstm, own_params, arrays, onnx_cases.compute(each, arrays))
    recorded = load_recorded(name)
    for key, value in onnx_cases.compute(model_with_two_biases, onnx_cases.inputs(name)).items():
        np.testing.assert_allclose(value, recorded[key], **tolerance(np.float32, 100))


@needs("onnx")
def test_to_onnx_declares_inputs_and_outputs():
    lstm, model_options = onnx_cases.network("everything")
    model = to_onnx(lstm, random_params(lstm), **model_options)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    state = [4, "B", 5]
    inputs = {"xs": ["T", "B", 4], "initial_h": state, "initial_c": state, "lengths": ["B"]}
    assert shapes(model.graph.input) == inputs
    assert shapes(model.graph.output) == {"ys": ["T", "B", 10], "h": state, "c": state}
    model = to_onnx(lstm, random_params(lstm))
    assert list(shapes(model.graph.input)) == ["xs"]


@needs("onnx")
def test_float64_model_round_trips_and_float32_rejects_it():
    import onnx

    lstm = jaxlstm.LSTM(3, 4, bidirectional=True, param_dtype="float64")
    params = random_params(lstm)
    model = to_onnx(lstm, params)
    onnx.checker.check_model(model, full_check=True)
    assert_params_equal(from_onnx(lstm, model), params)
    narrow = jaxlstm.LSTM(3, 4, bidirectional=True)
    message = "'W of layer 0, forward' is float64, which param_dtype=float32 cannot represent exactly"
    with pytest.raises(TypeError, match=message):
        from_onnx(narrow, model)
    assert from_onnx(lstm, to_onnx(narrow, random_params(narrow))).layers[0].forward.b.dtype == "float64"


@pytest.mark.slow
@needs("onnx", "torch")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_from_onnx_reads_model_exported_by_torch(cell):
    import onnx
    import torch

    torch.manual_seed(0)
    module_class = torch.nn.GRU if cell == "gru" else torch.nn.LSTM
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), module_class(4, 5, num_layers=2, bidirectional=True))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(6, 2, 3),), file, dynamo=False)
    lstm = jaxlstm.LSTM(4, 5, num_layers=2, bidirectional=True, cell=cell)
    params = from_onnx(lstm, onnx.load_from_string(file.getvalue()))
    xs = torch.randn(6, 2, 4)
    ys, state = module[1](xs)
    results = {"ys": ys, "h": state} if cell == "gru" else {"ys": ys, "h": state[0], "c": state[1]}
    expected = {key: value.detach().numpy() for key, value in results.items()}
    assert_outputs_match(lstm, params, {"xs": xs.numpy()}, expected)


@needs("onnx")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_size": 2}, "ONNX weights do not support proj_size=2"),
        ({"layer_norm": True}, "ONNX weights do not support layer_norm=True"),
        ({"learned_state": True}, "ONNX weights do not support learned_state=True"),
    ],
)
def test_onnx_rejects_unsupported_options(options, message):
    import onnx

    lstm = jaxlstm.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match="^" + message):
        to_onnx(lstm, random_params(lstm))
    with pytest.raises(ValueError, match="^" + message):
        from_onnx(lstm, onnx.ModelProto())


@needs("onnx")
def test_onnx_rejects_user_defined_cell():
    lstm = jaxlstm.LSTM(3, 4, cell=jaxlstm.LSTM(3, 4).resolved_cell)
    with pytest.raises(ValueError, match=r"^ONNX weights do not support cell=Cell\("):
        to_onnx(lstm, random_params(lstm))


@needs("onnx")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoneout_c": 0.5}, "ONNX does not support zoneout_c=0.5, which acts without a key too"),
        ({"zoneout_h": 0.5, "cell": "rnn"}, "ONNX does not support zoneout_h=0.5"),
        (
            {"param_dtype": "bfloat16"},
            "ONNX operators accumulate in param_dtype; expected float32 or float64, got bfloat16",
        ),
        ({"dtype": "bfloat16"}, "ONNX operators have a single dtype, got dtype=bfloat16 and param_dtype=float32"),
    ],
)
def test_to_onnx_rejects_unsupported_arithmetic_that_from_onnx_accepts(options, message):
    lstm = jaxlstm.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match="^" + message):
        to_onnx(lstm, random_params(lstm))
    supported = dataclasses.replace(lstm, zoneout_h=0.0, zoneout_c=0.0, dtype=None, param_dtype="float32")
    params = random_params(supported)
    lstm = dataclasses.replace(lstm, param_dtype="float32")
    assert_params_equal(from_onnx(lstm, to_onnx(supported, params)), params)


@needs("onnx")
def test_onnx_ignores_regularizers_that_need_a_key():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, dropout=0.5, weight_drop=0.5, recurrent_dropout=0.5)
    params = random_params(lstm)
    assert_params_equal(from_onnx(lstm, to_onnx(lstm, params)), params)


def network(**options):
    return jaxlstm.LSTM(**{"input_size": 3, "hidden_size": 4, "num_layers": 2} | options)


@needs("onnx")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 1}, "num_layers=1, but the model has 2 LSTM operators"),
        ({"cell": "rnn"}, "num_layers=2, but the model has 0 RNN operators"),
        ({"cell": "gru"}, "num_layers=2, but the model has 0 GRU operators"),
        ({"input_size": 5}, r"ONNX weight 'W of layer 0, forward' must have shape \[16, 5\], got \[16, 3\]"),
        ({"bidirectional": True}, "direction must be 'bidirectional' for this configuration, got 'forward'"),
        ({"use_bias": False}, r"'B of layer 0, forward' is not part of this network, got float32\[32\]"),
        ({"cell": "peephole"}, r"'P of layer 0, forward' of shape \[12\] is missing"),
        ({"cell": "cifg"}, "cell='cifg' needs ONNX input gate weights equal to minus the forget gate weights"),
    ],
)
def test_from_onnx_rejects_model_of_another_configuration(options, message):
    lstm = network()
    with pytest.raises(ValueError, match=message):
        from_onnx(network(**options), to_onnx(lstm, random_params(lstm)))


@needs("onnx")
def test_from_onnx_rejects_unsupported_models():
    import onnx

    lstm = network()
    model = to_onnx(lstm, random_params(lstm))

    def modified_model(**attributes):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        node = next(node for node in copy.graph.node if node.op_type == "LSTM")
        node.attribute.extend(onnx.helper.make_attribute(*each) for each in attributes.items())
        return copy

    def assert_rejected(model, message, error=ValueError):
        with pytest.raises(error, match=message):
            from_onnx(lstm, model)

    assert_rejected("model.onnx", "model must be an onnx.ModelProto, got str 'model.onnx'", TypeError)
    assert_rejected(modified_model(clip=3.0), "LSTM operator 0: clip must be None for this configuration, got 3.0")
    assert_rejected(modified_model(input_forget=1), "input_forget must be 0 for this configuration, got 1")
    without_constants = modified_model()
    del without_constants.graph.initializer[:]
    assert_rejected(without_constants, "LSTM operator 0: W is 'W.0', which is not a constant of the model")
    other_activation = modified_model()
    node = next(node for node in other_activation.graph.node if node.op_type == "LSTM")
    attribute = next(a for a in node.attribute if a.name == "activations")
    attribute.strings[1] = b"relu"
    assert_rejected(other_activation, "activations must be .*, got .'Sigmoid', 'Relu', 'Tanh'.")


@needs("onnx")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("linear_before_reset", 0, "linear_before_reset must be 1 for this configuration, got 0"),
        ("linear_before_reset", None, "linear_before_reset must be 1 for this configuration, got 0"),
        (
            "activations",
            ["Sigmoid", "Relu"],
            r"activations must be \['Sigmoid', 'Tanh'\] for this configuration, got .*",
        ),
    ],
)
def test_from_onnx_rejects_other_equations_of_a_gru(name, value, message):
    import onnx

    lstm = network(cell="gru")
    model = to_onnx(lstm, random_params(lstm))
    node = next(node for node in model.graph.node if node.op_type == "GRU")
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, *([] if value is None else [onnx.helper.make_attribute(name, value)])])
    with pytest.raises(ValueError, match=f"^GRU operator 0: {message}$"):
        from_onnx(lstm, model)


def stack(**options):
    """Returns a configuration whose layers all have inputs of the same size, its parameters and its model."""
    lstm = jaxlstm.LSTM(**{"input_size": 4, "hidden_size": 4, "num_layers": 2} | options)
    params = random_params(lstm)
    return lstm, params, to_onnx(lstm, params)


def operators(model):
    return [node for node in model.graph.node if node.op_type == "LSTM"]


def read_hidden_state(model):
    operators(model)[1].input[0] = operators(model)[0].output[1]


def insert_relu(model):
    second = operators(model)[1]
    relu = model.graph.node.add()
    relu.op_type = "Relu"
    relu.input.append(second.input[0])
    relu.output.append("positive")
    second.input[0] = "positive"


def make_cycle(model):
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
    reshape.input[0] = reshape.output[0]


@needs("onnx")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: operators(model)[1].input.__setitem__(0, "xs"), "got 'xs', not from an operator"),
        (read_hidden_state, "got 'h.0', from LSTM"),
        (insert_relu, "got 'positive', from Relu"),
        (make_cycle, "got 'ys.0', from Reshape"),
        (lambda model: operators(model)[1].ClearField("input"), "got '', not from an operator"),
    ],
)
def test_from_onnx_rejects_operators_that_are_not_a_stack(change, message):
    lstm, _, model = stack()
    change(model)
    with pytest.raises(ValueError, match=f"^LSTM operator 1: X must be Y of LSTM operator 0, the layer.*{message}$"):
        from_onnx(lstm, model)


@needs("onnx")
def test_from_onnx_accepts_other_shape_operators_between_layers():
    lstm, params, model = stack(num_layers=3)
    for node in operators(model)[1:]:
        dropout = model.graph.node.add()
        dropout.op_type = "Dropout"
        dropout.input.append(node.input[0])
        dropout.output.append(f"{node.name}.dropped")
        node.input[0] = dropout.output[0]
    assert_params_equal(from_onnx(lstm, model), params)


def set_input(node, position, name):
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name


def add_constant(model, name, values):
    import onnx

    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))


def add_state(model, operator, **attributes):
    """Makes an operator's output the initial h of the first layer."""
    import onnx

    inputs = attributes.pop("inputs")
    model.graph.node.insert(0, onnx.helper.make_node(operator, inputs, ["start"], **attributes))
    set_input(operators(model)[0], 5, "start")


def set_constant_state(model, name="initial_h", value=0.5):
    add_constant(model, "start", np.full((1, 2, 4), value, np.float32))
    set_input(operators(model)[0], 5 if name == "initial_h" else 6, "start")


def set_constant_lengths(model):
    add_constant(model, "two", np.array([2, 3], np.int32))
    set_input(operators(model)[1], 4, "two")


def set_expanded_state(model, value=0.5):
    add_constant(model, "size", [1, 2, 4])
    add_constant(model, "number", np.float32(value))
    add_state(model, "Expand", inputs=["number", "size"])


def set_state_of_shape(model, value=0.5):
    import onnx

    add_constant(model, "size", [1, 2, 4])
    tensor = onnx.numpy_helper.from_array(np.array([value], np.float32))
    add_state(model, "ConstantOfShape", inputs=["size"], value=tensor)


def set_state_of_floats(model):
    add_state(model, "Constant", inputs=[], value_floats=[0.5, 0.0])


@needs("onnx")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_constant_state, "0: initial_h must be absent, zeros or from an input of the model, .* 'start'"),
        (lambda model: set_constant_state(model, "initial_c"), "0: initial_c must be absent, zeros or .* 'start'"),
        (set_expanded_state, "0: initial_h must be .* 'number'"),
        (set_state_of_shape, "0: initial_h must be .* 'start'"),
        (set_state_of_floats, "0: initial_h must be .* 'start'"),
        (set_constant_lengths, "1: sequence_lens must be absent or from an input of the model, .* 'two'"),
    ],
)
def test_from_onnx_rejects_constant_lengths_and_states(change, message):
    lstm, _, model = stack()
    change(model)
    with pytest.raises(ValueError, match=f"^LSTM operator {message}$") as error:
        from_onnx(lstm, model)
    assert "\n" not in str(error.value)


@needs("onnx")
@pytest.mark.parametrize("set_state", [set_constant_state, set_expanded_state, set_state_of_shape])
def test_from_onnx_accepts_state_of_zeros(set_state):
    lstm, params, model = stack()
    set_state(model, value=0.0)
    assert_params_equal(from_onnx(lstm, model), params)


@needs("onnx")
def test_from_onnx_rejects_names_defined_twice():
    lstm, params, model = stack()
    add_constant(model, "W.0", np.zeros((1, 16, 4), np.float32))
    with pytest.raises(ValueError, match=r"^the model defines 'W\.0' more than once, expected one initializer or"):
        from_onnx(lstm, model)
    del model.graph.initializer[-1]
    assert_params_equal(from_onnx(lstm, model), params)


@needs("onnx")
def test_from_onnx_rejects_weights_that_an_input_replaces():
    import onnx

    lstm, params, model = stack()
    model.graph.input.append(onnx.helper.make_tensor_value_info("R.1", onnx.TensorProto.FLOAT, [1, 16, 4]))
    message = "^LSTM operator 1: R is 'R.1', which is also an input of the model; expected a constant$"
    with pytest.raises(ValueError, match=message):
        from_onnx(lstm, model)
    model.ir_version = 3  # in which all initializers are inputs
    assert_params_equal(from_onnx(lstm, model), params)


def insert_before_second_operator(model, op_type, inputs=(), **attributes):
    import onnx

    second = operators(model)[1]
    output = f"{op_type}.{len(model.graph.node)}"
    position = list(model.graph.node).index(second)
    node = onnx.helper.make_node(op_type, [second.input[0], *inputs], [output], **attributes)
    second.input[0] = output
    model.graph.node.insert(position, node)


def set_shape(model, shape):
    constant = next(tensor for tensor in model.graph.initializer if tensor.name == "output_shape")
    model.graph.initializer.remove(constant)
    add_constant(model, "output_shape", shape)


def fix_sizes(model, *sizes):
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes):
        dim.dim_value = size


def swap_axes(model):
    insert_before_second_operator(model, "Transpose", perm=[1, 0, 2])


def swap_fixed_sizes(model):
    fix_sizes(model, 2, 6)
    set_shape(model, [6, 2, 4])


def replace_transpose(model, perm):
    import onnx

    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("perm", perm))


@needs("onnx")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_axes, r"with axes \[T, B, H\], got \[B, T, H\] after Transpose, Reshape, Transpose"),
        (lambda model: set_shape(model, [0, 0, 1, 4]), r"Reshape with shape \[0, 0, 1, 4\] is not supported for axes"),
        (lambda model: set_shape(model, [0, -1, 2]), r"Reshape with shape \[0, -1, 2\] is not supported for axes"),
        (lambda model: set_shape(model, [0, -1, -1]), r"Reshape with shape \[0, -1, -1\] is not supported for axes"),
        (swap_fixed_sizes, r"Reshape with shape \[6, 2, 4\] is not supported for axes \[T, B, 1, H\]"),
        (lambda model: replace_transpose(model, [2, 1, 0, 3]), r"not supported for axes \[B, 1, T, H\]"),
        (lambda model: replace_transpose(model, [0, 3, 1, 2]), r"not supported for axes \[T, H, 1, B\]"),
        (lambda model: replace_transpose(model, [0, 1]), r"Transpose with perm \[0, 1\] is not supported"),
    ],
)
def test_from_onnx_rejects_other_axes_between_layers(change, message):
    lstm, _, model = stack()
    change(model)
    with pytest.raises(ValueError, match=f"^LSTM operator 1: X must be Y of .*{message}") as error:
        from_onnx(lstm, model)
    assert "\n" not in str(error.value)


@needs("onnx")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_shape(model, [-1, 0, 4]),
        lambda model: set_shape(model, [6, 2, -1]),
        lambda model: insert_before_second_operator(model, "Squeeze"),
    ],
)
def test_from_onnx_accepts_other_ways_to_the_same_axes(change):
    lstm, params, model = stack()
    change(model)
    assert_params_equal(from_onnx(lstm, model), params)


@needs("onnx")
def test_from_onnx_accepts_batch_major_layers():
    import onnx

    lstm, params, model = stack(bidirectional=True, hidden_size=2)
    swap_axes(model)
    operators(model)[1].attribute.append(onnx.helper.make_attribute("layout", 1))
    assert_params_equal(from_onnx(lstm, model), params)
    add_constant(model, "axes", [1])
    insert_before_second_operator(model, "Unsqueeze", ["axes"])
    with pytest.raises(ValueError, match=r"with axes \[B, T, DH\], got \[B, 1, T, DH\] after .*, Unsqueeze$"):
        from_onnx(lstm, model)
    insert_before_second_operator(model, "Squeeze", ["axes"])
    assert_params_equal(from_onnx(lstm, model), params)
    insert_before_second_operator(model, "Squeeze", ["axes"])
    with pytest.raises(ValueError, match=r"Squeeze with axes \[1\] is not supported for axes \[B, T, DH\]$"):
        from_onnx(lstm, model)


@needs("onnx")
def test_from_onnx_rejects_operators_of_another_domain():
    lstm, params, model = stack()
    operators(model)[1].domain = "com.example"
    message = "^LSTM operator 1 is of the domain 'com.example', expected the operator of ONNX$"
    with pytest.raises(ValueError, match=message):
        from_onnx(lstm, model)
    operators(model)[1].domain = "ai.onnx"
    assert_params_equal(from_onnx(lstm, model), params)


@needs("onnx")
def test_from_onnx_never_reads_external_data(tmp_path, monkeypatch):
    import onnx

    lstm, params, model = stack()
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert_params_equal(from_onnx(lstm, onnx.load(path)), params)
    monkeypatch.chdir(tmp_path)  # onnx would find the file there
    message = r"^LSTM operator 0: W is in the external file 'weights.bin', which is not loaded; onnx.load\(path\) loads"
    with pytest.raises(ValueError, match=message):
        from_onnx(lstm, onnx.load(path, load_external_data=False))


def set_dtype(tensor):
    tensor.data_type = 99


@needs("onnx")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: setattr(tensor, "raw_data", b"123"), "buffer size must be a multiple of element size"),
        (lambda tensor: tensor.ClearField("raw_data"), "cannot reshape array of size 0"),
        (lambda tensor: tensor.ClearField("dims"), "cannot reshape array of size 64"),
        (lambda tensor: tensor.dims.__setitem__(0, -1), r"its shape is \[-1, 16, 4\]"),
        (lambda tensor: tensor.dims.__setitem__(0, 2**60), "cannot reshape|array is too big|Maximum allowed"),
        (set_dtype, "KeyError: 99"),
    ],
)
def test_from_onnx_rejects_damaged_tensors_in_one_line(change, message):
    lstm, _, model = stack()
    change(next(tensor for tensor in model.graph.initializer if tensor.name == "W.0"))
    with pytest.raises(ValueError, match=f"^LSTM operator 0: W is not a valid tensor: .*({message})") as error:
        from_onnx(lstm, model)
    assert "\n" not in str(error.value)


@needs("onnx")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 7, "hidden_size must be 4 for this configuration, got 7"),
        ("direction", b"\xff", "direction must be 'forward' for this configuration, got "),
        ("direction", 3, "direction must be 'forward' for this configuration, got 3"),
        ("activations", 3, r"activations must be \['Sigmoid', 'Tanh', 'Tanh'\] for this configuration, got 3"),
        ("speed", 3, "LSTM operator 0 has an unknown attribute 'speed'"),
    ],
)
def test_from_onnx_rejects_other_attributes(name, value, message):
    import onnx

    lstm, _, model = stack()
    attributes = operators(model)[0].attribute
    kept = [attribute for attribute in attributes if attribute.name != name]
    del attributes[:]
    attributes.extend([*kept, onnx.helper.make_attribute(name, value)])
    with pytest.raises(ValueError, match=message):
        from_onnx(lstm, model)


@needs("onnx")
def test_onnx_rejects_other_networks_and_flags_that_are_not_bools():
    conv = jaxlstm.ConvLSTM(3, 4, (5,))
    lstm, params, model = stack()
    for other, name in ((conv, "ConvLSTM"), (None, "NoneType")):
        for convert, value in ((to_onnx, params), (from_onnx, model)):
            with pytest.raises(TypeError, match=f"^lstm must be a jaxlstm.LSTM, got {name}$"):
                convert(other, value)
    for flag in ("with_state", "with_lengths"):
        for value in ("yes", 1, None):
            with pytest.raises(TypeError, match=f"^{flag} must be True or False, got {value!r}$"):
                to_onnx(lstm, params, **{flag: value})


def test_params_from_operators_rejects_wrong_number_of_directions():
    lstm = jaxlstm.LSTM(3, 4)
    (arrays,) = operators_from_params(lstm, random_params(lstm))
    arrays["W"] = np.concatenate([arrays["W"], arrays["W"]])
    with pytest.raises(ValueError, match=r"'W of layer 0' must have shape \[1, \.\.\.\], got float32\[2, 16, 3\]"):
        params_from_operators(lstm, [arrays])


@needs("onnx")
def test_to_onnx_rejects_params_of_another_configuration():
    lstm = jaxlstm.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"params.layers\[0\].forward.w_x must have shape"):
        to_onnx(lstm, random_params(jaxlstm.LSTM(2, 4)))


def test_onnx_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    lstm = jaxlstm.LSTM(3, 4)
    for convert, value in ((to_onnx, random_params(lstm)), (from_onnx, None)):
        message = rf"^{convert.__name__} needs onnx, which is not installed: pip install 'jaxlstm\[onnx\]'$"
        with pytest.raises(ImportError, match=message):
            convert(lstm, value)
