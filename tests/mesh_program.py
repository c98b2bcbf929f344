"""Run by itself on eight simulated devices: the sharded recurrence against the reference, and what it exchanges."""

import re

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from tolerance import tolerance

import jaxlstm
from jaxlstm.recurrence.layout import Layout

CASES = {
    "plain": ({}, {}),
    "both directions, two layers": ({"bidirectional": True, "num_layers": 2}, {}),
    "peepholes, a mask, resets": ({"cell": "peephole", "bidirectional": True}, {"mask", "resets"}),
    "regularised": ({"recurrent_dropout": 0.2, "zoneout_h": 0.2, "zoneout_c": 0.1, "weight_drop": 0.2}, {"key"}),
    "learned state": ({"learned_state": True, "cell": "cifg"}, {"resets"}),
    "vanilla": ({"cell": "rnn", "use_bias": False}, {"lengths"}),
    "projection": ({"proj_size": 5, "zoneout_h": 0.2, "bidirectional": True, "learned_state": True}, {"key", "resets"}),
    "projection alone": ({"proj_size": 5}, {}),
    "layer norm": ({"layer_norm": True, "cell": "peephole", "num_layers": 2}, {"mask"}),
    "layer norm, projection": ({"layer_norm": True, "proj_size": 4, "use_bias": False}, {"lengths"}),
}


def check(name, sizes, axes):
    options, marks = CASES[name]
    rng = np.random.default_rng(0)
    steps, batch, inputs, units = 7, 8, 3, 8
    given = {
        "mask": rng.random((steps, batch)) < 0.8,
        "resets": rng.random((steps, batch)) < 0.2,
        "lengths": rng.integers(0, steps + 1, batch),
        "key": jax.random.key(5),
    }
    xs = rng.normal(size=(steps, batch, inputs))
    how = {mark: given[mark] for mark in marks}

    def slope(implementation):
        lstm = jaxlstm.LSTM(inputs, units, param_dtype="float64", implementation=implementation, **options)
        params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), lstm.init(given["key"]))

        def loss(params, xs):
            ys, state = lstm(params, xs, **how)
            return (ys**2).sum() + sum((a**3).sum() for a in jax.tree.leaves(state)), (ys, state)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True)), params

    reference, params = slope("scan")
    wanted = reference(params, xs)
    sharded, _ = slope("sharded")
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))):
        actual = sharded(params, xs)
        program = sharded.lower(params, xs).compile().as_text()
    # Normalising divides by a deviation of few units, which is small at times, and rounding errors grow by as much.
    terms = steps * batch * units * 4 * (1000 if "layer_norm" in options else 1)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerance(np.float64, terms))
    return program


def exchanges(program):
    """What is exchanged inside of loops, one list of names for each loop's body that exchanges anything."""
    bodies = re.split(r"\n(?=%?\S+ \([^\n]*\{)", program)
    names = set(re.findall(r"body=%?([\w.\-]+)", program))
    inside = [body for body in bodies if body.split()[0].lstrip("%") in names]
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return sorted(found for body in inside if (found := re.findall(rf" ({kinds})(?:-start)?\(", body)))


def rows_over_devices(kind, batch):
    """The fused recurrence, halved products among it, with nothing said but where the rows lie."""
    lstm, rng = jaxlstm.LSTM(3, 224, implementation="fused"), np.random.default_rng(0)
    assert Layout.choose(batch, 224, jnp.dtype("float32"), jnp.dtype("float32")).halves
    params, xs = lstm.init(jax.random.key(0)), jnp.asarray(rng.normal(size=(6, batch, 3)), jnp.float32)
    slope = jax.jit(jax.grad(lambda params, xs: (lstm(params, xs)[0] ** 2).sum(), (0, 1)))
    wanted = slope(params, xs)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(kind,))):
        params, xs = jax.device_put(params, PartitionSpec()), jax.device_put(xs, PartitionSpec(None, "data"))
        actual, program = slope(params, xs), slope.lower(params, xs).compile().as_text()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        bounds = tolerance(np.float32, 6 * batch * 224)
        np.testing.assert_allclose(a, b, rtol=bounds["rtol"], atol=bounds["atol"] * float(jnp.abs(b).max()))
    return exchanges(program)


for name in CASES:
    check(name, (4, 2), ("data", "model"))
check("plain", (8,), ("model",))
print([exchanges(check(name, (4, 2), ("data", "model"))) for name in ("plain", "projection alone")])
# Where axes are explicit, an odd number of rows on a device cannot be halved there.
print([rows_over_devices(AxisType.Auto, 32), rows_over_devices(AxisType.Explicit, 20)])
