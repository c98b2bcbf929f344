"""What LSTMs of other libraries for JAX compute, outputs and gradients; run this file to record it anew.

pip install dm-haiku==0.0.17 equinox==0.13.8 keras==3.15.1 && python tests/interop_cases.py

Recorded are the libraries that the tests do not install. PyTorch has a file of its own, `torch_cases`.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RECORDED = Path(__file__).parent / "vectors" / "interop.npz"
STEPS, BATCH, INPUT, HIDDEN = 5, 2, 3, 4

BOTH: dict[str, Any] = {"bidirectional": True}
DEEP: dict[str, Any] = {"num_layers": 2}
# Name: library, options of `jaxlstm.LSTM`, arguments of the library's builder below.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "haiku": ("haiku", {}, {}),
    "haiku deep": ("haiku", {"num_layers": 3}, {}),
    "haiku both deep": ("haiku", {**BOTH, **DEEP}, {}),
    "equinox": ("equinox", {}, {}),
    "equinox no bias": ("equinox", {**DEEP, "use_bias": False}, {}),
    "equinox both deep": ("equinox", {**BOTH, **DEEP}, {}),
    "keras": ("keras", {}, {}),
    "keras deep": ("keras", DEEP, {}),
    "keras both": ("keras", BOTH, {}),
    "keras both deep": ("keras", {**BOTH, **DEEP}, {}),
    "keras no bias": ("keras", {**BOTH, "use_bias": False}, {}),
    "keras rnn": ("keras", {"cell": "rnn", **BOTH, **DEEP}, {}),
    "keras rnn relu": ("keras", {"cell": "rnn", "activation": "relu"}, {}),
    "keras rnn sigmoid no bias": ("keras", {"cell": "rnn", "activation": "sigmoid", "use_bias": False, **DEEP}, {}),
    "linen": ("flax_linen", {}, {"cell": "LSTMCell"}),
    "linen optimized both": ("flax_linen", BOTH, {"cell": "OptimizedLSTMCell"}),
    "linen both deep": ("flax_linen", {**BOTH, **DEEP}, {"cell": "LSTMCell"}),
    "nnx deep": ("flax_nnx", DEEP, {"cell": "LSTMCell"}),
    "nnx both": ("flax_nnx", BOTH, {"cell": "LSTMCell"}),
    "nnx optimized": ("flax_nnx", {}, {"cell": "OptimizedLSTMCell"}),
    "nnx optimized both deep": ("flax_nnx", {**BOTH, **DEEP}, {"cell": "OptimizedLSTMCell"}),
    "cudnn": ("cudnn", {}, {}),
    "cudnn deep": ("cudnn", {"num_layers": 3}, {}),
    "cudnn both deep": ("cudnn", {**BOTH, **DEEP}, {}),
}
ZEROS = {"kernel_init": jax.nn.initializers.zeros, "recurrent_kernel_init": jax.nn.initializers.zeros}  # quickly made
NOT_INSTALLED = ("haiku", "equinox", "keras")  # by the tests


def layers(run_layer, num_layers, state, xs):
    """A stack, by a function of layer, its rows of the state, and inputs; all rows together and the outputs."""
    rows = [jax.tree.map(lambda a: jnp.split(a, num_layers)[n], state) for n in range(num_layers)]  # noqa: B023
    after = []
    for n, mine in enumerate(rows):
        last, xs = run_layer(n, mine, xs)
        after.append(last)
    return jax.tree.map(lambda *a: jnp.concatenate(a), *after), xs


def directions(run, n, state, xs):
    """A layer, by a function of direction, state of it and inputs in the order in which it takes them."""
    width = len(state["h"])
    after, outputs = [], []
    for d in range(width):
        last, ys = run(n * width + d, jax.tree.map(lambda a: a[d], state), xs[::-1] if d else xs)  # noqa: B023
        after.append(last)
        outputs.append(ys[::-1] if d else ys)
    return jax.tree.map(lambda *a: jnp.stack(a), *after), jnp.concatenate(outputs, -1)


def haiku(num_layers=1, bidirectional=False):
    """`hk.LSTM`, created layer by layer, forward before backward."""
    import haiku as hk

    def direction(k, state, xs):
        ys, last = hk.dynamic_unroll(hk.LSTM(HIDDEN), xs, hk.LSTMState(state["h"], state["c"]))
        return {"h": last.hidden, "c": last.cell}, ys

    net = hk.without_apply_rng(hk.transform(partial(layers, partial(directions, direction), num_layers)))
    rows = num_layers * (1 + bidirectional)
    return net.init(jax.random.key(0), zero_state(rows), jnp.zeros((STEPS, BATCH, INPUT))), net.apply


def equinox(num_layers=1, bidirectional=False, use_bias=True):
    """`equinox.nn.LSTMCell` under `jax.lax.scan`."""
    import equinox as eqx

    width = 1 + bidirectional

    def cell(n):
        return eqx.nn.LSTMCell(width * HIDDEN if n else INPUT, HIDDEN, use_bias, key=jax.random.key(0))

    pairs = [tuple(cell(n) for _ in range(width)) for n in range(num_layers)]

    def run(cells, state, xs):
        cells = jax.tree.leaves(cells, is_leaf=lambda x: isinstance(x, eqx.nn.LSTMCell))

        def direction(k, state, xs):
            def body(state, x):
                state = jax.vmap(cells[k])(x, state)
                return state, state[0]

            (h, c), ys = jax.lax.scan(body, (state["h"], state["c"]), xs)
            return {"h": h, "c": c}, ys

        return layers(partial(directions, direction), num_layers, state, xs)

    entries = pairs if bidirectional else [cell for (cell,) in pairs]
    return entries if num_layers > 1 else entries[0], run


def keras(num_layers=1, bidirectional=False, use_bias=True, cell="lstm", activation="tanh"):
    """`keras.layers.LSTM` or `SimpleRNN`, one layer after the other, alone or in `Bidirectional`."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    import keras

    keras.config.set_floatx("float64")
    common = {"use_bias": use_bias, "return_sequences": True, "return_state": True}
    modules = []
    for n in range(num_layers):
        if cell == "lstm":
            module = keras.layers.LSTM(HIDDEN, **common)
        else:
            module = keras.layers.SimpleRNN(HIDDEN, activation=activation, **common)
        if bidirectional:
            module = keras.layers.Bidirectional(module)
        for one in (module.forward_layer, module.backward_layer) if bidirectional else (module,):
            if activation == "tanh":
                one.cell.activation = jnp.tanh  # Keras's own takes float64 for float32 on JAX
        module.build((BATCH, STEPS, (1 + bidirectional) * HIDDEN if n else INPUT))
        modules.append(module)
    names = ("h", "c") if cell == "lstm" else ("h",)
    per_layer = len(modules[0].get_weights())

    def run(weights, state, xs):
        def layer(n, state, xs):
            first = [state[name][d] for d in range(1 + bidirectional) for name in names]
            mine = weights[n * per_layer : (n + 1) * per_layer]
            rest = [variable.value for variable in modules[n].non_trainable_variables]
            (ys, *last), _ = modules[n].stateless_call(mine, rest, jnp.swapaxes(xs, 0, 1), initial_state=first)
            last = {name: jnp.stack(last[k :: len(names)]) for k, name in enumerate(names)}
            return last, jnp.swapaxes(ys, 0, 1)

        return layers(layer, num_layers, state, xs)

    return [array for module in modules for array in module.get_weights()], run


