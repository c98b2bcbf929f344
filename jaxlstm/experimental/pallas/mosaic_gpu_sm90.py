"""The recurrences of `jaxlstm.experimental.pallas.api` as kernels for Hopper GPUs, each a `mosaic_gpu_scan.scan`.

The blocks that share the weights form a cluster or, if the weights do not fit into one, a grid. Forward they send h, or
its tangent, and multiply by their rows of ``W_h``. Backward they send the cotangents of z, and multiply by their rows
of the transpose. The rest of a step is elementwise: the cell or its derivative, masks, restarts and regularizers.

Pallas's interpreter checked the numbers, with blocks that wait for one another. Clusters and grids were compiled to
machine code for an H100 on a host without a GPU. They have never run on a GPU. Their speed is unknown, and so is
whether the messages of a block are visible to the others after the barrier: the interpreter takes that for granted, and
it does not execute the semaphore of the grid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm.experimental.pallas import mosaic_gpu_cluster, mosaic_gpu_grid, mosaic_gpu_scan
from jaxlstm.experimental.pallas.step import (
    DifferentiableInputs,
    KernelConfig,
    StepMasks,
    Trajectory,
    apply_cell,
    matmul,
    pre_activations,
    restart,
    states_before_steps,
    without_matrices,
    zoneout_and_hold,
)
from jaxlstm.experimental.pallas.target import kernel_target
from jaxlstm.params import State, Weights


def configure(config: KernelConfig, weights: Weights, masks: StepMasks, batch_size: int) -> KernelConfig:
    """Chooses the blocks that share the weights, a cluster if they fit into one, and the batch rows of a group.

    Raises:
      ValueError: for another GPU, an unsupported option or dtype, or if the weights do not fit.
    """
    del masks
    _check_device()
    _check_options(config, weights)
    sizes = (config.cell.num_gates, weights.w_h.shape[-1], batch_size)
    rows = mosaic_gpu_cluster.rows_that_fit(*sizes)
    if rows is not None:
        return config._replace(weights_sharing="cluster", block_rows=rows)
    return config._replace(weights_sharing="grid", block_rows=mosaic_gpu_grid.rows_that_fit(*sizes))


def _check_device() -> None:
    if kernel_target.value is not None:
        return
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "none"))
    if not capability.startswith("9."):
        raise ValueError(
            "implementation='pallas' is a kernel for TPUs and Hopper GPUs, of compute capability 9.x; got a "
            f"{device.device_kind} of compute capability {capability}"
        )


def _check_options(config: KernelConfig, weights: Weights) -> None:
    if config.dtype != jnp.bfloat16 or config.accum_dtype != jnp.float32:
        raise ValueError(
            "implementation='pallas' needs dtype=bfloat16 and sums in float32 on a Hopper GPU, got products in "
            f"{config.dtype} and sums in {config.accum_dtype}; products in float32 would be rounded to TF32"
        )
    option = "layer normalization" if weights.norm is not None else "a projection" if weights.w_p is not None else None
    if option is not None:
        raise ValueError(f"implementation='pallas' does not support {option} on a Hopper GPU; 'fused' and 'scan' do")


def compute_outputs(config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks) -> tuple[State, Array]:
    """Returns the final state and the outputs ``(T, B, H)``."""
    if masks.restarts is None:  # the messages are the outputs
        state, sent, _ = _scan_steps(config, inputs, masks, lambda state: None)
        return state, sent[:, 0]
    state, _, outputs = _scan_steps(config, inputs, masks, lambda state: state.h.astype(config.dtype))
    return state, outputs


def compute_trajectory(config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks) -> Trajectory:
    """Returns the states of all steps."""
    return Trajectory(inputs.state, _scan_steps(config, inputs, masks, lambda state: state)[2])


def _scan_steps(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, output: Callable[[State], Any]
) -> tuple[State, Array, Any]:
    """Takes all steps; emits ``output(state)`` after each."""

    def body(resident: Any, z_h: Array, state: State, inputs_t: Any) -> tuple[State, Array, Any]:
        weights, restart_state = resident
        z_x, masks_t = inputs_t
        new_state = _transition(config, weights, z_x + z_h, masks_t, state)
        state = restart(masks_t.restarts, restart_state, new_state)
        return state, state.h[None], output(new_state)

    first, following = _restarts_after_steps(masks)
    state = restart(first, inputs.restart_state, inputs.state)
    resident = (without_matrices(inputs.weights), inputs.restart_state)
    scan, matrix = _scan(config), _forward_matrix(inputs.weights)
    return scan(body, matrix, state.h[None], resident, state, (inputs.z_x, following))


def solve_tangents(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, trajectory: Trajectory, rhs: Trajectory
) -> Trajectory:
    """Solves the tangent equation of `jaxlstm.experimental.pallas.api` for ``ds``, given its right-hand side."""
    states = states_before_steps(inputs, masks, trajectory)
    z = _all_pre_activations(config, inputs, states)

    def body(weights: Weights, d_z: Array, d_state: State, inputs_t: Any) -> tuple[State, Array, State]:
        z, c, masks_t, rhs_t = inputs_t
        # The step is linear in h itself, by zoneout and skipped steps: its tangent does not depend on the value of h.
        state = State(jnp.zeros_like(d_state.h), c)
        transition = partial(_transition, config, weights)
        d_new = jax.jvp(lambda z, state: transition(z, masks_t, state), (z, state), (d_z, d_state))[1]
        d_new = jax.tree.map(jnp.add, d_new, rhs_t)
        d_state = restart(masks_t.restarts, None, d_new)
        return d_state, d_state.h[None], d_new

    first, following = _restarts_after_steps(masks)
    d_state = restart(first, None, rhs.initial)
    over_time = (z, states.c, following, rhs.states)
    scan, matrix = _scan(config), _forward_matrix(inputs.weights)
    d_states = scan(body, matrix, d_state.h[None], without_matrices(inputs.weights), d_state, over_time)[2]
    return Trajectory(rhs.initial, d_states)


def solve_cotangents(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, trajectory: Trajectory, ct: Trajectory
) -> Trajectory:
    """Solves the transposed equation: accumulates the cotangents ``ct`` of the trajectory backward in time."""
    states = states_before_steps(inputs, masks, trajectory)
    z = _all_pre_activations(config, inputs, states)

    def body(weights: Weights, ct_h: Array, ct_old: State, inputs_t: Any) -> tuple[State, Array, State]:
        z, c, masks_t, ct_t = inputs_t
        ct_state = restart(masks_t.restarts, None, State(ct_old.h + ct_h[0], ct_old.c))
        ct_state = jax.tree.map(jnp.add, ct_state, ct_t)
        hold = partial(zoneout_and_hold, config, masks_t)  # linear in both states
        ct_new, ct_old = jax.linear_transpose(hold, ct_state, ct_state)(ct_state)
        cell = partial(apply_cell, config, masks_t.regularizer_masks, weights)
        ct_z, ct_c = jax.vjp(lambda z, c: cell(z, None, c), z, c)[1]((ct_new.c, ct_new.h))
        return State(ct_old.h, None if ct_c is None else ct_old.c + ct_c), ct_z, ct_state

    first, following = _restarts_after_steps(masks)
    zeros = jax.tree.map(jnp.zeros_like, ct.initial)
    over_time = (z, states.c, following, ct.states)
    scan, w_h = _scan(config, reverse=True), inputs.weights.w_h
    resident, messages = without_matrices(inputs.weights), jnp.zeros_like(z[0])
    ct_old, ct_z, ct_states = scan(body, w_h[None], messages, resident, zeros, over_time)
    products = [matmul(config, *pair) for pair in zip(ct_z[0], jnp.swapaxes(w_h, -1, -2))]
    ct_initial = restart(first, None, State(ct_old.h + jnp.stack(products).sum(0), ct_old.c))
    return Trajectory(jax.tree.map(jnp.add, ct_initial, ct.initial), ct_states)


def _transition(config: KernelConfig, weights: Weights, z: Array, masks: StepMasks, state: State) -> State:
    """Returns the state after a step, from its pre-activations."""
    c, h = apply_cell(config, masks.regularizer_masks, weights, z, None, state.c)
    return zoneout_and_hold(config, masks, State(h, c), state)


def _all_pre_activations(config: KernelConfig, inputs: DifferentiableInputs, states: State) -> Array:
    """Returns ``z (T, G, B, H)`` of all steps, from the states before them."""
    return jax.vmap(lambda z_x, h: pre_activations(config, inputs.weights, z_x, h)[0])(inputs.z_x, states.h)


def _forward_matrix(weights: Weights) -> Array:
    """Returns ``W_h`` as the matrix ``(G, 1, H, H)`` of `mosaic_gpu_scan.scan`."""
    return jnp.swapaxes(weights.w_h, -1, -2)[:, None]


def _restarts_after_steps(masks: StepMasks) -> tuple[Array | None, StepMasks]:
    """Returns the restarts before the first step, ``(B, 1)``, and masks whose restarts come after each step.

    A kernel restarts the state at the end of a step, because the messages carry the restarted h.
    """
    if masks.restarts is None:
        return None, masks
    after = jnp.concatenate([masks.restarts[1:], jnp.zeros_like(masks.restarts[:1])])
    return masks.restarts[0], masks._replace(restarts=after)


def _scan(config: KernelConfig, *, reverse: bool = False) -> Callable[..., tuple[Any, Array, Any]]:
    """Returns `mosaic_gpu_scan.scan` on the blocks that share the weights."""
    if config.weights_sharing == "cluster":
        kernel_spec, program_type = mosaic_gpu_cluster.kernel_spec, mosaic_gpu_scan.BlockProgram
    else:
        kernel_spec, program_type = mosaic_gpu_grid.kernel_spec, mosaic_gpu_grid.GridBlockProgram
    return partial(mosaic_gpu_scan.scan, partial(kernel_spec, rows=config.block_rows, reverse=reverse), program_type)
