r"""The experimental backend "pallas": the recurrence as a kernel that keeps the recurrent weights on the chip.

There are kernels for TPUs (`mosaic_tpu`: weights in VMEM, time is an axis of the grid) and for Hopper GPUs
(`mosaic_gpu_sm90`: weights in the shared memory of many blocks). None has run on its hardware, and their speed is
unknown:

* The TPU kernels pass the tests of the other backends in interpret mode, are lowered for a TPU, and were compiled for a
  v5e on a host without a TPU. They have never run on a TPU.
* The GPU kernels agree with the TPU kernels in Pallas's interpreter, which does not execute the semaphore of the grid,
  and were compiled to machine code for an H100 on a host without a GPU. They have never run on a GPU.

The input projection of all steps is computed outside of the kernel. The kernel multiplies by the recurrent weights and
applies the cell.

Only the trajectory of the state, ``s_t = (h_t, c_t)``, is saved for the derivative. It solves equations that are
differentiated without regard to how they were solved::

    s_t  = step(s_{t-1}, p_t)                           p_t: the weights and everything else that the step reads
    ds_t = J_t ds_{t-1} + (d step / d p_t) dp_t         J_t = d step / d s_{t-1}

The second equation is linear in the tangents. Its right-hand side depends on no other step. The recurrence in ds is a
second kernel, and its transpose, which runs backward in time, is a third. `jax.lax.custom_linear_solve` derives forward
mode, reverse mode and higher derivatives from the two. With ``remat`` there are only first derivatives:
`jax.checkpoint` drops the rule of the solve under a second derivative, and JAX cannot differentiate the bare kernel.

On several devices each device runs its own kernel, within ``jax.shard_map(..., check_vma=False)``.

On a TPU or GPU each kernel is compared with `scan` at a small size before it runs for the first time (`probe`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlstm.cells import Cell
from jaxlstm.experimental.pallas import mosaic_gpu_sm90, mosaic_tpu, probe, target
from jaxlstm.experimental.pallas.step import (
    DifferentiableInputs,
    KernelConfig,
    StepMasks,
    Trajectory,
    kernel_step,
    states_before_steps,
    to_kernel_layout,
)
from jaxlstm.params import State
from jaxlstm.primitives.pytrees import tree_index
from jaxlstm.recurrence.chunked_scan import scan_in_chunks
from jaxlstm.recurrence.context import Direction, Results, ScanContext, refuse_gradient_clip
from jaxlstm.recurrence.step import project_inputs, require_form, split_gates


def run(cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
    """Runs the directions of a layer one after the other; see `jaxlstm.recurrence.context`.

    ``context.unroll`` is the number of steps per iteration of a TPU kernel's grid; GPU kernels ignore it.

    Raises:
      ValueError: without a TPU or a Hopper GPU, on a mesh with explicit axes, for a dtype or an option that the kernel
        does not support, or for weights that do not fit on the chip.
      RuntimeError: if the kernel does not agree with `scan` on this device.
    """
    return _run(cell, directions, context, checked=True)


def run_unchecked(cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
    """Runs like `run`, without a comparison with `scan`."""
    return _run(cell, directions, context, checked=False)


def _run(cell: Cell, directions: tuple[Direction, ...], context: ScanContext, *, checked: bool) -> Results:
    explicit_axes = jax.typeof(directions[0].xs).sharding.mesh.explicit_axes
    if explicit_axes:
        raise ValueError(
            "implementation='pallas' runs on single devices, got inputs on a mesh with the explicit axes "
            f"{explicit_axes}; call it within jax.shard_map(..., check_vma=False)"
        )
    refuse_gradient_clip("implementation='pallas'", context)
    require_form("implementation='pallas'", cell, directions[0].weights, several_states=False)
    results = [_run_direction(cell, direction, context, checked=checked) for direction in directions]
    return [outputs for outputs, _ in results], [state for _, state in results]


def _run_direction(cell: Cell, direction: Direction, context: ScanContext, *, checked: bool) -> tuple[Array, State]:
    """Returns the outputs ``(T, B, P)`` of one direction, in ``dtype``, and its final state."""
    weights = to_kernel_layout(cell, direction.weights)
    step_mask, restarts = jax.tree.map(lambda a: a[..., None], (direction.step_mask, direction.restarts))
    restart_state = jax.tree.map(lambda a: a[None], direction.restart_state)
    masks = StepMasks(step_mask, restarts, direction.masks)
    config = KernelConfig(cell, context.rates, context.dtype, context.accum_dtype, block_steps=context.unroll)
    configure = mosaic_gpu_sm90.configure if target.is_gpu() else mosaic_tpu.configure
    config = configure(config, weights, masks, direction.xs.shape[1])
    if checked:
        probe.require_correct(run_unchecked, config.weights_sharing, config.dtype)

    def scan(state: State, steps: tuple[Array, StepMasks]) -> tuple[State, Array]:
        xs, masks = steps
        z_x = project_inputs(direction.weights, xs, config.dtype, config.accum_dtype)
        z_x = jnp.moveaxis(split_gates(z_x, cell.num_gates, -1), 0, 1)
        return _final_state_and_outputs(config, DifferentiableInputs(weights, z_x, state, restart_state), masks)

    steps = (direction.xs, masks)
    if context.remat is None:
        state, outputs = scan(direction.state, steps)
    else:  # only the state is saved between chunks; the rest is recomputed for the derivative
        state, outputs = scan_in_chunks(jax.checkpoint(scan), direction.state, steps, size=context.remat)
    return outputs, state


def _kernels(config: KernelConfig) -> Any:
    """Returns the module with the kernels of the target."""
    return mosaic_tpu if config.weights_sharing is None else mosaic_gpu_sm90


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _final_state_and_outputs(
    config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks
) -> tuple[State, Array]:
    """Runs the recurrence; without a derivative, the trajectory is not stored."""
    return _kernels(config).compute_outputs(config, inputs, masks)


@_final_state_and_outputs.defjvp
def _final_state_and_outputs_jvp(config: KernelConfig, primals: Any, tangents: Any) -> Any:
    (inputs, masks), (d_inputs, _) = primals, tangents

    def from_trajectory(inputs: DifferentiableInputs) -> tuple[State, Array]:
        states = _trajectory(config, inputs, masks).states
        return tree_index(states, -1), states.h.astype(config.dtype)

    return jax.jvp(from_trajectory, (inputs,), (d_inputs,))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _trajectory(config: KernelConfig, inputs: DifferentiableInputs, masks: StepMasks) -> Trajectory:
    """Returns the states that solve the equations of this module's docstring."""
    return _kernels(config).compute_trajectory(config, inputs, masks)


