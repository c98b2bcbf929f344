"""Experimental backends: none has been shown to be faster than the default on the hardware it is meant for.

- `jaxlstm.experimental.newton`: parallel in time by Newton's method. Correct on every platform that runs JAX; run on
  CPUs only, where it is slower than ``"fused"`` at every measured shape. `jaxlstm.experimental.newton_stats` reports
  its iterations.
- `jaxlstm.experimental.cudnn`: cuDNN's LSTM. Never run on a GPU; checked on a CPU against JAX's reference
  implementation, and lowered for CUDA.
- `jaxlstm.experimental.pallas`: Pallas kernels for TPUs and NVIDIA GPUs. Never run on this hardware; their numbers were
  checked in an interpreter.

Nothing in the library imports this package: `jaxlstm.recurrence.backends` loads a backend when it is first named.
"""
