"""This library next to another: outputs, final state and every gradient, on the other's weights."""

import jax
import numpy as np
from tolerance import tolerance

import jaxlstm


def compare(lstm, read, weights, gradient, arrays, biases=1, lengths=None):
    """What ``lstm`` computes with ``read(weights)`` must be what the other library computed.

    Args:
      lstm: in float64.
      read: makes parameters of the other's weights.
      weights: the other's.
      gradient: of a loss with respect to them, of the same form.
      arrays: ``xs``, ``ys``, ``h0``, ``h`` and, with a cell state, ``c0`` and ``c``; the weights of the loss over all
        that is returned, ``dys``, ``dh``, ``dc``; and its gradients, ``grad.xs``, ``grad.h0``, ``grad.c0``.
      biases: how many the other has. Each of two has the gradient of their sum, and `read` adds them.
      lengths: of the sequences.
    """
    arrays = {"c": None, "c0": None, "dc": None, "grad.c0": None, **arrays}
    result, transpose = jax.vjp(
        lambda params, xs, state: lstm(params, xs, state, lengths=lengths),
        read(weights),
        arrays["xs"],
        jaxlstm.State(arrays["h0"], arrays["c0"]),
    )
    assert_close(result, (arrays["ys"], jaxlstm.State(arrays["h"], arrays["c"])))
    # Reading adds a constant in haiku: of a gradient, only what is linear in it counts.
    constant = read(jax.tree.map(np.zeros_like, gradient))
    wanted = jax.tree.map(np.subtract, read(gradient), constant)
    halved = [
        jaxlstm.Layer(*(w._replace(b=w.b / biases) for w in layer.directions))
        for layer in wanted.layers
        if lstm.use_bias
    ]
    wanted = wanted._replace(layers=tuple(halved) or wanted.layers)
    state = jaxlstm.State(arrays["grad.h0"], arrays["grad.c0"])
    assert_close(
        transpose((arrays["dys"], jaxlstm.State(arrays["dh"], arrays["dc"]))), (wanted, arrays["grad.xs"], state)
    )


def assert_close(have, want):
    """Two trees of float64 arrays, but for the rounding of a hundred operations."""
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, **tolerance(np.float64, 100))
