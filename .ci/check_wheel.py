"""Checks the installed wheel with its base dependencies only; run outside the checkout by .ci/run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxlstm

STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 4, 5
OPTIONAL = ("optax", "flax", "orbax", "tyro", "rich", "matplotlib")


def check_environment() -> None:
    """Checks that the package is the installed one and the optional packages are absent."""
    package = Path(jaxlstm.__file__)
    assert "site-packages" in package.parts, f"{package} is not an installed package"
    for name in OPTIONAL:
        assert importlib.util.find_spec(name) is None, f"{name} is installed, expected base dependencies only"


def check_lstm() -> None:
    """Runs forward, gradient, `vmap` and `step` of an LSTM."""
    lstm = jaxlstm.LSTM(INPUTS, HIDDEN, num_layers=2)
    params = lstm.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (STEPS, BATCH, INPUTS), jnp.float32)
    ys, state = lstm(params, xs)
    assert ys.shape == (STEPS, BATCH, HIDDEN)
    assert state.h.shape == state.c.shape == (2, BATCH, HIDDEN)

    gradient = jax.jit(jax.grad(lambda params: (lstm(params, xs)[0] ** 2).mean()))(params)
    assert all(bool(jnp.isfinite(a).all() & (a != 0).any()) for a in jax.tree.leaves(gradient))

    mapped = jax.vmap(lambda xs: lstm(params, xs)[0], in_axes=1, out_axes=1)(xs)
    assert jnp.allclose(mapped, ys, atol=1e-5)

    state = lstm.initial_state(BATCH)
    for t in range(STEPS):
        state, y = lstm.step(params, state, xs[t])
        assert jnp.allclose(y, ys[t], atol=1e-5)


def check_explorer() -> None:
    """Writes an explorer page from the files of the wheel."""
    lstm = jaxlstm.LSTM(INPUTS, HIDDEN)
    page = jaxlstm.diagnostics.explore(lstm, lstm.init(jax.random.key(0)), jnp.ones((STEPS, INPUTS)))
    assert page.startswith("<!doctype html>")
    assert "{{" not in page


def check_command() -> None:
    """Checks that the command prints help, and names the extra that it needs in one line."""
    command = str(Path(sys.executable).parent / "jaxlstm")
    assert "usage: jaxlstm" in subprocess.run([command], capture_output=True, text=True, check=True).stdout
    for name in ("train", "sample", "inspect", "explore", "vanishing"):
        done = subprocess.run([command, name], capture_output=True, text=True)
        assert done.returncode == 1, done
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"jaxlstm {name}: "), done.stderr
        assert lines[0].endswith(" is not installed: pip install 'jaxlstm[train]'"), done.stderr


if __name__ == "__main__":
    check_environment()
    check_lstm()
    check_explorer()
    check_command()
    print(f"jaxlstm {jaxlstm.__version__}: the wheel works with its base dependencies")
