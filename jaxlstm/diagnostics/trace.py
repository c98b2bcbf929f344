"""Records every gate, candidate, cell state and output of a call."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.network import CallArgs
from jaxlstm.params import Layer, Params, State
from jaxlstm.recurrence import masking
from jaxlstm.recurrence.chunked_scan import ScanFns, scan_directions
from jaxlstm.recurrence.context import Direction, LayerInputs, Results, ScanContext
from jaxlstm.recurrence.step import project_inputs, recurrent_step
from jaxlstm.rnn import RNN

GATE_ORDER = "ifgo"
Value = TypeVar("Value")


class PerDirection(NamedTuple, Generic[Value]):
    """One value for each direction of a layer."""

    forward: Value
    backward: Value | None = None  # None in a unidirectional network

    @property
    def directions(self) -> tuple[Value, ...]:
        """The value of each direction, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


class DirectionTrace(NamedTuple):
    """Values of one direction of a layer at every step, in the order of time; zero at skipped steps."""

    gates: dict[str, Array]  # (T, *batch, H) by name; for the LSTM i, f, g and o, of which g is the candidate
    c: Any  # (T, *batch, H), the cell state after the step; None for a cell without one, a dict for several states
    cell_output: Array  # (T, *batch, H), the output of the cell: h before the projection and zoneout
    h: Array  # (T, *batch, P), the hidden state after the step


class Trace(NamedTuple):
    """Results of a call and the intermediate values behind them."""

    layers: tuple[PerDirection[DirectionTrace], ...]  # lowest layer first
    step_mask: Array  # (T, *batch) bool: False at the steps that lengths and mask skip
    ys: Array  # (T, *batch, D*P), outputs of the call
    state: State  # final state of the call
    cell: Cell  # the declaration of the gates


class Perturbations(NamedTuple):
    """Arrays added to the states of one direction at every step; zeros, to differentiate with respect to them."""

    h: Array  # (T, *batch, P), added to h after the step
    c: Any  # (T, *batch, H), added to c within the step, before h is computed from it; None or a dict as c is


def trace(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
    static: Float[ArrayLike, "*batch S"] | None = None,
) -> Trace:
    """Records every gate, candidate, cell state and output of ``lstm(params, xs, ...)`` without a key.

    The gates are those that the cell declares, after their activations.

    Args:
      lstm: the network.
      params: from ``lstm.init``.
      xs: inputs ``(T, *batch, I)`` with T at least 1.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.
      static: as in the call.

    Raises:
      ValueError, TypeError: as the call does, and for a sequence without steps.
    """
    args = check_args(lstm, params, xs, state, lengths=lengths, mask=mask, resets=resets, static=static)
    result = record_trace(lstm, args, validation.flag("reverse", reverse))
    layers = [PerDirection(*(sort_gates(values) for values in layer.directions)) for layer in result.layers]
    return result._replace(layers=tuple(layers))


def sort_gates(values: DirectionTrace) -> DirectionTrace:
    """Sorts the gates in the order i, f, g, o, followed by others; JAX sorts the keys of a dict alphabetically."""

    def rank(name: str) -> tuple[int, str]:
        return (GATE_ORDER.index(name) if name in GATE_ORDER else len(GATE_ORDER), name)

    return values._replace(gates={name: values.gates[name] for name in sorted(values.gates, key=rank)})


