"""Evaluates an elementwise function, traced for one unit of one sequence, on tiles of units and sequences.

The registers of a GPU hold tiles ``(units, rows)`` without further axes, but the gates of a cell are stacked along an
axis. Therefore a function is traced on the few numbers of a single unit in a single batch row, and a tile takes the
place of each number. Operations that only move numbers cost nothing, and arithmetic is done tile by tile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax.extend.core import Literal

# Elementwise operations that Pallas lowers on GPUs.
ELEMENTWISE = (
    *("abs", "add", "and", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "exp", "exp2", "ge", "gt"),
    *("integer_pow", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or"),
    *("rem", "round", "rsqrt", "select_n", "sign", "sin", "square", "sub", "tanh", "xor"),
)
CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "checkpoint", "remat2")


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
    evaluator = _TileEvaluator(tile_shape)
    inputs = [evaluator.add(tiles, v.aval.shape) for tiles, v in zip(args, closed_jaxpr.jaxpr.invars)]
    results = evaluator.eval_jaxpr(closed_jaxpr, inputs)
    return [[evaluator.tiles[n] for n in indices.flat] for indices in results]


class _TileEvaluator:
    """A list of tiles, and the operations of a jaxpr on NumPy arrays of indices into it."""

    def __init__(self, tile_shape: tuple[int, int]) -> None:
        self.tile_shape = tile_shape
        self.tiles: list[Array] = []

    def add(self, tiles: Sequence[Array], shape: tuple[int, ...]) -> np.ndarray:
        """Appends tiles; returns their indices."""
        start = len(self.tiles)
        self.tiles.extend(tiles)
        return np.arange(start, len(self.tiles)).reshape(shape)

    def add_constant(self, value: Any, aval: Any) -> np.ndarray:
        """Appends constant tiles; returns their indices."""
        numbers = np.asarray(value, aval.dtype)
        tiles = [lax.full(self.tile_shape, number.item(), aval.dtype) for number in numbers.ravel()]
        return self.add(tiles, aval.shape)

    def eval_jaxpr(self, program: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Evaluates an open or closed jaxpr."""
        jaxpr = getattr(program, "jaxpr", program)
        consts = [self.add_constant(c, v.aval) for c, v in zip(getattr(program, "consts", ()), jaxpr.constvars)]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))

        def read(v: Any) -> np.ndarray:
            return self.add_constant(v.val, v.aval) if isinstance(v, Literal) else env[v]

        for equation in jaxpr.eqns:
            env.update(zip(equation.outvars, self.eval_equation(equation, [read(v) for v in equation.invars])))
        return [read(v) for v in jaxpr.outvars]

    def eval_equation(self, equation: Any, operands: list[np.ndarray]) -> list[np.ndarray]:
        """Evaluates one equation."""
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self.eval_jaxpr(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], operands)
        if name in MOVES:
            moved = MOVES[name](params, *operands)
            return list(moved) if equation.primitive.multiple_results else [moved]
        if name == "add_any":  # the addition of cotangents
            primitive, params = lax.add_p, {}
        elif name in ELEMENTWISE:
            primitive = equation.primitive
        else:
            raise ValueError(
                f"implementation='pallas' needs an elementwise cell on a Hopper GPU, got the operation {name!r}"
            )
        operands = list(np.broadcast_arrays(*operands))
        indices = zip(*(a.flat for a in operands))
        tiles = [primitive.bind(*(self.tiles[n] for n in each), **params) for each in indices]
        return [self.add(tiles, operands[0].shape)]


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
    strides = params["strides"] or [1] * a.ndim
    return a[tuple(slice(*each) for each in zip(params["start_indices"], params["limit_indices"], strides))]


# Operations that only move numbers, as NumPy functions of the indices of tiles.
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
