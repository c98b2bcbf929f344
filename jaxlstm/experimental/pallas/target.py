"""The chip that kernels are compiled for: the one JAX runs on, or another one for tests and for cross-compilation."""

from typing import Any, NamedTuple

import jax

INTERPRET = "interpret"
kernel_target = jax.make_user_context(default_value=None)
"""Context manager that sets the target of kernels; None, the default, is the TPU or GPU that JAX runs on.

Within ``kernel_target(INTERPRET)`` a TPU kernel is interpreted, slowly, on any backend; this checks its numbers.
Within ``kernel_target(chip)``, a `jax.experimental.pallas.tpu.ChipVersion`, it is lowered for that chip from any host.
``kernel_target(GpuTarget())`` lowers for a Hopper GPU, and ``kernel_target(GpuTarget(params))`` interprets the kernel.
"""


class GpuTarget(NamedTuple):
    """A GPU of compute capability 9."""

    interpret_params: Any = None  # a `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`; None compiles
    num_sms: int = 132  # streaming multiprocessors: 132 in an H100 SXM, 114 in an H100 PCIe


def runs_here() -> bool:
    """Returns whether kernels are compiled for, and run on, the TPU or GPU that JAX runs on."""
    return kernel_target.value is None


def is_gpu() -> bool:
    """Returns whether kernels are compiled for a GPU."""
    target = kernel_target.value
    return isinstance(target, GpuTarget) or (target is None and jax.default_backend() == "gpu")


def gpu_interpret_params() -> Any:
    """Returns the parameters of the GPU interpreter, or False if GPU kernels are compiled."""
    target = kernel_target.value
    return (isinstance(target, GpuTarget) and target.interpret_params) or False


def num_sms() -> int:
    """Returns the number of streaming multiprocessors of the target GPU."""
    target = kernel_target.value
    return target.num_sms if isinstance(target, GpuTarget) else jax.devices()[0].core_count


def tpu_info() -> Any:
    """Returns the `jax.experimental.pallas.tpu.TpuInfo` of the target; None if TPU kernels are interpreted.

    Raises:
      ValueError: if there is no TPU.
    """
    from jax.experimental.pallas import tpu

    if kernel_target.value == INTERPRET:
        return None
    if kernel_target.value is not None:
        return tpu.get_tpu_info_for_chip(kernel_target.value, 1)
    if jax.default_backend() != "tpu":
        raise ValueError(
            f"implementation='pallas' is a kernel for TPUs and Hopper GPUs, got the backend {jax.default_backend()!r}; "
            "'fused' and 'scan' run on every backend"
        )
    return tpu.get_tpu_info()
