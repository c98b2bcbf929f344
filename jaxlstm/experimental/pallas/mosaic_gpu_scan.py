"""A scan over time as a kernel for Hopper GPUs: the matrix it multiplies by stays in shared memory all along.

Each of the blocks that share a matrix has some of the hidden units, and with them their rows of it. In a step it
multiplies these by what all blocks have sent in the step before, with `wgmma`, whose sums lie in registers. There it
does the rest of the step, with a tile of units and sequences in place of each number
(`jaxlstm.experimental.pallas.jaxpr_tiling`), and sends its share of what the next step needs. The batch is split over
several such sets of blocks, which know nothing of one another.

What is sent goes through global memory, and so through the L2 cache: a block writes its share, waits for the others,
and reads all of it. Every step has a place of its own there; nobody waits until all have read before writing on.

What the blocks are, how their rows of the matrix lie, and how they wait, is said by a `Form` and a kind of `Block`: the
blocks of a cluster in `jaxlstm.experimental.pallas.mosaic_gpu_cluster`, those of a whole GPU in
`jaxlstm.experimental.pallas.mosaic_gpu_grid`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxlstm.experimental.pallas import jaxpr_tiling, mosaic_tpu_scan

ROWS = (16, 32)  # of the batch in one set of blocks: fewer have no place in swizzled memory, more not in registers
SHARED_MEMORY = 227 * 1024  # bytes, of a block
RESERVED = 3 * 1024  # of these, for barriers and what the compiler wants

# (resident, products, carry, now) -> (carry, sent, out), for one unit in one row: trees of arrays (..., 1, 1), those of
# resident (..., 1)
Body = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


class Product(NamedTuple):
    """The product of a step, as one block takes it: of ``down`` by ``across`` matrices ``(height, depth)``, and of
    ``across`` matrices ``(depth, width)`` that were sent.
    """

    down: int
    across: int
    height: int
    depth: int
    width: int
    slots: int  # of the matrices that were sent, as many as a block holds at once


class Form(NamedTuple):
    """What is known of a kernel when it is compiled."""

    parts: int  # of the product that a step asks for: matrices one under the other
    pieces: int  # of what is sent: as many matrices are side by side
    blocks: int  # that share the units
    mine: int  # units of one block
    rows: int  # of the batch, in one set of blocks
    steps: int  # of time
    reverse: bool  # whether time runs backward
    product: Product

    @property
    def units(self) -> int:
        """Hidden units, those added to fill up the last block counted."""
        return self.blocks * self.mine

    @property
    def shares(self) -> int:
        """Arrays ``(mine, width)`` in which a block sends."""
        return self.product.across * self.product.depth // self.units

    @property
    def tile(self) -> tuple[int, int]:
        """What stands for a number of the body."""
        return self.mine, self.rows

    def time(self, n: Any) -> Any:
        """Where in time the n-th step is."""
        return self.steps - 1 - n if self.reverse else n

    def place(self, n: Any) -> Any:
        """Where what was sent before the n-th step is, among ``steps + 1`` places."""
        return self.steps - n if self.reverse else n


def scan(
    form_of: Callable[[int, int, int, int], Form],
    kind: type["Block"],
    body: Body,
    matrix: Array,
    sent: Array,
    resident: Any,
    carry: Any,
    over_time: Any,
) -> tuple[Any, Array, Any]:
    """A scan over time whose steps are elementwise, but for a product by one and the same matrix.

    A step, ``products[m] = sum_e matrix[m, e] sent[e]`` and then
    ``carry, sent, out = body(resident, products, carry, now)``, is taken for every row of the batch.

    Args:
      form_of: from M, E, H and T to what the kernel is compiled for.
      kind: of the blocks.
      body: the elementwise part of a step, for one unit in one row.
      matrix: ``(M, E, H, H)`` bfloat16.
      sent: ``(E, B, H)``, what goes into the product of the first step; it is rounded to bfloat16.
      resident: tree of arrays ``(..., H)`` that every step reads.
      carry: tree of arrays ``(B, H)``, float32.
      over_time: tree of arrays ``(T, ..., B, H)``, or ``(T, ..., B, 1)`` of what is the same for all units; float32
        or bool.

    Returns:
      the carry after the last step; what was sent after each step, ``(T, E, B, H)`` bfloat16; and ``out``, with a
      leading axis of time.

    Raises:
      ValueError: if ``body`` does not return a number for each unit in each row.
    """
    parts, pieces, units, _ = matrix.shape
    form, batch = form_of(parts, pieces, units, len(jax.tree.leaves(over_time)[0])), sent.shape[1]
    sets = max(1, -(-batch // form.rows))
    program, shapes = _for_one_unit(form, body, resident, carry, over_time)

    def lay(a: Array) -> Array:
        more_units = 0 if a.shape[-1] == 1 < units else form.units - units
        return _laid_out(a, more_units, sets * form.rows - batch)

    padded = jnp.pad(matrix, [(0, 0), (0, 0), *[(0, form.units - units)] * 2])
    operands = (
        kind.matrices(form, padded).reshape(-1, form.product.depth).astype(jnp.bfloat16),
        lay(sent.astype(jnp.bfloat16)),
        [jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, form.units - units)]) for a in jax.tree.leaves(resident)],
        list(map(lay, jax.tree.leaves(carry))),
        list(map(lay, jax.tree.leaves(over_time))),
    )
    places, last, out = _call(form, kind, program, sets, operands, jax.tree.leaves(shapes[2]))

    def back(like: Any, arrays: Sequence[Array]) -> Any:
        turned = [jnp.swapaxes(a, -1, -2)[..., :batch, :units] for a in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), turned)

    # Each share has the pieces in it side by side, once for each set of blocks.
    places = places.reshape(form.steps + 1, form.shares, form.units, sets, form.pieces // form.shares, form.rows)
    places = jnp.moveaxis(places, 4, 2).reshape(form.steps + 1, form.pieces, form.units, sets * form.rows)
    return back(carry, last), back(0, [places[:-1] if form.reverse else places[1:]]), back(shapes[2], out)


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


def _call(form: Form, kind: type["Block"], program: Any, sets: int, operands: Any, out: Sequence[Any]) -> Any:
    """The kernel, on arrays laid out for it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    product, columns = form.product, sets * form.rows
    result = (
        jax.ShapeDtypeStruct(((form.steps + 1) * form.shares * form.units, sets * product.width), jnp.bfloat16),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[3]],
        [jax.ShapeDtypeStruct((form.steps, *a.shape[:-2], form.units, columns), a.dtype) for a in out],
    )
    matrices = product.down * product.across
    scratch = [
        plgpu.SMEM((matrices, product.height, product.depth), jnp.bfloat16),
        plgpu.SMEM((product.slots, product.depth, product.width), jnp.bfloat16),  # what all blocks have sent
        plgpu.Barrier(num_arrivals=matrices),
        plgpu.Barrier(num_barriers=product.slots),
        *kind.scratch(form),
    ]
    return plgpu.kernel(
        lambda *refs: kind(form, program, *refs).run(),
        out_type=result,
        scratch_types=scratch,
        **kind.axes(form, sets),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="lstm",
        interpret=interpreted(),
    )(*operands)


