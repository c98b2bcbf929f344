"""Strict JAX for every test: float64 available, no silent promotion of dtypes or ranks, shapes checked at run time."""

import os

# Hundreds of small programs are compiled here and run once or twice: LLVM's optimisation would take most of the time.
# The tests that start the command itself run it as users do, without this.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked where arrays are already validated. `jaxlstm.lstm` is left out: its own errors on
# wrong input are the ones to be tested.
CHECKED = ["cells", "dropout", "initializers", "primitives", "recurrence", "experimental", "training"]
install_import_hook([f"jaxlstm.{name}" for name in CHECKED], "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # what runs over devices is tested on two
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_interpreted():
    """There is no TPU here: `implementation="pallas"` is carried out operation by operation."""
    from jaxlstm.experimental.pallas import mosaic_tpu_scan

    with mosaic_tpu_scan.making_for(mosaic_tpu_scan.INTERPRET):
        yield


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="every test with every implementation: an hour or more")


def pytest_collection_modifyitems(config, items):
    """Leave out most of what heavy implementations would do, see `cases.HEAVY`."""
    import cases

    if config.getoption("--every-case"):
        return

    def stays(item):
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if values.get("implementation") not in cases.HEAVY:
            return True
        return values.get("configuration") in cases.OF_HEAVY and values.get("inputs", "everything") == "everything"

    left_out = [item for item in items if not stays(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if stays(item)]
