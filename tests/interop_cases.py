"""Outputs and gradients of recurrent networks in other JAX libraries; run this file to record them again.

pip install dm-haiku==0.0.17 equinox==0.13.8 keras==3.15.1 && python tests/interop_cases.py

Only libraries that the tests do not install are recorded. PyTorch has its own file, `torch_cases`.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RECORDED = Path(__file__).parent / "vectors" / "interop.npz"
STEPS, BATCH, INPUT, HIDDEN = 5, 2, 3, 4

BOTH: dict[str, Any] = {"bidirectional": True}
DEEP: dict[str, Any] = {"num_layers": 2}
# Name: library, options of `jaxlstm.LSTM`, other arguments of the library's builder below.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "haiku": ("haiku", {}, {}),
    "haiku deep": ("haiku", {"num_layers": 3}, {}),
    "haiku both deep": ("haiku", {**BOTH, **DEEP}, {}),
    "haiku rnn": ("haiku", {"cell": "rnn", "activation": "relu", **BOTH, **DEEP}, {}),
    "equinox": ("equinox", {}, {}),
    "equinox no bias": ("equinox", {**DEEP, "use_bias": False}, {}),
    "equinox both deep": ("equinox", {**BOTH, **DEEP}, {}),
    "keras": ("keras", {}, {}),
    "keras deep": ("keras", DEEP, {}),
    "keras both": ("keras", BOTH, {}),
    "keras both deep": ("keras", {**BOTH, **DEEP}, {}),
    "keras no bias": ("keras", {**BOTH, "use_bias": False}, {}),
    "equinox gru both deep": ("equinox", {"cell": "gru", **BOTH, **DEEP}, {}),
    "equinox gru no bias": ("equinox", {"cell": "gru", "use_bias": False}, {}),
    "keras gru both deep": ("keras", {"cell": "gru", **BOTH, **DEEP}, {}),
    "keras gru no bias": ("keras", {"cell": "gru", "use_bias": False}, {}),
    "keras rnn": ("keras", {"cell": "rnn", **BOTH, **DEEP}, {}),
    "keras rnn relu": ("keras", {"cell": "rnn", "activation": "relu"}, {}),
    "keras rnn sigmoid no bias": ("keras", {"cell": "rnn", "activation": "sigmoid", "use_bias": False, **DEEP}, {}),
    "linen": ("flax_linen", {}, {"cell_class": "LSTMCell"}),
    "linen optimized both": ("flax_linen", BOTH, {"cell_class": "OptimizedLSTMCell"}),
    "linen both deep": ("flax_linen", {**BOTH, **DEEP}, {"cell_class": "LSTMCell"}),
    "nnx deep": ("flax_nnx", DEEP, {"cell_class": "LSTMCell"}),
    "nnx both": ("flax_nnx", BOTH, {"cell_class": "LSTMCell"}),
    "nnx optimized": ("flax_nnx", {}, {"cell_class": "OptimizedLSTMCell"}),
    "nnx optimized both deep": ("flax_nnx", {**BOTH, **DEEP}, {"cell_class": "OptimizedLSTMCell"}),
    "linen gru both deep": ("flax_linen", {"cell": "gru", **BOTH, **DEEP}, {"cell_class": "GRUCell"}),
    "nnx gru both deep": ("flax_nnx", {"cell": "gru", **BOTH, **DEEP}, {"cell_class": "GRUCell"}),
    "cudnn": ("cudnn", {}, {}),
    "cudnn deep": ("cudnn", {"num_layers": 3}, {}),
    "cudnn both deep": ("cudnn", {**BOTH, **DEEP}, {}),
}
ZERO = jax.nn.initializers.zeros
ZEROS = {"kernel_init": ZERO, "recurrent_kernel_init": ZERO}  # fast to compile
RECORDED_LIBRARIES = ("haiku", "equinox", "keras")


def run_layers(run_layer, num_layers, state, xs):
    """Runs a stack of layers.

    Args:
      run_layer: ``(layer, state, xs) -> (state, ys)``.
      num_layers: number of layers.
      state: arrays ``h`` and ``c`` of all layers and directions, in the order of `jaxlstm.State`.
      xs: inputs ``(T, B, size)``.

    Returns:
      The final state of all layers, and the outputs of the last.
    """
    new_states = []
    for n in range(num_layers):
        layer_state = {name: jnp.split(array, num_layers)[n] for name, array in state.items()}
        new_state, xs = run_layer(n, layer_state, xs)
        new_states.append(new_state)
    return jax.tree.map(lambda *a: jnp.concatenate(a), *new_states), xs


def run_directions(run_direction, layer, state, xs):
    """Runs the directions of a layer.

    Args:
      run_direction: ``(cell index, state, xs) -> (state, ys)``; the inputs of the backward direction are reversed.
      layer: index of the layer.
      state: arrays ``h`` and ``c`` of the directions of this layer.
      xs: inputs ``(T, B, size)``.

    Returns:
      The final state of all directions, and their concatenated outputs.
    """
    num_directions = len(state["h"])
    new_states, outputs = [], []
    for d in range(num_directions):
        direction_state = {name: array[d] for name, array in state.items()}
        new_state, ys = run_direction(layer * num_directions + d, direction_state, xs[::-1] if d else xs)
        new_states.append(new_state)
        outputs.append(ys[::-1] if d else ys)
    return jax.tree.map(lambda *a: jnp.stack(a), *new_states), jnp.concatenate(outputs, -1)


def haiku(num_layers=1, bidirectional=False, cell="lstm", activation=None):
    """Builds `hk.LSTM` or `hk.VanillaRNN` modules, created layer by layer, forward before backward."""
    import haiku as hk

    del activation  # hk.VanillaRNN has relu

    def run_direction(index, state, xs):
        if cell == "rnn":
            ys, h = hk.dynamic_unroll(hk.VanillaRNN(HIDDEN), xs, state["h"])
            return {"h": h}, ys
        ys, new_state = hk.dynamic_unroll(hk.LSTM(HIDDEN), xs, hk.LSTMState(state["h"], state["c"]))
        return {"h": new_state.hidden, "c": new_state.cell}, ys

    run_layer = partial(run_directions, run_direction)
    net = hk.without_apply_rng(hk.transform(partial(run_layers, run_layer, num_layers)))
    state = zero_state(num_layers * (1 + bidirectional), cell)
    return net.init(jax.random.key(0), state, jnp.zeros((STEPS, BATCH, INPUT))), net.apply


def equinox(num_layers=1, bidirectional=False, use_bias=True, cell="lstm"):
    """Builds `equinox.nn.LSTMCell` or `GRUCell` modules under `jax.lax.scan`."""
    import equinox as eqx

    num_directions = 1 + bidirectional
    cell_class = eqx.nn.GRUCell if cell == "gru" else eqx.nn.LSTMCell

    def create_cell(layer):
        input_size = num_directions * HIDDEN if layer else INPUT
        return cell_class(input_size, HIDDEN, use_bias, key=jax.random.key(0))

    pairs = [tuple(create_cell(n) for _ in range(num_directions)) for n in range(num_layers)]

    def apply(cells, state, xs):
        cells = jax.tree.leaves(cells, is_leaf=lambda x: isinstance(x, cell_class))

        def run_direction(index, state, xs):
            def scan_step(state, x):
                state = jax.vmap(cells[index])(x, state)
                return state, state if cell == "gru" else state[0]

            if cell == "gru":
                h, ys = jax.lax.scan(scan_step, state["h"], xs)
                return {"h": h}, ys
            (h, c), ys = jax.lax.scan(scan_step, (state["h"], state["c"]), xs)
            return {"h": h, "c": c}, ys

        return run_layers(partial(run_directions, run_direction), num_layers, state, xs)

    entries = pairs if bidirectional else [cell for (cell,) in pairs]
    return entries if num_layers > 1 else entries[0], apply


def keras(num_layers=1, bidirectional=False, use_bias=True, cell="lstm", activation="tanh"):
    """Builds a list of `keras.layers.LSTM`, `GRU` or `SimpleRNN`, each in a `Bidirectional` for two directions."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    import keras

    keras.config.set_floatx("float64")
    options = {"use_bias": use_bias, "return_sequences": True, "return_state": True}
    modules = []
    for n in range(num_layers):
        layer_class = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}[cell]
        module = layer_class(HIDDEN, activation=activation, **options)
        if bidirectional:
            module = keras.layers.Bidirectional(module)
        for layer in (module.forward_layer, module.backward_layer) if bidirectional else (module,):
            if activation == "tanh":
                layer.cell.activation = jnp.tanh  # Keras's tanh returns float32 for float64 on JAX
        module.build((BATCH, STEPS, (1 + bidirectional) * HIDDEN if n else INPUT))
        modules.append(module)
    names = state_names(cell)
    arrays_per_layer = len(modules[0].get_weights())

    def apply(weights, state, xs):
        def run_layer(n, state, xs):
            initial_state = [state[name][d] for d in range(1 + bidirectional) for name in names]
            layer_weights = weights[n * arrays_per_layer : (n + 1) * arrays_per_layer]
            other_variables = [variable.value for variable in modules[n].non_trainable_variables]
            (ys, *new_state), _ = modules[n].stateless_call(
                layer_weights, other_variables, jnp.swapaxes(xs, 0, 1), initial_state=initial_state
            )
            stacked = {name: jnp.stack(new_state[k :: len(names)]) for k, name in enumerate(names)}
            return stacked, jnp.swapaxes(ys, 0, 1)

        return run_layers(run_layer, num_layers, state, xs)

    return [array for module in modules for array in module.get_weights()], apply


