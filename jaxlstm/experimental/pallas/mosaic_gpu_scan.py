"""A scan over time as a kernel for Hopper GPUs whose recurrent matrix stays in shared memory.

A group of blocks shares a matrix. Each block has some of the hidden units and their rows of the matrix. In a step it
multiplies its rows by the messages that all blocks sent in the previous step, with `wgmma`, which accumulates in
registers. The rest of the step is computed in registers, with a tile of units and batch rows in place of each number
(`jaxlstm.experimental.pallas.jaxpr_tiling`). Then the block sends the message of its units to the next step. The batch
is split over several independent groups.

Messages go through global memory, and so through the L2 cache: a block writes its part, waits for the other blocks, and
reads all parts. The mailbox has a separate slot for each step, so that no block has to wait until the others have read.

A `KernelSpec` and a subclass of `BlockProgram` say how blocks form a group, how they store their rows of the matrix,
and how they wait for one another: `jaxlstm.experimental.pallas.mosaic_gpu_cluster` for the blocks of a cluster,
`jaxlstm.experimental.pallas.mosaic_gpu_grid` for the blocks of a whole GPU.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxlstm.experimental.pallas import jaxpr_tiling
from jaxlstm.experimental.pallas.target import gpu_interpret_params

GROUP_ROWS = (16, 32)  # batch rows of a group: fewer do not fit swizzled memory, more do not fit into registers
SHARED_MEMORY = 227 * 1024  # bytes per block
RESERVED = 3 * 1024  # bytes of these for barriers and the compiler

# (resident, products, carry, inputs_t) -> (carry, messages, outputs_t) for one unit of one batch row: trees of arrays
# (..., 1, 1), resident arrays (..., 1)
Body = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


class MatmulSpec(NamedTuple):
    """The matrix product of one block in one step: ``num_m x num_k`` resident tiles by ``num_k`` received tiles."""

    num_m: int
    num_k: int
    tile_m: int  # a resident tile is (tile_m, tile_k)
    tile_k: int  # a received tile is (tile_k, tile_n)
    tile_n: int
    num_buffers: int  # of received tiles in shared memory


class KernelSpec(NamedTuple):
    """Compile-time sizes of a kernel."""

    num_products: int  # products that a step computes
    num_messages: int  # messages that a step sends, one per hidden unit and batch row each
    num_blocks: int  # of a group
    block_units: int  # hidden units of a block
    group_rows: int  # batch rows of a group
    num_steps: int
    reverse: bool  # whether time runs backward
    matmul: MatmulSpec

    @property
    def padded_units(self) -> int:
        """Hidden units, including those that fill up the last block."""
        return self.num_blocks * self.block_units

    @property
    def message_arrays(self) -> int:
        """Arrays ``(block_units, tile_n)`` that a block writes into the mailbox in each step."""
        return self.matmul.num_k * self.matmul.tile_k // self.padded_units

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Shape of the tile that takes the place of each number of the body."""
        return self.block_units, self.group_rows

    def time_index(self, n: Any) -> Any:
        """Returns the index in time of the n-th step taken."""
        return self.num_steps - 1 - n if self.reverse else n

    def slot(self, n: Any) -> Any:
        """Returns the index, of ``num_steps + 1``, of the mailbox slot that the n-th step taken reads."""
        return self.num_steps - n if self.reverse else n


