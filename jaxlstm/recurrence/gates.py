"""The gates of a cell: the activations of all slabs by one tanh, and the cell's two functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxlstm import cells
from jaxlstm.cells import Activation, Cell, argument_names

Activate = Callable[[Array, str], list[Array]]

KINDS: dict[Activation | None, str] = {cells.sigmoid: "s", jax.nn.sigmoid: "s", cells.tanh: "t", jnp.tanh: "t"}


def activation_kinds(cell: Cell) -> str | None:
    """Returns ``s`` for sigmoid or ``t`` for tanh for each gate, if the cell has no other activations; else None."""
    activations = cell.activations.values()
    return "".join(KINDS[a] for a in activations) if set(activations) <= set(KINDS) else None


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


def scale_candidate(cell: Cell, name: str, gate: Array, candidate_scale: Array | None) -> Array:
    """Returns a gate, scaled if it is the candidate and recurrent dropout has a scale."""
    return gate if candidate_scale is None or name != cell.candidate else gate * candidate_scale


def evaluate_cell(
    cell: Cell,
    z: Float[Array, "G *units"] | tuple[Float[Array, "*units"], ...],
    c: Any,
    peepholes: Float[Array, "K *w_units"] | None = None,
    candidate_scale: Array | None = None,
    normalize: Callable[[Array], Array] | None = None,
    activate: Activate = activate,
    h: Float[Array, "*units"] | None = None,
) -> tuple[Any, Array]:
    """Returns the new states and the output of a step; elementwise over units.

    Args:
      cell: the cell.
      z: pre-activations, one array or one for each gate; every slab has the shape of a state.
      c: the states, as in `jaxlstm.params.State`.
      peepholes: one array per gate of ``cell.peepholes``, which broadcasts to the shape of ``c``.
      candidate_scale: factor of the candidate, for recurrent dropout.
      normalize: function of the cell state on its way to the output, for layer normalization.
      activate: the function of this name above, or one that is equal to it.
      h: the output of the step before; None if the cell does not read it.
    """
    weights = {} if peepholes is None else dict(zip(cell.peepholes, jnp.unstack(peepholes)))
    kinds = None  # each gate is activated by itself
    if isinstance(z, tuple):
        slabs = dict(zip(cell.activations, z))
    else:
        kinds = activation_kinds(cell) if cell.num_gates > 1 and not weights else None
        slabs = dict(zip(cell.activations, jnp.unstack(z) if kinds is None else activate(z, kinds)))
    gates: dict[str, Array] = {}

    def gate(name: str, states: dict[str, Array]) -> Array:
        """Returns a gate, which reads the cell state through its peephole when it is first needed."""
        if name not in gates:
            slab = slabs[name]
            if name in weights:
                (c,) = states.values()
                slab = slab + weights[name] * c
            activation = cell.activations[name] if kinds is None else None
            slab = slab if activation is None else activation(slab)
            gates[name] = scale_candidate(cell, name, slab, candidate_scale)
        return gates[name]

    def call(function: Callable[..., Any], readable: dict[str, Array], states: dict[str, Array]) -> Any:
        known = readable | {"h": h}
        return function(**{n: known[n] if n in known else gate(n, states) for n in argument_names(function)})

    states = cell.states_by_name(c)
    if cell.update is not None:
        new = call(cell.update, states, states)
        states = dict(zip(states, new if len(states) > 1 else (new,)))
    shown = states if normalize is None else {name: normalize(state) for name, state in states.items()}
    return cell.pack_states(states), call(cell.output, shown, states)