def to_flax_carry(state):
    """Converts a state to the carry of Flax: (c, h), or h without c; a pair of these for two directions."""
    carries = tuple(zip(state["c"], state["h"])) if "c" in state else tuple(state["h"])
    return carries if len(carries) > 1 else carries[0]


def from_flax_carry(carry, old_state):
    """Converts a carry of Flax to a state like the old one."""
    carries = carry if len(old_state["h"]) > 1 else (carry,)
    if "c" not in old_state:
        return {"h": jnp.stack(carries)}
    return {"h": jnp.stack([h for _, h in carries]), "c": jnp.stack([c for c, _ in carries])}


def flax_linen(cell_class, num_layers=1, bidirectional=False, cell="lstm"):
    """Builds `flax.linen` cells in `RNN`, two of them in `Bidirectional` for two directions."""
    import flax.linen as nn

    def create_rnn():
        return nn.RNN(getattr(nn, cell_class)(HIDDEN, param_dtype=jnp.float64, **ZEROS))

    modules = [
        nn.Bidirectional(create_rnn(), create_rnn()) if bidirectional else create_rnn() for _ in range(num_layers)
    ]

    class Stack(nn.Module):
        def setup(self):
            if num_layers > 1:
                self.layers = modules  # with the names that nn.Sequential gives

        def __call__(self, state, xs):
            def run_layer(n, state, xs):
                carry = to_flax_carry(state)
                carry, ys = self.layers[n](xs, initial_carry=carry, return_carry=True, time_major=True)
                return from_flax_carry(carry, state), ys

            return run_layers(run_layer, num_layers, state, xs)

    def apply_single_layer(weights, state, xs):
        carry = to_flax_carry(state)
        carry, ys = modules[0].apply(weights, xs, initial_carry=carry, return_carry=True, time_major=True)
        return from_flax_carry(carry, state), ys

    xs = jnp.zeros((STEPS, BATCH, INPUT))
    if num_layers == 1:
        return abstract_init(modules[0], xs, time_major=True), apply_single_layer
    return abstract_init(Stack(), zero_state(num_layers * (1 + bidirectional), cell), xs), Stack().apply


