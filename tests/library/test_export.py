"""Exported inference programs run without this package, for any number of steps and any batch size."""

import dataclasses
import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import tolerance

import jaxlstm
from jaxlstm import export
from jaxlstm.experimental.newton import Newton

# A program that cannot import jaxlstm, loads both exported files and stores their results.
LOADING_PROGRAM = """
import sys
sys.modules["jaxlstm"] = None  # makes the import fail
from pathlib import Path
import jax, jax.export, numpy as np

folder = Path(sys.argv[1])
sequence, step = (jax.export.deserialize(bytearray((folder / name).read_bytes())) for name in ("sequence", "step"))
inputs = dict(np.load(folder / "inputs.npz"))
results = {}
for size in "ab":
    xs, h, c, lengths = (inputs[f"{name}{size}"] for name in ("xs", "h", "c", "lengths"))
    ys, (h_last, c_last) = jax.jit(sequence.call)(xs, state=(h, c), lengths=lengths)
    (h_next, c_next), y = step.call((h, c), xs[0])
    results |= {f"{k}{size}": v for k, v in dict(ys=ys, h=h_last, c=c_last, y=y, h_next=h_next, c_next=c_next).items()}
np.savez(folder / "results.npz", **results)
try:
    import jaxlstm
except ImportError:
    print(jax.numpy.shape(ys))
"""
SIZES = {"a": (5, 2), "b": (9, 20)}  # (T, B) on both sides of the batch size that changes the array layout


def network(**options):
    lstm = jaxlstm.LSTM(3, 5, **options)
    return lstm, cases.random_params(lstm, np.random.default_rng(0), lstm.param_dtype)


