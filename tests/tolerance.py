"""How close is equal: one rule for every comparison."""

import jax.numpy as jnp


def tolerance(dtype, terms):
    """Absolute and relative tolerance of a result of ``terms`` rounded additions and multiplications in ``dtype``.

    Rounding errors of n operations of either sign add up to about sqrt(n) units in the last place; eight times that
    leaves room for the constants of a gradient, and is a thousand times less than what a wrong term changes.
    """
    bound = 8 * float(jnp.finfo(dtype).eps) * terms**0.5
    return {"rtol": bound, "atol": bound}
