"""Compares a backend on the accelerator with `scan` in float64 on the CPU: outputs, final state and all gradients."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxlstm
from jaxlstm.autotuning.agreement import relative_error, tolerance
from jaxlstm.errors import first_line

BACKENDS = ("scan", "fused", "tensor_parallel", "cudnn", "pallas", "newton", "associative")
# Name -> (dtype of products, jax.default_matmul_precision). By default GPUs multiply float32 in TF32, TPUs in bfloat16.
PRECISIONS: dict[str, tuple[Any, str | None]] = {
    "float32": (None, "highest"),
    "float32 by default": (None, None),
    "bfloat16": (jnp.bfloat16, None),
}


class Case(NamedTuple):
    """A network and the masks of its call."""

    options: dict[str, Any]  # of `jaxlstm.LSTM`
    masks: tuple[str, ...]
    hidden_size: int = 128


TWO_LAYERS = {"num_layers": 2, "bidirectional": True}
CASES = {
    "plain": Case({}, ()),
    "lengths": Case({}, ("lengths",)),
    "lengths, reverse": Case({}, ("lengths", "reverse")),
    "lengths, mask, resets": Case({}, ("lengths", "mask", "resets")),
    "2 layers, both directions, lengths": Case(TWO_LAYERS, ("lengths",)),
    "2 layers, both directions, all masks": Case(TWO_LAYERS, ("lengths", "mask", "resets", "reverse")),
    "768 units": Case({}, (), 768),
    "minlstm": Case({"cell": "minlstm"}, ("lengths", "mask", "resets")),
}
# Each backend has the cases that it may run; others are refused, which the results show. The cell of the last case is
# affine in its state, the only kind that "associative" runs.
DRY_PAIRS = (("lengths, mask, resets", "bfloat16"), ("minlstm", "float32"))
STEPS, BATCH, INPUTS = 32, 16, 64
DRY_SIZES = (5, 3, 4, 6)  # T, B, I, H


class Program(NamedTuple):
    """A function of arrays, and the arrays in float64."""

    lstm: jaxlstm.LSTM
    xs_shape: tuple[int, ...]
    function: Callable[..., Any]  # (params, xs, state, cotangents, masks) -> results and gradients
    args: tuple[Any, ...]


def cases_and_precisions(*, dry: bool) -> tuple[tuple[str, str], ...]:
    """Returns the names of the cases and precisions that run."""
    return DRY_PAIRS if dry else tuple(itertools.product(CASES, PRECISIONS))


def make_program(name: str, implementation: Any, *, dry: bool, **options: Any) -> Program:
    """Returns a case's outputs, final state and gradients as a function, with the same random arguments every time."""
    case = CASES[name]
    num_steps, batch_size, input_size, hidden_size = DRY_SIZES if dry else (STEPS, BATCH, INPUTS, case.hidden_size)
    lstm = jaxlstm.LSTM(input_size, hidden_size, implementation=implementation, **case.options, **options)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))

    def normal(a: Any) -> np.ndarray:
        return rng.standard_normal(a.shape)

    def uniform(a: Any) -> np.ndarray:
        return rng.uniform(-1, 1, a.shape) * (a.shape[-1] ** -0.5 if len(a.shape) > 1 else 1.0)

    params, state = jax.tree.map(uniform, lstm.param_shapes()), lstm.state_shapes((batch_size,))
    xs_shape = (num_steps, batch_size, input_size)
    cotangents = normal(np.empty((*xs_shape[:-1], lstm.num_directions * lstm.output_size))), jax.tree.map(normal, state)
    lengths = rng.integers(1, num_steps + 1, batch_size)
    lengths[:2] = 0, num_steps
    masks: dict[str, Any] = {
        "lengths": lengths.astype(np.int32),
        "mask": rng.random(xs_shape[:-1]) < 0.7,
        "resets": rng.random(xs_shape[:-1]) < 0.2,
    }
    used = {mask: array for mask, array in masks.items() if mask in case.masks}

    def loss(params: Any, xs: Any, state: Any, cotangents: Any, masks: Any) -> Any:
        results = lstm(params, xs, state, reverse="reverse" in case.masks, **masks)
        products = jax.tree.map(lambda a, b: (a.astype(b.dtype) * b).sum(), tuple(results), tuple(cotangents))
        return sum(jax.tree.leaves(products)), tuple(results)

    function = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    def results_and_gradients(*args: Any) -> Any:
        (_, results), gradients = function(*args)
        return results, gradients

    args = (params, rng.standard_normal(xs_shape), jax.tree.map(normal, state), cotangents, used)
    return Program(lstm, xs_shape, results_and_gradients, args)


def as_dtype(tree: Any, dtype: Any) -> Any:
    """Returns a tree with its floating-point arrays in ``dtype``."""
    return jax.tree.map(lambda a: a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a, tree)


def reference_path(work: Path, name: str) -> Path:
    """Returns the file with the reference results of a case."""
    return work / f"reference-{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"


def write_references(work: Path, *, dry: bool) -> Iterator[str]:
    """Computes every case by `scan` in float64 and yields its name once its file is written; needs x64."""
    for name in dict.fromkeys(name for name, _ in cases_and_precisions(dry=dry)):
        program = make_program(name, "scan", dry=dry, param_dtype="float64")
        leaves = jax.tree.leaves(jax.device_get(jax.jit(program.function)(*program.args)))
        np.savez(reference_path(work, name), *leaves)
        yield name


def check_backend(implementation: str, work: Path, *, dry: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields for each case and precision the error relative to the reference, its tolerance and the verdict.

    The verdict is ``equal``, ``wrong``, ``refused`` (the backend does not support the case) or ``failed``. The
    tolerance is derived in `jaxlstm.autotuning.agreement.tolerance`: for TF32 and bfloat16 from the rounding of the
    operands, once per layer on the way up and once on the way down, for float32 from the number of summed terms.
    """

    def compile_program(name: str, precision: str) -> Any:
        dtype, matmul_precision = PRECISIONS[precision]
        with jax.default_matmul_precision(matmul_precision):
            program = make_program(name, implementation, dry=dry, dtype=dtype)
            bound = tolerance(program.lstm, program.xs_shape)
            args = as_dtype(program.args, np.float32)
            return jax.jit(program.function).lower(*args).compile(), args, bound

    with ThreadPoolExecutor(8) as pool:  # the compiler works without Python's lock
        compiled = [(*each, pool.submit(compile_program, *each)) for each in cases_and_precisions(dry=dry)]
        for name, precision, future in compiled:
            try:
                executable, args, bound = future.result()
                actual = jax.tree.leaves(jax.device_get(executable(*args)))
            except ValueError as refusal:
                yield name, precision, {"verdict": "refused", "reason": first_line(refusal)}
            except Exception as error:  # of a compiler or the device
                yield name, precision, {"verdict": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
            else:
                with np.load(reference_path(work, name)) as file:
                    expected = [file[key] for key in file.files]
                error = relative_error(actual, expected)
                verdict = "equal" if error <= bound else "wrong"
                yield name, precision, {"verdict": verdict, "error": error, "tolerance": bound}
