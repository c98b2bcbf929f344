"""Evaluates a jaxpr number by number, on any representation of numbers: tiles of an array, or names in C code.

The gates of a cell are stacked along an axis, but a kernel or a C program has one variable for each gate of a unit.
Therefore a function is traced on the few numbers of a single unit, and any object may take the place of each number.
Operations that only move numbers cost nothing; every other one is applied to each number separately.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Number = TypeVar("Number")

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "checkpoint", "remat2")


def eval_numbers(
    closed_jaxpr: ClosedJaxpr,
    args: Sequence[Sequence[Number]],
    *,
    constant: Callable[[np.generic], Number],
    apply: Callable[[JaxprEqn, list[Number]], Number],
) -> list[list[Number]]:
    """Evaluates a jaxpr with an object in place of each number.

    Args:
      closed_jaxpr: from `jax.make_jaxpr`.
      args: the objects of each argument, in C order.
      constant: makes the object of a number.
      apply: ``(equation, operands)`` to the result of an operation on numbers. It raises for an operation that it does
        not know or that is not elementwise.

    Returns:
      the objects of each result, in C order.
    """
    evaluator = _Evaluator(constant, apply)
    inputs = [evaluator.add(numbers, v.aval.shape) for numbers, v in zip(args, closed_jaxpr.jaxpr.invars)]
    results = evaluator.eval_jaxpr(closed_jaxpr, inputs)
    return [[evaluator.numbers[n] for n in indices.flat] for indices in results]


class _Evaluator(Generic[Number]):
    """A list of objects, and the operations of a jaxpr on NumPy arrays of indices into it."""

    def __init__(self, constant: Callable[[np.generic], Number], apply: Callable[..., Number]) -> None:
        self.constant = constant
        self.apply = apply
        self.numbers: list[Number] = []

    def add(self, numbers: Sequence[Number], shape: tuple[int, ...]) -> np.ndarray:
        """Appends objects; returns their indices."""
        start = len(self.numbers)
        self.numbers.extend(numbers)
        return np.arange(start, len(self.numbers)).reshape(shape)

    def add_constant(self, value: Any, aval: Any) -> np.ndarray:
        """Appends constants; returns their indices."""
        return self.add([self.constant(number) for number in np.asarray(value, aval.dtype).ravel()], aval.shape)

    def eval_jaxpr(self, program: Jaxpr | ClosedJaxpr, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Evaluates an open or closed jaxpr."""
        jaxpr = getattr(program, "jaxpr", program)
        consts = [self.add_constant(c, v.aval) for c, v in zip(getattr(program, "consts", ()), jaxpr.constvars)]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs)))

        def read(v: Any) -> np.ndarray:
            return self.add_constant(v.val, v.aval) if isinstance(v, Literal) else env[v]

        for equation in jaxpr.eqns:
            env.update(zip(equation.outvars, self.eval_equation(equation, [read(v) for v in equation.invars])))
        return [read(v) for v in jaxpr.outvars]

    def eval_equation(self, equation: JaxprEqn, operands: list[np.ndarray]) -> list[np.ndarray]:
        """Evaluates one equation."""
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self.eval_jaxpr(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], operands)
        if name in _MOVES:
            moved = _MOVES[name](params, *operands)
            return list(moved) if equation.primitive.multiple_results else [moved]
        operands = list(np.broadcast_arrays(*operands))
        results = [self.apply(equation, [self.numbers[n] for n in each]) for each in zip(*(a.flat for a in operands))]
        return [self.add(results, operands[0].shape)]


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


# Operations that only move numbers, as NumPy functions of the indices of numbers.
_MOVES: dict[str, Callable[..., Any]] = {
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
