"""Checks of one backend against the float64 oracle, shared by the tests of all backends."""

from functools import lru_cache
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
    args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (case.params, case.xs, case.state))

    @jax.jit
    @jax.grad
    def gradient(args: Any) -> Any:
        ys, state = lstm(*args, **case.options)
        return cases.loss(ys.astype(jnp.float64), jax.tree.map(lambda a: a.astype(jnp.float64), state), case.cotangents)

    ys, state = lstm(*args, **case.options)
    assert ys.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    bounds = narrow_operands(dtype, len(case.xs)) if dtype == jnp.bfloat16 else tolerance(dtype, num_terms(case))
    assert_within((ys, state), expected, bounds)
    assert_within(gradient(args), expected_gradient, bounds)


def check_batch_axes(batch: tuple[int, ...], implementation: Any) -> None:
    """Checks any number of batch axes."""
    configuration, inputs = "two layers bidirectional projection", "everything reverse"
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
    rng = np.random.default_rng(0)
    args = (case.params, case.xs, case.state)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), args)

    def loss(*args: Any) -> Any:
        return cases.loss(*lstm(*args, **case.options), case.cotangents)

    def dot(a: Any, b: Any) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    slope = jax.jvp(loss, args, direction)[1]
    expected = dot(cases.expected(configuration, "everything")[1], direction)
    np.testing.assert_allclose(slope, expected, rtol=1e-10)
    forward_over_reverse = jax.jvp(gradient, args, direction)[1]
    reverse_over_reverse = jax.jit(jax.grad(lambda *a: dot(gradient(*a), direction), (0, 1, 2)))(*args)
    assert_close(reverse_over_reverse, forward_over_reverse, np.float64, 100 * num_terms(case))
    # Central differences of an exact gradient: the error is about shift^2 = 1e-12 times the third derivative.
    shift = 1e-6
    ahead = gradient(*jax.tree.map(lambda a, d: a + shift * d, args, direction))
    behind = gradient(*jax.tree.map(lambda a, d: a - shift * d, args, direction))
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * shift), ahead, behind)
    for a, b in zip(jax.tree.leaves(forward_over_reverse), jax.tree.leaves(differences)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def check_vmap(implementation: Any) -> None:
    """Checks that one sequence mapped over a batch equals the batched call, and per-sequence gradients their sum."""
    configuration = "two layers bidirectional"
    case = cases.make(configuration, "everything")
    lstm, options = cases.network(configuration, implementation), case.options

    def run(params: Any, x: Any, state: Any, length: Any, mask: Any, resets: Any) -> Any:
        return lstm(params, x, state, lengths=length, mask=mask, resets=resets)

    def loss(*args: Any) -> Any:
        return sum((a**2).sum() for a in jax.tree.leaves(run(*args)))

    axes = (None, 1, 1, 0, 1, 1)
    args = (case.params, case.xs, case.state, options["lengths"], options["mask"], options["resets"])
    mapped = jax.vmap(run, axes, out_axes=1)(*args)
    assert_close(mapped, lstm(case.params, case.xs, case.state, **options), np.float64, num_terms(case))
    per_sequence = jax.jit(jax.vmap(jax.grad(loss), axes))(*args)
    batched = jax.jit(jax.grad(loss))(*args)
    assert_close(jax.tree.map(lambda a: a.sum(0), per_sequence), batched, np.float64, num_terms(case))
