"""cuDNN's LSTM on NVIDIA GPUs, through `jax.experimental.rnn`: one call for a layer and both of its directions.

What lies between layers, dropout among it, stays the caller's. The products are taken in TF32, with 10 bits of
mantissa, as cuDNN does by default; under ``jax.default_matmul_precision("highest")`` in float32.

It knows nothing of `jax.jvp`, second derivatives and `jax.vmap`: the last is refused here, the others by JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import rnn
from jaxtyping import Float, Int

from jaxlstm.cells import CELLS, Cell
from jaxlstm.dropout import Noise
from jaxlstm.recurrence.how import How
from jaxlstm.types import Layer, State, Weights


def run(
    cell: Cell, layer: Layer, xs: Float[Array, "T B I"], state: State, how: How
) -> tuple[Float[Array, "T B DP"], State]:
    """One layer over time, its directions in one call. The signature is that of `jaxlstm.recurrence`.

    Raises:
      ValueError: while tracing, for what cuDNN's LSTM cannot do; the message names it.
    """
    check(cell, layer, xs.dtype, how)
    steps, rows, inputs = xs.shape
    if rows == 0:
        return jnp.zeros((steps, 0, state.h.shape[0] * state.h.shape[-1]), how.dtype), state
    directions, units = len(layer.directions), state.h.shape[-1]
    lengths = (
        jnp.full(rows, steps, jnp.int32) if how.lengths is None else jnp.clip(how.lengths, 0, steps).astype(jnp.int32)
    )
    # cuDNN's first direction runs forward: where ours runs backward, two change places and one has its inputs turned.
    swapped, turned = how.reverse and directions == 2, how.reverse and directions == 1
    order = slice(None, None, -1) if swapped else slice(None)
    before = jax.tree.map(lambda a: a[order], state)
    x = _turn(xs, lengths) if turned else xs
    arguments = (jnp.swapaxes(x, 0, 1), before.h, before.c, pack(layer.directions[order]))
    _refuse_vmap(*map(lax.stop_gradient, arguments))
    sizes = (inputs, units, 1, 0.0, directions == 2, _precision())
    outputs: Any = rnn.lstm(*arguments, jnp.maximum(lengths, 1), *sizes)  # it takes no row of length 0
    y, h, c = outputs
    ys = jnp.swapaxes(y, 0, 1)
    if turned:
        ys = _turn(ys, lengths)
    if swapped:
        ys = jnp.concatenate([ys[..., units:], ys[..., :units]], axis=-1)
    held = (lengths == 0)[None, :, None]
    return ys, jax.tree.map(lambda new, old: jnp.where(held, old, new[order]), State(h, c), state)


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
        "zoneout": how.rates.zone_h != 0 or how.rates.zone_c != 0,
        "recurrent dropout": how.noise != Noise(),
        "remat": how.remat is not None,
        "resets": how.resets is not None,
        "a mask; lengths it takes": how.mask is not None and how.lengths is None,
    }
    for what, present in lacking.items():
        if present:
            raise ValueError(f"implementation='cudnn' does not take {what}")


def pack(directions: tuple[Weights, ...]) -> Float[Array, " numbers"]:
    """The weights as cuDNN takes them: all matrices, then all biases, of which it has two; ours is the first."""
    matrices = [w.ravel() for each in directions for w in (each.w_x, each.w_h)]
    biases = []
    for each in directions:
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
