"""cuDNN's LSTM on NVIDIA GPUs, through `jax.experimental.rnn`: one call for all layers and directions.

Experimental: it has never been run on a GPU. Its packing of weights, lengths and directions was checked on a CPU with
JAX's reference implementation in place of cuDNN, and it was lowered for CUDA.

With dropout between layers there is one call per layer, because cuDNN would draw its own masks. Products are computed
in TF32 with 10 bits of mantissa, the default of cuDNN; under ``jax.default_matmul_precision("highest")`` in float32.
Forward mode, second derivatives and `jax.vmap` do not work: the last is refused here, the others by JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import rnn
from jaxtyping import Float, Int

from jaxlstm.cells import CELLS, Cell
from jaxlstm.params import Layer, State, Weights
from jaxlstm.recurrence.context import LayerInputs, ScanContext
from jaxlstm.recurrence.step import unsupported_form

FLOAT32_PRECISIONS = ("highest", "float32")  # values of jax.default_matmul_precision that exclude TF32


def run_stack(
    cell: Cell,
    layers: tuple[Layer, ...],
    xs: Float[Array, "T B I"],
    state: State,
    inputs: LayerInputs,
    context: ScanContext,
    reverse: bool,
) -> tuple[Float[Array, "T B DP"], State]:
    """Runs a stack of layers over time by one call of cuDNN.

    Args:
      cell: the cell, which must be the one named ``"lstm"`` in `jaxlstm.cells`.
      layers: the weights.
      xs: inputs of the first layer, with at least one step.
      state: initial state, h and c ``(L*D, B, H)``.
      inputs: masks and resets; lengths are the only ones supported.
      context: options.
      reverse: whether the first direction runs backward in time, and the second forward.

    Returns:
      outputs of the last layer, and the final state of all layers.

    Raises:
      ValueError: while tracing, for an unsupported option, which the message names, and without an NVIDIA GPU.
    """
    check_supported(cell, layers[0], xs.dtype, inputs, context)
    num_steps, batch_size, input_size = xs.shape
    num_directions, hidden_size = len(layers[0].directions), state.h.shape[-1]
    if batch_size == 0:
        return jnp.zeros((num_steps, 0, num_directions * hidden_size), context.dtype), state
    if inputs.lengths is None:
        lengths = jnp.full(batch_size, num_steps, jnp.int32)
    else:
        lengths = jnp.clip(inputs.lengths, 0, num_steps).astype(jnp.int32)

    # cuDNN's first direction runs forward. If ours runs backward, one direction alone gets its inputs reversed in time,
    # and two directions are swapped.
    is_swapped, is_reversed = reverse and num_directions == 2, reverse and num_directions == 1
    if is_swapped:
        layers, state = swap_directions(layers), _swap_states(state)
    if is_reversed:
        xs = reverse_within_lengths(xs, lengths)
    operands = (jnp.swapaxes(xs, 0, 1), state.h, state.c, pack_weights(layers))
    _refuse_vmap(*(lax.stop_gradient(a) for a in operands))
    sizes = (input_size, hidden_size, len(layers), 0.0, num_directions == 2, _precision())
    results: Any = rnn.lstm(*operands, jnp.maximum(lengths, 1), *sizes)  # cuDNN takes no sequence of length 0
    ys, h, c = results
    ys = jnp.swapaxes(ys, 0, 1)
    is_empty = (lengths == 0)[None, :, None]
    new_state = jax.tree.map(lambda new, old: jnp.where(is_empty, old, new), State(h, c), state)
    if is_reversed:
        ys = reverse_within_lengths(ys, lengths)
    if is_swapped:
        ys, new_state = jnp.roll(ys, hidden_size, -1), _swap_states(new_state)
    return ys, new_state


def check_supported(cell: Cell, layer: Layer, dtype: jnp.dtype, inputs: LayerInputs, context: ScanContext) -> None:
    """Raises a ValueError that names the first option that cuDNN's LSTM does not support."""
    if not _has_cuda():
        raise ValueError(f"implementation='cudnn' needs an NVIDIA GPU, got the backend {jax.default_backend()!r}")
    weights, rates = layer.forward, context.rates
    dtypes = {jnp.dtype(d) for d in (dtype, context.dtype, weights.w_h.dtype)}
    unsupported = {
        "a cell other than 'lstm'": cell != CELLS["lstm"],
        "heads": unsupported_form(cell, weights) is not None,
        "a projection": weights.w_p is not None,
        "layer normalization": weights.norm is not None,
        "a dtype other than float32": dtypes != {jnp.dtype("float32")},
        "zoneout": rates.zoneout_h != 0 or rates.zoneout_c != 0,
        "recurrent dropout": inputs.masks.candidate_mask is not None,
        "remat": context.remat is not None,
        "recurrent_gradient_clip": context.gradient_clip is not None,
        "resets": inputs.resets is not None,
        "a mask; use lengths": inputs.step_mask is not None and inputs.lengths is None,
    }
    for name, is_used in unsupported.items():
        if is_used:
            raise ValueError(f"implementation='cudnn' does not support {name}")


def pack_weights(layers: tuple[Layer, ...]) -> Float[Array, " numbers"]:
    """Flattens the weights of all layers and directions into cuDNN's order: all matrices, then all biases.

    cuDNN has two biases per direction; the second is zero.
    """
    weights = [w for layer in layers for w in layer.directions]
    matrices = [matrix.ravel() for w in weights for matrix in (w.w_x, w.w_h)]
    biases = []
    for w in weights:
        zeros = jnp.zeros(w.w_h.shape[:1], w.w_h.dtype)
        biases += [zeros if w.b is None else w.b, zeros]
    return jnp.concatenate(matrices + biases)


def swap_directions(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Swaps the two directions of every layer, and the halves of the inputs that come from a layer below."""

    def swap_inputs(weights: Weights) -> Weights:
        return weights._replace(w_x=jnp.roll(weights.w_x, weights.w_x.shape[1] // 2, 1))

    first, *others = [Layer(*reversed(layer.directions)) for layer in layers]
    return (first, *(Layer(*(swap_inputs(w) for w in layer.directions)) for layer in others))


def _swap_states(state: State) -> State:
    """Swaps the two directions of every layer in ``(L*2, B, H)``."""
    return jax.tree.map(lambda a: jnp.flip(a.reshape(-1, 2, *a.shape[1:]), 1).reshape(a.shape), state)


def reverse_within_lengths(xs: Float[Array, "T B N"], lengths: Int[Array, " B"]) -> Float[Array, "T B N"]:
    """Reverses the steps of each sequence before its length; the steps after it stay in place."""
    step = jnp.arange(len(xs), dtype=lengths.dtype)[:, None]
    reversed_step = lengths[None] - 1 - step
    return jnp.take_along_axis(xs, jnp.where(reversed_step < 0, step, reversed_step)[..., None], axis=0)


def _precision() -> lax.Precision:
    """Resolves the precision now: the backward pass may be traced outside the precision context."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return lax.Precision.HIGHEST if precision in FLOAT32_PRECISIONS else lax.Precision.HIGH


def _has_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


@custom_vmap
def _refuse_vmap(*arrays: Array) -> tuple[Array, ...]:
    """Returns its arguments; raises an error under `jax.vmap`."""
    return arrays


@_refuse_vmap.def_vmap
def _raise_under_vmap(axis_size: int, in_batched: Any, *arrays: Array) -> Any:
    raise ValueError("implementation='cudnn' does not support jax.vmap; use the batch axes of xs")
