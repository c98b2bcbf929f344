"""Checks that the graph of an ONNX model computes a stack of layers from a state of zeros or of its inputs.

Axes of an array are written as one string per axis: T, B, D, H for steps, batch, directions and units, DH for the
last two as one axis, and an empty string for an axis of size 1.

Source: https://onnx.ai/onnx/operators, the operators named below.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlstm.errors import first_line

ONNX_DOMAINS = ("", "ai.onnx")  # of the operators that the specification defines
# Operators that exporters write between two layers; they change the shape of their first input only.
SHAPE_OPERATORS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout")
# Operators whose output contains values of their first input only.
COPYING_OPERATORS = (*SHAPE_OPERATORS, "Cast", "Concat", "Expand", "Slice", "Split", "Tile")
SEQUENCE_INPUTS = {"sequence_lens": 4, "initial_h": 5, "initial_c": 6}  # position in the inputs of LSTM, GRU and RNN
CONSTANT_DTYPES = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}

Axes = tuple[str, ...]


class Graph(NamedTuple):
    """The graph of a model by the names of its arrays."""

    onnx: Any  # the package
    constants: Mapping[str, Any]  # tensors: initializers and outputs of Constant operators
    producers: Mapping[str, Any]  # operator by name of its output
    inputs: Mapping[str, Any]  # declarations of the graph's inputs
    overridable: frozenset[str]  # initializers that an input of the same name replaces

    def array(self, label: str, name: str) -> np.ndarray:
        """Returns a constant as an array; ``label`` begins the message about a damaged one."""
        return _tensor_to_array(self.onnx, label, self.constants[name])

    def attributes(self, node: Any) -> dict[str, Any]:
        """Returns the attributes of an operator by name."""
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}


def read_graph(onnx: Any, model: Any) -> Graph:
    """Returns the graph of a model.

    Raises:
      ValueError: if two initializers or operators define the same name.
    """
    graph = model.graph
    names = [tensor.name for tensor in graph.initializer]
    names += [output for node in graph.node for output in node.output if output]
    if len(names) > len(set(names)):
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the model defines {name!r} more than once, expected one initializer or operator for a name")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                constants[node.output[0]] = attribute.t
            elif attribute.name in CONSTANT_DTYPES:
                value = onnx.helper.get_attribute_value(attribute)
                array = np.asarray(value, CONSTANT_DTYPES[attribute.name])
                constants[node.output[0]] = onnx.numpy_helper.from_array(array)
    inputs = {declaration.name: declaration for declaration in graph.input}
    # Before version 4, all initializers had to be inputs, and runtimes treat them as constants.
    overridable = frozenset(inputs.keys() & constants.keys()) if model.ir_version >= 4 else frozenset()
    producers = {output: node for node in graph.node for output in node.output}
    return Graph(onnx, constants, producers, inputs, overridable)


def check_sequence_inputs(graph: Graph, label: str, node: Any) -> None:
    """Checks that an operator has no constant lengths and no constant initial state other than zeros.

    Raises:
      ValueError: if it has; parameters do not contain them, and the library's call would use others.
    """
    for name, position in SEQUENCE_INPUTS.items():
        source = node.input[position] if position < len(node.input) else ""
        origin = _origin(graph, source, COPYING_OPERATORS)[0]
        producer = graph.producers.get(origin)
        if not source or (producer is not None and producer.op_type not in ("Constant", "ConstantOfShape")):
            continue  # absent or computed
        if origin in graph.inputs and origin not in graph.constants:
            continue
        if name != "sequence_lens" and _is_zero(graph, f"{label}: {name}", origin):
            continue
        expected = "absent or" if name == "sequence_lens" else "absent, zeros or"
        raise ValueError(f"{label}: {name} must be {expected} from an input of the model, got the constant {origin!r}")


def _is_zero(graph: Graph, label: str, name: str) -> bool:
    if name in graph.constants:
        return not np.any(graph.array(label, name))
    if name not in graph.producers or graph.producers[name].op_type != "ConstantOfShape":
        return False
    value = graph.attributes(graph.producers[name]).get("value")
    return value is None or not np.any(_tensor_to_array(graph.onnx, label, value))


def check_stack(graph: Graph, nodes: Sequence[Any], num_directions: int, hidden_size: int) -> None:
    """Checks that each operator after the first one reads all outputs of the operator before it.

    Raises:
      ValueError: if it reads another array, or the outputs with other axes.
    """
    sizes = {"D": num_directions, "H": hidden_size} | _free_sizes(graph, nodes)
    features = "DH" if num_directions > 1 else "H"
    for n in range(1, len(nodes)):
        label, previous = f"{nodes[n].op_type} operator {n}", f"{nodes[n].op_type} operator {n - 1}"
        source, path = _origin(graph, next(iter(nodes[n].input), ""), SHAPE_OPERATORS)
        if source not in nodes[n - 1].output[:1]:
            received = (
                f"from {graph.producers[source].op_type}" if source in graph.producers else "not from an operator"
            )
            raise ValueError(f"{label}: X must be Y of {previous}, the layer before it; got {source!r}, {received}")
        time, batch = _layout(graph, nodes[n - 1])
        directions = features[:-1]
        axes = (time, directions, batch, "H") if time == "T" else (time, batch, directions, "H")
        for node in path:
            axes = _apply(graph, label, node, axes, sizes)
        expected = (*_layout(graph, nodes[n]), features)
        if axes != expected:
            operators = ", ".join(node.op_type for node in path) or "no operator"
            raise ValueError(
                f"{label}: X must be Y of {previous} with axes {_show(expected)}, got {_show(axes)} after {operators}"
            )


def _origin(graph: Graph, name: str, op_types: Sequence[str]) -> tuple[str, list[Any]]:
    """Follows first inputs of operators of these types; returns the name found, and the operators from there on."""
    path: list[Any] = []
    while len(path) <= len(graph.producers):  # a damaged graph may have a cycle
        node = graph.producers.get(name)
        if node is None or node.op_type not in op_types or node.domain not in ONNX_DOMAINS:
            break
        if node.op_type != "Split" and name != node.output[0]:
            break
        name, path = next(iter(node.input), ""), [node, *path]
    return name, path


def _layout(graph: Graph, node: Any) -> tuple[str, str]:
    """Returns the first two axes of an operator's inputs."""
    return ("B", "T") if graph.attributes(node).get("layout") else ("T", "B")