def scan(
    make_spec: Callable[[int, int, int, int], KernelSpec],
    program_type: type["BlockProgram"],
    body: Body,
    matrix: Array,
    messages: Array,
    resident: Any,
    carry: Any,
    over_time: Any,
) -> tuple[Any, Array, Any]:
    """Scans over time with steps that are elementwise except for a product by a constant matrix.

    A step computes ``products[m] = sum_e matrix[m, e] messages[e]`` and then
    ``carry, messages, outputs_t = body(resident, products, carry, inputs_t)`` for every batch row.

    Args:
      make_spec: from M, E, H and T to the sizes of the kernel.
      program_type: the program of a block.
      body: the elementwise part of a step, for one unit of one batch row.
      matrix: ``(M, E, H, H)`` bfloat16.
      messages: ``(E, B, H)``, the operand of the product in the first step; cast to bfloat16.
      resident: tree of arrays ``(..., H)`` that every step reads.
      carry: tree of arrays ``(B, H)``, float32.
      over_time: tree of arrays ``(T, ..., B, H)``, or ``(T, ..., B, 1)`` if equal for all units; float32 or bool.

    Returns:
      the carry after the last step; the messages after each step, ``(T, E, B, H)`` bfloat16; and the outputs, with a
      leading time axis.

    Raises:
      ValueError: if ``body`` does not return one number for each unit of each row.
    """
    num_products, num_messages, units, _ = matrix.shape
    spec = make_spec(num_products, num_messages, units, len(jax.tree.leaves(over_time)[0]))
    batch_size = messages.shape[1]
    num_groups = max(1, -(-batch_size // spec.group_rows))
    jaxpr, shapes = _trace_for_one_unit(spec, body, resident, carry, over_time)
    extra_units, extra_rows = spec.padded_units - units, num_groups * spec.group_rows - batch_size

    def to_kernel(a: Array) -> Array:
        return _to_kernel_layout(a, 0 if a.shape[-1] == 1 < units else extra_units, extra_rows)

    padded = jnp.pad(matrix, [(0, 0), (0, 0), (0, extra_units), (0, extra_units)])
    operands = (
        program_type.split_matrix(spec, padded).reshape(-1, spec.matmul.tile_k).astype(jnp.bfloat16),
        to_kernel(messages.astype(jnp.bfloat16)),
        [jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, extra_units)]) for a in jax.tree.leaves(resident)],
        [to_kernel(a) for a in jax.tree.leaves(carry)],
        [to_kernel(a) for a in jax.tree.leaves(over_time)],
    )
    mailbox, last, outputs = _call(spec, program_type, jaxpr, num_groups, operands, jax.tree.leaves(shapes[2]))

    def from_kernel(a: Array) -> Array:
        return jnp.swapaxes(a, -1, -2)[..., :batch_size, :units]

    def unflatten(like: Any, arrays: Sequence[Array]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(like), [from_kernel(a) for a in arrays])

    slots = _split_mailbox(spec, mailbox, num_groups)
    sent = from_kernel(slots[:-1] if spec.reverse else slots[1:])
    return unflatten(carry, last), sent, unflatten(shapes[2], outputs)