def abstract_init(module, *args, **kwargs):
    """Returns the shapes of a linen module's variables, without running the module."""
    return jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), *args)


def flax_nnx(cell_class, num_layers=1, bidirectional=False, cell="lstm"):
    """Builds `flax.nnx` cells in `RNN`, two of them in `Bidirectional` for two directions; a list of several layers."""
    from flax import nnx

    def create_rnn(input_size):
        zeros = getattr(nnx, cell_class)(input_size, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **ZEROS)
        return nnx.RNN(zeros, rngs=False)

    def create_module(layer):
        size = (1 + bidirectional) * HIDDEN if layer else INPUT
        if not bidirectional:
            return create_rnn(size)
        return nnx.Bidirectional(create_rnn(size), create_rnn(size), rngs=nnx.Rngs(0))

    graphs_and_states = [nnx.split(create_module(n)) for n in range(num_layers)]

    def apply(weights, state, xs):
        layer_weights = weights if isinstance(weights, list) else [weights]

        def run_layer(n, state, xs):
            module = nnx.merge(*graphs_and_states[n], copy=True)
            nnx.update(module, layer_weights[n])
            carry, ys = module(xs, initial_carry=to_flax_carry(state), return_carry=True, time_major=True)
            return from_flax_carry(carry, state), ys

        return run_layers(run_layer, num_layers, state, xs)

    states = [nnx.to_pure_dict(nnx.state(nnx.merge(*parts), nnx.Param)) for parts in graphs_and_states]
    return states if num_layers > 1 else states[0], apply


