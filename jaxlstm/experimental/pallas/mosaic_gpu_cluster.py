"""`mosaic_gpu_scan.scan` on thread-block clusters: at each step the blocks of a cluster meet at a cluster barrier.

Each block has 64 hidden units. Writing messages directly into the shared memory of the other blocks, with
`plgpu.async_store_smem`, would avoid half of the copies; the interpreters do not support it.
"""

from jaxlstm.experimental.pallas.mosaic_gpu_scan import GROUP_ROWS, RESERVED, SHARED_MEMORY, KernelSpec, MatmulSpec

BLOCK_UNITS = 64  # the rows of the smallest wgmma
MAX_BLOCKS = 8  # in a cluster, on every Hopper GPU
NUM_SMS = 132  # of an H100; fewer make the choice of rows slower, not wrong


def footprint(num_products: int, num_messages: int, num_blocks: int, rows: int, num_buffers: int = 1) -> int:
    """Returns the bytes of shared memory of a block: its rows of the matrix, received tiles and outbox."""
    units = num_blocks * BLOCK_UNITS
    matrix = num_products * num_messages * BLOCK_UNITS * units
    return 2 * (matrix + num_buffers * units * rows + num_messages * BLOCK_UNITS * rows) + RESERVED


def num_blocks(units: int) -> int:
    """Returns the number of blocks for ``units`` hidden units."""
    return max(1, -(-units // BLOCK_UNITS))


def rows_that_fit(gates: int, units: int, batch_size: int) -> int | None:
    """Returns the batch rows of a cluster: few, unless the clusters would then not all run at once.

    Returns None if the weights of a layer do not fit into a cluster.
    """
    few, more = GROUP_ROWS
    if not _fits(gates, units, few):
        return None
    waiting = num_blocks(units) * -(-batch_size // few) > NUM_SMS
    return more if waiting and _fits(gates, units, more) else few


def _fits(gates: int, units: int, rows: int) -> bool:
    blocks = num_blocks(units)
    # Forward there is one product per gate; backward one message per gate.
    largest = max(footprint(gates, 1, blocks, rows), footprint(1, gates, blocks, rows))
    return blocks <= MAX_BLOCKS and largest <= SHARED_MEMORY


def kernel_spec(
    num_products: int, num_messages: int, units: int, num_steps: int, *, rows: int, reverse: bool
) -> KernelSpec:
    """Returns the sizes of a kernel on clusters, with ``rows`` batch rows per cluster."""
    blocks = num_blocks(units)

    def fits(num_buffers: int) -> bool:
        return footprint(num_products, num_messages, blocks, rows, num_buffers) <= SHARED_MEMORY

    num_buffers = max(n for n in range(1, num_messages + 1) if n == 1 or fits(n))
    matmul = MatmulSpec(num_products, num_messages, BLOCK_UNITS, blocks * BLOCK_UNITS, rows, num_buffers)
    return KernelSpec(num_products, num_messages, blocks, BLOCK_UNITS, rows, num_steps, reverse, matmul)
