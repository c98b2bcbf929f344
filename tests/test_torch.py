"""Parity with PyTorch: from recorded vectors everywhere, and live where it is installed."""

import importlib.util

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_cases
from tolerance import tolerance

import jaxlstm

RECORDED = np.load(torch_cases.RECORDED)
live = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def weights(arrays, suffix, prefix):
    """One direction of one layer under PyTorch's names; its two biases only ever appear as a sum."""
    w_x, w_h, b_x, b_h, w_p = (
        arrays.get(f"{prefix}{kind}_{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )
    if b_x is not None:
        # The gradient of a sum is the gradient of either summand.
        b_x = b_x if prefix else b_x + b_h
    return jaxlstm.Weights(w_x, w_h, b_x, w_p)


def compare(name, arrays, implementation):
    case = torch_cases.CASES[name]
    kind = {"cell": "rnn", "activation": case["nonlinearity"]} if "nonlinearity" in case else {}
    lstm = jaxlstm.LSTM(
        torch_cases.INPUT,
        torch_cases.HIDDEN,
        num_layers=case.get("num_layers", 1),
        bidirectional=case.get("bidirectional", False),
        proj_size=case.get("proj_size"),
        use_bias=case.get("bias", True),
        param_dtype=jnp.float64,
        implementation=implementation,
        **kind,
    )

    def tree(prefix):
        layers = [
            jaxlstm.Layer(*(weights(arrays, f"l{n}{d}", prefix) for d in ("", "_reverse")[: lstm.num_directions]))
            for n in range(lstm.num_layers)
        ]
        return jaxlstm.Params(tuple(layers))

    lengths = np.array(torch_cases.LENGTHS) if case.get("packed") else None
    cotangents = arrays["dys"], jaxlstm.State(arrays["dh"], arrays.get("dc"))

    def run(params, xs, state):
        return lstm(params, xs, state, lengths=lengths)

    state = jaxlstm.State(arrays["h0"], arrays.get("c0"))
    result, transpose = jax.vjp(run, tree(""), arrays["xs"], state)
    params, xs, state = transpose(cotangents)
    bound = tolerance(np.float64, 100)
    wanted = arrays["ys"], jaxlstm.State(arrays["h"], arrays.get("c"))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **bound)
    wanted = tree("grad."), arrays["grad.xs"], jaxlstm.State(arrays["grad.h0"], arrays.get("grad.c0"))
    for a, b in zip(jax.tree.leaves((params, xs, state)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **bound)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", torch_cases.CASES)
def test_recorded(name, implementation):
    compare(name, recorded(name), implementation)


@live
@pytest.mark.parametrize("name", torch_cases.CASES)
def test_live(name):
    compare(name, torch_cases.compute(name), None)
    for key, value in torch_cases.compute(name).items():
        np.testing.assert_allclose(value, recorded(name)[key], rtol=1e-10, atol=1e-12)
