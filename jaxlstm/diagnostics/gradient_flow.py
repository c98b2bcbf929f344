"""Norms of the gradients and Jacobians through time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jaxlstm import validation
from jaxlstm.diagnostics.trace import PerDirection, Perturbations, Trace, check_args, record_trace
from jaxlstm.network import CallArgs
from jaxlstm.params import Layer, Params, State
from jaxlstm.primitives.pytrees import tree_index
from jaxlstm.rnn import RNN

MatrixNorm = Literal["frobenius", "spectral"]
NORM_ORDERS = {"frobenius": "fro", "spectral": 2}  # the names of `jnp.linalg.norm`


class GradientNorms(NamedTuple):
    """Euclidean norms over the units of one direction of a layer; zero at skipped steps."""

    h: Array  # (T, *batch), of dL/dh_t, through the outputs and through all later states
    c: Array | None  # (T, *batch), of dL/dc_t, through h_t and through all later states; None for a cell without c


class GradientFlow(NamedTuple):
    """Gradients and Jacobians of a call through time."""

    loss: Array  # ()
    layers: tuple[PerDirection[GradientNorms], ...]  # lowest layer first
    jacobian: tuple[PerDirection[Array], ...] | None  # (T, *batch), norm of the Jacobian of a layer's final state with
    # respect to its state after step t, for fixed inputs of the layer; None if no Jacobian was requested
    network_jacobian: Array | None  # (T, *batch), the same for the states of all layers; None if bidirectional
    elementwise: tuple[PerDirection[GradientNorms], ...]  # of the part of the gradient that passes from step to step
    # without W_h, unit by unit: along c in an LSTM, by forget gates and peepholes; along h in a GRU, by its update gate
    through_w_h: tuple[PerDirection[GradientNorms], ...]  # of the rest: at some step it passes through W_h h


def gradient_flow(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T *batch I"],
    loss: Callable[[Array], Array],
    state: State | None = None,
    *,
    lengths: Int[ArrayLike, "*batch"] | None = None,
    mask: Bool[ArrayLike, "T *batch"] | None = None,
    resets: Bool[ArrayLike, "T *batch"] | None = None,
    reverse: bool = False,
    jacobian: MatrixNorm | None = "frobenius",
    static: Float[ArrayLike, "*batch S"] | None = None,
) -> GradientFlow:
    """Computes the norms of dL/dh_t, dL/dc_t, of their parts, and of the Jacobian of the final state by state t.

    The results are exact. One backward pass gives the gradients, a second one, whose gradient does not pass through
    ``W_h h``, their elementwise part. Another one, which propagates a matrix instead of a vector, gives the Jacobian;
    it costs as much as one backward pass per number in the state. The memory of all is linear in T.

    The gradient is the sum of two vectors, whose norms are ``elementwise`` and ``through_w_h``. A vanilla network has
    no elementwise path: before the last step all of its gradient passes through ``W_h``.

    Args:
      lstm: the network.
      params: from ``lstm.init``.
      xs: inputs ``(T, *batch, I)`` with T at least 1.
      loss: from the outputs ``ys (T, *batch, D*P)`` to the scalar L.
      state: initial state, as in the call.
      lengths: as in the call.
      mask: as in the call.
      resets: as in the call.
      reverse: as in the call.
      jacobian: ``"frobenius"``, the root of the sum of squares; ``"spectral"``, the largest factor by which a
        perturbation grows; None for no Jacobian.
      static: as in the call.

    Raises:
      ValueError, TypeError: as the call does, and for a sequence without steps or a loss that is not a scalar.
    """
    if jacobian is not None:
        validation.choice("jacobian", jacobian, NORM_ORDERS)
    args = check_args(lstm, params, xs, state, lengths=lengths, mask=mask, resets=resets, static=static)
    if jacobian is not None and lstm.residual:
        raise ValueError(f"jacobian={jacobian!r} supports plain stacks only, got {lstm!r}; set jacobian=None")
    reverse = validation.flag("reverse", reverse)

    def perturbed_loss(
        perturbations: Sequence[PerDirection[Perturbations]], cut_w_h: bool = False
    ) -> tuple[Array, Trace]:
        trace = record_trace(lstm, args, reverse, perturbations, cut_w_h=cut_w_h)
        value = loss(trace.ys)
        if jnp.shape(value) != ():
            raise ValueError(f"loss must return a scalar, got shape {list(jnp.shape(value))}")
        return value, trace

    perturbations = _zero_perturbations(lstm, args.xs)
    (value, trace), gradients = jax.value_and_grad(perturbed_loss, has_aux=True)(perturbations)
    elementwise = jax.grad(partial(perturbed_loss, cut_w_h=True), has_aux=True)(perturbations)[0]
    through_w_h = jax.tree.map(jnp.subtract, gradients, elementwise)
    norms, *parts = map(_norms_by_layer, (gradients, elementwise, through_w_h))
    if jacobian is None:
        return GradientFlow(value, norms, None, None, *parts)
    layer_jacobians = _layer_jacobian_norms(lstm, args, trace, reverse, jacobian)
    if lstm.bidirectional:
        network_jacobian = None
    elif lstm.num_layers == 1:
        network_jacobian = layer_jacobians[0].forward
    else:
        network_jacobian = _jacobian_norms(lstm, args, reverse, jacobian)
    return GradientFlow(value, norms, layer_jacobians, network_jacobian, *parts)


def _zero_perturbations(lstm: RNN, xs: Array) -> tuple[PerDirection[Perturbations], ...]:
    """Returns zeros for every layer, direction and step."""
    num_steps, *batch = xs.shape[:-1]
    shapes = lstm.state_shapes(tuple(batch))

    def zeros(shape: Any) -> Array:
        return jnp.zeros((num_steps, *shape.shape[1:]), shape.dtype)

    each = Perturbations(zeros(shapes.h), jax.tree.map(zeros, shapes.c))
    return (PerDirection(*[each] * lstm.num_directions),) * lstm.num_layers


def _norms_by_layer(gradients: Sequence[PerDirection[Perturbations]]) -> tuple[PerDirection[GradientNorms], ...]:
    return tuple(PerDirection(*map(_gradient_norms, layer.directions)) for layer in gradients)


def _gradient_norms(gradient: Perturbations) -> GradientNorms:
    return GradientNorms(*jax.tree.map(_scaled_norm, tuple(gradient)))


def _scaled_norm(a: Array) -> Array:
    """Returns the norm over the last axis; the squares of small numbers do not underflow."""
    scale = lax.stop_gradient(jnp.abs(a).max(-1))
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.linalg.norm(a / scale[..., None], axis=-1) * scale


def _layer_jacobian_norms(
    lstm: RNN, args: CallArgs, trace: Trace, reverse: bool, norm: MatrixNorm
) -> tuple[PerDirection[Array], ...]:
    """Returns the norms of the Jacobians of every layer and direction, each run as a network with the traced inputs."""
    layers, xs = [], args.xs
    for n, values in enumerate(trace.layers):
        norms = []
        for d in range(lstm.num_directions):
            single, params, state = _single_direction(lstm, args, n, d)
            single_args = args._replace(params=params, xs=xs, state=state)
            norms.append(_jacobian_norms(single, single_args, reverse ^ (d == 1), norm))
        layers.append(PerDirection(*norms))
        xs = jnp.concatenate([each.h for each in values.directions], axis=-1).astype(lstm.output_dtype)
    return tuple(layers)


def _single_direction(lstm: RNN, args: CallArgs, layer: int, direction: int) -> tuple[RNN, Params, State | None]:
    """Returns one direction of a layer as a network, with its parameters and initial state."""
    weights = args.params.layers[layer].directions[direction]
    single = replace(
        lstm,
        input_size=weights.w_x.shape[1],
        num_layers=1,
        bidirectional=False,
        dropout=0.0,  # between layers
        variational=False,
    )
    n = layer * lstm.num_directions + direction
    learned_state, state = tree_index((args.params.state, args.state), slice(n, n + 1))
    return single, Params((Layer(weights),), learned_state), state


@partial(jax.jit, static_argnums=(0, 2, 3))
def _jacobian_norms(lstm: RNN, args: CallArgs, reverse: bool, norm: MatrixNorm) -> Float[Array, "T *batch"]:
    """Returns the norm of the Jacobian of the final state with respect to the state after each step.

    The network has one direction. From the last step back, the Jacobian is multiplied by the Jacobian of one step at a
    time, so that only the states are saved.
    """
    lstm = replace(lstm, implementation="scan", remat=None)
    init_state, inputs = lstm.prepare_layers(args)
    steps = (args.xs, inputs.step_mask, inputs.resets)

    def apply_step(state: State, inputs_t: Any) -> State:
        x, mask, resets = jax.tree.map(lambda a: a[None], inputs_t)
        return lstm(args.params, x, state, mask=mask, resets=resets, reverse=reverse, static=args.static)[1]

    def forward_step(state: State, inputs_t: Any) -> tuple[State, State]:
        return apply_step(state, inputs_t), state

    def backward_step(jacobian: State, step: Any) -> tuple[State, Array]:
        state, inputs_t = step
        vjp = jax.vjp(lambda state: apply_step(state, inputs_t), state)[1]
        norm_t = _matrix_norm(jacobian, norm, num_batch_axes=args.xs.ndim - 2)
        return jax.vmap(lambda row: vjp(row)[0])(jacobian), norm_t

    final_state, states = lax.scan(forward_step, init_state, steps, reverse=reverse)
    return lax.scan(backward_step, _identity_jacobian(final_state), (states, steps), reverse=not reverse)[1]


def _identity_jacobian(state: State) -> State:
    """Returns the Jacobian of a state with respect to itself, for each sequence.

    Its arrays are ``(N, L, *batch, units)``, where N counts the numbers in the state of one sequence.
    """
    arrays, structure = jax.tree.flatten(state)
    sizes = [a.shape[0] * a.shape[-1] for a in arrays]
    blocks = []
    for n, (a, size) in enumerate(zip(arrays, sizes)):
        block = jnp.eye(sum(sizes), size, -sum(sizes[:n]), a.dtype)
        block = block.reshape(sum(sizes), a.shape[0], *[1] * (a.ndim - 2), a.shape[-1])
        blocks.append(jnp.broadcast_to(block, (sum(sizes), *a.shape)))
    return jax.tree.unflatten(structure, blocks)


def _matrix_norm(jacobian: State, norm: MatrixNorm, num_batch_axes: int) -> Float[Array, "*batch"]:
    """Returns the norm of the matrix of each sequence, whose columns are split into ``(N, L, *batch, units)``."""

    def columns(a: Array) -> Array:
        a = jnp.moveaxis(a, (0, 1), (num_batch_axes, num_batch_axes + 1))  # (*batch, N, L, units)
        return a.reshape(*a.shape[: num_batch_axes + 1], -1)

    matrix = jnp.concatenate([columns(a) for a in jax.tree.leaves(jacobian)], axis=-1)
    return jnp.linalg.norm(matrix, ord=NORM_ORDERS[norm], axis=(-2, -1))
