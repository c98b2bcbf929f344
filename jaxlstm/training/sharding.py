"""Training over many devices and many hosts: the mesh, and where every array lies on it.

The batch lies over the axis ``data`` of the mesh, the hidden units over ``model``. All processes run the same program;
each puts its own rows of a batch on its own devices.
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
AUTO = "auto"  # in place of the address of the first process
BY_ROWS = ("w_x", "w_h", "b")  # of a recurrent layer: the leading axis counts gates and units


def axes(text: str) -> dict[str, int]:
    """The axes of a mesh from text such as ``data=4,model=2``.

    Raises:
      ValueError: if it is anything else.
    """
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in parts}
    if (
        not set(sizes) <= set(AXES)
        or len(parts) != len(sizes)
        or not all(s.isdecimal() and int(s) for s in sizes.values())
    ):
        raise ValueError(f"--mesh takes axes and sizes such as data=4,model=2, got {text!r}")
    return {name: int(sizes.get(name, 1)) for name in AXES}


def begin(text: str | None, coordinator: str | None, processes: int, process: int) -> Mesh | None:
    """The mesh that ``--mesh`` describes, None for a single device; before anything else has touched a device.

    On CPUs there are as many devices as the mesh needs.

    Args:
      text: such as ``data=4,model=2``.
      coordinator: address and port of the first process, for more than one; ``"auto"`` where a cluster that JAX knows
        has started the processes: it is asked for the address, their number and which of them this is.
      processes: number of processes; with ``"auto"`` needed on CPUs only.
      process: which of them this is; not used with ``"auto"``.

    Raises:
      ValueError: if there are not as many devices as the mesh needs.
    """
    sizes = axes(text) if text else dict.fromkeys(AXES, 1)
    needed = math.prod(sizes.values())
    if needed % processes:
        raise ValueError(f"--mesh {text} needs {needed} devices, which {processes} processes cannot share out evenly")
    if text:
        jax.config.update("jax_num_cpu_devices", needed // processes)
    if coordinator == AUTO:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"--coordinator {AUTO} finds no cluster that JAX knows: {reason}") from None
    elif processes > 1:
        if coordinator is None:
            raise ValueError(f"--processes {processes} needs --coordinator HOST:PORT, the address of the first of them")
        jax.distributed.initialize(coordinator, processes, process)
    if needed > len(jax.devices()):
        raise ValueError(f"--mesh {text} needs {needed} devices, got {len(jax.devices())}")
    if not text:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:needed])


def place_batch(mesh: Mesh | None) -> Callable[[Any], Any]:
    """A function that puts a batch on the devices: the axis behind time, or that of a vector, is that of the rows."""
    if mesh is None:
        return jax.device_put

    def place(a: Any) -> jax.Array:
        a = np.asarray(a)
        spec = PartitionSpec(*[None] * min(a.ndim - 1, 1), "data") if a.ndim else PartitionSpec()
        # Each process reads the rows that its devices hold, and no others.
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda index: a[index])

    return lambda batch: jax.tree.map(place, batch)


def place_state(mesh: Mesh | None, state: Any) -> Any:
    """A training state on the mesh.

    The rows of recurrent weights, and what the optimiser keeps of them, lie over ``model``; the recurrent state over
    both axes; all else on every device.
    """
    if mesh is None:
        return state

    def spec(path: Any, a: Any) -> PartitionSpec:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if names[0] == "carry":
            wanted = PartitionSpec(None, "data", "model")
        elif "lstm" in names and names[-1] in BY_ROWS:
            wanted = PartitionSpec("model")
        else:
            return PartitionSpec()
        even = all(name is None or size % mesh.shape[name] == 0 for size, name in zip(a.shape, wanted))
        return wanted if even else PartitionSpec()

    def put(path: Any, a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):  # its integers, since keys do not go to other processes
            return jax.random.wrap_key_data(put(path, jax.random.key_data(a)), impl=jax.random.key_impl(a))
        return jax.device_put(np.asarray(a), NamedSharding(mesh, spec(path, a)))

    return jax.tree_util.tree_map_with_path(put, state)


def everywhere(tree: Any) -> Any:
    """Arrays as every process can read them: as they are on one device, and gathered from a mesh."""
    if all(len(a.sharding.device_set) == 1 for a in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() == 1:
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), tree)
    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(tree, tiled=True))


def agreed(seconds: float, signal: int) -> tuple[float, int]:
    """The clock of the slowest process, and a signal that any of them got: the same for all."""
    if jax.process_count() == 1:
        return seconds, signal
    every = multihost_utils.process_allgather(np.array([seconds, signal], np.float32))
    return float(every[:, 0].max()), int(every[:, 1].max())