def _free_sizes(graph: Graph, nodes: Sequence[Any]) -> dict[str, int]:
    """Returns the sizes of T and B if the first operator reads an input of the graph with fixed sizes."""
    declaration = graph.inputs.get(next(iter(nodes[0].input), "")) if nodes else None
    dims = [] if declaration is None else declaration.type.tensor_type.shape.dim
    return {axis: dim.dim_value for axis, dim in zip(_layout(graph, nodes[0]), dims) if dim.dim_value} if dims else {}


def _apply(graph: Graph, label: str, node: Any, axes: Axes, sizes: Mapping[str, int]) -> Axes:
    """Returns the axes of a shape operator's output."""
    if node.op_type in ("Identity", "Dropout"):
        return axes
    attributes = graph.attributes(node)
    is_constant = len(node.input) > 1 and node.input[1] in graph.constants
    name = "perm" if node.op_type == "Transpose" else "shape" if node.op_type == "Reshape" else "axes"
    values = graph.array(f"{label}: {name} of {node.op_type}", node.input[1]) if is_constant else attributes.get(name)
    received = None if values is None else [int(value) for value in np.ravel(values)]
    computed = received is None and len(node.input) > 1
    if node.op_type == "Transpose":
        result = _transpose(axes, received)
    elif node.op_type == "Reshape":
        result = _reshape(axes, received, sizes, bool(attributes.get("allowzero")))
    elif computed:
        result = None
    else:
        result = _squeeze(axes, received) if node.op_type == "Squeeze" else _unsqueeze(axes, received or [])
    if result is None:
        raise ValueError(
            f"{label}: X must be Y of the layer before it; {node.op_type} with {name} "
            f"{'that are computed' if computed else received} is not supported for axes {_show(axes)}"
        )
    return result


def _transpose(axes: Axes, perm: list[int] | None) -> Axes | None:
    perm = list(reversed(range(len(axes)))) if perm is None else perm
    return tuple(axes[i] for i in perm) if sorted(perm) == list(range(len(axes))) else None


def _squeeze(axes: Axes, positions: list[int] | None) -> Axes | None:
    if positions is None:
        return tuple(axis for axis in axes if axis)
    removed = {i % len(axes) for i in positions if -len(axes) <= i < len(axes) and not axes[i]}
    return tuple(axis for i, axis in enumerate(axes) if i not in removed) if len(removed) == len(positions) else None


def _unsqueeze(axes: Axes, positions: list[int]) -> Axes | None:
    rank = len(axes) + len(positions)
    inserted = {i % rank for i in positions if -rank <= i < rank}
    remaining = iter(axes)
    return (
        tuple("" if i in inserted else next(remaining) for i in range(rank))
        if len(inserted) == len(positions)
        else None
    )


def _reshape(axes: Axes, shape: list[int] | None, sizes: Mapping[str, int], allow_zero: bool) -> Axes | None:
    """Returns two axes and the features, in the order of ``axes``; a computed shape, None, must make these."""
    letters = "".join(axes)
    result = (letters[0], letters[1], letters[2:])
    if sorted(letters[:2]) != ["B", "T"] or result[2] not in ("H", "DH"):
        return None
    if shape is None:
        return result
    if len(shape) != 3 or shape.count(-1) > 1:
        return None
    for i, size in enumerate(shape):
        known = [sizes.get(letter) for letter in result[i]]
        if size == 0 and not allow_zero:  # keeps the axis
            right = axes[i] == result[i]
        else:
            right = size == -1 or None in known or size == math.prod(filter(None, known))
        if not right:
            return None
    return result


def _show(axes: Axes) -> str:
    return f"[{', '.join(axis or '1' for axis in axes)}]"


def _tensor_to_array(onnx: Any, label: str, tensor: Any) -> np.ndarray:
    """Returns the array in a tensor; never reads a file."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        files = [entry.value for entry in tensor.external_data if entry.key == "location"]
        raise ValueError(
            f"{label} is in the external file {', '.join(files)!r}, which is not loaded; onnx.load(path) loads it"
        )
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # of many types, for tensors that are damaged in different ways
        raise ValueError(f"{label} is not a valid tensor: {type(error).__name__}: {first_line(error)}") from None
    if array.shape != tuple(tensor.dims):
        raise ValueError(f"{label} is not a valid tensor: its shape is {list(tensor.dims)}")
    return array
