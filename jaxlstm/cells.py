r"""The equations of the LSTM and its variants, and how to add a cell.

One step of a recurrent layer is a dense part, the same for every cell, and two small functions that make it this cell::

    z    = W_x x + W_h h + b        one slab of H pre-activations per gate
    gate = activation(z)            slab by slab
    c    = update(gates, c)         elementwise over hidden units
    y    = output(gates, c)         elementwise over hidden units
    h    = W_p y                    with a projection; otherwise h = y

The functions take the gates and the cell state by name. They are written once, here, and every backend of the
recurrence calls them.

To add a cell, write them, declare a `Cell`, and name it in `CELLS` and, for type checkers and the command line, in
`CellName`; `jaxlstm.conv_lstm` has such a list, too. `tests/cases.py` compares every cell with its oracle in
`tests/oracle.py`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Activation = Callable[[Array], Array]


@dataclass(frozen=True)
class Cell:
    """Declaration of a cell.

    Args:
      gates: the activation of each gate by its name, in the order of the slabs of ``z``: `sigmoid`, `tanh`, another
        elementwise function, or None for none. They are stored as pairs.
      output: the output y of the step, from gates and the new cell state ``c``, elementwise over hidden units; the
        names of its arguments say which it takes.
      update: the new cell state, from gates and the old ``c``, in the same way; None for a cell without one.
      forget_gate: the gate whose bias starts at 1; None for a cell without a forget gate.
      input_gate: the gate whose bias chrono initialization sets to minus that of the forget gate; None for none.
      candidate: the gate that recurrent dropout drops; None if it cannot.
      peepholes: the gates that read the cell state through a weight per unit, added to z: those of ``update`` the old
        state, the others the new one.
    """

    gates: Mapping[str, Activation | None] | tuple[tuple[str, Activation | None], ...]
    output: Callable[..., Array]
    update: Callable[..., Array] | None = None
    forget_gate: str | None = None
    input_gate: str | None = None
    candidate: str | None = None
    peepholes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.gates, Mapping):
            object.__setattr__(self, "gates", tuple(self.gates.items()))

    @property
    def activations(self) -> dict[str, Activation | None]:
        """The activation of each gate by its name."""
        return dict(self.gates)

    @property
    def num_gates(self) -> int:
        """G, the number of slabs in ``z``."""
        return len(self.gates)

    @property
    def has_cell_state(self) -> bool:
        """Whether there is a cell state c."""
        return self.update is not None

    def slab(self, gate: str | None) -> int | None:
        """Returns the index of a gate in ``z``; None for None."""
        return None if gate is None else list(self.activations).index(gate)


def argument_names(function: Callable[..., object]) -> tuple[str, ...]:
    """Returns the names of the gates and states that ``update`` or ``output`` takes."""
    return tuple(inspect.signature(function).parameters)


def sigmoid(z: Array) -> Array:
    """Returns ``1 / (1 + exp(-z))``."""
    return jax.nn.sigmoid(z)


def tanh(z: Array) -> Array:
    """Returns the hyperbolic tangent."""
    return jnp.tanh(z)


def relu(z: Array) -> Array:
    """Returns ``max(z, 0)``."""
    return jax.nn.relu(z)


def lstm_update(i: Array, f: Array, g: Array, c: Array) -> Array:
    """Forgets and adds; with input gate i, forget gate f and candidate g."""
    return f * c + i * g


def lstm_output(o: Array, c: Array) -> Array:
    """Shows the cell state through the output gate o."""
    return o * jnp.tanh(c)


def coupled_update(f: Array, g: Array, c: Array) -> Array:
    """Adds as much as it forgets: the input gate is 1 - f."""
    return f * c + (1 - f) * g


def rnn_output(y: Array) -> Array:
    """Shows the activated units."""
    return y


# Long short-term memory with a forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000).
LSTM = Cell(
    gates={"i": sigmoid, "f": sigmoid, "g": tanh, "o": sigmoid},
    update=lstm_update,
    output=lstm_output,
    forget_gate="f",
    input_gate="i",
    candidate="g",
)
# The gates read the cell state: i and f the old one, o the new one (Gers & Schmidhuber 2000).
PEEPHOLE = replace(LSTM, peepholes=("i", "f", "o"))
# Coupled input and forget gates (Greff et al. 2017).
CIFG = Cell(
    gates={"f": sigmoid, "g": tanh, "o": sigmoid},
    update=coupled_update,
    output=lstm_output,
    forget_gate="f",
    candidate="g",
)

CellName = Literal["lstm", "peephole", "cifg", "rnn"]  # the keys of CELLS, and "rnn" with an activation of RNN
CELLS = {"lstm": LSTM, "peephole": PEEPHOLE, "cifg": CIFG}
# The vanilla recurrent network (Elman 1990), with rectified units (Le, Jaitly & Hinton 2015) or logistic ones.
RNN = {
    "tanh": Cell(gates={"y": tanh}, output=rnn_output),
    "relu": Cell(gates={"y": relu}, output=rnn_output),
    "sigmoid": Cell(gates={"y": sigmoid}, output=rnn_output),
}
