"""`jax.lax.scan` as one TPU kernel: the carry and what every step reads stay in VMEM, time is an axis of the grid.

A scan that XLA compiles reads its weights from HBM at each step. Here they are brought into VMEM once, and what flows
past is the inputs and outputs of the steps, fetched and stored while the steps around them are computed.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun


class Hopper(NamedTuple):
    """A GPU of compute capability 9, for `making_for`."""

    interpreted: Any = None  # by `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`; None for not at all
    processors: int = 132  # streaming multiprocessors: of an H100 SXM; one for PCIe has 114


INTERPRET = "interpret"
making_for = jax.make_user_context(default_value=None)
"""What kernels are made for, where that is not the TPU or GPU at hand.

Within ``making_for(INTERPRET)`` a kernel for TPUs is carried out operation by operation, on any backend, slowly: that
is how its numbers are checked. Within ``making_for(chip)``, a `jax.experimental.pallas.tpu.ChipVersion`, it is lowered
for that chip from any host. ``making_for(Hopper())`` and ``making_for(Hopper(parameters))`` are the same for GPUs.
"""

ZERO = np.int32(0)  # an index of a block; a bare 0 is an int64 where those are switched on, and a TPU has none

# (resident, carry, now) -> (carry, out): trees of arrays, those of carry (rows, n), of now and out (..., rows, n)
Body = Callable[[Any, Any, Any], tuple[Any, Any]]


class Blocks(NamedTuple):
    """How a scan is cut up."""

    rows: int  # of the batch in one block
    steps: int  # of time in one block
    reverse: bool  # whether time runs backward

    def over_time(self, a: Any) -> tuple[int, ...]:
        """The block of an array ``(T, ..., B, n)``."""
        return (self.steps, *a.shape[1:-2], self.rows, a.shape[-1])

    def of_carry(self, a: Any) -> tuple[int, ...]:
        """The block of an array ``(B, n)``."""
        return (self.rows, a.shape[-1])

    def one_step(self, a: Any) -> jax.ShapeDtypeStruct:
        """What the body sees of an array ``(T, ..., B, n)``."""
        return jax.ShapeDtypeStruct(self.over_time(a)[1:], a.dtype)

    def one_carry(self, a: Any) -> jax.ShapeDtypeStruct:
        """What the body sees of an array ``(B, n)``."""
        return jax.ShapeDtypeStruct(self.of_carry(a), a.dtype)


def chip() -> Any:
    """The chip that kernels are made for, a `jax.experimental.pallas.tpu.TpuInfo`; None for the interpreter.

    Raises:
      ValueError: if there is no TPU.
    """
    from jax.experimental.pallas import tpu

    if making_for.value == INTERPRET:
        return None
    if making_for.value is not None:
        return tpu.get_tpu_info_for_chip(making_for.value, 1)
    if jax.default_backend() != "tpu":
        raise ValueError(
            f"implementation='pallas' is a kernel for TPUs and Hopper GPUs, got the backend {jax.default_backend()!r}; "
            "'fused' and 'scan' run on every backend"
        )
    return tpu.get_tpu_info()


def footprint(blocks: Blocks, resident: Any, carry: Any, over_time: Any) -> int:
    """Bytes of VMEM that `scan` takes, counted on arrays or on `jax.ShapeDtypeStruct`.

    What is resident is there once. What flows past, and the carry as it comes and goes, is there twice: one block in
    use and one under way. As much again as one step is left to the compiler for what it cannot hold in registers.
    """

    def total(arrays: Any, block: Callable[[Any], tuple[int, ...]]) -> int:
        return sum(_bytes(block(a), a.dtype) for a in jax.tree.leaves(arrays))

    flow = total(over_time, blocks.over_time)
    return total(resident, lambda a: a.shape) + 4 * total(carry, blocks.of_carry) + 2 * flow + flow // blocks.steps


def _bytes(shape: Sequence[int], dtype: jnp.dtype) -> int:
    """Bytes of an array in VMEM, where the last two axes are rounded up to whole tiles of (8, 128) 32-bit words."""
    size = 4 if dtype == jnp.bool_ else jnp.dtype(dtype).itemsize
    *leading, rows, lanes = (1, 1, *shape)
    tile = 8 * max(1, 4 // size)
    return math.prod(leading) * -(-rows // tile) * tile * -(-lanes // 128) * 128 * size


def scan(
    body: Body, resident: Any, carry: Any, over_time: Any, *, rows: int, steps: int = 1, reverse: bool = False
) -> tuple[Any, Any]:
    """``lax.scan(partial(body, resident), carry, over_time, reverse=reverse)``, as a kernel.

    Args:
      body: one step. It is compiled for blocks of the batch, whose rows it must not mix.
      resident: tree of arrays that every step reads.
      carry: tree of arrays ``(B, n)``.
      over_time: tree of arrays ``(T, ..., B, n)``.
      rows: of the batch in one block.
      steps: of time in one iteration of the grid.
      reverse: whether time runs backward.
    """
    batch = len(jax.tree.leaves(carry)[0])
    if batch == 0:  # there is no grid without blocks
        return lax.scan(partial(body, resident), carry, over_time, reverse=reverse)
    rows = min(rows, batch)
    if batch % rows:  # whole blocks; the rows added are copies, and nothing is made of them
        carry, over_time = jax.tree.map(partial(_more_rows, to=-(-batch // rows) * rows), (carry, over_time))
    num_steps = len(jax.tree.leaves(over_time)[0])
    whole = num_steps - num_steps % steps
    pieces = [(slice(0, whole), steps), (slice(whole, num_steps), num_steps - whole)]
    outs = []
    for piece, size in reversed(pieces) if reverse else pieces:
        if size and piece.stop > piece.start:
            now = jax.tree.map(lambda a: a[piece], over_time)  # noqa: B023  (called at once)
            carry, out = _kernel(body, Blocks(rows, size, reverse), resident, carry, now)
            outs.append(out)
    out = jax.tree.map(lambda *a: jnp.concatenate(a), *(reversed(outs) if reverse else outs))
    return jax.tree.map(lambda a: a[..., :batch, :], (carry, out))


def _more_rows(a: Array, to: int) -> Array:
    """``a (..., B, n)`` with its last row repeated until there are ``to``."""
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, to - a.shape[-2]), (0, 0)], mode="edge")


def _kernel(body: Body, blocks: Blocks, resident: Any, carry: Any, over_time: Any) -> tuple[Any, Any]:
    """`scan` over a whole number of blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    num_steps, num_rows = len(jax.tree.leaves(over_time)[0]), len(jax.tree.leaves(carry)[0])
    program, shapes = jax.make_jaxpr(body, return_shape=True)(
        resident, jax.tree.map(blocks.one_carry, carry), jax.tree.map(blocks.one_step, over_time)
    )
    tree, plain = jax.tree.structure(shapes), _without_names(program)

    def kernel(constants: Any, resident: Any, before: Any, over_time: Any, carry: Any, out: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            _write(carry, _read(before))  # from here on the carry is in the block that it is put out from

        step_of = jaxpr_as_fun(ClosedJaxpr(plain, list(map(_as_in_body, _read(constants), program.consts))))
        stays = _read(resident)
        for step in reversed(range(blocks.steps)) if blocks.reverse else range(blocks.steps):
            arguments = jax.tree.leaves((stays, _read(carry), _read(over_time, step)))
            after, now = tree.unflatten(step_of(*map(_as_in_body, arguments, program.in_avals)))
            _write(carry, after)
            _write(out, now, step)

    def put_out(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_steps, *a.shape[:-2], num_rows, a.shape[-1]), a.dtype)

    # A kernel has no constants of its own: those of the body are operands too.
    constants = list(map(jnp.asarray, program.consts))
    operands = jax.tree.map(_as_in_memory, (constants, resident, carry, over_time))
    result = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), carry), jax.tree.map(put_out, shapes[1]))
    kept, carried, flowing = _specs(blocks, num_steps)
    made_for = chip()
    return pl.pallas_call(
        kernel,
        grid=(num_rows // blocks.rows, num_steps // blocks.steps),
        in_specs=tuple(map(jax.tree.map, (kept, kept, carried, flowing), operands)),
        out_specs=(jax.tree.map(carried, result[0]), jax.tree.map(flowing, result[1])),
        out_shape=result,
        compiler_params=made_for
        and tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=made_for.vmem_capacity_bytes
        ),
        interpret=made_for is None,
        name="lstm",
    )(*operands)


