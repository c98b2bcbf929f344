"""`blocks.scan` on all of a Hopper GPU: for weights that are larger than the shared memory of a cluster.

A block has few units, 16 of them where there are four gates, since a whole GPU has the more room for weights the more
of its processors take part. That is less than the 64 rows of the smallest product, so a block takes a single product of
all its rows under one another, and of all that is sent side by side. Forward the rows are those of the gates; what is
sent is one matrix. Backward each gate has rows and is sent::

    sums[(e, unit), (e', row)] = sum_k matrix[e, unit, k] sent[e', k, row]

where only e = e' is wanted, and summed. The rest is thrown away: to take the products one by one would be to read the
matrix from shared memory as many times. The sums go through shared memory to lie as tiles of ``(units, rows)``.

The blocks wait for one another at a semaphore in global memory, which counts what has been sent since the kernel began.
Nothing else makes one of them run before another is done, so all have to run at once: a grid of more blocks than the
GPU has processors is refused, since each needs the shared memory of one. Another kernel that holds processors delays
it; two kernels of this kind at once, each with some processors and in want of more, would wait for ever. On one stream,
where XLA puts them unless it is told otherwise, one runs after the other.

Interpreters know no semaphore, but that of JAX 0.12 knows the barrier of a cluster of any size. There the blocks are a
cluster, and wait as one; all else is the same, so that numbers are checked and the wait itself is not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm.experimental.pallas import mosaic_gpu_scan, mosaic_tpu_scan
from jaxlstm.experimental.pallas.mosaic_gpu_scan import RESERVED, ROWS, SHARED_MEMORY, Form, Product, interpreted

LOWEST = 64  # rows of the smallest product of matrices that a Hopper GPU knows; the columns of swizzled memory
FEWEST_UNITS = 16  # of a block
DEPTHS = (256, 192, 128, 64)  # of what is fetched at once; 256 is the most
MOST_SUMS = 128 * 128  # of a block, in registers
MOST_WIDTH = 256  # of a product


def product(parts: int, pieces: int, units: int, rows: int) -> Product | None:
    """The product of a block, fetched in few pieces that come while others are multiplied; None if it does not fit."""
    height, width = -(-parts * pieces * units_of(parts * pieces) // LOWEST) * LOWEST, pieces * rows
    if height * width > MOST_SUMS or width > MOST_WIDTH:
        return None
    found = None
    for depth in (d for d in DEPTHS if units % d == 0):
        across = units // depth
        one = Product(1, across, height, depth, width, 1)
        slots = min(across, (SHARED_MEMORY - footprint(one)) // (2 * depth * width) + 1)
        if slots >= 1:
            found = one._replace(slots=slots)
        if slots >= min(2, across):
            break
    return found


def footprint(form: Product) -> int:
    """Bytes of shared memory that a block takes: its matrices, what it reads, and its sums."""
    matrices, received = form.across * form.height * form.depth, form.slots * form.depth * form.width
    return 2 * (matrices + received) + 4 * form.height * form.width + RESERVED


def units_of(gates: int) -> int:
    """Hidden units of a block: with all gates of them a product is no larger than it has to be."""
    return max(FEWEST_UNITS, LOWEST >> (gates - 1).bit_length())


def rows_that_fit(gates: int, units: int, batch: int) -> int:
    """How many rows of the batch a set of blocks takes: few, unless there are more blocks than can run at once.

    Raises:
      ValueError: if the weights of a layer do not fit into the GPU, or there are too many blocks.
    """
    blocks, processors = _filled(units) // units_of(gates), _processors()
    fitting = [rows for rows in ROWS if _fits(gates, units, rows)]
    for rows in fitting:
        if blocks * max(1, -(-batch // rows)) <= processors:
            return rows
    most = max((rows * (processors // blocks) for rows in fitting), default=0)
    largest = max((n for n in range(LOWEST, 4096, LOWEST) if _fits(gates, n, ROWS[0])), default=0)
    largest = min(largest, processors * units_of(gates) // LOWEST * LOWEST)
    weights = 2 * -(-gates * units_of(gates) // LOWEST) * LOWEST * _filled(units) / 1024
    raise ValueError(
        "implementation='pallas' keeps the recurrent weights in the shared memory of a Hopper GPU, one block to a "
        f"processor: {units} units are {blocks} blocks of {units_of(gates)}, each with {weights:.0f} KiB of weights in "
        f"{SHARED_MEMORY / 1024:.0f} KiB, for every {ROWS[0]} or {ROWS[1]} sequences of a batch of {batch}, and "
        f"{processors} blocks run at once; hidden_size fits up to {largest}"
        + (f", and a batch with {units} units up to {most}" if most else "")
    )


def _fits(gates: int, units: int, rows: int) -> bool:
    # Forward the products are as many as gates; backward what is sent.
    return all(product(*sizes, _filled(units), rows) for sizes in ((gates, 1), (1, gates)))


def _filled(units: int) -> int:
    """``units``, with those added that make whole columns of swizzled memory."""
    return -(-units // LOWEST) * LOWEST


def _processors() -> int:
    """Of the GPU at hand, or of that which kernels are made for."""
    said = mosaic_tpu_scan.making_for.value
    return said.processors if isinstance(said, mosaic_tpu_scan.Hopper) else jax.devices()[0].core_count


def form(parts: int, pieces: int, units: int, steps: int, *, rows: int, reverse: bool) -> Form:
    """What a kernel of a grid is compiled for, for `blocks.scan`; ``rows`` of the batch in one set of blocks."""
    mine, taken = units_of(parts * pieces), product(parts, pieces, _filled(units), rows)
    assert taken is not None, "rows_that_fit has refused it"
    return Form(parts, pieces, _filled(units) // mine, mine, rows, steps, reverse, taken)


class Block(mosaic_gpu_scan.Block):
    """A block at work, one of a grid."""

    @staticmethod
    def matrices(form: Form, matrix: Array) -> Array:
        """``(M, E, H, H)`` in the order ``(blocks, across, height, depth)``."""
        stacked, across = form.parts * form.pieces, form.product.across
        by_block = matrix.reshape(stacked, form.blocks, form.mine, across, form.product.depth)
        by_block = by_block.transpose(1, 3, 0, 2, 4).reshape(form.blocks, across, -1, form.product.depth)
        return jnp.pad(by_block, [(0, 0), (0, 0), (0, form.product.height - by_block.shape[2]), (0, 0)])

    @staticmethod
    def scratch(form: Form) -> list[Any]:
        """The sums and, in the interpreter, barriers."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        sums = plgpu.SMEM((form.product.height, form.product.width), jnp.float32)
        return [sums, *(mosaic_gpu_scan.meeting(form) if interpreted() else [])]

    @staticmethod
    def axes(form: Form, sets: int) -> dict[str, Any]:
        """Of the kernel: "rows", over the sets of blocks, and "units", over the blocks of one."""
        if interpreted():
            return mosaic_gpu_scan.Block.axes(form, sets)
        return {"grid": (sets, form.blocks), "grid_names": ("rows", "units")}

    def take(self, *refs: Any) -> None:
        """Refs of `scratch`, and the semaphores, one for each set of blocks."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self.stacked, *self.meeting = refs
        if not interpreted():
            sets = self.places.shape[1] // self.form.product.width
            self.arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((sets,)))

    def layout(self) -> Any:
        """Of a tile, in registers: each of four warps has every fourth set of 4 units, and a thread two rows of one."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        tiling = plgpu.Tiling(((16, 16), (4, 16), (2,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def products(self, sums: list[Array]) -> list[Array]:
        """A tile for each part of the product."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        self.stacked[...] = sums[0]
        plgpu.commit_smem()  # for all warps to see it

        def tile(part: int, piece: int) -> Array:
            units, rows = (part * form.pieces + piece) * form.mine, piece * form.rows
            return self.load(self.stacked.at[pl.ds(units, form.mine), pl.ds(rows, form.rows)])

        return [sum(tile(part, e) for e in range(1, form.pieces)) + tile(part, 0) for part in range(form.parts)]

    def send(self, sent: Sequence[Array], n: Any) -> None:
        """This block's share of what goes into the n-th step, and word of it, without waiting for the others.

        The threads write it by themselves. The signal comes after a barrier of them all and is a release of what all of
        them have written, to the whole GPU.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        for piece, a in enumerate(sent):
            units = pl.ds(form.place(n) * form.units + self.block * form.mine, form.mine)
            rows = pl.ds(self.set * form.product.width + piece * form.rows, form.rows)
            mosaic_gpu_scan.store(self.places.at[units, rows], a.astype(jnp.bfloat16))
        if interpreted():
            for barrier in self.meeting:
                plgpu.barrier_arrive(barrier.at[n % 2])
        else:
            plgpu.semaphore_signal(self.arrived.at[self.set], memory_scope="gpu")

    def wait(self, n: Any) -> None:
        """Until all shares of what goes into the n-th step are there.

        The wait is an acquire, for one thread, and then a barrier, for all. What was written with ordinary stores is
        now read by the asynchronous proxy, which a fence alone orders after it.
        """
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if interpreted():
            return super().wait(n)
        arrived, all_of_them = self.arrived.at[self.set], (n + 1) * self.form.blocks
        plgpu.semaphore_wait(arrived, all_of_them, decrement=False, memory_scope="gpu")
        _order_asynchronous_reads()


def _order_asynchronous_reads() -> None:
    """`fence.proxy.async.global`, by every thread."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import nvvm

    def fence(context: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_global)

    inlined: Any = plgpu.inline_mgpu()(fence)  # called without the context
    inlined()
