"""cuDNN's LSTM on NVIDIA GPUs, through `jax.experimental.rnn`: one call for both directions, and for all layers.

Where there is dropout between layers, which cuDNN would draw by keys of its own, it is one call for each. The products
are taken in TF32, with 10 bits of mantissa, as cuDNN does by default; under ``jax.default_matmul_precision("highest")``
in float32.

It knows nothing of `jax.jvp`, second derivatives and `jax.vmap`: the last is refused here, the others by JAX.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import rnn
from jaxtyping import Float, Int

from jaxlstm.cells import CELLS, Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.params import Layer, State, Weights
from jaxlstm.recurrence.context import How


def run(
    cell: Cell, layers: Layer | tuple[Layer, ...], xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time or several, all directions in one call. The signature is that of `jaxlstm.recurrence`.

    Raises:
      ValueError: while tracing, for what cuDNN's LSTM cannot do; the message names it.
    """
    layers = (layers,) if isinstance(layers, Layer) else layers
    check(cell, layers[0], xs.dtype, how)
    steps, rows, inputs = xs.shape
    directions, units = len(layers[0].directions), state.h.shape[-1]
    if rows == 0:
        return jnp.zeros((steps, 0, directions * units), how.dtype), state
    lengths = (
        jnp.full(rows, steps, jnp.int32) if how.lengths is None else jnp.clip(how.lengths, 0, steps).astype(jnp.int32)
    )
    # cuDNN's first direction runs forward: where ours runs backward, two change places and one has its inputs turned.
    swapped, turned = how.reverse and directions == 2, how.reverse and directions == 1
    weights = [layer.directions for layer in layers]
    if swapped:
        weights = [tuple(map(partial(_swap_inputs, n), reversed(each))) for n, each in enumerate(weights)]
        state = _swap(state)
    x = _turn(xs, lengths) if turned else xs
    arguments = (jnp.swapaxes(x, 0, 1), state.h, state.c, pack(tuple(itertools.chain(*weights))))
    _refuse_vmap(*map(lax.stop_gradient, arguments))
    sizes = (inputs, units, len(layers), 0.0, directions == 2, _precision())
    outputs: Any = rnn.lstm(*arguments, jnp.maximum(lengths, 1), *sizes)  # it takes no row of length 0
    y, h, c = outputs
    ys = jnp.swapaxes(y, 0, 1)
    if turned:
        ys = _turn(ys, lengths)
    held = (lengths == 0)[None, :, None]
    last = jax.tree.map(lambda new, old: jnp.where(held, old, new), State(h, c), state)
    return (jnp.roll(ys, units, -1), _swap(last)) if swapped else (ys, last)


def _swap(state: State) -> State:
    """With the two directions of each layer in the other order."""
    return jax.tree.map(lambda a: jnp.flip(a.reshape(-1, 2, *a.shape[1:]), 1).reshape(a.shape), state)


def _swap_inputs(n: int, w: Weights) -> Weights:
    """The weights of the n-th layer where the directions of the layer below have changed places."""
    return w if n == 0 else w._replace(w_x=jnp.roll(w.w_x, w.w_x.shape[1] // 2, 1))


def check(cell: Cell, layer: Layer, dtype: jnp.dtype, how: How) -> None:
    """Refuse, by name, what cuDNN's LSTM cannot do."""
    if not _on_cuda():
        raise ValueError(f"implementation='cudnn' needs an NVIDIA GPU, got the backend {jax.default_backend()!r}")
    w = layer.forward
    lacking = {
        "a cell other than 'lstm'": cell != CELLS["lstm"],
        "a projection": w.w_p is not None,
        "layer normalisation": w.norm is not None,
        "a dtype other than float32": {jnp.dtype(d) for d in (dtype, how.dtype, w.w_h.dtype)} != {jnp.dtype("float32")},
        "zoneout": how.rates.zoneout_h != 0 or how.rates.zoneout_c != 0,
        "recurrent dropout": how.noise != RegularizerMasks(),
        "remat": how.remat is not None,
        "resets": how.resets is not None,
        "a mask; lengths it takes": how.mask is not None and how.lengths is None,
    }
    for what, present in lacking.items():
        if present:
            raise ValueError(f"implementation='cudnn' does not take {what}")


def pack(weights: tuple[Weights, ...]) -> Float[Array, " numbers"]:
    """The weights, by layer and direction, as cuDNN takes them: all matrices, then all biases, of which it has two.

    Ours is the first.
    """
    matrices = [w.ravel() for each in weights for w in (each.w_x, each.w_h)]
    biases = []
    for each in weights:
        none = jnp.zeros(each.w_h.shape[:1], each.w_h.dtype)
        biases += [none if each.b is None else each.b, none]
    return jnp.concatenate(matrices + biases)


def _turn(xs: Float[Array, "T B N"], lengths: Int[Array, " B"]) -> Float[Array, "T B N"]:
    """Each row's first steps, as many as its length, in reverse."""
    step = jnp.arange(len(xs), dtype=lengths.dtype)[:, None]
    turned = lengths[None] - 1 - step
    return jnp.take_along_axis(xs, jnp.where(turned < 0, step, turned)[..., None], axis=0)


def _precision() -> lax.Precision:
    """Said here and not left to be looked up, since the backward pass is traced when the context may be gone."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return lax.Precision.HIGHEST if asked in FULL else lax.Precision.HIGH


FULL = ("highest", "float32")  # values of jax.default_matmul_precision


def _on_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


@custom_vmap
def _refuse_vmap(*arrays: Array) -> tuple[Array, ...]:
    return arrays


@_refuse_vmap.def_vmap
def _mapped(size: int, mapped: Any, *arrays: Array) -> Any:
    raise ValueError("implementation='cudnn' does not take jax.vmap; batch axes of xs it takes")
