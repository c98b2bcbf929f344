"""Counts kernels, bytes and estimated cycles per time step in the text of a program that XLA optimized.

All that runs inside of loops is counted as often as it runs and divided by the number of time steps: a loop over chunks
of time with a loop over steps inside counts like one loop, and work once per chunk as its share.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
NO_KERNEL = {  # operations that run no kernel
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota"),
    *("copy-start", "copy-done", "async-start", "async-done", "optimization-barrier", "after-all"),
}
PRODUCTS = re.compile(r'custom_call_target="[^"]*(?:cublas|gemm|matmul)')  # of a GPU's library
MOVES = {"copy", "transpose"}


@dataclass
class Operation:
    """One line of a program."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str
    literal: str  # of a constant, its value

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return type_bytes(self.type)


@dataclass
class Work:
    """Kernels and bytes of a number of steps; of a TPU program also cycles."""

    kernels: float = 0.0
    products: float = 0.0  # kernels that multiply matrices
    copies: float = 0.0  # kernels that only copy or transpose
    bytes: float = 0.0  # read and written, slices of arrays over time as slices
    cycles: float = 0.0  # as the TPU compiler estimates
    names: dict[str, float] = field(default_factory=dict)  # of the kernels, by how often

    def add(self, other: "Work", times: float) -> None:
        """Adds work that is done several times."""
        for name in ("kernels", "products", "copies", "bytes", "cycles"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name, count in other.names.items():
            self.names[name] = self.names.get(name, 0.0) + times * count


def type_bytes(text: str) -> int:
    """Returns the bytes of all arrays in a type; workspaces of libraries, of type s8, count nothing."""
    total = 0
    for dtype, sizes in re.findall(r"\b(\w+)\[([\d,]*)\]", text):
        number = 0 if dtype == "s8" else BYTES.get(dtype, 0)
        for size in filter(None, sizes.split(",")):
            number *= int(size)
        total += number
    return total


def parse(text: str) -> dict[str, list[Operation]]:
    """Returns the operations of each computation by its name; the entry computation is also named ``ENTRY``."""
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[match[2]] = []
            if match[1]:
                computations["ENTRY"] = current
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line):
            name, kind, opcode, rest = match.groups()
            operands, _, attributes = rest.partition(")")
            names = re.findall(r"%([\w.\-]+)", operands)
            current.append(Operation(name, kind, opcode, names, attributes, operands))
    return computations


def called(operation: Operation, attribute: str) -> str | None:
    """Returns the computation that an attribute names."""
    match = re.search(rf"{attribute}=%?([\w.\-]+)", operation.attributes)
    return match[1] if match else None


def trip_count(operation: Operation, computations: dict[str, list[Operation]]) -> int:
    """Returns how often a loop runs: as the compiler says, or the largest constant of its condition.

    Raises:
      ValueError: if neither is known.
    """
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', operation.attributes):
        return int(match[1])
    condition = computations[called(operation, "condition") or ""]
    constants = [int(each.literal) for each in condition if each.opcode == "constant" and each.literal.isdecimal()]
    if not constants:
        raise ValueError(f"the number of iterations of {operation.name} is not known")
    return max(constants)


def measure(computations: dict[str, list[Operation]], name: str, *, only_loops: bool) -> Work:
    """Returns the work of a computation; with ``only_loops`` of the loops in it alone."""
    work = Work()
    by_name = {operation.name: operation for operation in computations[name]}
    for operation in computations[name]:
        if operation.opcode == "while":
            body = measure(computations, called(operation, "body") or "", only_loops=False)
            work.add(body, trip_count(operation, computations))
        elif operation.opcode == "call":
            work.add(measure(computations, called(operation, "to_apply") or "", only_loops=only_loops), 1)
        elif operation.opcode not in NO_KERNEL and not only_loops and not is_buffer(operation):
            work.add(kernel(operation, by_name, computations), 1)
    return work


def is_buffer(operation: Operation) -> bool:
    """Returns whether a call only allocates memory."""
    return "AllocateBuffer" in operation.attributes


def kernel(operation: Operation, by_name: dict[str, Operation], computations: dict[str, list[Operation]]) -> Work:
    """Returns the work of one kernel."""
    inner = computations.get(called(operation, "calls") or "", [])
    opcodes = {each.opcode for each in inner} or {operation.opcode}
    is_product = bool(PRODUCTS.search(operation.attributes) or opcodes & {"dot", "convolution"})
    trivial = {*NO_KERNEL, *MOVES, "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "convert"}
    is_copy = opcodes & MOVES != set() and opcodes <= trivial
    cycles = re.search(r'estimated_cycles":"(\d+)"', operation.attributes)
    return Work(
        1.0,
        float(is_product),
        float(is_copy),
        float(moved_bytes(operation, inner, by_name)),
        float(cycles[1]) if cycles else 0.0,
        {re.sub(r"[.\d]+$", "", operation.name): 1.0},
    )


def moved_bytes(operation: Operation, inner: Sequence[Operation], by_name: dict[str, Operation]) -> int:
    """Returns the bytes that a kernel reads and writes; of an array of which it takes a slice only the slice."""
    sizes = [by_name[name].bytes for name in operation.operands if name in by_name]
    if not inner:
        return sum(sizes) + operation.bytes
    total, parameters = 0, [each for each in inner if each.opcode == "parameter"]
    defined = {each.name: each for each in inner}
    for parameter in parameters:
        users = [each for each in inner if parameter.name in each.operands]
        if users and all(each.opcode == "dynamic-slice" and each.operands[0] == parameter.name for each in users):
            total += sum(each.bytes for each in users)
        elif not (users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users)):
            total += parameter.bytes
    updates = [each for each in inner if each.opcode == "dynamic-update-slice"]
    written = operation.bytes
    for update in updates:  # in place
        written += defined[update.operands[1]].bytes - update.bytes
    return total + max(written, 0)


def per_step(text: str, num_steps: int) -> Work:
    """Returns the work of all loops of a program, per time step."""
    work = Work()
    work.add(measure(parse(text), "ENTRY", only_loops=True), 1 / num_steps)
    return work
