"""The backend for affine cells, parallel over time: parity with the oracle and with the reference backend."""

import re
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerance import tolerance

import jaxlstm
from jaxlstm.cells import Cell, sigmoid

pytestmark = pytest.mark.slow

T, B, INPUT_SIZE, H = 11, 3, 2, 4
AFFINE = [name for name, options in cases.CONFIGURATIONS.items() if options.get("cell") in ("minlstm", "mingru")]
# Affine cells of other forms: a state c that h only shows, h and two states that read each other, no state at all.
SHOWN = Cell(
    gates={"f": sigmoid, "g": jnp.tanh, "o": sigmoid},
    update=lambda f, g, c: f * c + (1 - f) * g,
    output=lambda o, c: o * c,
    reads=dict.fromkeys("fgo", ("x",)),
    affine=True,
    candidate="g",
)
COUPLED = Cell(
    gates={"f": sigmoid, "g": None, "o": sigmoid},
    update=lambda f, g, h, c, n: (f * c + 0.3 * n + g, f * n - 0.2 * c + 0.1 * h),
    output=lambda o, c, n, h: o * (c + n) + 0.5 * h,
    reads=dict.fromkeys("fgo", ("x",)) | {"o": ("x", "static")},
    state={"c": 0.5, "n": -0.5},
    affine=True,
)
MEMORYLESS = Cell(gates={"y": jnp.tanh}, output=lambda y: y, reads={"y": ("x",)}, affine=True)
NETWORKS = {
    "minlstm regularized": {"cell": "minlstm", "zoneout_h": 0.3, "recurrent_dropout": 0.4, "learned_state": True},
    "mingru layers remat": {"cell": "mingru", "num_layers": 2, "bidirectional": True, "remat": 4},
    "shown": {"cell": SHOWN, "recurrent_dropout": 0.4, "zoneout_c": 0.2},
    "shown projection": {"cell": SHOWN, "proj_size": 3, "zoneout_h": 0.3, "bidirectional": True},
    "shown layer norm": {"cell": SHOWN, "layer_norm": True, "learned_state": True},
    "coupled": {"cell": COUPLED, "static_size": 2, "bidirectional": True, "use_bias": False},
    "memoryless": {"cell": MEMORYLESS, "zoneout_h": 0.2},
}


def make(name, num_steps=T, **options):
    """Makes a network in float64 with random parameters, inputs, a nonzero state, masks, resets and a key."""
    rng = np.random.default_rng(len(name))
    network = jaxlstm.RNN(INPUT_SIZE, H, param_dtype=jnp.float64, **NETWORKS[name] | options)
    params = cases.random_params(network, rng)
    xs = rng.standard_normal((num_steps, B, INPUT_SIZE))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), network.state_shapes((B,)))
    inputs = {
        "lengths": np.array([num_steps, 0, max(num_steps - 3, 1)]),
        "mask": rng.random((num_steps, B)) < 0.8,
        "resets": rng.random((num_steps, B)) < 0.3,
        "key": jax.random.key(1),
    }
    if network.static_size is not None:
        inputs["static"] = rng.standard_normal((B, network.static_size))
    return network, params, xs, state, inputs


def value_and_gradient(network, implementation, args, inputs, reverse):
    """Computes outputs, final state and the gradient of a loss over all of them."""
    network = replace(network, implementation=implementation)

    def loss(params, xs, state):
        result = network(params, xs, state, reverse=reverse, **inputs)
        return sum((jnp.cos(jnp.arange(a.size).reshape(a.shape)) * a).sum() for a in jax.tree.leaves(result)), result

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)


def assert_equal_to_scan(name, num_steps=T, *, reverse=False, masked=True):
    network, *args, inputs = make(name, num_steps)
    if not masked:
        inputs = {key: value for key, value in inputs.items() if key == "static"}
    expected, actual = (value_and_gradient(network, each, args, inputs, reverse) for each in ("scan", "associative"))
    normalized = 5**4 if network.layer_norm else 1  # as in `parity.num_terms`
    parity.assert_close(actual, expected, np.float64, normalized * 64)


