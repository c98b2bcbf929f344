"""What the modules of nnx and of linen have in common: the manner of Flax's `RNN`, and names of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array

from jaxlstm import validation
from jaxlstm.lstm import LSTM, RATES
from jaxlstm.params import Params, State

Sharding = Mapping[str, tuple[str | None, ...]]  # of an array by its name: the mesh axis of each of its axes
NOWHERE: Sharding = FrozenDict()


def over_time(
    lstm: LSTM,
    params: Params,
    inputs: Array,
    initial_carry: State | None,
    seq_lengths: Array | None,
    mask: Array | None,
    resets: Array | None,
    key: Array | None,
    *,
    time_major: bool,
    return_carry: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """The network, called and returning as Flax's `RNN` is: ``outputs``, or ``(carry, outputs)``.

    Where the time axis of ``inputs`` is not the first, those of ``mask``, ``resets`` and outputs are not either.
    """
    if not time_major:
        inputs = jnp.moveaxis(validation.inputs("inputs", inputs, lstm.input_size, "*batch, T"), -2, 0)
        mask, resets = (None if a is None else jnp.moveaxis(jnp.asarray(a), -1, 0) for a in (mask, resets))
    ys, carry = lstm(
        params, inputs, initial_carry, lengths=seq_lengths, mask=mask, resets=resets, reverse=reverse, key=key
    )
    if reverse and not keep_order:
        ys = _in_order_of_reading(ys, seq_lengths)
    if not time_major:
        ys = jnp.moveaxis(ys, 0, -2)
    return (carry, ys) if return_carry else ys


def _in_order_of_reading(ys: Array, lengths: Array | None) -> Array:
    """Outputs of a run backward in time, the one of the step taken first in front; padding stays at the end."""
    if lengths is None:
        return jnp.flip(ys, 0)
    lengths = jnp.minimum(validation.counts(jnp.asarray(lengths)), ys.shape[0])
    steps = jnp.arange(ys.shape[0], dtype=lengths.dtype).reshape(-1, *[1] * lengths.ndim)
    return jnp.take_along_axis(ys, ((lengths[None] - 1 - steps) % ys.shape[0])[..., None], 0)


def is_stochastic(lstm: LSTM) -> bool:
    """Whether a key makes a difference."""
    return any(getattr(lstm, name) for name in RATES)


def check_cell(lstm: LSTM) -> None:
    """Refuse what a single step of one layer cannot do."""
    if lstm.num_layers > 1 or lstm.bidirectional:
        asked = f"num_layers={lstm.num_layers}" if lstm.num_layers > 1 else "bidirectional=True"
        raise ValueError(f"a cell is one layer in one direction, got {asked}; the network as a whole is in LSTM")
    for name in RATES:
        if getattr(lstm, name):
            raise ValueError(f"{name}={getattr(lstm, name)} needs the whole sequence: LSTM has it, a cell has not")


def step(lstm: LSTM, params: Params, carry: Any, inputs: Array) -> tuple[Any, Array]:
    """One step with a carry of Flax's: ``(c, h)``, or h alone for a cell without c."""
    c, h = carry if isinstance(carry, tuple) else (None, carry)
    after, y = lstm.step(params, jax.tree.map(lambda a: a[None], State(h, c)), inputs)
    return from_state(after), y


def from_state(state: State) -> Any:
    """A carry of Flax's from the state of a single layer."""
    h, c = jax.tree.map(lambda a: a[0], state)
    return h if c is None else (c, h)


def place(params: Params, sharding: Sharding, wrap: Callable[[Any, tuple[str | None, ...] | None], Any]) -> Params:
    """The parameters with ``wrap(array, axes)`` for each array, ``axes`` from ``sharding`` or None.

    An array goes by its name within a layer's weights, the same for every layer and direction, ``"w_x"``, ``"w_h"``,
    ``"b"``, ``"norm.x"``; a learned state's are ``"state.h"`` and ``"state.c"``.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [_name(path) for path, _ in leaves]
    for name in sharding:
        if name not in names:
            known = ", ".join(map(repr, dict.fromkeys(names)))
            raise ValueError(f"sharding names {name!r}; the parameters are {known}")
    return jax.tree.unflatten(structure, [wrap(a, sharding.get(name)) for name, (_, a) in zip(names, leaves)])


def _name(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.split(".", 3)[-1] if name.startswith("layers.") else name  # layers.0.forward.w_x
