"""The reference backend: the equations of `jaxlstm.cells` under `jax.lax.scan`, differentiated by JAX.

The loop is `jaxlstm.recurrence.chunked_scan.scan_directions`, which runs other backends and diagnostics, too.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import State
from jaxlstm.primitives.mixed_precision_dot import dot
from jaxlstm.recurrence.chunked_scan import ScanFns, emit_hidden, layer_equations, scan_directions
from jaxlstm.recurrence.context import Direction, Results, ScanContext
from jaxlstm.recurrence.step import finish_step, require_form


@dataclass(frozen=True)
class Scan:
    """The backend with options: ``jaxlstm.LSTM(..., implementation=Scan(concatenate=True))``.

    Args:
      concatenate: whether each step multiplies the concatenated weights ``[W_x W_h]`` with ``[x; h]``, as the cells of
        other JAX libraries do, instead of adding ``W_h h`` to ``W_x x``, which is computed before the loop. Not with
        layer normalization. ``Scan()`` is the backend named ``"scan"``.

    Raises:
      TypeError: for an option of the wrong type.
    """

    concatenate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "concatenate", validation.flag("concatenate", self.concatenate))

    def __call__(self, cell: Cell, directions: tuple[Direction, ...], context: ScanContext) -> Results:
        """Runs the directions of a layer one after the other; see `jaxlstm.recurrence.context`.

        Raises:
          ValueError: while tracing, for ``concatenate`` with layer normalization.
        """
        equations = _concatenated_equations if self.concatenate else layer_equations
        return scan_directions([equations(cell, d, context) for d in directions], directions, context)


run = Scan()  # the backend named "scan"


def _concatenated_equations(cell: Cell, direction: Direction, context: ScanContext) -> ScanFns:
    weights = direction.weights
    require_form("Scan(concatenate=True)", cell, weights)
    if weights.norm is not None:
        raise ValueError(
            "Scan(concatenate=True) does not support layer_norm=True, which normalizes W_x x and W_h h separately; "
            "expected 'scan' or 'fused'"
        )
    matrix = jnp.concatenate([weights.w_x.T, weights.w_h.T])  # (I + P, G*H)

    def step(x: Array, state: State, masks: RegularizerMasks) -> State:
        x_and_h = jnp.concatenate([x.astype(context.accum_dtype), state.h], -1)
        z = dot(x_and_h, matrix, ((x_and_h.ndim - 1,), (0,)), context.dtype, context.accum_dtype)
        if weights.b is not None:
            z = z + jnp.broadcast_to(weights.b.astype(context.accum_dtype), z.shape)
        return finish_step(cell, weights, z, None, state, context.dtype, context.rates, masks)

    return ScanFns(lambda xs: xs, emit_hidden(step))
