"""`mosaic_gpu_scan.scan` on all of a Hopper GPU, for weights larger than the shared memory of a cluster.

A block has few units, 16 with four gates, because more blocks have more shared memory in total. That is less than the
64 rows of the smallest wgmma, so a block computes a single product of all its rows stacked by all messages side by
side. Forward it has a row per gate and unit, and there is one message. Backward each gate has rows and a message::

    sums[(e, unit), (e', row)] = sum_k matrix[e, unit, k] messages[e', k, row]

Only the parts with e = e' are used, and added up. Separate products would read the matrix from shared memory once per
gate. The sums pass through shared memory to become tiles of ``(units, rows)``.

The blocks wait for one another at a semaphore in global memory that counts messages since the start of the kernel.
Therefore all blocks must run at the same time. Each needs the shared memory of a whole streaming multiprocessor (SM),
and a grid of more blocks than SMs is refused. Another kernel that occupies SMs delays this one. Two kernels of this
kind at once, each waiting for SMs that the other occupies, would wait forever. XLA runs them one after the other, on
one stream, unless configured otherwise.

The interpreters have no such semaphore, but the interpreter of JAX 0.12 has cluster barriers for any cluster size.
Interpreted blocks form a cluster and wait at its barrier. All else is the same: the numbers are checked, the semaphore
is not.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxlstm.experimental.pallas import target
from jaxlstm.experimental.pallas.mosaic_gpu_scan import (
    GROUP_ROWS,
    RESERVED,
    SHARED_MEMORY,
    BlockProgram,
    KernelSpec,
    MatmulSpec,
    cluster_barriers,
    store,
)

WGMMA_ROWS = 64  # of the smallest wgmma; also the columns of swizzled memory
MIN_BLOCK_UNITS = 16
TILE_KS = (256, 192, 128, 64)  # rows of messages fetched in one copy, at most 256
MAX_ACCUMULATORS = 128 * 128  # of a block, in registers
MAX_TILE_N = 256  # of a wgmma


def matmul_spec(num_products: int, num_messages: int, units: int, rows: int) -> MatmulSpec | None:
    """Returns the product of a block, with the largest received tiles of which two fit; None if it does not fit."""
    stacked = num_products * num_messages
    tile_m, tile_n = -(-stacked * block_units(stacked) // WGMMA_ROWS) * WGMMA_ROWS, num_messages * rows
    if tile_m * tile_n > MAX_ACCUMULATORS or tile_n > MAX_TILE_N:
        return None
    found = None
    for tile_k in (k for k in TILE_KS if units % k == 0):
        num_k = units // tile_k
        spec = MatmulSpec(1, num_k, tile_m, tile_k, tile_n, num_buffers=1)
        num_buffers = min(num_k, (SHARED_MEMORY - footprint(spec)) // (2 * tile_k * tile_n) + 1)
        if num_buffers >= 1:
            found = spec._replace(num_buffers=num_buffers)
        if num_buffers >= min(2, num_k):  # copies overlap with products
            break
    return found


def footprint(spec: MatmulSpec) -> int:
    """Returns the bytes of shared memory of a block: its rows of the matrix, received tiles and sums."""
    resident, received = spec.num_k * spec.tile_m * spec.tile_k, spec.num_buffers * spec.tile_k * spec.tile_n
    return 2 * (resident + received) + 4 * spec.tile_m * spec.tile_n + RESERVED


def block_units(gates: int) -> int:
    """Returns the hidden units of a block: as few as fill a wgmma with the rows of all gates."""
    return max(MIN_BLOCK_UNITS, WGMMA_ROWS >> (gates - 1).bit_length())


def rows_that_fit(gates: int, units: int, batch_size: int) -> int:
    """Returns the batch rows of a group: few, unless the blocks would then not all run at once.

    Raises:
      ValueError: if the weights of a layer do not fit into the GPU, or there are too many blocks.
    """
    num_blocks, num_sms = _padded(units) // block_units(gates), target.num_sms()
    fitting = [rows for rows in GROUP_ROWS if _fits(gates, units, rows)]
    for rows in fitting:
        if num_blocks * max(1, -(-batch_size // rows)) <= num_sms:
            return rows
    max_batch = max((rows * (num_sms // num_blocks) for rows in fitting), default=0)
    max_units = max((n for n in range(WGMMA_ROWS, 4096, WGMMA_ROWS) if _fits(gates, n, GROUP_ROWS[0])), default=0)
    max_units = min(max_units, num_sms * block_units(gates) // WGMMA_ROWS * WGMMA_ROWS)
    kib = 2 * -(-gates * block_units(gates) // WGMMA_ROWS) * WGMMA_ROWS * _padded(units) / 1024
    few, more = GROUP_ROWS
    raise ValueError(
        "implementation='pallas' keeps the recurrent weights in the shared memory of a Hopper GPU: hidden_size="
        f"{units} takes {num_blocks} blocks of {block_units(gates)} units, each with {kib:.0f} KiB of weights in "
        f"{SHARED_MEMORY / 1024:.0f} KiB, for every {few} or {more} sequences, got a batch of {batch_size}, and "
        f"{num_sms} blocks run at once; hidden_size fits up to {max_units}"
        + (f", and a batch with {units} units up to {max_batch}" if max_batch else "")
    )


def _fits(gates: int, units: int, rows: int) -> bool:
    # Forward there is one product per gate; backward one message per gate.
    return all(matmul_spec(*sizes, _padded(units), rows) for sizes in ((gates, 1), (1, gates)))


def _padded(units: int) -> int:
    """Rounds ``units`` up to whole columns of swizzled memory."""
    return -(-units // WGMMA_ROWS) * WGMMA_ROWS


def kernel_spec(
    num_products: int, num_messages: int, units: int, num_steps: int, *, rows: int, reverse: bool
) -> KernelSpec:
    """Returns the sizes of a kernel on a grid, with ``rows`` batch rows per group of blocks."""
    padded, size = _padded(units), block_units(num_products * num_messages)
    matmul = matmul_spec(num_products, num_messages, padded, rows)
    assert matmul is not None, "rows_that_fit has refused it"
    return KernelSpec(num_products, num_messages, padded // size, size, rows, num_steps, reverse, matmul)


class GridBlockProgram(BlockProgram):
    """The program of one block whose group is a part of the grid."""

    @staticmethod
    def split_matrix(spec: KernelSpec, matrix: Array) -> Array:
        """Returns ``(M, E, H, H)`` in the order ``(num_blocks, num_k, tile_m, tile_k)``."""
        stacked, num_k, tile_k = spec.num_products * spec.num_messages, spec.matmul.num_k, spec.matmul.tile_k
        by_block = matrix.reshape(stacked, spec.num_blocks, spec.block_units, num_k, tile_k)
        by_block = by_block.transpose(1, 3, 0, 2, 4).reshape(spec.num_blocks, num_k, -1, tile_k)
        return jnp.pad(by_block, [(0, 0), (0, 0), (0, spec.matmul.tile_m - by_block.shape[2]), (0, 0)])

    @staticmethod
    def scratch_types(spec: KernelSpec) -> list[Any]:
        """Returns the scratch memory for `bind_scratch`: the sums and, in the interpreter, barriers."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        sums = plgpu.SMEM((spec.matmul.tile_m, spec.matmul.tile_n), jnp.float32)
        return [sums, *(cluster_barriers(spec) if target.gpu_interpret_params() else [])]

    @staticmethod
    def grid(spec: KernelSpec, num_groups: int) -> dict[str, Any]:
        """Returns the axes of the kernel: "rows" over the groups, "units" over the blocks of a group."""
        if target.gpu_interpret_params():
            return BlockProgram.grid(spec, num_groups)
        return {"grid": (num_groups, spec.num_blocks), "grid_names": ("rows", "units")}

    def bind_scratch(self, *refs: Any) -> None:
        """Stores the refs of `scratch_types`, and allocates one semaphore per group."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self.sums, *self.barriers = refs
        if not target.gpu_interpret_params():
            num_groups = self.mailbox.shape[1] // self.spec.matmul.tile_n
            self.semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((num_groups,)))

    def tile_layout(self) -> Any:
        """Returns the layout of a tile: a warp has every fourth set of 4 units, and a thread two rows of one unit."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        tiling = plgpu.Tiling(((16, 16), (4, 16), (2,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def split_products(self, accumulators: list[Array]) -> list[Array]:
        """Returns one tile per product of the step."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        spec = self.spec
        self.sums[...] = accumulators[0]
        plgpu.commit_smem()  # makes the sums visible to all warps

        def tile(m: int, e: int) -> Array:
            units, rows = (m * spec.num_messages + e) * spec.block_units, e * spec.group_rows
            return self.load_tile(self.sums.at[pl.ds(units, spec.block_units), pl.ds(rows, spec.group_rows)])

        others = range(1, spec.num_messages)
        return [sum(tile(m, e) for e in others) + tile(m, 0) for m in range(spec.num_products)]

    def send(self, messages: Sequence[Array], n: Any) -> None:
        """Writes this block's messages to the n-th step into the mailbox and signals it, without waiting.

        The threads store the messages themselves. The signal follows a barrier of all threads; it releases their
        stores to the whole GPU.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        spec = self.spec
        for e, a in enumerate(messages):
            units = pl.ds(spec.slot(n) * spec.padded_units + self.block * spec.block_units, spec.block_units)
            rows = pl.ds(self.group * spec.matmul.tile_n + e * spec.group_rows, spec.group_rows)
            store(self.mailbox.at[units, rows], a.astype(jnp.bfloat16))
        if target.gpu_interpret_params():
            self.arrive(n)
        else:
            plgpu.semaphore_signal(self.semaphores.at[self.group], memory_scope="gpu")

    def wait_for_messages(self, n: Any) -> None:
        """Waits until all messages to the n-th step are in the mailbox.

        The wait acquires the stores of the other blocks for one thread, and a barrier follows for all threads. Ordinary
        stores wrote the messages and the asynchronous proxy reads them; only a fence orders the two.
        """
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if target.gpu_interpret_params():
            return super().wait_for_messages(n)
        semaphore, count = self.semaphores.at[self.group], (n + 1) * self.spec.num_blocks
        plgpu.semaphore_wait(semaphore, count, decrement=False, memory_scope="gpu")
        _fence_async_proxy()


def _fence_async_proxy() -> None:
    """Emits `fence.proxy.async.global` in every thread."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import nvvm

    def fence(context: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_global)

    inlined: Any = plgpu.inline_mgpu()(fence)  # a function without arguments: `context` is passed by Pallas
    inlined()
