"""Products with bfloat16 operands and float32 sums. Small integers are exact in both, so results must be equal."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm.primitives.mixed_precision_dot import DotSpec, matvec

PRODUCTS = {  # contracting axes, batch axes, shapes
    "rows by columns": (((1,), (0,)), ((), ()), (3, 4), (4, 5)),
    "columns by rows": (((0,), (1,)), ((), ()), (4, 3), (5, 4)),
    "rows by rows": (((1,), (1,)), ((), ()), (3, 4), (5, 4)),
    "two contracting axes": (((1, 2), (2, 0)), ((), ()), (3, 4, 5), (5, 6, 4)),
    "batch axes": (((2, 0), (0, 3)), ((1,), (2,)), (3, 2, 4, 6), (4, 5, 2, 3)),
    "matrix and vector": (((1,), (1,)), ((), ()), (1, 4), (5, 4)),
}
MAPPED_AXES = ((1, None), (None, 1), (1, 1))


def integers(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "rows by columns" else pytest.mark.slow) for name in PRODUCTS]
)
def test_dot_general_values_and_derivatives_equal_lax(name):
    """Compares with `jax.lax.dot_general` in float64 and its own rules."""
    contracting_axes, batch_axes, *shapes = PRODUCTS[name]
    spec = DotSpec(contracting_axes, batch_axes, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    a, b, da, db = (integers(*shape, seed=n) for n, shape in enumerate(shapes * 2))
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x], 1), (a, b))

    def results(dot):
        ct = integers(*dot(a, b).shape, seed=4).astype(dot(a, b).dtype)

        def vjp(a, b):
            return jax.vjp(dot, a, b)[1](ct)

        def mapped(axes):
            operands = (s if axis is not None else x for s, axis, x in zip(stacked, axes, (a, b)))
            return jax.vmap(dot, axes)(*operands)

        return {
            "value": dot(a, b),
            "vjp": vjp(a, b),
            "jvp": jax.jvp(dot, (a, b), (da, db))[1],
            "jvp of one operand": jax.jvp(lambda b: dot(a, b), (b,), (db,))[1],
            "jvp of vjp": jax.jvp(vjp, (a, b), (da, db))[1],
            "vmap": [mapped(axes) for axes in MAPPED_AXES],
            "vmap of vjp": jax.vmap(vjp, (1, None))(stacked[0], b),
            "gradient of vmap": jax.grad(lambda a: (jax.vmap(dot, (1, None))(a, b)).sum())(stacked[0]),
        }

    def exact_dot(a, b):
        return lax.dot_general(a.astype(jnp.float64), b.astype(jnp.float64), (contracting_axes, batch_axes))

    expected = jax.jit(lambda: results(exact_dot))()
    for actual in (results(spec.dot_general), jax.jit(lambda: results(spec.dot_general))()):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_matvec_gradient_rounds_cotangents_and_keeps_sums():
    x, w = jnp.full((1000, 1), 1 + 2.0**-7, jnp.float32), jnp.ones((1, 1), jnp.float32)
    gradient = jax.grad(lambda w: (matvec(w, x, jnp.bfloat16, jnp.float32) * (1 + 2.0**-10)).sum())(w)
    assert gradient.dtype == jnp.float32
    assert gradient == 1000 * (1 + 2.0**-7)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests the lowering for CPUs")
def test_matvec_gradient_in_a_loop_multiplies_rows_by_columns():
    """Checks that XLA folds no transposition into a product: its bfloat16 kernel has one order of operands only."""
    x, w = integers(8, 32, 384, seed=0) / 64, integers(1024, 384, seed=1) / 64

    def loss(w, x):
        def scan_step(carry, x):
            return carry, matvec(w, x, jnp.bfloat16, jnp.float32)

        return (lax.scan(scan_step, 0, x)[1].astype(jnp.bfloat16).astype(jnp.float32) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile()
    axes = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}", compiled.as_text())
    assert set(axes) == {("1", "0")}  # rows by columns
    ys = np.einsum("tbk,nk->tbn", x, w)
    expected = 2 * np.einsum("tbn,tbk->nk", ys, x), 2 * np.einsum("tbn,nk->tbk", ys, w)
    for a, b in zip(compiled(w, x), expected):  # the cotangents are rounded twice, to 8 bits
        np.testing.assert_allclose(a, b, atol=2 * 2.0**-8 * np.abs(b).max())


def test_matvec_without_jit_equals_matvec():
    x, w = integers(3, 5, seed=0) / 64, integers(4, 5, seed=1) / 64
    value_and_gradient = jax.value_and_grad(lambda w: matvec(w, x, jnp.bfloat16, jnp.float32).sum())
    expected = value_and_gradient(w)
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, value_and_gradient(w), expected)
