r"""The Jacobian of a cell, so that most of it is computed for a whole chunk of steps at once.

Given dz_t, one step of the tangents is a few products and sums per unit; for the LSTM::

    dc_t = g_t i'_t dz_i + c_{t-1} f'_t dz_f + i_t g'_t dz_g + f_t dc_{t-1}
    dh_t = tanh(c_t) o'_t dz_o + o_t (1 - tanh(c_t)^2) dc_t

where i' is the derivative of i with respect to z_i. The factors of the tangents do not depend on the tangents:
`gate_jacobian` computes them for many steps at once. `apply_jacobian` is the remaining step, a linear function that JAX
transposes. Cells for which `has_jacobian` is False are differentiated by `jax.jvp` in each step, which does more work
there.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.cells import Cell, argument_names
from jaxlstm.recurrence import cpu_activations
from jaxlstm.recurrence.gates import (
    activation_kinds,
    activation_scales,
    activation_slope,
    scale_candidate,
    sigmoid_or_tanh,
)
from jaxlstm.recurrence.step import split_gates


class GateJacobian(NamedTuple):
    """The factors of the tangents at one step or many. The shapes are written for feature-major arrays.

    Without a cell state there are no factors of c; without functions that take the old h there are none of it.
    """

    z: Any  # (*T, G*H, B), or (*T, H, B) for each gate: derivative of c with respect to the gates of `update`, of h
    # with respect to the others
    c: Array | None  # (*T, H, B): derivative of c with respect to the previous c
    h: Array | None  # (*T, H, B): derivative of h with respect to c
    old_h: Array | None  # (*T, H, B): derivative of h with respect to the previous h


def has_jacobian(cell: Cell) -> bool:
    """Returns whether `gate_jacobian` supports the cell.

    There are no peepholes and at most one state besides h, which both functions take. Each gate is read by one of the
    two functions, and the old h by ``output`` alone.
    """
    output = set(argument_names(cell.output))
    if cell.peepholes or len(cell.initial_values) > 1:
        return False
    if cell.update is None:
        return True
    update = set(argument_names(cell.update))
    return "h" not in update and update & output == set(cell.initial_values)


def gate_jacobian(
    cell: Cell,
    z: Float[Array, "T _ _"] | tuple[Float[Array, "T _ _"], ...],
    c: Float[Array, "T _ _"] | None,
    h: Float[Array, "T _ _"] | None,
    candidate_scale: Array | None,
    axis: int,
) -> GateJacobian:
    """Computes the Jacobian at many steps.

    Args:
      cell: a cell with `has_jacobian`.
      z: pre-activations, ``(T, G*H, B)`` or ``(T, B, G*H)``, or an array for each gate.
      c: the cell state before each step, ``(T, H, B)`` or ``(T, B, H)``; None without one.
      h: the output before each step, of the shape of ``c``; None if the cell does not read it.
      candidate_scale: the factor of the candidate in recurrent dropout, of the shape of ``c``; None for none.
      axis: the axis of the units in the arrays of one step.
    """
    if isinstance(z, tuple):
        gates, slopes = _activate_each(cell, z)
        slope = None
    else:
        activated, slope = _activate(cell, split_gates(z, cell.num_gates, axis + 1))
        gates, slopes = jnp.unstack(activated), ()
    values = zip(cell.activations, gates)
    values = {name: scale_candidate(cell, name, gate, candidate_scale) for name, gate in values}
    values |= cell.states_by_name(c) | ({} if h is None else {"h": h})
    by_gate: dict[str, Array] = {}
    dc_dc = dh_dc = None
    if cell.update is None:
        to_h = _differentiate(cell.output, values)[1]
    else:
        (state,) = cell.initial_values
        values[state], by_gate = _differentiate(cell.update, values)
        to_h = _differentiate(cell.output, values)[1]
        dc_dc, dh_dc = by_gate.pop(state), to_h.pop(state)
    dh_dh = to_h.pop("h", None)
    by_gate |= to_h
    factors = [scale_candidate(cell, name, by_gate[name], candidate_scale) for name in cell.activations]
    if isinstance(z, tuple) or slope is None:
        return GateJacobian(tuple(a * b for a, b in zip(slopes, factors)), dc_dc, dh_dc, dh_dh)
    stacked = jnp.stack(factors, axis + 1)
    dz = jnp.moveaxis(slope, 0, axis + 1) * stacked
    return GateJacobian(dz.reshape(z.shape), dc_dc, dh_dc, dh_dh)


def _activate(cell: Cell, slabs: Float[Array, "G *units"]) -> tuple[Array, Array]:
    """Returns the gates and the derivatives of their activations."""
    kinds = activation_kinds(cell)
    if kinds is None:
        activated, slope = _activate_each(cell, tuple(jnp.unstack(slabs)))
        return jnp.stack(activated), jnp.stack(slope)
    activated = sigmoid_or_tanh(slabs, kinds)
    return activated, activation_slope(activated, activation_scales(slabs, kinds))


def _activate_each(cell: Cell, slabs: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Returns the gates and the derivatives of their activations, an array for each gate."""
    activated, slope = [], []
    for activation, z in zip(cell.activations.values(), slabs):
        one = jnp.ones_like(z)
        gate, derivative = (z, one) if activation is None else jax.jvp(activation, (z,), (one,))
        activated.append(gate)
        slope.append(derivative)
    return tuple(activated), tuple(slope)


