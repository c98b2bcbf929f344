"""Parity with PyTorch: from recorded vectors everywhere, and live where it is installed."""

import importlib.util

import cases
import jax.numpy as jnp
import numpy as np
import pytest
import torch_cases
from foreign import compare

import jaxlstm
from jaxlstm.interop import from_torch

RECORDED = np.load(torch_cases.RECORDED)
live = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
FAST = ("plain", "no bias", "packed everything", "rnn relu packed")
FAST_LIVE = ("packed everything", "rnn relu packed")  # layers, directions, a projection, lengths, both kinds


def recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def check(name, arrays, implementation):
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
    gradient = {key.removeprefix("grad."): value for key, value in arrays.items() if key.startswith("grad.")}
    lengths = np.array(torch_cases.LENGTHS) if case.get("packed") else None
    compare(
        lstm, lambda arrays: from_torch(lstm, arrays, prefix=""), arrays, gradient, arrays, biases=2, lengths=lengths
    )


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases.slow_but(FAST, torch_cases.CASES))
def test_recorded(name, implementation):
    check(name, recorded(name), implementation)


@live
@pytest.mark.parametrize("name", cases.slow_but(FAST_LIVE, torch_cases.CASES))
def test_live(name):
    check(name, torch_cases.compute(name), None)
    for key, value in torch_cases.compute(name).items():
        np.testing.assert_allclose(value, recorded(name)[key], rtol=1e-10, atol=1e-12)