def check_args(lstm: RNN, params: Params, xs: Any, state: Any = None, **options: Any) -> CallArgs:
    """Validates the arguments of a call without a key, of an LSTM over at least one step.

    Raises:
      ValueError, TypeError: as the call does, for another network, and for a sequence without steps.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    args = lstm.check_call(params, xs, state, **options)
    if len(args.xs) == 0:
        raise ValueError("xs must have at least one step, got none")
    return args


@partial(jax.jit, static_argnames=("lstm", "reverse", "cut_w_h"))
def record_trace(
    lstm: RNN,
    args: CallArgs,
    reverse: bool,
    perturbations: Sequence[PerDirection[Perturbations]] | None = None,
    *,
    cut_w_h: bool = False,
) -> Trace:
    """Records a call by the equations of the reference backend, as a compiled function.

    Args:
      lstm: the network.
      args: from `check_args`.
      reverse: whether time runs backward.
      perturbations: added to the states, by layer; None for none.
      cut_w_h: whether no gradient passes through ``W_h h``: only elementwise paths lead from a step to the next one.
    """
    layers: list[PerDirection[DirectionTrace]] = []

    def run_layer(layer: Layer, xs: Array, state: State, inputs: LayerInputs, reverse: bool) -> tuple[Array, State]:
        added = None if perturbations is None else perturbations[len(layers)]
        values, new_state = masking.scan_masked(
            _recording_backend(lstm, added, reverse, cut_w_h),
            layer,
            xs,
            state,
            inputs,
            reverse=reverse,
            batch_axes=xs.ndim - 2,
            merge=tuple,
        )
        layers.append(PerDirection(*values))
        return masking.concat_directions(lstm.output_dtype)([each.h for each in values]), new_state

    ys, state = lstm.scan_layers(args, reverse, run_layer)
    step_mask = masking.step_mask(len(args.xs), args.lengths, args.mask)
    if step_mask is None:
        step_mask = jnp.ones(args.xs.shape[:-1], bool)
    return Trace(tuple(layers), step_mask, ys, state, lstm.resolved_cell)


def _recording_backend(
    lstm: RNN, perturbations: PerDirection[Perturbations] | None, reverse: bool, cut_w_h: bool
) -> Callable[[tuple[Direction, ...]], Results]:
    """Returns a backend whose outputs are `DirectionTrace`."""
    # Without rematerialization: the recorded values are kept anyway, and perturbations cover the whole sequence.
    context = lstm.scan_context(lstm.regularizer_rates)._replace(remat=None)

    def run(directions: tuple[Direction, ...]) -> Results:
        fns = []
        for d, direction in enumerate(directions):
            added = None if perturbations is None else perturbations.directions[d]
            if reverse ^ (d == 1):  # a direction that runs backward in time is flipped, and so are its perturbations
                added = jax.tree.map(lambda a: jnp.flip(a, 0), added)
            fns.append(_recording_fns(lstm.resolved_cell, direction, context, added, cut_w_h))
        return scan_directions(fns, directions, context)

    return run


def _recording_fns(
    cell: Cell, direction: Direction, context: ScanContext, perturbations: Perturbations | None, cut_w_h: bool
) -> ScanFns:
    """Returns the recurrence of one direction; its inputs at a step are ``(z_x, perturbations)``."""
    weights = direction.weights

    def project(xs: Array) -> tuple[Array, Perturbations | None]:
        folded = jax.tree.map(lambda a: a.reshape(*xs.shape[:2], a.shape[-1]), perturbations)
        return project_inputs(weights, xs, context.dtype, context.accum_dtype), folded

    def step(
        inputs_t: tuple[Array, Perturbations | None], state: State, masks: RegularizerMasks
    ) -> tuple[State, DirectionTrace]:
        z_x, perturbation = inputs_t
        recording_cell, recorded = _record(cell, None if perturbation is None else perturbation.c)
        new_state = recurrent_step(
            recording_cell,
            weights,
            z_x,
            state,
            context.dtype,
            context.rates,
            masks,
            z_static=direction.z_static,
            multiplied_h=lax.stop_gradient(state.h) if cut_w_h else None,
        )
        if perturbation is not None:
            new_state = new_state._replace(h=new_state.h + perturbation.h)
        return new_state, DirectionTrace(c=new_state.c, h=new_state.h, **recorded)

    return ScanFns(project, step)


def _record(cell: Cell, c_perturbation: Any) -> tuple[Cell, dict[str, Any]]:
    """Returns a cell that records its gates and its output, and the dict that receives them.

    Args:
      cell: the cell; a vanilla one has no gates, its slab is the output.
      c_perturbation: added to the new cell state before the output reads it; None for none.
    """
    recorded: dict[str, Any] = {"gates": {}}

    def record_gates(values: dict[str, Array]) -> None:
        if cell.has_cell_state or cell.num_gates > 1:
            recorded["gates"] |= {name: a for name, a in values.items() if name in cell.activations}

    @wraps(cell.output)
    def output(**values: Array) -> Array:
        record_gates(values)
        recorded["cell_output"] = cell.output(**values)
        return recorded["cell_output"]

    if cell.update is None:
        return replace(cell, output=output), recorded

    @wraps(cell.update)
    def update(**values: Array) -> Any:
        assert cell.update is not None
        record_gates(values)
        new = cell.update(**values)
        if c_perturbation is None:
            return new
        added = cell.states_by_name(c_perturbation).values()
        return tuple(a + b for a, b in zip(new, added)) if len(added) > 1 else new + c_perturbation

    return replace(cell, output=output, update=update), recorded
