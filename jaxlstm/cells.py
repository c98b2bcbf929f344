r"""The equations.

One step of a recurrent layer is a dense part, the same for every cell, and a small function that makes it this cell::

    z    = W_x x + W_h h + b        one slab of H pre-activations per gate
    c, m = gates(z, c)              elementwise over hidden units
    h    = W_p m                    with a projection; else h = m

`gates` is all there is to a cell. It is written once, here, and every implementation of the recurrence calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxlstm.types import Weights

Gates = Callable[[Array, Any], tuple[Any, Array]]


@dataclass(frozen=True)
class Cell:
    """What the recurrence needs to know of a cell.

    Args:
      gates: ``(z, c) -> (c, h)``, elementwise over hidden units. ``z`` has the gate axis first, so it unpacks:
        ``i, f, g, o = z``; every slab and ``c`` have one shape. Which axes that shape has is the implementation's
        affair. A cell without a cell state takes and returns None for ``c``.
      num_gates: slabs in ``z``.
      has_cell_state: False where ``c`` is None.
      forget_gate: which slab's bias starts at 1, None for a cell that has no forget gate.
    """

    gates: Gates
    num_gates: int
    has_cell_state: bool = True
    forget_gate: int | None = None


def sigmoid_or_tanh(z: Float[Array, "G *units"], kinds: str) -> Float[Array, "G *units"]:
    """Sigmoid of the slabs marked ``s`` and tanh of those marked ``t``, by a single tanh over all of them.

    ``sigmoid(z) = (1 + tanh(z/2)) / 2``. One function over one contiguous array is what a vectorising compiler does
    well: activating four slabs one by one takes 1.1 to 1.9 times as long for a whole forward scan on a CPU.
    """
    scale = jnp.array([{"s": 0.5, "t": 1.0}[kind] for kind in kinds], z.dtype)
    scale = scale.reshape(-1, *[1] * (z.ndim - 1))
    return jnp.tanh(z * scale) * scale + (1 - scale)


def lstm(z: Float[Array, "4 *units"], c: Float[Array, "*units"]) -> tuple[Array, Array]:
    """Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000)::

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      input, forget and output gate
    g       = tanh(z_g)                                     candidate
    c       = f c + i g
    h       = o tanh(c)
    """
    i, f, g, o = jnp.unstack(sigmoid_or_tanh(z, "ssts"))
    c = f * c + i * g
    return c, o * jnp.tanh(c)


def peephole(
    z: Float[Array, "4 *units"], c: Float[Array, "*units"], w: Float[Array, "3 *#units"]
) -> tuple[Array, Array]:
    """The LSTM whose gates see the cell state, the output gate the new one (Gers, Schraudolph & Schmidhuber 2002)::

    i, f = sigmoid(z_i + w_i c), sigmoid(z_f + w_f c)
    c    = f c + i tanh(z_g)
    o    = sigmoid(z_o + w_o c)
    h    = o tanh(c)
    """
    (z_i, z_f, z_g, z_o), (w_i, w_f, w_o) = jnp.unstack(z), jnp.unstack(w)
    i, f = jax.nn.sigmoid(z_i + w_i * c), jax.nn.sigmoid(z_f + w_f * c)
    c = f * c + i * jnp.tanh(z_g)
    o = jax.nn.sigmoid(z_o + w_o * c)
    return c, o * jnp.tanh(c)


def rnn_tanh(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network (Elman 1990): ``h = tanh(z)``."""
    return c, jnp.tanh(z[0])


def rnn_relu(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with rectified units (Le, Jaitly & Hinton 2015): ``h = max(z, 0)``."""
    return c, jax.nn.relu(z[0])


def rnn_sigmoid(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with logistic units: ``h = sigmoid(z)``."""
    return c, sigmoid_or_tanh(z, "s")[0]


LSTM = Cell(lstm, num_gates=4, forget_gate=1)
RNN = {
    "tanh": Cell(rnn_tanh, num_gates=1, has_cell_state=False),
    "relu": Cell(rnn_relu, num_gates=1, has_cell_state=False),
    "sigmoid": Cell(rnn_sigmoid, num_gates=1, has_cell_state=False),
}


def product(w: Float[Array, "m n"], x: Float[Array, "*batch n"], dtype: DTypeLike, sums: DTypeLike) -> Array:
    """``W x`` over the last axis of ``x``: operands rounded to ``dtype``, sums and result in ``sums``."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.astype(dtype), w.astype(dtype), contract_last, preferred_element_type=jnp.dtype(sums))


def input_part(weights: Weights, x: Float[Array, "*batch I"], dtype: DTypeLike, sums: DTypeLike) -> Array:
    """``W_x x + b``, the share of ``z`` that does not wait for the step before: ``(*batch, G*H)`` in ``sums``."""
    z = product(weights.w_x, x, dtype, sums)
    return z if weights.b is None else z + jnp.broadcast_to(weights.b.astype(sums), z.shape)


def step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch GH"],
    h: Float[Array, "*batch P"],
    c: Float[Array, "*batch H"] | None,
    dtype: DTypeLike,
) -> tuple[Array, Array | None]:
    """One step, from `input_part` and the state before to ``(h, c)`` after; products in ``dtype``."""
    z = z_x + product(weights.w_h, h, dtype, z_x.dtype)
    z = z.reshape(*z.shape[:-1], cell.num_gates, z.shape[-1] // cell.num_gates)
    z = jnp.moveaxis(z, -2, 0)  # (G, *batch, H)
    c, m = cell.gates(z, c)
    return (m if weights.w_p is None else product(weights.w_p, m, dtype, z_x.dtype)), c
