"""The parallel-in-time recurrence: what it took, what it does when it fails, its modes; `test_parity` has the rest."""

import re
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
from jax.sharding import AxisType, PartitionSpec
from test_parity import assert_close, terms

import jaxlstm
from jaxlstm.diagnostics import newton_effort
from jaxlstm.recurrence import Newton

STEPS = 60
MODES = [Newton("full"), Newton("diagonal", damping=0.1)]


def test_parity_of_the_defaults():
    test_parity.test_outputs_state_and_gradients("projection", "everything reverse", "newton")


slow = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("cifg", "peephole", "zoneout rnn", "recurrent dropout", "remat", "learned state")
]
learned = {"learned state": {"proj_size": None}}  # which has no blocks


@pytest.mark.parametrize("configuration", ["bidirectional", *slow])
def test_parity_of_the_diagonal_mode(configuration, monkeypatch):
    options = cases.CONFIGURATIONS[configuration] | learned.get(configuration, {})
    monkeypatch.setitem(cases.CONFIGURATIONS, configuration, options)
    cases.make.cache_clear()
    cases.expected.cache_clear()
    test_parity.test_outputs_state_and_gradients(configuration, "everything", Newton("diagonal", damping=0.2))
    cases.make.cache_clear()
    cases.expected.cache_clear()


def network(scale=1.0, forget_bias=1.0, **options):
    """A network whose recurrent weights are scaled, inputs, and a state that is not zero."""
    lstm = jaxlstm.LSTM(2, 4, param_dtype=jnp.float64, forget_bias=forget_bias, **options)
    params = lstm.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a * scale if a.shape == (16, 4) else a, params)
    xs = jax.random.normal(jax.random.key(1), (STEPS, 3, 2), jnp.float64)
    state = jax.tree.map(lambda a: 0.3 + a, lstm.initial_state((3,)))
    return lstm, params, xs, state


CHAOTIC = {"scale": 8.0, "forget_bias": 6.0}  # small differences grow, by 1e4 over these steps


