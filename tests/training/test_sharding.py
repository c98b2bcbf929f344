"""An LSTM with its batch on two devices gives the numbers of one device."""

from functools import lru_cache

import cases
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerance import tolerance

import jaxlstm

CASE = cases.make("bidirectional", "everything")


@lru_cache
def make_loss(implementation):
    """Returns the loss of `CASE` as a function of the arguments of the network and the weights of the loss."""
    lstm = cases.network("bidirectional", implementation)

    def loss(params, xs, state, options, cotangents):
        return cases.loss(*lstm(params, xs, state, **options), cotangents)

    return loss


@lru_cache
def gradient_on_one_device(with_state, implementation):
    state = CASE.state if with_state else None
    gradient = jax.jit(jax.grad(make_loss(implementation), (0, 1)))
    return jax.device_get(gradient(CASE.params, CASE.xs, state, CASE.options, CASE.cotangents))


# Newton's method does not support shard_map; the kernels have a test for it in tests/experimental.
@pytest.mark.parametrize("implementation", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit, "shard_map"])
@pytest.mark.parametrize("with_state", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lstm_with_batch_on_two_devices(with_state, axis_type, implementation):
    case, loss = CASE, make_loss(implementation)

    def split_axis(axis):
        return PartitionSpec(*[None] * axis, "data")

    state = case.state if with_state else None
    arguments = jax.device_get((case.params, case.xs, state, case.options, case.cotangents))
    specs = (
        jax.tree.map(lambda _: PartitionSpec(), case.params),
        split_axis(1),
        jax.tree.map(lambda _: split_axis(1), state),
        {name: (split_axis(0) if name == "lengths" else split_axis(1)) for name in case.options},
        jax.tree.map(lambda _: split_axis(1), case.cotangents),
    )
    explicit = axis_type is AxisType.Explicit
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), arguments, specs)
        total = loss
        if axis_type == "shard_map":
            total = jax.shard_map(lambda *a: jax.lax.psum(loss(*a), "data"), in_specs=specs, out_specs=PartitionSpec())
        actual = jax.jit(jax.grad(total, (0, 1)))(*placed)
    bounds = tolerance(np.float64, case.xs.size)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(gradient_on_one_device(with_state, implementation))):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **bounds)


@pytest.mark.parametrize("implementation", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "zoneout_h": 0.2, "zoneout_c": 0.1, "dropout": 0.3, "input_dropout": 0.1},
        {"num_layers": 2, "recurrent_dropout": 0.2, "dropout": 0.3, "variational": True, "output_dropout": 0.2},
    ],
    ids=["zoneout", "variational"],
)
def test_random_masks_on_explicit_mesh_equal_one_device(options, implementation):
    lstm = jaxlstm.LSTM(3, 5, param_dtype="float64", implementation=implementation, **options)
    params = cases.random_params(lstm, np.random.default_rng(0))
    xs = np.random.default_rng(1).normal(size=(6, 4, 3))

    def gradient(params, xs):
        return jax.grad(lambda *args: (lstm(*args, key=jax.random.key(2))[0] ** 2).sum(), (0, 1))(params, xs)

    expected = jax.device_get(jax.jit(gradient)(params, xs))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        actual = jax.jit(gradient)(placed, jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "data"))))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance(np.float64, xs.size))


@pytest.mark.parametrize("implementation", ["fused", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "varying",
    ["params", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lengths", "mask", "resets", "key", "state", "xs"))],
)
def test_shard_map_of_any_single_argument(varying, implementation):
    """One argument differs between devices, such as the parameters of an ensemble; the others are replicated."""
    lstm = jaxlstm.LSTM(3, 5, param_dtype="float64", zoneout_h=0.3, implementation=implementation)
    rng = np.random.default_rng(0)
    both = {
        "params": jax.tree.map(lambda *a: np.stack(a), *(cases.random_params(lstm, rng) for _ in range(2))),
        "xs": rng.normal(size=(2, 6, 4, 3)),
        "lengths": rng.integers(0, 7, (2, 4)),
        "mask": rng.random((2, 6, 4)) < 0.7,
        "resets": rng.random((2, 6, 4)) < 0.3,
        "key": jax.random.split(jax.random.key(1)),
        "state": jax.tree.map(lambda a: rng.normal(size=(2, *a.shape)), lstm.state_shapes((4,))),
    }
    replicated = jax.tree.map(lambda a: a[0], both)

    def gradients(arguments):
        arguments = replicated | arguments

        def loss(params, xs, state):
            kwargs = {name: arguments[name] for name in ("lengths", "mask", "resets", "key")}
            ys, last = lstm(params, xs, state, **kwargs)
            return (ys**2).sum() + (last.c**3).sum()

        return jax.grad(loss, (0, 1, 2))(arguments["params"], arguments["xs"], arguments["state"])

    def per_device(arguments):
        return jax.tree.map(lambda a: a[None], gradients(jax.tree.map(lambda a: a[0], arguments)))

    arguments = {varying: both[varying]}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")
    actual = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=(split,), out_specs=split))(arguments)
    expected = jax.jit(jax.vmap(gradients))(arguments)
    # Within shard_map, the derivative by a replicated argument is summed over devices.
    for name, a, b in zip(("params", "xs", "state"), actual, expected):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
            total = y if name in arguments else np.broadcast_to(y.sum(0), y.shape)
            np.testing.assert_allclose(x, total, **tolerance(np.float64, replicated["xs"].size))