def _trace_for_one_unit(spec: KernelSpec, body: Body, resident: Any, carry: Any, over_time: Any) -> tuple[Any, Any]:
    """Returns the jaxpr of ``body`` for one unit of one batch row, and the shapes of its results."""

    def aval(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    return jax.make_jaxpr(body, return_shape=True)(
        jax.tree.map(lambda a: aval((*a.shape[:-1], 1), a.dtype), resident),
        aval((spec.num_products, 1, 1), jnp.float32),
        jax.tree.map(lambda a: aval((1, 1), a.dtype), carry),
        jax.tree.map(lambda a: aval((*a.shape[1:-2], 1, 1), a.dtype), over_time),
    )


def _to_kernel_layout(a: Array, extra_units: int, extra_rows: int) -> Array:
    """Transposes ``(..., B, H)`` to ``(..., H, B)``, pads it with zeros, and converts booleans to float32."""
    a = jnp.pad(jnp.swapaxes(a, -1, -2), [*[(0, 0)] * (a.ndim - 2), (0, extra_units), (0, extra_rows)])
    return a.astype(jnp.float32) if a.dtype == jnp.bool_ else a


def _split_mailbox(spec: KernelSpec, mailbox: Array, num_groups: int) -> Array:
    """Returns the messages in each slot of the mailbox, ``(T + 1, E, H, B)``."""
    arrays, units = spec.message_arrays, spec.padded_units
    # The columns of an array are the groups, within a group the messages in this array, within a message the rows.
    mailbox = mailbox.reshape(
        spec.num_steps + 1, arrays, units, num_groups, spec.num_messages // arrays, spec.group_rows
    )
    mailbox = jnp.moveaxis(mailbox, 4, 2)
    return mailbox.reshape(spec.num_steps + 1, spec.num_messages, units, num_groups * spec.group_rows)


def _call(
    spec: KernelSpec,
    program_type: type["BlockProgram"],
    jaxpr: Any,
    num_groups: int,
    operands: Any,
    output_avals: Sequence[Any],
) -> Any:
    """Runs the kernel on operands in its layout; returns the mailbox, the carry and the outputs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    matmul, columns = spec.matmul, num_groups * spec.group_rows
    mailbox_rows = (spec.num_steps + 1) * spec.message_arrays * spec.padded_units
    out_type = (
        jax.ShapeDtypeStruct((mailbox_rows, num_groups * matmul.tile_n), jnp.bfloat16),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[3]],
        [
            jax.ShapeDtypeStruct((spec.num_steps, *a.shape[:-2], spec.padded_units, columns), a.dtype)
            for a in output_avals
        ],
    )
    resident_tiles = matmul.num_m * matmul.num_k
    scratch_types = [
        plgpu.SMEM((resident_tiles, matmul.tile_m, matmul.tile_k), jnp.bfloat16),
        plgpu.SMEM((matmul.num_buffers, matmul.tile_k, matmul.tile_n), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=resident_tiles),
        plgpu.Barrier(num_barriers=matmul.num_buffers),
        *program_type.scratch_types(spec),
    ]
    return plgpu.kernel(
        lambda *refs: program_type(spec, jaxpr, *refs).take_all_steps(),
        out_type=out_type,
        scratch_types=scratch_types,
        **program_type.grid(spec, num_groups),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="lstm",
        interpret=gpu_interpret_params(),
    )(*operands)


class BlockProgram:
    """The program of one block, whose group is a cluster. The grid overrides the methods after `load_inputs`."""

    def __init__(self, spec: KernelSpec, jaxpr: Any, *refs: Any) -> None:
        from jax.experimental import pallas as pl

        self.spec, self.jaxpr = spec, jaxpr
        # Operands and results in global memory, then tiles and barriers in shared memory.
        self.matrix, self.first_messages, self.resident, self.initial, self.over_time = refs[:5]
        self.mailbox, self.last, self.outputs = refs[5:8]
        self.resident_tiles, self.received_tiles, self.resident_barrier, self.received_barrier = refs[8:12]
        self.bind_scratch(*refs[12:])
        self.block, self.group = lax.axis_index("units"), lax.axis_index("rows")
        self.units = pl.ds(self.block * spec.block_units, spec.block_units)
        self.rows = pl.ds(self.group * spec.group_rows, spec.group_rows)
        self.columns = pl.ds(self.group * spec.matmul.tile_n, spec.matmul.tile_n)

    def take_all_steps(self) -> None:
        """Loads the resident arrays, sends the first messages, takes all steps and stores the carry."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        spec = self.spec
        self.load_matrix()
        messages = [self.load_tile(self.first_messages.at[e, self.units, self.rows]) for e in range(spec.num_messages)]
        self.send(messages, np.int32(0))
        self.wait_for_messages(np.int32(0))
        resident = [
            [self.load_tile(ref.at[*i, self.units], repeat_axis=1) for i in np.ndindex(*ref.shape[:-1])]
            for ref in self.resident
        ]
        carry = [self.load_tile(ref.at[self.units, self.rows]) for ref in self.initial]
        plgpu.barrier_wait(self.resident_barrier)

        def take_step(n: Array, carry: list[Array]) -> list[Array]:
            return self.take_step(n, resident, carry)

        carry = lax.fori_loop(np.int32(0), np.int32(spec.num_steps), take_step, carry)
        for ref, a in zip(self.last, carry):
            store(ref.at[self.units, self.rows], a)

    def take_step(self, n: Array, resident: list[list[Array]], carry: list[Array]) -> list[Array]:
        """Takes the n-th step; returns the new carry."""
        for k in range(self.spec.matmul.num_buffers):
            self.fetch(n, k)
        inputs = self.load_inputs(n)  # loaded while the received tiles are in flight
        args = [
            *([self.broadcast_to_tile(a, 0) for a in tiles] for tiles in resident),
            self.split_products(self.accumulate(n)),
            *([a] for a in carry),
            *([self.broadcast_to_tile(a, 1) if a.ndim == 1 else a for a in tiles] for tiles in inputs),
        ]
        args = [
            [a != 0 for a in tiles] if aval.dtype == jnp.bool_ else tiles
            for tiles, aval in zip(args, self.jaxpr.in_avals)
        ]
        results = jaxpr_tiling.eval_on_tiles(self.jaxpr, self.spec.tile_shape, args)
        carry, (messages, *outputs) = [a for (a,) in results[: len(carry)]], results[len(carry) :]
        for ref, tiles in zip(self.outputs, outputs):
            for index, a in zip(np.ndindex(*ref.shape[1:-2]), tiles):
                store(ref.at[self.spec.time_index(n), *index, self.units, self.rows], a)
        self.send(messages, n + 1)
        self.wait_for_messages(n + 1)
        return carry

    def load_matrix(self) -> None:
        """Starts the copies of this block's tiles of the matrix into shared memory."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        matmul = self.spec.matmul
        num_tiles = matmul.num_m * matmul.num_k
        for n in range(num_tiles):
            tile = pl.ds((self.block * num_tiles + n) * matmul.tile_m, matmul.tile_m)
            plgpu.copy_gmem_to_smem(self.matrix.at[tile], self.resident_tiles.at[n], self.resident_barrier)

    def fetch(self, n: Array, k: int) -> None:
        """Starts the copy of the k-th tile of messages to the n-th step into its buffer."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        matmul, buffer = self.spec.matmul, k % self.spec.matmul.num_buffers
        tile = pl.ds((self.spec.slot(n) * matmul.num_k + k) * matmul.tile_k, matmul.tile_k)
        source, barrier = self.mailbox.at[tile, self.columns], self.received_barrier.at[buffer]
        plgpu.copy_gmem_to_smem(source, self.received_tiles.at[buffer], barrier)

    def accumulate(self, n: Array) -> list[Array]:
        """Returns the ``num_m`` products of this block, given that the first copies are under way."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        matmul = self.spec.matmul

        def multiply(*accumulators: Any) -> list[Array]:
            for k in range(matmul.num_k):
                buffer = k % matmul.num_buffers
                plgpu.barrier_wait(self.received_barrier.at[buffer])
                for m, accumulator in enumerate(accumulators):
                    left, right = self.resident_tiles.at[m * matmul.num_k + k], self.received_tiles.at[buffer]
                    plgpu.wgmma(accumulator, left, right)
                if k + matmul.num_buffers < matmul.num_k:
                    plgpu.wgmma_wait(0)  # until the buffer is free
                    self.fetch(n, k + matmul.num_buffers)
            return [accumulator[...] for accumulator in accumulators]

        accumulators = [plgpu.WGMMAAccumulatorRef((matmul.tile_m, matmul.tile_n))] * matmul.num_m
        return pl.run_scoped(multiply, *accumulators)

    def load_inputs(self, n: Any) -> list[list[Array]]:
        """Loads the inputs of the n-th step: tiles, or vectors over the rows if they are equal for all units."""
        time = self.spec.time_index(n)

        def load(ref: Any) -> list[Array]:
            units, repeat_axis = (0, 0) if ref.shape[-2] == 1 else (self.units, None)
            leading = np.ndindex(*ref.shape[1:-2])
            return [self.load_tile(ref.at[time, *i, units, self.rows], repeat_axis=repeat_axis) for i in leading]

        return [load(ref) for ref in self.over_time]

    def load_tile(self, ref: Any, *, repeat_axis: int | None = None) -> Array:
        """Loads a tile into registers, or a vector in the layout of a tile reduced over ``repeat_axis``."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if gpu_interpret_params():  # the interpreter of JAX 0.10 has no `plgpu.load`
            return ref[...]
        layout = self.tile_layout() if repeat_axis is None else self.tile_layout().reduce((repeat_axis,))
        index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # JAX 0.10 requires an index
        return plgpu.load(ref, *index, layout=layout, optimized=False)  # unoptimized: 8 bytes per access

    def broadcast_to_tile(self, a: Array, axis: int) -> Array:
        """Repeats a vector along one axis of a tile over the other."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        a = lax.broadcast_in_dim(a, self.spec.tile_shape, (axis,))
        # JAX 0.10 does not infer the layout.
        return a if gpu_interpret_params() else plgpu.layout_cast(a, self.tile_layout())

    @staticmethod
    def split_matrix(spec: KernelSpec, matrix: Array) -> Array:
        """Returns ``(M, E, H, H)`` in the order ``(num_blocks, num_m, num_k, tile_m, tile_k)``."""
        by_block = (spec.num_products, spec.num_messages, spec.num_blocks, spec.block_units, spec.padded_units)
        return jnp.moveaxis(matrix.reshape(by_block), 2, 0)

    @staticmethod
    def scratch_types(spec: KernelSpec) -> list[Any]:
        """Returns the scratch memory for `bind_scratch`: the messages of this block, and barriers."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        messages = plgpu.SMEM((spec.num_messages, spec.block_units, spec.group_rows), jnp.bfloat16)
        return [messages, *cluster_barriers(spec)]

    @staticmethod
    def grid(spec: KernelSpec, num_groups: int) -> dict[str, Any]:
        """Returns the axes of the kernel: "rows" over the groups, "units" over the blocks of a group."""
        return {
            "grid": (num_groups,),
            "grid_names": ("rows",),
            "cluster": (spec.num_blocks,),
            "cluster_names": ("units",),
        }

    def bind_scratch(self, *refs: Any) -> None:
        """Stores the refs of `scratch_types`."""
        self.outbox, *self.barriers = refs

    def tile_layout(self) -> Any:
        """Returns the layout of a tile in registers, which is the layout of a wgmma accumulator."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.Layout.WGMMA

    def split_products(self, accumulators: list[Array]) -> list[Array]:
        """Returns one tile per product of the step."""
        return accumulators

    def send(self, messages: Sequence[Array], n: Any) -> None:
        """Writes this block's messages to the n-th step into the mailbox and signals it, without waiting."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        spec = self.spec
        for e, a in enumerate(messages):
            self.outbox[e] = a.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for e in range(spec.num_messages):
            first = (spec.slot(n) * spec.num_messages + e) * spec.padded_units + self.block * spec.block_units
            plgpu.copy_smem_to_gmem(self.outbox.at[e], self.mailbox.at[pl.ds(first, spec.block_units), self.columns])
        plgpu.wait_smem_to_gmem(0)
        self.arrive(n)

    def arrive(self, n: Any) -> None:
        """Signals the barrier of the n-th step."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        for barrier in self.barriers:
            plgpu.barrier_arrive(barrier.at[n % 2])

    def wait_for_messages(self, n: Any) -> None:
        """Waits until all messages to the n-th step are in the mailbox."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        for barrier in self.barriers:
            plgpu.barrier_wait(barrier.at[n % 2])


def cluster_barriers(spec: KernelSpec) -> list[Any]:
    """Returns the barriers of a cluster: none for a single block, else two that are used in turn.

    Two suffice: all blocks have left a barrier before any block arrives at it again.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return [plgpu.ClusterBarrier(collective_axes=("units",), num_barriers=2)] if spec.num_blocks > 1 else []


def store(ref: Any, a: Array) -> None:
    """Stores a tile from registers into global memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if gpu_interpret_params() or store is None:  # JAX 0.10 has no `plgpu.store`
        ref[...] = a
    else:
        store(ref, a, optimized=False)
