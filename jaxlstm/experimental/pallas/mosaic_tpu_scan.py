"""`jax.lax.scan` as one TPU kernel: the carry and the resident arrays stay in VMEM, and time is an axis of the grid.

A scan compiled by XLA reads its weights from HBM at every step. This kernel copies them into VMEM once. Only the inputs
and outputs of the steps move, and they are copied while other steps are computed.
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

from jaxlstm.experimental.pallas import target
from jaxlstm.primitives.pytrees import tree_index

ZERO = np.int32(0)  # block index; a literal 0 is int64 under `jax_enable_x64`, and a TPU has no int64

# (resident, carry, inputs_t) -> (carry, outputs_t): trees of arrays, the carry (rows, n), inputs and outputs of a step
# (..., rows, n)
Body = Callable[[Any, Any, Any], tuple[Any, Any]]


class BlockSizes(NamedTuple):
    """Sizes of the blocks that a scan is split into."""

    rows: int  # of the batch
    steps: int  # of time
    reverse: bool  # whether time runs backward

    def over_time(self, a: Any) -> tuple[int, ...]:
        """Returns the block shape of an array ``(T, ..., B, n)``."""
        return (self.steps, *a.shape[1:-2], self.rows, a.shape[-1])

    def carry(self, a: Any) -> tuple[int, ...]:
        """Returns the block shape of an array ``(B, n)``."""
        return (self.rows, a.shape[-1])

    def step_aval(self, a: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype that the body receives for an array ``(T, ..., B, n)``."""
        return jax.ShapeDtypeStruct(self.over_time(a)[1:], a.dtype)

    def carry_aval(self, a: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype that the body receives for an array ``(B, n)``."""
        return jax.ShapeDtypeStruct(self.carry(a), a.dtype)


def footprint(block: BlockSizes, resident: Any, carry: Any, over_time: Any) -> int:
    """Returns the bytes of VMEM that `scan` uses, from arrays or `jax.ShapeDtypeStruct`.

    Resident arrays are stored once. Arrays over time, and the carry at input and output, are double-buffered. The size
    of one step is added for values that the compiler cannot keep in registers.
    """

    def total(arrays: Any, block_shape: Callable[[Any], tuple[int, ...]]) -> int:
        return sum(_padded_bytes(block_shape(a), a.dtype) for a in jax.tree.leaves(arrays))

    moving = total(over_time, block.over_time)
    return total(resident, lambda a: a.shape) + 4 * total(carry, block.carry) + 2 * moving + moving // block.steps


def _padded_bytes(shape: Sequence[int], dtype: jnp.dtype) -> int:
    """Returns the bytes of an array in VMEM: its last two axes are padded to tiles of (8, 128) 32-bit words."""
    size = 4 if dtype == jnp.bool_ else jnp.dtype(dtype).itemsize
    *leading, rows, lanes = (1, 1, *shape)
    tile = 8 * max(1, 4 // size)
    return math.prod(leading) * -(-rows // tile) * tile * -(-lanes // 128) * 128 * size


def scan(
    body: Body, resident: Any, carry: Any, over_time: Any, *, rows: int, steps: int = 1, reverse: bool = False
) -> tuple[Any, Any]:
    """Computes ``lax.scan(partial(body, resident), carry, over_time, reverse=reverse)`` in a kernel.

    Args:
      body: one step. It is compiled for blocks of the batch and must not mix rows.
      resident: tree of arrays that every step reads.
      carry: tree of arrays ``(B, n)``.
      over_time: tree of arrays ``(T, ..., B, n)``.
      rows: batch rows per block.
      steps: steps per iteration of the grid.
      reverse: whether time runs backward.
    """
    batch_size = len(jax.tree.leaves(carry)[0])
    if batch_size == 0:  # a grid needs at least one block
        return lax.scan(partial(body, resident), carry, over_time, reverse=reverse)
    rows = min(rows, batch_size)
    if batch_size % rows:  # fill up the last block with copies of the last row; their results are dropped
        carry, over_time = jax.tree.map(partial(_pad_rows, to=-(-batch_size // rows) * rows), (carry, over_time))
    num_steps = len(jax.tree.leaves(over_time)[0])
    whole = num_steps - num_steps % steps
    chunks = [(slice(0, whole), steps), (slice(whole, num_steps), num_steps - whole)]
    outputs = []
    for chunk, size in reversed(chunks) if reverse else chunks:
        if chunk.start < chunk.stop:
            block = BlockSizes(rows, size, reverse)
            carry, out = _scan_blocks(body, block, resident, carry, tree_index(over_time, chunk))
            outputs.append(out)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *(reversed(outputs) if reverse else outputs))
    return jax.tree.map(lambda a: a[..., :batch_size, :], (carry, joined))


def _pad_rows(a: Array, to: int) -> Array:
    """Repeats the last row of ``a (..., B, n)`` until there are ``to``."""
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, to - a.shape[-2]), (0, 0)], mode="edge")


def _scan_blocks(body: Body, block: BlockSizes, resident: Any, carry: Any, over_time: Any) -> tuple[Any, Any]:
    """Runs `scan` over a whole number of blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    num_steps, num_rows = len(jax.tree.leaves(over_time)[0]), len(jax.tree.leaves(carry)[0])
    jaxpr, shapes = jax.make_jaxpr(body, return_shape=True)(
        resident, jax.tree.map(block.carry_aval, carry), jax.tree.map(block.step_aval, over_time)
    )

    def output_shape(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_steps, *a.shape[:-2], num_rows, a.shape[-1]), a.dtype)

    # A kernel cannot capture constants: the constants of the body are operands.
    constants = [jnp.asarray(c) for c in jaxpr.consts]
    operands = jax.tree.map(_to_vmem, (constants, resident, carry, over_time))
    out_shape = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), carry),
        jax.tree.map(output_shape, shapes[1]),
    )
    resident_spec, carry_spec, time_spec = _block_specs(block, num_steps)
    in_specs = zip((resident_spec, resident_spec, carry_spec, time_spec), operands)
    info, params = target.tpu_info(), None
    if info is not None:
        semantics = ("parallel", "arbitrary")
        params = tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=info.vmem_capacity_bytes)
    return pl.pallas_call(
        _kernel(block, jaxpr, jax.tree.structure(shapes)),
        grid=(num_rows // block.rows, num_steps // block.steps),
        in_specs=tuple(jax.tree.map(spec, arrays) for spec, arrays in in_specs),
        out_specs=(jax.tree.map(carry_spec, out_shape[0]), jax.tree.map(time_spec, out_shape[1])),
        out_shape=out_shape,
        compiler_params=params,
        interpret=info is None,
        name="lstm",
    )(*operands)


def _kernel(block: BlockSizes, jaxpr: ClosedJaxpr, out_tree: Any) -> Callable[..., None]:
    """Returns the kernel that takes the steps of one block, from the jaxpr of the body."""
    from jax.experimental import pallas as pl

    unnamed = _without_names(jaxpr)

    def kernel(constants: Any, resident: Any, initial: Any, over_time: Any, carry: Any, outputs: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            _write(carry, _read(initial))  # the output block of the carry holds it between steps

        consts = [_from_vmem(a, like) for a, like in zip(_read(constants), jaxpr.consts)]
        body = jaxpr_as_fun(ClosedJaxpr(unnamed, consts))
        weights = _read(resident)
        for step in reversed(range(block.steps)) if block.reverse else range(block.steps):
            args = jax.tree.leaves((weights, _read(carry), _read(over_time, step)))
            results = body(*(_from_vmem(a, like) for a, like in zip(args, jaxpr.in_avals)))
            new_carry, outputs_t = jax.tree.unflatten(out_tree, results)
            _write(carry, new_carry)
            _write(outputs, outputs_t, step)

    return kernel


def _block_specs(block: BlockSizes, num_steps: int) -> tuple[Callable[[Any], Any], ...]:
    """Returns functions from an array to its `BlockSpec` on the grid ``(batch, time)``: resident, carry, over time."""
    from jax.experimental import pallas as pl

    def resident_spec(a: Any) -> Any:
        return pl.BlockSpec(a.shape, lambda b, t: (ZERO,) * a.ndim, pipeline_mode=pl.Buffered(1))

    def carry_spec(a: Any) -> Any:
        return pl.BlockSpec(block.carry(a), lambda b, t: (b, ZERO))

    def time_spec(a: Any) -> Any:
        middle, last = [ZERO] * (a.ndim - 3), num_steps // block.steps - 1
        return pl.BlockSpec(block.over_time(a), lambda b, t: (last - t if block.reverse else t, *middle, b, ZERO))

    return resident_spec, carry_spec, time_spec


def _to_vmem(a: Array) -> Array:
    """Converts an operand for VMEM, which has no booleans and no vectors except as a row of a matrix."""
    a = a.astype(jnp.int32) if a.dtype == jnp.bool_ else a
    return a if a.ndim > 1 else a.reshape(1, -1)


def _from_vmem(a: Array, like: Any) -> Array:
    """Reverses `_to_vmem`."""
    a = a if a.ndim == like.ndim else a[0].reshape(like.shape)
    return a if a.dtype == like.dtype else a != 0


def _read(refs: Any, step: int | None = None) -> Any:
    """Reads whole blocks, or one step of them."""
    return jax.tree.map(lambda ref: ref[...] if step is None else ref[step], refs)


def _write(refs: Any, arrays: Any, step: int | None = None) -> None:
    """Writes whole blocks, or one step of them."""
    for ref, a in zip(jax.tree.leaves(refs), jax.tree.leaves(arrays)):
        ref[... if step is None else step] = a


def _without_names(closed_jaxpr: ClosedJaxpr) -> Jaxpr:
    """Removes the names of `jax.ad_checkpoint.checkpoint_name`, which Pallas does not lower."""
    jaxpr, renamed = closed_jaxpr.jaxpr, {}

    def rename(v: Any) -> Any:
        return v if isinstance(v, Literal) else renamed.get(v, v)

    equations = []
    for equation in jaxpr.eqns:
        inputs = [rename(v) for v in equation.invars]
        if equation.primitive.name == "name":
            renamed.update(zip(equation.outvars, inputs))
        else:
            equations.append(equation.replace(invars=inputs))
    return jaxpr.replace(eqns=equations, outvars=[rename(v) for v in jaxpr.outvars])
