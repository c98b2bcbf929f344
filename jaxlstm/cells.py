r"""The equations of the LSTM and its variants, and how to add a cell.

One step of a recurrent layer is a dense part, the same for every cell, and a small function that makes it this cell::

    z    = W_x x + W_h h + b        one slab of H pre-activations per gate
    c, y = gates(z, c)              elementwise over hidden units
    h    = W_p y                    with a projection; otherwise h = y

The function ``gates`` defines the cell. It is written once, here, and every backend of the recurrence calls it. To add
a cell, write such a function, declare it as a `Cell`, and name it in `CELLS` and, for type checkers and the command
line, in `CellName`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

Gates = Callable[..., tuple[Any, Array]]
Activate = Callable[[Array, str], list[Array]]


@dataclass(frozen=True)
class Cell:
    """Declaration of a cell.

    Args:
      gates: ``(z, c) -> (c, y)``, elementwise over hidden units. The gates are the leading axis of ``z``, so it
        unpacks: ``i, f, g, o = z``. Every slab and ``c`` have the same shape; a backend chooses its axes. A cell
        without a cell state takes and returns None for ``c``. Optional arguments, found by their names, add options:
        ``candidate_scale``, a factor of the candidate, for recurrent dropout; ``normalize``, a function of the cell
        state on its way to the output, for layer normalization; ``peepholes``, ``num_peepholes`` weights per unit;
        ``activate``, the function of this name below, which a backend may replace by an equal one.
      num_gates: number of slabs in ``z``.
      has_cell_state: False if ``c`` is None.
      forget_gate: index of the slab whose bias starts at 1; None for a cell without a forget gate.
      input_gate: index of the slab whose bias chrono initialization sets to minus that of the forget gate; None for
        none.
      num_peepholes: number of weights per unit by which gates read the cell state.
    """

    gates: Gates
    num_gates: int
    has_cell_state: bool = True
    forget_gate: int | None = None
    input_gate: int | None = None
    num_peepholes: int = 0

    def takes(self, name: str) -> bool:
        """Returns whether ``gates`` has an argument of this name."""
        return name in inspect.signature(self.gates).parameters


def identity(c: Array) -> Array:
    """Returns ``c``."""
    return c


def activation_scales(z: Float[Array, "G *units"], kinds: str) -> np.ndarray:
    """Returns the ``scale`` of `sigmoid_or_tanh` for each slab of ``z``: ``(G, 1, ...)``."""
    scale = np.array([{"s": 0.5, "t": 1.0}[kind] for kind in kinds], z.dtype)
    return scale.reshape(-1, *[1] * (z.ndim - 1))  # in NumPy: a TPU kernel has no such reshape


def sigmoid_or_tanh(
    z: Float[Array, "G *units"], kinds: str, tanh: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "G *units"]:
    """Applies sigmoid to the slabs marked ``s`` and tanh to those marked ``t``, by one tanh over all slabs.

    ``sigmoid(z) = (1 + tanh(z/2)) / 2``. A compiler vectorizes one function over one contiguous array well: activating
    the four slabs of an LSTM one by one makes a whole forward scan 1.1 to 1.9 times slower on a CPU.
    """
    scale = activation_scales(z, kinds)
    return tanh(z * scale) * scale + (1 - scale)


def activation_slope(y: Float[Array, "G *units"], scale: np.ndarray) -> Float[Array, "G *units"]:
    """Returns the derivative of `sigmoid_or_tanh`, given its value ``y`` and the ``scale`` of each slab."""
    return -((y - (1 - scale)) ** 2) + scale**2


def activate(z: Float[Array, "G *units"], kinds: str) -> list[Float[Array, "*units"]]:
    """Returns the slabs after their sigmoid (``s``) or tanh (``t``)."""
    return list(jnp.unstack(sigmoid_or_tanh(z, kinds)))


def name_gates(slabs: list[Array], names: str) -> list[Array]:
    """Names each slab for `jaxlstm.diagnostics`; adds no operation to the compiled program."""
    return [checkpoint_name(slab, name) for slab, name in zip(slabs, names)]


def lstm(
    z: Float[Array, "4 *units"],
    c: Float[Array, "*units"],
    candidate_scale: Any = 1.0,
    normalize: Callable[[Array], Array] = identity,
    activate: Activate = activate,
) -> tuple[Array, Array]:
    """Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000)::

        i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      input, forget and output gate
        g       = tanh(z_g)                                     candidate
        c       = f c + i g
        h       = o tanh(c)

    Recurrent dropout multiplies g by ``candidate_scale``; layer normalization takes ``normalize(c)`` for c in the last
    line. ``activate`` is the first two lines.
    """
    i, f, g, o = name_gates(activate(z, "ssts"), "ifgo")
    c = f * c + i * (g * candidate_scale)
    return c, o * jnp.tanh(normalize(c))


def coupled(
    z: Float[Array, "3 *units"],
    c: Float[Array, "*units"],
    candidate_scale: Any = 1.0,
    normalize: Callable[[Array], Array] = identity,
    activate: Activate = activate,
) -> tuple[Array, Array]:
    """The LSTM with coupled input and forget gates, ``i = 1 - f`` (Greff et al. 2017); slabs in the order f, g, o."""
    f, g, o = name_gates(activate(z, "sts"), "fgo")
    i = checkpoint_name(1 - f, "i")
    c = f * c + i * (g * candidate_scale)
    return c, o * jnp.tanh(normalize(c))


def peephole(
    z: Float[Array, "4 *units"],
    c: Float[Array, "*units"],
    peepholes: Float[Array, "3 *w_units"],
    candidate_scale: Any = 1.0,
    normalize: Callable[[Array], Array] = identity,
) -> tuple[Array, Array]:
    """The LSTM whose gates read the cell state: i and f the old one, o the new one (Gers & Schmidhuber 2000)::

    i, f = sigmoid(z_i + w_i c), sigmoid(z_f + w_f c)
    c    = f c + i tanh(z_g)
    o    = sigmoid(z_o + w_o c)
    h    = o tanh(c)
    """
    (z_i, z_f, z_g, z_o), (w_i, w_f, w_o) = jnp.unstack(z), jnp.unstack(peepholes)
    i, f = checkpoint_name(jax.nn.sigmoid(z_i + w_i * c), "i"), checkpoint_name(jax.nn.sigmoid(z_f + w_f * c), "f")
    c = f * c + i * (checkpoint_name(jnp.tanh(z_g), "g") * candidate_scale)
    o = checkpoint_name(jax.nn.sigmoid(z_o + w_o * c), "o")
    return c, o * jnp.tanh(normalize(c))


def rnn_tanh(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network (Elman 1990): ``h = tanh(z)``."""
    return c, jnp.tanh(z[0])


def rnn_relu(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with rectified units (Le, Jaitly & Hinton 2015): ``h = max(z, 0)``."""
    return c, jax.nn.relu(z[0])


def rnn_sigmoid(z: Float[Array, "1 *units"], c: None = None) -> tuple[None, Array]:
    """The vanilla recurrent network with logistic units: ``h = sigmoid(z)``."""
    return c, sigmoid_or_tanh(z, "s")[0]


CellName = Literal["lstm", "peephole", "cifg", "rnn"]  # the keys of CELLS, and "rnn" with an activation of RNN
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
