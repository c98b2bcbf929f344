r"""The default backend: all directions in one scan, with a tangent rule that JAX transposes into backpropagation.

The tangent rule of one direction (`jaxlstm.cells` has the equations)::

    dz_t         = [ W_x dx_t + dW_x x_t + dW_h h_{t-1} + db ] + W_h dh_{t-1}
    (dc_t, dy_t) = d gates(z_t, c_{t-1}) . (dz_t, dc_{t-1})
    dh_t         = [ dW_p y_t ] + W_p dy_t                          with a projection; otherwise dh_t = dy_t

With layer normalization ``z`` is two arrays, ``W_x x`` and ``W_h h``, each with bracketed terms. The tangents of
peepholes and gains enter inside the step.

The bracketed terms do not depend on the previous step, so they are computed for a whole chunk of time at once. So are
their transposes: the gradient of a weight is one matrix product per chunk, instead of one product and one addition of a
weight-sized array per step. The rule is linear in the tangents and written in JAX. JAX transposes it, and forward mode
and second derivatives work. The Jacobian of the gates is recomputed in the backward pass, by `jax.jvp` or for the LSTM
by `jaxlstm.recurrence.gate_derivatives`; the residuals of a step are ``z``, ``c`` and the output, 6 arrays of H numbers
for an LSTM.

`jaxlstm.recurrence.layout` chooses the memory layout of a step's arrays, unless the options of `Fused` fix it.
`jaxlstm.primitives.batch_folding` makes sequences mapped by `jax.vmap` one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates, apply_zoneout
from jaxlstm.params import Size, State, Weights
from jaxlstm.primitives.batch_folding import SHARED, foldable_call
from jaxlstm.primitives.clip_cotangent import clip_cotangent
from jaxlstm.recurrence import chunked_scan, cpu_activations, gate_derivatives
from jaxlstm.recurrence.context import Direction, Results, ScanContext
from jaxlstm.recurrence.gate_derivatives import GateJacobian
from jaxlstm.recurrence.layout import ORDERS, LayerSizes, Layout, OrderName, choose_layout
from jaxlstm.recurrence.masking import hold_skipped, restart
from jaxlstm.recurrence.step import (
    Activate,
    ElementwiseWeights,
    apply_gates,
    candidate_scale,
    elementwise_weights,
    has_dense_recurrence,
    hidden_size,
    late_bias,
    project_hidden,
    project_inputs,
    split_bias,
    split_sources,
    sum_sources,
    unsupported_form,
)


@dataclass(frozen=True)
class Fused:
    """The backend with options: ``jaxlstm.LSTM(..., implementation=Fused(order="feature", chunk_size=32))``.

    An option that is None is chosen by the batch size, the hidden size and the dtype
    (`jaxlstm.recurrence.layout.choose_layout`); ``Fused()`` is the backend named ``"fused"``. The results are the same
    up to rounding. `jaxlstm.autotune` finds the fastest options.

    Args:
      order: order of the axes of a step's arrays: ``"batch"`` for ``(B, H)``, ``"feature"`` for ``(H, B)``.
      hoist_inputs: whether ``W_x x`` is computed for all steps before the loop; otherwise each step multiplies
        ``[W_x W_h]`` with ``[x; h]``, or with layer normalization ``W_x`` with ``x`` and ``W_h`` with ``h``.
      chunk_size: number of steps whose hoisted tangents are computed together. It has no effect without derivatives.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    order: OrderName | None = None
    hoist_inputs: bool | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.order is not None:
            validation.choice("order", self.order, ORDERS)
        if self.hoist_inputs is not None:
            object.__setattr__(self, "hoist_inputs", validation.flag("hoist_inputs", self.hoist_inputs))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", validation.positive_int("chunk_size", self.chunk_size))

    def __repr__(self) -> str:
        """Shows the options that are set."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return f"Fused({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __call__(self, cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
        """Runs the directions of a layer in one scan; see `jaxlstm.recurrence.context`.

        Raises:
          ValueError: while tracing, for ``hoist_inputs=False`` with recurrent weights that are not dense.
        """
        if self.hoist_inputs is False and not has_dense_recurrence(cell, directions[0].weights):
            raise ValueError(
                "Fused(hoist_inputs=False) does not support recurrent weights that are not dense; expected "
                "hoist_inputs=True or None"
            )
        return _run(self, cell, directions, context)


run = Fused()  # the backend named "fused"


class FusedConfig(NamedTuple):
    """Options of the recurrence that are static under compilation."""

    options: Fused
    cell: Cell
    rates: RegularizerRates
    unroll: int
    gradient_clip: float | None
    sizes: LayerSizes  # before sequences are folded into the batch
    dtype: jnp.dtype  # of the operands of matrix products, and of outputs
    accum_dtype: jnp.dtype  # of sums and of the state
    layer_norm: bool  # whether W_x x and W_h h are normalized separately
    one_product: bool  # whether W_x x + W_h h can be one product: every gate reads both, and W_h is dense
    dense: bool  # whether W_h is dense
    differentiable: bool = False  # whether every operation must have a derivative

    @property
    def has_gate_jacobian(self) -> bool:
        """True if `jaxlstm.recurrence.gate_derivatives` has the Jacobian of the cell."""
        return gate_derivatives.has_jacobian(self.cell) and not self.layer_norm

    def layout(self, batch_size: Size) -> Layout:
        """Returns the layout for a batch size."""
        options = self.options
        order = options.order or (None if self.dense else "batch")
        sizes = self.sizes._replace(batch_size=batch_size)
        layout = choose_layout(
            sizes,
            self.dtype,
            self.accum_dtype,
            order,
            may_project_first=self.one_product and options.hoist_inputs is not False,
            layer_norm=self.layer_norm,
        )
        hoist_inputs = layout.hoist_inputs if options.hoist_inputs is None else options.hoist_inputs
        return replace(
            layout,
            hoist_inputs=hoist_inputs or not self.dense,
            chunk_size=options.chunk_size or layout.chunk_size,
            bitcast=layout.bitcast and not self.differentiable,
        )


class StepMasks(NamedTuple):
    """Masks of one direction, over time or at one step."""

    step_mask: Array | None  # (T, B) bool: steps where it is False are skipped
    restarts: Array | None  # (T, B) bool: the state restarts before steps where it is True
    regularizer: RegularizerMasks  # (T, B, .)


class StepInputs(NamedTuple):
    """Inputs of one direction, over time or at one step."""

    x: Array  # (T, B, I), or z_x (T, B, G*H) if it was computed before the loop
    masks: StepMasks


# Below, (T, H, B) is written for arrays in the layout; batch-major they are (T, B, H).


class Residuals(NamedTuple):
    """Intermediates of the steps that the tangent rule reads, besides the outputs."""

    z: Any  # (T, G*H, B), or (T, H, B) for each gate of a cell without one product
    z_h: Array | None  # (T, G*H, B), with layer normalization
    c: Any  # (T, H, B), the states before the step and after a restart
    h: Array | None  # (T, H, B), likewise, for a cell whose functions take h
    cell_output: Array | None  # (T, H, B), with a projection


class DirectionTangents(NamedTuple):
    """Tangents of a `Direction`."""

    weights: Weights  # None in place of a tangent that is zero
    elementwise: ElementwiseWeights  # zeros instantiated
    xs: Array | None  # (T, B, I), None if zero
    z_static: Array | None  # (B, G*H), None if zero
    state: State  # zeros instantiated
    restart_state: State | None  # zeros instantiated; None if the restart state is zero


class LinearizedDirection(NamedTuple):
    """All that the tangent rule of one direction reads."""

    direction: Direction
    tangents: DirectionTangents
    ys: Array  # (T, B, P)
    residuals: Residuals


class ChunkInputs(NamedTuple):
    """The part of a `LinearizedDirection` with a time axis, which is scanned in chunks."""

    dx: Array | None  # (T, B, I), or dz_x (T, B, G*H)
    x: Array | None  # (T, B, I), packed; None if its product was computed first
    masks: StepMasks
    residuals: Residuals
    y: Array  # (T, B, P), packed


class HoistedTangents(NamedTuple):
    """The bracketed terms of the tangent rule at many steps or one; None for a term that is zero."""

    z: Any  # (T, G*H, B), or (T, H, B) for each gate of a cell without one product
    z_h: Array | None  # (T, G*H, B), with layer normalization
    h: Array | None  # (T, P, B)


class TangentInputs(NamedTuple):
    """Inputs of the scan over the tangents of one direction."""

    masks: StepMasks
    primals: Residuals | GateJacobian
    hoisted: HoistedTangents


States = tuple[State, ...]  # of each direction
Outputs = tuple[Array, ...]  # (T, B, P) of each direction


def _run(options: Fused, cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
    """Runs the directions of a layer in one scan."""
    weights = directions[0].weights
    config = FusedConfig(
        options,
        cell,
        context.rates,
        context.unroll,
        context.gradient_clip,
        sizes=LayerSizes(*directions[0].xs.shape[1:], hidden_size=hidden_size(cell, weights)),
        dtype=jnp.dtype(context.dtype),
        accum_dtype=context.accum_dtype,
        layer_norm=weights.norm is not None,
        one_product=unsupported_form(cell, weights) is None,
        dense=has_dense_recurrence(cell, weights),
    )
    layout = config.layout(directions[0].xs.shape[1])

    def scan(states: States, inputs: tuple[StepInputs, ...]) -> tuple[States, Outputs]:
        chunk = tuple(_with_inputs(*each) for each in zip(directions, states, inputs))
        if layout.project_first:
            chunk = tuple(_with_projected_inputs(layout, direction) for direction in chunk)
        return _recurrence(config, chunk)

    states = tuple(jax.tree.map(layout.from_batch_major, d.state) for d in directions)
    inputs = tuple(StepInputs(d.xs, _masks(d)) for d in directions)
    if context.remat is None:
        states, ys = scan(states, inputs)
    else:  # only the state is saved between chunks; the rest is recomputed in the backward pass
        states, ys = chunked_scan.scan_in_chunks(jax.checkpoint(scan), states, inputs, size=context.remat)
    return ys, [jax.tree.map(layout.to_batch_major, state) for state in states]


def _with_projected_inputs(layout: Layout, direction: Direction) -> Direction:
    """Returns the direction with z_x in place of its inputs, and without W_x and b; see `Layout.project_first`."""
    z_x = project_inputs(direction.weights, direction.xs, layout.dtype, layout.accum_dtype)
    return direction._replace(xs=z_x, weights=direction.weights._replace(w_x=None, b=None))


def _masks(direction: Direction) -> StepMasks:
    return StepMasks(direction.step_mask, direction.restarts, direction.masks)


def _with_inputs(direction: Direction, state: State, inputs: StepInputs) -> Direction:
    """Returns the direction with the initial state and the inputs of a chunk of time."""
    step_mask, restarts, masks = inputs.masks
    return direction._replace(xs=inputs.x, state=state, step_mask=step_mask, restarts=restarts, masks=masks)


# The primal function


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(config: FusedConfig, directions: tuple[Direction, ...]) -> tuple[States, Outputs]:
    """Runs all directions, whose states are in the layout; returns final states and outputs, h at skipped steps."""
    batch_size, forward = directions[0].xs.shape[1], partial(_forward, save=False)
    states, ys, _ = _call_folded(config, forward, batch_size, directions, _direction_axes, _forward_out_axes)
    return states, ys


def _call_folded(
    config: FusedConfig,
    fn: Callable[[FusedConfig, Size, Any], Any],
    batch_size: Size,
    directions: tuple[Any, ...],
    direction_axes: Callable[[Layout], Any],
    out_axes: Callable[[Layout], Any],
) -> Any:
    """Returns ``fn(config, batch_size, directions)``, computed by `foldable_call`.

    Args:
      config: the options.
      fn: the function.
      batch_size: the size of the batch.
      directions: a tree of arrays for each direction.
      direction_axes: returns for a layout the batch axes of the arrays of one direction, as a tree prefix.
      out_axes: returns for a layout the batch axes of the results, as a tree prefix.
    """

    def in_axes(batch_size: Size) -> tuple[Any]:
        return ((direction_axes(config.layout(batch_size)),) * len(directions),)

    return foldable_call(
        partial(fn, config),
        batch_size,
        (directions,),
        in_axes,
        lambda batch_size: out_axes(config.layout(batch_size)),
        partial(fn, config._replace(differentiable=True)),
    )


def _direction_axes(layout: Layout) -> Direction:
    """Returns the batch axes of a `Direction`, as a tree prefix."""
    shared: Any = SHARED
    state: Any = layout.batch_axis
    time: Any = 1  # (T, B, .)
    rows: Any = 0  # (B, .)
    return Direction(
        weights=shared,
        xs=time,
        state=state,
        step_mask=time,
        restarts=time,
        restart_state=shared,
        masks=time,
        z_static=rows,
    )


def _forward_out_axes(layout: Layout) -> tuple[int, int, int]:
    """Returns the batch axes of the states, outputs and residuals."""
    return layout.batch_axis, 1, 1 + layout.batch_axis


def _forward(
    config: FusedConfig, batch_size: Size, directions: tuple[Direction, ...], *, save: bool
) -> tuple[States, Outputs, tuple[Residuals | None, ...]]:
    """Scans over time; returns final states, outputs and, with ``save``, the residuals."""
    layout = config.layout(batch_size)
    steps = [
        partial(_forward_step, config, layout, d, _loop_weights(config, layout, d.weights), save) for d in directions
    ]
    inputs = tuple(StepInputs(_loop_inputs(layout, d), _masks(d)) for d in directions)

    def scan_step(carry: Any, inputs_t: tuple[StepInputs, ...]) -> tuple[Any, Any]:
        results = [step(*each) for step, *each in zip(steps, *carry, inputs_t)]
        new_states, rounded, ys, residuals = zip(*results)
        return (new_states, rounded), (ys, residuals)

    states = tuple(d.state for d in directions)
    carry = states, tuple(_rounded(layout, state.h) for state in states)
    (states, _), (ys, residuals) = lax.scan(scan_step, carry, inputs, unroll=config.unroll)
    # Outputs not packed are cast after the loop: inside it XLA:CPU rewrites the whole bfloat16 array every step.
    return states, tuple(layout.unpack(y).astype(layout.dtype) for y in ys), residuals


def _loop_weights(config: FusedConfig, layout: Layout, weights: Weights) -> Any:
    """Returns the matrices of the product in each step."""
    if not layout.hoist_inputs and config.one_product and not config.layer_norm:
        return layout.prepare_both(weights.w_x, weights.w_h)
    return layout.prepare(weights.w_h) if config.dense else weights.w_h


def _dot_hidden(config: FusedConfig, layout: Layout, w_h: Any, h: Array) -> Array | None:
    """Computes ``W_h h`` for one step, from `_loop_weights`; None if no gate reads h."""
    if w_h is None:
        return None
    return layout.dot(w_h, h) if config.dense else _project_blocks(layout, w_h, layout.to_batch_major(h))


def _project_blocks(layout: Layout, w_h: Array, h: Array) -> Array:
    """Computes ``W_h h`` for a block-diagonal matrix and a batch-major ``h``, for one step or many."""
    return layout.from_batch_major(project_hidden(w_h, h, layout.dtype, layout.accum_dtype))


def _loop_inputs(layout: Layout, direction: Direction) -> Array:
    """Returns the inputs of the loop: z_x if it is hoisted, otherwise x, packed with ``bitcast``."""
    if direction.weights.w_x is None:
        return direction.xs
    if layout.hoist_inputs:
        return project_inputs(direction.weights, direction.xs, layout.dtype, layout.accum_dtype)
    return layout.from_batch_major(layout.pack(direction.xs)) if layout.bitcast else direction.xs


def _forward_step(
    config: FusedConfig,
    layout: Layout,
    direction: Direction,
    loop_weights: Any,
    save: bool,
    state: State,
    rounded: Array | None,
    inputs_t: StepInputs,
) -> tuple[State, Array | None, Array, Residuals | None]:
    """Takes one step.

    Returns:
      the new state, its h from `_rounded`, the output and, with ``save``, the residuals.
    """
    weights, masks = direction.weights, inputs_t.masks
    state = restart(masks.restarts, direction.restart_state, state, layout.expand_batch, layout.expand_units)
    x = inputs_t.x if layout.bitcast and not layout.hoist_inputs else layout.from_batch_major(inputs_t.x)
    z_h = None
    if weights.norm is not None:
        z = x if layout.hoist_inputs else layout.dot(layout.prepare(weights.w_x), layout.unpack(x))
        z_h = _dot_hidden(config, layout, loop_weights, state.h)
    elif not config.one_product:
        if layout.hoist_inputs:
            b = late_bias(config.cell, weights, layout.accum_dtype)
        else:
            x = layout.dot(layout.prepare(weights.w_x), layout.unpack(x))
            b = split_bias(config.cell, weights, layout.accum_dtype)
        z_static = None if direction.z_static is None else layout.from_batch_major(direction.z_static)
        rest = None if b is None else [layout.expand_units(each) for each in b]
        z_h = _dot_hidden(config, layout, loop_weights, state.h)
        z, z_h = sum_sources(config.cell, x, z_h, z_static, rest, layout.units_axis - 2), None
    elif layout.hoist_inputs:
        h = state.h if rounded is None or masks.restarts is not None else rounded
        z = x + _own_kernel(layout, layout.dot(loop_weights, h))
    else:
        z = _add_bias(layout, weights.b, layout.dot_both(loop_weights, x, state.h))
    activate = _activate(layout, save=save)
    elementwise = elementwise_weights(weights)
    old_h = state.h if config.cell.reads_h else None
    c, cell_output = _apply_gates(config, layout, activate, masks.regularizer, elementwise, z, z_h, state.c, old_h)
    h = cell_output if weights.w_p is None else layout.dot(layout.prepare(weights.w_p), cell_output)
    new_state = _finish_step(config, layout, masks, State(h, c), state, state)
    residuals = Residuals(z, z_h, state.c, old_h, None if weights.w_p is None else cell_output) if save else None
    rounded = _rounded(layout, new_state.h)
    y = layout.to_batch_major(new_state.h if rounded is None else rounded)
    return new_state, rounded, layout.pack(y) if layout.bitcast else y, residuals


def _rounded(layout: Layout, h: Array) -> Array | None:
    """Returns h as the product of the next step reads it, for a GPU to round it in the kernel that computes it."""
    return h.astype(layout.dtype) if layout.separate_gates and layout.dtype != layout.accum_dtype else None


def _own_kernel(layout: Layout, product: Array) -> Array:
    """Returns a product that the library of a GPU does not add to another array, which XLA would copy first."""
    return lax.optimization_barrier(product) if layout.separate_gates else product


def _activate(layout: Layout, *, save: bool) -> Activate | None:
    """Returns the activations of the gates that are fastest on a CPU; None for one tanh over all.

    Without residuals, and batch-major with z from one product, XLA computes activations one by one in the kernels of c
    and h. That saves a kernel.
    """
    if not save and not layout.hoist_inputs and layout.units_axis == 1:
        return cpu_activations.activate_separately
    return cpu_activations.activate if layout.threaded_gates else None


def _apply_gates(
    config: FusedConfig,
    layout: Layout,
    activate: Activate | None,
    masks: RegularizerMasks,
    weights: ElementwiseWeights,
    z: Array | tuple[Array, ...],
    z_h: Array | None,
    c: Any,
    h: Array | None,
) -> tuple[Any, Array]:
    """Calls `jaxlstm.recurrence.step.apply_gates` on arrays in the layout."""
    cell, axis = config.cell, layout.units_axis
    candidate_mask = None if masks.candidate_mask is None else layout.from_batch_major(masks.candidate_mask)
    if layout.separate_gates and not isinstance(z, tuple) and not config.layer_norm:
        z = tuple(jnp.split(z, cell.num_gates, axis))
    if not isinstance(z, tuple):
        z, z_h = split_sources(cell, z, z_h, axis, layer_norm=config.layer_norm)
    return apply_gates(cell, weights, z, z_h, c, candidate_mask, config.rates, axis, activate=activate, h=h)


def _finish_step(
    config: FusedConfig, layout: Layout, masks: StepMasks, new_state: State, old_state: State, held_state: State
) -> State:
    """Applies zoneout to ``old_state`` and holds ``held_state`` in skipped rows; linear in all, so it serves tangents.

    The two differ only for a tangent, whose gradient is clipped in the steps that are taken.
    """
    regularizer = jax.tree.map(layout.from_batch_major, masks.regularizer)
    new_state = apply_zoneout(config.rates, regularizer, new_state, old_state)
    return hold_skipped(masks.step_mask, new_state, held_state, layout.expand_batch)


def _add_bias(layout: Layout, b: Array | None, z: Array) -> Array:
    """Returns ``z + b`` for ``z`` with any number of leading axes."""
    if b is None:
        return z
    b = layout.expand_units(b.astype(layout.accum_dtype))
    return z + jnp.broadcast_to(jnp.expand_dims(b, range(z.ndim - 2)), z.shape)


# The tangent rule


@partial(_recurrence.defjvp, symbolic_zeros=True)
def _recurrence_jvp(
    config: FusedConfig, primals: tuple[tuple[Direction, ...]], tangents: tuple[tuple[Direction, ...]]
) -> tuple[tuple[States, Outputs], tuple[States, Outputs]]:
    """Returns `_recurrence` and its tangent; the leaves of ``tangents`` may be symbolic zeros."""
    (directions,), (d_directions,) = primals, tangents
    batch_size, forward = directions[0].xs.shape[1], partial(_forward, save=True)
    direction_tangents = [_direction_tangents(config, *each) for each in zip(directions, d_directions)]
    states, ys, residuals = _call_folded(config, forward, batch_size, directions, _direction_axes, _forward_out_axes)
    linearized = tuple(LinearizedDirection(*each) for each in zip(directions, direction_tangents, ys, residuals))
    d_out = _call_folded(config, _tangent, batch_size, linearized, _linearized_axes, _tangent_out_axes)
    return (states, ys), d_out


def _direction_tangents(config: FusedConfig, direction: Direction, tangents: Direction) -> DirectionTangents:
    """Sorts the tangents by use: the elementwise weights are needed in every step, the others in hoisted products."""
    dx, dz_static = drop_symbolic_zeros((tangents.xs, tangents.z_static))
    elementwise = elementwise_weights(direction.weights), elementwise_weights(tangents.weights)
    states = (direction.state, direction.restart_state), (tangents.state, tangents.restart_state)
    return DirectionTangents(
        drop_symbolic_zeros(tangents.weights),
        jax.tree.map(instantiate_zeros, *elementwise),
        None if dx is None else dx.astype(config.accum_dtype),
        dz_static,
        *jax.tree.map(instantiate_zeros, *states),
    )


def drop_symbolic_zeros(tangents: Any) -> Any:
    """Replaces symbolic zeros by None."""
    return jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, tangents)


def instantiate_zeros(primal: Array, tangent: Any) -> Array:
    """Returns the tangent, or an array of zeros in place of a symbolic zero or None."""
    return jnp.zeros_like(primal) if tangent is None or isinstance(tangent, SymbolicZero) else tangent


def _linearized_axes(layout: Layout) -> LinearizedDirection:
    """Returns the batch axes of a `LinearizedDirection`, as a tree prefix."""
    shared: Any = SHARED
    state: Any = layout.batch_axis
    time: Any = 1  # (T, B, .)
    rows: Any = 0  # (B, .)
    residuals: Any = 1 + layout.batch_axis
    tangents = DirectionTangents(shared, shared, xs=time, z_static=rows, state=state, restart_state=shared)
    return LinearizedDirection(_direction_axes(layout), tangents, time, residuals)


def _tangent_out_axes(layout: Layout) -> tuple[int, int]:
    """Returns the batch axes of the tangents of states and outputs."""
    return layout.batch_axis, 1


def _tangent(
    config: FusedConfig, batch_size: Size, linearized: tuple[LinearizedDirection, ...]
) -> tuple[States, Outputs]:
    """Returns the tangents of final states and outputs, computed in chunks of time."""
    layout = config.layout(batch_size)
    steps = [
        partial(_tangent_step, config, layout, d, _tangent_weights(config, layout, d.direction.weights.w_h))
        for d in linearized
    ]

    # Without this checkpoint the Jacobians of all steps would be saved.
    @partial(jax.checkpoint, prevent_cse=False)
    def scan_step(d_states: States, inputs_t: tuple[TangentInputs, ...]) -> tuple[States, Outputs]:
        d_states = tuple(step(d_state, inputs) for step, d_state, inputs in zip(steps, d_states, inputs_t))
        return d_states, tuple(d_state.h for d_state in d_states)

    # Without this checkpoint the hoisted terms and the concatenated x and h would be saved.
    @partial(jax.checkpoint, prevent_cse=False)
    def run_chunk(d_states: States, chunk: tuple[Array, tuple[ChunkInputs, ...]]) -> tuple[States, Outputs]:
        first_step, chunk_inputs = chunk[0][0], chunk[1]
        inputs = []
        for direction, sequence, inputs_c in zip(linearized, sequences, chunk_inputs):
            h = _previous_outputs(layout, first_step, direction.direction.state, sequence.y, inputs_c.y)
            inputs.append(_tangent_inputs(config, layout, direction, inputs_c, h))
        d_states, d_ys = lax.scan(scan_step, d_states, tuple(inputs), unroll=config.unroll)
        return d_states, tuple(layout.to_batch_major(d_y) for d_y in d_ys)

    sequences = tuple(_chunk_inputs(layout, direction) for direction in linearized)
    d_states = tuple(direction.tangents.state for direction in linearized)
    time_steps = jnp.arange(linearized[0].ys.shape[0])
    d_states, d_ys = chunked_scan.scan_in_chunks(run_chunk, d_states, (time_steps, sequences), size=layout.chunk_size)
    return d_states, tuple(d_y.astype(layout.dtype) for d_y in d_ys)


def _chunk_inputs(layout: Layout, linearized: LinearizedDirection) -> ChunkInputs:
    """Returns the arrays over time, with the operands of products packed."""
    direction, tangents, ys, residuals = linearized
    x = None if direction.weights.w_x is None else layout.pack(direction.xs)
    return ChunkInputs(tangents.xs, x, _masks(direction), residuals, layout.pack(ys))


def _previous_outputs(layout: Layout, t: Array, initial: State, ys: Array, y: Array) -> Array:
    """Returns the output before each step of a chunk, packed.

    Args:
      layout: the layout.
      t: index of the first step of the chunk.
      initial: the initial state.
      ys: all outputs, packed.
      y: outputs of the chunk, packed.
    """
    first = layout.pack(layout.to_batch_major(initial.h))
    first = jnp.where(t == 0, first, lax.dynamic_index_in_dim(ys, jnp.maximum(t - 1, 0), keepdims=False))
    return jnp.concatenate([first[None], y[:-1]])


def _tangent_inputs(
    config: FusedConfig, layout: Layout, linearized: LinearizedDirection, chunk: ChunkInputs, h: Array
) -> TangentInputs:
    """Computes the part of the rule that does not depend on the tangent of the state; ``h`` as in `_hoist`."""
    hoisted = _hoist(config, layout, linearized, chunk, h)
    masks, residuals = chunk.masks, chunk.residuals
    if not config.has_gate_jacobian:
        return TangentInputs(masks, residuals, hoisted)
    mask, axis = masks.regularizer.candidate_mask, layout.units_axis
    scale = None
    if mask is not None:
        scale = layout.from_batch_major(candidate_scale(mask, config.rates, layout.accum_dtype))
    jacobian = gate_derivatives.gate_jacobian(config.cell, residuals.z, residuals.c, residuals.h, scale, axis)
    return TangentInputs(masks, jacobian, hoisted)


def _tangent_weights(config: FusedConfig, layout: Layout, w_h: Any) -> Any:
    """Returns ``W_h`` as `_tangent_step` takes it; None if no gate reads h."""
    return layout.prepare_for_vjp(w_h) if config.dense else w_h


def _hoist(
    config: FusedConfig, layout: Layout, linearized: LinearizedDirection, chunk: ChunkInputs, h: Array
) -> HoistedTangents:
    """Computes the bracketed terms of a chunk; ``h (T, B, P)`` are the outputs before its steps, packed."""
    direction, d_weights = linearized.direction, linearized.tangents.weights
    weights, residuals, x = direction.weights, chunk.residuals, chunk.x
    restart_state = None if direction.restart_state is None else State(layout.pack(direction.restart_state.h), None)
    h = restart(chunk.masks.restarts, restart_state, State(h, None)).h
    z, z_h = jax.tree.map(lambda a: jnp.zeros(a.shape, layout.accum_dtype), residuals.z), None
    z_x = None if chunk.dx is None else layout.from_batch_major(chunk.dx)
    if z_x is not None and weights.w_x is not None:
        z_x = layout.dot_over_time(weights.w_x, z_x)
    if config.one_product and not config.layer_norm:
        z = z if z_x is None else z + z_x
        if x is None:
            if d_weights.w_h is not None:
                z = z + layout.dot_over_time(d_weights.w_h, layout.from_batch_major(layout.unpack(h)))
        elif d_weights.w_x is not None or d_weights.w_h is not None:
            dw_x, dw_h = instantiate_zeros(weights.w_x, d_weights.w_x), instantiate_zeros(weights.w_h, d_weights.w_h)
            x_and_h = layout.unpack(jnp.concatenate([x, h], axis=2))
            z = z + layout.dot_over_time(jnp.concatenate([dw_x, dw_h], axis=1), layout.from_batch_major(x_and_h))
        z = _add_bias(layout, d_weights.b, z)
    else:
        if d_weights.w_x is not None:
            assert x is not None
            from_weights = layout.dot_over_time(d_weights.w_x, layout.from_batch_major(layout.unpack(x)))
            z_x = from_weights if z_x is None else z_x + from_weights
        if d_weights.w_h is not None:
            h = layout.unpack(h)
            if config.dense:
                z_h = layout.dot_over_time(d_weights.w_h, layout.from_batch_major(h))
            else:
                z_h = _project_blocks(layout, d_weights.w_h, h)
        if config.layer_norm:
            z = z if z_x is None else z + z_x
            z_h = jnp.zeros_like(residuals.z_h) if z_h is None and residuals.z_h is not None else z_h
        else:
            dz_static = linearized.tangents.z_static
            dz_static = None if dz_static is None else layout.from_batch_major(dz_static)[None]
            if d_weights.b is not None:
                z = tuple(_add_bias(layout, *each) for each in zip(jnp.split(d_weights.b, len(z)), z))
            z, z_h = sum_sources(config.cell, z_x, z_h, dz_static, z, layout.units_axis - 2), None
    if residuals.cell_output is None or d_weights.w_p is None:
        return HoistedTangents(z, z_h, None)
    return HoistedTangents(z, z_h, layout.dot_over_time(d_weights.w_p, residuals.cell_output))


def _tangent_step(
    config: FusedConfig,
    layout: Layout,
    linearized: LinearizedDirection,
    w_h: Any,
    d_state: State,
    inputs_t: TangentInputs,
) -> State:
    """Returns the tangent of the state after a step; ``w_h`` is from `_tangent_weights`."""
    direction, tangents = linearized.direction, linearized.tangents
    (masks, primals, hoisted), weights = inputs_t, direction.weights
    d_held = restart(masks.restarts, tangents.restart_state, d_state, layout.expand_batch, layout.expand_units)
    d_state = d_held._replace(h=clip_cotangent(d_held.h, config.gradient_clip))
    dz, dz_h = hoisted.z, None
    if config.dense:
        dz_h = layout.dot_for_vjp(w_h, d_state.h)
    elif w_h is not None:
        dz_h = _project_blocks(layout, w_h, layout.to_batch_major(d_state.h))
    if config.layer_norm:
        dz_h = None if dz_h is None or hoisted.z_h is None else hoisted.z_h + dz_h
    elif config.one_product:
        assert dz_h is not None
        dz, dz_h = dz + dz_h, None
    else:
        dz, dz_h = sum_sources(config.cell, None, dz_h, rest=dz, axis=layout.units_axis - 2), None
    dh_old = d_state.h if config.cell.reads_h else None
    if isinstance(primals, GateJacobian):
        dc, dh = gate_derivatives.apply_jacobian(config.cell, primals, dz, d_state.c, dh_old, layout.units_axis)
    else:
        gates = partial(_apply_gates, config, layout, _activate(layout, save=True), masks.regularizer)
        args = elementwise_weights(weights), primals.z, primals.z_h, primals.c, primals.h
        _, (dc, dh) = jax.jvp(gates, args, (tangents.elementwise, dz, dz_h, d_state.c, dh_old))
    if weights.w_p is not None:
        dh = layout.dot(layout.prepare(weights.w_p), dh)
    if hoisted.h is not None:
        dh = dh + hoisted.h
    return _finish_step(config, layout, masks, State(dh, dc), d_state, d_held)
