"""Compares tensor_parallel with scan on eight simulated devices and prints its collectives; run as a program."""

import re

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from tolerance import tolerance

import jaxlstm

CASES = {
    "default": ({}, {}),
    "bidirectional, two layers": ({"bidirectional": True, "num_layers": 2}, {}),
    "peepholes, a mask, resets": ({"cell": "peephole", "bidirectional": True}, {"mask", "resets"}),
    "regularized": ({"recurrent_dropout": 0.2, "zoneout_h": 0.2, "zoneout_c": 0.1, "weight_drop": 0.2}, {"key"}),
    "learned state": ({"learned_state": True, "cell": "cifg"}, {"resets"}),
    "vanilla": ({"cell": "rnn", "use_bias": False}, {"lengths"}),
    "projection": ({"proj_size": 5, "zoneout_h": 0.2, "bidirectional": True, "learned_state": True}, {"key", "resets"}),
    "only projection": ({"proj_size": 5}, {}),
    "layer norm": ({"layer_norm": True, "cell": "peephole", "num_layers": 2}, {"mask"}),
    "layer norm, projection": ({"layer_norm": True, "proj_size": 4, "use_bias": False}, {"lengths"}),
}


def compiled_program(name, sizes, axes):
    """Checks outputs, states and gradients of a case on a mesh, and returns the compiled program."""
    options, used = CASES[name]
    rng = np.random.default_rng(0)
    steps, batch_size, input_size, hidden_size = 7, 8, 3, 8
    arguments = {
        "mask": rng.random((steps, batch_size)) < 0.8,
        "resets": rng.random((steps, batch_size)) < 0.2,
        "lengths": rng.integers(0, steps + 1, batch_size),
        "key": jax.random.key(5),
    }
    xs = rng.normal(size=(steps, batch_size, input_size))
    kwargs = {argument: arguments[argument] for argument in used}

    def gradient(implementation):
        lstm = jaxlstm.LSTM(input_size, hidden_size, param_dtype="float64", implementation=implementation, **options)
        params = jax.tree.map(
            lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), lstm.init(arguments["key"])
        )

        def loss(params, xs):
            ys, state = lstm(params, xs, **kwargs)
            return (ys**2).sum() + sum((a**3).sum() for a in jax.tree.leaves(state)), (ys, state)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True)), params

    reference, params = gradient("scan")
    expected = reference(params, xs)
    tensor_parallel, _ = gradient("tensor_parallel")
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))):
        actual = tensor_parallel(params, xs)
        program = tensor_parallel.lower(params, xs).compile().as_text()
    # Layer normalization divides by the standard deviation of a few units; a small one amplifies rounding errors.
    terms = steps * batch_size * hidden_size * 4 * (1000 if "layer_norm" in options else 1)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance(np.float64, terms))
    return program


def loop_collectives(program):
    """Returns the collectives inside loops: a list of names for each loop body that has any."""
    bodies = re.split(r"\n(?=%?\S+ \([^\n]*\{)", program)
    loop_bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    inside = [body for body in bodies if body.split()[0].lstrip("%") in loop_bodies]
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return sorted(found for body in inside if (found := re.findall(rf" ({kinds})(?:-start)?\(", body)))


def split_batch_collectives(axis_type, batch_size):
    """Checks the fused backend with only the batch split over devices."""
    lstm, rng = jaxlstm.LSTM(3, 224, implementation="fused"), np.random.default_rng(0)
    params, xs = lstm.init(jax.random.key(0)), jnp.asarray(rng.normal(size=(6, batch_size, 3)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda params, xs: (lstm(params, xs)[0] ** 2).sum(), (0, 1)))
    expected = gradient(params, xs)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(axis_type,))):
        params, xs = jax.device_put(params, PartitionSpec()), jax.device_put(xs, PartitionSpec(None, "data"))
        actual, program = gradient(params, xs), gradient.lower(params, xs).compile().as_text()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        bounds = tolerance(np.float32, 6 * batch_size * 224)
        np.testing.assert_allclose(a, b, rtol=bounds["rtol"], atol=bounds["atol"] * float(jnp.abs(b).max()))
    return loop_collectives(program)


for name in CASES:
    compiled_program(name, (4, 2), ("data", "model"))
compiled_program("default", (8,), ("model",))
print([loop_collectives(compiled_program(name, (4, 2), ("data", "model"))) for name in ("default", "only projection")])
print([split_batch_collectives(AxisType.Auto, 32), split_batch_collectives(AxisType.Explicit, 20)])
