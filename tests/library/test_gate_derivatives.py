"""The Jacobian of a cell for many steps, against `jax.jvp` and `jax.vjp` of the gates."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_params
from tolerance import tolerance

import jaxlstm
from jaxlstm.cells import CELLS, Cell, sigmoid, tanh
from jaxlstm.recurrence import gate_derivatives
from jaxlstm.recurrence.gates import evaluate_cell
from jaxlstm.recurrence.step import split_gates

T, B, H = 3, 5, 4
# Gates in another order, read by the functions in another order, two of them by the output.
SHUFFLED = Cell(
    gates={"a": tanh, "b": sigmoid, "d": sigmoid, "e": tanh},
    update=lambda c, d, b: c * b - d * c**2,
    output=lambda e, c, a: jnp.sin(c) * a + e,
    candidate="d",
)
CANDIDATE_IN_OUTPUT = replace(SHUFFLED, candidate="e")
NETWORKS = {"lstm": CELLS["lstm"], "cifg": CELLS["cifg"], "shuffled": SHUFFLED, "in output": CANDIDATE_IN_OUTPUT}
NETWORKS |= {name: CELLS[name] for name in ("gru", "minlstm", "indrnn")}  # they read h or have no cell state
DEFAULT = [
    ("lstm", True, 1),
    ("cifg", False, 0),
    ("shuffled", True, 0),
    ("in output", True, 1),
    ("gru", False, 0),
    ("minlstm", True, 1),
]  # the others are slow tests
CASES = [
    pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow)
    for case in product(NETWORKS, (False, True), (0, 1))
    if NETWORKS[case[0]].candidate is not None or not case[1]
]


@pytest.mark.parametrize(("name", "dropout", "axis"), CASES)
def test_jacobian_equals_derivatives_of_gates(name, dropout, axis):
    cell, rng = NETWORKS[name], np.random.default_rng(0)
    shape = [(H, B), (B, H)][axis]
    z_shape = tuple(n * cell.num_gates if k == axis else n for k, n in enumerate(shape))
    z, dz = (2 * rng.standard_normal((T, *z_shape)) for _ in range(2))
    c, dc, ct_c, h, dh, ct_h = (rng.standard_normal((T, *shape)) for _ in range(6))
    c, dc, ct_c = (c, dc, ct_c) if cell.has_cell_state else (None, None, None)
    h, dh = (h, dh) if cell.reads_h else (None, None)
    scale = rng.choice([0, 1.25], (T, *shape)) if dropout else np.ones((T, *shape))

    def gates(scale):
        return lambda z, c, h: evaluate_cell(
            cell, split_gates(z, cell.num_gates, axis), c, candidate_scale=scale if dropout else None, h=h
        )

    def jvp(z, c, h, scale, dz, dc, dh):
        return jax.jvp(gates(scale), (z, c, h), (dz, dc, dh))[1]

    def vjp(z, c, h, scale, ct_c, ct_h):
        return jax.vjp(gates(scale), z, c, h)[1]((ct_c, ct_h))

    def apply(jacobian, dz, dc, dh):
        return gate_derivatives.apply_jacobian(cell, jacobian, dz, dc, dh, axis)

    def transpose(jacobian, ct_c, ct_h):
        like = jax.tree.map(lambda a: a[0], (dz, dc, dh))
        return jax.linear_transpose(lambda *tangents: apply(jacobian, *tangents), *like)((ct_c, ct_h))

    @jax.jit
    def both(z, c, h, scale, dz, dc, dh, ct_c, ct_h):
        jacobian = gate_derivatives.gate_jacobian(cell, z, c, h, scale if dropout else None, axis)
        actual = jax.vmap(apply)(jacobian, dz, dc, dh), jax.vmap(transpose)(jacobian, ct_c, ct_h)
        return actual, (jax.vmap(jvp)(z, c, h, scale, dz, dc, dh), jax.vmap(vjp)(z, c, h, scale, ct_c, ct_h))

    actual, expected = both(z, c, h, scale, dz, dc, dh, ct_c, ct_h)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float64, 16)), actual, expected)


@pytest.mark.parametrize(
    ("options", "has_jacobian"),
    [
        ({}, True),
        pytest.param({"cell": "cifg"}, True, marks=pytest.mark.slow),
        pytest.param({"cell": "peephole"}, False, marks=pytest.mark.slow),
        ({"layer_norm": True}, False),
        ({"cell": "gru"}, True),
        pytest.param({"cell": "rnn"}, True, marks=pytest.mark.slow),
        pytest.param({"cell": "slstm"}, False, marks=pytest.mark.slow),
    ],
)
def test_fused_uses_jacobian_of_supported_cells(options, has_jacobian, monkeypatch):
    """Replaces the Jacobian by a wrong one, which changes the gradients of the networks that use it and no others."""

    def gradient(unroll):  # another unroll is another program for the same numbers
        lstm = jaxlstm.LSTM(2, H, implementation="fused", unroll=unroll, **options)
        params, xs = random_params(lstm, np.random.default_rng(0), np.float32), np.ones((T, B, 2))
        return jax.jit(jax.grad(lambda xs: lstm(params, xs)[0].sum()))(xs)

    expected, apply_jacobian = gradient(1), gate_derivatives.apply_jacobian
    monkeypatch.setattr(
        gate_derivatives, "apply_jacobian", lambda *args: jax.tree.map(lambda a: 2 * a, apply_jacobian(*args))
    )
    assert np.allclose(gradient(2), expected) is not has_jacobian


@pytest.mark.parametrize(
    "cell",
    [
        SHUFFLED,
        Cell(gates={"a": None, "b": jnp.square}, update=lambda a, b, c: b * c + a, output=lambda a, c: a * c),
        pytest.param(Cell(gates={"y": jax.nn.relu}, output=lambda y: y), marks=pytest.mark.slow),
    ],
    ids=["with Jacobian", "without Jacobian", "without cell state"],
)
def test_fused_differentiates_custom_cell(cell):
    params = random_params(jaxlstm.LSTM(2, H, cell=cell), np.random.default_rng(0), np.float32)

    def gradient(implementation):
        network = jaxlstm.LSTM(2, H, cell=cell, implementation=implementation)
        return jax.jit(jax.grad(lambda xs: network(params, xs)[0].sum()))(np.ones((T, B, 2), np.float32))

    actual, expected = gradient("fused"), gradient("scan")
    np.testing.assert_allclose(actual, expected, **tolerance(actual.dtype, T * H))
