"""Every implementation against the float64 NumPy oracle: outputs, final state and every gradient."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import narrow_operands, tolerance

import jaxlstm
from jaxlstm.recurrence.layout import Layout

CHUNK, CHUNK_OF_MANY = (Layout.choose(rows, 5, jnp.dtype("float64"), jnp.dtype("float64")).chunk for rows in (4, 64))


def assert_close(actual, wanted, dtype, terms):
    assert_within(actual, wanted, tolerance(dtype, terms))


def assert_within(actual, wanted, bounds):
    """Close leaf by leaf; the absolute tolerance counts in the largest number of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(wanted)):
        bound = dict(bounds)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound["atol"] *= max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, **bound, err_msg=jax.tree_util.keystr(path))


def terms(case):
    """Additions behind one number: the longest chain of sums, over time, batch and features.

    Layer normalisation divides by a deviation, which over five units is now and then a fortieth of the usual, and
    rounding grows with it: the largest error seen is twice the bound without it. Taken is 25 times, still far below
    what a wrong term gives.
    """
    normalised = 5**4 if case.lstm.layer_norm else 1
    return normalised * case.xs.size * case.lstm.num_layers * case.lstm.num_directions


@pytest.mark.parametrize(("configuration", "inputs", "implementation"), cases.NAMES)
def test_outputs_state_and_gradients(configuration, inputs, implementation):
    case = cases.make(configuration, inputs)
    (ys, state), gradient = cases.expected(configuration, inputs)
    lstm = jaxlstm.LSTM(
        3, 5, param_dtype=jnp.float64, implementation=implementation, **cases.CONFIGURATIONS[configuration]
    )

    def loss(params, xs, state):
        result = lstm(params, xs, state, **case.options)
        return cases.loss(*result, case.cotangents), result

    result, slopes = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(case.params, case.xs, case.state)[::-1]
    assert_close(result, (ys, state), np.float64, terms(case))
    assert_close(slopes, gradient, np.float64, terms(case))


@pytest.mark.parametrize(
    "configuration",
    [
        "two layers bidirectional projection",
        "remat",  # whose h is wider than x
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("rnn", "all of it")),
    ],
)
@pytest.mark.parametrize("inputs", ["everything"])
@pytest.mark.parametrize(
    ("axis", "hoisted", "halves"), [(0, False, False), (0, True, False), (1, False, False), (1, False, True)]
)
def test_fused_in_the_layouts_of_larger_sizes(configuration, inputs, axis, hoisted, halves, monkeypatch):
    assert Layout.choose(4, 5, jnp.dtype("float64"), jnp.dtype("float64"))[2:4] == (1, True)  # what the others test
    monkeypatch.setattr(
        Layout, "choose", lambda rows, units, dtype, sums: Layout(dtype, sums, axis, hoisted, halves=halves)
    )
    jax.clear_caches()
    test_outputs_state_and_gradients(configuration, inputs, "fused")
    jax.clear_caches()


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "configuration",
    [
        "one layer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("two layers bidirectional projection", "rnn")),
    ],
)
def test_narrow_dtypes(configuration, dtype, implementation):
    inputs = "everything"
    case = cases.make(configuration, inputs)
    (ys, state), gradient = cases.expected(configuration, inputs)
    lstm = jaxlstm.LSTM(3, 5, dtype=dtype, implementation=implementation, **cases.CONFIGURATIONS[configuration])
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (case.params, case.xs, case.state))

    def loss(params, xs, state):
        ys, state = lstm(params, xs, state, **case.options)
        return cases.loss(ys.astype(jnp.float64), jax.tree.map(lambda a: a.astype(jnp.float64), state), case.cotangents)

    actual_ys, actual_state = lstm(*narrow, **case.options)
    assert actual_ys.dtype == dtype
    assert {a.dtype for a in jax.tree.leaves(actual_state)} == {jnp.dtype(jnp.float32)}
    bounds = narrow_operands(dtype, len(case.xs)) if dtype == jnp.bfloat16 else tolerance(dtype, terms(case))
    assert_within((actual_ys, actual_state), (ys, state), bounds)
    assert_within(jax.grad(loss, (0, 1, 2))(*narrow), gradient, bounds)


LAYOUTS_OF_BFLOAT16 = [(0, False), (1, False), (1, True)]  # axis, hoisted


def choose(axis, hoisted, halves=False):
    """A layout like those of larger sizes, in chunks of a few steps."""
    return lambda rows, units, dtype, sums: Layout(dtype, sums, axis, hoisted, chunk=3, bits=True, halves=halves)


