"""The table of networks and inputs that every backend is checked on, and the values the oracle gives for them."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxlstm
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout, dropout_mask, regularizer_key

BACKENDS = ("scan", "fused")  # the default tier; the experimental backends have their own tests
INPUT_SIZE, HIDDEN_SIZE, NUM_STEPS, BATCH_SIZE = 3, 5, 7, 4
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "two layers bidirectional projection": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "wide projection without bias": {"use_bias": False, "proj_size": 6},
    "rnn": {"cell": "rnn"},
    "rnn relu bidirectional remat": {"cell": "rnn", "activation": "relu", "bidirectional": True, "remat": 3},
    "rnn sigmoid projection": {"cell": "rnn", "activation": "sigmoid", "proj_size": 2},
    "remat": {"remat": 3},
    "remat one chunk": {"remat": 50},
    "unroll": {"unroll": 2},
    "peephole": {"cell": "peephole"},
    "peephole bidirectional projection": {"cell": "peephole", "bidirectional": True, "proj_size": 2},
    "cifg": {"cell": "cifg"},
    "layer norm": {"layer_norm": True},
    "layer norm peephole bidirectional": {
        "layer_norm": True, "cell": "peephole", "use_bias": False, "bidirectional": True, "proj_size": 2,
    },
    "layer norm rnn": {"layer_norm": True, "cell": "rnn"},
    "learned state": {"learned_state": True, "bidirectional": True, "proj_size": 2},
    "zoneout expected": {"zoneout_h": 0.3, "zoneout_c": 0.2, "proj_size": 3},
    "zoneout rnn": {"zoneout_h": 0.3, "cell": "rnn", "bidirectional": True},
    "recurrent dropout": {"recurrent_dropout": 0.4, "cell": "cifg"},
    "weight drop": {"weight_drop": 0.4, "bidirectional": True},
    "dropout": {"dropout": 0.4, "num_layers": 3, "cell": "rnn"},
    "variational": {
        "dropout": 0.4, "input_dropout": 0.3, "output_dropout": 0.2, "variational": True, "num_layers": 2,
        "cell": "rnn", "weight_drop": 0.4, "zoneout_h": 0.3,
    },
    "gru": {"cell": "gru"},
    "gru two layers bidirectional": {"cell": "gru", "num_layers": 2, "bidirectional": True, "remat": 3},
    "gru layer norm zoneout": {"cell": "gru", "layer_norm": True, "zoneout_h": 0.3, "learned_state": True},
    "gru heads": {"cell": "gru", "heads": 2, "hidden_size": 4, "use_bias": False},
    "slstm": {"cell": "slstm"},
    "slstm heads": {"cell": "slstm", "heads": 2, "hidden_size": 4, "recurrent_dropout": 0.4},
    "minlstm": {"cell": "minlstm", "recurrent_dropout": 0.4, "bidirectional": True},
    "mingru layer norm": {"cell": "mingru", "layer_norm": True},
    "indrnn": {"cell": "indrnn"},
    "paralstm": {"cell": "paralstm", "learned_state": True, "zoneout_c": 0.2},
    "ea": {"cell": "ea", "static_size": 2, "num_layers": 2, "bidirectional": True, "proj_size": 3},
    "all options of a layer": {
        "cell": "peephole", "layer_norm": True, "learned_state": True, "proj_size": 2, "remat": 3, "input_dropout": 0.2,
        "output_dropout": 0.2, "weight_drop": 0.3, "recurrent_dropout": 0.4, "zoneout_h": 0.3, "zoneout_c": 0.2,
    },
}  # fmt: skip
WITH_KEY = (
    "zoneout rnn",
    "recurrent dropout",
    "weight drop",
    "dropout",
    "variational",
    "all options of a layer",
    "slstm heads",
    "minlstm",
)
INPUTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "lengths": ("lengths",),
    "mask": ("mask",),
    "resets": ("resets",),
    "lengths and mask": ("lengths", "mask"),
    "lengths and resets": ("lengths", "resets"),
    "mask and resets": ("mask", "resets"),
    "everything": ("lengths", "mask", "resets"),
    "reverse": ("reverse",),
    "lengths reverse": ("lengths", "reverse"),
    "resets reverse": ("resets", "reverse"),
    "everything reverse": ("lengths", "mask", "resets", "reverse"),
}
# Every configuration is checked with all masks together, the first one with all inputs. Time is flipped and masked by
# the same code for all configurations, so two of them stand for the others where time runs backward.
TABLE = [
    (configuration, inputs)
    for configuration in CONFIGURATIONS
    for inputs in INPUTS
    if configuration == "one layer" or inputs == "everything"
] + [("learned state", "everything reverse"), ("bidirectional", "reverse"), ("bidirectional", "lengths")]


@dataclass(frozen=True)
class Case:
    """A network with random weights, a nonzero initial state, inputs, and weights of a loss over all its results."""

    lstm: jaxlstm.RNN
    params: jaxlstm.Params
    xs: np.ndarray  # (T, B, I)
    state: jaxlstm.State
    options: dict[str, Any] = field(default_factory=dict)  # masks and key of the call
    cotangents: tuple = ()  # weights of the outputs and of the final state in the loss

    @property
    def cell(self) -> str:
        """Name of the cell in the oracle."""
        return f"rnn_{self.lstm.activation or 'tanh'}" if self.lstm.cell == "rnn" else str(self.lstm.cell)


def network(configuration: str, implementation: Any = None, **options: Any) -> jaxlstm.LSTM:
    """Makes the network of a configuration; in float64 unless ``param_dtype`` is given."""
    options = {"param_dtype": jnp.float64} | CONFIGURATIONS[configuration] | options
    return jaxlstm.LSTM(INPUT_SIZE, options.pop("hidden_size", HIDDEN_SIZE), implementation=implementation, **options)


def random_params(lstm: Any, rng: np.random.Generator, dtype: Any = np.float64) -> jaxlstm.Params:
    """Draws weights with standard deviation 0.5, biases included, so that each of them matters."""
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), lstm.param_shapes())


@lru_cache
def make(configuration: str, inputs: str, num_steps: int = NUM_STEPS, batch_size: int = BATCH_SIZE) -> Case:
    """Makes a case in float64, with lengths 0 and T among the lengths and masks and resets in the middle."""
    lstm = network(configuration)
    rng = np.random.default_rng(len(configuration) * 100 + len(inputs))
    params = random_params(lstm, rng)
    xs = rng.standard_normal((num_steps, batch_size, INPUT_SIZE))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), lstm.state_shapes((batch_size,)))
    if isinstance(state.c, dict):
        state.c["n"] = 0.5 + abs(state.c["n"])  # the normalizer of sLSTM is a sum of exponentials
    options: dict[str, Any] = {}
    if lstm.static_size is not None:
        options["static"] = rng.standard_normal((batch_size, lstm.static_size))
    if "lengths" in INPUTS[inputs]:
        options["lengths"] = np.array([num_steps, 0, num_steps - 2, 1])
    if "mask" in INPUTS[inputs]:
        options["mask"] = rng.random((num_steps, batch_size)) < 0.7
    if "resets" in INPUTS[inputs]:
        options["resets"] = rng.random((num_steps, batch_size)) < 0.3
    if "reverse" in INPUTS[inputs]:
        options["reverse"] = True
    if configuration in WITH_KEY:
        options["key"] = jax.random.key(len(inputs))
    ys = rng.standard_normal((num_steps, batch_size, lstm.num_directions * lstm.output_size))
    last = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    return Case(lstm, params, xs, state, options, (ys, last))


def loss(ys: Any, state: Any, cotangents: tuple) -> Any:
    """Computes a scalar in which every number that a network returns has its own weight."""
    products = jax.tree.map(lambda a, b: (a * b).sum((-3, -2, -1)), (ys, jaxlstm.State(*state)), cotangents)
    return sum(jax.tree.leaves(products))


def random_masks(case: Case) -> tuple[list, list, list]:
    """Draws the masks of the case's key, for the oracle: between layers, inside of them, and of recurrent weights."""
    lstm, (num_steps, batch_size, _) = case.lstm, case.xs.shape
    rates = RegularizerRates(lstm.recurrent_dropout, lstm.zoneout_h, lstm.zoneout_c)
    key, width = case.options.get("key"), lstm.num_directions * lstm.output_size
    if key is None:
        return [None] * (lstm.num_layers + 1), [(1.0, lstm.zoneout_h, lstm.zoneout_c)] * lstm.num_layers, []

    def between(key: Any, rate: float, size: int, over_time: bool) -> np.ndarray:
        return np.asarray(dropout(key, rate, jnp.ones((num_steps, batch_size, size)), over_time=over_time))

    layer_masks = [between(regularizer_key(key, 0, 3), lstm.input_dropout, INPUT_SIZE, False)]
    layer_masks += [
        between(jax.random.fold_in(key, n), lstm.dropout, width, not lstm.variational)
        for n in range(1, lstm.num_layers)
    ]
    layer_masks.append(between(regularizer_key(key, 0, 4), lstm.output_dropout, width, False))
    step_masks, weight_masks = [], []
    for n in range(lstm.num_layers):
        sizes = lstm.output_size, lstm.hidden_size
        drawn = draw_masks(regularizer_key(key, n, 1), rates, lstm.num_directions, jnp.asarray(case.xs), *sizes)
        candidate, zoneout_h, zoneout_c = (None if a is None else np.asarray(a, float) for a in drawn)
        scale = 1.0 if candidate is None else candidate / (1 - rates.recurrent_dropout)
        step_masks.append((scale, 0.0 if zoneout_h is None else zoneout_h, 0.0 if zoneout_c is None else zoneout_c))
        if lstm.weight_drop:
            keys = jax.random.split(regularizer_key(key, n, 2), lstm.num_directions)
            shape = case.params.layers[n].forward.w_h.shape
            weight_masks.append([np.asarray(dropout_mask(k, lstm.weight_drop, shape, jnp.float64)) for k in keys])
    return layer_masks, step_masks, weight_masks


