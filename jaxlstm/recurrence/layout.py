"""Memory layouts of the fused recurrence, feature-major ``(H, B)`` or batch-major ``(B, H)``, and their products."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlstm.params import Size
from jaxlstm.primitives.mixed_precision_dot import dot

OrderName = Literal["batch", "feature"]  # the axis that comes first in memory, see `ORDERS`


@dataclass(frozen=True)
class Layout:
    """Order of the axes of one step's arrays, and how the matrix products of a step are computed.

    Args:
      dtype: dtype of the operands of matrix products, and of outputs.
      accum_dtype: dtype of the sums and of the state.
      hoist_inputs: whether ``W_x x`` is computed for all steps before the loop; otherwise each step multiplies
        ``[W_x W_h]`` with ``[x; h]``.
      project_first: whether ``W_x x`` is hoisted out of the custom tangent rule too; JAX differentiates it.
      chunk_size: steps whose tangents are computed together; enough for one large product, few enough for the cache.
      threaded_gates: whether the gates use all threads, by `jaxlstm.recurrence.cpu_activations`, where activations one
        by one are not faster.
      separate_gates: whether each gate is sliced from the result of a step's product, by itself. XLA for GPUs then
        computes c and h in one kernel; a TPU would take longer. See `docs/performance_notes.md`.
      one_row: whether the batch is one row. The backward product of a step is then a matrix times a vector, for which
        XLA on CPU reads the transpose of ``W_h`` in up to half the time, if the number of units is no multiple of 32.
      bitcast: whether loops read and write bfloat16 arrays as uint16, which has no derivative. To slice, concatenate or
        transpose a bfloat16 array, XLA on CPU converts it to float32.
    """

    order: ClassVar[OrderName]
    units_axis: ClassVar[int]
    batch_axis: ClassVar[int]

    dtype: jnp.dtype
    accum_dtype: jnp.dtype
    hoist_inputs: bool
    project_first: bool = False
    chunk_size: int = 16
    threaded_gates: bool = False
    separate_gates: bool = False
    one_row: bool = False
    bitcast: bool = False

    def expand_units(self, a: Array) -> Array:
        """Adds the batch axis to a vector over units."""
        return jnp.expand_dims(a, self.batch_axis)

    def expand_batch(self, a: Array, like: Array) -> Array:
        """Adds the units axis to a vector over the batch; ``like`` is an array of a step."""
        del like
        return jnp.expand_dims(a, self.units_axis)

    def from_batch_major(self, a: Array) -> Array:
        """Transposes ``(..., B, H)`` to this layout."""
        return jnp.moveaxis(a, -1, a.ndim - 2 + self.units_axis)

    def to_batch_major(self, a: Array) -> Array:
        """Transposes an array of this layout to ``(..., B, H)``."""
        return jnp.moveaxis(a, a.ndim - 2 + self.units_axis, -1)

    def pack(self, a: Array) -> Array:
        """Rounds to ``dtype``; with ``bitcast`` reinterprets the result as uint16."""
        a = a.astype(self.dtype)
        return lax.bitcast_convert_type(a, jnp.uint16) if self.bitcast else a

    def unpack(self, a: Array) -> Array:
        """Inverts `pack`, except for the rounding."""
        return lax.bitcast_convert_type(a, self.dtype) if self.bitcast else a

    def prepare(self, w: Array) -> Array:
        """Returns a matrix as `dot` takes it."""
        raise NotImplementedError

    def dot(self, w: Array, x: Array) -> Array:
        """Computes ``W x`` for one step; both operands are read in the order of memory."""
        raise NotImplementedError

    def prepare_both(self, w_x: Array, w_h: Array) -> Any:
        """Returns input and recurrent weights as `dot_both` takes them."""
        return self.prepare(self.unpack(jnp.concatenate([self.pack(w_x), self.pack(w_h)], 1)))

    def dot_both(self, w: Any, x: Array, h: Array) -> Array:
        """Computes ``W_x x + W_h h`` for one step as one product.

        Args:
          w: from `prepare_both`.
          x: the input; with ``bitcast`` packed.
          h: the hidden state.
        """
        if self.bitcast:
            return self.dot(w, self.unpack(jnp.concatenate([x, self.pack(h)], self.units_axis)))
        return self.dot(w, jnp.concatenate([x.astype(self.accum_dtype), h], self.units_axis))

    def prepare_for_vjp(self, w: Array) -> Array:
        """Returns a matrix as `dot_for_vjp` takes it."""
        raise NotImplementedError

    def dot_for_vjp(self, w: Array, x: Array) -> Array:
        """Computes ``W x`` for one step; the transpose reads its operands in the order of memory."""
        raise NotImplementedError

    def dot_over_time(self, w: Array, xs: Array) -> Array:
        """Computes ``W x`` for all steps of ``xs`` at once, from ``w (m, n)`` and ``xs (T, n, B)`` or ``(T, B, n)``."""
        raise NotImplementedError

    def _dot(self, a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
        """Multiplies over one axis of each array."""
        return dot(a, b, ((axis_a,), (axis_b,)), self.dtype, self.accum_dtype)


class FeatureMajor(Layout):
    """``(H, B)``: the weights, the larger operand of a step's product, are on the left and read in order."""

    order = "feature"
    units_axis = 0
    batch_axis = 1

    def prepare(self, w: Array) -> Array:
        """Returns the matrix in ``dtype``."""
        return w.astype(self.dtype)

    def dot(self, w: Array, x: Array) -> Array:
        """Computes ``W x``."""
        return self._dot(w, x, 1, 0)

    def prepare_both(self, w_x: Array, w_h: Array) -> Any:
        """Keeps the matrices separate in bfloat16: to concatenate them takes longer than one product saves."""
        return (self.prepare(w_x), self.prepare(w_h)) if self.bitcast else super().prepare_both(w_x, w_h)

    def dot_both(self, w: Any, x: Array, h: Array) -> Array:
        """Computes one product, or in bfloat16 two."""
        if self.bitcast:
            return self.dot(w[0], self.unpack(x)) + self.dot(w[1], h)
        return super().dot_both(w, x, h)

    def prepare_for_vjp(self, w: Array) -> Array:
        """Returns the transpose."""
        return w.T.astype(self.dtype)

    def dot_for_vjp(self, w: Array, x: Array) -> Array:
        """Computes ``W x`` from the transpose of ``W``."""
        return self._dot(w, x, 0, 0)

    def dot_over_time(self, w: Array, xs: Array) -> Array:
        """Computes ``W x`` for all steps of ``xs (T, n, B)``."""
        return jnp.moveaxis(self._dot(w, xs, 1, 1), 0, 1)