@pytest.mark.parametrize("configuration", ["one layer", pytest.param("layer norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("axis", "hoisted", "halves"), [*((*layout, False) for layout in LAYOUTS_OF_BFLOAT16), (1, False, True)]
)
def test_bfloat16_in_the_layouts_of_larger_sizes(configuration, axis, hoisted, halves, monkeypatch):
    assert Layout.choose(64, 512, jnp.dtype("bfloat16"), jnp.dtype("float32")).bits
    monkeypatch.setattr(Layout, "choose", choose(axis, hoisted, halves))
    jax.clear_caches()
    test_narrow_dtypes(configuration, jnp.bfloat16, "fused")
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "hoisted"), LAYOUTS_OF_BFLOAT16)
def test_second_derivatives_of_bfloat16(axis, hoisted, monkeypatch):
    """Of the fused recurrence against the plain scan, which moves no numbers as bits; for one set of weights and three.

    Bits have no derivative, and JAX takes that for zero without a word.
    """
    monkeypatch.setattr(Layout, "choose", choose(axis, hoisted))
    jax.clear_caches()
    xs = jax.random.normal(jax.random.key(0), (7, 3, 3), jnp.float32)

    def findings(implementation):
        lstm = jaxlstm.LSTM(3, 5, dtype=jnp.bfloat16, learned_state=True, implementation=implementation)
        many = jax.vmap(lstm.init)(jax.random.split(jax.random.key(1), 3))
        one = jax.tree.map(lambda a: a[0], many)

        def loss(params, xs):
            ys, state = lstm(params, xs, resets=jnp.zeros(xs.shape[:-1], bool).at[4].set(True))
            return (ys.astype(jnp.float32) ** 2).sum() + (state.c**3).sum()

        def both(gradient, params, xs):
            def along(params, xs):
                return sum(map(jnp.vdot, jax.tree.leaves(gradient(params, xs)), jax.tree.leaves((params, xs))))

            return jax.jvp(gradient, (params, xs), (params, xs))[1], jax.grad(along, (0, 1))(params, xs)

        gradient = jax.grad(loss, (0, 1))
        return both(gradient, one, xs), both(jax.vmap(gradient, (0, 1)), many, xs)

    bits, plain = (jax.jit(lambda name=name: findings(name))() for name in ("fused", "scan"))
    assert_within(bits, plain, narrow_operands(jnp.bfloat16, 4 * len(xs)))  # four times through time
    jax.clear_caches()


@pytest.mark.parametrize("batch_and_units", [(64, 16), (16, 8), (2, 8)])
def test_loops_move_bfloat16_as_bits(batch_and_units):
    """XLA on a CPU passes over a whole bfloat16 array to read or write one step of it, and float32 is twice as long."""
    rows, units = batch_and_units
    lstm = jaxlstm.LSTM(3, units, dtype=jnp.bfloat16)
    params, xs = lstm.init(jax.random.key(0)), jnp.zeros((70, rows, 3), jnp.bfloat16)

    def loss(params, xs):
        return lstm(params, xs)[0].astype(jnp.float32).sum()

    def over_time(loop):
        step = loop.params["jaxpr"].jaxpr
        pairs = zip(loop.invars + loop.outvars, step.invars + step.outvars, strict=True)
        return [whole for whole, one in pairs if whole.aval.ndim > one.aval.ndim]

    for function in (loss, jax.grad(loss, (0, 1))):
        program = jax.make_jaxpr(function)(params, xs).jaxpr
        loops = [e for e in cases.equations(program) if e.primitive.name == "scan"]
        dtypes = [a.aval.dtype for loop in loops for a in over_time(loop)]
        assert jnp.bfloat16 not in dtypes
        # Read forward, unless multiplied before the loop, and by the derivative; written, and read by the derivative.
        assert dtypes.count(jnp.uint16) == (2 if function is loss else 4) - (rows <= 8)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [(), (2, 2), *(pytest.param(n, marks=pytest.mark.slow) for n in ((1,), (1, 2, 2)))])
