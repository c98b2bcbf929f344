"""The recurrences of `jaxlstm.experimental.pallas.api` as kernels for TPUs, each a `mosaic_tpu_scan.scan`.

Checked in interpret mode and compiled for a v5e on a host without a TPU; never run on a TPU.
"""

import bisect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm.experimental.pallas import mosaic_tpu_scan, target
from jaxlstm.experimental.pallas.step import (
    DifferentiableInputs,
    KernelConfig,
    StepMasks,
    Trajectory,
    apply_cell,
    cast_matrices,
    kernel_step,
    matmul,
    pre_activations,
    restart,
    states_before_steps,
    without_matrices,
    zoneout_and_hold,
)
from jaxlstm.params import State, Weights

MAX_BLOCK_ROWS, MIN_BLOCK_ROWS = 128, 32  # of the batch


def configure(config: KernelConfig, weights: Weights, masks: StepMasks, batch_size: int) -> KernelConfig:
    """Chooses the largest number of batch rows per block with which every kernel fits into VMEM.

    Raises:
      ValueError: without a TPU, for a dtype that TPUs do not have, or if no number of rows fits.
    """
    info = target.tpu_info()
    rows = even_block_rows(batch_size, MAX_BLOCK_ROWS)
    if info is None:
        return config._replace(block_rows=rows)
    if config.accum_dtype != jnp.float32 or config.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"implementation='pallas' needs float32 or bfloat16 on a TPU, got products in {config.dtype} and sums in "
            f"{config.accum_dtype}"
        )
    gates, outputs, units = weights.w_h.shape
    # The rest is for what the compiler adds: on a v5e, 6.5 MiB at 2688 units of float32.
    limit = info.vmem_capacity_bytes * 15 // 16

    def footprint(units: int, rows: int) -> int:
        return _largest_footprint(config, weights, masks, units, rows)

    while rows > MIN_BLOCK_ROWS and footprint(units, rows) > limit:
        rows = even_block_rows(batch_size, max(MIN_BLOCK_ROWS, rows // 2))
    if footprint(units, rows) <= limit:
        return config._replace(block_rows=rows)
    largest = bisect.bisect_left(range(1, units), True, key=lambda n: footprint(n, rows) > limit)
    mib = 2**20
    raise ValueError(
        f"implementation='pallas' keeps the recurrent weights in VMEM: {gates} x {outputs} x {units} in "
        f"{config.dtype.name} take {gates * outputs * units * config.dtype.itemsize / mib:.1f} MiB, with blocks of "
        f"{rows} sequences {footprint(units, rows) / mib:.1f} MiB, and a {info.chip_version} has {limit / mib:.1f} MiB "
        f"for them; hidden_size fits up to {largest}"
    )


def even_block_rows(batch_size: int, max_rows: int) -> int:
    """Returns the rows per block if a batch is split evenly into the fewest blocks of at most about ``max_rows``."""
    num_blocks = max(1, -(-batch_size // max_rows))
    return batch_size if num_blocks == 1 else -(-batch_size // num_blocks // 16) * 16


def _largest_footprint(config: KernelConfig, weights: Weights, masks: StepMasks, units: int, rows: int) -> int:
    """Returns the bytes of VMEM of the largest kernel of a layer like this one with ``units``."""

    def array(*shape: int, dtype: Any = config.accum_dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    gates, outputs, _ = weights.w_h.shape
    outputs = units if weights.w_p is None else outputs
    resident = [array(gates, outputs, units, dtype=config.dtype)]
    if weights.w_p is not None:
        resident.append(array(units, outputs, dtype=config.dtype))
    has_c = config.cell.has_cell_state
    state = State(array(1, outputs), array(1, units) if has_c else None)
    state_t = State(array(1, 1, outputs), array(1, 1, units) if has_c else None)
    z = [array(1, gates, 1, units)] * (1 if weights.norm is None else 2)
    regularizer_masks = jax.tree.map(lambda a: array(1, 1, units), masks.regularizer_masks)
    # Of the states: before the steps, the right-hand side and the result.
    over_time = (z, masks.step_mask, masks.restarts, regularizer_masks, [state_t] * 3)
    block = mosaic_tpu_scan.BlockSizes(rows, config.block_steps, reverse=False)
    return mosaic_tpu_scan.footprint(block, resident, state, over_time)


def compute_outputs(config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks) -> tuple[State, Array]:
    """Returns the final state and the outputs ``(T, B, P)``."""
    return _scan_steps(config, inputs, masks, lambda state: state.h.astype(config.dtype))


def compute_trajectory(config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks) -> Trajectory:
    """Returns the states of all steps."""
    return Trajectory(inputs.state, _scan_steps(config, inputs, masks, lambda state: state)[1])


def _scan_steps(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, output: Callable[[State], Any]
) -> tuple[State, Any]:
    """Takes all steps; emits ``output(state)`` after each."""

    def body(resident: Any, state: State, inputs_t: Any) -> tuple[State, Any]:
        weights, restart_state = resident
        z_x, masks_t = inputs_t
        state = restart(masks_t.restarts, restart_state, state)
        state = kernel_step(config, weights, z_x, masks_t, state)
        return state, output(state)

    resident = (cast_matrices(config, inputs.weights), inputs.restart_state)
    return _scan(config, body, resident, inputs.state, (inputs.z_x, masks))


def solve_tangents(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, trajectory: Trajectory, rhs: Trajectory
) -> Trajectory:
    """Solves the tangent equation of `jaxlstm.experimental.pallas.api` for ``ds``, given its right-hand side."""

    def body(weights: Weights, d_state: State, inputs_t: Any) -> tuple[State, State]:
        z_x, masks_t, state, rhs_t = inputs_t
        d_state = restart(masks_t.restarts, None, d_state)
        d_new = jax.jvp(partial(kernel_step, config, weights, z_x, masks_t), (state,), (d_state,))[1]
        d_new = jax.tree.map(jnp.add, d_new, rhs_t)
        return d_new, d_new

    over_time = (inputs.z_x, masks, states_before_steps(inputs, masks, trajectory), rhs.states)
    _, d_states = _scan(config, body, cast_matrices(config, inputs.weights), rhs.initial, over_time)
    return Trajectory(rhs.initial, d_states)


def solve_cotangents(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks, trajectory: Trajectory, ct: Trajectory
) -> Trajectory:
    """Solves the transposed equation: accumulates the cotangents ``ct`` of the trajectory backward in time."""
    states = states_before_steps(inputs, masks, trajectory)
    z, z_h = jax.vmap(partial(pre_activations, config, inputs.weights))(inputs.z_x, states.h)

    def body(resident: Any, ct_state: State, inputs_t: Any) -> tuple[State, State]:
        weights, w_h, w_p = resident
        z, z_h, c, masks_t, ct_t = inputs_t
        ct_state = jax.tree.map(jnp.add, ct_state, ct_t)
        hold = partial(zoneout_and_hold, config, masks_t)  # linear in both states
        ct_new, ct_old = jax.linear_transpose(hold, ct_state, ct_state)(ct_state)
        ct_output = ct_new.h if w_p is None else matmul(config, ct_new.h, w_p)
        cell = partial(apply_cell, config, masks_t.regularizer_masks, weights)
        ct_z, ct_z_h, ct_c = jax.vjp(cell, z, z_h, c)[1]((ct_new.c, ct_output))
        ct_gates = jnp.unstack(ct_z if ct_z_h is None else ct_z_h)
        products = (matmul(config, *pair) for pair in zip(ct_gates, jnp.unstack(w_h)))
        ct_old = jax.tree.map(jnp.add, ct_old, State(sum(products, jnp.zeros_like(ct_old.h)), ct_c))
        return restart(masks_t.restarts, None, ct_old), ct_state

    weights = cast_matrices(config, inputs.weights)
    w_h, w_p = jax.tree.map(partial(jnp.swapaxes, axis1=-1, axis2=-2), (weights.w_h, weights.w_p))
    zeros = jax.tree.map(jnp.zeros_like, ct.initial)
    over_time = (z, z_h, states.c, masks, ct.states)
    resident = (without_matrices(weights), w_h, w_p)
    ct_initial, ct_states = _scan(config, body, resident, zeros, over_time, reverse=True)
    return Trajectory(jax.tree.map(jnp.add, ct_initial, ct.initial), ct_states)


def _scan(
    config: KernelConfig, body: mosaic_tpu_scan.Body, resident: Any, carry: Any, over_time: Any, reverse: bool = False
) -> tuple[Any, Any]:
    """Runs `mosaic_tpu_scan.scan` in blocks of the configured sizes."""
    rows, steps = config.block_rows, config.block_steps
    return mosaic_tpu_scan.scan(body, resident, carry, over_time, rows=rows, steps=steps, reverse=reverse)
