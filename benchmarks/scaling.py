"""Prints the table of docs/scaling.md: where each way to use more hardware stops paying, by formulas.

python benchmarks/scaling.py

Nothing is measured. Bytes and counts of exchanges are checked against optimized programs by a test; rates are from data
sheets, latencies and overheads are assumptions that the table shows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BF16, F32 = 2, 4  # bytes


class Layer(NamedTuple):
    """Sizes of one LSTM layer; ``rows`` is the batch size on a device."""

    steps: int  # T
    rows: int  # b = B / d
    inputs: int  # I
    units: int  # H

    @property
    def num_params(self) -> int:
        """Matrices and bias."""
        return 4 * self.units * (self.inputs + self.units + 1)


@dataclass(frozen=True)
class Machine:
    """Rates of one device and of its links, bytes and operations per second.

    Args:
      name: in the table.
      devices: number of devices, d.
      flops: bfloat16 operations per second.
      memory: bytes per second of the device's memory.
      link: bytes per second that a device receives from the others; infinite for one device.
      latency: seconds of an exchange of few bytes between all devices; assumed.
      overhead: seconds of a step besides products and memory: launches of kernels, iterations of a loop; assumed.
    """

    name: str
    devices: int
    flops: float
    memory: float
    link: float
    latency: float
    overhead: float


H100 = {"flops": 989e12, "memory": 3.35e12, "overhead": 8e-6}
MACHINES = (
    Machine("one H100", 1, link=math.inf, latency=0.0, **H100),
    Machine("8 H100, NVLink", 8, link=450e9, latency=10e-6, **H100),
    Machine("256 H100, InfiniBand", 256, link=50e9, latency=40e-6, **H100),
    Machine("v5e-256", 256, flops=197e12, memory=819e9, link=90e9, latency=16e-6, overhead=1e-6),
)


# Bytes and counts, exact: the test compares them with programs.


def gradient_bytes(layer: Layer, model: int = 1) -> int:
    """Returns the bytes of the gradients on a device, which are summed over the axis ``data`` once a training step."""
    return F32 * layer.num_params // model


def exchanged_hidden_bytes(layer: Layer, itemsize: int) -> int:
    """Returns the bytes of h, gathered over the axis ``model`` in each step; of its gradient a share is scattered."""
    return layer.rows * layer.units * itemsize


def received_by_all_reduce(num_bytes: int, devices: int) -> float:
    """Returns the bytes that each device receives if a ring of devices sums an array."""
    return 2 * (devices - 1) / devices * num_bytes


def received_by_all_gather(num_bytes: int, devices: int) -> float:
    """Returns the bytes that each device receives if an array is gathered, or if its sum is scattered."""
    return (devices - 1) / devices * num_bytes


def expected_collectives(layer: Layer, data: int, model: int) -> list[tuple[str, int, int]]:
    """Returns the collectives of a float32 gradient on a mesh: kind, bytes of the result on a device, how often.

    Rearranging the weights once per training step, from gate after gate to unit after unit, is left out.
    """
    found = [("all-reduce", gradient_bytes(layer, model), 1)] if data > 1 else []
    if model > 1:
        hidden = exchanged_hidden_bytes(layer, F32)
        found += [("all-gather", hidden, layer.steps), ("reduce-scatter", hidden // model, layer.steps)]
    return found


# Times, from assumed rates


def step_seconds(machine: Machine, layer: Layer, model: int = 1) -> float:
    """Returns the seconds of one step of the recurrence forward: the overhead, and the product or its weights."""
    weights = 4 * layer.units**2 / model
    product = 2 * layer.rows * weights / machine.flops
    memory = (BF16 * weights + 7 * F32 * layer.rows * layer.units / model) / machine.memory  # z, c, h and y
    return machine.overhead + max(product, memory)


def training_seconds(machine: Machine, layer: Layer) -> float:
    """Returns the seconds of a training step without exchanges: three products of each kind, two loops over time."""
    hoisted = 3 * 8 * layer.steps * layer.rows * layer.inputs * layer.units / machine.flops
    step = step_seconds(machine, layer)
    return hoisted + layer.steps * (3 * (step - machine.overhead) + 2 * machine.overhead)


def all_reduce_seconds(machine: Machine, layer: Layer) -> float:
    """Returns the seconds of summing the gradients."""
    return machine.latency + received_by_all_reduce(gradient_bytes(layer), machine.devices) / machine.link


def smallest_rows(machine: Machine, units: int) -> int:
    """Returns the rows per device below which halving them shortens a step by less than a quarter."""

    def gain(rows: int) -> float:
        whole, half = (step_seconds(machine, Layer(1, n, units, units)) for n in (2 * rows, rows))
        return 1 - half / whole

    return first(lambda n: gain(n) >= 0.25) or 0


def smallest_units(machine: Machine, rows: int, model: int) -> int | None:
    """Returns the hidden size from which on a step split over ``model`` devices is faster than on one device."""

    def is_faster(units: int) -> bool:
        layer = Layer(1, rows, units, units)
        received = received_by_all_gather(exchanged_hidden_bytes(layer, BF16), model)
        split = step_seconds(machine, layer, model) + machine.latency + received / machine.link
        return split < step_seconds(machine, layer)

    return first(lambda n: is_faster(16 * n), 4096)


def most_iterations(machine: Machine, layer: Layer) -> int:
    """Returns the iterations of Newton's method, all steps at once, that take as long as one step after the other.

    An iteration multiplies all steps at once and runs a parallel scan with diagonal Jacobians: about ``2 log2(T)``
    passes of halving length, each an overhead, over two arrays of state-sized elements.
    """
    elements = layer.steps * layer.rows * layer.units
    product = max(8 * elements * layer.units / machine.flops, BF16 * 4 * layer.units**2 / machine.memory)
    scan = 2 * math.log2(layer.steps) * machine.overhead + 2 * 3 * 2 * F32 * elements / machine.memory
    return int(layer.steps * step_seconds(machine, layer) / (product + scan))


def first(holds: Callable[[int], bool], limit: int = 1 << 16) -> int | None:
    """Returns the smallest positive number for which a monotonic condition holds; None if there is none."""
    low, high = 1, limit
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


LARGE = Layer(128, 64, 1024, 1024)  # T, b, I, H
LONG = Layer(1024, 1, 256, 256)


def table() -> str:
    """Returns the table in Markdown."""
    head = (
        "machine",
        "step, µs",
        "training step, ms",
        "`data`: received, MB",
        "`data`: share of the sum",
        "`data`: rows per device from",
        "`model`: received per step, KB",
        "`model`: H from",
        "time: iterations up to",
    )
    rows = [head, ("---",) * len(head)]
    for machine in MACHINES:
        compute, exchange = training_seconds(machine, LARGE), all_reduce_seconds(machine, LARGE)
        model = min(machine.devices, 8)
        units = 16 * (smallest_units(machine, LARGE.rows, model) or 0)
        hidden = received_by_all_gather(exchanged_hidden_bytes(LARGE, BF16), model)
        received = received_by_all_reduce(gradient_bytes(LARGE), machine.devices)
        rows.append(
            (
                machine.name,
                f"{1e6 * step_seconds(machine, LARGE):.1f}",
                f"{1e3 * compute:.2f}",
                f"{received / 1e6:.0f}" if model > 1 else "-",
                f"{exchange / (exchange + compute):.0%}" if model > 1 else "-",
                str(smallest_rows(machine, LARGE.units)),
                f"{hidden / 1e3:.0f}" if model > 1 else "-",
                str(units) if model > 1 else "-",
                str(most_iterations(machine, LONG)),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
