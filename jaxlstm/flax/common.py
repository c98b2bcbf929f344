"""Functions shared by the modules for nnx and linen: the call convention of Flax's `RNN`, carries and sharding."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlstm import validation
from jaxlstm.params import Params, State
from jaxlstm.rnn import RATES, RNN

MeshAxes = tuple[str | None, ...]  # the mesh axis of each axis of an array
Sharding = Mapping[str, MeshAxes]  # mesh axes by name of the array


def apply_to_sequence(
    lstm: RNN,
    params: Params,
    inputs: Array,
    *,
    initial_carry: State | None,
    seq_lengths: Array | None,
    mask: Array | None,
    resets: Array | None,
    static: Array | None,
    key: Array | None,
    time_major: bool,
    return_carry: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """Calls the network with the convention of Flax's `RNN`, and returns ``outputs`` or ``(carry, outputs)``.

    Unless ``time_major``, time is the last axis but one of ``inputs`` and of the outputs, and the last axis of ``mask``
    and ``resets``. All arguments are checked here, before they are moved, so that errors have the caller's names and
    shapes.
    """
    axes = "T, *batch" if time_major else "*batch, T"
    inputs = validation.inputs("inputs", promote_integers(inputs, lstm), (lstm.input_size,), axes)
    batch = inputs.shape[1:-1] if time_major else inputs.shape[:-2]
    mask, resets = (
        None if a is None else validation.array(name, a, jnp.bool_, inputs.shape[:-1])
        for name, a in (("mask", mask), ("resets", resets))
    )
    if seq_lengths is not None:
        seq_lengths = validation.lengths("seq_lengths", seq_lengths, batch)
    if initial_carry is not None:
        initial_carry = _check_state(initial_carry, lstm.state_shapes(batch))
    if not time_major:
        inputs = jnp.moveaxis(inputs, -2, 0)
        mask, resets = (None if a is None else jnp.moveaxis(a, -1, 0) for a in (mask, resets))
    outputs, carry = lstm(
        params,
        inputs,
        initial_carry,
        lengths=seq_lengths,
        mask=mask,
        resets=resets,
        reverse=reverse,
        key=key,
        static=static,
    )
    if reverse and not keep_order:
        outputs = _flip_valid_steps(outputs, seq_lengths)
    if not time_major:
        outputs = jnp.moveaxis(outputs, 0, -2)
    return (carry, outputs) if return_carry else outputs


def _flip_valid_steps(outputs: Array, lengths: Array | None) -> Array:
    """Reverses the order of the steps before each length; padding stays at the end."""
    if lengths is None:
        return jnp.flip(outputs, 0)
    num_steps = outputs.shape[0]
    lengths = jnp.minimum(validation.lengths("seq_lengths", lengths, outputs.shape[1:-1]), num_steps)
    steps = jnp.arange(num_steps, dtype=lengths.dtype).reshape(-1, *[1] * lengths.ndim)
    source_steps = (lengths[None] - 1 - steps) % num_steps
    return jnp.take_along_axis(outputs, source_steps[..., None], 0)


def override(name: str, default: bool, value: bool | None) -> bool:
    """Returns the argument of a call, or the default set on the module if the argument is None."""
    return validation.flag(name, default if value is None else value)


def is_stochastic(lstm: RNN) -> bool:
    """Returns whether the network has a regularizer, which draws from a key."""
    return any(getattr(lstm, name) for name in RATES)


def check_cell_options(lstm: RNN) -> None:
    """Checks that a configuration can run step by step from its inputs alone: a layer, a direction, no regularizers.

    Raises:
      ValueError: naming the option.
    """
    if lstm.num_static is not None:
        raise ValueError(f"LSTMCell takes no static features, which cell={lstm.cell!r} reads; use LSTM for the network")
    if lstm.num_layers > 1 or lstm.bidirectional:
        option = f"num_layers={lstm.num_layers}" if lstm.num_layers > 1 else "bidirectional=True"
        raise ValueError(f"LSTMCell is one layer in one direction, got {option}; use LSTM for the network")
    for name in RATES:
        if getattr(lstm, name):
            raise ValueError(f"{name}={getattr(lstm, name)} needs the whole sequence; use LSTM in place of LSTMCell")


def promote_integers(inputs: Any, lstm: RNN) -> Any:
    """Returns integers and booleans in the dtype of the network's products, as Flax's cells do."""
    if isinstance(inputs, Array | np.ndarray) and (
        jnp.issubdtype(inputs.dtype, jnp.integer) or inputs.dtype == jnp.bool_
    ):
        return jnp.asarray(inputs).astype(lstm.output_dtype)
    return inputs


def apply_step(lstm: RNN, params: Params, carry: Any, inputs: Array) -> tuple[Any, Array]:
    """Runs one step with a carry of Flax: ``(c, h)``, or h alone for a cell without c; or a `State` by name.

    c is a dictionary for a cell with several states.

    The new carry has the type of the old one, as scans require.
    """
    inputs = validation.inputs("inputs", promote_integers(inputs, lstm), (lstm.input_size,), "*batch")
    state = _state_from_carry(lstm, carry, inputs.shape[:-1])
    new_state, y = lstm.step(params, jax.tree.map(lambda a: a[None], state), inputs)
    if isinstance(carry, State):
        return jax.tree.map(lambda a: a[0], new_state), y
    new_carry = carry_from_state(new_state)
    return (list(new_carry) if isinstance(carry, list) else new_carry), y


def _state_from_carry(lstm: RNN, carry: Any, batch: tuple[int, ...]) -> State:
    """Returns the state that a carry of Flax holds, without an axis for layers.

    Raises:
      ValueError, TypeError: if it has another form or other shapes; other named tuples might have another order.
    """
    has_c = lstm.resolved_cell.has_cell_state
    is_pair = isinstance(carry, tuple | list) and len(carry) == 2 and not hasattr(carry, "_fields")
    if isinstance(carry, State):
        state = carry
    elif has_c and is_pair:
        state = State(h=carry[1], c=carry[0])
    elif not has_c and not isinstance(carry, tuple | list):
        state = State(h=carry, c=None)
    else:
        form = "(c, h)" if has_c else "h"
        raise TypeError(f"carry must be {form} or a jaxlstm.State(h, c), got {validation.describe(carry)}")
    expected = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), lstm.state_shapes(batch))
    return validation.state(state, expected, name="carry")


def _check_state(carry: Any, expected: State) -> State:
    """Returns the initial state of a network; refuses a plain pair, which is (c, h) in Flax and (h, c) elsewhere."""
    if not isinstance(carry, State):
        raise TypeError(f"initial_carry must be a jaxlstm.State(h, c), got {validation.describe(carry)}")
    return validation.state(carry, expected, name="initial_carry")


def carry_from_state(state: State) -> Any:
    """Returns the carry of Flax for the state of a single layer."""
    h, c = jax.tree.map(lambda a: a[0], state)
    return h if c is None else (c, h)


def annotate_params(
    params: Params, sharding: Sharding | None, annotate: Callable[[Any, MeshAxes | None], Any]
) -> Params:
    """Applies ``annotate(array, mesh_axes)`` to every parameter, with None for arrays that ``sharding`` does not name.

    Names are the same for every layer and direction: ``"w_x"``, ``"w_h"``, ``"b"``, ``"norm.x"`` and so on;
    ``"state.h"`` and ``"state.c"`` for a learned state; ``"norm"``, ``"feed_forward.w_up"`` and so on, and
    ``"residual.w_in"``, for a `jaxlstm.ResidualStack`.

    Raises:
      ValueError: if ``sharding`` has a name that no parameter has.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [_param_name(path) for path, _ in leaves]
    sharding = sharding or {}
    for name in sharding:
        if name not in names:
            known = ", ".join(map(repr, dict.fromkeys(names)))
            raise ValueError(f"sharding names {name!r}; expected names of parameters: {known}")
    return jax.tree.unflatten(structure, [annotate(a, sharding.get(name)) for name, (_, a) in zip(names, leaves)])


def _param_name(path: Any) -> str:
    """Returns the name of a parameter without its layer and direction, as in ``layers.0.forward.w_x``."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.split(".", 3)[-1] if name.startswith(("layers.", "residual.blocks.")) else name
