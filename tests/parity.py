"""Checks of one backend against the float64 oracle, shared by the tests of all backends."""

from functools import lru_cache, partial
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from tolerance import narrow_operands, tolerance


def assert_close(actual: Any, wanted: Any, dtype: Any, terms: int) -> None:
    """Compares trees leaf by leaf, with the tolerance of ``terms`` rounded operations in ``dtype``."""
    assert_within(actual, wanted, tolerance(dtype, terms))


def assert_within(actual: Any, wanted: Any, bounds: dict[str, float]) -> None:
    """Compares trees leaf by leaf; the absolute tolerance is relative to the largest number of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(wanted)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        atol = bounds["atol"] * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=bounds["rtol"], atol=atol, err_msg=jax.tree_util.keystr(path))


def num_terms(case: cases.Case) -> int:
    """Bounds the number of additions behind one result: the longest chain of sums over time, batch and features.

    Layer normalization divides by a standard deviation, which over five units is sometimes a fortieth of the typical
    one, and rounding errors grow with it. The largest error seen is twice the bound without this factor; 25 times is
    allowed, still far below the effect of a wrong term.
    """
    normalized = 5**4 if case.lstm.layer_norm else 1
    return normalized * case.xs.size * case.lstm.num_layers * case.lstm.num_directions


@lru_cache
def _value_and_gradient(configuration: str, implementation: Any, reverse: bool) -> Any:
    """Compiles results and gradient once for all cases of a configuration that have the same masks."""
    lstm = cases.network(configuration, implementation)

    def loss(args: Any, cotangents: Any, options: Any) -> Any:
        result = lstm(*args, reverse=reverse, **options)
        return cases.loss(*result, cotangents), result

    return jax.jit(jax.grad(loss, has_aux=True))


def check_outputs_and_gradients(configuration: str, inputs: str, implementation: Any) -> None:
    """Checks outputs, final state and every gradient."""
    case = cases.make(configuration, inputs)
    expected, expected_gradient = cases.expected(configuration, inputs)
    options = dict(case.options)
    value_and_gradient = _value_and_gradient(configuration, implementation, options.pop("reverse", False))
    gradient, result = value_and_gradient((case.params, case.xs, case.state), case.cotangents, options)
    assert_close(result, expected, np.float64, num_terms(case))
    assert_close(gradient, expected_gradient, np.float64, num_terms(case))


def check_narrow_dtype(configuration: str, dtype: Any, implementation: Any) -> None:
    """Checks outputs, final state and gradients with products in ``dtype``."""
    case = cases.make(configuration, "everything")
    expected, expected_gradient = cases.expected(configuration, "everything")
    lstm = cases.network(configuration, implementation, param_dtype=jnp.float32, dtype=dtype)
    args = jax.tree.map(lambda a: np.asarray(a, np.float32), (case.params, case.xs, case.state))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(args: Any) -> Any:
        ys, state = lstm(*args, **case.options)
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (ys, state))
        return cases.loss(*wide, case.cotangents), (ys, state)

    gradient, (ys, state) = run(args)
    assert ys.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    bounds = narrow_operands(dtype, len(case.xs)) if dtype == jnp.bfloat16 else tolerance(dtype, num_terms(case))
    assert_within((ys, state), expected, bounds)
    assert_within(gradient, expected_gradient, bounds)


def check_batch_axes(batch: tuple[int, ...], implementation: Any) -> None:
    """Checks any number of batch axes."""
    configuration, inputs = "learned state", "everything reverse"
    case = cases.make(configuration, inputs)
    lstm, rows = cases.network(configuration, implementation), int(np.prod(batch))

    def reshape_batch(a: Any, axis: int) -> np.ndarray:
        taken = np.take(a, range(rows), axis)
        return taken.reshape((*taken.shape[:axis], *batch, *taken.shape[axis + 1 :]))

    options = dict(case.options)
    for name, axis in (("lengths", 0), ("mask", 1), ("resets", 1)):
        options[name] = reshape_batch(options[name], axis)
    state = jax.tree.map(lambda a: reshape_batch(a, 1), case.state)
    result = lstm(case.params, reshape_batch(case.xs, 1), state, **options)
    expected = jax.tree.map(lambda a: reshape_batch(a, 1), cases.expected(configuration, inputs)[0])
    assert_close(result, expected, np.float64, num_terms(case))


def check_higher_derivatives(configuration: str, implementation: Any) -> None:
    """Checks jvp, Hessian-vector product and reverse over reverse against differences of the oracle's gradient."""
    case = cases.make(configuration, "everything")
    lstm = cases.network(configuration, implementation)
    args = (case.params, case.xs, case.state)
    direction, expected = cases.expected_second_derivative(configuration, "everything")

    def loss(*args: Any) -> Any:
        return cases.loss(*lstm(*args, **case.options), case.cotangents)

    def dot(a: Any, b: Any) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    @jax.jit
    def derivatives(args: Any, direction: Any) -> Any:
        gradient = jax.grad(loss, (0, 1, 2))
        slope = jax.jvp(loss, args, direction)[1]
        forward_over_reverse = jax.jvp(gradient, args, direction)[1]
        return slope, forward_over_reverse, jax.grad(lambda *a: dot(gradient(*a), direction), (0, 1, 2))(*args)

    slope, forward_over_reverse, reverse_over_reverse = derivatives(args, direction)
    expected_slope = dot(cases.expected(configuration, "everything")[1], direction)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-10)
    assert_close(reverse_over_reverse, forward_over_reverse, np.float64, 100 * num_terms(case))
    for a, b in zip(jax.tree.leaves(forward_over_reverse), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def check_vmap(implementation: Any) -> None:
    """Checks that one sequence mapped over a batch equals the batched call, and per-sequence gradients their sum."""
    configuration = "bidirectional"
    case = cases.make(configuration, "everything")
    lstm, options = cases.network(configuration, implementation), case.options

    def loss(params: Any, x: Any, state: Any, length: Any, mask: Any, resets: Any) -> Any:
        result = lstm(params, x, state, lengths=length, mask=mask, resets=resets)
        return sum((a**2).sum() for a in jax.tree.leaves(result)), result

    gradient = jax.grad(loss, has_aux=True)
    args = (case.params, case.xs, case.state, options["lengths"], options["mask"], options["resets"])
    mapped_gradient = jax.vmap(gradient, (None, 1, 1, 0, 1, 1), out_axes=(0, 1))
    per_sequence, mapped = jax.jit(mapped_gradient)(*args)
    batched, expected = jax.jit(gradient)(*args)
    assert_close(mapped, expected, np.float64, num_terms(case))
    assert_close(jax.tree.map(lambda a: a.sum(0), per_sequence), batched, np.float64, num_terms(case))
