"""Evaluates an elementwise function, traced for one unit of one sequence, on tiles of units and sequences.

The registers of a GPU hold tiles ``(units, rows)`` without further axes, so a tile takes the place of each number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array, lax

from jaxlstm.primitives.elementwise_jaxpr import eval_numbers

# Elementwise operations that Pallas lowers on GPUs.
ELEMENTWISE = (
    *("abs", "add", "and", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "exp", "exp2", "ge", "gt"),
    *("integer_pow", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or"),
    *("rem", "round", "rsqrt", "select_n", "sign", "sin", "square", "sub", "tanh", "xor"),
)


def eval_on_tiles(closed_jaxpr: Any, tile_shape: tuple[int, int], args: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """Evaluates a jaxpr with a tile in place of each number.

    Args:
      closed_jaxpr: from `jax.make_jaxpr`.
      tile_shape: the shape of a tile.
      args: the tiles of each argument, in C order.

    Returns:
      the tiles of each result, in C order.

    Raises:
      ValueError: for an operation that is not elementwise.
    """

    def constant(number: np.generic) -> Array:
        return lax.full(tile_shape, number.item(), number.dtype)

    return eval_numbers(closed_jaxpr, args, constant=constant, apply=_apply)


def _apply(equation: Any, operands: list[Array]) -> Array:
    name = equation.primitive.name
    if name == "add_any":  # the addition of cotangents
        return lax.add(*operands)
    if name not in ELEMENTWISE:
        raise ValueError(
            f"implementation='pallas' needs an elementwise cell on a Hopper GPU, got the operation {name!r}"
        )
    return equation.primitive.bind(*operands, **equation.params)
