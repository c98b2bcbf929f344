"""The derivative that is arranged by hand, against the gates that it is of."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from tolerance import tolerance

import jaxlstm
from jaxlstm import cells
from jaxlstm.recurrence import gate_derivatives
from jaxlstm.recurrence.step import slabs

STEPS, ROWS, UNITS = 3, 5, 4
FAST = [("lstm", True, 1), ("cifg", False, 0)]


@pytest.mark.parametrize(("name", "dropped", "axis"), slow_but(FAST, product(("lstm", "cifg"), (False, True), (0, 1))))
def test_the_tangents_and_cotangents_are_those_of_the_gates(name, dropped, axis):
    cell, rng = cells.CELLS[name], np.random.default_rng(0)
    step = [(UNITS, ROWS), (ROWS, UNITS)][axis]
    wide = tuple(n * cell.num_gates if k == axis else n for k, n in enumerate(step))
    z, dz = (jnp.asarray(2 * rng.standard_normal((STEPS, *wide))) for _ in range(2))
    c, dc, ct_c, ct_h = (jnp.asarray(rng.standard_normal((STEPS, *step))) for _ in range(4))
    keep = jnp.asarray(rng.choice([0, 1.25], (STEPS, *step))) if dropped else jnp.ones((STEPS, *step))

    def gates(z, c, keep):
        return cell.gates(slabs(z, cell.num_gates, axis), c, keep)

    def arranged(p, dz, dc):
        return gate_derivatives.step(p, dz, dc, axis)

    p = gate_derivatives.of(cell.gates, z, c, keep if dropped else 1.0, axis)
    wanted = [
        jax.vmap(lambda z, c, keep, *d: jax.jvp(lambda z, c: gates(z, c, keep), (z, c), d)[1])(z, c, keep, dz, dc)
    ]
    wanted += [
        jax.vmap(lambda z, c, keep, *ct: jax.vjp(lambda z, c: gates(z, c, keep), z, c)[1](ct))(z, c, keep, ct_c, ct_h)
    ]
    found = [jax.vmap(arranged)(p, dz, dc)]
    found += [
        jax.vmap(lambda p, *ct: jax.linear_transpose(lambda *d: arranged(p, *d), dz[0], dc[0])(ct))(p, ct_c, ct_h)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float64, 16)), found, wanted)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, True),
        pytest.param({"cell": "cifg"}, True, marks=pytest.mark.slow),
        pytest.param({"cell": "peephole"}, False, marks=pytest.mark.slow),
        ({"layer_norm": True}, False),
    ],
)
def test_where_it_serves(options, by_hand, monkeypatch):
    """With a wrong derivative by hand, the gradients of these are wrong, and those of no others."""

    def slope(unroll):  # another program each time, of the same numbers
        lstm = jaxlstm.LSTM(2, UNITS, implementation="fused", unroll=unroll, **options)
        params, xs = lstm.init(jax.random.key(0)), jnp.ones((STEPS, ROWS, 2))
        return jax.grad(lambda xs: lstm(params, xs)[0].sum())(xs)

    right, step = slope(1), gate_derivatives.step
    monkeypatch.setattr(gate_derivatives, "step", lambda *args: jax.tree.map(lambda a: 2 * a, step(*args)))
    assert bool(jnp.allclose(slope(2), right)) is not by_hand


def test_a_cell_of_your_own_keeps_its_own_derivative():
    """Gates of the same name and number, but not the same function."""

    def lstm(z, c):
        i, f, g, o = z
        c = f * c + i * g
        return c, o * c

    assert lstm not in gate_derivatives.ARRANGED
    layer = jaxlstm.LSTM(2, UNITS, cell=cells.Cell(lstm, num_gates=4), implementation="fused")
    plain = jaxlstm.LSTM(2, UNITS, cell=cells.Cell(lstm, num_gates=4), implementation="scan")
    params, xs = layer.init(jax.random.key(0)), jnp.ones((STEPS, ROWS, 2))
    found, wanted = (jax.grad(lambda xs, f=f: f(params, xs)[0].sum())(xs) for f in (layer, plain))
    np.testing.assert_allclose(found, wanted, **tolerance(found.dtype, STEPS * UNITS))