def test_any_batch_axes(batch, implementation):
    configuration, inputs = "two layers bidirectional projection", "everything reverse"
    case = cases.make(configuration, inputs)
    rows = int(np.prod(batch))
    lstm = jaxlstm.LSTM(
        3, 5, param_dtype=jnp.float64, implementation=implementation, **cases.CONFIGURATIONS[configuration]
    )

    def fold(a, axis):
        kept = np.take(a, range(rows), axis)
        return kept.reshape((*kept.shape[:axis], *batch, *kept.shape[axis + 1 :]))

    options = dict(case.options)
    for name, axis in (("lengths", 0), ("mask", 1), ("resets", 1)):
        options[name] = fold(options[name], axis)
    state = jax.tree.map(lambda a: fold(a, 1), case.state)
    result = lstm(case.params, fold(case.xs, 1), state, **options)
    wanted = cases.expected(configuration, inputs)[0]
    assert_close(result, jax.tree.map(lambda a: fold(a, 1), wanted), np.float64, terms(case))


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "configuration",
    ["rnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("projection", "two layers", "all of it"))],
)
def test_forward_mode_and_second_derivatives(configuration, implementation):
    """jvp, Hessian-vector product and reverse over reverse agree with the oracle's gradient, differenced."""
    if implementation in cases.HEAVY and "remat" in cases.CONFIGURATIONS[configuration]:
        pytest.skip("first derivatives only, with remat: jax.checkpoint drops the rule of a derivative of its own")
    inputs = "everything"
    case = cases.make(configuration, inputs)
    lstm = jaxlstm.LSTM(
        3, 5, param_dtype=jnp.float64, implementation=implementation, **cases.CONFIGURATIONS[configuration]
    )
    rng = np.random.default_rng(0)
    arguments = (case.params, case.xs, case.state)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), arguments)

    def loss(*arguments):
        return cases.loss(*lstm(*arguments, **case.options), case.cotangents)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    gradient = jax.grad(loss, (0, 1, 2))
    slope = jax.jvp(loss, arguments, direction)[1]
    np.testing.assert_allclose(slope, dot(cases.expected(configuration, inputs)[1], direction), rtol=1e-10)
    forward_over_reverse = jax.jvp(gradient, arguments, direction)[1]
    reverse_over_reverse = jax.grad(lambda *a: dot(gradient(*a), direction), (0, 1, 2))(*arguments)
    assert_close(reverse_over_reverse, forward_over_reverse, np.float64, 100 * terms(case))
    # Central differences of an exact gradient: the error is of order step^2 = 1e-10 of the third derivative.
    step = 1e-5
    ahead, behind = (
        gradient(*jax.tree.map(lambda a, d: a + shift * d, arguments, direction))  # noqa: B023  (called at once)
        for shift in (step, -step)
    )
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    for a, b in zip(jax.tree.leaves(forward_over_reverse), jax.tree.leaves(differences)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_vmap_and_vmap_of_grad(implementation):
    """One sequence mapped over a batch equals the batched call; per-sequence gradients add up to the batch's."""
    case = cases.make("two layers bidirectional", "everything")
    lstm = jaxlstm.LSTM(3, 5, param_dtype=jnp.float64, implementation=implementation, num_layers=2, bidirectional=True)
    options = case.options

    def one(params, x, state, length, mask, resets):
        return lstm(params, x, state, lengths=length, mask=mask, resets=resets)

    def loss(*arguments):
        ys, state = one(*arguments)
        return sum((a**2).sum() for a in jax.tree.leaves((ys, state)))

    axes = (None, 1, 1, 0, 1, 1)
    arguments = (case.params, case.xs, case.state, options["lengths"], options["mask"], options["resets"])
    mapped = jax.vmap(one, axes, out_axes=1)(*arguments)
    assert_close(mapped, lstm(case.params, case.xs, case.state, **options), np.float64, terms(case))
    apart = jax.vmap(jax.grad(loss), axes)(*arguments)
    together = jax.grad(loss)(*arguments)
    assert_close(jax.tree.map(lambda a: a.sum(0), apart), together, np.float64, terms(case))


@pytest.mark.parametrize(
    ("inputs", "rows", "steps"),
    [
        pytest.param("everything reverse", 4, CHUNK, marks=pytest.mark.slow),
        pytest.param("everything reverse", 4, 2 * CHUNK + 3, marks=pytest.mark.slow),
        ("mask and resets", 64, 2 * CHUNK_OF_MANY + 3),
    ],
)
def test_fused_over_chunks_of_time_equals_the_reference(inputs, rows, steps):
    case = cases.make("two layers bidirectional projection", inputs, steps=steps, batch=rows)
    networks = [
        jaxlstm.LSTM(3, 5, param_dtype=jnp.float64, implementation=name, num_layers=2, bidirectional=True, proj_size=2)
        for name in ("fused", "scan")
    ]

    def loss(lstm):
        return lambda *arguments: cases.loss(*lstm(*arguments, **case.options), case.cotangents)

    actual, wanted = (jax.value_and_grad(loss(n), (0, 1, 2))(case.params, case.xs, case.state) for n in networks)
    assert_close(actual, wanted, np.float64, terms(case))
