"""ONNX: a network as a model of ONNX's LSTM, GRU or RNN operators, and its parameters from such a model.

LSTM operators stack gates in the order i, o, f, c and peepholes in the order i, o, f; GRU operators stack gates in the
order z, r, h. They add two biases. A GRU operator must have ``linear_before_reset=1``: it applies the reset gate after
the product with ``R``.
``cell="cifg"`` is written with an input gate whose weights are minus the forget gate's, because ``1 - sigmoid(z) =
sigmoid(-z)``. The attribute `input_forget` of the operator is not used: the specification does not say which of the two
gates it replaces.

Source: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html, version 14 of each.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm import validation
from jaxlstm.errors import optional_package
from jaxlstm.interop import conversion
from jaxlstm.interop.conversion import (
    GATES,
    GRU_GATES,
    OptionValues,
    WeightFormat,
    add_biases,
    join_biases,
    position_name,
    reorder_gates,
    split_bias,
)
from jaxlstm.interop.onnx_graph import ONNX_DOMAINS, check_sequence_inputs, check_stack, read_graph
from jaxlstm.params import Params, Weights
from jaxlstm.rnn import RNN

OPSET, IR_VERSION = 17, 8  # of 2022: supported by every runtime in use, and with today's versions of the operators
# By position; GRU and RNN have six.
OPERATOR_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
WEIGHT_INPUTS = ("W", "R", "B", "P")

OperatorArrays = dict[str, np.ndarray]  # weights of one operator by input name, each (D, ...)


class Operator(NamedTuple):
    """The ONNX operator of a cell, and the orders in which it and `Weights` stack gates and peepholes."""

    op_type: str
    gates: str
    operator_gates: str
    peepholes: str = ""
    operator_peepholes: str = ""
    has_coupled_gates: bool = False  # `Weights` has no input gate; the operator's is 1 - f


OPERATORS = {
    "lstm": Operator("LSTM", GATES, "iofg"),
    "peephole": Operator("LSTM", GATES, "iofg", "ifo", "iof"),
    "cifg": Operator("LSTM", GATES, "iofg", has_coupled_gates=True),
    "gru": Operator("GRU", GRU_GATES, "urn"),
    "rnn": Operator("RNN", "h", "h"),
}
# Attributes that change neither the weights nor, with the supported activations, the equations.
WITHOUT_EFFECT = ("activation_alpha", "activation_beta", "layout")
# Of the operators, for one direction.
DEFAULT_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def to_onnx(lstm: RNN, params: Params, *, with_state: bool = False, with_lengths: bool = False) -> Any:
    """Returns an ONNX model that computes ``lstm(params, xs)`` without a key.

    =========  ==============  ===============  =====================================================
    name       kind            shape            notes
    =========  ==============  ===============  =====================================================
    xs         input           (T, B, I)        T and B are free
    lengths    input, int32    (B,)             if ``with_lengths``; each from 1 to T
    initial_h  input           (L*D, B, H)      if ``with_state``, else zeros
    initial_c  input           (L*D, B, H)      if ``with_state``, for a cell that has c
    ys         output          (T, B, D*H)
    h, c       outputs         (L*D, B, H)      final state; c for a cell that has it
    =========  ==============  ===============  =====================================================

    All arrays except ``lengths`` have the dtype of the parameters. ONNX Runtime supports float32 only, and returns
    zeros for a length of 0, where this library returns the initial state.

    Args:
      lstm: a network in float32 or float64 with options that the operator supports. Regularizers that need a key are
        left out.
      params: its parameters.
      with_state: whether the initial state is an input.
      with_lengths: whether the lengths are an input.

    Returns:
      An ``onnx.ModelProto``, for ``onnx.save`` or ``SerializeToString``.

    Raises:
      ValueError, TypeError: for an option that the operator does not support, or parameters of another configuration.
      ImportError: if onnx is not installed: ``pip install 'jaxlstm[onnx]'``.
    """
    onnx = _import_onnx("to_onnx")
    conversion.check_supported(lstm, ONNX)
    _check_arithmetic(lstm)
    with_state, with_lengths = validation.flag("with_state", with_state), validation.flag("with_lengths", with_lengths)
    helper = onnx.helper
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(lstm.param_dtype))
    state_names = _state_names(lstm)
    state_shape = [lstm.num_layers * lstm.num_directions, "B", lstm.hidden_size]
    inputs = {"xs": ["T", "B", lstm.input_size]} | {f"initial_{s}": state_shape for s in state_names if with_state}
    outputs = {"ys": ["T", "B", lstm.num_directions * lstm.hidden_size]} | dict.fromkeys(state_names, state_shape)
    nodes, constants = _nodes_and_constants(onnx, lstm, params, with_state=with_state, with_lengths=with_lengths)
    graph = helper.make_graph(
        nodes,
        "jaxlstm",
        [helper.make_tensor_value_info(name, elem_type, shape) for name, shape in inputs.items()]
        + [helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["B"])] * with_lengths,
        [helper.make_tensor_value_info(name, elem_type, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="jaxlstm")


def from_onnx(lstm: RNN, model: Any) -> Params:
    """Returns the parameters of the LSTM, GRU or RNN operators in an ONNX model.

    Operators before the first layer and after the last one are ignored; between two layers only the shape may change.
    Lengths and an initial state that come from inputs of the model are ignored too: they are arguments of a call.
    No file is read: external data must be loaded already, as ``onnx.load`` does.

    Args:
      lstm: the configuration of the model.
      model: an ``onnx.ModelProto`` from `to_onnx`, ``onnx.load`` or the exporter of another framework. Its operators
        are the layers, in the order of the graph; their weights must be constants of the graph. Constant lengths and
        a constant initial state other than zeros are refused.

    Returns:
      Parameters in ``param_dtype``. The two biases of the operators are added.

    Raises:
      ValueError, TypeError: for an option that the operator does not support; for an operator or an array that is
        missing, unexpected or of another configuration; for operators that are not layers of one stack; or if
        ``param_dtype`` cannot represent a dtype exactly.
      ImportError: if onnx is not installed: ``pip install 'jaxlstm[onnx]'``.
    """
    onnx = _import_onnx("from_onnx")
    conversion.check_supported(lstm, ONNX)
    op_type = OPERATORS[str(lstm.cell)].op_type
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto, got {validation.describe(model)}")
    nodes = [node for node in model.graph.node if node.op_type == op_type]
    for n, node in enumerate(nodes):
        if node.domain not in ONNX_DOMAINS:
            raise ValueError(f"{op_type} operator {n} is of the domain {node.domain!r}, expected the operator of ONNX")
    if len(nodes) != lstm.num_layers:
        raise ValueError(f"num_layers={lstm.num_layers}, but the model has {len(nodes)} {op_type} operators")
    graph = read_graph(onnx, model)
    operators = []
    for n, node in enumerate(nodes):
        label = f"{op_type} operator {n}"
        _check_attributes(lstm, label, graph.attributes(node))
        check_sequence_inputs(graph, label, node)
        arrays = {}
        for name, source in zip(OPERATOR_INPUTS, node.input):
            if name in WEIGHT_INPUTS and source:
                if source not in graph.constants:
                    raise ValueError(f"{label}: {name} is {source!r}, which is not a constant of the model")
                if source in graph.overridable:
                    raise ValueError(
                        f"{label}: {name} is {source!r}, which is also an input of the model; expected a constant"
                    )
                arrays[name] = graph.array(f"{label}: {name}", source)
        operators.append(arrays)
    check_stack(graph, nodes, lstm.num_directions, lstm.hidden_size)
    return params_from_operators(lstm, operators)


def operators_from_params(lstm: RNN, params: Params) -> list[OperatorArrays]:
    """Returns the weights W, R, B and P of the operator of each layer, in ``param_dtype``.

    Raises:
      ValueError, TypeError: for an option that the operator does not support, or parameters of another configuration.
    """
    arrays = conversion.arrays_from_params(lstm, ONNX, params, position_name)
    operators = []
    for n in range(lstm.num_layers):
        names = [name for name in WEIGHT_INPUTS if position_name(n, 0, name) in arrays]
        by_direction = {name: [arrays[position_name(n, d, name)] for d in range(lstm.num_directions)] for name in names}
        operators.append({name: np.stack(each).astype(lstm.param_dtype) for name, each in by_direction.items()})
    return operators


def params_from_operators(lstm: RNN, operators: Sequence[Mapping[str, np.ndarray]]) -> Params:
    """Returns parameters from the weights W, R, B and P of the operator of each layer.

    Raises:
      ValueError, TypeError: as `from_onnx`.
    """
    arrays = {}
    for n, operator_arrays in enumerate(operators):
        for name, array in operator_arrays.items():
            if array.shape[:1] != (lstm.num_directions,):
                received = validation.describe(array)
                raise ValueError(
                    f"ONNX weight '{name} of layer {n}' must have shape [{lstm.num_directions}, ...], got {received}"
                )
            arrays |= {position_name(n, d, name): array[d] for d in range(lstm.num_directions)}
    return conversion.params_from_arrays(lstm, ONNX, arrays, position_name)


def _import_onnx(purpose: str) -> Any:
    with optional_package("onnx", extra="onnx", purpose=purpose):
        return importlib.import_module("onnx")


def _to_operator_gates(operator: Operator, array: np.ndarray | Array) -> np.ndarray:
    if operator.has_coupled_gates:
        forget_gate = np.split(array, 3)[0]
        array = np.concatenate([-forget_gate, array])
    return reorder_gates(array, operator.gates, operator.operator_gates)


def _from_operator_gates(operator: Operator, array: np.ndarray) -> np.ndarray:
    array = reorder_gates(array, operator.operator_gates, operator.gates)
    if not operator.has_coupled_gates:
        return array
    input_gate, forget_gate, *_ = np.split(array, 4)
    if not np.array_equal(input_gate, -forget_gate):
        raise ValueError("cell='cifg' needs ONNX input gate weights equal to minus the forget gate weights")
    return array[len(input_gate) :]


def _to_arrays(lstm: RNN, weights: Weights) -> dict[str, Any]:
    operator = OPERATORS[str(lstm.cell)]
    arrays: dict[str, Any] = {
        "W": _to_operator_gates(operator, weights.w_x),
        "R": _to_operator_gates(operator, weights.w_h),
    }
    if weights.b is not None:
        biases = split_bias(lstm.resolved_cell, weights.b)
        arrays["B"] = np.concatenate([_to_operator_gates(operator, b) for b in biases])
    if weights.w_c is not None:
        arrays["P"] = reorder_gates(weights.w_c, operator.peepholes, operator.operator_peepholes).reshape(-1)
    return arrays


def _from_arrays(lstm: RNN, arrays: Mapping[str, Any]) -> dict[str, Any]:
    cell, operator = lstm.resolved_cell, OPERATORS[str(lstm.cell)]
    weights = {"w_x": _from_operator_gates(operator, arrays["W"]), "w_h": _from_operator_gates(operator, arrays["R"])}
    if "B" in arrays:
        b_x, b_h = np.split(arrays["B"], 2)
        if cell.reads_x_and_h:
            weights["b"] = _from_operator_gates(operator, add_biases(b_x, b_h))
        else:
            weights["b"] = join_biases(cell, *(_from_operator_gates(operator, b) for b in (b_x, b_h)))
    if "P" in arrays:
        peepholes = arrays["P"].reshape(len(operator.peepholes), -1)
        weights["w_c"] = reorder_gates(peepholes, operator.operator_peepholes, operator.peepholes)
    return weights


def _supported_options(lstm: RNN) -> OptionValues:
    return {"cell": tuple(OPERATORS), "use_bias": (True, False)}


ONNX = WeightFormat("ONNX", _to_arrays, _from_arrays, _supported_options)


def _check_arithmetic(lstm: RNN) -> None:
    """Checks the options that add no parameters but change the computation."""
    for name in ("zoneout_h", "zoneout_c"):
        if getattr(lstm, name):
            raise ValueError(f"ONNX does not support {name}={getattr(lstm, name)!r}, which acts without a key too")
    param_dtype = jnp.dtype(lstm.param_dtype)
    if param_dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"ONNX operators accumulate in param_dtype; expected float32 or float64, got {param_dtype}")
    if lstm.output_dtype != param_dtype:
        raise ValueError(
            f"ONNX operators have a single dtype, got dtype={lstm.output_dtype} and param_dtype={param_dtype}"
        )


def _attributes(lstm: RNN) -> dict[str, Any]:
    """Returns the attributes of the operator of one layer."""
    activations = DEFAULT_ACTIVATIONS[OPERATORS[str(lstm.cell)].op_type]
    if lstm.cell == "rnn":
        activations = [(lstm.activation or "tanh").capitalize()]
    attributes = {"linear_before_reset": 1} if lstm.cell == "gru" else {}
    return attributes | {
        "hidden_size": lstm.hidden_size,
        "direction": "bidirectional" if lstm.bidirectional else "forward",
        "activations": activations * lstm.num_directions,
    }


def _check_attributes(lstm: RNN, label: str, attributes: Mapping[str, Any]) -> None:
    """Checks that the attributes of an operator match the configuration."""
    op_type = OPERATORS[str(lstm.cell)].op_type
    expected = _attributes(lstm) | {"clip": None, "input_forget": 0}
    defaults = expected | {
        "direction": "forward",
        "activations": DEFAULT_ACTIVATIONS[op_type] * lstm.num_directions,
    }
    if "linear_before_reset" in expected:
        defaults["linear_before_reset"] = 0
    received = {name: _decode(value) for name, value in attributes.items()}
    if isinstance(received.get("activations"), list):
        received["activations"] = [str(name).capitalize() for name in received["activations"]]  # ONNX ignores case
    for name, value in (defaults | received).items():
        if name in expected and value != expected[name]:
            raise ValueError(f"{label}: {name} must be {expected[name]!r} for this configuration, got {value!r}")
        if name not in (*expected, *WITHOUT_EFFECT):
            raise ValueError(f"{label} has an unknown attribute {name!r}")


def _decode(value: Any) -> Any:
    """Returns an attribute with strings instead of bytes."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _state_names(lstm: RNN) -> tuple[str, ...]:
    return ("h", "c") if OPERATORS[str(lstm.cell)].op_type == "LSTM" else ("h",)


