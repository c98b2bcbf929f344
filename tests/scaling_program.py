"""Prints the collectives of compiled training programs on eight simulated devices, in one process or two, as JSON.

Run as a program: no arguments for one process; ADDRESS NUMBER for process NUMBER of two with four devices each.
"""

import json
import re
import sys

import jax

ADDRESS = sys.argv[1:2]
jax.config.update("jax_num_cpu_devices", 4 if ADDRESS else 8)
if ADDRESS:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(ADDRESS[0], num_processes=2, process_id=int(sys.argv[2]))

import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlstm

STEPS, BATCH, INPUTS, UNITS = 7, 16, 24, 32
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def array_bytes(text):
    """Returns the bytes of all arrays in the type of an operation."""
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        number = BYTES[dtype]
        for size in filter(None, sizes.split(",")):
            number *= int(size)
        total += number
    return total


def collectives(program):
    """Returns ``[kind, bytes of the results on a device, how often]`` of each collective of an optimized program."""
    computations = re.split(r"\n(?=(?:ENTRY )?%?\S+ \([^\n]*\{)", program)
    bodies = {}
    for match in re.finditer(r"body=%?([\w.\-]+)[^\n]*?known_trip_count\W+n\W+(\d+)", program):
        bodies[match[1]] = int(match[2])
    found = []
    for computation in computations:
        name = computation.strip().removeprefix("ENTRY ").split()[0].lstrip("%")
        for kind_match in re.finditer(rf"= ([^=\n]*?) ({KINDS})(?:-start)?\(", computation):
            found.append([kind_match[2], array_bytes(kind_match[1]), bodies.get(name, 1)])
    return sorted(found)


def training_program(implementation, sizes):
    """Compiles the gradient of a layer on a mesh ``(data, model)``."""
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    lstm = jaxlstm.LSTM(INPUTS, UNITS, implementation=implementation)

    def shaped(a, *spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def weights(path, a):
        is_split = sizes[1] > 1 and jax.tree_util.keystr(path).endswith((".w_x", ".w_h", ".b"))
        return shaped(a, *(("model",) if is_split else ()))

    params = jax.tree.map_with_path(weights, lstm.param_shapes())
    xs = shaped(jax.ShapeDtypeStruct((STEPS, BATCH, INPUTS), jnp.float32), None, "data")

    def loss(params, xs):
        return (lstm(params, xs)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(params, xs).compile().as_text()


PROGRAMS = {
    "data=8": ("fused", (8, 1)),
    "model=8": ("tensor_parallel", (1, 8)),
    "data=4,model=2": ("tensor_parallel", (4, 2)),
    "newton, data=8": ("newton", (8, 1)),
}
found = {name: collectives(training_program(*options)) for name, options in PROGRAMS.items()}
if "1" not in sys.argv[2:]:  # of two processes the first prints
    print(json.dumps(found))
