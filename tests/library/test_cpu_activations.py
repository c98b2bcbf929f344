"""The gate activations that use all threads of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm.recurrence import cpu_activations, gates
from jaxlstm.recurrence.layout import LayerSizes, choose_layout

T, B, INPUT_SIZE, H = 3, 16, 2, 256


def test_tanh_is_accurate_to_the_last_places():
    x = np.concatenate([np.linspace(-12, 12, 200_001), np.logspace(-37, 1, 10_001)]).astype(np.float32)
    expected = np.tanh(x.astype(np.float64))
    actual = np.asarray(cpu_activations.tanh(jnp.asarray(x)), np.float64)
    # Nine roundings in either polynomial, most of them of small terms: the bound is twice the 3 epsilons observed.
    np.testing.assert_allclose(actual, expected, rtol=6 * 2.0**-23, atol=2.0**-149)
    assert np.abs(actual).max() == 1


def test_tanh_of_infinities_nan_and_negative_zero():
    actual = cpu_activations.tanh(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, -0.0], jnp.float32))
    np.testing.assert_array_equal(actual, [1, -1, np.nan, 0])
    assert jnp.signbit(actual[3])


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["t", "ssts"])
def test_activate_derivatives_equal_gates_activate(kinds):
    rng = np.random.default_rng(0)
    z, dz, ct = (jnp.asarray(3 * rng.standard_normal((len(kinds), 5)), jnp.float32) for _ in range(3))

    def derivatives(activate):
        def slabs(z):
            return jnp.stack(activate(z, kinds))

        def vjp(z):
            return jax.vjp(slabs, z)[1](ct)[0]

        return jax.jvp(slabs, (z,), (dz,)), jax.jvp(vjp, (z,), (dz,)), jax.vmap(vjp, 2, 2)(jnp.stack([z, -z], 2))

    actual, expected = derivatives(cpu_activations.activate), derivatives(gates.activate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, 8)), actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "cifg"])
def test_fused_with_threaded_gates_equals_scan(cell):
    """Compares value, gradient and Hessian-vector product with the reference backend, which has the usual gates."""
    rng = np.random.default_rng(0)
    xs, d_xs = (jnp.asarray(rng.standard_normal((T, B, INPUT_SIZE)), jnp.float32) for _ in range(2))

    def derivatives(implementation):
        lstm = jaxlstm.LSTM(INPUT_SIZE, H, cell=cell, implementation=implementation)
        params = lstm.init(jax.random.key(0))
        d_params = jax.tree.map(lambda a: jnp.ones_like(a) / H, params)

        def loss(params, xs):
            return (lstm(params, xs)[0] ** 2).sum() / (B * H)

        gradient = jax.grad(loss, (0, 1))
        return loss(params, xs), gradient(params, xs), jax.jvp(gradient, (params, xs), (d_params, d_xs))[1]

    actual, expected = derivatives("fused"), derivatives("scan")
    # The longest sum is the gradient of a weight: over all steps and rows, through the units of every earlier step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, T * B * H)), actual, expected)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize("cell", ["lstm", "cifg"])
def test_fused_trains_with_threaded_gates_between_two_sizes(cell):
    lstm = jaxlstm.LSTM(INPUT_SIZE, H, cell=cell, implementation="fused")
    params = lstm.init(jax.random.key(0))

    def has_threaded_gates(function, batch_size):  # only their tanh has a division
        return " div " in str(jax.make_jaxpr(function)(params, jnp.zeros((T, batch_size, INPUT_SIZE))))

    gradient = jax.grad(lambda params, xs: lstm(params, xs)[0].sum())
    sizes = (1, 15, 16, 63, 64)
    assert [batch_size for batch_size in sizes if has_threaded_gates(gradient, batch_size)] == [16, 63]
    assert not any(has_threaded_gates(lstm, batch_size) for batch_size in sizes)  # one by one, batch-major


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(("dtype", "threaded"), [("float32", True), ("float64", False)])
def test_layout_threads_gates_in_float32_only(dtype, threaded):
    assert choose_layout(LayerSizes(B, INPUT_SIZE, H), jnp.dtype(dtype), jnp.dtype(dtype)).threaded_gates is threaded
