"""A network as an ONNX model and back, by ONNX's own operators LSTM and RNN.

The operators stack gates in the order i, o, f, c and peepholes in the order i, o, f, and add two biases. The coupled
gates of ``cell="cifg"`` go as an input gate whose weights are minus the forget gate's, since ``1 - sigmoid(z) =
sigmoid(-z)``. The operator's own ``input_forget`` is not used: its text leaves open which of the two gates gives way.

Source: https://onnx.ai/onnx/operators/onnx__LSTM.html and onnx__RNN.html, version 14 of both.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm import validation
from jaxlstm.lstm import LSTM
from jaxlstm.params import Layer, Params, Weights, output_dtype

OPSET, IR_VERSION = 17, 8  # of 2022: old enough for every runtime in use, and with the operators as they are today
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")  # of both operators; RNN ends earlier


class Operator(NamedTuple):
    """How one operator holds a cell: which of our slabs stand in its order."""

    name: str
    activations: tuple[str, ...]
    slabs: tuple[int, ...]  # ours, in its order
    peepholes: tuple[int, ...] = ()


OPERATORS = {
    "lstm": Operator("LSTM", ("Sigmoid", "Tanh", "Tanh"), (0, 3, 1, 2)),
    "peephole": Operator("LSTM", ("Sigmoid", "Tanh", "Tanh"), (0, 3, 1, 2), (0, 2, 1)),
    "cifg": Operator("LSTM", ("Sigmoid", "Tanh", "Tanh"), (0, 3, 1, 2)),  # once its input gate is written out
    "rnn": Operator("RNN", (), (0,)),
}


def to_onnx(lstm: LSTM, params: Params, *, with_state: bool = False, with_lengths: bool = False) -> Any:
    """The network as an ONNX model: what ``lstm(params, xs)`` computes without a key.

    =========  ==============  ===============  =====================================================
    name       is              shape            notes
    =========  ==============  ===============  =====================================================
    xs         input           (T, B, I)        T and B are free
    lengths    input, int32    (B,)             with ``with_lengths``, each from 1 to T
    initial_h  input           (L*D, B, H)      with ``with_state``, else zeros
    initial_c  input           (L*D, B, H)      the same, for a cell that has c
    ys         output          (T, B, D*H)
    h, c       outputs         (L*D, B, H)      the final state; c for a cell that has it
    =========  ==============  ===============  =====================================================

    Everything has the dtype of the parameters. ONNX Runtime computes in float32 only, and returns zeros after a length
    of 0, where ours returns the initial state.

    Args:
      lstm: a network whose options the operator has a place for, in float32 or float64. Regularisers that only a key
        turns on are left out.
      params: its parameters.
      with_state: whether the initial state is an input.
      with_lengths: whether the lengths are an input.

    Returns:
      an ``onnx.ModelProto``, for ``onnx.save`` or ``SerializeToString``. Needs onnx: ``pip install 'jaxlstm[onnx]'``.

    Raises:
      ValueError, TypeError: for an option that the operator cannot hold, or parameters of another configuration.
      ImportError: where onnx is not installed.
    """
    onnx = _package()
    operator = _operator(lstm)
    _check_arithmetic(lstm)
    validation.params(params, _expected(lstm), jnp.dtype(lstm.param_dtype))
    make, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(lstm.param_dtype))
    rows, width = lstm.num_layers * lstm.num_directions, lstm.num_directions * lstm.hidden_size
    states = ("h", "c") if operator.name == "LSTM" else ("h",)
    outputs = {"ys": ["T", "B", width]} | {state: [rows, "B", lstm.hidden_size] for state in states}
    inputs = {"xs": ["T", "B", lstm.input_size]}
    if with_state:
        inputs |= {f"initial_{state}": outputs[state] for state in states}
    initial = {state: [f"initial_{state}.{n}" for n in range(lstm.num_layers)] for state in states}
    arrays = {"width": np.array([0, 0, width])}  # 0 for a size that stays
    nodes = []
    if with_state:
        arrays["directions"] = np.full(lstm.num_layers, lstm.num_directions)
        nodes = [make.make_node("Split", [f"initial_{s}", "directions"], initial[s], axis=0) for s in states]
    ys = "xs"
    for n, layer in enumerate(params.layers):
        weights = _to_operator(lstm, layer)
        arrays |= {f"{name}.{n}": array for name, array in weights.items()}
        given = {"X": ys, "sequence_lens": "lengths" if with_lengths else ""} | {a: f"{a}.{n}" for a in weights}
        if with_state:
            given |= {f"initial_{s}": initial[s][n] for s in states}
        last = [f"Y.{n}", *(f"{s}.{n}" for s in states)]
        ys = "ys" if n == lstm.num_layers - 1 else f"ys.{n}"
        nodes += [
            make.make_node(operator.name, _in_order(given), last, name=f"layer.{n}", **_attributes(lstm)),
            make.make_node("Transpose", [f"Y.{n}"], [f"Y.{n}.swapped"], perm=[0, 2, 1, 3]),  # (T, B, D, H)
            make.make_node("Reshape", [f"Y.{n}.swapped", "width"], [ys]),
        ]
    nodes += [make.make_node("Concat", [f"{s}.{n}" for n in range(lstm.num_layers)], [s], axis=0) for s in states]
    graph = make.make_graph(
        nodes,
        "jaxlstm",
        [make.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()]
        + [make.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["B"])] * with_lengths,
        [make.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = make.make_opsetid("", OPSET)
    return make.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="jaxlstm")


def from_onnx(lstm: LSTM, model: Any) -> Params:
    """The parameters of the LSTM or RNN operators in an ONNX model, whatever else is in it.

    Args:
      lstm: the configuration that the model is of; a model in another one is refused.
      model: an ``onnx.ModelProto``, from `to_onnx`, ``onnx.load`` or another framework's exporter. Its operators are
        the layers, in the order in which they stand in the graph; their weights are constants in it.

    Returns:
      parameters in ``param_dtype``; the operators' two biases are added.

    Raises:
      ValueError, TypeError: for an option that has no place in the operator, for an operator or an array that is
        missing, one too many or not as the configuration has it, or for a dtype that ``param_dtype`` does not hold.
      ImportError: where onnx is not installed.
    """
    onnx = _package()
    operator = _operator(lstm)
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto, got {validation.describe(model)}")
    nodes = [node for node in model.graph.node if node.op_type == operator.name]
    if len(nodes) != lstm.num_layers:
        raise ValueError(f"num_layers={lstm.num_layers}, but the model has {len(nodes)} {operator.name} operators")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            (tensors[node.output[0]],) = (a.t for a in node.attribute)
    layers = []
    for n, (node, expected) in enumerate(zip(nodes, _expected(lstm).layers)):
        label = f"{operator.name} operator {n}"
        _check_attributes(lstm, label, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
        arrays = {}
        for name, given in zip(INPUTS, node.input):
            if name in ("W", "R", "B", "P") and given:
                if given not in tensors:
                    raise ValueError(f"{label}: {name} is {given!r}, which is no constant of the model")
                arrays[name] = onnx.numpy_helper.to_array(tensors[given])
        layers.append(_from_operator(lstm, label, arrays, expected))
    return Params(tuple(layers))


def _package() -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise ImportError("ONNX models need the package onnx: pip install 'jaxlstm[onnx]'") from None


def _operator(lstm: LSTM) -> Operator:
    """The operator that holds the cell; parameters that it has no place for are refused."""
    if not isinstance(lstm.cell, str):
        raise ValueError("ONNX has no operator for a cell of your own")
    for name in ("proj_size", "layer_norm", "learned_state"):
        if getattr(lstm, name):
            raise ValueError(f"ONNX has no place for {name}={getattr(lstm, name)!r}")
    return OPERATORS[lstm.cell]


def _check_arithmetic(lstm: LSTM) -> None:
    """Refuse options that have no parameters, but by which something else than the operator's result is computed."""
    for name in ("zoneout_h", "zoneout_c"):
        if getattr(lstm, name):
            raise ValueError(f"ONNX has no place for {name}={getattr(lstm, name)!r}, which acts without a key too")
    if lstm.param_dtype not in (jnp.float32, jnp.float64):
        name = jnp.dtype(lstm.param_dtype).name
        raise ValueError(f"param_dtype={name}: ONNX's operators sum in it, which takes float32 or float64")
    if output_dtype(lstm.dtype, lstm.param_dtype) != lstm.param_dtype:
        dtypes = f"dtype={jnp.dtype(lstm.dtype).name}, param_dtype={jnp.dtype(lstm.param_dtype).name}"
        raise ValueError(f"{dtypes}: ONNX's operators have one dtype")


