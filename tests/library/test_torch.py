"""Parity with PyTorch: from recorded vectors, and live where PyTorch is installed."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import torch_cases
from framework_parity import assert_parity

import jaxlstm
from jaxlstm.interop import from_torch

RECORDED = np.load(torch_cases.RECORDED)
# Cases of the default tier: layers, directions, a projection and lengths; every module; with and without bias.
DEFAULT_CASES = ("no bias", "packed everything", "rnn relu packed", "gru")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def load_recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def assert_parity_with_torch(name, arrays, implementation):
    case = torch_cases.CASES[name]
    cell_options = {"cell": case.get("module", "LSTM").lower()}
    if "nonlinearity" in case:
        cell_options = {"cell": "rnn", "activation": case["nonlinearity"]}
    lstm = jaxlstm.LSTM(
        torch_cases.INPUT,
        torch_cases.HIDDEN,
        num_layers=case.get("num_layers", 1),
        bidirectional=case.get("bidirectional", False),
        proj_size=case.get("proj_size"),
        use_bias=case.get("bias", True),
        param_dtype=jnp.float64,
        implementation=implementation,
        **cell_options,
    )
    gradient = {key.removeprefix("grad."): value for key, value in arrays.items() if key.startswith("grad.")}
    lengths = np.array(torch_cases.LENGTHS) if case.get("packed") else None

    def to_params(state_dict):
        return from_torch(lstm, state_dict, prefix="")

    assert_parity(lstm, to_params, arrays, gradient, arrays, num_biases=2, lengths=lengths)


@pytest.mark.parametrize("name", DEFAULT_CASES)
def test_lstm_matches_recorded_torch(name):
    assert_parity_with_torch(name, load_recorded(name), None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["fused", "scan"])
@pytest.mark.parametrize("name", torch_cases.CASES)
def test_implementations_match_recorded_torch(name, implementation):
    assert_parity_with_torch(name, load_recorded(name), implementation)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", torch_cases.CASES)
def test_lstm_matches_installed_torch(name):
    arrays, recorded = torch_cases.compute(name), load_recorded(name)
    assert_parity_with_torch(name, arrays, None)
    assert arrays.keys() == recorded.keys()
    for key, value in arrays.items():
        np.testing.assert_allclose(value, recorded[key], rtol=1e-10, atol=1e-12)
