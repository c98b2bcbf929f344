"""Every gate, candidate, cell state and output of a run."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.diagnostics.jaxpr_probe import look
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.lstm import LSTM, CallArgs
from jaxlstm.params import Layer, Params, State, Weights
from jaxlstm.recurrence import masking, scan
from jaxlstm.recurrence.context import How
from jaxlstm.recurrence.step import input_part, step

ORDER = "ifgo"


class Steps(NamedTuple):
    """One layer in one direction, over time; zero at steps that are not taken."""

    gates: dict[str, Array]  # i, f, g and o for the LSTM, where g is the candidate: (T, *batch, H)
    c: Array | None  # (T, *batch, H), the cell state after the step; None for a cell that has none
    m: Array  # (T, *batch, H), the output of the units, which a projection and zoneout turn into h
    h: Array  # (T, *batch, P)


class Directions(NamedTuple):
    """One layer."""

    forward: Any
    backward: Any = None  # None where the layer runs in one direction

    @property
    def all(self) -> tuple[Any, ...]:
        """The directions there are, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


class Trace(NamedTuple):
    """A run with all that it computed on the way."""

    layers: tuple[Directions, ...]  # of `Steps`, the lowest layer first
    taken: Array  # (T, *batch) bool: the steps that lengths and mask leave in
    ys: Array  # (T, *batch, D*P), as the call returns it
    state: State  # as the call returns it


def trace(
    lstm: LSTM,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
) -> Trace:
    """Every gate, candidate, cell state and output of ``lstm(params, xs, ...)``, without a key.

    A cell of your own shows those of its values that it names by `jax.ad_checkpoint.checkpoint_name`.

    Args:
      lstm: the network.
      params: its parameters.
      xs: inputs of at least one step.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.

    Raises:
      ValueError, TypeError: as the call does, and for a sequence without steps.
    """
    arguments = checked(lstm, params, xs, state, lengths, mask, resets)
    found = _trace(lstm, arguments, validation.flag("reverse", reverse))
    return found._replace(layers=tuple(Directions(*map(in_order, layer.all)) for layer in found.layers))


def in_order(steps: Steps) -> Steps:
    """The gates in the order of `jaxlstm.cells`, others behind: a compiled function returns them by the alphabet."""
    return steps._replace(gates=dict(sorted(steps.gates.items(), key=lambda item: (ORDER + item[0]).index(item[0]))))


def checked(lstm: LSTM, *arguments: Any) -> CallArgs:
    """The arguments of a call without a key, validated; a sequence has at least one step."""
    if not isinstance(lstm, LSTM):
        raise TypeError(f"lstm must be a jaxlstm.LSTM, got {type(lstm).__name__}")
    valid = lstm._checked(*arguments)
    if len(valid.xs) == 0:
        raise ValueError("xs must have at least one step to look at, got none")
    return valid


@partial(jax.jit, static_argnums=(0, 2))
def _trace(lstm: LSTM, arguments: CallArgs, reverse: bool) -> Trace:
    return record(lstm, arguments, reverse)


class Nudges(NamedTuple):
    """Zeros that are added inside a run, for the derivative by them."""

    h: Array  # (T, *batch, P), to h after the step
    c: Array | None  # (T, *batch, H), to c in the step, before h is computed from it


def record(
    lstm: LSTM, arguments: CallArgs, reverse: bool, nudges: tuple[tuple[Nudges, ...], ...] | None = None
) -> Trace:
    """The trace of a run by the reference recurrence; ``nudges`` are by layer and direction."""
    layers: list[Directions] = []

    def run(cell: Cell, layer: Layer, xs: Array, state: State, how: How) -> tuple[Array, State]:
        mine = None if nudges is None else nudges[len(layers)]
        over_rows = partial(_layer, cell, layer, mine)
        how = how._replace(remat=None)
        steps, last = masking.steps_that_exist(over_rows, xs, state, how, batch_axes=xs.ndim - 2)
        layers.append(Directions(*steps))
        return jnp.concatenate([s.h for s in steps], axis=-1).astype(how.dtype), last

    ys, last = lstm._over_layers(run, arguments, reverse)
    marks = masking.steps_taken(len(arguments.xs), arguments.lengths, arguments.mask)
    taken = jnp.ones(arguments.xs.shape[:-1], bool) if marks is None else marks
    return Trace(tuple(layers), taken, ys, last)


def _layer(
    cell: Cell, layer: Layer, nudges: tuple[Nudges, ...] | None, xs: Array, state: State, how: How
) -> tuple[list[Steps], State]:
    """One layer over time, with one batch axis."""

    def equations(w: Weights, nudge: Nudges | None) -> scan.Equations:
        def inputs(xs: Array) -> Any:
            rows = jax.tree.map(lambda a: a.reshape(*xs.shape[:2], a.shape[-1]), nudge)
            return input_part(w, xs, how.dtype, state.h.dtype), rows

        return scan.Equations(inputs, partial(_step, cell, w, how))

    by_direction = [None] * len(layer.directions) if nudges is None else nudges
    return scan.over_time([equations(w, n) for w, n in zip(layer.directions, by_direction)], xs, state, how)


def _step(cell: Cell, w: Weights, how: How, now: Any, before: State, noise: RegularizerMasks) -> tuple[State, Steps]:
    """A step of `jaxlstm.step`, by a cell that shows what it computes."""
    z_x, nudge = now
    seen: dict[str, Any] = {}

    def gates(z: Array, c: Array | None, **options: Any) -> tuple[Array | None, Array]:
        (c, m), seen["gates"] = look(cell.gates, z, c, options, None if nudge is None else nudge.c)
        seen["m"] = m
        return c, m

    after = step(replace(cell, gates=gates), w, z_x, before, how.dtype, how.rates, noise)
    if nudge is not None:
        after = after._replace(h=after.h + nudge.h)
    return after, Steps(seen["gates"], after.c, seen["m"], after.h)