def _expected(lstm: LSTM) -> Params:
    """Shape and dtype of each parameter."""
    return jax.eval_shape(lstm.init, jax.random.key(0))


def _activations(lstm: LSTM) -> list[str]:
    """The operator's names of activations, for each direction."""
    activations = OPERATORS[str(lstm.cell)].activations or ((lstm.activation or "tanh").capitalize(),)
    return list(activations) * lstm.num_directions


def _attributes(lstm: LSTM) -> dict[str, Any]:
    """The operator's attributes."""
    direction = "bidirectional" if lstm.bidirectional else "forward"
    return {"hidden_size": lstm.hidden_size, "direction": direction, "activations": _activations(lstm)}


def _in_order(given: dict[str, str]) -> list[str]:
    """The inputs of an operator by position; an empty name stands for one that is left out."""
    names = [given.get(name, "") for name in INPUTS]
    while not names[-1]:
        names.pop()
    return names


def _reorder(slabs: Sequence[int], a: np.ndarray) -> np.ndarray:
    """Slabs of the leading axis in another order."""
    return a.reshape(len(slabs), -1, *a.shape[1:])[list(slabs)].reshape(a.shape)


def _inverse(slabs: Sequence[int]) -> list[int]:
    return [slabs.index(n) for n in range(len(slabs))]


