"""Tolerances of every comparison, as a function of the dtype and the number of rounded operations."""

import jax.numpy as jnp


def tolerance(dtype, num_terms):
    """Returns the absolute and relative tolerance of ``num_terms`` additions and multiplications rounded to ``dtype``.

    The rounding errors of n operations, of either sign, add up to about sqrt(n) units in the last place. Eight times
    that leaves room for the constants of a gradient. In float32 and float64 it is a thousandth of the change that a
    wrong term makes; for bfloat16 see `narrow_operands`.
    """
    bound = 8 * float(jnp.finfo(dtype).eps) * num_terms**0.5
    return {"rtol": bound, "atol": bound}


def narrow_operands(dtype, num_products):
    """Returns the tolerance of a chain of ``num_products`` products with operands in ``dtype`` and wider sums.

    Each rounding is off by at most half a unit in the last place, and the error of the sums is negligible. Twice the
    square root of the length of the chain is 2 % for bfloat16 and 7 steps; the largest error seen is 1.4 %.
    """
    bound = float(jnp.finfo(dtype).eps) * num_products**0.5
    return {"rtol": bound, "atol": bound}
