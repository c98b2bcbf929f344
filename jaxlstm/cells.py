r"""The equations of the LSTM and of other gated recurrences, and how to add a cell.

One step of a recurrent layer is a dense part, the same for every cell, and two small functions that make it this cell::

    z     = W_x x + W_h h + W_s s + b    one slab of H pre-activations per gate
    gate  = activation(z)                slab by slab
    state = update(gates, state)         elementwise over hidden units
    y     = output(gates, state)         elementwise over hidden units
    h     = W_p y                        with a projection; otherwise h = y

The functions take gates and states by name, and ``h`` for the output of the step before. They are written once, here,
and every backend of the recurrence calls them. What else differs between cells is declared: the inputs that a gate
reads, the states and their initial values, the form of ``W_h``. A weight that no gate reads does not exist.

To add a cell, write them, declare a `Cell`, and name it in `CELLS` and, for type checkers and the command line, in
`CellName`. `tests/cases.py` compares every cell with its oracle in `tests/oracle.py`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

Activation = Callable[[Array], Array]
Source = Literal["x", "h", "static"]  # what a gate may read: the input, the output before, the static features
SOURCES: tuple[Source, ...] = ("x", "h", "static")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cell:
    """Declaration of a cell.

    Args:
      gates: the activation of each gate by its name, in the order of the slabs of ``z``: `sigmoid`, `tanh`, another
        elementwise function, or None for none. They are stored as pairs, as are ``reads`` and ``state``.
      output: the output y of the step, elementwise over hidden units; the names of its arguments say which gates and
        new states it takes. ``h`` is the output of the step before.
      update: the new state, from gates and old states, in the same way; with several states a tuple of them in the
        order of ``state``. None for a cell whose only state is h.
      reads: the sources ``"x"``, ``"h"`` and ``"static"`` that a gate reads, by its name; x and h for any other gate.
      state: the initial value of each state by its name; by default there is ``c``, which starts at 0, if there is
        an ``update``.
      recurrent: ``"dense"`` if each unit reads all of h, ``"diagonal"`` if it reads its own h alone.
      affine: whether the new state and h are affine functions of the old ones, given the input.
      forget_gate: the gate whose bias starts at ``forget_bias``; None for a cell without a forget gate.
      forget_bias: initial bias of the forget gate, or ``"power_law"``: `jaxlstm.initializers.power_law_forget_bias`.
      input_gate: the gate whose bias chrono initialization sets to minus the forget gate's; None for none.
      candidate: the gate that recurrent dropout drops; None if it cannot.
      peepholes: the gates that read the cell state through a weight per unit, added to z: those of ``update`` the old
        state, the others the new one.
    """

    gates: Mapping[str, Activation | None] | tuple[tuple[str, Activation | None], ...]
    output: Callable[..., Array]
    update: Callable[..., Any] | None = None
    reads: Mapping[str, tuple[Source, ...]] | tuple[tuple[str, tuple[Source, ...]], ...] = ()
    state: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    recurrent: Literal["dense", "diagonal"] = "dense"
    affine: bool = False
    forget_gate: str | None = None
    forget_bias: float | Literal["power_law"] = 1.0
    input_gate: str | None = None
    candidate: str | None = None
    peepholes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.state is None:
            object.__setattr__(self, "state", () if self.update is None else (("c", 0.0),))
        for name in ("gates", "reads", "state"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, tuple(value.items()))

    @property
    def activations(self) -> dict[str, Activation | None]:
        """The activation of each gate by its name."""
        return dict(self.gates)

    @property
    def num_gates(self) -> int:
        """G, the number of slabs in ``z``."""
        return len(self.gates)

    @property
    def initial_values(self) -> dict[str, float]:
        """The initial value of each state by its name."""
        return dict(self.state or ())

    @property
    def has_cell_state(self) -> bool:
        """Whether there is a state besides h."""
        return bool(self.state)

    @property
    def reads_h(self) -> bool:
        """Whether ``update`` or ``output`` takes the output of the step before."""
        functions = (self.output,) if self.update is None else (self.update, self.output)
        return any("h" in argument_names(function) for function in functions)

    @property
    def reads_x_and_h(self) -> bool:
        """Whether every gate reads x and h, and nothing else."""
        return all(set(sources) == {"x", "h"} for sources in dict(self.reads).values())

    def slab(self, gate: str | None) -> int | None:
        """Returns the index of a gate in ``z``; None for None."""
        return None if gate is None else list(self.activations).index(gate)

    def slabs_reading(self, source: Source) -> tuple[int, ...]:
        """Returns the indices in ``z`` of the gates that read a source."""
        reads = dict(self.reads)
        return tuple(n for n, name in enumerate(self.activations) if source in reads.get(name, ("x", "h")))

    def states_by_name(self, c: Any) -> dict[str, Any]:
        """Returns the states of ``State.c`` by their names, in the order of ``state``: JAX sorts the keys of a dict."""
        names = tuple(self.initial_values)
        return {name: c[name] if len(names) > 1 else c for name in names}

    def pack_states(self, states: Mapping[str, Any]) -> Any:
        """Returns ``State.c``: None without states, the only one, or several by name."""
        return dict(states) if len(states) > 1 else next(iter(states.values()), None)


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


def gru_output(r: Array, u: Array, n_x: Array, n_h: Array, h: Array) -> Array:
    """Mixes h with a candidate that sees h through the reset gate r; with update gate u."""
    return u * h + (1 - u) * jnp.tanh(n_x + r * n_h)


def slstm_update(i: Array, f: Array, g: Array, c: Array, n: Array, m: Array) -> tuple[Array, Array, Array]:
    """Forgets by sigmoid(f) and adds by exp(i), both times exp(-m), which cancels in c / n and avoids overflow."""
    log_f = jax.nn.log_sigmoid(f) + m
    new_m = jnp.maximum(log_f, i)
    f, i = jnp.exp(log_f - new_m), jnp.exp(i - new_m)
    return f * c + i * g, f * n + i, new_m


def slstm_output(o: Array, c: Array, n: Array) -> Array:
    """Shows the weighted mean of the candidates through the output gate o."""
    return o * c / n


def minlstm_output(i: Array, f: Array, g: Array, h: Array) -> Array:
    """Mixes h with the candidate g in the ratio sigmoid(f) to sigmoid(i)."""
    f = sigmoid(jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i))
    return f * h + (1 - f) * g


def mingru_output(u: Array, g: Array, h: Array) -> Array:
    """Mixes h with the candidate g; with update gate u."""
    return (1 - u) * h + u * g


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

# Gated recurrent unit (Cho et al. 2014), its reset gate applied after the product with W_h.
GRU = Cell(
    gates={"r": sigmoid, "u": sigmoid, "n_x": None, "n_h": None},
    output=gru_output,
    reads={"n_x": ("x",), "n_h": ("h",)},
)
# Exponential gates with a normalizer n and a stabilizer m (Beck et al. 2024).
SLSTM = Cell(
    gates={"i": None, "f": None, "g": tanh, "o": sigmoid},
    state={"c": 0.0, "n": 0.0, "m": -math.inf},
    update=slstm_update,
    output=slstm_output,
    forget_gate="f",
    forget_bias="power_law",
    input_gate="i",
    candidate="g",
)
# Gates that read x alone (Feng et al. 2024).
MINLSTM = Cell(
    gates={"i": None, "f": None, "g": None},
    output=minlstm_output,
    reads={"i": ("x",), "f": ("x",), "g": ("x",)},
    affine=True,
    forget_gate="f",
    input_gate="i",
    candidate="g",
)
# The same for the GRU (Feng et al. 2024).
MINGRU = Cell(
    gates={"u": sigmoid, "g": None},
    output=mingru_output,
    reads={"u": ("x",), "g": ("x",)},
    affine=True,
    candidate="g",
)
# Rectified units, each of which reads its own h alone (Li et al. 2018).
INDRNN = Cell(gates={"y": relu}, output=rnn_output, recurrent="diagonal")
# Coupled gates with peepholes; each unit reads its own h alone (Danieli et al. 2025).
PARALSTM = replace(CIFG, recurrent="diagonal", peepholes=("f", "o"))
# The input gate reads static features alone (Kratzert et al. 2019).
EA = replace(LSTM, reads={"i": ("static",)})

# The keys of CELLS, and "rnn" with an activation of RNN.
CellName = Literal["lstm", "peephole", "cifg", "rnn", "gru", "slstm", "minlstm", "mingru", "indrnn", "paralstm", "ea"]
# The cells by name.
CELLS = {
    "lstm": LSTM,
    "peephole": PEEPHOLE,
    "cifg": CIFG,
    "gru": GRU,
    "slstm": SLSTM,
    "minlstm": MINLSTM,
    "mingru": MINGRU,
    "indrnn": INDRNN,
    "paralstm": PARALSTM,
    "ea": EA,
}
# The vanilla recurrent network (Elman 1990), with rectified units (Le, Jaitly & Hinton 2015) or logistic ones.
RNN = {
    "tanh": Cell(gates={"y": tanh}, output=rnn_output),
    "relu": Cell(gates={"y": relu}, output=rnn_output),
    "sigmoid": Cell(gates={"y": sigmoid}, output=rnn_output),
}
