"""A mapped axis becomes part of the batch, and where it cannot, the numbers are the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import equations
from tolerance import tolerance

import jaxlstm

STEPS, ROWS, INPUTS, UNITS = 6, 3, 2, 4
TERMS = (
    2 * STEPS * ROWS * UNITS
)  # of the longest sum behind a number: a weight's gradient, two layers, values of order one


def network(implementation="fused", **options):
    return jaxlstm.LSTM(INPUTS, UNITS, num_layers=2, param_dtype=jnp.float64, implementation=implementation, **options)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def rows(program):
    """Of the batch, in all work over one."""
    return [e.params["rows"] for e in equations(program.jaxpr) if e.primitive.name == "batch"]


def one(lstm, params, x):
    return lstm(params, x)[0]


def of_batch(lstm, params, xs):
    return (jax.vmap(partial(one, lstm, params), 1, 1)(xs) ** 2).sum()


def test_mapped_sequences_are_worked_on_as_a_batch():
    lstm, xs = network(), draw(STEPS, ROWS, INPUTS)
    params = lstm.init(jax.random.key(0))
    for function, pieces in (
        (of_batch, 2),  # the recurrence of each layer
        (jax.grad(of_batch, (1, 2)), 4),  # and its transpose
    ):
        assert rows(jax.make_jaxpr(function, static_argnums=0)(lstm, params, xs)) == [ROWS] * pieces
    by_input = jax.vmap(jax.grad(lambda x: (one(lstm, params, x) ** 2).sum()), 1, 1)
    assert rows(jax.make_jaxpr(by_input)(xs)) == [ROWS] * 4
    assert (
        rows(jax.make_jaxpr(jax.vmap(jax.vmap(partial(one, lstm, params))))(draw(5, ROWS, STEPS, INPUTS)))
        == [5 * ROWS] * 2
    )


@pytest.mark.parametrize("axis", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_mapped_axis_of_batches(axis):
    lstm, xs = network(), draw(STEPS, ROWS, 2, INPUTS)
    params = lstm.init(jax.random.key(0))

    def slope(mapped):
        return jax.value_and_grad(lambda params: (mapped(params) ** 2 * (1 + xs[..., :1])).sum())(params)

    def mapped(params):
        return jax.vmap(partial(one, lstm, params), axis, 1)(jnp.moveaxis(xs, 1, axis))

    for a, b in zip(*map(jax.tree.leaves, (slope(mapped), slope(lambda params: one(lstm, params, xs))))):
        np.testing.assert_allclose(a, b, **tolerance(np.float64, TERMS))


MAPPED = {
    "over sequences": (None, 1, None, None),
    "over sequences, which lead": (None, 0, None, None),
    "over lengths of one sequence": (None, None, 0, None),
    "over sequences and lengths": (None, 2, 0, None),
    "over weights": (0, None, None, None),
    "over weights and sequences": (0, 1, None, None),
    "over keys": (None, 1, None, 0),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in MAPPED])
def test_whatever_is_mapped(name):
    """Against a loop over what is mapped; weights, states and dropout with it."""
    axes = MAPPED[name]
    lstm = network(learned_state=True, recurrent_dropout=0.3, weight_drop=0.2)
    params = jax.vmap(lstm.init)(jax.random.split(jax.random.key(0), ROWS))
    keys = jax.random.split(jax.random.key(1), ROWS)
    resets = draw(STEPS, seed=3) > 0.5

    def values(params, x, length, key):
        def loss(params, x):
            ys, state = lstm(params, x, lengths=length, resets=resets, key=key)
            return (ys**2).sum() + (state.c**3).sum()

        value, slopes = jax.value_and_grad(loss, (0, 1))(params, x)
        curvature = jax.jvp(jax.grad(loss, 1), (params, x), (params, x))[1]
        return value, slopes, curvature

    x_shape = [STEPS, INPUTS]
    if axes[1] is not None:
        x_shape.insert(axes[1], ROWS)
    given = [params, draw(*x_shape), jnp.array([4, 0, 6]), keys]
    for n, axis in enumerate(axes):
        if axis is None and n != 1:
            given[n] = jax.tree.map(lambda a: a[0], given[n])
    mapped = jax.jit(jax.vmap(values, axes))(*given)
    run = jax.jit(values)
    apart = [run(*map(partial(piece, n), given, axes)) for n in range(ROWS)]
    wanted = jax.tree.map(lambda *each: jnp.stack(each), *apart)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, **tolerance(np.float64, 10 * TERMS))


def piece(n, tree, axis):
    return tree if axis is None else jax.tree.map(lambda a: jnp.take(a, n, axis), tree)
