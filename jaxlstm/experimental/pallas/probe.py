"""A check of the compiled kernels on the device, once per process, before they run for the first time.

The kernels were written without the hardware that they are for. Each kind of kernel therefore computes a small layer
first, and outputs, final states and gradients are compared with `jaxlstm.recurrence.scan`.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm.autotuning.agreement import relative_error, tolerance
from jaxlstm.errors import first_line
from jaxlstm.experimental.pallas import target
from jaxlstm.lstm import LSTM
from jaxlstm.recurrence.context import Backend, only_traced

STEPS, BATCH, INPUTS = 5, 17, 3  # 17 rows: a second group of blocks, which is not full
UNITS = {None: 128, "cluster": 128, "grid": 400}  # by `KernelConfig.weights_sharing`, each for several blocks on a GPU


def require_correct(run_kernels: Backend, weights_sharing: str | None, dtype: jnp.dtype) -> None:
    """Raises an error if a kernel that was compiled for this device does not agree with `scan`.

    The check runs once per process, kind of device, kernel and dtype; also while a call is traced. It does not run for
    kernels that are interpreted or compiled for another device, and not within `jaxlstm.recurrence.explain`.

    Args:
      run_kernels: the backend without this check.
      weights_sharing: which kernel; a field of `jaxlstm.experimental.pallas.step.KernelConfig`.
      dtype: dtype of matrix products.

    Raises:
      RuntimeError: if the results differ by more than rounding, or if the kernel fails.
    """
    if not target.runs_here() or only_traced.value:
        return
    device = jax.local_devices()[0].device_kind
    failure = _find_failure(run_kernels, device, weights_sharing, jnp.dtype(dtype))
    if failure is not None:
        raise RuntimeError(
            f"implementation='pallas' was not run: its kernel in {jnp.dtype(dtype)} for this {device} {failure}; "
            "use implementation='fused', which runs on every device"
        )


@cache
def _find_failure(run_kernels: Backend, device: str, weights_sharing: str | None, dtype: jnp.dtype) -> str | None:
    """Runs the kernel and returns what is wrong with it, or None; ``device`` is part of the key."""
    del device
    try:
        error, bound = _outside_of_tracing(lambda: _compare(run_kernels, weights_sharing, dtype))
    except Exception as failure:  # of the compiler or the device
        return f"failed in a check at a small size: {type(failure).__name__}: {first_line(failure)}"
    if error <= bound:
        return None
    return f"differs from 'scan' at a small size by {error:.1e} of the largest number, expected at most {bound:.1e}"


def _outside_of_tracing(function: Callable[[], Any]) -> Any:
    """Returns the result of a function in a thread of its own.

    JAX's state of tracing, its meshes and its manual axes belong to a thread: in a new one programs run, whatever the
    caller is traced for.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    kernel_target = target.kernel_target.value

    def run() -> None:
        try:
            with target.kernel_target(kernel_target):
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="jaxlstm-pallas-probe")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _compare(run_kernels: Backend, weights_sharing: str | None, dtype: jnp.dtype) -> tuple[float, float]:
    """Returns the largest relative error of the kernels, and its bound."""
    units = UNITS[weights_sharing]
    lstm = LSTM(INPUTS, units, dtype=dtype, param_dtype=jnp.float32, implementation=run_kernels)
    reference = LSTM(INPUTS, units, param_dtype=jnp.float32, implementation="scan")
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    params = jax.tree.map(lambda a: draw(a.shape, a.shape[-1] ** -0.5), lstm.param_shapes())
    state = jax.tree.map(lambda a: draw(a.shape), lstm.state_shapes((BATCH,)))
    args = params, draw((STEPS, BATCH, INPUTS)), state
    mask, resets = rng.random((STEPS, BATCH)) < 0.7, rng.random((STEPS, BATCH)) < 0.3
    cotangent = draw((STEPS, BATCH, units))

    def results(lstm: LSTM, args: Any) -> Any:
        def loss(*args: Any) -> Any:
            ys, state = lstm(*args, mask=mask, resets=resets)
            return (ys.astype(jnp.float32) * cotangent).sum(), (ys, state)

        gradients, masked = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
        return lstm(*args), masked, gradients

    actual = jax.device_get(jax.jit(lambda args: results(lstm, args))(args))
    with jax.default_matmul_precision("highest"):
        expected = jax.device_get(jax.jit(lambda args: results(reference, args))(args))
    return relative_error(actual, expected), tolerance(lstm, (STEPS, BATCH, INPUTS))