def _to_operator(lstm: LSTM, layer: Layer) -> dict[str, np.ndarray]:
    """The operator's arrays, ``(D, ...)``, of one layer."""
    operator = OPERATORS[str(lstm.cell)]

    def rows(a: Any) -> np.ndarray:
        a = np.asarray(a, lstm.param_dtype)
        if lstm.cell == "cifg":
            a = np.concatenate([-a[: lstm.hidden_size], a])
        return _reorder(operator.slabs, a)

    def arrays(w: Weights) -> dict[str, np.ndarray]:
        held = {"W": rows(w.w_x), "R": rows(w.w_h)}
        if w.b is not None:
            held["B"] = np.concatenate([rows(w.b), np.zeros_like(rows(w.b))])
        if w.w_c is not None:
            held["P"] = np.asarray(w.w_c, lstm.param_dtype)[list(operator.peepholes)].reshape(-1)
        return held

    directions = [arrays(w) for w in layer.directions]
    return {name: np.stack([held[name] for held in directions]) for name in directions[0]}


def _from_operator(lstm: LSTM, label: str, arrays: dict[str, np.ndarray], expected: Layer) -> Layer:
    """One layer of the operator's arrays."""
    operator, size = OPERATORS[str(lstm.cell)], lstm.hidden_size
    _check_arrays(lstm, label, arrays, expected.forward)

    def rows(a: np.ndarray) -> np.ndarray:
        a = _reorder(_inverse(operator.slabs), a)
        if lstm.cell != "cifg":
            return a
        if not np.array_equal(a[:size], -a[size : 2 * size]):
            raise ValueError(f"{label}: cell='cifg' needs an input gate whose weights are minus the forget gate's")
        return a[size:]

    def weights(d: int) -> Weights:
        held: dict[str, Any] = {"w_x": rows(arrays["W"][d]), "w_h": rows(arrays["R"][d])}
        if "B" in arrays:
            first, second = np.split(arrays["B"][d], 2)
            held["b"] = rows(np.where(second == 0, first, first + second))  # a negative zero stays one
        if "P" in arrays:
            held["w_c"] = _reorder(_inverse(operator.peepholes), arrays["P"][d].reshape(-1, size))
        return Weights(**jax.tree.map(lambda a: jnp.array(a, lstm.param_dtype), held))

    return Layer(*(weights(d) for d in range(lstm.num_directions)))


def _check_arrays(lstm: LSTM, label: str, arrays: dict[str, np.ndarray], expected: Weights) -> None:
    """Refuse arrays that are missing, too many, of another shape or of a wider dtype."""
    rows = len(OPERATORS[str(lstm.cell)].slabs) * lstm.hidden_size
    shapes = {"W": [rows, expected.w_x.shape[1]], "R": [rows, expected.w_h.shape[1]]}
    if expected.b is not None:
        shapes["B"] = [2 * rows]
    if expected.w_c is not None:
        shapes["P"] = [expected.w_c.size]
    for name in shapes | arrays:
        wanted = [lstm.num_directions, *shapes.get(name, [])]
        if name not in arrays:
            raise ValueError(f"{label}: {name} is missing; expected shape {wanted}")
        given = arrays[name]
        if name not in shapes:
            raise ValueError(f"{label}: {name} has no place in this configuration, got {validation.describe(given)}")
        if list(given.shape) != wanted:
            raise ValueError(f"{label}: {name} must have shape {wanted}, got {list(given.shape)}")
        if not np.can_cast(given.dtype, lstm.param_dtype):
            dtypes = f"{given.dtype}, which param_dtype={jnp.dtype(lstm.param_dtype)} does not hold exactly"
            raise TypeError(f"{label}: {name} is {dtypes}; cast it beforehand")


def _check_attributes(lstm: LSTM, label: str, attributes: dict[str, Any]) -> None:
    """Refuse an operator that computes something else."""
    default = ["Tanh"] if lstm.cell == "rnn" else list(OPERATORS["lstm"].activations)
    activations = [name.decode() for name in attributes.get("activations", [])] or default * lstm.num_directions
    given = {
        "direction": attributes.get("direction", b"forward").decode(),
        "activations": [name.capitalize() for name in activations],  # their case does not count
        "clip": attributes.get("clip"),
        "input_forget": attributes.get("input_forget", 0),
    }
    for name, value in given.items():
        wanted = (_attributes(lstm) | {"clip": None, "input_forget": 0})[name]
        if value != wanted:
            raise ValueError(f"{label}: {name} must be {wanted!r} for this configuration, got {value!r}")
