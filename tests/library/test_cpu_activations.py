"""The gates as they are written for all threads of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm import cells
from jaxlstm.recurrence import cpu_activations
from jaxlstm.recurrence.layout import Layout

STEPS, ROWS, INPUTS, UNITS = 3, 16, 2, 256


def test_tanh_to_the_last_places():
    x = np.concatenate([np.linspace(-12, 12, 200_001), np.logspace(-37, 1, 10_001)]).astype(np.float32)
    wanted = np.tanh(x.astype(np.float64))
    found = np.asarray(cpu_activations.tanh(jnp.asarray(x)), np.float64)
    # Nine roundings in either polynomial, most of them of terms that hardly count: twice the 3 epsilons that are seen.
    np.testing.assert_allclose(found, wanted, rtol=6 * 2.0**-23, atol=2.0**-149)
    assert np.abs(found).max() == 1


def test_tanh_of_what_is_no_number():
    found = cpu_activations.tanh(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, -0.0], jnp.float32))
    np.testing.assert_array_equal(found, [1, -1, np.nan, 0])
    assert jnp.signbit(found[3])


@pytest.mark.parametrize("kinds", ["t", pytest.param("ssts", marks=pytest.mark.slow)])
def test_the_derivatives_are_those_of_the_usual_activations(kinds):
    rng = np.random.default_rng(0)
    z, dz, ct = (jnp.asarray(3 * rng.standard_normal((len(kinds), 5)), jnp.float32) for _ in range(3))

    def findings(activated):
        def slabs(z):
            return jnp.stack(activated(z, kinds))

        def slope(z):
            return jax.vjp(slabs, z)[1](ct)[0]

        return jax.jvp(slabs, (z,), (dz,)), jax.jvp(slope, (z,), (dz,)), jax.vmap(slope, 2, 2)(jnp.stack([z, -z], 2))

    found, wanted = findings(cpu_activations.activated), findings(cells.activated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, 8)), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "cifg"])
def test_a_layer_of_such_a_size(cell):
    """Value, gradient and curvature against the same layer one step at a time, in whose gates nothing is rewritten."""
    rng = np.random.default_rng(0)
    xs, vs = (jnp.asarray(rng.standard_normal((STEPS, ROWS, INPUTS)), jnp.float32) for _ in range(2))

    def findings(implementation):
        lstm = jaxlstm.LSTM(INPUTS, UNITS, cell=cell, implementation=implementation)
        params = lstm.init(jax.random.key(0))
        tangent = jax.tree.map(lambda a: jnp.ones_like(a) / UNITS, params)

        def loss(params, xs):
            return (lstm(params, xs)[0] ** 2).sum() / (ROWS * UNITS)

        slope = jax.grad(loss, (0, 1))
        return loss(params, xs), slope(params, xs), jax.jvp(slope, (params, xs), (tangent, vs))[1]

    found, wanted = findings("fused"), findings("scan")
    # The longest sum is a weight's gradient: over all steps and rows, through the units of every step behind it.
    terms = STEPS * ROWS * UNITS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, terms)), found, wanted)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
@pytest.mark.parametrize("cell", ["lstm", pytest.param("cifg", marks=pytest.mark.slow)])
def test_where_they_are_written_so(cell):
    lstm = jaxlstm.LSTM(INPUTS, UNITS, cell=cell, implementation="fused")
    params = lstm.init(jax.random.key(0))

    def rewritten(rows):
        return " div " in str(jax.make_jaxpr(lstm)(params, jnp.zeros((STEPS, rows, INPUTS))))

    assert [rows for rows in (1, 15, 16, 63, 64) if rewritten(rows)] == [16, 63]
    wide, narrow = jnp.dtype(jnp.float64), jnp.dtype(jnp.float32)
    assert not Layout.choose(ROWS, UNITS, wide, wide).threads
    assert Layout.choose(ROWS, UNITS, narrow, narrow).threads