def _specs(blocks: Blocks, num_steps: int) -> tuple[Callable[[Any], Any], ...]:
    """Which blocks of an array the grid, ``(batch, time)``, meets: of a resident one, a carry, and one over time."""
    from jax.experimental import pallas as pl

    def kept(a: Any) -> Any:
        return pl.BlockSpec(a.shape, lambda b, t: (ZERO,) * a.ndim, pipeline_mode=pl.Buffered(1))

    def carried(a: Any) -> Any:
        return pl.BlockSpec(blocks.of_carry(a), lambda b, t: (b, ZERO))

    def flowing(a: Any) -> Any:
        between, last = [ZERO] * (a.ndim - 3), num_steps // blocks.steps - 1
        return pl.BlockSpec(blocks.over_time(a), lambda b, t: (last - t if blocks.reverse else t, *between, b, ZERO))

    return kept, carried, flowing


def _as_in_memory(a: Array) -> Array:
    """An operand of a kernel: there are no booleans in VMEM, and no vectors that are not a row of a matrix."""
    a = a.astype(jnp.int32) if a.dtype == jnp.bool_ else a
    return a if a.ndim > 1 else a.reshape(1, -1)


def _as_in_body(a: Array, like: Any) -> Array:
    """An operand as the body knows it."""
    a = a if a.ndim == like.ndim else a[0].reshape(like.shape)
    return a if a.dtype == like.dtype else a != 0


def _read(refs: Any, step: int | None = None) -> Any:
    """The arrays in memory, or those of one step."""
    return jax.tree.map(lambda ref: ref[...] if step is None else ref[step], refs)


def _write(refs: Any, arrays: Any, step: int | None = None) -> None:
    """Arrays into memory, or into one step of it."""
    for ref, a in zip(jax.tree.leaves(refs), jax.tree.leaves(arrays)):
        ref[... if step is None else step] = a


def _without_names(program: ClosedJaxpr) -> Jaxpr:
    """A program whose arrays have no names, which `jaxlstm.diagnostics` reads and a kernel has no place for."""
    same: dict[Any, Any] = {}

    def variable(v: Any) -> Any:
        return v if isinstance(v, Literal) else same.get(v, v)

    equations = []
    for equation in program.jaxpr.eqns:
        inputs = list(map(variable, equation.invars))
        if equation.primitive.name == "name":  # of `jax.ad_checkpoint.checkpoint_name`
            same.update(zip(equation.outvars, inputs))
        else:
            equations.append(equation.replace(invars=inputs))
    return program.jaxpr.replace(eqns=equations, outvars=list(map(variable, program.jaxpr.outvars)))
