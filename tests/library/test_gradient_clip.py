"""Clipping of the gradient of h inside the recurrence, against backpropagation through time step by step."""

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.sharding import AxisType

import jaxlstm

LIMIT = 0.05
NETWORKS = {
    "projection": {"proj_size": 3},
    "gru zoneout learned state": {"cell": "gru", "zoneout_h": 0.3, "learned_state": True},
    "layer norm": {"layer_norm": True},
    "slstm heads": {"cell": "slstm", "heads": 2, "hidden_size": 4},
}
BACKENDS = ("scan", "fused")


def make(options, implementation=None):
    options = {"hidden_size": 5} | options
    network = jaxlstm.LSTM(3, **options, param_dtype="float64", implementation=implementation)
    rng = np.random.default_rng(0)
    params = cases.random_params(network, rng)
    masks = {
        "lengths": np.array([7, 0, 5, 6]),
        "mask": rng.random((7, 4)) < 0.7,
        "resets": rng.random((7, 4)) < 0.3,
    }
    return network, params, rng.standard_normal((7, 4, 3)), masks


def pick(rows, a, b):
    return jax.tree.map(lambda x, y: jnp.where(rows[None, :, None], x, y), a, b)


def backpropagate(network, params, xs, masks, state, cotangents):
    """Gradients by a loop over time: in each step the gradient of the h that it reads is clipped."""
    is_taken = masks["mask"] & (np.arange(len(xs))[:, None] < masks["lengths"])
    restarts = masks["resets"] & is_taken

    def restart(params, state, t):
        return pick(restarts[t], network.initial_state((xs.shape[1],), params), state)

    states = [state]
    for t, x in enumerate(xs):
        start = restart(params, states[-1], t)
        states.append(pick(is_taken[t], network.step(params, start, x)[0], start))
    (d_ys, d_state), num_clipped = cotangents, 0
    d_params, zeros = jax.tree.map(np.zeros_like, (params, state))
    for t in reversed(range(len(xs))):
        start, through_restart = jax.vjp(lambda *args, t=t: restart(*args, t), params, states[t])
        _, through_step = jax.vjp(lambda *args, t=t: network.step(*args, xs[t]), params, start)
        d_y = np.where(is_taken[t][:, None], d_ys[t], 0)
        from_step, d_start = through_step((pick(is_taken[t], d_state, zeros), d_y))
        num_clipped += int((abs(d_start.h) > LIMIT).sum())
        d_start = d_start._replace(h=np.clip(d_start.h, -LIMIT, LIMIT))
        d_held = pick(is_taken[t], zeros, d_state)
        from_restart, d_state = through_restart(jax.tree.map(jnp.add, d_start, d_held))
        d_params = jax.tree.map(lambda *a: sum(a), d_params, from_step, from_restart)
    return d_params, d_state, num_clipped


def random_cotangents(network, state):
    rng = np.random.default_rng(1)
    return rng.standard_normal((7, 4, network.output_size)), jax.tree.map(lambda a: rng.standard_normal(a.shape), state)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    "name", [n if n == "projection" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_clipped_gradients_equal_a_loop_over_time(name, implementation):
    network, params, xs, masks = make(NETWORKS[name])
    state = network.initial_state((4,), params)
    cotangents = random_cotangents(network, state)
    *expected, num_clipped = backpropagate(network, params, xs, masks, state, cotangents)
    assert num_clipped >= 20
    network = replace(network, recurrent_gradient_clip=LIMIT, implementation=implementation)
    _, pullback = jax.vjp(lambda params, state: network(params, xs, state, **masks), params, state)
    parity.assert_close(list(pullback(cotangents)), expected, np.float64, 5**4 * 256)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_forward_mode_and_values_are_exact_with_clipping(implementation):
    network, params, xs, masks = make({}, implementation)
    tangents = jax.tree.map(jnp.ones_like, params)
    expected, actual = (
        jax.jvp(lambda params, n=n: n(params, xs, **masks), (params,), (tangents,))
        for n in (network, replace(network, recurrent_gradient_clip=LIMIT))
    )
    parity.assert_close(actual, expected, np.float64, 1)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_clipped_gradients_of_mapped_sequences_equal_the_batch(implementation):
    network, params, xs, masks = make({"recurrent_gradient_clip": LIMIT, "num_layers": 2}, implementation)

    def loss(params, xs, masks):
        return (network(params, xs, **masks)[0] ** 2).sum()

    axes = (None, 1, {"lengths": 0, "mask": 1, "resets": 1})
    mapped = jax.vmap(jax.grad(loss), axes)(params, xs, masks)
    parity.assert_close(
        jax.tree.map(lambda a: a.sum(0), mapped), jax.grad(loss)(params, xs, masks), np.float64, xs.size
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_clipped_gradients_of_steps_equal_the_call(implementation):
    network, params, xs, _ = make({"recurrent_gradient_clip": LIMIT, "num_layers": 2}, implementation)
    state = network.initial_state((4,))
    cotangents = random_cotangents(network, state)

    def call(params):
        return network(params, xs, state)

    def steps(params):
        state_out, ys = jax.lax.scan(lambda state, x: network.step(params, state, x), state, xs)
        return ys, state_out

    actual, expected = (jax.vjp(f, params)[1](cotangents) for f in (steps, call))
    parity.assert_close(actual, expected, np.float64, 256)
    unclipped = replace(network, recurrent_gradient_clip=None)
    (other,) = jax.vjp(lambda params: unclipped(params, xs, state), params)[1](cotangents)
    assert abs(other.layers[0].forward.w_h - expected[0].layers[0].forward.w_h).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"hidden_size": 6}, {"hidden_size": 6, "proj_size": 4}])
def test_clipped_gradients_of_units_on_two_devices_equal_scan(options):
    network, params, xs, _ = make(options | {"recurrent_gradient_clip": LIMIT})

    def gradient(implementation):
        run = replace(network, implementation=implementation)
        return jax.jit(jax.grad(lambda params: (run(params, xs)[0] ** 2).sum()))(params)

    expected = gradient("scan")
    with jax.set_mesh(jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
        parity.assert_close(gradient("tensor_parallel"), expected, np.float64, xs.size)


@pytest.mark.parametrize(("name", "cell"), [("newton", "lstm"), ("associative", "minlstm"), ("pallas", "lstm")])
def test_backends_that_do_not_clip_refuse(name, cell):
    network, params, xs, _ = make({"recurrent_gradient_clip": LIMIT, "cell": cell}, name)
    with pytest.raises(ValueError, match=f"'{name}' does not support recurrent_gradient_clip=0.05; use"):
        network(params, xs)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "must be above 0, got 0"), (-1.0, "must be above 0"), (np.inf, "must be finite"), ("1", "must be a number")],
)
def test_wrong_limits_are_refused(value, message):
    with pytest.raises((ValueError, TypeError), match=f"recurrent_gradient_clip {message}"):
        jaxlstm.LSTM(3, 4, recurrent_gradient_clip=value)