def _nodes_and_constants(
    onnx: Any, lstm: RNN, params: Params, *, with_state: bool, with_lengths: bool
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Returns the nodes of the graph, and its constants by name."""
    make_node, num_layers, state_names = onnx.helper.make_node, lstm.num_layers, _state_names(lstm)
    constants = {"output_shape": np.array([0, 0, lstm.num_directions * lstm.hidden_size])}  # 0 keeps an axis
    nodes = []
    if with_state:
        constants["directions_per_layer"] = np.full(num_layers, lstm.num_directions)
        for s in state_names:
            per_layer = [f"initial_{s}.{n}" for n in range(num_layers)]
            nodes.append(make_node("Split", [f"initial_{s}", "directions_per_layer"], per_layer, axis=0))
    layer_input = "xs"
    for n, arrays in enumerate(operators_from_params(lstm, params)):
        constants |= {f"{name}.{n}": array for name, array in arrays.items()}
        operator_inputs = {"X": layer_input} | {name: f"{name}.{n}" for name in arrays}
        if with_lengths:
            operator_inputs["sequence_lens"] = "lengths"
        if with_state:
            operator_inputs |= {f"initial_{s}": f"initial_{s}.{n}" for s in state_names}
        layer_output = "ys" if n == num_layers - 1 else f"ys.{n}"
        nodes += _layer_nodes(onnx, lstm, n, operator_inputs, layer_output)
        layer_input = layer_output
    nodes += [make_node("Concat", [f"{s}.{n}" for n in range(num_layers)], [s], axis=0) for s in state_names]
    return nodes, constants


def _layer_nodes(onnx: Any, lstm: RNN, layer: int, inputs: Mapping[str, str], output: str) -> list[Any]:
    """Returns the nodes of one layer: the operator, and the concatenation of its directions.

    Args:
      onnx: the package.
      lstm: the configuration.
      layer: index of the layer.
      inputs: names of the operator's inputs.
      output: name of the layer's output.
    """
    input_names = [inputs.get(name, "") for name in OPERATOR_INPUTS]  # an empty name marks an absent input
    while not input_names[-1]:
        input_names.pop()
    y, y_batch_major = f"Y.{layer}", f"Y.{layer}.swapped"
    final_state = [f"{s}.{layer}" for s in _state_names(lstm)]
    op_type = OPERATORS[str(lstm.cell)].op_type
    make_node = onnx.helper.make_node
    return [
        make_node(op_type, input_names, [y, *final_state], name=f"layer.{layer}", **_attributes(lstm)),
        make_node("Transpose", [y], [y_batch_major], perm=[0, 2, 1, 3]),  # (T, D, B, H) to (T, B, D, H)
        make_node("Reshape", [y_batch_major, "output_shape"], [output]),
    ]
