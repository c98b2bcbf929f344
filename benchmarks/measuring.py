"""How it is measured: interleaved, in one process; and on what."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import pytorch

import jaxlstm

PAUSE = 0.02  # seconds before each call: threads of the last library may spin for a while before they sleep
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "dm-haiku", "equinox", "keras", "torch")


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles, in milliseconds, of each call.

    All have run before. Each round times each call once; the order rotates, and turns round every other round, so that
    nobody always follows the same neighbour.

    Args:
      calls: each returns when its result is there.
      rounds: number of times each is called.

    Returns:
      by name, ``median_ms``, ``q1_ms`` and ``q3_ms``.

    Raises:
      ValueError: if there are no rounds.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for n in range(at_least_one(rounds)):
            order = names[n % len(names) :] + names[: n % len(names)]
            for name in order[::-1] if n % 2 else order:
                time.sleep(PAUSE)
                began = time.perf_counter()
                result = calls[name]()
                milliseconds[name].append(1e3 * (time.perf_counter() - began))
                del result  # freeing it is not part of the call
    finally:
        gc.enable()
    return {name: _quartiles(times) for name, times in milliseconds.items()}


def _quartiles(times: list[float]) -> dict[str, float]:
    values = np.percentile(times, (50, 25, 75))
    return {name: round(float(v), 4) for name, v in zip(("median_ms", "q1_ms", "q3_ms"), values)}


def at_least_one(rounds: int) -> int:
    """Rounds to be measured.

    Raises:
      ValueError: if there are none.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return rounds


def ceiling(rounds: int, size: int) -> dict[str, Any]:
    """GFLOP/s of a large square float32 product in XLA and, where installed, in PyTorch."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {"xla": lambda: jax.block_until_ready(product(a, a))}
    try:
        torch, device, synchronize = pytorch()
    except ImportError:
        pass
    else:
        b = torch.randn(size, size, device=device)
        calls["torch"] = lambda: (b @ b, synchronize())
    for call in calls.values():
        call()
    times = interleaved(calls, rounds)
    return {"size": size, **{f"{name}_gflops": round(2e-6 * size**3 / t["median_ms"], 1) for name, t in times.items()}}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "versions": {"jaxlstm": jaxlstm.__version__, **versions},
    }


def slug() -> str:
    """A name for this machine's files: ``cpu-2core``, or that of the accelerator."""
    if jax.default_backend() == "cpu":
        return f"cpu-{os.cpu_count()}core"
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not every system has it
        return None
