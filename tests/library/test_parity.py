"""The backends of the default tier against the float64 NumPy oracle: outputs, final state and every gradient."""

import cases
import jax.numpy as jnp
import parity
import pytest

from jaxlstm.cells import CELLS, RNN
from jaxlstm.recurrence.scan import Scan

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


CONCATENATED = Scan(concatenate=True)
FEW = ("learned state", "peephole bidirectional projection", "recurrent dropout", "rnn")  # in the default tier


def is_one_product(options):
    """Whether all gates read x and h, through a dense matrix."""
    cell = CELLS.get(options.get("cell", "lstm"), RNN["tanh"])
    return cell.reads_x_and_h and cell.recurrent == "dense" and "heads" not in options


@pytest.mark.parametrize(
    "configuration",
    [
        *FEW,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name, options in cases.CONFIGURATIONS.items()
            if name not in FEW and not options.get("layer_norm") and is_one_product(options)
        ),
    ],
)
def test_concatenated_scan_equals_oracle(configuration):
    parity.check_outputs_and_gradients(configuration, "everything", CONCATENATED)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_concatenated_scan_in_narrow_dtypes_equals_oracle(dtype):
    parity.check_narrow_dtype("learned state", dtype, CONCATENATED)


@pytest.mark.slow
def test_concatenated_scan_vmap_equals_batch():
    parity.check_vmap(CONCATENATED)
