"""Parity with the sLSTM layer of the package xlstm: from recorded vectors, and live where it is installed."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xlstm_cases
from framework_parity import assert_close, outputs_and_gradients

import jaxlstm
from jaxlstm.interop import from_xlstm, to_xlstm

RECORDED = np.load(xlstm_cases.RECORDED)
KERNEL, BIAS = "slstm_cell._recurrent_kernel_", "slstm_cell._bias_"
WEIGHTS = ("fgate.weight", "igate.weight", "zgate.weight", "ogate.weight", KERNEL, BIAS)
needs_xlstm = pytest.mark.skipif(importlib.util.find_spec("xlstm") is None, reason="xlstm is not installed")


def load_recorded(name):
    return {key.split("/")[1]: RECORDED[key] for key in RECORDED.files if key.startswith(f"{name}/")}


def network(heads=2, **options):
    size = xlstm_cases.HIDDEN
    return jaxlstm.RNN(
        **{"input_size": size, "hidden_size": size, "cell": "slstm", "heads": heads, "param_dtype": "float64"} | options
    )


def weights_of(arrays, backend="vanilla"):
    """Returns the ``state_dict`` of the layer with this backend."""
    weights = {name: arrays[name] for name in WEIGHTS}
    if backend == "cuda":
        weights |= {KERNEL: arrays["cuda._recurrent_kernel_"], BIAS: arrays["cuda._bias_"]}
    return weights


HEADS = load_recorded("heads")
LAYER = weights_of(HEADS)
THREE_HEADS = network(3)


def state_of(arrays, form):
    """Returns a state whose arrays have names of this form, such as ``grad.{}0``."""
    return jaxlstm.State(arrays[form.format("h")], {name: arrays[form.format(name)] for name in "cnm"})


def assert_parity_with_xlstm(name, arrays, implementation=None):
    lstm = network(xlstm_cases.CASES[name]["num_heads"], implementation=implementation)
    with_state = "h0" in arrays
    state = state_of(arrays, "{}0") if with_state else lstm.initial_state((xlstm_cases.BATCH,))
    cotangents = arrays["dys"], state_of(arrays, "d{}")
    params = from_xlstm(lstm, weights_of(arrays))
    outputs, (gradient, xs_gradient, state_gradient) = outputs_and_gradients(
        lstm, params, arrays["xs"], state, None, cotangents
    )
    assert_close(outputs, (arrays["ys"], state_of(arrays, "{}")))
    # The dense W_x has a gradient outside the blocks, too, which the layer does not have.
    (layer,) = gradient.layers
    w_x = layer.forward.w_x * (np.asarray(params.layers[0].forward.w_x) != 0).astype(np.float64)
    gradient = jaxlstm.Params((jaxlstm.Layer(layer.forward._replace(w_x=w_x)),))
    expected = from_xlstm(lstm, {name: arrays[f"grad.{name}"] for name in WEIGHTS})
    assert_close((gradient, xs_gradient), (expected, arrays["grad.xs"]))
    if with_state:
        assert_close(state_gradient, state_of(arrays, "grad.{}0"))
    else:
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(state_gradient))


@pytest.mark.parametrize("name", ["heads", "from a state"])
def test_slstm_matches_recorded_xlstm(name):
    assert_parity_with_xlstm(name, load_recorded(name))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["fused", "scan"])
@pytest.mark.parametrize("name", xlstm_cases.CASES)
def test_implementations_match_recorded_xlstm(name, implementation):
    assert_parity_with_xlstm(name, load_recorded(name), implementation)


@pytest.mark.slow
@needs_xlstm
@pytest.mark.parametrize("name", xlstm_cases.CASES)
def test_slstm_matches_installed_xlstm(name):
    arrays, recorded = xlstm_cases.compute(name), load_recorded(name)
    assert_parity_with_xlstm(name, arrays)
    assert arrays.keys() == recorded.keys()
    for key, value in arrays.items():
        np.testing.assert_allclose(value, recorded[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", xlstm_cases.CASES)
def test_xlstm_weights_of_both_backends_round_trip(name):
    arrays, lstm = load_recorded(name), network(xlstm_cases.CASES[name]["num_heads"])
    params = from_xlstm(lstm, weights_of(arrays))
    for backend in ("vanilla", "cuda"):
        weights = weights_of(arrays, backend)
        jax.tree.map(np.testing.assert_array_equal, from_xlstm(lstm, weights), params)
        written = to_xlstm(lstm, params, backend)
        assert sorted(written) == sorted(weights)
        for key, array in weights.items():
            np.testing.assert_array_equal(written[key], array)
            assert written[key].shape == array.shape
    jax.tree.map(np.testing.assert_array_equal, from_xlstm(lstm, to_xlstm(lstm, params)), params)


def test_from_xlstm_finds_the_layer_by_prefix():
    other_arrays = {"token_embedding.weight": np.zeros(3), "blocks.1.xlstm.group_norm.weight": np.zeros(6)}
    model = other_arrays | {f"blocks.1.xlstm.{name}": array for name, array in LAYER.items()}
    params = from_xlstm(THREE_HEADS, LAYER)
    jax.tree.map(np.testing.assert_array_equal, from_xlstm(THREE_HEADS, model), params)
    two = model | {f"blocks.3.xlstm.{name}": 2 * array for name, array in LAYER.items()}
    message = "state_dict has 2 sLSTM layers; choose one with prefix=: 'blocks.1.xlstm.', 'blocks.3.xlstm.'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_xlstm(THREE_HEADS, two)
    jax.tree.map(np.testing.assert_array_equal, from_xlstm(THREE_HEADS, two, prefix="blocks.1.xlstm"), params)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, ValueError, "state_dict has no sLSTM layer: no name ends in 'slstm_cell._recurrent_kernel_'"),
        ([], TypeError, "state_dict must be a mapping of names to arrays, got list"),
        (
            LAYER | {"conv1d.conv.weight": np.zeros((6, 1, 4))},
            ValueError,
            "xlstm weight 'conv1d.conv.weight' is of a convolution of the inputs of gates i and f, which the cell does "
            "not have; expected a layer with conv1d_kernel_size=0",
        ),
        (
            {name: array for name, array in LAYER.items() if name != "zgate.weight"},
            ValueError,
            "xlstm weight 'zgate.weight' of shape [3, 2, 2] is missing",
        ),
        (
            LAYER | {"igate.bias": np.zeros(6)},
            ValueError,
            "xlstm weight 'igate.bias' is not part of this network, got float64[6]",
        ),
        (
            LAYER | {KERNEL: np.zeros((3, 8, 3))},
            ValueError,
            "xlstm weight 'slstm_cell._recurrent_kernel_' must have shape [3, 8, 2], got [3, 8, 3]",
        ),
    ],
)
def test_from_xlstm_names_a_wrong_array(weights, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        from_xlstm(THREE_HEADS, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "lstm", "heads": 1}, "cell='lstm'"),
        ({"cell": "gru"}, "cell='gru'"),
        ({"num_layers": 2}, "num_layers=2"),
        ({"bidirectional": True}, "bidirectional=True"),
        ({"input_size": 5}, "input_size=5"),
        ({"use_bias": False}, "use_bias=False"),
        ({"layer_norm": True}, "layer_norm=True"),
    ],
)
def test_xlstm_rejects_unsupported_options(options, message):
    lstm = network(**options)
    params = lstm.init(jax.random.key(0))
    for convert, value in ((to_xlstm, params), (from_xlstm, LAYER)):
        with pytest.raises(ValueError, match=f"^xlstm weights do not support {re.escape(message)}$"):
            convert(lstm, value)


def test_to_xlstm_rejects_input_weights_outside_the_blocks():
    params = from_xlstm(THREE_HEADS, LAYER)
    weights = params.layers[0].forward
    w_x = jnp.asarray(weights.w_x).at[xlstm_cases.HIDDEN, 2].set(1.0)  # the first unit of f reads the second head
    params = jaxlstm.Params((jaxlstm.Layer(weights._replace(w_x=w_x)),))
    message = (
        "xlstm weights need block-diagonal input weights with heads=3, got other elements than zero outside the blocks "
        "of gate f in w_x"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_xlstm(THREE_HEADS, params)
    with pytest.raises(ValueError, match=r"^backend must be one of 'vanilla', 'cuda'; got 'triton'$"):
        to_xlstm(THREE_HEADS, params, backend="triton")
