"""The contract of a backend of the recurrence: the types of its arguments and results.

A backend is a function::

    run(cell, directions, context) -> (outputs, states)

It runs each `Direction` forward in time and returns, for each, the outputs ``(T, B, P)`` and the state after the last
step. `jaxlstm.recurrence.masking` prepares the directions and merges the results: a direction that runs backward in
time is already flipped, resets are already restarts, all batch axes are one, and there is at least one step. In each
step a backend takes the state after `jaxlstm.recurrence.masking.restart`, and holds it where ``step_mask`` is False
(`jaxlstm.recurrence.masking.hold_skipped`); its outputs there are ignored.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks, RegularizerRates
from jaxlstm.params import State, Weights


class ScanContext(NamedTuple):
    """Options of the recurrence, the same for every direction."""

    rates: RegularizerRates
    dtype: jnp.dtype  # of the operands of matrix products, and of outputs
    accum_dtype: jnp.dtype  # of sums and of the state
    unroll: int = 1  # steps per iteration of the compiled loop
    remat: int | None = None  # steps per chunk whose intermediates are recomputed in the backward pass
    gradient_clip: float | None = None  # largest gradient of the h that a step reads, per number; None for no limit


def refuse_gradient_clip(name: str, context: ScanContext) -> None:
    """Raises a ValueError if gradients are to be clipped inside the recurrence, which ``name`` does not do."""
    if context.gradient_clip is not None:
        raise ValueError(
            f"{name} does not support recurrent_gradient_clip={context.gradient_clip}; use 'scan' or 'fused'"
        )


class LayerInputs(NamedTuple):
    """Masks and resets of a layer over time, and the state after a reset."""

    step_mask: Array | None = None  # (T, *batch) bool: steps where it is False are skipped
    resets: Array | None = None  # (T, *batch) bool: True at the first step of a new sequence
    lengths: Array | None = None  # (*batch,) int, if the step mask comes from lengths alone
    restart_state: State | None = None  # (D, *units), the state at a restart; zeros if None
    masks: RegularizerMasks = RegularizerMasks()  # (D, T, *batch, .)
    z_static: Array | None = None  # (D, *batch, G*H), W_s s; None if no gate reads static features


class Direction(NamedTuple):
    """One direction of a layer over a batch of sequences, flipped if necessary so that it runs forward in time."""

    weights: Weights
    xs: Array  # (T, B, I); for a convolutional network (T, B, *spatial, I)
    state: State  # h (B, P) and c (B, H), the initial state
    step_mask: Array | None  # (T, B) bool: steps where it is False are skipped
    restarts: Array | None  # (T, B) bool: the state is `restart_state` before steps where it is True
    restart_state: State | None  # h (P,) and c (H,); zeros if None
    masks: RegularizerMasks  # (T, B, .)
    z_static: Array | None = (
        None  # (B, G*H), `jaxlstm.recurrence.step.project_static`; None if no gate reads static features
    )


# Outputs and final state of each direction. Outputs are arrays (T, B, P), or trees of arrays for diagnostics.
Results = tuple[Sequence[Any], Sequence[State]]
Backend = Callable[[Cell, tuple[Direction, ...], ScanContext], Results]

only_traced = jax.make_user_context(default_value=False)
"""Context manager for calls that are traced and never run: within ``only_traced(True)`` no backend runs a check."""
