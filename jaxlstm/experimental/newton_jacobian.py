"""One step of the recurrence at all times at once, and its Jacobian, for `jaxlstm.experimental.newton`.

The linear recurrence ``d_t = b_t + J_t d_{t-1}`` is solved by a parallel scan, which multiplies Jacobians of
neighboring steps. A `JacobianMode` stores and multiplies them: as full matrices, or as one small block per hidden unit.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import State, Weights
from jaxlstm.recurrence.masking import hold_skipped, restart
from jaxlstm.recurrence.step import apply_gates, project_hidden, recurrent_step, split_gates

ModeName = Literal["full", "diagonal"]


class StepConfig(NamedTuple):
    """Static options of a step."""

    cell: Cell
    rates: RegularizerRates
    dtype: jnp.dtype  # of the operands of matrix products


class StepParams(NamedTuple):
    """Arrays that all steps of one direction share."""

    weights: Weights
    restart_state: State | None  # h (P,) and c (H,); zeros if None


class StepInputs(NamedTuple):
    """Arrays that steps read besides the parameters and the state."""

    z_x: Array  # (T, B, G*H), the projected inputs
    step_mask: Array | None  # (T, B) bool: False at skipped steps
    restarts: Array | None  # (T, B) bool: True at steps that begin from `restart_state`
    masks: RegularizerMasks  # (T, B, .)


def step_all(config: StepConfig, params: StepParams, inputs: StepInputs, state: State) -> State:
    """Takes every step at once, each from its own previous state; all states are ``(T, B, .)``."""
    state = restart(inputs.restarts, params.restart_state, state)
    new_state = recurrent_step(config.cell, params.weights, inputs.z_x, state, config.dtype, config.rates, inputs.masks)
    return hold_skipped(inputs.step_mask, new_state, state)


class JacobianMode(NamedTuple):
    """A representation of the Jacobians ``J_t = ds_t / ds_{t-1}`` of all steps, exact or approximate.

    ``pack`` turns states ``(T, B, .)`` into the vectors that the Jacobians multiply, ``unpack`` turns vectors back into
    states like a given one.
    """

    check: Callable[[Weights], None]  # raises a ValueError for a layer that the mode cannot represent
    jacobian: Callable[[StepConfig, StepParams, StepInputs, State], Array]  # the state is the previous one
    pack: Callable[[State], Array]
    unpack: Callable[[Array, State], State]
    compose: Callable[[Array, Array], Array]  # products of two Jacobians
    matvec: Callable[[Array, Array], Array]  # products of a Jacobian and a vector
    transpose: Callable[[Array], Array]


# Full Jacobians: matrices (T, B, S, S); S is the size of the whole state, P + H


def _accept_all(weights: Weights) -> None:
    """Accepts every layer."""


def _full_jacobian(config: StepConfig, params: StepParams, inputs: StepInputs, state: State) -> Float[Array, "T B S S"]:
    """Computes the Jacobian of every step column by column, by `jax.jvp`."""
    size = sum(a.shape[-1] for a in jax.tree.leaves(state))

    def column(unit: Float[Array, " S"]) -> Float[Array, "T B S"]:
        tangent = _split_vector(jnp.broadcast_to(unit, (*state.h.shape[:2], size)), state)
        return _concat_state(jax.jvp(partial(step_all, config, params, inputs), (state,), (tangent,))[1])

    return jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=state.h.dtype))


def _concat_state(state: State) -> Float[Array, "T B S"]:
    return jnp.concatenate(jax.tree.leaves(state), axis=-1)


def _split_vector(vector: Float[Array, "T B S"], like: State) -> State:
    h, c = jnp.split(vector, [like.h.shape[-1]], axis=-1)
    return State(h, None if like.c is None else c)


def _matmul(a: Float[Array, "T B S S"], b: Float[Array, "T B S S"]) -> Float[Array, "T B S S"]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _matrix_vector(a: Float[Array, "T B S S"], x: Float[Array, "T B S"]) -> Float[Array, "T B S"]:
    return jnp.matmul(a, x[..., None], precision=lax.Precision.HIGHEST)[..., 0]


# Diagonal mode: blocks (T, K, K, B, H), one per hidden unit; K is 2 for h and c, or 1 without a cell state


def _check_blocks(weights: Weights) -> None:
    """Raises an error if h of a unit depends on c of other units, so that there is no block per unit."""
    for name, present in (("a projection", weights.w_p), ("layer normalization", weights.norm)):
        if present is not None:
            raise ValueError(f"Newton(mode='diagonal') does not support {name}; use mode='full'")


def _unit_jacobian(
    config: StepConfig, params: StepParams, inputs: StepInputs, state: State
) -> Float[Array, "T K K B H"]:
    """Computes the Jacobian of each unit's new state by its own state, with the other units constant."""
    cell, weights = config.cell, params.weights
    accum_dtype = state.h.dtype
    h = restart(inputs.restarts, params.restart_state, state).h
    hidden_size = h.shape[-1]
    z = split_gates(inputs.z_x + project_hidden(weights.w_h, h, config.dtype, accum_dtype), cell.num_gates, -1)
    w_h = weights.w_h.reshape(cell.num_gates, hidden_size, -1).astype(accum_dtype)
    w_unit = w_h[..., 0] if w_h.shape[2] == 1 else jnp.diagonal(w_h, axis1=1, axis2=2)  # from a unit to itself
    w_self = jnp.broadcast_to(w_unit[:, None, None], z.shape)

    def step_units(state: State) -> State:
        state = restart(inputs.restarts, params.restart_state, state)
        z_unit = z + w_self * jnp.broadcast_to(state.h - h, z.shape[1:])[None]
        mask = inputs.masks.candidate_mask
        c, cell_output = apply_gates(cell, weights, z_unit, None, state.c, mask, config.rates, axis=2)
        new_state = apply_zoneout(config.rates, inputs.masks, State(cell_output, c), state)
        return hold_skipped(inputs.step_mask, new_state, state)

    leaves, tree = jax.tree.flatten(state)
    columns = []
    for k in range(len(leaves)):
        tangent = tree.unflatten([jnp.full_like(a, n == k) for n, a in enumerate(leaves)])
        columns.append(_stack_state(jax.jvp(step_units, (state,), (tangent,))[1]))
    return jnp.stack(columns, axis=2)


