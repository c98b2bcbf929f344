"""The parallel-in-time backend: parity with the oracle in both modes, its options and its statistics."""

import re
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import parity
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxlstm
from jaxlstm.experimental.newton import Newton
from jaxlstm.experimental.newton_stats import newton_stats

pytestmark = pytest.mark.slow

NUM_STEPS = 60
MODES = [Newton("full"), Newton("diagonal", damping=0.1)]
DIAGONAL = Newton("diagonal", damping=0.2)
UNSTABLE = {"recurrent_scale": 8.0, "forget_bias": 6.0}  # differences grow by a factor of 1e4 over these steps

# Parity


@pytest.mark.parametrize("inputs", ["everything", "everything reverse"])
@pytest.mark.parametrize(
    "configuration",
    ["two layers bidirectional projection", "projection", "remat", "peephole", "cifg", "rnn", "all options of a layer"],
)
def test_newton_equals_oracle(configuration, inputs):
    parity.check_outputs_and_gradients(configuration, inputs, "newton")


@pytest.mark.parametrize(
    "configuration",
    ["bidirectional", "cifg", "peephole", "zoneout rnn", "recurrent dropout", "remat", "learned state unprojected"],
)
def test_newton_diagonal_mode_equals_oracle(configuration, monkeypatch):
    unprojected = cases.CONFIGURATIONS["learned state"] | {"proj_size": None}  # the mode does not support a projection
    monkeypatch.setitem(cases.CONFIGURATIONS, "learned state unprojected", unprojected)
    parity.check_outputs_and_gradients(configuration, "everything", DIAGONAL)


@pytest.mark.parametrize("options", [Newton("full"), Newton("diagonal")])
@pytest.mark.parametrize("configuration", ["indrnn", "paralstm"])
def test_newton_of_diagonal_cells_equals_oracle(configuration, options):
    parity.check_outputs_and_gradients(configuration, "everything", options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("configuration", ["one layer", "two layers bidirectional projection", "rnn"])
def test_newton_narrow_dtypes_equal_oracle(configuration, dtype):
    parity.check_narrow_dtype(configuration, dtype, "newton")


@pytest.mark.parametrize("batch", [(), (1,), (2, 2), (1, 2, 2)])
def test_newton_supports_any_batch_axes(batch):
    parity.check_batch_axes(batch, "newton")


@pytest.mark.parametrize("implementation", ["newton", DIAGONAL])
def test_newton_supports_vmap(implementation):
    parity.check_vmap(implementation)


@pytest.mark.parametrize("configuration", ["rnn", "projection", "two layers"])
def test_newton_higher_derivatives_equal_oracle(configuration):
    """Without ``remat``: `jax.checkpoint` drops custom rules of second derivatives."""
    parity.check_higher_derivatives(configuration, "newton")


@pytest.mark.parametrize("options", MODES)
def test_newton_derivatives_equal_scan_over_long_sequences(options):
    lstm, params, xs, state = make_network(bidirectional=True)
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 3, 4)), state)
    rng = np.random.default_rng(0)
    args = (params, xs, state)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), args)

    def derivatives(implementation):
        loss = make_loss(replace(lstm, implementation=implementation))
        return jax.jvp(loss, args, direction), jax.jvp(jax.grad(loss, (0, 1, 2)), args, direction)

    assert_close_despite_growth(derivatives(options), derivatives("scan"))


# Iterations


def make_network(recurrent_scale=1.0, forget_bias=1.0, **options):
    """Returns a network with scaled recurrent weights, its parameters, inputs and a nonzero state."""
    lstm = jaxlstm.LSTM(2, 4, param_dtype=jnp.float64, forget_bias=forget_bias, **options)
    params = lstm.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a * recurrent_scale if a.shape == (16, 4) else a, params)
    xs = jax.random.normal(jax.random.key(1), (NUM_STEPS, 3, 2), jnp.float64)
    state = jax.tree.map(lambda a: 0.3 + a, lstm.initial_state((3,)))
    return lstm, params, xs, state