def carry(state):
    """Flax's, c before h, of one direction or of two."""
    pairs = tuple((c, h) for h, c in zip(state["h"], state["c"]))
    return pairs if len(pairs) > 1 else pairs[0]


def rows(carry):
    """The way back."""
    pairs = carry if isinstance(carry[0], tuple) else (carry,)
    return {"h": jnp.stack([h for _, h in pairs]), "c": jnp.stack([c for c, _ in pairs])}


def flax_linen(cell, num_layers=1, bidirectional=False):
    """A cell of `flax.linen` in `RNN`, alone or two of them in `Bidirectional`; of several layers a dictionary."""
    import flax.linen as nn

    def rnn():
        return nn.RNN(getattr(nn, cell)(HIDDEN, param_dtype=jnp.float64, **ZEROS))

    modules = [nn.Bidirectional(rnn(), rnn()) if bidirectional else rnn() for _ in range(num_layers)]

    class Stack(nn.Module):
        def setup(self):
            if num_layers > 1:
                self.layers = modules  # under the names that nn.Sequential gives

        def __call__(self, state, xs):
            def layer(n, state, xs):
                last, ys = self.layers[n](xs, initial_carry=carry(state), return_carry=True, time_major=True)
                return rows(last), ys

            return layers(layer, num_layers, state, xs)

    def alone(weights, state, xs):
        last, ys = modules[0].apply(weights, xs, initial_carry=carry(state), return_carry=True, time_major=True)
        return rows(last), ys

    xs = jnp.zeros((STEPS, BATCH, INPUT))
    if num_layers == 1:
        return modules[0].init(jax.random.key(0), xs, time_major=True), alone
    return Stack().init(jax.random.key(0), zero_state(num_layers * (1 + bidirectional)), xs), Stack().apply


