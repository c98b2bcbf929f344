"""Inference as a file that any program with JAX can load and call, without this package (`jax.export`)::

    export.save(export.sequence(lstm, params), "sequence.jax")
    export.save(export.step(lstm, params), "step.jax")

and elsewhere::

    sequence = jax.export.deserialize(bytearray(Path("sequence.jax").read_bytes()))
    ys, (h, c) = jax.jit(sequence.call)(xs)                  # any number of steps, any batch

The weights are in the file. The program is lowered for every platform that is named, in the layout of arrays that
suits the machine it is made on. How long a file stays loadable is JAX's to say: it promises six months.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.export import Exported, export, symbolic_shape

from jaxlstm import validation
from jaxlstm.atomic_write import atomic_write
from jaxlstm.lstm import LSTM
from jaxlstm.params import Params, State, output_dtype

PLATFORMS = ("cpu", "cuda", "tpu")
FOR_ANY_SIZE = (None, "fused", "scan", "sharded")  # implementations
KNOWN = (*PLATFORMS, "rocm")  # JAX itself takes any name and fails where the program is called


def sequence(
    lstm: LSTM,
    params: Params,
    *,
    with_state: bool = False,
    with_lengths: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> Exported:
    """``lstm(params, xs)`` without a key, for any number of steps T and any batch B of at least 1.

    The program is called as ``program.call(xs, state=(h, c), lengths=lengths)``, with those that were asked for, and
    returns ``(ys, (h, c))``. The shapes are those of the network's own call: xs ``(T, B, I)``, ys ``(T, B, D*P)``, h
    ``(L*D, B, P)``, c ``(L*D, B, H)`` or None for a cell without it, lengths ``(B,)``, of int32. xs and ys have the
    network's ``dtype``, the state is float32 or wider.

    Args:
      lstm: a network; regularisers that only a key turns on are left out.
      params: its parameters.
      with_state: whether the initial state is an argument.
      with_lengths: whether the lengths are an argument.
      platforms: that the program is lowered for, by JAX's names.

    Raises:
      ValueError, TypeError: for parameters of another configuration, an unknown platform, or an implementation that
        has to know the number of steps.
    """
    if lstm.implementation not in FOR_ANY_SIZE:
        raise ValueError(f"implementation={lstm.implementation!r} has to know the number of steps; 'fused' does not")
    lstm = _for_any_size(lstm)
    num_steps, batch = symbolic_shape("T, B")

    def run(xs: Array, state: Any = None, lengths: Array | None = None) -> tuple[Array, tuple[Array | None, ...]]:
        ys, last = lstm(params, xs, None if state is None else State(*state), lengths=lengths)
        return ys, tuple(last)

    options: dict[str, Any] = {}
    if with_state:
        options["state"] = _state(lstm, params, batch)
    if with_lengths:
        options["lengths"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return export(jax.jit(run), platforms=_known(platforms))(_inputs(lstm, num_steps, batch), **options)


def step(lstm: LSTM, params: Params, *, platforms: Sequence[str] = PLATFORMS) -> Exported:
    """``lstm.step(params, state, x)`` for any batch B of at least 1, for streaming.

    The program is called as ``program.call((h, c), x)`` and returns ``((h, c), y)``, with x ``(B, I)`` and y ``(B, P)``
    in the network's ``dtype``, h ``(L, B, P)`` and c ``(L, B, H)`` or None for a cell without it, float32 or wider. The
    state before the first step is zeros; a learned one is in what `sequence` exports.

    Args:
      lstm: a network of one direction.
      params: its parameters.
      platforms: that the program is lowered for, by JAX's names.

    Raises:
      ValueError, TypeError: for parameters of another configuration, a bidirectional network or an unknown platform.
    """
    lstm = _for_any_size(lstm)
    (batch,) = symbolic_shape("B")

    def run(state: Any, x: Array) -> tuple[tuple[Array | None, ...], Array]:
        after, y = lstm.step(params, State(*state), x)
        return tuple(after), y

    return export(jax.jit(run), platforms=_known(platforms))(_state(lstm, params, batch), _inputs(lstm, batch))


def save(program: Exported, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a program to a file, whole or not at all.

    Args:
      program: from `sequence`, `step` or ``jax.export.export``.
      path: of the file.
      overwrite: whether a file that is there may be replaced.

    Raises:
      FileExistsError: if there is one and it may not.
      ImportError: where flatbuffers, by which JAX writes programs, is not installed: ``pip install 'jaxlstm[export]'``.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "a program is written with flatbuffers, which is not installed: pip install 'jaxlstm[export]'"
        )
    with atomic_write(Path(path), overwrite=overwrite) as file:
        file.write(program.serialize())


def _known(platforms: Sequence[str]) -> tuple[str, ...]:
    if isinstance(platforms, str) or not platforms:
        raise ValueError(f"platforms must be a sequence of at least one name, got {platforms!r}")
    return tuple(validation.choice("platforms", name, KNOWN) for name in platforms)


def _for_any_size(lstm: LSTM) -> LSTM:
    """The network without what divides the number of steps: it has a use only where that is known, or for gradients."""
    return dataclasses.replace(lstm, unroll=1, remat=None)


def _inputs(lstm: LSTM, *leading: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*leading, lstm.input_size), output_dtype(lstm.dtype, lstm.param_dtype))


def _state(lstm: LSTM, params: Params, batch: Any) -> tuple[Any, ...]:
    """Shape and dtype of the state, as a plain tuple: a program that loads the file knows no `State`."""
    return tuple(jax.eval_shape(lambda: lstm.initial_state((batch,), params)))
