"""The fused backend in the layouts of larger sizes, in bfloat16 and over chunks of time."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from tolerance import narrow_operands

import jaxlstm
from jaxlstm import cells
from jaxlstm.dropout import RegularizerRates
from jaxlstm.recurrence import fused
from jaxlstm.recurrence.fused import Fused
from jaxlstm.recurrence.layout import BatchMajor, FeatureMajor, LayerSizes, choose_layout

FLOAT64, FLOAT32, BFLOAT16 = jnp.dtype("float64"), jnp.dtype("float32"), jnp.dtype("bfloat16")


SIZES = LayerSizes(batch_size=8, input_size=3, hidden_size=300)


@pytest.fixture
def set_layout(monkeypatch):
    """Returns a function that replaces the choice of the layout, for every batch and hidden size."""

    def set_layout(layout, **options):
        def choose(sizes, dtype, accum_dtype, order=None, *, may_project_first=True, layer_norm=False):
            project_first = may_project_first and not layer_norm and options.get("project_first", False)
            return layout(dtype, accum_dtype, **options | {"project_first": project_first})

        monkeypatch.setattr(fused, "choose_layout", choose)
        jax.clear_caches()

    yield set_layout
    jax.clear_caches()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(
    ("sizes", "layout", "hoist_inputs", "chunk_size"),
    [
        ((1, 63, 256), BatchMajor, False, 64),
        ((1, 64, 256), BatchMajor, True, 64),
        ((8, 127, 256), BatchMajor, False, 64),
        ((8, 128, 256), BatchMajor, True, 64),
        ((1, 3, 500), BatchMajor, False, 64),
        ((1, 3, 501), FeatureMajor, False, 64),
        ((8, 3, 501), FeatureMajor, False, 64),
        ((7, 3, 800), BatchMajor, False, 64),
        ((7, 3, 801), FeatureMajor, False, 64),
        ((9, 144, 800), BatchMajor, True, 32),
        ((16, 3, 256), BatchMajor, False, 32),
        ((16, 255, 257), FeatureMajor, False, 32),
        ((17, 3, 257), BatchMajor, False, 8),
        ((20, 3, 801), FeatureMajor, False, 8),
        ((32, 3, 257), FeatureMajor, False, 8),
    ],
)
def test_choose_layout_at_the_limits_of_each_rule(sizes, layout, hoist_inputs, chunk_size):
    chosen = choose_layout(LayerSizes(*sizes), FLOAT64, FLOAT64)
    one_row = sizes[0] == 1
    assert chosen == layout(FLOAT64, FLOAT64, hoist_inputs=hoist_inputs, chunk_size=chunk_size, one_row=one_row)


@pytest.mark.parametrize("configuration", ["one layer", pytest.param("projection", marks=pytest.mark.slow)])
def test_fused_one_row_equals_scan(configuration):
    case = cases.make(configuration, "plain", num_steps=9, batch_size=1)

    def derivatives(implementation):
        lstm = cases.network(configuration, implementation)

        def loss(params, xs):
            return cases.loss(*lstm(params, xs), case.cotangents)

        args = case.params, case.xs
        return jax.grad(loss, (0, 1))(*args), jax.jvp(jax.grad(loss), args, args)[1]

    parity.assert_close(derivatives("fused"), derivatives("scan"), jnp.float64, 10 * parity.num_terms(case))


SLOW_CONFIGURATIONS = (
    *("remat", "rnn", "all options of a layer"),
    *("layer norm peephole bidirectional", "layer norm rnn", "gru layer norm zoneout"),
)


@pytest.mark.parametrize(
    "configuration",
    [
        "learned state",
        "layer norm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CONFIGURATIONS),
    ],
)
@pytest.mark.parametrize(
    ("order", "hoist_inputs", "chunk_size"),
    [("feature", False, None), ("feature", True, 3), ("batch", False, 2)],
)
def test_fused_in_every_layout_equals_oracle(configuration, order, hoist_inputs, chunk_size):
    parity.check_outputs_and_gradients(configuration, "everything", Fused(order, hoist_inputs, chunk_size))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(
    ("sizes", "order", "is_hoisted"),
    [((32, 64, 640), "feature", False), ((32, 64, 100), "batch", True), ((3, 640, 100), "batch", True)],
)
def test_choose_layout_hoists_normalized_inputs_of_batch_major_loops(sizes, order, is_hoisted):
    chosen = choose_layout(LayerSizes(*sizes), FLOAT32, FLOAT32, layer_norm=True)
    assert (chosen.order, chosen.hoist_inputs) == (order, is_hoisted)
    narrow = LayerSizes(3, 400, 50)
    assert choose_layout(narrow, FLOAT32, FLOAT32).project_first
    assert not choose_layout(narrow, FLOAT32, FLOAT32, layer_norm=True).project_first


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(
    ("sizes", "is_first", "is_hoisted"),
    [
        ((32, 384, 64), True, True),
        ((32, 383, 64), False, False),
        ((32, 520, 65), False, True),
        ((64, 6, 1), True, True),
    ],
)
def test_choose_layout_computes_the_input_product_first_for_few_units(sizes, is_first, is_hoisted):
    assert not choose_layout(LayerSizes(*sizes), BFLOAT16, FLOAT32).project_first
    chosen = choose_layout(LayerSizes(*sizes), FLOAT64, FLOAT64)
    assert (chosen.project_first, chosen.hoist_inputs, chosen.chunk_size == 64) == (is_first, is_hoisted, is_first)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(
    ("change", "is_first"),
    [
        ({}, True),
        ({"layer_norm": True}, False),
        ({"one_product": False}, False),
        ({"options": Fused(None, False)}, False),
    ],
)
def test_fused_has_the_input_product_first_only_in_sums_of_two_products(change, is_first):
    form = {"layer_norm": False, "one_product": True, "dense": True}
    config = fused.FusedConfig(
        Fused("batch"),
        cells.CELLS["lstm"],
        RegularizerRates(),
        1,
        None,
        LayerSizes(32, 512, 64),
        FLOAT32,
        FLOAT32,
        **form,
    )
    layout = config._replace(**change).layout(32)
    assert (layout.project_first, layout.chunk_size) == ((True, 64) if is_first else (False, 8))


@pytest.mark.parametrize("layout", [BatchMajor, pytest.param(FeatureMajor, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "configuration",
    [
        "learned state",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("remat", "rnn", "layer norm", "all options of a layer", "two layers bidirectional projection")
        ),
    ],
)
def test_fused_with_the_input_product_first_equals_oracle(configuration, layout, set_layout):
    set_layout(layout, hoist_inputs=True, project_first=True, chunk_size=3)
    parity.check_outputs_and_gradients(configuration, "everything", "fused")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
def test_fused_with_the_input_product_first_has_second_and_mapped_derivatives_like_scan():
    assert choose_layout(LayerSizes(3, 40, 5), FLOAT64, FLOAT64).project_first
    xs = jax.random.normal(jax.random.key(0), (7, 3, 40), FLOAT64)

    @partial(jax.jit, static_argnums=0)
    def derivatives(implementation):
        lstm = jaxlstm.LSTM(40, 5, param_dtype=FLOAT64, implementation=implementation)
        stacked = jax.vmap(lstm.init)(jax.random.split(jax.random.key(1), 3))
        params = jax.tree.map(lambda a: a[0], stacked)

        def loss(params, xs):
            return (lstm(params, xs)[0] ** 2).sum()

        gradient = jax.grad(loss, (0, 1))
        return (
            jax.jvp(gradient, (params, xs), (params, xs))[1],
            jax.vmap(gradient, (None, 1))(params, xs),
            jax.vmap(gradient, (0, 1))(stacked, xs),
        )

    actual, expected = derivatives("fused"), derivatives("scan")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


@pytest.mark.parametrize("order", ["batch", "feature"])
def test_fused_options_give_the_layout(order):
    options, form = Fused(order, False, 5), {"layer_norm": False, "one_product": True, "dense": True}
    config = fused.FusedConfig(
        options, cells.CELLS["lstm"], RegularizerRates(), 1, None, SIZES, BFLOAT16, FLOAT32, **form
    )
    layout = config.layout(8)
    assert (layout.order, layout.hoist_inputs, layout.chunk_size, layout.bitcast) == (order, False, 5, True)
    assert config._replace(options=Fused()).layout(8) == choose_layout(SIZES, BFLOAT16, FLOAT32)
    hoisted = config._replace(options=Fused(order, True), layer_norm=True).layout(64)
    assert (hoisted.order, hoisted.hoist_inputs, hoisted.chunk_size) == (order, True, 8)


BFLOAT16_LAYOUTS = [
    (FeatureMajor, {"hoist_inputs": False}),
    pytest.param(BatchMajor, {"hoist_inputs": False}, marks=pytest.mark.slow),
    (BatchMajor, {"hoist_inputs": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["one layer", "layer norm"])
@pytest.mark.parametrize(("layout", "options"), BFLOAT16_LAYOUTS)
def test_fused_bfloat16_in_every_layout_equals_oracle(configuration, layout, options, set_layout):
    assert choose_layout(LayerSizes(64, 3, 512), BFLOAT16, FLOAT32).bitcast
    set_layout(layout, chunk_size=3, bitcast=True, **options)
    parity.check_narrow_dtype(configuration, jnp.bfloat16, "fused")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "options"), BFLOAT16_LAYOUTS)
def test_fused_bfloat16_second_derivatives_equal_scan(layout, options, set_layout):
    """Compares with the reference backend, which has no bit casts: JAX takes their derivative for zero, silently."""
    set_layout(layout, chunk_size=3, bitcast=True, **options)
    xs = jax.random.normal(jax.random.key(0), (7, 3, 3), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def second_derivatives(implementation):
        lstm = jaxlstm.LSTM(3, 5, dtype=jnp.bfloat16, learned_state=True, implementation=implementation)
        stacked = jax.vmap(lstm.init)(jax.random.split(jax.random.key(1), 3))
        single = jax.tree.map(lambda a: a[0], stacked)

        def loss(params, xs):
            ys, state = lstm(params, xs, resets=jnp.zeros(xs.shape[:-1], bool).at[4].set(True))
            return (ys.astype(jnp.float32) ** 2).sum() + (state.c**3).sum()

        def both_modes(gradient, params, xs):
            def slope(params, xs):
                return sum(map(jnp.vdot, jax.tree.leaves(gradient(params, xs)), jax.tree.leaves((params, xs))))

            return jax.jvp(gradient, (params, xs), (params, xs))[1], jax.grad(slope, (0, 1))(params, xs)

        gradient = jax.grad(loss, (0, 1))
        return both_modes(gradient, single, xs), both_modes(jax.vmap(gradient, (0, 1)), stacked, xs)

    # A second derivative passes through time four times.
    bounds = narrow_operands(jnp.bfloat16, 4 * len(xs))
    parity.assert_within(second_derivatives("fused"), second_derivatives("scan"), bounds)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout differs on other platforms")
@pytest.mark.parametrize(("batch_size", "input_size", "is_hoisted"), [(16, 3, False), (64, 3, False), (2, 128, True)])
def test_fused_loops_carry_bfloat16_as_uint16(batch_size, input_size, is_hoisted):
    """XLA on CPU rewrites a whole bfloat16 array to read or write one step, and float32 takes twice the memory."""
    lstm = jaxlstm.LSTM(input_size, 8, dtype=jnp.bfloat16, implementation="fused")
    params, xs = lstm.init(jax.random.key(0)), jnp.zeros((70, batch_size, input_size), jnp.bfloat16)

    def loss(params, xs):
        return lstm(params, xs)[0].astype(jnp.float32).sum()

    def sequences(loop):
        """Returns the arrays that the loop reads or writes step by step."""
        body = loop.params["jaxpr"].jaxpr
        pairs = zip(loop.invars + loop.outvars, body.invars + body.outvars, strict=True)
        return [outer for outer, inner in pairs if outer.aval.ndim > inner.aval.ndim]

    for fn in (loss, jax.grad(loss, (0, 1))):
        jaxpr = jax.make_jaxpr(fn)(params, xs).jaxpr
        loops = [e for e in cases.equations(jaxpr) if e.primitive.name == "scan"]
        dtypes = [a.aval.dtype for loop in loops for a in sequences(loop)]
        assert jnp.bfloat16 not in dtypes
        # x is read forward, unless its product is hoisted, and by the derivative; y is written, and read by it.
        assert dtypes.count(jnp.uint16) == (2 if fn is loss else 4) - is_hoisted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "batch_size", "chunks", "rest"),
    [
        pytest.param("everything reverse", 4, 1, 0, marks=pytest.mark.slow),
        pytest.param("everything reverse", 4, 2, 3, marks=pytest.mark.slow),
        ("mask and resets", 64, 2, 3),
    ],
)
def test_fused_over_chunks_of_time_equals_scan(inputs, batch_size, chunks, rest):
    configuration = "learned state"
    num_steps = chunks * choose_layout(LayerSizes(batch_size, 3, cases.HIDDEN_SIZE), FLOAT64, FLOAT64).chunk_size + rest
    case = cases.make(configuration, inputs, num_steps=num_steps, batch_size=batch_size)

    def value_and_gradient(implementation):
        lstm = cases.network(configuration, implementation)

        def loss(*args):
            return cases.loss(*lstm(*args, **case.options), case.cotangents)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(case.params, case.xs, case.state)

    actual, expected = value_and_gradient("fused"), value_and_gradient("scan")
    parity.assert_close(actual, expected, jnp.float64, parity.num_terms(case))