class BatchMajor(Layout):
    """``(B, H)``: fewer transpositions, which counts if the weights are small."""

    order = "batch"
    units_axis = 1
    batch_axis = 0

    def prepare(self, w: Array) -> Array:
        """Returns the transpose."""
        return w.T.astype(self.dtype)

    def dot(self, w: Array, x: Array) -> Array:
        """Computes ``x W^T``."""
        return self._dot(x, w, 1, 0)

    def prepare_for_vjp(self, w: Array) -> Array:
        """Returns the matrix in ``dtype``, or for one row the transpose."""
        return self.prepare(w) if self.one_row else w.astype(self.dtype)

    def dot_for_vjp(self, w: Array, x: Array) -> Array:
        """Computes ``x W^T`` from `prepare_for_vjp`."""
        return self.dot(w, x) if self.one_row else self._dot(x, w, 1, 1)

    def dot_over_time(self, w: Array, xs: Array) -> Array:
        """Computes ``x W^T`` for all steps of ``xs (T, B, n)``."""
        return self._dot(xs, w, 2, 1)


ORDERS: dict[str, type[Layout]] = {"batch": BatchMajor, "feature": FeatureMajor}


class LayerSizes(NamedTuple):
    """Sizes of one layer."""

    batch_size: Size  # B
    input_size: int  # I
    hidden_size: int  # H


INF = float("inf")
CHUNK_RULES = ((8, 64), (16, 32), (INF, 8))  # largest batch size, steps per chunk; measured


def choose_layout(
    sizes: LayerSizes,
    dtype: jnp.dtype,
    accum_dtype: jnp.dtype,
    order: OrderName | None = None,
    *,
    may_project_first: bool = True,
    layer_norm: bool = False,
) -> Layout:
    """Returns the layout for the sizes of a layer: on CPU by measurement, elsewhere a default, not measured.

    Feature-major reads the weights, the larger operand, in the order of memory, but its innermost axis is the batch. It
    pays off with more than 256 units for a multiple of 16 rows, which fills the vector registers, 500 for 1 or 8 rows,
    and 800 for other numbers of rows.

    The product of the inputs is hoisted from the loop if a row has at least 64 inputs and 16 times as many as there are
    rows: a step then reads ``G H B`` numbers of the result instead of ``G H I`` weights. It is hoisted out of the
    tangent rule for up to 64 units and 6 times as many inputs, whose concatenation with h takes long beside the
    product; not in bfloat16, where inference would take up to 1.5 times as long. With layer normalization it is always
    hoisted from batch-major loops, where training would take up to 1.17 times as long, and never out of the rule.

    With float32 sums and ``2^12 <= batch_size * hidden_size < 2^14`` the gates may use all threads of a CPU: below,
    waking a thread costs more than it saves, and above the difference is within 4 %.

    While a program is exported for any size, a symbolic size counts as a large one that is no multiple of 16.

    Args:
      sizes: the sizes.
      dtype: dtype of the operands of matrix products.
      accum_dtype: dtype of the sums.
      order: the order of the axes; None chooses it, too.
      may_project_first: whether `Layout.project_first` is possible: ``z`` is ``W_x x + b + W_h h``, and ``W_h`` dense.
      layer_norm: whether ``W_x x`` and ``W_h h`` are normalized separately.
    """
    if jax.default_backend() != "cpu":
        separate = jax.default_backend() == "gpu"
        return ORDERS[order or "batch"](dtype, accum_dtype, hoist_inputs=True, chunk_size=64, separate_gates=separate)
    batch_size = sizes.batch_size if isinstance(sizes.batch_size, int) else INF
    hidden_size = sizes.hidden_size
    units = 256 if batch_size % 16 == 0 else 500 if batch_size in (1, 8) else 800
    order = order or ("feature" if hidden_size > units else "batch")
    is_narrow = hidden_size <= 64 and sizes.input_size >= 6 * hidden_size
    project_first = may_project_first and is_narrow and dtype != jnp.bfloat16 and not layer_norm
    hoists_normalized = layer_norm and order == "batch"
    hoist_inputs = project_first or hoists_normalized or sizes.input_size >= max(64, 16 * batch_size)
    chunk_size = 64 if project_first else next(size for limit, size in CHUNK_RULES if batch_size <= limit)
    threaded = 2**12 <= batch_size * hidden_size < 2**14 and accum_dtype == jnp.float32
    return ORDERS[order](
        dtype,
        accum_dtype,
        hoist_inputs,
        project_first,
        chunk_size,
        threaded_gates=threaded,
        one_row=batch_size == 1,
        bitcast=dtype == jnp.bfloat16,
    )