def _stack_state(state: State) -> Float[Array, "T K B H"]:
    return jnp.stack(jax.tree.leaves(state), axis=1)


def _unstack_vector(vector: Float[Array, "T K B H"], like: State) -> State:
    return jax.tree.structure(like).unflatten(jnp.unstack(vector, axis=1))


def _compose_blocks(a: Float[Array, "T K K B H"], b: Float[Array, "T K K B H"]) -> Float[Array, "T K K B H"]:
    products = [a[:, :, k, None] * b[:, None, k] for k in range(a.shape[2])]
    return sum(products[1:], products[0])


def _block_vector(a: Float[Array, "T K K B H"], x: Float[Array, "T K B H"]) -> Float[Array, "T K B H"]:
    products = [a[:, :, k] * x[:, k, None] for k in range(a.shape[2])]
    return sum(products[1:], products[0])


MODES: dict[ModeName, JacobianMode] = {
    "full": JacobianMode(
        check=_accept_all,
        jacobian=_full_jacobian,
        pack=_concat_state,
        unpack=_split_vector,
        compose=_matmul,
        matvec=_matrix_vector,
        transpose=lambda jacobians: jnp.swapaxes(jacobians, 2, 3),
    ),
    "diagonal": JacobianMode(
        check=_check_blocks,
        jacobian=_unit_jacobian,
        pack=_stack_state,
        unpack=_unstack_vector,
        compose=_compose_blocks,
        matvec=_block_vector,
        transpose=lambda jacobians: jnp.swapaxes(jacobians, 1, 2),
    ),
}


def solve_linear_recurrence(mode: JacobianMode, jacobians: Array, b: State) -> State:
    """Solves ``d_t = b_t + J_t d_{t-1}`` with ``d_{-1} = 0`` by a parallel scan over time."""

    def compose_affine(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (j1, b1), (j2, b2) = first, second
        return mode.compose(j2, j1), mode.matvec(j2, b1) + b2

    _, d = lax.associative_scan(compose_affine, (jacobians, mode.pack(b)))
    return mode.unpack(d, b)
