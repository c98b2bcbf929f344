"""Describes the machine and the package versions that a result depends on."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jaxlstm

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "dm-haiku", "equinox", "keras", "torch")


def describe_machine() -> dict[str, Any]:
    """Returns processor, memory, system, JAX backend and package versions; None for a package not installed."""
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


def machine_slug() -> str:
    """Returns the name of the folder of this machine's results: ``amd-epyc-2core``, or the name of the accelerator."""
    if jax.default_backend() == "cpu":
        model = re.sub(r"\((r|tm)\)", "", _cpu_model().lower())
        return _slug(f"{model} {os.cpu_count()}core")
    return _slug(jax.devices()[0].device_kind.lower())


def jax_slug() -> str:
    """Returns the end of the name of a file whose results depend on the version of JAX, such as ``jax-0.12``."""
    return f"jax-{'.'.join(jax.__version__.split('.')[:2])}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


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
    except (AttributeError, OSError, ValueError):  # sysconf lacks these names on some systems
        return None
