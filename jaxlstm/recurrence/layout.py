"""How the fused recurrence lays out its arrays, and its matrix products in that layout."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlstm.params import Size
from jaxlstm.primitives.mixed_precision_dot import dot, has_explicit_sharding


class Layout(NamedTuple):
    """The two axes of a step's arrays, units and batch, in one order or the other; which products wait for the loop.

    Feature-major, ``(H, B)``, has the large operand of each step's product, the weights, on the left, read as it lies
    in memory. Batch-major, ``(B, H)``, has less to move when the weights are small. A hoisted input product is taken
    for all steps at once; otherwise x and h meet the weights of both in one product per step, or in two: `times_both`.
    """

    dtype: jnp.dtype  # of the operands of products, and of outputs
    sums: jnp.dtype  # of sums and state
    axis: int  # of the units: 0 feature-major, 1 batch-major
    hoisted: bool  # whether the product of the input is taken before the loop
    chunk: int = 16  # steps whose tangents are taken together: enough for one large product, few enough for the cache
    threads: bool = (
        False  # whether the gates are written for all threads of a CPU: `jaxlstm.recurrence.cpu_activations`
    )
    bits: bool = False  # whether bfloat16 is moved about as integers, which has no derivative: `pack`
    halves: bool = False  # whether products of a step are taken in two, of every other row each

    @classmethod
    def choose(cls, rows: Size, units: int, dtype: jnp.dtype, sums: jnp.dtype) -> "Layout":
        """The layout for a batch of ``rows`` and a hidden size of ``units``.

        For a CPU by measurement (`benchmarks/README.md`). For the others by what their libraries prefer, unmeasured.

        =========  ===========  ==========  =======  =====
        rows       units        units lead  hoisted  chunk
        =========  ===========  ==========  =======  =====
        up to 8    up to 128    no          yes      64
        up to 8    more         yes         yes      64
        9 to 16    up to 255    no          no       32
        9 to 16    more         yes         no       32
        more       up to 256    no          no       8
        17 to 63   512 or more  yes         no       16
        otherwise               yes         no       8
        =========  ===========  ==========  =======  =====

        Gates in float32 are written for all threads where rows times units is 2^12 or more and less than 2^14: below,
        waking a thread costs more than it does, and above the difference is within 4 %.

        In these sizes, with more than 128 units and an even batch that leads, the backward product of a step is taken
        in two: two threads then have a product each, and need not wait for one another within it. Each has every other
        row, so that a batch laid out over devices is halved on each of them. So is the forward one, in float32, where
        what the derivative needs is kept and x is no wider than h; elsewhere that gains at one size what it loses at
        another.

        bfloat16 is moved about as integers: to slice, join or transpose an array of it, XLA on a CPU makes one of
        float32.

        A batch whose size is a symbol, while a program is exported for batches of any size, is laid out as a large one.
        """
        if jax.default_backend() != "cpu":
            return cls(dtype, sums, axis=1, hoisted=True, chunk=64)
        few, some, many = (not isinstance(rows, int) or rows > limit for limit in (8, 16, 63))
        axis = int(units <= (128 if not few else 255 if not some else 256))
        chunk = 64 if not few else 32 if not some else 8 if many or units < 512 else 16
        threads = isinstance(rows, int) and 2**12 <= rows * units < 2**14 and sums == jnp.float32
        bits = dtype == jnp.bfloat16
        halves = threads and axis == 1 and units > 128 and rows % 2 == 0
        return cls(dtype, sums, axis, hoisted=not few, chunk=chunk, threads=threads, bits=bits, halves=halves)

    def along_units(self, a: Array) -> Array:
        """A vector over units, with an axis for the batch."""
        return jnp.expand_dims(a, 1 - self.axis)

    def along_batch(self, a: Array) -> Array:
        """A vector over the batch, with an axis for the units."""
        return jnp.expand_dims(a, self.axis)

    def from_batch_major(self, a: Array) -> Array:
        """``(..., B, H)`` in this layout."""
        return jnp.moveaxis(a, -1, a.ndim - 2 + self.axis)

    def to_batch_major(self, a: Array) -> Array:
        """``(..., B, H)`` from this layout."""
        return jnp.moveaxis(a, a.ndim - 2 + self.axis, -1)

    def prepare(self, w: Array) -> Array:
        """A matrix for `times`: ``W`` for the left of a feature-major array, or its transpose for the right."""
        return jnp.moveaxis(w, 0, self.axis).astype(self.dtype)

    def times(self, w: Array, x: Array) -> Array:
        """``W x`` for one step, with ``W`` from `prepare`: each operand is read in order."""
        return self._dot(w, x, (1, 0)) if self.axis == 0 else self._dot(x, w, (1, 0))

    def pack(self, a: Array) -> Array:
        """Operands of products as they are moved about: rounded, and where `bits` says so, as integers."""
        a = a.astype(self.dtype)
        return lax.bitcast_convert_type(a, jnp.uint16) if self.bits else a

    def unpack(self, a: Array) -> Array:
        """What `pack` was given, rounded."""
        return lax.bitcast_convert_type(a, self.dtype) if self.bits else a

    @property
    def _apart(self) -> bool:
        """Whether x and h have a product each, because joining their weights takes longer than it saves."""
        return self.bits and self.axis == 0

    def prepare_both(self, w_x: Array, w_h: Array) -> Any:
        """The matrices of x and h for `times_both`."""
        if self._apart:
            return self.prepare(w_x), self.prepare(w_h)
        return self.prepare(self.unpack(jnp.concatenate([self.pack(w_x), self.pack(w_h)], 1)))

    def times_both(self, w: Any, x: Array, h: Array, *, save: bool) -> Array:
        """``W_x x + W_h h`` for one step, with the matrices from `prepare_both`; ``x`` packed if that is as bits.

        ``save`` says whether the step keeps what its derivative needs, which decides about halves.
        """
        if self._apart:
            return self.times(w[0], self.unpack(x)) + self.times(w[1], h)
        if self.bits:
            return self.times(w, self.unpack(jnp.concatenate([x, self.pack(h)], self.axis)))
        both = jnp.concatenate([x.astype(self.sums), h], self.axis)
        halves = self.halves and save and x.shape[self.axis] <= h.shape[self.axis]
        return self._times_in_halves(both, w, 0) if halves else self.times(w, both)

    def prepare_for_transpose(self, w: Array) -> Array:
        """A matrix for `times_in_transpose`."""
        return jnp.moveaxis(w, 1, self.axis).astype(self.dtype)

    def times_in_transpose(self, w: Array, x: Array) -> Array:
        """``W x`` for one step, laid out so that the transpose, which is the backward pass, reads in order."""
        if self.axis == 0:
            return self._dot(w, x, (0, 0))
        return self._times_in_halves(x, w, 1) if self.halves else self._dot(x, w, (1, 1))

    def times_over_time(self, w: Array, xs: Array) -> Array:
        """``W x`` for many steps at once, with ``W`` as it is; ``xs (T, ...)``."""
        if self.axis == 0:
            return jnp.moveaxis(self._dot(w, xs, (1, 1)), 0, 1)
        return self._dot(xs, w, (2, 1))

    def _times_in_halves(self, x: Array, w: Array, axis: int) -> Array:
        """``(B, m)`` times ``w`` over one of its axes, in two products of every other row each."""
        if has_explicit_sharding(x):
            return self._dot(x, w, (1, axis))
        halves = jnp.unstack(x.reshape(x.shape[0] // 2, 2, x.shape[1]), axis=1)
        return jnp.stack([self._dot(half, w, (1, axis)) for half in halves], axis=1).reshape(x.shape[0], -1)

    def _dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """Product over one axis of each of two arrays: operands in ``dtype``, sums and result in ``sums``."""
        return dot(a, b, ((contract[0],), (contract[1],)), self.dtype, self.sums)
