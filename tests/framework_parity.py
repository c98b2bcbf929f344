"""Parity with another framework: outputs, final state and every gradient, with the weights of the other framework."""

from functools import partial

import jax
import numpy as np
from tolerance import tolerance

import jaxlstm


def assert_parity(lstm, to_params, weights, weight_gradient, arrays, num_biases=1, lengths=None, without_bias=()):
    """Asserts that ``lstm`` with ``to_params(weights)`` computes the arrays of the other framework.

    Args:
      lstm: a network in float64.
      to_params: converts weights of the other framework to parameters.
      weights: weights of the other framework.
      weight_gradient: gradient of a loss with respect to the weights, with the same structure.
      arrays: inputs and initial state ``xs``, ``h0``, ``c0``; outputs and final state ``ys``, ``h``, ``c``; their
        cotangents ``dys``, ``dh``, ``dc``; and the gradients ``grad.xs``, ``grad.h0``, ``grad.c0``. A network without a
        cell state has no arrays of c, a network with several states has dictionaries of them.
      num_biases: number of biases of the other framework. Each of two biases has the gradient of their sum, which
        ``to_params`` adds up for gates that read both the input and h.
      lengths: lengths of the sequences.
      without_bias: gates that have no bias in the other framework, and so no gradient to compare.
    """
    arrays = {"c": None, "c0": None, "dc": None, "grad.c0": None, **arrays}
    state = jaxlstm.State(arrays["h0"], arrays["c0"])
    cotangents = arrays["dys"], jaxlstm.State(arrays["dh"], arrays["dc"])
    outputs, gradients = outputs_and_gradients(lstm, to_params(weights), arrays["xs"], state, lengths, cotangents)
    assert_close(outputs, (arrays["ys"], jaxlstm.State(arrays["h"], arrays["c"])))
    # Conversion from haiku adds a constant to the bias; subtract it, because a gradient is linear in the weights.
    constant = to_params(jax.tree.map(np.zeros_like, weight_gradient))
    params_gradient = jax.tree.map(np.subtract, to_params(weight_gradient), constant)
    cell = lstm.resolved_cell
    two_sources = set(cell.slabs_reading("x")) & set(cell.slabs_reading("h"))
    divisors = np.array([num_biases if n in two_sources else 1 for n in range(cell.num_gates)])
    params_gradient = scale_biases(params_gradient, 1 / divisors)
    with_bias = np.array([float(gate not in without_bias) for gate in cell.activations])
    actual = scale_biases(gradients[0], with_bias)
    state_gradient = jaxlstm.State(arrays["grad.h0"], arrays["grad.c0"])
    assert_close((actual, *gradients[1:]), (params_gradient, arrays["grad.xs"], state_gradient))


def scale_biases(params, factors):
    """Multiplies the bias of each gate by its factor."""

    def scale(weights):
        b = None if weights.b is None else (np.reshape(weights.b, (len(factors), -1)) * factors[:, None]).reshape(-1)
        return weights._replace(b=b)

    layers = tuple(jaxlstm.Layer(*map(scale, layer.directions)) for layer in params.layers)
    return params._replace(layers=layers)


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(lstm, params, xs, state, lengths, cotangents):
    """Outputs and the gradients with respect to ``params``, ``xs`` and ``state``, in a single compiled program."""
    outputs, pull_back = jax.vjp(lambda *args: lstm(*args, lengths=lengths), params, xs, state)
    return outputs, pull_back(cotangents)


def assert_close(actual, expected):
    """Asserts that two trees of float64 arrays agree up to the rounding errors of a hundred operations."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, **tolerance(np.float64, 100))
