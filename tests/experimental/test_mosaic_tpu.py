"""TPU kernels: numbers in interpret mode, programs lowered for a TPU, errors."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu
from jax.sharding import AxisType, PartitionSpec
from tolerance import tolerance

import jaxlstm
from jaxlstm.experimental.pallas import mosaic_tpu, mosaic_tpu_scan
from jaxlstm.experimental.pallas.target import kernel_target

pytestmark = pytest.mark.slow
CHIP = tpu.ChipVersion.TPU_V5E


def network(*sizes, **options):
    return jaxlstm.LSTM(*sizes, implementation="pallas", **options)


PARITY_CASES = [
    ("two layers bidirectional projection", "everything"),
    ("two layers bidirectional projection", "everything reverse"),
    ("remat", "everything"),
    ("peephole", "everything"),
    ("cifg", "everything"),
    ("rnn", "everything"),
    ("rnn", "everything reverse"),
    ("all options of a layer", "everything"),
]


@pytest.mark.parametrize(("configuration", "inputs"), PARITY_CASES)
def test_pallas_outputs_and_gradients_equal_oracle(configuration, inputs):
    parity.check_outputs_and_gradients(configuration, inputs, "pallas")


@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [("rnn", jnp.float32), ("rnn", jnp.bfloat16), ("two layers bidirectional projection", jnp.bfloat16)],
)
def test_pallas_narrow_dtype_equals_oracle(configuration, dtype):
    parity.check_narrow_dtype(configuration, dtype, "pallas")


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_pallas_supports_any_batch_axes(batch):
    parity.check_batch_axes(batch, "pallas")


def test_pallas_vmap_equals_batch():
    parity.check_vmap("pallas")


def test_pallas_higher_derivatives_equal_oracle():
    parity.check_higher_derivatives("rnn", "pallas")


def test_pallas_higher_derivatives_of_all_options_equal_oracle(monkeypatch):
    """Without remat: under `jax.checkpoint` there are only first derivatives."""
    options = {name: value for name, value in cases.CONFIGURATIONS["all options of a layer"].items() if name != "remat"}
    # The length of the name seeds the weights. With these the third derivatives, the error of the finite differences,
    # are small enough for the tolerance.
    name = "unchunked"
    monkeypatch.setitem(cases.CONFIGURATIONS, name, options)
    monkeypatch.setattr(cases, "WITH_KEY", (*cases.WITH_KEY, name))
    parity.check_higher_derivatives(name, "pallas")


@pytest.mark.parametrize(("rows", "steps", "reverse"), [(3, 1, False), (2, 3, True), (8, 20, False)])
def test_scan_equals_lax_scan(rows, steps, reverse):
    """Blocks that do not divide rows and steps; constants, names, booleans, vectors and a carry without arrays."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((2, 1, 4))

    def body(resident, carry, inputs_t):
        w, v = resident
        h, nothing = carry
        x, mask = inputs_t
        z = checkpoint_name(x * factors, "z").sum(0) + h @ w + jnp.broadcast_to(v[None], h.shape)
        h = jnp.where(jnp.broadcast_to(mask, h.shape), jnp.tanh(z), h)
        return (h, nothing), {"h": h, "z": z.astype(jnp.float32)}

    resident = (rng.standard_normal((4, 4)), rng.standard_normal(4))
    over_time = (rng.standard_normal((7, 2, 5, 4)), rng.random((7, 5, 1)) < 0.7)
    carry = (rng.standard_normal((5, 4)), None)
    resident, carry, over_time = jax.tree.map(jnp.asarray, (resident, carry, over_time))
    actual = mosaic_tpu_scan.scan(body, resident, carry, over_time, rows=rows, steps=steps, reverse=reverse)
    expected = lax.scan(lambda carry, inputs_t: body(resident, carry, inputs_t), carry, over_time, reverse=reverse)
    assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(lambda a: a.dtype, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, **tolerance(b.dtype, 7 * 4))


def test_padding_rows_of_last_block_reach_no_gradient(monkeypatch):
    """Also the gradients of peepholes, which are summed within the recurrence."""
    case = cases.make("peephole", "everything")

    def gradient(implementation):
        lstm = cases.network("peephole", implementation)

        def loss(*args):
            return cases.loss(*lstm(*args, **case.options), case.cotangents)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(case.params, case.xs, case.state)

    monkeypatch.setattr(mosaic_tpu, "even_block_rows", lambda batch_size, max_rows: 3)
    parity.assert_close(gradient("pallas"), gradient("scan"), np.float64, case.xs.size)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_pallas_gradient_of_one_argument_equals_oracle(argument):
    case = cases.make("one layer", "plain")
    lstm = cases.network("one layer", "pallas")

    def loss(*args):
        return cases.loss(*lstm(*args), case.cotangents)

    expected = cases.expected("one layer", "plain")[1][argument]
    actual = jax.jit(jax.grad(loss, argument))(case.params, case.xs, case.state)
    parity.assert_close(actual, expected, np.float64, case.xs.size)


