"""Fractions of saturated gates in a training run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm import diagnostics
from jaxlstm.training import saturation


class Model(NamedTuple):
    lstm: jaxlstm.Params


@pytest.mark.slow
def test_saturation_agrees_with_gate_statistics():
    lstm = jaxlstm.LSTM(3, 4, num_layers=2, bidirectional=True)
    params = jax.tree.map(lambda a: 2 * a, lstm.init(jax.random.key(0)))
    xs = 9 * jax.random.normal(jax.random.key(7), (5, 2, 3), jnp.float32)
    shares = saturation.gate_saturation(lstm, lambda params, carry, batch: (batch, carry))(Model(params), None, xs)
    expected = {}
    for n, layer in enumerate(diagnostics.gate_statistics(diagnostics.trace(lstm, params, xs)).layers):
        for direction in ("forward", "backward"):
            units = getattr(layer, direction)
            for gate in "ifo":
                for name in ("shut", "open"):
                    expected[f"gates.{n}.{direction}.{gate}.{name}"] = getattr(units, name)[gate].mean()
    assert shares.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(shares[name], value, rtol=1e-6)
    assert sum(expected.values()) > 1


def test_figures_joins_shares_and_gradient_norms():
    row = saturation.diagnosis_row({"a": jnp.ones(())}, {"b": jnp.zeros(())})
    assert row == {"a": 1.0, "gradient.b": 0.0}
