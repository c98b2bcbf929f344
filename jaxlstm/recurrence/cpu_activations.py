"""Gate activations for XLA on CPU: one by one, or on all threads.

XLA runs a small elementwise kernel on more than one thread only if it counts more operations than bytes in it, and it
counts none in a `tanh`. At the sizes listed in `jaxlstm.recurrence.layout` a single thread costs more than the kernel's
own time: the other threads go to sleep, and half of the next matrix product is done before they wake up. The functions
below compute the same activations with every operation spelled out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm.recurrence.gates import activation_scales, activation_slope, sigmoid_or_tanh

# tanh(x) / x = NUMERATOR(x^2) / DENOMINATOR(x^2) for |x| < LIMIT, coefficients in ascending order. They were fitted for
# the least relative error, 6.5e-9. At LIMIT tanh is 4 units in the last place of float32 below 1. Evaluated in float32
# the quotient is off by up to 6 such units, 3.6e-7, and never exceeds 1.
LIMIT = 8.0
NUMERATOR = (
    9.99999993615955e-01,
    1.344448076824418e-01,
    3.571576856137938e-03,
    2.189427918380165e-05,
    1.5229804750153446e-08,
)
DENOMINATOR = (1.0, 4.677780810644379e-01, 2.616436432388474e-02, 3.411256002091602e-04, 8.522214383205788e-07)


def tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Computes the hyperbolic tangent in float32 as a quotient of polynomials.

    Infinities give 1 and -1, and NaN gives NaN.
    """
    quotient = x * _polynomial(NUMERATOR, x * x) / _polynomial(DENOMINATOR, x * x)
    return jnp.where(jnp.abs(x) < LIMIT, quotient, jnp.sign(x))


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for a in coefficients[-2::-1]:
        value = value * x + a
    return value


def activate_separately(z: Float[Array, "G *units"], kinds: str) -> list[Float[Array, "*units"]]:
    """Replaces `jaxlstm.recurrence.gates.activate`: computes each slab by a tanh of its own, with the same results."""
    return [sigmoid_or_tanh(slab[None], kind)[0] for slab, kind in zip(jnp.unstack(z), kinds)]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def activate(z: Float[Array, "G *units"], kinds: str) -> list[Float[Array, "*units"]]:
    """Replaces `jaxlstm.recurrence.gates.activate` in float32."""
    return list(jnp.unstack(sigmoid_or_tanh(z, kinds, tanh)))


@activate.defjvp
def _activate_jvp(kinds: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[list[Array], list[Array]]:
    """Computes the derivative from the values of the activations.

    The values come from `jnp.tanh`: every kernel that reads them would evaluate the quotient of polynomials again.
    """
    (z,), (dz,) = primals, tangents
    y, scale = sigmoid_or_tanh(z, kinds), activation_scales(z, kinds)
    dy = dz * activation_slope(y, scale)
    return list(jnp.unstack(y)), unstack_by_selection(dy)


def unstack_by_selection(dz: Float[Array, "G *units"]) -> list[Float[Array, "*units"]]:
    """Computes `jnp.unstack` by selections and sums.

    The transpose is then a sum of selections, whose operations XLA counts. The transpose of `jnp.unstack` is a
    concatenation, in which XLA counts none.
    """
    slab = lax.broadcasted_iota(jnp.int32, dz.shape, 0)
    return [jnp.where(slab == n, dz, 0).sum(0) for n in range(dz.shape[0])]