def flax_nnx(cell, num_layers=1, bidirectional=False):
    """A cell of `flax.nnx` in `RNN`, alone or two of them in `Bidirectional`; of several layers a list."""
    from flax import nnx

    def rnn(inputs):
        zeros = getattr(nnx, cell)(inputs, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **ZEROS)
        return nnx.RNN(zeros, rngs=False)

    def module(n):
        inputs = (1 + bidirectional) * HIDDEN if n else INPUT
        return nnx.Bidirectional(rnn(inputs), rnn(inputs), rngs=nnx.Rngs(0)) if bidirectional else rnn(inputs)

    split = [nnx.split(module(n)) for n in range(num_layers)]

    def run(weights, state, xs):
        states = weights if isinstance(weights, list) else [weights]

        def layer(n, state, xs):
            module = nnx.merge(*split[n], copy=True)
            nnx.update(module, states[n])
            last, ys = module(xs, initial_carry=carry(state), return_carry=True, time_major=True)
            return rows(last), ys

        return layers(layer, num_layers, state, xs)

    states = [nnx.to_pure_dict(nnx.state(nnx.merge(*parts), nnx.Param)) for parts in split]
    return states if num_layers > 1 else states[0], run


def cudnn(num_layers=1, bidirectional=False):
    """The reference of `jax.experimental.rnn`, which unpacks the vector that cuDNN takes."""
    from jax.experimental import rnn

    sizes = (INPUT, HIDDEN, num_layers, bidirectional)

    def run(vector, state, xs):
        lengths = jnp.full(BATCH, STEPS, jnp.int32)
        unpacked = rnn.unpack_lstm_weights(vector, *sizes)
        ys, h, c = rnn.lstm_ref(
            jnp.swapaxes(xs, 0, 1), state["h"], state["c"], *unpacked, lengths, *sizes[:3], 0.0, bidirectional
        )
        return {"h": h, "c": c}, jnp.swapaxes(ys, 0, 1)

    return jnp.zeros(rnn.get_num_params_in_lstm(*sizes)), run


BUILDERS = {
    "haiku": haiku, "equinox": equinox, "keras": keras, "flax_linen": flax_linen, "flax_nnx": flax_nnx, "cudnn": cudnn,
}  # fmt: skip


def zero_state(rows):
    return {name: jnp.zeros((rows, BATCH, HIDDEN)) for name in ("h", "c")}


def compute(name):
    """Weights, all of them random, inputs, outputs and the gradient of ``sum(y dy) + sum(h dh) + sum(c dc)``.

    Returns:
      Weights and their gradient as the library has them, a dictionary of all other arrays, and the function itself.
    """
    library, options, arguments = CASES[name]
    rng = np.random.default_rng(len(name))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    template, run = BUILDERS[library](**arguments, **options)
    weights = jax.tree.map(lambda a: 0.5 * normal(*a.shape), template)
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    state = {key: normal(count, BATCH, HIDDEN) for key in ("h", "c") if key == "h" or "cell" not in options}
    xs = normal(STEPS, BATCH, INPUT)
    (last, ys), transpose = jax.vjp(jax.jit(run), weights, state, xs)
    d_last, d_ys = jax.tree.map(lambda a: normal(*a.shape), (last, ys))
    d_weights, d_state, d_xs = transpose((d_last, d_ys))
    arrays = {"xs": xs, "ys": ys, "dys": d_ys, "grad.xs": d_xs}
    for key in state:
        arrays |= {f"{key}0": state[key], key: last[key], f"d{key}": d_last[key], f"grad.{key}0": d_state[key]}
    return weights, d_weights, {key: np.asarray(array) for key, array in arrays.items()}, run


def flat(tree):
    """The arrays of a tree of weights by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="|"): np.asarray(leaf) for path, leaf in leaves}


def record(path, names):
    """Write what these cases compute to a file."""
    arrays = {}
    for name in names:
        weights, d_weights, rest, _ = compute(name)
        arrays |= {f"{name}:{key}": array for key, array in rest.items()}
        arrays |= {f"{name}:weights:{key}": array for key, array in flat(weights).items()}
        arrays |= {f"{name}:gradient:{key}": array for key, array in flat(d_weights).items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path}: {len(arrays)} arrays, {Path(path).stat().st_size:,} bytes")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    record(sys.argv[1] if len(sys.argv) > 1 else RECORDED, [name for name in CASES if CASES[name][0] in NOT_INSTALLED])
