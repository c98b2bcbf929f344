"""Times functions in interleaved rounds within one process."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import load_torch

PAUSE_SECONDS = 0.02  # before each call: threads of the library called last may spin for a while before they sleep


def time_interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the median and the quartiles of each call, in milliseconds.

    Every round times every call once. The order rotates from round to round and is reversed in every other round, so
    that no call always follows the same one. The caller warms up: each call has compiled and run before.

    Args:
      calls: functions by name; each returns after its result has been computed.
      rounds: number of times each function is called.

    Returns:
      ``median_ms``, ``q1_ms`` and ``q3_ms`` by name.

    Raises:
      ValueError: if ``rounds`` is below 1.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for n in range(check_rounds(rounds)):
            order = names[n % len(names) :] + names[: n % len(names)]
            for name in order[::-1] if n % 2 else order:
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter()
                result = calls[name]()
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
                del result  # outside the timed region
    finally:
        gc.enable()
    return {name: _quartiles(times) for name, times in milliseconds.items()}


def _quartiles(times: list[float]) -> dict[str, float]:
    values = np.percentile(times, (50, 25, 75))
    return {name: round(float(v), 4) for name, v in zip(("median_ms", "q1_ms", "q3_ms"), values)}


def check_rounds(rounds: int) -> int:
    """Returns ``rounds``.

    Raises:
      ValueError: if ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return rounds


def matmul_gflops(rounds: int, size: int) -> dict[str, Any]:
    """Returns the GFLOP/s of a square float32 matrix product in XLA and, if it is installed, in PyTorch.

    Args:
      rounds: number of times each product is timed.
      size: rows and columns of the matrices.
    """
    a = jax.random.normal(jax.random.key(0), (size, size))
    matmul = jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {"xla": lambda: jax.block_until_ready(matmul(a, a))}
    try:
        torch, device, synchronize = load_torch()
    except ImportError:
        pass
    else:
        b = torch.randn(size, size, device=device)
        calls["torch"] = lambda: (b @ b, synchronize())
    for call in calls.values():
        call()
    times = time_interleaved(calls, rounds)
    return {"size": size, **{f"{name}_gflops": round(2e-6 * size**3 / t["median_ms"], 1) for name, t in times.items()}}
