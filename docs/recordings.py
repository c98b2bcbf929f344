"""Records networks for the lesson on the gradient: ``python docs/recordings.py``, a few seconds.

Writes their recurrent weights, gates and states to docs/_static/lesson/recordings.json, from which the page computes
Jacobians. The first T steps of a recording are those of a run of T steps.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlstm
from jaxlstm import diagnostics
from jaxlstm.rnn import RNN

RECORDINGS = Path(__file__).parent / "_static" / "lesson" / "recordings.json"
NUM_STEPS, INPUT_SIZE, HIDDEN_SIZE = 64, 4, 16
FORGET_BIASES = (0.0, 1.0, 2.0, 3.0, 5.0)
NUM_DIGITS = 8  # of a number in the file


def networks() -> dict[str, RNN]:
    """Returns the recorded networks by their names in the file."""
    sizes: dict[str, Any] = {"input_size": INPUT_SIZE, "hidden_size": HIDDEN_SIZE, "param_dtype": jnp.float64}
    lstms: dict[str, RNN] = {f"lstm {bias:g}": jaxlstm.LSTM(**sizes, forget_bias=bias) for bias in FORGET_BIASES}
    return {"rnn": jaxlstm.LSTM(**sizes, cell="rnn"), **lstms, "gru": jaxlstm.GRU(**sizes)}


def make_call(network: RNN) -> tuple[jaxlstm.Params, jax.Array]:
    """Returns initial parameters and inputs ``(T, I)``, of which each number is normal."""
    xs = jax.random.normal(jax.random.key(1), (NUM_STEPS, INPUT_SIZE), jnp.float64)
    return network.init(jax.random.key(0)), xs


def record(network: RNN) -> dict[str, Any]:
    """Returns the rows of ``w_h`` by gate, and the gates and the state ``(T, H)`` by name."""
    params, xs = make_call(network)
    steps = diagnostics.trace(network, params, xs).layers[0].forward
    cell, w_h = network.resolved_cell, params.layers[0].forward.w_h
    assert w_h is not None
    names = [list(cell.activations)[slab] for slab in cell.slabs_reading("h")]
    states = {"h": steps.h} if steps.c is None else {"c": steps.c}  # the Jacobian of an LSTM does not need h
    return {
        "weights": dict(zip(names, map(rounded, jnp.split(w_h, len(names))))),
        "steps": {name: rounded(values) for name, values in (steps.gates | states).items()},
    }


def rounded(values: jax.Array) -> list[Any]:
    """Returns an array as lists of numbers with `NUM_DIGITS` digits."""
    return np.vectorize(lambda value: float(f"{value:.{NUM_DIGITS - 1}e}"))(values).tolist()


def main() -> None:
    """Writes the file."""
    with jax.enable_x64(True):
        recordings = {name: record(network) for name, network in networks().items()}
    RECORDINGS.write_text(json.dumps(recordings, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
