"""An elementwise function, written for one unit of one sequence, carried out on whole tiles of units and sequences.

The registers of a GPU hold tiles ``(units, rows)`` and know no axis besides, but the gates of a cell lie along one. So
a function is traced on the arrays of a single unit in a single row of the batch, a handful of numbers, and in its
program each of these numbers stands for a tile: moving them about costs nothing, and arithmetic is done tile by tile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax.extend.core import Literal

# Operations of Pallas on GPUs that are taken number by number.
PER_NUMBER = (
    *("abs", "add", "and", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "exp", "exp2", "ge", "gt"),
    *("integer_pow", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or"),
    *("rem", "round", "rsqrt", "select_n", "sign", "sin", "square", "sub", "tanh", "xor"),
)
CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "checkpoint", "remat2")


def carry_out(program: Any, tile: tuple[int, int], arguments: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """What a program returns, with a tile in place of each number.

    Args:
      program: from `jax.make_jaxpr`.
      tile: the shape of a tile.
      arguments: the tiles of each argument, last axis fastest.

    Returns:
      the tiles of each result, likewise.

    Raises:
      ValueError: for an operation that is not elementwise, with its name.
    """
    tiles: list[Any] = []  # all there are; an array of the program is an array of numbers of these

    def put(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
        tiles.extend(values)
        return np.arange(len(tiles) - len(values), len(tiles)).reshape(shape)

    def constant(value: Any, aval: Any) -> np.ndarray:
        numbers = np.asarray(value, aval.dtype)
        return put([lax.full(tile, number.item(), aval.dtype) for number in numbers.ravel()], aval.shape)

    def evaluate(program: Any, *inputs: np.ndarray) -> list[np.ndarray]:
        jaxpr = getattr(program, "jaxpr", program)
        consts = [constant(c, v.aval) for c, v in zip(getattr(program, "consts", ()), jaxpr.constvars)]
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))

        def read(v: Any) -> np.ndarray:
            return constant(v.val, v.aval) if isinstance(v, Literal) else known[v]

        for equation in jaxpr.eqns:
            known.update(zip(equation.outvars, apply(equation, list(map(read, equation.invars)))))
        return list(map(read, jaxpr.outvars))

    def apply(equation: Any, operands: list[np.ndarray]) -> list[np.ndarray]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], *operands)
        if name in MOVES:
            moved = MOVES[name](params, *operands)
            return list(moved) if equation.primitive.multiple_results else [moved]
        if name == "add_any":  # what a transposed program adds with
            primitive, params = lax.add_p, {}
        elif name in PER_NUMBER:
            primitive = equation.primitive
        else:
            raise ValueError(f"gates inside a kernel for Hopper GPUs are elementwise, got the operation {name!r}")
        operands = list(np.broadcast_arrays(*operands))
        values = [primitive.bind(*(tiles[n] for n in each), **params) for each in zip(*(a.flat for a in operands))]
        return [put(values, operands[0].shape)]

    inputs = [put(each, v.aval.shape) for each, v in zip(arguments, program.jaxpr.invars)]
    return [[tiles[n] for n in numbers.flat] for numbers in evaluate(program, *inputs)]


def _broadcast(params: Any, a: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], a.shape):
        shape[axis] = size
    return np.broadcast_to(a.reshape(shape), params["shape"])


def _pad(params: Any, a: np.ndarray, value: np.ndarray) -> np.ndarray:
    config = params["padding_config"]
    sizes = [low + high + n + max(0, n - 1) * inner for (low, high, inner), n in zip(config, a.shape)]
    padded = np.full([n + max(0, -low) + max(0, -high) for n, (low, high, _) in zip(sizes, config)], value)
    starts = [max(0, low) for low, _, _ in config]
    padded[tuple(slice(s, s + n + (n - 1) * i, i + 1) for s, n, (_, _, i) in zip(starts, a.shape, config))] = a
    return padded[tuple(slice(max(0, -low), max(0, -low) + n) for n, (low, _, _) in zip(sizes, config))]


def _slice(params: Any, a: np.ndarray) -> np.ndarray:
    return a[tuple(map(slice, params["start_indices"], params["limit_indices"], params["strides"] or [1] * a.ndim))]


# What only moves numbers about, in NumPy, on the numbers of tiles.
MOVES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "copy": lambda params, a: a,
    "concatenate": lambda params, *arrays: np.concatenate(arrays, params["dimension"]),
    "name": lambda params, a: a,  # of `jax.ad_checkpoint.checkpoint_name`
    "pad": _pad,
    "reshape": lambda params, a: a.reshape(params["new_sizes"]),
    "rev": lambda params, a: np.flip(a, params["dimensions"]),
    "slice": _slice,
    "split": lambda params, a: np.split(a, np.cumsum(params["sizes"])[:-1], params["axis"]),
    "stack": lambda params, *arrays: np.stack(arrays, params["axis"]),
    "squeeze": lambda params, a: a.squeeze(params["dimensions"]),
    "stop_gradient": lambda params, a: a,
    "transpose": lambda params, a: a.transpose(params["permutation"]),
    "unstack": lambda params, a: list(np.moveaxis(a, params["axis"], 0)),
}
