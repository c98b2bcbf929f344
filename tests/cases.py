"""The table of cases that every implementation has to pass."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxlstm
from jaxlstm import recurrence
from jaxlstm.dropout import RegularizerRates, draw_masks, dropout, dropout_mask
from jaxlstm.lstm import regularizer_key


def slow_but(fast, every):
    """Each of ``every`` as a parameter, or as several where it is a tuple; slow, but for those in ``fast``."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=[] if case in fast else [pytest.mark.slow])
        for case in every
    ]


def equations(jaxpr):
    """Of a program, and of all programs inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# cuDNN needs a GPU: what is tested of it elsewhere is in `test_cudnn`. Newton's method and interpreted kernels take
# several times as long to compile as the others: what is not slow of them is in `test_newton` and `test_pallas`, these
# configurations are among the slow tests, and all others need the option --every-case.
HEAVY = ("newton", "pallas")
OF_HEAVY = ("two layers bidirectional projection", "remat", "peephole", "cifg", "rnn", "all of it")
# Fast with the default, slow with all others; what is fast with the reference too is among NAMES.
IMPLEMENTATIONS = slow_but(["fused"], [name for name in recurrence.IMPLEMENTATIONS if name != "cudnn"])
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two layers bidirectional": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 3},
    "two layers bidirectional projection": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "no bias": {"use_bias": False},
    "wide projection without bias": {"use_bias": False, "proj_size": 6},
    "rnn": {"cell": "rnn"},
    "rnn relu two layers bidirectional": {"cell": "rnn", "activation": "relu", "num_layers": 2, "bidirectional": True},
    "rnn sigmoid projection": {"cell": "rnn", "activation": "sigmoid", "proj_size": 2},
    "remat": {"remat": 3, "bidirectional": True},
    "remat one chunk": {"remat": 50, "num_layers": 2},
    "unroll": {"unroll": 4, "bidirectional": True},
    "peephole": {"cell": "peephole"},
    "peephole two layers bidirectional projection": {
        "cell": "peephole", "num_layers": 2, "bidirectional": True, "proj_size": 2,
    },
    "cifg": {"cell": "cifg", "bidirectional": True},
    "layer norm": {"layer_norm": True, "num_layers": 2},
    "layer norm of all": {
        "layer_norm": True, "cell": "peephole", "use_bias": False, "bidirectional": True, "proj_size": 2, "remat": 3,
    },
    "layer norm rnn": {"layer_norm": True, "cell": "rnn"},
    "learned state": {"learned_state": True, "num_layers": 2, "bidirectional": True, "proj_size": 2},
    "zoneout expected": {"zoneout_h": 0.3, "zoneout_c": 0.2, "proj_size": 3},
    "zoneout rnn": {"zoneout_h": 0.3, "cell": "rnn", "bidirectional": True},
    "recurrent dropout": {"recurrent_dropout": 0.4, "cell": "cifg", "num_layers": 2},
    "weight drop": {"weight_drop": 0.4, "num_layers": 2, "bidirectional": True},
    "dropout": {"dropout": 0.4, "num_layers": 3},
    "variational": {
        "dropout": 0.4, "input_dropout": 0.3, "output_dropout": 0.2, "variational": True, "num_layers": 2,
    },
    "all of it": {
        "cell": "peephole", "layer_norm": True, "learned_state": True, "num_layers": 2,
        "proj_size": 2, "remat": 3, "dropout": 0.3, "input_dropout": 0.2, "output_dropout": 0.2, "weight_drop": 0.3,
        "recurrent_dropout": 0.4, "zoneout_h": 0.3, "zoneout_c": 0.2,
    },
}  # fmt: skip
WITH_KEY = ("zoneout rnn", "recurrent dropout", "weight drop", "dropout", "variational", "all of it")
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
# Every configuration meets these, and these configurations meet every input.
EVERY_INPUT = ("one layer", "two layers bidirectional projection")
EVERY_CONFIGURATION = ("plain", "everything", "everything reverse")
FAST = ("everything",)  # the others are slow tests, but for the first configuration
# With the reference a few of these are enough: the default, what people run, meets them all.
FAST_WITH_SCAN = ("one layer", "two layers bidirectional projection", "remat", "layer norm")


@dataclass(frozen=True)
class Case:
    """A network with random weights, a nonzero initial state, inputs, and weights of a loss over all it returns."""

    lstm: jaxlstm.LSTM
    params: jaxlstm.Params
    xs: np.ndarray  # (T, B, I)
    state: jaxlstm.State
    options: dict[str, Any] = field(default_factory=dict)
    cotangents: tuple = ()

    @property
    def cell(self) -> str:
        return f"rnn_{self.lstm.activation or 'tanh'}" if self.lstm.cell == "rnn" else str(self.lstm.cell)


def _fast(configuration: str, inputs: str, implementation: str) -> bool:
    if implementation == "scan":
        return configuration in FAST_WITH_SCAN and inputs in FAST
    return implementation == "fused" and (configuration in EVERY_INPUT[:1] or inputs in FAST)


_EVERY = [
    (configuration, inputs, implementation)
    for configuration in CONFIGURATIONS
    for inputs in INPUTS
    if configuration in EVERY_INPUT or inputs in EVERY_CONFIGURATION
    for implementation in recurrence.IMPLEMENTATIONS
    if implementation != "cudnn"
]
NAMES = slow_but([case for case in _EVERY if _fast(*case)], _EVERY)


def random_params(lstm: jaxlstm.LSTM, rng: np.random.Generator, dtype: Any = np.float64) -> jaxlstm.Params:
    """Weights of deviation 0.5, biases included, so that every one of them matters."""
    shapes = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(dtype), shapes)


@lru_cache
def make(configuration: str, inputs: str, steps: int = 7, batch: int = 4) -> Case:
    """A case in float64, with lengths of 0 and of T among them, and masks and resets in the middle."""
    lstm = jaxlstm.LSTM(3, 5, param_dtype=jnp.float64, **CONFIGURATIONS[configuration])
    rng = np.random.default_rng(len(configuration) * 100 + len(inputs))
    params = random_params(lstm, rng)
    xs = rng.standard_normal((steps, batch, 3))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), lstm.initial_state((batch,), params))
    options: dict[str, Any] = {}
    if "lengths" in INPUTS[inputs]:
        options["lengths"] = np.array([steps, 0, steps - 2, 1])
    if "mask" in INPUTS[inputs]:
        options["mask"] = rng.random((steps, batch)) < 0.7
    if "resets" in INPUTS[inputs]:
        options["resets"] = rng.random((steps, batch)) < 0.3
    if "reverse" in INPUTS[inputs]:
        options["reverse"] = True
    if configuration in WITH_KEY:
        options["key"] = jax.random.key(len(inputs))
    ys = rng.standard_normal((steps, batch, lstm.num_directions * lstm.output_size))
    last = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    return Case(lstm, params, xs, state, options, (ys, last))


def loss(ys: Any, state: Any, cotangents: tuple) -> Any:
    """A scalar in which every number that a network returns has a weight of its own."""
    products = jax.tree.map(lambda a, b: (a * b).sum((-3, -2, -1)), (ys, jaxlstm.State(*state)), cotangents)
    return sum(jax.tree.leaves(products))


def masks(case: Case) -> tuple[list, list, list]:
    """What the case's key draws, for the oracle: masks between layers, noise in them, masks of recurrent weights."""
    lstm, (steps, batch, _) = case.lstm, case.xs.shape
    rates = RegularizerRates(lstm.recurrent_dropout, lstm.zoneout_h, lstm.zoneout_c)
    key, width = case.options.get("key"), lstm.num_directions * lstm.output_size
    if key is None:
        return [None] * (lstm.num_layers + 1), [(1.0, lstm.zoneout_h, lstm.zoneout_c)] * lstm.num_layers, []

    def between(key: Any, rate: float, size: int, over_time: bool) -> np.ndarray:
        return np.asarray(dropout(key, rate, jnp.ones((steps, batch, size)), over_time=over_time))

    sides = [between(regularizer_key(key, 0, 3), lstm.input_dropout, 3, False)]
    sides += [
        between(jax.random.fold_in(key, n), lstm.dropout, width, not lstm.variational)
        for n in range(1, lstm.num_layers)
    ]
    sides.append(between(regularizer_key(key, 0, 4), lstm.output_dropout, width, False))
    noise, weights = [], []
    for n in range(lstm.num_layers):
        leading = (lstm.num_directions, steps, batch)
        drawn = draw_masks(
            regularizer_key(key, n, 1), rates, leading, lstm.output_size, None if lstm.cell == "rnn" else 5
        )
        kept, zoneout_mask_h, zoneout_mask_c = (None if a is None else np.asarray(a, float) for a in drawn)
        scale = 1.0 if kept is None else kept / (1 - rates.recurrent_dropout)
        noise.append(
            (
                scale,
                0.0 if zoneout_mask_h is None else zoneout_mask_h,
                0.0 if zoneout_mask_c is None else zoneout_mask_c,
            )
        )
        if lstm.weight_drop:
            keys = jax.random.split(regularizer_key(key, n, 2), lstm.num_directions)
            shape = case.params.layers[n].forward.w_h.shape
            weights.append([np.asarray(dropout_mask(k, lstm.weight_drop, shape, jnp.float64)) for k in keys])
    return sides, noise, weights


def dropped(params: jaxlstm.Params, weights: list) -> jaxlstm.Params:
    """Parameters with recurrent weights multiplied by the masks of each layer and direction."""
    if not weights:
        return params
    layers = [
        jaxlstm.Layer(*(w._replace(w_h=w.w_h * m) for w, m in zip(layer.directions, each)))
        for layer, each in zip(params.layers, weights)
    ]
    return params._replace(layers=tuple(layers))


@lru_cache
def expected(configuration: str, inputs: str) -> tuple:
    """What the oracle says: ``(ys, state)`` and the gradient of `loss` with respect to ``(params, xs, state)``."""
    case = make(configuration, inputs)
    leaves, tree = jax.tree.flatten((case.params, case.xs, case.state))
    between, noise, weights = masks(case)
    options = {name: value for name, value in case.options.items() if name != "key"}

    def run(leaves: list) -> tuple:
        params, xs, state = jax.tree.unflatten(tree, leaves)
        params = dropped(params, weights)
        ys, h, c = oracle.network(params, xs, state.h, state.c, cell=case.cell, between=between, noise=noise, **options)
        return ys, jaxlstm.State(h, c)

    slopes = oracle.gradient(lambda leaves: loss(*run(leaves), case.cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, slopes)