def drop_weights(params: jaxlstm.Params, masks: list) -> jaxlstm.Params:
    """Multiplies recurrent weights by the masks of each layer and direction."""
    if not masks:
        return params
    layers = [
        jaxlstm.Layer(*(w._replace(w_h=w.w_h * m) for w, m in zip(layer.directions, each)))
        for layer, each in zip(params.layers, masks)
    ]
    return params._replace(layers=tuple(layers))


def run_oracle(configuration: str, inputs: str, args: tuple) -> tuple:
    """Computes by the oracle ``(ys, state)`` and the gradient of `loss` with respect to ``args``.

    Args:
      configuration: a name in `CONFIGURATIONS`.
      inputs: a name in `INPUTS`.
      args: ``(params, xs, state)``.
    """
    case = make(configuration, inputs)
    leaves, tree = jax.tree.flatten(args)
    layer_masks, step_masks, weight_masks = random_masks(case)
    options = {name: value for name, value in case.options.items() if name != "key"}

    def run(leaves: list) -> tuple:
        params, xs, state = jax.tree.unflatten(tree, leaves)
        params = drop_weights(params, weight_masks)
        ys, h, c = oracle.network(
            params, xs, state.h, state.c, cell=case.cell, layer_masks=layer_masks, step_masks=step_masks, **options
        )
        return ys, jaxlstm.State(h, c)

    gradient = oracle.gradient(lambda leaves: loss(*run(leaves), case.cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, gradient)


@lru_cache
def expected(configuration: str, inputs: str) -> tuple:
    """Computes the results and the gradient of a case by `run_oracle`."""
    case = make(configuration, inputs)
    return run_oracle(configuration, inputs, (case.params, case.xs, case.state))


@lru_cache
def expected_second_derivative(configuration: str, inputs: str) -> tuple:
    """Computes a random direction and the derivative of the oracle's gradient along it.

    The gradient is exact, so the error of the central difference is about shift^2 = 1e-12 times the third derivative.
    """
    case = make(configuration, inputs)
    args = (case.params, case.xs, case.state)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), args)
    shift = 1e-6
    ahead, behind = (
        run_oracle(configuration, inputs, jax.tree.map(lambda a, d, s=s: a + s * d, args, direction))[1]
        for s in (shift, -shift)
    )
    return direction, jax.tree.map(lambda a, b: (a - b) / (2 * shift), ahead, behind)


def equations(jaxpr: Any) -> Any:
    """Yields the equations of a program and of all programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
