"""Checks of a command line before it is parsed: each mistake is one line with what was received and expected."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jaxlstm import validation
from jaxlstm.training.config import flag

KNOWN_ELSEWHERE = {  # names of options in other programs
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "max_steps",
    "iterations": "max_steps",
    "steps": "max_steps",
    "hidden_size": "hidden",
    "units": "hidden",
    "bptt": "window",
    "seq_len": "window",
    "sequence_length": "window",
    "emsize": "embedding",
    "grad_clip": "clip",
    "max_grad_norm": "clip",
    "model": "cell",
}
EXPECTED = {int: "an integer", float: "a number"}


def check_arguments(arguments: Sequence[str], options: type) -> None:
    """Checks the arguments of a command whose options are the fields of a dataclass.

    Args:
      arguments: the command line after the name of the program.
      options: the dataclass; fields marked with `tyro.conf.Positional` are given by position.

    Raises:
      ValueError: names an option that does not exist, with the one probably meant, a value that is missing or of
        another type, an argument that belongs to no option, or a required one that is missing.
    """
    if "-h" in arguments or "--help" in arguments:
        return
    hints = option_types(options)
    marks = {
        name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(options, include_extras=True).items()
    }
    positional = [name for name in hints if tyro.conf.Positional in marks[name]]
    places = iter(positional)
    required = [field.name for field in dataclasses.fields(options) if field.default is dataclasses.MISSING]
    for name, text, value in split_arguments(arguments, hints):
        if name is None:
            name = next(places, None)
            if name is None:
                raise ValueError(_stray(text, hints))
        elif name not in hints:
            near = _nearest(name.removeprefix("no_"), list(hints))
            hint = "" if near is None else f"; did you mean {flag(near)}?"
            raise ValueError(f"unknown option {text}{hint} (--help lists the options)")
        elif hints[name] is bool:
            if value is not None:
                raise ValueError(f"{text} takes no value, got {value}; use {flag(name)} or {flag('no_' + name)}")
        elif value is None:
            raise ValueError(f"{text} needs a value; one that begins with a dash is given as {text}=-VALUE")
        else:
            _check_value(text, value, hints[name])
        if name in required:
            required.remove(name)
    if required:
        name = required[0]
        raise ValueError(f"{name.upper() if name in positional else flag(name)} is missing (--help shows the usage)")


def option_name(argument: str) -> str | None:
    """Returns the name of the option in an argument such as ``--run-dir`` or ``--run-dir=x``, None if there is none."""
    text = argument.partition("=")[0]
    return text.removeprefix("--").removeprefix("-").replace("-", "_") if _is_option(argument) else None


def split_arguments(arguments: Sequence[str], hints: Mapping[str, Any]) -> Iterator[tuple[str | None, str, str | None]]:
    """Yields name, text and value of each argument: the name is None by position, the value None if there is none."""
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name = option_name(argument)
        if argument in ("-h", "--help", "--"):
            continue
        if name is None:
            yield None, argument, None
            continue
        text, separator, value = argument.partition("=")
        if name.removeprefix("no_") in hints and hints[name.removeprefix("no_")] is bool:
            name = name.removeprefix("no_")
        takes_next = not separator and hints.get(name, bool) is not bool
        if takes_next and remaining and not _is_option(remaining[0]):
            separator, value = "=", remaining.pop(0)
        yield name, text, value if separator else None


def _is_option(argument: str) -> bool:
    """Returns whether an argument is an option: it begins with a dash and is neither a number nor a sentence."""
    return argument.startswith("-") and " " not in argument.partition("=")[0] and not re.match(r"-\.?\d|-$", argument)


def option_types(options: type) -> dict[str, Any]:
    """Returns the types of the fields of a dataclass by name, without None."""

    def without_none(hint: Any) -> Any:
        is_union = get_origin(hint) in (Union, types.UnionType)
        return next(each for each in get_args(hint) if each is not type(None)) if is_union else hint

    return {name: without_none(hint) for name, hint in get_type_hints(options).items()}


def _nearest(name: str, known: list[str]) -> str | None:
    """Returns the option that was probably meant."""
    if KNOWN_ELSEWHERE.get(name) in known:
        return KNOWN_ELSEWHERE[name]
    longer = [each for each in known if each.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, known, 1)), None)


def _stray(text: str, hints: Mapping[str, Any]) -> str:
    """Describes an argument that belongs to no option."""
    option = "data" if "data" in hints else "text" if hints.get("text") is Path else None
    hint = f"; did you mean --{option} {text}?" if option and Path(text).suffix else " (--help lists the options)"
    return f"unexpected argument {text}{hint}"


def _check_value(text: str, value: str, hint: Any) -> None:
    """Checks that a value can be read as the type of its option."""
    if get_origin(hint) is Literal:
        validation.choice(text, value, get_args(hint))
    elif hint in EXPECTED and value != "None":
        try:
            hint(value)
        except ValueError:
            raise ValueError(f"{text} must be {EXPECTED[hint]}, got {value}") from None
