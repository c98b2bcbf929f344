"""Experimental backends: none has been shown to be faster than the default on the accelerators it is meant for.

- `jaxlstm.experimental.associative`: exact and parallel in time, for cells that are affine in their state. Run on
  CPUs only, where minLSTM is faster than with ``"fused"`` at the four measured shapes.
- `jaxlstm.experimental.newton`: parallel in time by Newton's method. Correct on every platform that runs JAX; run on
  CPUs only, where it is slower than ``"fused"`` at every measured shape. `jaxlstm.experimental.newton_stats` reports
  its iterations.
- `jaxlstm.experimental.cudnn`: cuDNN's LSTM. Never run on a GPU; checked on a CPU against JAX's reference
  implementation, and lowered for CUDA.
- `jaxlstm.experimental.pallas`: Pallas kernels for TPUs and NVIDIA GPUs. Never run on this hardware; their numbers were
  checked in an interpreter.

Nothing in the library imports this package: `jaxlstm.recurrence.backends` loads a backend when it is first named.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlstm.experimental import associative as associative
    from jaxlstm.experimental import cudnn as cudnn
    from jaxlstm.experimental import newton as newton
    from jaxlstm.experimental import newton_stats as newton_stats
    from jaxlstm.experimental import pallas as pallas

__all__ = ["associative", "cudnn", "newton", "newton_stats", "pallas"]


def __getattr__(name: str) -> Any:
    """Imports a backend when it is first used."""
    if name in __all__:
        return importlib.import_module(f"jaxlstm.experimental.{name}")
    raise AttributeError(f"module 'jaxlstm.experimental' has no attribute {name!r}")
