"""The gradient on its way back through time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.diagnostics.trace import Directions, Nudges, Trace, checked, record
from jaxlstm.lstm import LSTM, CallArgs
from jaxlstm.params import Layer, Params, State
from jaxlstm.recurrence import masking

NORMS = ("frobenius", "spectral")


class Norms(NamedTuple):
    """Euclidean norms over the units of one layer in one direction; zero at steps that are not taken."""

    h: Array  # (T, *batch), of dL/dh_t: on all its ways, as output and as part of the state
    c: Array | None  # (T, *batch), of dL/dc_t: on all its ways, to the next step and through h_t; None without c


class Flow(NamedTuple):
    """How gradients and perturbations pass through time."""

    loss: Array  # ()
    layers: tuple[Directions, ...]  # of `Norms`, the lowest layer first
    jacobian: tuple[Directions, ...] | None  # of (T, *batch), the norm of the Jacobian of the layer's state after its
    # last step with respect to that after step t, its inputs given; None where it was not asked for
    network_jacobian: Array | None  # (T, *batch), the same of the state of all layers; None for two directions


def gradient_flow(
    lstm: LSTM,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    loss: Callable[[Array], Array],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
    jacobian: str | None = "frobenius",
) -> Flow:
    """Norms of dL/dh_t and dL/dc_t for every step t, and of the Jacobian of the last state with respect to state t.

    Exact. One backward pass gives the gradients, and one more, of a matrix instead of a vector, the Jacobian; the
    memory of both grows as T. A Jacobian costs as much as one backward pass per number in the state.

    Args:
      lstm: the network.
      params: its parameters.
      xs: inputs of at least one step.
      loss: from the outputs ``ys (T, *batch, D*P)`` to the scalar L.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.
      jacobian: ``"frobenius"``, the root of the sum of squares; ``"spectral"``, the largest factor by which a
        perturbation grows; None for no Jacobian.

    Raises:
      ValueError, TypeError: as the call does, and for a sequence without steps or a loss that is not a scalar.
    """
    if jacobian is not None:
        validation.choice("jacobian", jacobian, NORMS)
    arguments = checked(lstm, params, xs, state, lengths, mask, resets)
    validation.flag("reverse", reverse)

    def total(nudges: Any) -> tuple[Array, Trace]:
        trace = record(lstm, arguments, reverse, nudges)
        value = loss(trace.ys)
        if jnp.shape(value) != ():
            raise ValueError(f"loss must return a scalar, got shape {list(jnp.shape(value))}")
        return value, trace

    (value, trace), gradient = jax.value_and_grad(total, has_aux=True)(_nudges(lstm, arguments.xs))
    norms = [Directions(*(_norms(direction) for direction in layer)) for layer in gradient]
    if jacobian is None:
        return Flow(value, tuple(norms), None, None)
    layers, xs = [], arguments.xs
    for n, layer in enumerate(arguments.params.layers):
        alone = []
        for d in range(len(layer.directions)):
            one, params = _alone(lstm, arguments.params, n, d)
            mine = arguments._replace(params=params, xs=xs, state=_row(lstm, arguments.state, n, d))
            alone.append(_jacobian_norms(one, mine, reverse ^ (d == 1), jacobian))
        layers.append(Directions(*alone))
        xs = jnp.concatenate([s.h for s in trace.layers[n].all], -1).astype(trace.ys.dtype)
    network = None
    if not lstm.bidirectional:
        network = layers[0].forward if len(layers) == 1 else _jacobian_norms(lstm, arguments, reverse, jacobian)
    return Flow(value, tuple(norms), tuple(layers), network)


def _nudges(lstm: LSTM, xs: Array) -> tuple[tuple[Nudges, ...], ...]:
    """Zeros for every layer, direction and step."""
    shapes = lstm.state_shapes(xs.shape[1:-1])

    def zeros(shape: Any) -> Array:
        return jnp.zeros((len(xs), *shape.shape[1:]), shape.dtype)

    each = Nudges(zeros(shapes.h), None if shapes.c is None else zeros(shapes.c))
    return ((each,) * lstm.num_directions,) * lstm.num_layers


def _norms(gradient: Nudges) -> Norms:
    h, c = gradient
    return Norms(jnp.linalg.norm(h, axis=-1), None if c is None else jnp.linalg.norm(c, axis=-1))


def _row(lstm: LSTM, state: Any, layer: int, direction: int) -> Any:
    """The part of a state ``(L*D, ...)`` that belongs to one layer and direction."""
    n = layer * lstm.num_directions + direction
    return jax.tree.map(lambda a: a[n : n + 1], state)


def _alone(lstm: LSTM, params: Params, layer: int, direction: int) -> tuple[LSTM, Params]:
    """One layer in one direction, as a network."""
    weights = params.layers[layer].directions[direction]
    alone = replace(lstm, input_size=weights.w_x.shape[1], num_layers=1, bidirectional=False)
    return alone, Params((Layer(weights),), _row(lstm, params.state, layer, direction))


def _jacobian_norms(lstm: LSTM, arguments: CallArgs, reverse: bool, kind: str) -> Float[Array, "T *batch"]:
    """The norm of the Jacobian of the last state with respect to that after each step, for one direction.

    From the last step back, the Jacobian is multiplied by that of one step at a time: only the states are kept.
    """
    lstm = replace(lstm, implementation="scan", remat=None)
    params, xs, state, lengths, mask, resets, _ = arguments
    mask = masking.steps_taken(len(xs), lengths, mask)

    def one_step(before: State, now: Any) -> State:
        x, taken, first = jax.tree.map(lambda a: a[None], now)
        return lstm(params, x, before, mask=taken, resets=first, reverse=reverse)[1]

    def forward(before: State, now: Any) -> tuple[State, State]:
        return one_step(before, now), before

    def backward(jacobian: State, step: Any) -> tuple[State, Array]:
        before, now = step
        transpose = jax.vjp(lambda before: one_step(before, now), before)[1]
        return jax.vmap(lambda row: transpose(row)[0])(jacobian), _matrix_norm(jacobian, kind, xs.ndim - 2)

    now = (xs, mask, resets)
    last, befores = lax.scan(forward, state, now, reverse=reverse)
    return lax.scan(backward, _identity(last), (befores, now), reverse=not reverse)[1]


def _identity(state: State) -> State:
    """The Jacobian of a state with respect to itself, a row for each of its numbers, for each sequence."""
    sizes = [a.shape[0] * a.shape[-1] for a in jax.tree.leaves(state)]
    rows, begin, blocks = sum(sizes), 0, []
    for a, size in zip(jax.tree.leaves(state), sizes):
        block = jnp.eye(rows, size, -begin, a.dtype).reshape(rows, a.shape[0], *[1] * (a.ndim - 2), a.shape[-1])
        blocks.append(jnp.broadcast_to(block, (rows, *a.shape)))
        begin += size
    return jax.tree.unflatten(jax.tree.structure(state), blocks)


def _matrix_norm(jacobian: State, kind: str, batch: int) -> Float[Array, "*batch"]:
    """The norm for each sequence of ``(rows, L, *batch, units)`` blocks that stand side by side."""

    def columns_last(a: Array) -> Array:
        a = jnp.moveaxis(a, (0, 1), (batch, batch + 1))  # (*batch, rows, L, units)
        return a.reshape(*a.shape[: batch + 1], -1)

    matrix = jnp.concatenate([columns_last(a) for a in jax.tree.leaves(jacobian)], -1)
    return jnp.linalg.norm(matrix, ord="fro" if kind == "frobenius" else 2, axis=(-2, -1))
