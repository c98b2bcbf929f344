"""Gates written so that XLA, on a CPU, shares their work out over its threads.

XLA gives a small elementwise kernel more than one thread only if it counts more operations in it than bytes, and it
counts none in a `tanh`. At the sizes that `jaxlstm.recurrence.layout` names, that costs more than the kernel's own
time: the other threads have gone to sleep by the next matrix product, which is done with its first half before they are
awake for the second. So here are the same activations with every operation spelled out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm import cells

# tanh(x) / x as P(x^2) / Q(x^2), fitted for the least relative error, 6.5e-9, up to LIMIT, where tanh is 4 units in the
# last place of float32 below 1. Evaluated in float32 it is off by up to 6 of them, 3.6e-7, and never above 1.
LIMIT = 8.0
P = (9.99999993615955e-01, 1.344448076824418e-01, 3.571576856137938e-03, 2.189427918380165e-05, 1.5229804750153446e-08)
Q = (1.0, 4.677780810644379e-01, 2.616436432388474e-02, 3.411256002091602e-04, 8.522214383205788e-07)


def tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Hyperbolic tangent in float32, as a quotient of polynomials; infinities give 1 and -1, and NaN is kept."""
    quotient = x * _polynomial(P, x * x) / _polynomial(Q, x * x)
    return jnp.where(jnp.abs(x) < LIMIT, quotient, jnp.sign(x))


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for a in coefficients[-2::-1]:
        value = value * x + a
    return value


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def activated(z: Float[Array, "G *units"], kinds: str) -> list[Float[Array, "*units"]]:
    """`jaxlstm.cells.activated` in float32, for all threads of a CPU."""
    return list(jnp.unstack(cells.sigmoid_or_tanh(z, kinds, tanh)))


@activated.defjvp
def _(kinds: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[list[Array], list[Array]]:
    """The derivative, from the activations themselves.

    The slabs of the tangent are cut out by selection, whose transpose is a sum of selections, operations that are
    counted; that of `unstack` is a concatenation, which is not. The activations are taken by the usual tanh: the
    quotient would be computed again in each kernel that reads them.
    """
    (z,), (dz,) = primals, tangents
    y, scale = cells.sigmoid_or_tanh(z, kinds), cells.scales(z, kinds)
    dy = dz * cells.slope(y, scale)
    return list(jnp.unstack(y)), selected(dy)


def selected(dz: Float[Array, "G *units"]) -> list[Float[Array, "*units"]]:
    """The slabs of ``dz``, one by one, by selection: so is the transpose, and XLA counts its operations."""
    slab = lax.broadcasted_iota(jnp.int32, dz.shape, 0)
    return [jnp.where(slab == n, dz, 0).sum(0) for n in range(dz.shape[0])]