@_trajectory.defjvp
def _trajectory_jvp(config: KernelConfig, primals: Any, tangents: Any) -> Any:
    (inputs, masks), (d_inputs, _) = primals, tangents
    trajectory = _trajectory(config, inputs, masks)

    def take_all_steps(inputs: DifferentiableInputs, trajectory: Trajectory) -> Trajectory:
        """Evaluates the right-hand side of the first equation, at all steps at once."""
        states = states_before_steps(inputs, masks, trajectory)
        step = partial(kernel_step, config, inputs.weights)
        return Trajectory(inputs.state, jax.vmap(step)(inputs.z_x, masks, states))

    @jax.checkpoint  # else the gate derivatives of all steps would be saved
    def d_by_inputs(inputs: DifferentiableInputs, trajectory: Trajectory, d: DifferentiableInputs) -> Trajectory:
        return jax.jvp(lambda inputs: take_all_steps(inputs, trajectory), (inputs,), (d,))[1]

    def d_by_trajectory(d: Trajectory) -> Trajectory:
        return jax.jvp(lambda trajectory: take_all_steps(inputs, trajectory), (trajectory,), (d,))[1]

    rhs = _depend_on(d_by_inputs(inputs, trajectory, d_inputs), d_inputs)
    solve, transpose_solve = _kernels(config).solve_tangents, _kernels(config).solve_cotangents
    return trajectory, lax.custom_linear_solve(
        lambda d: jax.tree.map(jnp.subtract, d, d_by_trajectory(d)),
        rhs,
        lambda _, rhs: solve(config, inputs, masks, trajectory, rhs),
        lambda _, rhs: transpose_solve(config, inputs, masks, trajectory, rhs),
    )


def _depend_on(rhs: Trajectory, tangents: DifferentiableInputs) -> Trajectory:
    """Adds a zero that depends on the tangents to every array of ``rhs``.

    JAX transposes the solve only if every array of its right-hand side depends on a tangent. JAX 0.12 does not
    transpose an optimization barrier with constant operands, which would have the same effect.
    """
    zero: Any = sum(0 * jnp.ravel(d)[:1].sum() for d in jax.tree.leaves(tangents))
    return jax.tree.map(lambda a: a + jnp.broadcast_to(zero.astype(a.dtype), a.shape), rhs)
