"""A scan over time as a kernel for Hopper GPUs: the matrix it multiplies by stays in shared memory all along.

Each block of a thread-block cluster has 64 of the hidden units, and with them their rows of the matrix. In a step it
multiplies these by what all blocks have sent in the step before, with `wgmma`, whose sums lie in registers. There it
does the rest of the step, with a tile of units and sequences in place of each number (`jaxlstm.recurrence.tiles`), and
sends its share of what the next step needs. The batch is split over clusters, which know nothing of one another.

What is sent goes through global memory, and so through the L2 cache: a block writes its share, the cluster meets at a
barrier, and each block reads all of it. Every step has a place of its own there; nobody waits until all have read
before writing on. To write into the shared memory of the other blocks, with `plgpu.async_store_smem`, would save half
of the way; interpreters do not know it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxlstm.recurrence import kernel, tiles

UNITS = 64  # of a block: the rows of the smallest product of matrices that a Hopper GPU knows
MOST_BLOCKS = 8  # in a cluster, on every Hopper GPU
ROWS = (16, 32)  # of the batch in one cluster: fewer have no place in swizzled memory, more not in registers
PROCESSORS = 132  # of an H100; with fewer all is the same, but slower
SHARED_MEMORY = 227 * 1024  # bytes, of a block
RESERVED = 3 * 1024  # of these, for barriers and what the compiler wants

# (resident, products, carry, now) -> (carry, sent, out), for one unit in one row: trees of arrays (..., 1, 1), those of
# resident (..., 1)
Body = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


class Form(NamedTuple):
    """What is known of a kernel when it is compiled."""

    parts: int  # of the product: matrices a block multiplies by, one under the other
    pieces: int  # of what is sent: as many matrices are side by side
    blocks: int  # of a cluster
    rows: int  # of the batch in one cluster
    slots: int  # pieces that a block holds at once
    steps: int  # of time
    reverse: bool  # whether time runs backward

    @property
    def units(self) -> int:
        """Hidden units, those added to fill up the last block counted."""
        return self.blocks * UNITS

    def time(self, n: Any) -> Any:
        """Where in time the n-th step is."""
        return self.steps - 1 - n if self.reverse else n

    def place(self, n: Any) -> Any:
        """Where what was sent before the n-th step is, among ``steps + 1`` places."""
        return self.steps - n if self.reverse else n


def footprint(parts: int, pieces: int, blocks: int, rows: int, slots: int = 1) -> int:
    """Bytes of shared memory that a block takes: its rows of the matrices, what it reads and what it sends."""
    units = blocks * UNITS
    return 2 * (parts * pieces * UNITS * units + slots * units * rows + pieces * UNITS * rows) + RESERVED


def blocks_of(units: int) -> int:
    """Blocks that ``units`` are spread over."""
    return max(1, -(-units // UNITS))


def rows_that_fit(gates: int, units: int, batch: int) -> int:
    """How many rows of the batch a cluster takes: few, unless there are more clusters than can run at once.

    Raises:
      ValueError: if the weights of a layer do not fit into a cluster.
    """

    def fits(blocks: int, rows: int) -> bool:
        # Forward the products are as many as gates; backward what is sent.
        largest = max(footprint(gates, 1, blocks, rows), footprint(1, gates, blocks, rows))
        return blocks <= MOST_BLOCKS and largest <= SHARED_MEMORY

    blocks, (few, more) = blocks_of(units), ROWS
    if fits(blocks, few):
        return more if blocks * -(-batch // few) > PROCESSORS and fits(blocks, more) else few
    largest = max((n for n in range(1, MOST_BLOCKS + 1) if fits(n, few)), default=0)
    weights, whole = 2 * gates * UNITS * blocks * UNITS / 1024, footprint(1, gates, blocks, few) / 1024
    raise ValueError(
        f"implementation='pallas' keeps the recurrent weights in the shared memory of a cluster of up to {MOST_BLOCKS} "
        f"blocks of {UNITS} units on a Hopper GPU: {units} units are {blocks} blocks, each with {gates} x {UNITS} x "
        f"{blocks * UNITS} of bfloat16, {weights:.0f} KiB, and with what the blocks send {whole:.0f} KiB of "
        f"{SHARED_MEMORY / 1024:.0f} KiB; hidden_size fits up to {largest * UNITS}"
    )


def scan(
    body: Body,
    matrix: Array,
    sent: Array,
    resident: Any,
    carry: Any,
    over_time: Any,
    *,
    rows: int,
    reverse: bool = False,
) -> tuple[Any, Array, Any]:
    """A scan over time whose steps are elementwise, but for a product by one and the same matrix.

    A step, ``products[m] = sum_e matrix[m, e] sent[e]`` and then
    ``carry, sent, out = body(resident, products, carry, now)``, is taken for every row of the batch.

    Args:
      body: the elementwise part of a step, for one unit in one row.
      matrix: ``(M, E, H, H)`` bfloat16.
      sent: ``(E, B, H)``, what goes into the product of the first step; it is rounded to bfloat16.
      resident: tree of arrays ``(..., H)`` that every step reads.
      carry: tree of arrays ``(B, H)``, float32.
      over_time: tree of arrays ``(T, ..., B, H)``, or ``(T, ..., B, 1)`` of what is the same for all units; float32
        or bool.
      rows: of the batch in one cluster.
      reverse: whether time runs backward.

    Returns:
      the carry after the last step; what was sent after each step, ``(T, E, B, H)`` bfloat16; and ``out``, with a
      leading axis of time.

    Raises:
      ValueError: if ``body`` does not return a number for each unit in each row.
    """
    (parts, pieces, units, _), batch = matrix.shape, sent.shape[1]
    blocks, columns = blocks_of(units), max(1, -(-batch // rows)) * rows
    slots = max(n for n in range(1, pieces + 1) if n == 1 or footprint(parts, pieces, blocks, rows, n) <= SHARED_MEMORY)
    form = Form(parts, pieces, blocks, rows, slots, len(jax.tree.leaves(over_time)[0]), reverse)
    program, shapes = _for_one_unit(form, body, resident, carry, over_time)

    def lay(a: Array) -> Array:
        return _laid_out(a, 0 if a.shape[-1] == 1 < units else form.units - units, columns - batch)

    padded = jnp.pad(matrix, [(0, 0), (0, 0), *[(0, form.units - units)] * 2])
    by_block = jnp.moveaxis(padded.reshape(parts, pieces, blocks, UNITS, form.units), 2, 0)
    operands = (
        by_block.reshape(-1, form.units).astype(jnp.bfloat16),
        lay(sent.astype(jnp.bfloat16)),
        [jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, form.units - units)]) for a in jax.tree.leaves(resident)],
        list(map(lay, jax.tree.leaves(carry))),
        list(map(lay, jax.tree.leaves(over_time))),
    )
    places, last, out = _call(form, program, columns, operands, jax.tree.leaves(shapes[2]))

    def back(like: Any, arrays: Sequence[Array]) -> Any:
        turned = [jnp.swapaxes(a, -1, -2)[..., :batch, :units] for a in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), turned)

    places = places.reshape(form.steps + 1, pieces, form.units, columns)
    return back(carry, last), back(0, [places[:-1] if reverse else places[1:]]), back(shapes[2], out)


def _for_one_unit(form: Form, body: Body, resident: Any, carry: Any, over_time: Any) -> tuple[Any, Any]:
    """The program of ``body`` for one unit in one row, and the shapes of what it returns."""

    def one(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    start = jax.tree.map(lambda a: one((1, 1), a.dtype), carry)
    program, shapes = jax.make_jaxpr(body, return_shape=True)(
        jax.tree.map(lambda a: one((*a.shape[:-1], 1), a.dtype), resident),
        one((form.parts, 1, 1), jnp.float32),
        start,
        jax.tree.map(lambda a: one((*a.shape[1:-2], 1, 1), a.dtype), over_time),
    )
    found = [a.shape for a in jax.tree.leaves(shapes[:2])]
    wanted = [*((1, 1) for _ in jax.tree.leaves(start)), (form.pieces, 1, 1)]
    if found != wanted:
        raise ValueError(
            "gates inside a kernel for Hopper GPUs are elementwise: for one unit of one sequence arrays of the shapes "
            f"{wanted} were expected, got {found}"
        )
    return program, shapes


def _laid_out(a: Array, more_units: int, more_rows: int) -> Array:
    """``(..., B, H)`` as the kernel reads it: ``(..., H, B)``, filled up with zeros, and without bool."""
    a = jnp.pad(jnp.swapaxes(a, -1, -2), [*[(0, 0)] * (a.ndim - 2), (0, more_units), (0, more_rows)])
    return a.astype(jnp.float32) if a.dtype == jnp.bool_ else a


def _call(form: Form, program: Any, columns: int, operands: Any, out: Sequence[Any]) -> Any:
    """The kernel, on arrays laid out for it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    result = (
        jax.ShapeDtypeStruct(((form.steps + 1) * form.pieces * form.units, columns), jnp.bfloat16),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[3]],
        [jax.ShapeDtypeStruct((form.steps, *a.shape[:-2], form.units, columns), a.dtype) for a in out],
    )
    scratch = [
        plgpu.SMEM((form.parts * form.pieces, UNITS, form.units), jnp.bfloat16),  # the matrices
        plgpu.SMEM((form.slots, form.units, form.rows), jnp.bfloat16),  # what all blocks have sent
        plgpu.SMEM((form.pieces, UNITS, form.rows), jnp.bfloat16),  # what this one sends
        plgpu.Barrier(num_arrivals=form.parts * form.pieces),
        plgpu.Barrier(num_barriers=form.slots),
    ]
    if form.blocks > 1:
        # Two that are used in turn: before a block comes to one of them again, all have left it.
        scratch.append(plgpu.ClusterBarrier(collective_axes=("units",), num_barriers=2))
    return plgpu.kernel(
        lambda *refs: _Block(form, program, *refs).run(),
        out_type=result,
        scratch_types=scratch,
        grid=(columns // form.rows,),
        grid_names=("rows",),
        cluster=(form.blocks,),
        cluster_names=("units",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="lstm",
        interpret=_interpreted(),
    )(*operands)


class _Block:
    """A block of the cluster at work."""

    def __init__(self, form: Form, program: Any, *refs: Any) -> None:
        from jax.experimental import pallas as pl

        self.form, self.program = form, program
        # In global memory what is given, and what is returned; in shared memory; barriers.
        self.matrix, self.first, self.resident, self.before, self.over_time = refs[:5]
        self.places, self.last, self.out = refs[5:8]
        self.matrices, self.received, self.share = refs[8:11]
        self.matrices_there, self.received_there, *self.meeting = refs[11:]
        self.block = lax.axis_index("units")
        self.units = pl.ds(self.block * UNITS, UNITS)
        self.rows = pl.ds(lax.axis_index("rows") * form.rows, form.rows)

    def run(self) -> None:
        """All steps."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        for n in range(form.parts * form.pieces):
            mine = pl.ds((self.block * (form.parts * form.pieces) + n) * UNITS, UNITS)
            plgpu.copy_gmem_to_smem(self.matrix.at[mine], self.matrices.at[n], self.matrices_there)
        self.send([_load(self.first.at[e, self.units, self.rows]) for e in range(form.pieces)], np.int32(0))
        self.stays = [
            [_load(ref.at[*i, self.units], over=1) for i in np.ndindex(*ref.shape[:-1])] for ref in self.resident
        ]
        carry = [_load(ref.at[self.units, self.rows]) for ref in self.before]
        plgpu.barrier_wait(self.matrices_there)
        carry = lax.fori_loop(np.int32(0), np.int32(form.steps), self.step, carry)
        for ref, a in zip(self.last, carry):
            _store(ref.at[self.units, self.rows], a)

    def step(self, n: Array, carry: list[Array]) -> list[Array]:
        """The n-th step: from the carry before it to that after it."""
        for piece in range(self.form.slots):
            self.fetch(n, piece)
        now = self.now(n)  # comes while the product is waited for
        tile = (UNITS, self.form.rows)
        arguments = [
            *([lax.broadcast_in_dim(a, tile, (0,)) for a in each] for each in self.stays),
            self.products(n),
            *([a] for a in carry),
            *([lax.broadcast_in_dim(a, tile, (1,)) if a.ndim == 1 else a for a in each] for each in now),
        ]
        arguments = [
            [a != 0 for a in each] if like.dtype == jnp.bool_ else each
            for each, like in zip(arguments, self.program.in_avals)
        ]
        results = tiles.carry_out(self.program, tile, arguments)
        carry, (sent, *out) = [a for (a,) in results[: len(carry)]], results[len(carry) :]
        for ref, values in zip(self.out, out):
            for index, a in zip(np.ndindex(*ref.shape[1:-2]), values):
                _store(ref.at[self.form.time(n), *index, self.units, self.rows], a)
        self.send(sent, n + 1)
        return carry

    def fetch(self, n: Array, piece: int) -> None:
        """One piece of what all blocks have sent before the n-th step, on its way into its slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form, slot = self.form, piece % self.form.slots
        place = pl.ds((form.place(n) * form.pieces + piece) * form.units, form.units)
        plgpu.copy_gmem_to_smem(self.places.at[place, self.rows], self.received.at[slot], self.received_there.at[slot])

    def products(self, n: Array) -> list[Array]:
        """The product of this block's rows and of what all blocks have sent, its first pieces already on their way."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form

        def multiply(*sums: Any) -> list[Array]:
            for piece in range(form.pieces):
                slot = piece % form.slots
                plgpu.barrier_wait(self.received_there.at[slot])
                for part, total in enumerate(sums):
                    plgpu.wgmma(total, self.matrices.at[part * form.pieces + piece], self.received.at[slot])
                if piece + form.slots < form.pieces:
                    plgpu.wgmma_wait(0)  # for the slot to be free
                    self.fetch(n, piece + form.slots)
            return [total[...] for total in sums]

        return pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((UNITS, form.rows))] * form.parts)

    def send(self, sent: Sequence[Array], n: Any) -> None:
        """This block's share of what goes into the n-th step, there for all blocks on return."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        for piece, a in enumerate(sent):
            self.share[piece] = a.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for piece in range(form.pieces):
            mine = pl.ds((form.place(n) * form.pieces + piece) * form.units + self.block * UNITS, UNITS)
            plgpu.copy_smem_to_gmem(self.share.at[piece], self.places.at[mine, self.rows])
        plgpu.wait_smem_to_gmem(0)
        for barrier in self.meeting:
            plgpu.barrier_arrive(barrier.at[n % 2])
            plgpu.barrier_wait(barrier.at[n % 2])

    def now(self, n: Any) -> list[list[Array]]:
        """What is read of the n-th step: tiles, or of what is the same for all units a row of one."""
        time = self.form.time(n)

        def read(ref: Any) -> list[Array]:
            units, over = (0, 0) if ref.shape[-2] == 1 else (self.units, None)
            leading = np.ndindex(*ref.shape[1:-2])
            return [_load(ref.at[time, *index, units, self.rows], over=over) for index in leading]

        return list(map(read, self.over_time))


def _load(ref: Any, *, over: int | None = None) -> Array:
    """From global memory into registers, laid out as sums of `wgmma`; a vector as if repeated ``over`` an axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if _interpreted():  # the same; the interpreter of JAX 0.10 knows no other
        return ref[...]
    layout = plgpu.Layout.WGMMA if over is None else plgpu.Layout.WGMMA.reduce((over,))
    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # of JAX 0.10
    return plgpu.load(ref, *index, layout=layout, optimized=False)  # in pieces of 8 bytes


def _store(ref: Any, a: Array) -> None:
    """From registers into global memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if _interpreted() or store is None:  # as in JAX 0.10
        ref[...] = a
    else:
        store(ref, a, optimized=False)


def _interpreted() -> Any:
    """Parameters of the interpreter, or False for none."""
    made_for = kernel.making_for.value
    return (isinstance(made_for, kernel.Hopper) and made_for.interpreted) or False
