"""The backends of the default tier against the float64 NumPy oracle: outputs, final state and every gradient."""

import cases
import jax.numpy as jnp
import parity
import pytest

every_backend = pytest.mark.parametrize("implementation", cases.BACKENDS)


@every_backend
@pytest.mark.parametrize(("configuration", "inputs"), cases.TABLE)
def test_outputs_and_gradients_equal_oracle(configuration, inputs, implementation):
    parity.check_outputs_and_gradients(configuration, inputs, implementation)


@every_backend
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("configuration", ["learned state", "rnn"])
def test_narrow_dtypes_equal_oracle(configuration, dtype, implementation):
    parity.check_narrow_dtype(configuration, dtype, implementation)


@every_backend
@pytest.mark.parametrize("batch", [(), (1,), (2, 2), (1, 2, 2)])
def test_batch_axes_equal_oracle(batch, implementation):
    parity.check_batch_axes(batch, implementation)


@every_backend
@pytest.mark.parametrize(
    "configuration", ["projection", "rnn", pytest.param("all options of a layer", marks=pytest.mark.slow)]
)
def test_higher_derivatives_equal_oracle(configuration, implementation):
    parity.check_higher_derivatives(configuration, implementation)


@every_backend
def test_vmap_equals_batch(implementation):
    parity.check_vmap(implementation)