@pytest.mark.slow
def test_exported_files_run_without_this_package(tmp_path):
    lstm, params = network(proj_size=4)
    export.save(export.sequence(lstm, params, with_state=True, with_lengths=True), tmp_path / "sequence")
    export.save(export.step(lstm, params), tmp_path / "step")
    rng = np.random.default_rng(1)
    inputs, expected = {}, {}
    for size, (steps, batch) in SIZES.items():
        xs = rng.standard_normal((steps, batch, 3)).astype(np.float32)
        state = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), lstm.initial_state(batch))
        lengths = rng.integers(0, steps + 1, batch).astype(np.int32)
        inputs |= {f"xs{size}": xs, f"h{size}": state.h, f"c{size}": state.c, f"lengths{size}": lengths}
        ys, last = lstm(params, xs, state, lengths=lengths)
        new_state, y = lstm.step(params, state, xs[0])
        results = {"ys": ys, "h": last.h, "c": last.c, "y": y, "h_next": new_state.h, "c_next": new_state.c}
        expected |= {f"{name}{size}": value for name, value in results.items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [sys.executable, "-c", LOADING_PROGRAM, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "(9, 20, 4)"
    with np.load(tmp_path / "results.npz") as file:
        results = dict(file)
    assert set(results) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, **tolerance(np.float32, 100), err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "rnn", "bidirectional": True, "unroll": 4, "remat": 2},
        pytest.param({"num_layers": 2, "proj_size": 4}, marks=pytest.mark.slow),
        pytest.param({"learned_state": True, "layer_norm": True, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"cell": "peephole", "param_dtype": "float64"}, marks=pytest.mark.slow),
        pytest.param({"cell": "cifg", "implementation": "scan", "zoneout_c": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_sequence_matches_network(options):
    lstm, params = network(**options)
    program = export.sequence(lstm, params)
    assert program.platforms == ("cpu", "cuda", "tpu")
    for steps, batch in SIZES.values():
        xs = np.random.default_rng(steps).standard_normal((steps, batch, 3)).astype(lstm.dtype or lstm.param_dtype)
        ys, state = program.call(xs)
        expected_ys, expected_state = lstm(params, xs)
        assert (ys.shape, ys.dtype, len(state)) == (expected_ys.shape, expected_ys.dtype, 2)
        assert (state[1] is None) == (expected_state.c is None)
        expected = jax.tree.leaves((expected_ys, expected_state))
        for a, b in zip(jax.tree.leaves((ys, state)), expected, strict=True):
            np.testing.assert_allclose(a.astype("float64"), b.astype("float64"), **tolerance(ys.dtype, 100))


def test_step_runs_in_user_function_with_symbolic_batch():
    lstm, params = network()
    (batch,) = jax.export.symbolic_shape("B")

    def first_output(x):
        return lstm.step(params, lstm.initial_state(x.shape[0]), x)[1]

    program = jax.export.export(jax.jit(first_output))(jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    x = np.ones((4, 3), np.float32)
    np.testing.assert_allclose(program.call(x), first_output(x), **tolerance(np.float32, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"cell": "peephole"}, pytest.param({"implementation": "scan", "remat": 3}, marks=pytest.mark.slow)],
    ids=["fused", "scan in chunks"],
)
def test_gradient_exports_with_symbolic_steps_and_batch(options):
    lstm, params = network(**options)

    def loss(params, xs, lengths):
        return (lstm(params, xs, lengths=lengths)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    steps, batch = jax.export.symbolic_shape("T, B")
    shapes = jax.ShapeDtypeStruct((steps, batch, 3), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    program = jax.export.export(gradient)(lstm.param_shapes(), *shapes)
    for num_steps in (1, 5, 13):
        xs = np.random.default_rng(num_steps).standard_normal((num_steps, 2, 3)).astype(np.float32)
        lengths = np.array([num_steps, num_steps // 2], np.int32)
        expected = jax.tree.leaves(gradient(params, xs, lengths))
        for a, b in zip(jax.tree.leaves(program.call(params, xs, lengths)), expected, strict=True):
            np.testing.assert_allclose(a, b, **tolerance(np.float32, 400))


def test_save_is_atomic_and_needs_overwrite(tmp_path, monkeypatch):
    lstm, params = network()
    program = export.step(lstm, params, platforms=("cpu",))
    path = tmp_path / "step"
    export.save(program, str(path))
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="step exists; overwrite=True replaces it"):
        export.save(program, path)

    def disk_full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="no space left"):
            export.save(program, path, overwrite=True)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("something else")
    export.save(program, path, overwrite=True)
    assert path.read_bytes() == content


def test_save_rejects_overwrite_that_is_not_a_bool(tmp_path):
    (tmp_path / "step").write_text("something else")
    with pytest.raises(TypeError, match=r"^overwrite must be True or False, got 'no'$"):
        export.save(export.step(*network(), platforms=("cpu",)), tmp_path / "step", overwrite="no")
    assert (tmp_path / "step").read_text() == "something else"


@pytest.mark.parametrize("name", ["with_state", "with_lengths"])
def test_sequence_rejects_options_that_are_not_bools(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 'no'$"):
        export.sequence(*network(), **{name: "no"})


def test_save_without_flatbuffers_names_the_extra(tmp_path, monkeypatch):
    program = export.step(*network(), platforms=("cpu",))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    message = r"^saving a program needs flatbuffers, which is not installed: pip install 'jaxlstm\[export\]'$"
    with pytest.raises(ImportError, match=message):
        export.save(program, tmp_path / "step")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platforms", ["cpu", ()])
def test_step_rejects_platforms_that_are_not_a_sequence_of_names(platforms):
    with pytest.raises(ValueError, match="platforms must be a sequence of at least one name, got "):
        export.step(*network(), platforms=platforms)


def test_sequence_rejects_unknown_platform():
    with pytest.raises(ValueError, match="platforms must be one of 'cpu', 'cuda', 'tpu', 'rocm'; got 'gpu'"):
        export.sequence(*network(), platforms=("cpu", "gpu"))


@pytest.mark.parametrize("implementation", ["associative", "newton", "cudnn", "pallas", Newton()])
def test_sequence_rejects_implementations_for_fixed_sizes(implementation):
    lstm, params = network()
    lstm = dataclasses.replace(lstm, implementation=implementation)
    with pytest.raises(ValueError, match=r"implementation=.* needs a fixed number of steps; export with .*'fused'"):
        export.sequence(lstm, params)


def test_export_rejects_bidirectional_step_and_params_of_another_network():
    with pytest.raises(ValueError, match="bidirectional"):
        export.step(*network(bidirectional=True))
    lstm, _ = network()
    with pytest.raises(ValueError, match=r"params.layers\[0\].forward.w_h must have shape"):
        export.sequence(lstm, network(proj_size=2)[1])