def cudnn(num_layers=1, bidirectional=False):
    """Builds the reference of `jax.experimental.rnn`, which takes cuDNN's weight vector."""
    from jax.experimental import rnn

    sizes = (INPUT, HIDDEN, num_layers, bidirectional)

    def apply(vector, state, xs):
        lengths = jnp.full(BATCH, STEPS, jnp.int32)
        unpacked = rnn.unpack_lstm_weights(vector, *sizes)
        ys, h, c = rnn.lstm_ref(
            jnp.swapaxes(xs, 0, 1), state["h"], state["c"], *unpacked, lengths, *sizes[:3], 0.0, bidirectional
        )
        return {"h": h, "c": c}, jnp.swapaxes(ys, 0, 1)

    return jnp.zeros(rnn.get_num_params_in_lstm(*sizes)), apply


# Each builder returns weights, of which only the structure and shapes matter, and `apply(weights, state, xs)`.
BUILDERS = {
    "haiku": haiku, "equinox": equinox, "keras": keras, "flax_linen": flax_linen, "flax_nnx": flax_nnx, "cudnn": cudnn,
}  # fmt: skip


def state_names(cell):
    """The arrays of the state of a cell."""
    return ("h", "c") if cell == "lstm" else ("h",)


def zero_state(num_cells, cell):
    return {name: jnp.zeros((num_cells, BATCH, HIDDEN)) for name in state_names(cell)}


class Computed(NamedTuple):
    """A case with random weights, as computed by the other library."""

    weights: Any  # as the library has them
    weight_gradient: Any  # of ``sum(y dy) + sum(h dh) + sum(c dc)``
    arrays: dict[str, np.ndarray]  # all other arrays, as `framework_parity.assert_parity` takes them
    rerun: Callable[[Any], tuple[Any, Any]]  # (final state, ys) with other weights, by the same compiled program


def compute(name):
    """Runs a case."""
    library, options, arguments = CASES[name]
    rng = np.random.default_rng(len(name))

    def normal(shape):
        return jnp.asarray(rng.standard_normal(shape))

    template, apply = BUILDERS[library](**arguments, **options)
    weights = jax.tree.map(lambda a: 0.5 * normal(a.shape), template)
    num_cells = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    names = state_names(options.get("cell", "lstm"))
    state = {key: normal((num_cells, BATCH, HIDDEN)) for key in names}
    xs = normal((STEPS, BATCH, INPUT))
    cotangents = jax.tree.map(lambda a: normal(a.shape), jax.eval_shape(apply, weights, state, xs))

    @jax.jit
    def run(weights):
        outputs, pull_back = jax.vjp(apply, weights, state, xs)
        return outputs, pull_back(cotangents)

    (new_state, ys), (weight_gradient, state_gradient, xs_gradient) = run(weights)
    state_cotangents, ys_cotangent = cotangents
    arrays = {"xs": xs, "ys": ys, "dys": ys_cotangent, "grad.xs": xs_gradient}
    for key in names:
        arrays |= {
            f"{key}0": state[key],
            key: new_state[key],
            f"d{key}": state_cotangents[key],
            f"grad.{key}0": state_gradient[key],
        }
    arrays = {key: np.asarray(array) for key, array in arrays.items()}
    return Computed(weights, weight_gradient, arrays, lambda other_weights: run(other_weights)[0])


def flatten(tree):
    """Returns the arrays of a tree of weights by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="|"): np.asarray(leaf) for path, leaf in leaves}


def record(path, names):
    """Writes the results of these cases to a file."""
    arrays = {}
    for name in names:
        computed = compute(name)
        arrays |= {f"{name}:{key}": array for key, array in computed.arrays.items()}
        arrays |= {f"{name}:weights:{key}": array for key, array in flatten(computed.weights).items()}
        arrays |= {f"{name}:gradient:{key}": array for key, array in flatten(computed.weight_gradient).items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path}: {len(arrays)} arrays, {Path(path).stat().st_size:,} bytes")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    recorded_cases = [name for name in CASES if CASES[name][0] in RECORDED_LIBRARIES]
    record(sys.argv[1] if len(sys.argv) > 1 else RECORDED, recorded_cases)