SIZES = [  # T, B, I, H
    (5, 8, 128, 128),
    (7, 3, 5, 20),
    (4, 300, 16, 200),
]
OPTIONS = [
    {},
    {"dtype": jnp.bfloat16},
    {"cell": "peephole", "layer_norm": True, "proj_size": 7, "zoneout_h": 0.1, "unroll": 3},
    {"cell": "rnn", "activation": "relu", "dtype": jnp.bfloat16, "remat": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_lower_for_tpu(options, sizes):
    """One kernel forward; forward and backward for a gradient; two forward for a tangent."""
    num_steps, batch_size, inputs, units = sizes
    lstm = network(inputs, units, **options)
    shapes = (
        jax.eval_shape(lstm.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((num_steps, batch_size, inputs), jnp.float32),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        jax.ShapeDtypeStruct((num_steps, batch_size), jnp.bool_),
    )

    def loss(params, xs, lengths, resets):
        ys, state = lstm(params, xs, lengths=lengths, resets=resets)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves((ys, state)))

    def tangent(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    def count_kernels(function):
        with kernel_target(CHIP):
            exported = jax.export.export(jax.jit(function), platforms=("tpu",))(*shapes)
        return exported.mlir_module().count("tpu_custom_call")

    forward, backward, jvp = (count_kernels(f) for f in (loss, jax.grad(loss, (0, 1)), tangent))
    least = 2 if num_steps % options.get("unroll", 1) else 1  # a second kernel takes the remaining steps
    assert forward >= least
    assert backward >= 2 * least
    assert jvp >= 2 * least


def trace(lstm):
    """Traces a call without computing it."""
    params = jax.eval_shape(lstm.init, jax.random.key(0))
    return jax.eval_shape(lstm, params, jax.ShapeDtypeStruct((4, 2, 3), "float32"))


def test_pallas_without_tpu_raises():
    message = r"implementation='pallas' .* got the backend 'cpu'"
    with kernel_target(None), pytest.raises(ValueError, match=message):
        trace(network(3, 5))


def test_pallas_unsupported_dtype_raises():
    message = r"implementation='pallas' needs float32 or bfloat16 .* got products in float64"
    with kernel_target(CHIP), pytest.raises(ValueError, match=message):
        trace(network(3, 5, param_dtype=jnp.float64))


@pytest.mark.parametrize(("dtype", "mebibytes"), [(jnp.float32, 1024), (jnp.bfloat16, 512)])
def test_weights_too_large_for_vmem_raise_with_largest_size(dtype, mebibytes):
    name = jnp.dtype(dtype).name
    message = f"4 x 8192 x 8192 in {name} take {mebibytes}.0 MiB, .* a v5e has 120.0 MiB for them"
    with kernel_target(CHIP):
        with pytest.raises(ValueError, match=message) as error:
            trace(network(3, 8192, dtype=dtype))
        largest = int(re.findall(r"\d+", str(error.value))[-1])
        trace(network(3, largest, dtype=dtype))
        with pytest.raises(ValueError, match=f"hidden_size fits up to {largest}"):
            trace(network(3, largest + 1, dtype=dtype))
        assert 4 * largest**2 * jnp.dtype(dtype).itemsize > 0.75 * 2**27


def test_pallas_runs_within_shard_map():
    case = cases.make("one layer", "plain")
    lstm = cases.network("one layer", "pallas")

    def loss(params, xs):
        return (lstm(params, xs)[0] ** 2).sum()

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec(None, "data"))
    total = jax.shard_map(
        lambda *a: lax.psum(loss(*a), "data"), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(case.params, case.xs) for f in (total, loss))
    parity.assert_close(actual, expected, np.float64, case.xs.size)


def test_pallas_on_explicit_mesh_axes_raises():
    case = cases.make("one layer", "plain")
    lstm = cases.network("one layer", "pallas")
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        xs = jax.device_put(case.xs, PartitionSpec(None, "data"))
        with pytest.raises(ValueError, match=r"explicit axes \('data',\); call it within jax.shard_map"):
            lstm(case.params, xs)
