"""Exports a network with its weights as a `jax.export.Exported`, and writes it to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.export import Exported, export, symbolic_shape

from jaxlstm import validation
from jaxlstm.atomic_write import atomic_write
from jaxlstm.errors import optional_package
from jaxlstm.params import Params, Size, State
from jaxlstm.rnn import RNN

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*PLATFORMS, "rocm")  # JAX accepts any name, and fails only when the program is called
_SHAPE_POLYMORPHIC = (None, "fused", "scan", "tensor_parallel")  # implementations that need no fixed number of steps

StateTuple = tuple[Array, Array | None]  # (h, c): programs that load the file do not know `State`


def sequence(
    lstm: RNN,
    params: Params,
    *,
    with_state: bool = False,
    with_lengths: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> Exported:
    """Exports ``lstm(params, xs)`` without a key, for any number of steps T and any batch size B of at least 1.

    Call the program as ``program.call(xs, state=(h, c), lengths=lengths)``, with only the requested arguments. It
    returns ``(ys, (h, c))``. Shapes: xs ``(T, B, I)``, ys ``(T, B, D*P)``, h ``(L*D, B, P)``, c ``(L*D, B, H)`` or None
    for a cell without c, lengths ``(B,)`` int32. xs and ys have the network's ``dtype``; the state is float32 or wider.

    Args:
      lstm: the network. Regularizers that need a key are left out.
      params: its parameters.
      with_state: whether the initial state is an argument.
      with_lengths: whether the lengths are an argument.
      platforms: platforms to lower the program for: ``"cpu"``, ``"cuda"``, ``"tpu"``, ``"rocm"``.

    Raises:
      ValueError, TypeError: for parameters of another configuration, an unknown platform, or an implementation that
        needs to know the number of steps.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    if lstm.implementation not in _SHAPE_POLYMORPHIC:
        raise ValueError(
            f"implementation={lstm.implementation!r} needs a fixed number of steps; export with implementation='fused'"
        )
    with_state, with_lengths = validation.flag("with_state", with_state), validation.flag("with_lengths", with_lengths)
    lstm = _without_step_counts(lstm)
    num_steps, batch_size = symbolic_shape("T, B")

    def call_network(
        xs: Array, state: StateTuple | None = None, lengths: Array | None = None
    ) -> tuple[Array, StateTuple]:
        ys, new_state = lstm(params, xs, None if state is None else State(*state), lengths=lengths)
        return ys, (new_state.h, new_state.c)

    arguments: dict[str, Any] = {}
    if with_state:
        arguments["state"] = _state_shapes(lstm, batch_size)
    if with_lengths:
        arguments["lengths"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    export_for_platforms = export(jax.jit(call_network), platforms=_check_platforms(platforms))
    return export_for_platforms(_input_shape(lstm, num_steps, batch_size), **arguments)


def step(lstm: RNN, params: Params, *, platforms: Sequence[str] = PLATFORMS) -> Exported:
    """Exports ``lstm.step(params, state, x)`` for any batch size B of at least 1, for streaming.

    Call the program as ``program.call((h, c), x)``. It returns ``((h, c), y)``. Shapes: x ``(B, I)``, y ``(B, P)``, h
    ``(L, B, P)``, c ``(L, B, H)`` or None for a cell without c. x and y have the network's ``dtype``; the state is
    float32 or wider. Start from zeros; a learned initial state is part of the program that `sequence` exports.

    Args:
      lstm: the network, with one direction.
      params: its parameters.
      platforms: as in `sequence`.

    Raises:
      ValueError, TypeError: for parameters of another configuration, a bidirectional network or an unknown platform.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    lstm = _without_step_counts(lstm)
    (batch_size,) = symbolic_shape("B")

    def call_step(state: StateTuple, x: Array) -> tuple[StateTuple, Array]:
        new_state, y = lstm.step(params, State(*state), x)
        return (new_state.h, new_state.c), y

    export_for_platforms = export(jax.jit(call_step), platforms=_check_platforms(platforms))
    return export_for_platforms(_state_shapes(lstm, batch_size), _input_shape(lstm, batch_size))


def save(program: Exported, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a program to a file, completely or not at all.

    Args:
      program: the result of `sequence`, `step` or ``jax.export.export``.
      path: path of the file.
      overwrite: whether to replace an existing file.

    Raises:
      FileExistsError: if the file exists and ``overwrite`` is False.
      ImportError: if flatbuffers, which JAX needs to serialize, is missing: ``pip install 'jaxlstm[export]'``.
      TypeError: if ``program`` is not an exported program, or ``overwrite`` not a bool.
    """
    validation.instance("program", program, Exported, "an exported program, such as jaxlstm.export.sequence returns")
    overwrite = validation.flag("overwrite", overwrite)
    with optional_package("flatbuffers", extra="export", purpose="saving a program"):
        import flatbuffers  # noqa: F401  (imported by `serialize`)
    with atomic_write(Path(path), overwrite=overwrite) as file:
        file.write(program.serialize())


def _check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    if isinstance(platforms, str) or not platforms:
        raise ValueError(f"platforms must be a sequence of at least one name, got {platforms!r}")
    return tuple(validation.choice("platforms", name, _KNOWN_PLATFORMS) for name in platforms)


def _without_step_counts(lstm: RNN) -> RNN:
    """Returns the network without `unroll` and `remat`, which need the number of steps; results are the same."""
    return validation.replace_quietly(lstm, unroll=1, remat=None)


def _input_shape(lstm: RNN, *leading: Size) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*leading, lstm.input_size), lstm.output_dtype)


def _state_shapes(lstm: RNN, batch_size: Size) -> tuple[Any, ...]:
    return tuple(lstm.state_shapes((batch_size,)))
