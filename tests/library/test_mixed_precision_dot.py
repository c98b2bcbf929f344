"""Products of narrow operands with wide sums. Small whole numbers are exact in all of it, so equal means equal."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from jax import lax

from jaxlstm.primitives.mixed_precision_dot import DotSpec, matvec

KINDS = {  # contracted axes, batch axes, shapes
    "rows by columns": (((1,), (0,)), ((), ()), (3, 4), (4, 5)),
    "columns by rows": (((0,), (1,)), ((), ()), (4, 3), (5, 4)),
    "rows by rows": (((1,), (1,)), ((), ()), (3, 4), (5, 4)),
    "over two axes": (((1, 2), (2, 0)), ((), ()), (3, 4, 5), (5, 6, 4)),
    "side by side": (((2, 0), (0, 3)), ((1,), (2,)), (3, 2, 4, 6), (4, 5, 2, 3)),
    "a matrix and a vector": (((1,), (1,)), ((), ()), (1, 4), (5, 4)),
}
FAST = ("rows by columns",)


def whole(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


@pytest.mark.parametrize("name", slow_but(FAST, KINDS))
def test_values_and_every_derivative(name):
    """Against `jax.lax.dot_general` in float64, by JAX's own rules."""
    contract, batch, *shapes = KINDS[name]
    kind = DotSpec(contract, batch, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    a, b, da, db = (whole(*shape, seed=n) for n, shape in enumerate(shapes * 2))
    twice = jax.tree.map(lambda x: jnp.stack([x, -x], 1), (a, b))

    def findings(times):
        ct = whole(*times(a, b).shape, seed=4).astype(times(a, b).dtype)

        def slope(a, b):
            return jax.vjp(times, a, b)[1](ct)

        return {
            "value": times(a, b),
            "slope": slope(a, b),
            "tangent": jax.jvp(times, (a, b), (da, db))[1],
            "tangent of one": jax.jvp(lambda b: times(a, b), (b,), (db,))[1],
            "curvature": jax.jvp(slope, (a, b), (da, db))[1],
            "mapped": [
                jax.vmap(times, axes)(*(t if m else x for t, m, x in zip(twice, axes, (a, b)))) for axes in AXES
            ],
            "slope, mapped": jax.vmap(slope, (1, None))(twice[0], b),
            "mapped, slope": jax.grad(lambda a: (jax.vmap(times, (1, None))(a, b)).sum())(twice[0]),
        }

    def exact(a, b):
        return lax.dot_general(a.astype(jnp.float64), b.astype(jnp.float64), (contract, batch))

    wanted = findings(exact)
    for have in (findings(kind.times), jax.jit(lambda: findings(kind.times))()):
        jax.tree.map(np.testing.assert_array_equal, have, wanted)


AXES = ((1, None), (None, 1), (1, 1))


def test_cotangents_are_rounded_as_operands_and_sums_are_not():
    x, w = jnp.full((1000, 1), 1 + 2.0**-7, jnp.float32), jnp.ones((1, 1), jnp.float32)
    slope = jax.grad(lambda w: (matvec(w, x, jnp.bfloat16, jnp.float32) * (1 + 2.0**-10)).sum())(w)
    assert slope.dtype == jnp.float32
    assert slope == 1000 * (1 + 2.0**-7)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA for CPUs")
def test_gradients_in_a_loop_on_the_cpu():
    """Transpositions stay out of the products: XLA has a kernel for rows by columns only."""
    x, w = whole(8, 32, 384, seed=0) / 64, whole(1024, 384, seed=1) / 64

    def loss(w, x):
        def body(carry, x):
            return carry, matvec(w, x, jnp.bfloat16, jnp.float32)

        return (lax.scan(body, 0, x)[1].astype(jnp.bfloat16).astype(jnp.float32) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile()
    forms = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}", compiled.as_text())
    assert set(forms) == {("1", "0")}  # rows by columns
    have = compiled(w, x)
    ys = np.einsum("tbk,nk->tbn", x, w)
    wanted = 2 * np.einsum("tbn,tbk->nk", ys, x), 2 * np.einsum("tbn,nk->tbk", ys, w)
    for a, b in zip(have, wanted):  # cotangents rounded twice, to 8 bits
        np.testing.assert_allclose(a, b, atol=2 * 2.0**-8 * np.abs(b).max())


def test_without_jit_it_is_the_same():
    x, w = whole(3, 5, seed=0) / 64, whole(4, 5, seed=1) / 64
    slope = jax.value_and_grad(lambda w: matvec(w, x, jnp.bfloat16, jnp.float32).sum())
    wanted = slope(w)
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, slope(w), wanted)
