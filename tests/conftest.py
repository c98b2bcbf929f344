"""Strict JAX for every test: float64 available, no silent promotion of dtypes or ranks."""

import gc
import os
from importlib.metadata import version

# Hundreds of small programs are compiled here and run once or twice: compiling would take most of the time. The tests
# that start the command itself run it as users do, without these flags.
flags = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"  # compiles in half the time; later versions have no such flag
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked where arrays are already validated. `jaxlstm.lstm` is left out: its own errors on
# wrong input are the ones to be tested.
CHECKED = ["cells", "dropout", "initializers", "primitives", "recurrence", "experimental", "training"]

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # tests of sharding use two devices
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


gc.set_threshold(50_000, 20, 100)  # tracing makes many objects and few cycles


def pytest_configure(config):
    """Checks shapes and types in calls; not in the default tier, where the checks would take a third of the time."""
    if config.option.markexpr != "not slow":
        install_import_hook([f"jaxlstm.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _interpret_kernels():
    """Without a TPU, `implementation="pallas"` runs in Pallas's interpreter."""
    from jaxlstm.experimental.pallas.target import INTERPRET, kernel_target

    with kernel_target(INTERPRET):
        yield