@pytest.mark.parametrize(
    ("configuration", "inputs"),
    [
        *((configuration, "everything") for configuration in AFFINE),
        *((AFFINE[0], inputs) for inputs in cases.INPUTS if inputs != "everything"),
    ],
)
def test_associative_equals_oracle(configuration, inputs):
    parity.check_outputs_and_gradients(configuration, inputs, "associative")


@pytest.mark.parametrize("name", NETWORKS)
def test_associative_equals_scan(name):
    assert_equal_to_scan(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_associative_backward_in_time_equals_scan(name):
    assert_equal_to_scan(name, reverse=True)


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("minlstm regularized", 1), ("coupled", 1), ("coupled", 2)],
)
def test_associative_of_few_steps_equals_scan(name, num_steps):
    assert_equal_to_scan(name, num_steps)
    assert_equal_to_scan(name, num_steps, masked=False)


@pytest.mark.parametrize("name", ["minlstm regularized", "coupled"])
def test_associative_vmap_equals_batch(name):
    network, params, xs, state, inputs = make(name)
    del inputs["key"]
    network = replace(network, implementation="associative")

    def run(x, state, inputs):
        return network(params, x, state, **inputs)

    axes = {key: 0 if key in ("lengths", "static") else 1 for key in inputs}
    mapped = jax.jit(jax.vmap(run, (1, 1, axes), 1))(xs, state, inputs)
    parity.assert_close(mapped, run(xs, state, inputs), np.float64, 64)


def test_associative_higher_derivatives_equal_oracle():
    parity.check_higher_derivatives("minlstm", "associative")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_associative_in_narrow_dtypes_equals_oracle(dtype):
    parity.check_narrow_dtype("minlstm", dtype, "associative")


def test_associative_confines_nan_to_its_sequence():
    """A reset ends the effect of a NaN on outputs and on gradients of later steps."""
    network, params, xs, *_ = make("coupled", implementation="associative", bidirectional=False, static_size=2)
    xs[3, 1, 0] = np.nan
    resets = np.zeros((T, B), bool)
    resets[7] = True
    static = np.ones((B, 2))
    ys, _ = network(params, xs, resets=resets, static=static)
    expected = np.zeros((T, B), bool)
    expected[3:7, 1] = True
    np.testing.assert_array_equal(np.isnan(ys).any(-1), expected)
    gradient = jax.grad(lambda xs: network(params, xs, resets=resets, static=static)[0][7:].sum())(xs)
    assert np.isfinite(gradient[7:]).all()
    assert np.abs(gradient[7:]).min() > 0


def test_associative_has_no_loop_over_time():
    network, params, xs, *_ = make("minlstm regularized", 64, implementation="associative")
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: network(params, xs)[0].sum()))(params)
    assert not {"scan", "while"} & {equation.primitive.name for equation in cases.equations(jaxpr.jaxpr)}


def test_associative_on_explicit_mesh_equals_one_device():
    network, params, xs, *_ = make("minlstm regularized", 7, implementation="associative")
    xs = xs[:, :2]
    expected = network(params, xs)[0]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        xs = jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "data")))
        actual = jax.jit(lambda *args: network(*args)[0])(params, xs)
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **tolerance(expected.dtype, 16))


def test_associative_within_shard_map_equals_whole_batch():
    network = jaxlstm.RNN(INPUT_SIZE, H, cell="minlstm", implementation="associative")
    params = network.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (T, 4, INPUT_SIZE))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "data")
    sharded = jax.shard_map(lambda xs: network(params, xs)[0], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(sharded(xs), network(params, xs)[0], **tolerance(np.float32, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "lstm"}, "does not support a cell that is not declared affine=True; use 'scan' or 'fused'"),
        ({"cell": replace(SHOWN, reads=())}, "does not support a cell with gates that read h"),
        (
            {"cell": replace(SHOWN, output=lambda o, c, h: o * c + 0.5 * h), "layer_norm": True},
            "does not support layer normalization of the state of a cell that reads h",
        ),
    ],
    ids=["not affine", "gates read h", "layer norm"],
)
def test_associative_refuses_what_is_not_affine(options, message):
    network = jaxlstm.RNN(INPUT_SIZE, H, implementation="associative", **options)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), network.param_shapes())
    with pytest.raises(ValueError, match=re.escape(f"implementation='associative' {message}")):
        network(params, jnp.ones((T, B, INPUT_SIZE)))
