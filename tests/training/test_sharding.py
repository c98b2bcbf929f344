"""A batch over two devices: the same numbers as on one."""

import cases
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerance import tolerance

import jaxlstm


# Newton's method refuses shard_map; a kernel runs on each device by itself, for which `test_pallas` has its own test.
@pytest.mark.parametrize("implementation", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit, "shard_map"])
@pytest.mark.parametrize("given_state", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_batch_over_two_devices(given_state, axis_type, implementation):
    configuration = "two layers bidirectional projection"
    case = cases.make(configuration, "everything")
    lstm = jaxlstm.LSTM(
        3, 5, param_dtype="float64", implementation=implementation, **cases.CONFIGURATIONS[configuration]
    )

    def loss(params, xs, state, options, cotangents):
        return cases.loss(*lstm(params, xs, state, **options), cotangents)

    def at(axis):
        return PartitionSpec(*[None] * axis, "data")

    state = case.state if given_state else None
    arguments = jax.device_get((case.params, case.xs, state, case.options, case.cotangents))
    specs = (
        jax.tree.map(lambda _: PartitionSpec(), case.params),
        at(1),
        jax.tree.map(lambda _: at(1), state),
        {name: (at(0) if name == "lengths" else at(1)) for name in case.options},
        jax.tree.map(lambda _: at(1), case.cotangents),
    )
    wanted = jax.grad(loss, (0, 1))(*arguments)
    explicit = axis_type is AxisType.Explicit
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), arguments, specs)
        total = loss
        if axis_type == "shard_map":
            total = jax.shard_map(lambda *a: jax.lax.psum(loss(*a), "data"), in_specs=specs, out_specs=PartitionSpec())
        actual = jax.jit(jax.grad(total, (0, 1)))(*placed)
    bounds = tolerance(np.float64, case.xs.size)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **bounds)


@pytest.mark.parametrize("implementation", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "varying",
    cases.slow_but(["params"], ["params", "lengths", "mask", "resets", "key", "state", "xs"]),
)
def test_within_shard_map_any_argument_may_differ_between_devices(varying, implementation):
    """An ensemble over devices, say: two networks, each on its own device, and data that both have."""
    lstm = jaxlstm.LSTM(3, 5, param_dtype="float64", num_layers=2, zoneout_h=0.3, implementation=implementation)
    rng = np.random.default_rng(0)
    both = {
        "params": jax.vmap(lstm.init)(jax.random.split(jax.random.key(0))),
        "xs": rng.normal(size=(2, 6, 4, 3)),
        "lengths": rng.integers(0, 7, (2, 4)),
        "mask": rng.random((2, 6, 4)) < 0.7,
        "resets": rng.random((2, 6, 4)) < 0.3,
        "key": jax.random.split(jax.random.key(1)),
        "state": jax.tree.map(lambda a: rng.normal(size=(2, *a.shape)), lstm.initial_state(4)),
    }
    one = jax.tree.map(lambda a: a[0], both)

    def slopes(given):
        given = one | {name: given[name] for name in given}

        def loss(params, xs, state):
            marks = {name: given[name] for name in ("lengths", "mask", "resets", "key")}
            ys, last = lstm(params, xs, state, **marks)
            return (ys**2).sum() + (last.c**3).sum()

        return jax.grad(loss, (0, 1, 2))(given["params"], given["xs"], given["state"])

    def mapped(given):
        return jax.tree.map(lambda a: a[None], slopes(jax.tree.map(lambda a: a[0], given)))

    given = {varying: both[varying]}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    actual = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(rows,), out_specs=rows))(given)
    wanted = jax.vmap(slopes)(given)
    # Of what both have, the derivative within shard_map is that of the sum over devices.
    for name, a, b in zip(("params", "xs", "state"), actual, wanted):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
            whole = y if name in given else np.broadcast_to(y.sum(0), y.shape)
            np.testing.assert_allclose(x, whole, **tolerance(np.float64, one["xs"].size))
