"""`jax.vmap` of the fused recurrence: the mapped axis becomes part of the batch, and the numbers equal a loop's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import equations, random_params
from tolerance import tolerance

import jaxlstm

T, B, INPUT_SIZE, H = 6, 3, 2, 4
TERMS = 2 * T * B * H  # of the longest sum, a weight's gradient in two layers with values of order one


def make_lstm(**options):
    return jaxlstm.LSTM(INPUT_SIZE, H, num_layers=2, param_dtype=jnp.float64, implementation="fused", **options)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def outputs(lstm, params, xs):
    return lstm(params, xs)[0]


def loss_of_mapped(lstm, params, xs):
    return (jax.vmap(partial(outputs, lstm, params), 1, 1)(xs) ** 2).sum()


def batch_sizes(fn, *args):
    """Returns the batch size of every foldable call in the program."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return [e.params["batch_size"] for e in equations(jaxpr) if e.primitive.name == "foldable_call"]


def test_vmap_folds_sequences_into_the_batch():
    lstm, xs = make_lstm(), draw(T, B, INPUT_SIZE)
    params = random_params(lstm, np.random.default_rng(1))
    assert batch_sizes(partial(loss_of_mapped, lstm), params, xs) == [B] * 2  # the recurrence of each layer
    gradient = jax.grad(loss_of_mapped, (1, 2))
    assert batch_sizes(partial(gradient, lstm), params, xs) == [B] * 4  # and its transpose
    gradient_per_sequence = jax.vmap(jax.grad(lambda x: (outputs(lstm, params, x) ** 2).sum()), 1, 1)
    assert batch_sizes(gradient_per_sequence, xs) == [B] * 4
    assert batch_sizes(jax.vmap(jax.vmap(partial(outputs, lstm, params))), draw(5, B, T, INPUT_SIZE)) == [5 * B] * 2


@pytest.mark.parametrize("axis", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_vmap_of_batches_equals_one_batch(axis):
    lstm, xs = make_lstm(), draw(T, B, 2, INPUT_SIZE)
    params = random_params(lstm, np.random.default_rng(1))

    def value_and_gradient(run):
        return jax.jit(jax.value_and_grad(lambda params: (run(params) ** 2 * (1 + xs[..., :1])).sum()))(params)

    def mapped(params):
        return jax.vmap(partial(outputs, lstm, params), axis, 1)(jnp.moveaxis(xs, 1, axis))

    actual, expected = value_and_gradient(mapped), value_and_gradient(lambda params: outputs(lstm, params, xs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, TERMS)), actual, expected)


MAPPED_AXES = {  # of parameters, inputs, lengths and keys
    "sequences": (None, 1, None, None),
    "sequences, leading axis": (None, 0, None, None),
    "lengths of one sequence": (None, None, 0, None),
    "sequences and lengths": (None, 2, 0, None),
    "weights": (0, None, None, None),
    "weights and sequences": (0, 1, None, None),
    "keys": (None, 1, None, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPED_AXES)
def test_vmap_equals_loop(name):
    """Compares value, gradients and a Hessian-vector product, with a learned state, resets and dropout."""
    axes = MAPPED_AXES[name]
    lstm = make_lstm(learned_state=True, recurrent_dropout=0.3, weight_drop=0.2)
    resets = draw(T, seed=3) > 0.5

    def derivatives(params, x, length, key):
        def loss(params, x):
            ys, state = lstm(params, x, lengths=length, resets=resets, key=key)
            return (ys**2).sum() + (state.c**3).sum()

        value, gradient = jax.value_and_grad(loss, (0, 1))(params, x)
        return value, gradient, jax.jvp(jax.grad(loss, 1), (params, x), (params, x))[1]

    def index(tree, axis, n):
        return jax.tree.map(lambda a: jnp.take(a, n, axis), tree)

    x_shape = [T, INPUT_SIZE]
    if axes[1] is not None:
        x_shape.insert(axes[1], B)
    params = jax.vmap(lstm.init)(jax.random.split(jax.random.key(0), B))
    args = [params, draw(*x_shape), jnp.array([4, 0, 6]), jax.random.split(jax.random.key(1), B)]
    args = [index(a, 0, 0) if axis is None and n != 1 else a for n, (a, axis) in enumerate(zip(args, axes))]
    actual = jax.jit(jax.vmap(derivatives, axes))(*args)
    jitted = jax.jit(derivatives)
    results = [jitted(*(a if axis is None else index(a, axis, n) for a, axis in zip(args, axes))) for n in range(B)]
    expected = jax.tree.map(lambda *each: jnp.stack(each), *results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(np.float64, 10 * TERMS)), actual, expected)
