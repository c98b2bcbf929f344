"""The fused backend in the layout for GPUs, run on a CPU: the same numbers, and a loop without needless operations."""

import cases
import jax
import jax.numpy as jnp
import parity
import pytest

import jaxlstm
from jaxlstm.recurrence.fused import Fused

pytestmark = pytest.mark.slow  # clearing the caches makes other tests compile again
CONFIGURATIONS = (
    "one layer",
    "bidirectional",
    "projection",
    "peephole bidirectional projection",
    "rnn",
    "unroll",
    "gru",
    "learned state",
)


@pytest.fixture
def gpu_layout(monkeypatch):
    """Makes the fused backend choose the layout for GPUs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    yield Fused(chunk_size=3)  # another key of the cache of compiled programs than the backend of other tests
    jax.clear_caches()


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if name in cases.CONFIGURATIONS])
def test_outputs_and_gradients_equal_oracle(configuration, gpu_layout):
    parity.check_outputs_and_gradients(configuration, "everything", gpu_layout)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes_equal_oracle(dtype, gpu_layout):
    parity.check_narrow_dtype("learned state", dtype, gpu_layout)


def test_higher_derivatives_and_vmap_equal_oracle(gpu_layout):
    parity.check_higher_derivatives("one layer", gpu_layout)
    parity.check_vmap(gpu_layout)


def test_step_rounds_h_once_and_transposes_nothing(gpu_layout):
    """The product reads the h that the step before rounded, and its result is added by the kernel of the gates."""
    lstm = jaxlstm.LSTM(3, 4, dtype=jnp.bfloat16, implementation=gpu_layout)
    shapes = lstm.param_shapes(), jax.ShapeDtypeStruct((6, 2, 3), jnp.float32)
    program = jax.make_jaxpr(lambda params, xs: lstm(params, xs)[0])(*shapes)
    (loop,) = [each for each in cases.equations(program.jaxpr) if each.primitive.name == "scan"]
    step = [each.primitive.name for each in cases.equations(loop.params["jaxpr"].jaxpr)]
    assert step.count("convert_element_type") == 1
    assert step.count("optimization_barrier") == 1
    assert "transpose" not in step
