r"""The Jacobian of the LSTM's gates, written by hand so that most of it is computed for a whole chunk of steps at once.

Given dz_t, one step of the tangents is a few products and sums per unit::

    dc_t = g_t i'_t dz_i + c_{t-1} f'_t dz_f + i_t g'_t dz_g + f_t dc_{t-1}
    dh_t = tanh(c_t) o'_t dz_o + o_t (1 - tanh(c_t)^2) dc_t

where i' is the derivative of i with respect to z_i. The factors of the tangents do not depend on the tangents:
`gate_jacobian` computes them for many steps at once. `apply_jacobian` is the remaining step, a linear function that JAX
transposes. A cell with coupled gates has 1 - f in place of i. Other cells are differentiated by `jax.jvp` in each step,
which does more work there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm import cells
from jaxlstm.cells import Gates
from jaxlstm.recurrence import cpu_activations
from jaxlstm.recurrence.step import split_gates


class GateJacobian(NamedTuple):
    """The factors of the tangents at one step or many. The shapes are written for feature-major arrays."""

    z: Array  # (*T, G*H, B): derivative of h with respect to the last slab of z, of c with respect to the others
    c: Array  # (*T, H, B): derivative of c with respect to the previous c
    h: Array  # (*T, H, B): derivative of h with respect to c


# Derivatives of the new c with respect to each gate but the last and with respect to c, and the new c.
CellStateDerivatives = tuple[list[Array], Array, Array]


def _lstm(i: Array, f: Array, g: Array, o: Array, c: Array, candidate_scale: Array | float) -> CellStateDerivatives:
    """Differentiates ``f c + i g``."""
    return [g * candidate_scale, c, i * candidate_scale], f, f * c + i * (g * candidate_scale)


def _coupled(f: Array, g: Array, o: Array, c: Array, candidate_scale: Array | float) -> CellStateDerivatives:
    """Differentiates ``f c + (1 - f) g``."""
    return [c - g * candidate_scale, (1 - f) * candidate_scale], f, f * c + (1 - f) * (g * candidate_scale)


# Activations of the slabs and derivatives of c. Both cells have h = o tanh(c), with o the last gate.
SUPPORTED: dict[Gates, tuple[str, Callable[..., CellStateDerivatives]]] = {
    cells.lstm: ("ssts", _lstm),
    cells.coupled: ("sts", _coupled),
}


def gate_jacobian(
    gates: Gates, z: Float[Array, "T _ _"], c: Float[Array, "T _ _"], candidate_scale: Array | float, axis: int
) -> GateJacobian:
    """Computes the Jacobian at many steps.

    Args:
      gates: one of `SUPPORTED`.
      z: pre-activations, ``(T, G*H, B)`` or ``(T, B, G*H)``.
      c: the cell state before each step, ``(T, H, B)`` or ``(T, B, H)``.
      candidate_scale: the factor of the candidate in recurrent dropout, of the shape of ``c``, or 1.
      axis: the axis of the units in the arrays of one step.
    """
    kinds, differentiate = SUPPORTED[gates]
    slabs = split_gates(z, len(kinds), axis + 1)
    scale, activated = cells.activation_scales(slabs, kinds), cells.sigmoid_or_tanh(slabs, kinds)
    slope = cells.activation_slope(activated, scale)
    *_, o = activations = jnp.unstack(activated)
    dc_dgates, dc_dc, c = differentiate(*activations, c, candidate_scale)
    tanh = jnp.tanh(c)
    dz = jnp.moveaxis(slope, 0, axis + 1) * jnp.stack([*dc_dgates, tanh], axis + 1)
    return GateJacobian(dz.reshape(z.shape), dc_dc, o * (1 - tanh**2))


def apply_jacobian(
    jacobian: GateJacobian, dz: Float[Array, "_ _"], dc: Float[Array, "_ _"], axis: int
) -> tuple[Array, Array]:
    """Returns the tangents of ``(c, h)`` after a step.

    Args:
      jacobian: the Jacobian at this step.
      dz: tangent of the pre-activations, ``(G*H, B)`` or ``(B, G*H)``.
      dc: tangent of the cell state before the step, ``(H, B)`` or ``(B, H)``.
      axis: the axis of the units.
    """
    *to_c, to_h = _unstack_gates(jacobian.z * dz, dz.shape[axis] // dc.shape[axis], axis)
    dc = sum(to_c, jacobian.c * dc)
    return dc, to_h + jacobian.h * dc


def _unstack_gates(dz: Array, num_gates: int, axis: int) -> list[Array]:
    """Returns the slabs of ``dz``, by the operation whose transpose is faster on a CPU.

    Feature-major that is a sum of selections, which XLA runs on all threads (`jaxlstm.recurrence.cpu_activations`).
    Batch-major it is one concatenation.
    """
    if axis == 1:
        return list(lax.split(dz, [dz.shape[1] // num_gates] * num_gates, axis=1))
    return cpu_activations.unstack_by_selection(split_gates(dz, num_gates, axis))
