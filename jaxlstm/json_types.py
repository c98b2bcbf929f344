"""Checks the types of values read from JSON files, before anything uses them."""

import reprlib
import sys
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(cls: type[T], values: Any, label: str) -> T:
    """Builds a dataclass from a JSON object with exactly its fields.

    Args:
      cls: the dataclass.
      values: the parsed object.
      label: name of the object in error messages.

    Raises:
      ValueError: under the conditions of `check_entries`.
    """
    check_entries(values, get_type_hints(cls), label)
    return cls(**values)


def check_entries(values: Any, hints: Mapping[str, Any], label: str) -> None:
    """Checks that a JSON object has exactly the expected keys, with values of the expected types.

    An int passes as a float unless it is too large for one; a bool does not pass as a number.

    Raises:
      ValueError: names the first key that is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{label} must be an object, got {reprlib.repr(values)}")
    for name in hints:
        if name not in values:
            raise ValueError(f"{label} has no key {name!r}")
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{label} has an unknown key {reprlib.repr(name)}")
        if not matches(value, hints[name]):
            raise ValueError(f"{label}: {name} must be {_type_name(hints[name])}, got {reprlib.repr(value)}")


def matches(value: Any, hint: Any) -> bool:
    """Returns whether a value parsed from JSON has a type; see `check_entries` for numbers."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(item, arguments[1]) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