def close(a, b, growth=1e5):
    """Equal but for rounding, and what the network makes of it."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=growth * 1e-15, atol=growth * 1e-15 * max(1, np.abs(y).max()))


@pytest.mark.slow
def test_a_tame_network_takes_a_few_iterations_and_the_answer_misses_nothing():
    lstm, params, xs, state = network()
    found = {options.mode: newton_effort(replace(lstm, implementation=options), params, xs, state) for options in MODES}
    for (effort,) in found.values():
        assert effort.sequential.tolist() == [0]
        assert 0 < effort.residual[0] <= 32 * np.finfo(np.float64).eps
    assert 3 <= found["full"][0].iterations[0] <= 7
    assert found["full"][0].iterations[0] < found["diagonal"][0].iterations[0] < STEPS


@pytest.mark.slow
def test_a_looser_tolerance_takes_fewer_iterations():
    lstm, params, xs, state = network()
    loose, tight = (
        newton_effort(replace(lstm, implementation=Newton(tolerance=t)), params, xs, state)[0] for t in (1e-2, None)
    )
    assert loose.iterations[0] < tight.iterations[0]
    assert tight.residual[0] < loose.residual[0] <= 1e-2


@pytest.mark.parametrize("options", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)])
def test_what_is_left_over_is_taken_one_by_one(options):
    lstm, params, xs, state = network(**CHAOTIC)
    options = replace(options, max_iterations=5)
    failing = replace(lstm, implementation=options)
    (effort,) = newton_effort(failing, params, xs, state)
    assert effort.iterations.tolist() == [5]
    assert not effort.residual[0] <= 1e-6
    assert 0 < effort.sequential[0] <= STEPS - 5  # each iteration solves a step
    wanted = replace(lstm, implementation="scan")
    close(failing(params, xs, state), wanted(params, xs, state))


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES)
def test_as_many_iterations_as_steps_are_enough_even_where_products_of_jacobians_overflow(options):
    lstm, params, xs, _ = network(scale=1e12)  # at the guess, a state of zeros, no unit is saturated
    enough = replace(lstm, implementation=replace(options, max_iterations=STEPS))
    (effort,) = newton_effort(enough, params, xs)
    assert effort.sequential.tolist() == [0]
    close(enough(params, xs), replace(lstm, implementation="scan")(params, xs))


@pytest.mark.slow
def test_the_gradient_of_a_network_that_does_not_converge():
    lstm, params, xs, state = network(**CHAOTIC)

    def slopes(implementation):
        def loss(*arguments):
            ys, last = replace(lstm, implementation=implementation)(*arguments)
            return (ys**2).sum() + sum((a**2).sum() for a in last)

        return jax.grad(loss, (0, 1, 2))(params, xs, state)

    close(slopes(Newton(max_iterations=3)), slopes("scan"))


@pytest.mark.slow
def test_otherwise_raise():
    lstm, params, xs, state = network(**CHAOTIC)
    failing = replace(lstm, implementation=Newton(max_iterations=5, otherwise="raise"))
    with pytest.raises(Exception, match=r"solved \d+ of 60 steps in max_iterations=5"):
        jax.block_until_ready(failing(params, xs, state))
    with pytest.raises(Exception, match=r"solved \d+ of 60 steps in max_iterations=5"):
        jax.block_until_ready(jax.vmap(lambda x: failing(params, x)[0], 1)(xs))
    enough = replace(lstm, implementation=Newton(max_iterations=STEPS, otherwise="raise"))
    close(enough(params, xs, state), replace(lstm, implementation="scan")(params, xs, state))


def test_what_is_not_a_number_stays_where_it_is():
    lstm, params, xs, _ = network()
    ys, _ = replace(lstm, implementation="newton")(params, xs.at[20, 1].set(jnp.nan))
    broken = np.zeros((STEPS, 3), bool)
    broken[20:, 1] = True
    np.testing.assert_array_equal(np.isnan(ys).any(-1), broken)


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES)
def test_derivatives_of_all_kinds_equal_those_of_the_reference(options):
    lstm, params, xs, state = network(bidirectional=True)
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 3, 4)), state)
    rng = np.random.default_rng(0)
    arguments = (params, xs, state)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), arguments)

    def derivatives(implementation):
        def loss(*arguments):
            ys, last = replace(lstm, implementation=implementation)(*arguments)
            return (ys**2).sum() + sum((a**2).sum() for a in last)

        gradient = jax.grad(loss, (0, 1, 2))
        return jax.jvp(loss, arguments, direction), jax.jvp(gradient, arguments, direction)

    close(derivatives(options), derivatives("scan"))


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES)
def test_maps_over_sequences(options):
    case = cases.make("one layer", "everything")
    lstm = jaxlstm.LSTM(3, 5, param_dtype=jnp.float64, implementation=options)
    marks = [case.options[name] for name in ("lengths", "mask", "resets")]

    def one(x, state, lengths, mask, resets):
        return lstm(case.params, x, state, lengths=lengths, mask=mask, resets=resets)

    mapped = jax.vmap(one, (1, 1, 0, 1, 1), out_axes=1)(case.xs, case.state, *marks)
    assert_close(mapped, cases.expected("one layer", "everything")[0], np.float64, terms(case))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "half"}, ValueError, "mode must be one of 'full', 'diagonal'; got 'half'"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
        ({"damping": 1.0}, ValueError, "damping must lie in [0, 1), got 1.0"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be above 0, got 0.0"),
        ({"tolerance": float("inf")}, ValueError, "tolerance must be finite, got inf"),
        ({"otherwise": "ignore"}, ValueError, "otherwise must be one of 'sequential', 'raise'; got 'ignore'"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Newton(**options)


@pytest.mark.parametrize(
    ("options", "what"), [({"proj_size": 2}, "a projection"), ({"layer_norm": True}, "layer normalisation")]
)
def test_the_diagonal_mode_refuses_what_has_no_blocks(options, what):
    lstm = jaxlstm.LSTM(3, 4, implementation=Newton("diagonal"), **options)
    with pytest.raises(ValueError, match=re.escape(f"Newton(mode='diagonal') has no blocks for {what}")):
        jax.eval_shape(lstm, lstm.init(jax.random.key(0)), jnp.zeros((5, 2, 3), jnp.float32))


def test_the_effort_is_that_of_this_implementation():
    lstm, params, xs, _ = network()
    with pytest.raises(ValueError, match="newton_effort needs implementation='newton', got 'scan'"):
        newton_effort(replace(lstm, implementation="scan"), params, xs)


def test_it_refuses_shard_map():
    lstm = jaxlstm.LSTM(3, 4, implementation="newton")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "data")
    over_rows = jax.shard_map(lambda xs: lstm(params, xs)[0], mesh=mesh, in_specs=rows, out_specs=rows)
    params = lstm.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"implementation='newton' does not run within jax\.shard_map"):
        over_rows(jnp.ones((5, 2, 3), jnp.float32))
