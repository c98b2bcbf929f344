r"""The equations.

One step of a recurrent layer is a dense part, the same for every cell, and a small function that makes it this cell::

    z    = W_x x + W_h h + b        one slab of H pre-activations per gate
    c, m = gates(z, c)              elementwise over hidden units
    h    = W_p m                    with a projection; else h = m

`gates` is all there is to a cell. It is written once, here, and every implementation of the recurrence calls it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

Gates = Callable[..., tuple[Any, Array]]
Activated = Callable[[Array, str], list[Array]]


@dataclass(frozen=True)
class Cell:
    """What the recurrence needs to know of a cell.

    Args:
      gates: ``(z, c) -> (c, h)``, elementwise over hidden units. ``z`` has the gate axis first, so it unpacks:
        ``i, f, g, o = z``; every slab and ``c`` have one shape. Which axes that shape has is the implementation's
        affair. A cell without a cell state takes and returns None for ``c``. If it takes more, by these names, the
        cell carries more: ``keep``, a scale of the candidate, for recurrent dropout; ``norm``, a function of the cell
        state on its way to the output, for layer normalisation; ``w``, the peepholes, as many as ``num_peepholes``;
        ``activated``, the function of this name below, which an implementation may write in its own way.
      num_gates: slabs in ``z``.
      has_cell_state: False where ``c`` is None.
      forget_gate: which slab's bias starts at 1, None for a cell that has no forget gate.
      input_gate: which slab's bias chrono initialisation starts at minus that of the forget gate; None for none.
      num_peepholes: weights per unit by which gates see the cell state.
    """

    gates: Gates
    num_gates: int
    has_cell_state: bool = True
    forget_gate: int | None = None
    input_gate: int | None = None
    num_peepholes: int = 0

    def takes(self, name: str) -> bool:
        """Whether ``gates`` has an argument of this name."""
        return name in inspect.signature(self.gates).parameters


def identity(c: Array) -> Array:
    """``c`` itself."""
    return c


def scales(z: Float[Array, "G *units"], kinds: str) -> np.ndarray:
    """The ``scale`` of `sigmoid_or_tanh` for each slab of ``z``: ``(G, 1, ...)``."""
    scale = np.array([{"s": 0.5, "t": 1.0}[kind] for kind in kinds], z.dtype)
    return scale.reshape(-1, *[1] * (z.ndim - 1))  # by NumPy: a TPU kernel has no such reshape


def sigmoid_or_tanh(
    z: Float[Array, "G *units"], kinds: str, tanh: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "G *units"]:
    """Sigmoid of the slabs marked ``s`` and tanh of those marked ``t``, by a single tanh over all of them.

    ``sigmoid(z) = (1 + tanh(z/2)) / 2``. One function over one contiguous array is what a vectorising compiler does
    well: activating four slabs one by one takes 1.1 to 1.9 times as long for a whole forward scan on a CPU.
    """
    scale = scales(z, kinds)
    return tanh(z * scale) * scale + (1 - scale)


def slope(y: Float[Array, "G *units"], scale: np.ndarray) -> Float[Array, "G *units"]:
    """The derivative of `sigmoid_or_tanh` where its value is ``y``, with the ``scale`` of each slab."""
    return -((y - (1 - scale)) ** 2) + scale**2


def activated(z: Float[Array, "G *units"], kinds: str) -> list[Float[Array, "*units"]]:
    """The slabs one by one, after their sigmoid or tanh."""
    return list(jnp.unstack(sigmoid_or_tanh(z, kinds)))


def named(slabs: list[Array], names: str) -> list[Array]:
    """Each slab under its letter for `jaxlstm.diagnostics`; no operation in the compiled program."""
    return [checkpoint_name(slab, name) for slab, name in zip(slabs, names)]


def lstm(
    z: Float[Array, "4 *units"],
    c: Float[Array, "*units"],
    keep: Any = 1.0,
    norm: Callable[[Array], Array] = identity,
    activated: Activated = activated,
) -> tuple[Array, Array]:
    """Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000)::

    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      input, forget and output gate
    g       = tanh(z_g)                                     candidate
    c       = f c + i g
    h       = o tanh(c)

    ``keep`` scales g, and ``norm`` is taken of c on its way to h, where a regulariser or layer normalisation says so;
    ``activated`` is the first two lines.
    """
    i, f, g, o = named(activated(z, "ssts"), "ifgo")
    c = f * c + i * (g * keep)
    return c, o * jnp.tanh(norm(c))


def coupled(
    z: Float[Array, "3 *units"],
    c: Float[Array, "*units"],
    keep: Any = 1.0,
    norm: Callable[[Array], Array] = identity,
    activated: Activated = activated,
) -> tuple[Array, Array]:
    """The LSTM with coupled input and forget gate, ``i = 1 - f`` (Greff et al. 2017); slabs in the order f, g, o."""
    f, g, o = named(activated(z, "sts"), "fgo")
    i = checkpoint_name(1 - f, "i")
    c = f * c + i * (g * keep)
    return c, o * jnp.tanh(norm(c))


def peephole(
    z: Float[Array, "4 *units"],
    c: Float[Array, "*units"],
    w: Float[Array, "3 *w_units"],
    keep: Any = 1.0,
    norm: Callable[[Array], Array] = identity,
) -> tuple[Array, Array]:
    """The LSTM whose gates see the cell state, i and f the old one, o the new one (Gers & Schmidhuber 2000)::

    i, f = sigmoid(z_i + w_i c), sigmoid(z_f + w_f c)
    c    = f c + i tanh(z_g)
    o    = sigmoid(z_o + w_o c)
    """
    (z_i, z_f, z_g, z_o), (w_i, w_f, w_o) = jnp.unstack(z), jnp.unstack(w)
    i, f = checkpoint_name(jax.nn.sigmoid(z_i + w_i * c), "i"), checkpoint_name(jax.nn.sigmoid(z_f + w_f * c), "f")
    c = f * c + i * (checkpoint_name(jnp.tanh(z_g), "g") * keep)
    o = checkpoint_name(jax.nn.sigmoid(z_o + w_o * c), "o")
    return c, o * jnp.tanh(norm(c))


def rnn_tanh(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network (Elman 1990): ``h = tanh(z)``."""
    return c, jnp.tanh(z[0])


def rnn_relu(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with rectified units (Le, Jaitly & Hinton 2015): ``h = max(z, 0)``."""
    return c, jax.nn.relu(z[0])


def rnn_sigmoid(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with logistic units: ``h = sigmoid(z)``."""
    return c, sigmoid_or_tanh(z, "s")[0]


CELLS = {
    "lstm": Cell(lstm, num_gates=4, forget_gate=1, input_gate=0),
    "peephole": Cell(peephole, num_gates=4, forget_gate=1, input_gate=0, num_peepholes=3),
    "cifg": Cell(coupled, num_gates=3, forget_gate=0),
}
RNN = {
    "tanh": Cell(rnn_tanh, num_gates=1, has_cell_state=False),
    "relu": Cell(rnn_relu, num_gates=1, has_cell_state=False),
    "sigmoid": Cell(rnn_sigmoid, num_gates=1, has_cell_state=False),
}