def _differentiate(function: Callable[..., Array], values: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Returns the value of an elementwise function and its derivative with respect to each argument."""
    arguments = {name: values[name] for name in argument_names(function)}
    derivatives = {
        name: jax.jvp(lambda a, name=name: function(**arguments | {name: a}), (a,), (jnp.ones_like(a),))[1]
        for name, a in arguments.items()
    }
    return function(**arguments), derivatives


def apply_jacobian(
    cell: Cell,
    jacobian: GateJacobian,
    dz: Float[Array, "_ _"] | tuple[Float[Array, "_ _"], ...],
    dc: Float[Array, "_ _"] | None,
    dh: Float[Array, "_ _"] | None,
    axis: int,
) -> tuple[Array | None, Array]:
    """Returns the tangents of ``(c, h)`` after a step.

    Args:
      cell: the cell.
      jacobian: the Jacobian at this step.
      dz: tangent of the pre-activations, ``(G*H, B)`` or ``(B, G*H)``, or an array for each gate.
      dc: tangent of the cell state before the step, ``(H, B)`` or ``(B, H)``; None without one.
      dh: tangent of the output before the step, for a cell that reads it; else None.
      axis: the axis of the units.
    """
    if isinstance(dz, tuple):
        products = [a * b for a, b in zip(jacobian.z, dz)]
    else:
        products = _unstack_gates(jacobian.z * dz, cell.num_gates, axis)
    slabs = dict(zip(cell.activations, products))
    to_h = [slabs.pop(name) for name in argument_names(cell.output) if name in slabs]
    if jacobian.old_h is not None and dh is not None:
        to_h.append(jacobian.old_h * dh)
    if jacobian.c is None or jacobian.h is None or dc is None:
        return None, sum(to_h[1:], to_h[0])
    dc = sum(slabs.values(), jacobian.c * dc)
    return dc, sum(to_h, jacobian.h * dc)


def _unstack_gates(dz: Array, num_gates: int, axis: int) -> list[Array]:
    """Returns the slabs of ``dz``, by the operation whose transpose is faster on a CPU.

    Feature-major that is a sum of selections, which XLA runs on all threads (`jaxlstm.recurrence.cpu_activations`).
    Batch-major it is one concatenation.
    """
    if axis == 1:
        return list(lax.split(dz, [dz.shape[1] // num_gates] * num_gates, axis=1))
    return cpu_activations.unstack_by_selection(split_gates(dz, num_gates, axis))