def make_loss(lstm):
    def loss(*args):
        ys, state = lstm(*args)
        return (ys**2).sum() + sum((a**2).sum() for a in state)

    return loss


def assert_close_despite_growth(actual, expected, growth=1e5):
    """Asserts equality up to rounding errors that the network multiplies by ``growth``."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=growth * 1e-15, atol=growth * 1e-15 * max(1, np.abs(b).max()))


def test_newton_converges_in_few_iterations():
    lstm, params, xs, state = make_network()
    full, diagonal = (newton_stats(replace(lstm, implementation=options), params, xs, state)[0] for options in MODES)
    for stats in (full, diagonal):
        assert stats.sequential_steps.tolist() == [0]
        assert 0 < stats.residual[0] <= 32 * np.finfo(np.float64).eps
    assert 3 <= full.iterations[0] <= 7
    assert full.iterations[0] < diagonal.iterations[0] < NUM_STEPS


@pytest.mark.parametrize("cell", ["indrnn", "paralstm"])
def test_newton_diagonal_mode_is_exact_for_diagonal_cells(cell):
    """The blocks are the whole Jacobian: as few iterations as in full mode, and the trajectory of scan."""
    network = jaxlstm.RNN(2, 4, cell=cell, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    params, xs = cases.random_params(network, rng), rng.standard_normal((NUM_STEPS, 3, 2))
    full, diagonal = (replace(network, implementation=Newton(mode)) for mode in ("full", "diagonal"))
    (full_stats,), (stats,) = (newton_stats(each, params, xs) for each in (full, diagonal))
    assert stats.sequential_steps.tolist() == [0]
    assert 2 <= stats.iterations[0] <= 8
    assert stats.iterations == full_stats.iterations
    parity.assert_close(
        diagonal(params, xs), replace(network, implementation="scan")(params, xs), np.float64, NUM_STEPS
    )


def test_newton_refuses_heads():
    network = jaxlstm.LSTM(2, 4, heads=2, implementation="newton")
    with pytest.raises(ValueError, match="implementation='newton' does not support recurrent weights that are not den"):
        jax.eval_shape(network, network.init(jax.random.key(0)), jnp.zeros((5, 2, 2), jnp.float32))


def test_newton_looser_tolerance_takes_fewer_iterations():
    lstm, params, xs, state = make_network()
    loose, tight = (
        newton_stats(replace(lstm, implementation=Newton(tolerance=t)), params, xs, state)[0] for t in (1e-2, None)
    )
    assert loose.iterations[0] < tight.iterations[0]
    assert tight.residual[0] < loose.residual[0] <= 1e-2


@pytest.mark.parametrize("options", MODES)
def test_newton_takes_unsolved_steps_sequentially(options):
    lstm, params, xs, state = make_network(**UNSTABLE)
    limited = replace(lstm, implementation=replace(options, max_iterations=5))
    (stats,) = newton_stats(limited, params, xs, state)
    assert stats.iterations.tolist() == [5]
    assert not stats.residual[0] <= 1e-6
    assert 0 < stats.sequential_steps[0] <= NUM_STEPS - 5  # each iteration solves a step
    scan = replace(lstm, implementation="scan")
    assert_close_despite_growth(limited(params, xs, state), scan(params, xs, state))


@pytest.mark.parametrize("options", MODES)
def test_newton_solves_all_steps_in_as_many_iterations_if_products_of_jacobians_overflow(options):
    lstm, params, xs, _ = make_network(recurrent_scale=1e12)  # no unit is saturated at the guess, a state of zeros
    newton = replace(lstm, implementation=replace(options, max_iterations=NUM_STEPS))
    (stats,) = newton_stats(newton, params, xs)
    assert stats.sequential_steps.tolist() == [0]
    assert_close_despite_growth(newton(params, xs), replace(lstm, implementation="scan")(params, xs))


def test_newton_gradient_equals_scan_if_iterations_fail():
    lstm, params, xs, state = make_network(**UNSTABLE)

    def gradient(implementation):
        return jax.grad(make_loss(replace(lstm, implementation=implementation)), (0, 1, 2))(params, xs, state)

    assert_close_despite_growth(gradient(Newton(max_iterations=3)), gradient("scan"))


def test_newton_on_failure_raises():
    lstm, params, xs, state = make_network(**UNSTABLE)
    limited = replace(lstm, implementation=Newton(max_iterations=5, on_failure="raise"))
    with pytest.raises(Exception, match=r"solved \d+ of 60 steps in max_iterations=5"):
        jax.block_until_ready(limited(params, xs, state))
    with pytest.raises(Exception, match=r"solved \d+ of 60 steps in max_iterations=5"):
        jax.block_until_ready(jax.vmap(lambda x: limited(params, x)[0], 1)(xs))
    sufficient = replace(lstm, implementation=Newton(max_iterations=NUM_STEPS, on_failure="raise"))
    scan = replace(lstm, implementation="scan")
    assert_close_despite_growth(sufficient(params, xs, state), scan(params, xs, state))


def test_newton_confines_nan_to_later_steps_of_its_sequence():
    lstm, params, xs, _ = make_network()
    ys, _ = replace(lstm, implementation="newton")(params, xs.at[20, 1].set(jnp.nan))
    expected = np.zeros((NUM_STEPS, 3), bool)
    expected[20:, 1] = True
    np.testing.assert_array_equal(np.isnan(ys).any(-1), expected)


# Options and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode must be one of 'full', 'diagonal'; got 'half'"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"damping": 1.0}, "damping must be in [0, 1), got 1.0"),
        ({"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
        ({"tolerance": float("inf")}, "tolerance must be finite, got inf"),
        ({"on_failure": "ignore"}, "on_failure must be one of 'sequential', 'raise'; got 'ignore'"),
    ],
)
def test_newton_refuses_invalid_options(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the test suite's own check of types comes first
    with pytest.raises(ValueError, match=re.escape(message)):
        Newton(**options)


@pytest.mark.parametrize(
    ("options", "name"), [({"proj_size": 2}, "a projection"), ({"layer_norm": True}, "layer normalization")]
)
def test_newton_diagonal_mode_refuses_layers_without_blocks(options, name):
    lstm = jaxlstm.LSTM(3, 4, implementation=Newton("diagonal"), **options)
    with pytest.raises(ValueError, match=re.escape(f"Newton(mode='diagonal') does not support {name}")):
        jax.eval_shape(lstm, lstm.init(jax.random.key(0)), jnp.zeros((5, 2, 3), jnp.float32))


def test_newton_refuses_shard_map():
    lstm = jaxlstm.LSTM(3, 4, implementation="newton")
    params = lstm.init(jax.random.key(0))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "data")
    sharded = jax.shard_map(lambda xs: lstm(params, xs)[0], mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"implementation='newton' does not run within jax\.shard_map"):
        sharded(jnp.ones((5, 2, 3), jnp.float32))


# Statistics


def test_newton_stats_has_one_number_per_layer_and_direction():
    lstm, params, xs, _ = make_network(num_layers=2, bidirectional=True, remat=16, implementation=Newton("diagonal"))
    options = {"lengths": np.array([60, 0, 20]), "resets": np.arange(60)[:, None] % [7, 9, 11] == 3, "reverse": True}
    stats = newton_stats(lstm, params, xs, **options)
    assert [a.shape for a in jax.tree.leaves(stats)] == [(2,)] * 6
    for layer in stats:
        assert ((layer.iterations > 0) & (layer.iterations <= 16)).all()  # of the chunk with the most
        assert layer.sequential_steps.tolist() == [0, 0]


def test_newton_stats_refuses_another_implementation():
    lstm, params, xs, _ = make_network()
    with pytest.raises(ValueError, match="newton_stats needs implementation='newton', got 'scan'"):
        newton_stats(replace(lstm, implementation="scan"), params, xs)


def test_newton_stats_refuses_a_sequence_without_steps():
    lstm, params, xs, _ = make_network(implementation="newton")
    with pytest.raises(ValueError, match="xs must have at least one step, got none"):
        newton_stats(lstm, params, xs[:0])
