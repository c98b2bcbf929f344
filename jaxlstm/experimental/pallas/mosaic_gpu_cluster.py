"""`blocks.scan` on thread-block clusters: at each step the blocks of a cluster meet at one of its barriers.

Each block has 64 of the hidden units. To write into the shared memory of the other blocks, with
`plgpu.async_store_smem`, would save half of the way of what is sent; interpreters do not know it.
"""

from jaxlstm.experimental.pallas.mosaic_gpu_scan import RESERVED, ROWS, SHARED_MEMORY, Form, Product

UNITS = 64  # of a block: the rows of the smallest product of matrices that a Hopper GPU knows
MOST_BLOCKS = 8  # in a cluster, on every Hopper GPU
PROCESSORS = 132  # of an H100; with fewer all is the same, but slower


def footprint(parts: int, pieces: int, blocks: int, rows: int, slots: int = 1) -> int:
    """Bytes of shared memory that a block takes: its rows of the matrices, what it reads and what it sends."""
    units = blocks * UNITS
    return 2 * (parts * pieces * UNITS * units + slots * units * rows + pieces * UNITS * rows) + RESERVED


def blocks_of(units: int) -> int:
    """Blocks that ``units`` are spread over."""
    return max(1, -(-units // UNITS))


def rows_that_fit(gates: int, units: int, batch: int) -> int | None:
    """How many rows of the batch a cluster takes: few, unless there are more clusters than can run at once.

    None if the weights of a layer do not fit into a cluster.
    """
    few, more = ROWS
    if not _fits(gates, units, few):
        return None
    waiting = blocks_of(units) * -(-batch // few) > PROCESSORS
    return more if waiting and _fits(gates, units, more) else few


def _fits(gates: int, units: int, rows: int) -> bool:
    blocks = blocks_of(units)
    # Forward the products are as many as gates; backward what is sent.
    largest = max(footprint(gates, 1, blocks, rows), footprint(1, gates, blocks, rows))
    return blocks <= MOST_BLOCKS and largest <= SHARED_MEMORY


def form(parts: int, pieces: int, units: int, steps: int, *, rows: int, reverse: bool) -> Form:
    """What a kernel of clusters is compiled for, for `blocks.scan`; ``rows`` of the batch in one cluster."""
    count = blocks_of(units)
    slots = max(n for n in range(1, pieces + 1) if n == 1 or footprint(parts, pieces, count, rows, n) <= SHARED_MEMORY)
    product = Product(parts, pieces, UNITS, count * UNITS, rows, slots)
    return Form(parts, pieces, count, UNITS, rows, steps, reverse, product)
