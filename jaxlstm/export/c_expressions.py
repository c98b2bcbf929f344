"""Translation of elementwise jaxprs to C expressions, one variable for each number.

`jaxlstm.export.c_code` traces the gates of a cell for one unit and writes the result into a loop over units, so that
every cell can be translated, user-defined ones included.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from jaxlstm.primitives.elementwise_jaxpr import eval_numbers

# C expressions of operations on numbers, as templates over the operands. A comparison with a NaN is false in C as in
# JAX; `max` and `min` return a NaN if either operand is one, as JAX's do.
_TEMPLATES = {
    "abs": "({0} < 0.0f ? -{0} : {0})",
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "and": "({0} & {1})",
    "clamp": "({1} < {0} ? {0} : {1} > {2} ? {2} : {1})",
    "div": "{0} / {1}",
    "eq": "({0} == {1})",
    "ge": "({0} >= {1})",
    "gt": "({0} > {1})",
    "le": "({0} <= {1})",
    "lt": "({0} < {1})",
    "max": "({0} > {1} || {0} != {0} ? {0} : {1})",
    "min": "({0} < {1} || {0} != {0} ? {0} : {1})",
    "mul": "{0} * {1}",
    "ne": "({0} != {1})",
    "neg": "-{0}",
    "not": "!{0}",
    "or": "({0} | {1})",
    "select_n": "({0} ? {2} : {1})",
    "sign": "({0} > 0.0f ? 1.0f : {0} < 0.0f ? -1.0f : {0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "xor": "({0} ^ {1})",
    # Functions of the generated file.
    "tanh": "NAME_tanh({0})",
    "logistic": "(0.5f + 0.5f * NAME_tanh(0.5f * {0}))",
    # Functions of math.h.
    "ceil": "ceilf({0})",
    "cos": "cosf({0})",
    "erf": "erff({0})",
    "exp": "expf({0})",
    "exp2": "exp2f({0})",
    "expm1": "expm1f({0})",
    "floor": "floorf({0})",
    "log": "logf({0})",
    "log1p": "log1pf({0})",
    "pow": "powf({0}, {1})",
    "rsqrt": "(1.0f / sqrtf({0}))",
    "sin": "sinf({0})",
    "sqrt": "sqrtf({0})",
    "tan": "tanf({0})",
}
_MATH_H = ("ceil", "cos", "erf", "exp", "exp2", "expm1", "floor", "log", "log1p", "pow", "rsqrt", "sin", "sqrt", "tan")


def literal(number: Any) -> str:
    """Returns a C literal of a float32 number that reads back as the same number."""
    text = f"{np.float32(number):.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


class Block:
    """Statements of C that compute results for one unit.

    Attributes:
      lines: definitions of the variables that the results need, in order.
      results: C expressions of the results.
      needs_math_h: whether a function of math.h is called.
      num_operations: number of operations.
    """

    def __init__(self, function: Callable[..., Any], *args: Sequence[str] | None) -> None:
        """Translates a function.

        Args:
          function: elementwise over units.
          *args: the C expressions of the numbers of each argument, which is an array ``(n, 1, 1)``; None for None.

        Raises:
          ValueError: for an operation that cannot be translated.
        """
        self._definitions: dict[str, tuple[str, list[str], bool]] = {}  # name: (line, operands, needs math.h)
        shapes = [None if names is None else jax.ShapeDtypeStruct((len(names), 1, 1), np.float32) for names in args]
        names = [names for names in args if names is not None]
        numbers = eval_numbers(jax.make_jaxpr(function)(*shapes), names, constant=self._constant, apply=self._apply)
        operands = {name for each in names for name in each}
        results = [name for each in numbers for name in each]
        self.results = [self._define(name, [name]) if name in operands else name for name in results]
        needed = self._needed()
        self.lines = [line for name, (line, _, _) in self._definitions.items() if name in needed]
        self.needs_math_h = any(self._definitions[name][2] for name in needed)
        self.num_operations = len(self.lines)

    def _constant(self, number: Any) -> str:
        if number.dtype.kind in "bi":
            return str(int(number))
        if not np.isfinite(number):
            raise ValueError(f"to_c needs a cell of finite constants, got {number}")
        return literal(number) if number >= 0 else f"({literal(number)})"

    def _apply(self, equation: JaxprEqn, operands: list[str]) -> str:
        name, aval = equation.primitive.name, cast(Any, equation.outvars[0].aval)
        if name == "mul" and "1.0f" in operands:
            return operands[1 - operands.index("1.0f")]
        if name == "add" and "0.0f" in operands:
            return operands[1 - operands.index("0.0f")]
        is_float = aval.dtype.kind not in "bi"
        if name == "integer_pow":
            expression = " * ".join([operands[0]] * abs(equation.params["y"])) or "1.0f"
            expression = expression if equation.params["y"] >= 0 else f"1.0f / ({expression})"
        elif name == "convert_element_type":
            expression = f"(float){operands[0]}" if is_float else f"({operands[0]} != 0)"
        elif name in _TEMPLATES:
            expression = _TEMPLATES[name].format(*operands)
        else:
            raise ValueError(
                f"to_c needs an elementwise cell of arithmetic and functions of math.h, got the operation {name!r}"
            )
        return self._define(expression, operands, is_float=is_float, needs_math_h=name in _MATH_H)

    def _define(
        self, expression: str, operands: list[str], *, is_float: bool = True, needs_math_h: bool = False
    ) -> str:
        """Defines a variable; returns its name. A result is one, so that storing another result does not change it."""
        variable = f"t{len(self._definitions)}"
        line = f"const {'float' if is_float else 'int'} {variable} = {expression};"
        self._definitions[variable] = line, operands, needs_math_h
        return variable

    def _needed(self) -> set[str]:
        """Returns the variables that the results depend on."""
        needed, pending = set(), [name for name in self.results if name in self._definitions]
        while pending:
            name = pending.pop()
            needed.add(name)
            pending += [a for a in self._definitions[name][1] if a in self._definitions and a not in needed]
        return needed
