"""One step of the recurrence inside a kernel, and the types of everything that kernels read.

Arrays are batch-major, ``(B, H)``. Masks have a trailing axis of size 1, ``(B, 1)``: Mosaic broadcasts it over the
units. These functions use only operations that Pallas can lower.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import State, Weights
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.step import apply_gates, split_gates


class KernelConfig(NamedTuple):
    """Compile-time configuration of the kernels of one direction."""

    cell: Cell
    rates: RegularizerRates
    dtype: jnp.dtype  # of the operands of matrix products, and of outputs
    accum_dtype: jnp.dtype  # of sums and of the state
    block_rows: int = 0  # batch rows per block; on a GPU, per group of blocks that share the weights
    block_steps: int = 1  # steps per iteration of a TPU kernel's grid
    weights_sharing: Literal["cluster", "grid"] | None = None  # GPU blocks that share the weights; None on a TPU


class DifferentiableInputs(NamedTuple):
    """Inputs of a kernel that derivatives are taken with respect to."""

    weights: Weights  # from `to_kernel_layout`
    z_x: Array  # (T, G, B, H): W_x x + b; with layer normalization W_x x
    state: State  # (B, .), the initial state
    restart_state: State | None  # (1, .); zeros if None


class StepMasks(NamedTuple):
    """Masks that a kernel reads at each step."""

    step_mask: Array | None  # (T, B, 1) bool: steps where it is False are skipped
    restarts: Array | None  # (T, B, 1) bool: the state is `restart_state` before steps where it is True
    regularizer_masks: RegularizerMasks  # (T, B, .)


class Trajectory(NamedTuple):
    """The state before the first step and after every step."""

    initial: State  # (B, .)
    states: State  # (T, B, .)


def to_kernel_layout(cell: Cell, weights: Weights) -> Weights:
    """Splits the gates of the weights, transposes the matrices, and drops the weights that kernels do not read.

    Returns:
      weights with ``w_h (G, P, H)``, ``w_p (H, P)``, bias and gains ``(G, H)``, no ``w_x``, and the bias only with
      layer normalization.
    """
    transpose = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    split = partial(split_gates, num_gates=cell.num_gates, axis=0)
    norm, b, w_p = weights.norm, weights.b, weights.w_p
    return weights._replace(
        w_x=None,
        w_h=transpose(split(weights.w_h)),
        b=None if norm is None or b is None else split(b),
        w_p=None if w_p is None else transpose(w_p),
        norm=None
        if norm is None
        else jax.tree.map(split, norm._replace(c=None, b_c=None))._replace(c=norm.c, b_c=norm.b_c),
    )


def without_matrices(weights: Weights) -> Weights:
    """Returns the weights of the elementwise part of a step."""
    return weights._replace(w_h=None, w_p=None)


def cast_matrices(config: KernelConfig, weights: Weights) -> Weights:
    """Casts the matrices to the dtype of matrix products."""
    w_h, w_p = jax.tree.map(lambda a: a.astype(config.dtype), (weights.w_h, weights.w_p))
    return weights._replace(w_h=w_h, w_p=w_p)


def matmul(config: KernelConfig, x: Array, w: Array) -> Array:
    """Returns ``x W`` from operands in ``dtype``, with sums in ``accum_dtype``."""
    # Not `jaxlstm.primitives.mixed_precision_dot`: Pallas does not lower its primitive.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    operands = (x.astype(config.dtype), w.astype(config.dtype))
    return lax.dot_general(*operands, contract, preferred_element_type=config.accum_dtype)


def pre_activations(config: KernelConfig, weights: Weights, z_x: Array, h: Array) -> tuple[Array, Array | None]:
    """Returns the arguments ``(z, z_h)`` of `jaxlstm.recurrence.step.apply_gates`."""
    z_h = jnp.stack([matmul(config, h, w_h) for w_h in jnp.unstack(weights.w_h)])
    return (z_x + z_h, None) if weights.norm is None else (z_x, z_h)


def apply_cell(
    config: KernelConfig, masks: RegularizerMasks, weights: Weights, z: Array, z_h: Array | None, c: Array | None
) -> tuple[Array | None, Array]:
    """Computes the elementwise part of a step; see `jaxlstm.recurrence.step.apply_gates`."""
    return apply_gates(config.cell, weights, z, z_h, c, masks.candidate_mask, config.rates, axis=1)


def zoneout_and_hold(config: KernelConfig, masks: StepMasks, new: State, old: State) -> State:
    """Returns ``new`` with zoneout, or ``old`` in the rows where the step is skipped."""
    new = apply_zoneout(config.rates, masks.regularizer_masks, new, old)
    return masking.hold_skipped(masks.step_mask, new, old)


def restart(mask: Array | None, restart_state: State | None, state: State) -> State:
    """Returns ``state (..., B, .)`` with the rows in ``mask (..., B, 1)`` set to ``restart_state (1, .)`` or to zeros.

    The zeros are arrays: the scalar of `jaxlstm.recurrence.masking.restart` is a 64-bit constant under
    ``jax_enable_x64``, and kernels have no 64-bit numbers.
    """
    if restart_state is None:
        restart_state = jax.tree.map(jnp.zeros_like, state)
    return masking.restart(mask, restart_state, state)


def kernel_step(config: KernelConfig, weights: Weights, z_x: Array, masks: StepMasks, state: State) -> State:
    """Takes one step, from the state after a possible restart to the new state."""
    z, z_h = pre_activations(config, weights, z_x, state.h)
    c, cell_output = apply_cell(config, masks.regularizer_masks, weights, z, z_h, state.c)
    h = cell_output if weights.w_p is None else matmul(config, cell_output, weights.w_p)
    return zoneout_and_hold(config, masks, State(h, c), state)


def states_before_steps(inputs: DifferentiableInputs, masks: StepMasks, trajectory: Trajectory) -> State:
    """Returns the state that each step starts from, ``(T, B, .)``, after a possible restart."""
    return restart(masks.restarts, inputs.restart_state, masking.shift_state(*trajectory))
