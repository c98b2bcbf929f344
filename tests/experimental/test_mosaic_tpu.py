"""The TPU kernel: its numbers by interpretation, its program by lowering it for a TPU, its refusals by name."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu
from jax.sharding import AxisType, PartitionSpec
from test_parity import assert_close
from tolerance import tolerance

import jaxlstm
from jaxlstm.experimental.pallas import mosaic_tpu_scan

CHIP = tpu.ChipVersion.TPU_V5E


def network(*sizes, **options):
    return jaxlstm.LSTM(*sizes, implementation="pallas", **options)


def test_parity_with_a_projection():
    test_parity.test_outputs_state_and_gradients("projection", "everything reverse", "pallas")


@pytest.mark.slow
def test_narrow_products():
    test_parity.test_narrow_dtypes("rnn", jnp.bfloat16, "pallas")


@pytest.mark.slow
def test_forward_mode_and_second_derivatives_of_all_but_remat(monkeypatch):
    options = {name: value for name, value in cases.CONFIGURATIONS["all of it"].items() if name != "remat"}
    monkeypatch.setitem(cases.CONFIGURATIONS, "all of it", options)
    test_parity.test_forward_mode_and_second_derivatives("all of it", "pallas")


@pytest.mark.parametrize(
    ("rows", "steps", "reverse"), [pytest.param(3, 1, False, marks=pytest.mark.slow), (2, 3, True), (8, 20, False)]
)
def test_the_scan_of_the_kernel_is_that_of_jax(rows, steps, reverse):
    """In blocks that do not divide rows and steps, with constants, names, booleans, vectors and no array at all."""
    rng = np.random.default_rng(0)
    slopes = rng.standard_normal((2, 1, 4))

    def body(resident, carry, now):
        w, v = resident
        h, nothing = carry
        x, taken = now
        z = checkpoint_name(x * slopes, "z").sum(0) + h @ w + jnp.broadcast_to(v[None], h.shape)
        h = jnp.where(jnp.broadcast_to(taken, h.shape), jnp.tanh(z), h)
        return (h, nothing), {"h": h, "z": z.astype(jnp.float32)}

    resident = (rng.standard_normal((4, 4)), rng.standard_normal(4))
    over_time = (rng.standard_normal((7, 2, 5, 4)), rng.random((7, 5, 1)) < 0.7)
    carry = (rng.standard_normal((5, 4)), None)
    resident, carry, over_time = jax.tree.map(jnp.asarray, (resident, carry, over_time))
    actual = mosaic_tpu_scan.scan(body, resident, carry, over_time, rows=rows, steps=steps, reverse=reverse)
    wanted = lax.scan(lambda carry, now: body(resident, carry, now), carry, over_time, reverse=reverse)
    assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(lambda a: a.dtype, wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, **tolerance(b.dtype, 7 * 4))


def test_a_batch_in_blocks(monkeypatch):
    """Rows that fill up the last block reach no gradient, not even those that are summed within the recurrence."""
    case = cases.make("peephole", "everything")

    def gradient(implementation):
        lstm = jaxlstm.LSTM(3, 5, param_dtype=jnp.float64, cell="peephole", implementation=implementation)

        def loss(*arguments):
            return cases.loss(*lstm(*arguments, **case.options), case.cotangents)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(case.params, case.xs, case.state)

    monkeypatch.setattr(api, "MOST_ROWS", 3)
    monkeypatch.setattr(api, "_even_blocks", lambda batch, most: most)
    assert_close(gradient("pallas"), gradient("scan"), np.float64, case.xs.size)


@pytest.mark.parametrize(
    "argument", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_the_gradient_of_one_argument_is_that_of_all(argument):
    case = cases.make("one layer", "plain")
    lstm = network(3, 5, param_dtype=jnp.float64)

    def loss(*arguments):
        return cases.loss(*lstm(*arguments), case.cotangents)

    arguments = (case.params, case.xs, case.state)
    wanted = cases.expected("one layer", "plain")[1][argument]
    assert_close(jax.jit(jax.grad(loss, argument))(*arguments), wanted, np.float64, case.xs.size)


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


EACH = [
    pytest.param(options, sizes, marks=[] if n == m else [pytest.mark.slow], id=f"{options}-{sizes}")
    for n, options in enumerate(OPTIONS)
    for m, sizes in enumerate(SIZES)
]


@pytest.mark.parametrize(("options", "sizes"), EACH)
def test_it_is_lowered_for_a_tpu(options, sizes):
    """One kernel forward; forward and backward for a gradient; two forward for a tangent."""
    steps, batch, inputs, units = sizes
    lstm = network(inputs, units, **options)
    shapes = (
        jax.eval_shape(lstm.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((steps, batch, inputs), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((steps, batch), jnp.bool_),
    )

    def loss(params, xs, lengths, resets):
        ys, state = lstm(params, xs, lengths=lengths, resets=resets)
        return sum((a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves((ys, state)))

    def slope(params, *others):
        return jax.jvp(lambda params: loss(params, *others), (params,), (jax.tree.map(jnp.ones_like, params),))

    def kernels(function):
        with mosaic_tpu_scan.making_for(CHIP):
            return (
                jax.export.export(jax.jit(function), platforms=("tpu",))(*shapes).mlir_module().count("tpu_custom_call")
            )

    kinds = [kernels(f) for f in (loss, jax.grad(loss, (0, 1)), slope)]
    least = 2 if steps % options.get("unroll", 1) else 1  # a kernel for the steps that are left over
    assert kinds[0] >= least
    assert kinds[1] >= 2 * least
    assert kinds[2] >= 2 * least


def test_without_a_tpu_it_is_refused_by_name():
    lstm = network(3, 5)
    with (
        mosaic_tpu_scan.making_for(None),
        pytest.raises(ValueError, match=r"implementation='pallas' .* got the backend 'cpu'"),
    ):
        traced(lstm)


def traced(lstm):
    """Shapes of what it returns, which are to be had without a computation."""
    return jax.eval_shape(
        lstm, jax.eval_shape(lstm.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 2, 3), "float32")
    )


def test_a_dtype_that_a_tpu_has_not_is_refused():
    lstm = network(3, 5, param_dtype=jnp.float64)
    with (
        mosaic_tpu_scan.making_for(CHIP),
        pytest.raises(ValueError, match=r"float32 and bfloat16 .* got products in float64"),
    ):
        traced(lstm)


@pytest.mark.parametrize(("dtype", "mebibytes"), [(jnp.float32, 1024), (jnp.bfloat16, 512)])
def test_weights_that_do_not_fit_are_refused_with_the_size_that_does(dtype, mebibytes):
    with mosaic_tpu_scan.making_for(CHIP):
        said = f"4 x 8192 x 8192 of {jnp.dtype(dtype).name} are {mebibytes}.0 MiB, .* a v5e has 120.0 MiB for them"
        with pytest.raises(ValueError, match=said) as refusal:
            traced(network(3, 8192, dtype=dtype))
        largest = int(re.findall(r"\d+", str(refusal.value))[-1])
        traced(network(3, largest, dtype=dtype))
        with pytest.raises(ValueError, match=f"hidden_size fits up to {largest}"):
            traced(network(3, largest + 1, dtype=dtype))
        assert 4 * largest**2 * jnp.dtype(dtype).itemsize > 0.75 * 2**27


@pytest.mark.slow
def test_over_devices_it_runs_within_shard_map():
    case = cases.make("one layer", "plain")
    lstm = network(3, 5, param_dtype=jnp.float64)

    def loss(params, xs):
        return (lstm(params, xs)[0] ** 2).sum()

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec(None, "data"))
    total = jax.shard_map(
        lambda *a: lax.psum(loss(*a), "data"), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    actual, wanted = (jax.jit(jax.grad(f, (0, 1)))(case.params, case.xs) for f in (total, loss))
    assert_close(actual, wanted, np.float64, case.xs.size)


def test_explicit_axes_are_refused():
    case = cases.make("one layer", "plain")
    lstm = network(3, 5, param_dtype=jnp.float64)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        xs = jax.device_put(case.xs, PartitionSpec(None, "data"))
        with pytest.raises(ValueError, match=r"within jax.shard_map.* explicit axes \('data',\)"):
            lstm(case.params, xs)
