"""Training on several devices and hosts: the device mesh and the sharding of every array.

The mesh has two axes: the batch is split over ``data``, the hidden units over ``model``. All processes run the same
program; each puts its own part of a batch on its own devices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")
MAX_CPU_DEVICES = 1024  # of one process; the time to create them grows with their number
SPLIT_BY_UNITS = ("w_x", "w_h", "b")  # of a recurrent layer; their leading axis holds gates times hidden units


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axis sizes of a mesh from text such as ``data=4,model=2``.

    Raises:
      ValueError: if the text has another form.
    """
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in parts}
    known = set(sizes) <= set(AXES) and len(parts) == len(sizes)
    if not known or not all(size.isdecimal() and int(size) for size in sizes.values()):
        raise ValueError(f"--mesh takes axes and sizes such as data=4,model=2, got {text!r}")
    return {name: int(sizes.get(name, 1)) for name in AXES}


def initialize_devices(mesh: str | None, processes: int) -> Mesh | None:
    """Returns the device mesh; must be called before anything else uses a device, with the processes connected.

    On CPUs it creates as many devices as the mesh needs.

    Args:
      mesh: axes and sizes such as ``data=4,model=2``; None for a single device.
      processes: number of processes.

    Returns:
      The mesh, or None for a single device.

    Raises:
      ValueError: if there are fewer devices than the mesh needs, or the processes cannot share them out evenly.
    """
    sizes = parse_mesh(mesh) if mesh else dict.fromkeys(AXES, 1)
    needed = math.prod(sizes.values())
    if needed % processes:
        raise ValueError(f"--mesh {mesh} needs {needed} devices, which {processes} processes cannot share out evenly")
    if needed // processes > MAX_CPU_DEVICES:
        raise ValueError(
            f"--mesh {mesh} needs {needed // processes:,} devices per process, expected at most {MAX_CPU_DEVICES:,}"
        )
    if mesh:
        jax.config.update("jax_num_cpu_devices", needed // processes)
    if needed > len(jax.devices()):
        raise ValueError(f"--mesh {mesh} needs {needed} devices, got {len(jax.devices())}")
    if not mesh:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:needed])


def place_batch(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Returns a function that puts a batch on the devices.

    Arrays ``(T, B, ...)`` and ``(B,)`` are split over ``data`` along B; scalars are replicated.
    """
    if mesh is None:
        return jax.device_put

    def place(a: Any) -> jax.Array:
        a = np.asarray(a)
        spec = PartitionSpec(*[None] * min(a.ndim - 1, 1), "data") if a.ndim else PartitionSpec()
        # Each process reads only the rows on its devices.
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda index: a[index])

    return lambda batch: jax.tree.map(place, batch)


def place_state(mesh: Mesh | None, state: Any) -> Any:
    """Returns a training state placed on the mesh.

    Recurrent weights, and the optimizer's moments of them, are split over ``model``; the recurrent state over both
    axes; everything else is replicated, also arrays that do not divide evenly.
    """
    if mesh is None:
        return state

    def place(path: Any, a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):  # as integers: keys cannot be sent to other processes
            return jax.random.wrap_key_data(place(path, jax.random.key_data(a)), impl=jax.random.key_impl(a))
        return jax.device_put(np.asarray(a), NamedSharding(mesh, _state_spec(mesh, path, a.shape)))

    return jax.tree.map_with_path(place, state)


def _state_spec(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the partitioning of one array of a training state."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    if names[0] == "carry":
        spec = PartitionSpec(None, "data", "model")
    elif "lstm" in names and names[-1] in SPLIT_BY_UNITS:
        spec = PartitionSpec("model")
    else:
        return PartitionSpec()
    divisible = all(name is None or size % mesh.shape[name] == 0 for size, name in zip(shape, spec))
    return spec if divisible else PartitionSpec()


def state_sharding(mesh: Mesh | None, state: Any) -> Any:
    """Returns the sharding of every array of a placed state; None for a single device."""
    return None if mesh is None else jax.tree.map(lambda a: a.sharding, state)


def gather_to_host(tree: Any) -> Any:
    """Returns arrays that every process can read whole; arrays on a single device are returned unchanged."""
    if all(len(a.sharding.device_set) == 1 for a in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() == 1:
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), tree)
    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(tree, tiled=True))


def sync_stop(seconds: float, signal: int) -> tuple[float, int]:
    """Returns the clock of the slowest process and the signal that any process received, the same in all of them."""
    if jax.process_count() == 1:
        return seconds, signal
    values = multihost_utils.process_allgather(np.array([seconds, signal], np.float32))
    return float(values[:, 0].max()), int(values[:, 1].max())
