"""The configuration of a recurrent network as JSON values, and back."""

from dataclasses import fields
from typing import Any, Literal, get_type_hints

import jax.numpy as jnp

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.errors import first_line
from jaxlstm.json_types import check_entries
from jaxlstm.lstm import GRU, LSTM
from jaxlstm.recurrence.backends import OPTION_CLASSES, Implementation, load
from jaxlstm.residual import ResidualStack
from jaxlstm.rnn import RNN

DTYPES = ("dtype", "param_dtype")
CELL_TYPES: dict[str, Any] = get_type_hints(Cell) | {
    "gates": dict[str, str | None],
    "output": str,
    "update": str | None,
    "reads": dict[str, list[str]],
    "state": dict[str, str],  # numbers as strings: JSON has no infinity
    "peepholes": list[str],
}
BACKEND_TYPES = {"class": Literal[tuple(OPTION_CLASSES)], "options": dict[str, Any]}
CLASSES: dict[str, type[RNN]] = {"RNN": RNN, "LSTM": LSTM, "GRU": GRU, "ResidualStack": ResidualStack}
# Types of options as JSON values that differ from the types in Python; `jaxlstm.LSTM` checks the values.
JSON_TYPES: dict[str, Any] = {
    "class": Literal[tuple(CLASSES)],
    "cell": str | dict[str, Any],
    "dtype": str | None,
    "param_dtype": str,
    "implementation": str | dict[str, Any] | None,
}


def lstm_to_json(lstm: RNN) -> dict[str, Any]:
    """Returns all options of a network as JSON values.

    Raises:
      ValueError: for a cell or a backend that cannot be imported by its name.
    """
    values: dict[str, Any] = {field.name: getattr(lstm, field.name) for field in fields(lstm)}
    for name in DTYPES:
        values[name] = None if values[name] is None else jnp.dtype(values[name]).name
    if isinstance(lstm.cell, Cell):
        values["cell"] = _cell_to_json(lstm.cell)
    return values | {
        "class": type(lstm).__name__,
        "implementation": implementation_to_json(lstm.implementation),
    }


def lstm_from_json(values: Any, label: str) -> RNN:
    """Returns the network with the options that `lstm_to_json` gave; imports the module of a custom cell.

    Args:
      values: the parsed object.
      label: name of the object in error messages.

    Raises:
      ValueError: for a missing or unknown option, or one of a wrong type or value.
    """
    name = values.get("class") if isinstance(values, dict) else None
    network: Any = CLASSES[name] if isinstance(name, str) and name in CLASSES else RNN
    hints = get_type_hints(network)
    check_entries(values, {field.name: hints[field.name] for field in fields(network)} | JSON_TYPES, label)
    options = values | {"implementation": implementation_from_json(values["implementation"], label)}
    del options["class"]
    try:
        if isinstance(values["cell"], dict):
            check_entries(values["cell"], CELL_TYPES, f"{label}: cell")
            options["cell"] = _cell_from_json(values["cell"])
        with validation.without_warnings():
            return network(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{label}: {first_line(error)}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(label) else f"{label}: {first_line(error)}") from None


def _cell_to_json(cell: Cell) -> dict[str, Any]:
    """Returns a custom cell as JSON values, its functions by their names."""
    return vars(cell) | {
        "gates": {name: None if f is None else _import_name(f) for name, f in cell.activations.items()},
        "output": _import_name(cell.output),
        "update": None if cell.update is None else _import_name(cell.update),
        "reads": {name: list(sources) for name, sources in dict(cell.reads).items()},
        "state": {name: str(value) for name, value in cell.initial_values.items()},
        "peepholes": list(cell.peepholes),
    }


def _cell_from_json(values: dict[str, Any]) -> Cell:
    """Inverts `_cell_to_json`."""
    functions = {
        "gates": {name: None if path is None else load(path) for name, path in values["gates"].items()},
        "output": load(values["output"]),
        "update": None if values["update"] is None else load(values["update"]),
        "reads": {name: tuple(sources) for name, sources in values["reads"].items()},
        "state": {name: float(value) for name, value in values["state"].items()},
        "peepholes": tuple(values["peepholes"]),
    }
    return Cell(**values | functions)


def implementation_to_json(implementation: Implementation | None) -> Any:
    """Returns a backend as a JSON value: its name, or the name and the options of its class.

    Raises:
      ValueError: for a backend of the user's own.
    """
    if implementation is None or isinstance(implementation, str):
        return implementation
    name = type(implementation).__name__
    if name not in OPTION_CLASSES or type(implementation) is not load(OPTION_CLASSES[name]):
        raise ValueError(
            f"implementation={implementation!r} cannot be saved; expected a name or one of {', '.join(OPTION_CLASSES)}"
        )
    return {"class": name, "options": vars(implementation)}


def implementation_from_json(value: Any, label: str) -> Implementation | None:
    """Returns the backend that `implementation_to_json` gave; `jaxlstm.LSTM` checks a name.

    Args:
      value: the parsed value.
      label: name of the object that it is in, for error messages.

    Raises:
      ValueError: for a missing or unknown option, or one of a wrong type or value.
    """
    label = f"{label}: implementation"
    if not isinstance(value, dict):
        return value
    check_entries(value, BACKEND_TYPES, label)
    backend = load(OPTION_CLASSES[value["class"]])
    check_entries(value["options"], get_type_hints(backend), f"{label}: options")
    try:
        return backend(**value["options"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label}: {first_line(error)}") from None


def _import_name(function: Any) -> str:
    """Returns ``"module:name"`` of a function that can be imported by it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    path = f"{module}:{name}"
    try:
        if module != "__main__" and load(path) is function:
            return path
    except (ImportError, AttributeError):
        pass
    raise ValueError(
        f"the cell's function {path} cannot be saved: expected one at the top of a module that can be imported"
    )