class Block:
    """A block at work, one of a cluster."""

    @staticmethod
    def matrices(form: Form, matrix: Array) -> Array:
        """``(M, E, H, H)`` in the order ``(blocks, down, across, height, depth)``."""
        return jnp.moveaxis(matrix.reshape(form.parts, form.pieces, form.blocks, form.mine, form.units), 2, 0)

    @staticmethod
    def scratch(form: Form) -> list[Any]:
        """What a block needs besides, for `take`: for what it sends, and to wait at."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return [plgpu.SMEM((form.pieces, form.mine, form.rows), jnp.bfloat16), *meeting(form)]

    @staticmethod
    def axes(form: Form, sets: int) -> dict[str, Any]:
        """Of the kernel: "rows", over the sets of blocks, and "units", over the blocks of one."""
        return {"grid": (sets,), "grid_names": ("rows",), "cluster": (form.blocks,), "cluster_names": ("units",)}

    def __init__(self, form: Form, program: Any, *refs: Any) -> None:
        from jax.experimental import pallas as pl

        self.form, self.program = form, program
        # In global memory what is given, and what is returned; in shared memory; barriers.
        self.matrix, self.first, self.resident, self.before, self.over_time = refs[:5]
        self.places, self.last, self.out = refs[5:8]
        self.resting, self.received, self.resting_there, self.received_there = refs[8:12]
        self.take(*refs[12:])
        self.block, self.set = lax.axis_index("units"), lax.axis_index("rows")
        self.units = pl.ds(self.block * form.mine, form.mine)
        self.rows = pl.ds(self.set * form.rows, form.rows)
        self.sent = pl.ds(self.set * form.product.width, form.product.width)

    def run(self) -> None:
        """All steps."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        matrices, height = form.product.down * form.product.across, form.product.height
        for n in range(matrices):
            mine = pl.ds((self.block * matrices + n) * height, height)
            plgpu.copy_gmem_to_smem(self.matrix.at[mine], self.resting.at[n], self.resting_there)
        self.send([self.load(self.first.at[e, self.units, self.rows]) for e in range(form.pieces)], np.int32(0))
        self.wait(np.int32(0))
        self.stays = [
            [self.load(ref.at[*i, self.units], over=1) for i in np.ndindex(*ref.shape[:-1])] for ref in self.resident
        ]
        carry = [self.load(ref.at[self.units, self.rows]) for ref in self.before]
        plgpu.barrier_wait(self.resting_there)
        carry = lax.fori_loop(np.int32(0), np.int32(form.steps), self.step, carry)
        for ref, a in zip(self.last, carry):
            store(ref.at[self.units, self.rows], a)

    def step(self, n: Array, carry: list[Array]) -> list[Array]:
        """The n-th step: from the carry before it to that after it."""
        for piece in range(self.form.product.slots):
            self.fetch(n, piece)
        now = self.now(n)  # comes while the product is waited for
        arguments = [
            *([self.over_a_tile(a, 0) for a in each] for each in self.stays),
            self.products(self.sums(n)),
            *([a] for a in carry),
            *([self.over_a_tile(a, 1) if a.ndim == 1 else a for a in each] for each in now),
        ]
        arguments = [
            [a != 0 for a in each] if like.dtype == jnp.bool_ else each
            for each, like in zip(arguments, self.program.in_avals)
        ]
        results = jaxpr_tiling.carry_out(self.program, self.form.tile, arguments)
        carry, (sent, *out) = [a for (a,) in results[: len(carry)]], results[len(carry) :]
        for ref, values in zip(self.out, out):
            for index, a in zip(np.ndindex(*ref.shape[1:-2]), values):
                store(ref.at[self.form.time(n), *index, self.units, self.rows], a)
        self.send(sent, n + 1)
        self.wait(n + 1)
        return carry

    def fetch(self, n: Array, piece: int) -> None:
        """One of the matrices that all blocks have sent before the n-th step, on its way into its slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        product, slot = self.form.product, piece % self.form.product.slots
        place = pl.ds((self.form.place(n) * product.across + piece) * product.depth, product.depth)
        plgpu.copy_gmem_to_smem(self.places.at[place, self.sent], self.received.at[slot], self.received_there.at[slot])

    def sums(self, n: Array) -> list[Array]:
        """``down`` products of this block's matrices and of what was sent, the first of it already on its way."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        product = self.form.product

        def multiply(*sums: Any) -> list[Array]:
            for piece in range(product.across):
                slot = piece % product.slots
                plgpu.barrier_wait(self.received_there.at[slot])
                for part, total in enumerate(sums):
                    plgpu.wgmma(total, self.resting.at[part * product.across + piece], self.received.at[slot])
                if piece + product.slots < product.across:
                    plgpu.wgmma_wait(0)  # for the slot to be free
                    self.fetch(n, piece + product.slots)
            return [total[...] for total in sums]

        sums = [plgpu.WGMMAAccumulatorRef((product.height, product.width))] * product.down
        return pl.run_scoped(multiply, *sums)

    def now(self, n: Any) -> list[list[Array]]:
        """What is read of the n-th step: tiles, or of what is the same for all units a row of one."""
        time = self.form.time(n)

        def read(ref: Any) -> list[Array]:
            units, over = (0, 0) if ref.shape[-2] == 1 else (self.units, None)
            leading = np.ndindex(*ref.shape[1:-2])
            return [self.load(ref.at[time, *index, units, self.rows], over=over) for index in leading]

        return list(map(read, self.over_time))

    def load(self, ref: Any, *, over: int | None = None) -> Array:
        """From memory into registers, laid out as a tile; a vector as if repeated ``over`` an axis."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if interpreted():  # the same; the interpreter of JAX 0.10 knows no other
            return ref[...]
        layout = self.layout() if over is None else self.layout().reduce((over,))
        index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # of JAX 0.10
        return plgpu.load(ref, *index, layout=layout, optimized=False)  # in pieces of 8 bytes

    def over_a_tile(self, a: Array, axis: int) -> Array:
        """A vector along one axis of a tile, repeated over the other."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        a = lax.broadcast_in_dim(a, self.form.tile, (axis,))
        return a if interpreted() else plgpu.layout_cast(a, self.layout())  # which JAX 0.10 does not find by itself

    # What follows is another for another kind of blocks.

    def take(self, *refs: Any) -> None:
        """Refs of `scratch`."""
        self.share, *self.meeting = refs

    def layout(self) -> Any:
        """Of a tile, in registers: that of the sums."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.Layout.WGMMA

    def products(self, sums: list[Array]) -> list[Array]:
        """A tile for each part of the product."""
        return sums

    def send(self, sent: Sequence[Array], n: Any) -> None:
        """This block's share of what goes into the n-th step, and word of it, without waiting for the others."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        form = self.form
        for piece, a in enumerate(sent):
            self.share[piece] = a.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for piece in range(form.pieces):
            mine = pl.ds((form.place(n) * form.pieces + piece) * form.units + self.block * form.mine, form.mine)
            plgpu.copy_smem_to_gmem(self.share.at[piece], self.places.at[mine, self.sent])
        plgpu.wait_smem_to_gmem(0)
        for barrier in self.meeting:
            plgpu.barrier_arrive(barrier.at[n % 2])

    def wait(self, n: Any) -> None:
        """Until all shares of what goes into the n-th step are there."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        for barrier in self.meeting:
            plgpu.barrier_wait(barrier.at[n % 2])


def meeting(form: Form) -> list[Any]:
    """What the blocks of a cluster wait at: nothing for a single one, else two barriers that are used in turn.

    Before a block comes to one of them again, all have left it.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return [plgpu.ClusterBarrier(collective_axes=("units",), num_barriers=2)] if form.blocks > 1 else []


def store(ref: Any, a: Array) -> None:
    """From registers into global memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if interpreted() or store is None:  # as in JAX 0.10
        ref[...] = a
    else:
        store(ref, a, optimized=False)


def interpreted() -> Any:
    """Parameters of the interpreter, or False for none."""
    made_for = mosaic_tpu_scan.making_for.value
    return (isinstance(made_for, mosaic_tpu_scan.Hopper) and made_for.interpreted) or False
