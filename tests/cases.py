"""The table of cases that every implementation has to pass."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxlstm

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
}
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
        return "lstm" if self.lstm.cell == "lstm" else f"rnn_{self.lstm.activation or 'tanh'}"


NAMES = [
    (configuration, inputs)
    for configuration in CONFIGURATIONS
    for inputs in INPUTS
    if configuration in EVERY_INPUT or inputs in EVERY_CONFIGURATION[: 2 if configuration == "unroll" else 3]
]


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
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), lstm.initial_state((batch,)))
    options: dict[str, Any] = {}
    if "lengths" in INPUTS[inputs]:
        options["lengths"] = np.array([steps, 0, steps - 2, 1])
    if "mask" in INPUTS[inputs]:
        options["mask"] = rng.random((steps, batch)) < 0.7
    if "resets" in INPUTS[inputs]:
        options["resets"] = rng.random((steps, batch)) < 0.3
    if "reverse" in INPUTS[inputs]:
        options["reverse"] = True
    ys = rng.standard_normal((steps, batch, lstm.num_directions * lstm.output_size))
    last = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    return Case(lstm, params, xs, state, options, (ys, last))


def loss(ys: Any, state: Any, cotangents: tuple) -> Any:
    """A scalar in which every number that a network returns has a weight of its own."""
    products = jax.tree.map(lambda a, b: (a * b).sum((-3, -2, -1)), (ys, jaxlstm.State(*state)), cotangents)
    return sum(jax.tree.leaves(products))


@lru_cache
def expected(configuration: str, inputs: str) -> tuple:
    """What the oracle says: ``(ys, state)`` and the gradient of `loss` with respect to ``(params, xs, state)``."""
    case = make(configuration, inputs)
    leaves, tree = jax.tree.flatten((case.params, case.xs, case.state))

    def run(leaves: list) -> tuple:
        params, xs, state = jax.tree.unflatten(tree, leaves)
        ys, h, c = oracle.network(params, xs, state.h, state.c, cell=case.cell, **case.options)
        return ys, jaxlstm.State(h, c)

    slopes = oracle.gradient(lambda leaves: loss(*run(leaves), case.cotangents), leaves)
    return run(leaves), jax.tree.unflatten(tree, slopes)
