"""Exported inference runs where this package is not, at any size."""

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
from jaxlstm.recurrence import Newton

ELSEWHERE = """
import sys
sys.modules["jaxlstm"] = None  # importing it fails
from pathlib import Path
import jax, jax.export, numpy as np

folder = Path(sys.argv[1])
sequence, step = (jax.export.deserialize(bytearray((folder / name).read_bytes())) for name in ("sequence", "step"))
given = dict(np.load(folder / "given.npz"))
results = {}
for size in "ab":
    xs, h, c, lengths = (given[f"{name}{size}"] for name in ("xs", "h", "c", "lengths"))
    ys, (h_last, c_last) = jax.jit(sequence.call)(xs, state=(h, c), lengths=lengths)
    (h_next, c_next), y = step.call((h, c), xs[0])
    results |= {f"{k}{size}": v for k, v in dict(ys=ys, h=h_last, c=c_last, y=y, h_next=h_next, c_next=c_next).items()}
np.savez(folder / "results.npz", **results)
try:
    import jaxlstm
except ImportError:
    print(jax.numpy.shape(ys))
"""
SIZES = {"a": (5, 2), "b": (9, 20)}  # steps and batch, on both sides of where the layout of arrays changes


def network(**options):
    lstm = jaxlstm.LSTM(3, 5, **options)
    return lstm, cases.random_params(lstm, np.random.default_rng(0), lstm.param_dtype)


def test_a_program_without_this_package_gives_the_same_numbers(tmp_path):
    lstm, params = network(num_layers=2, proj_size=4)
    export.save(export.sequence(lstm, params, with_state=True, with_lengths=True), tmp_path / "sequence")
    export.save(export.step(lstm, params), tmp_path / "step")
    rng = np.random.default_rng(1)
    given, expected = {}, {}
    for size, (steps, batch) in SIZES.items():
        xs = rng.standard_normal((steps, batch, 3)).astype(np.float32)
        state = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), lstm.initial_state(batch))
        lengths = rng.integers(0, steps + 1, batch).astype(np.int32)
        given |= {f"xs{size}": xs, f"h{size}": state.h, f"c{size}": state.c, f"lengths{size}": lengths}
        ys, last = lstm(params, xs, state, lengths=lengths)
        after, y = lstm.step(params, state, xs[0])
        each = {"ys": ys, "h": last.h, "c": last.c, "y": y, "h_next": after.h, "c_next": after.c}
        expected |= {f"{name}{size}": value for name, value in each.items()}
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(9, 20, 4)"
    results = np.load(tmp_path / "results.npz")
    assert set(results.files) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, **tolerance(np.float32, 100), err_msg=name)


EVERY_CELL = [
    {"cell": "rnn", "bidirectional": True, "unroll": 4, "remat": 2},
    pytest.param({"learned_state": True, "layer_norm": True, "dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param({"cell": "peephole", "param_dtype": "float64"}, marks=pytest.mark.slow),
    pytest.param({"cell": "cifg", "implementation": "scan", "zoneout_c": 0.3}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", EVERY_CELL)
def test_every_cell(options):
    lstm, params = network(**options)
    program = export.sequence(lstm, params)
    assert program.platforms == ("cpu", "cuda", "tpu")  # lowered for them; only a device can run it
    for steps, batch in SIZES.values():
        xs = np.random.default_rng(steps).standard_normal((steps, batch, 3)).astype(lstm.dtype or lstm.param_dtype)
        ys, last = program.call(xs)
        wanted, state = lstm(params, xs)
        assert (ys.shape, ys.dtype, len(last)) == (wanted.shape, wanted.dtype, 2)
        assert (last[1] is None) == (state.c is None)
        for a, b in zip(jax.tree.leaves((ys, last)), jax.tree.leaves((wanted, state)), strict=True):
            np.testing.assert_allclose(a.astype("float64"), b.astype("float64"), **tolerance(ys.dtype, 100))


def test_a_function_of_the_users_own_with_symbolic_sizes():
    lstm, params = network()
    (batch,) = jax.export.symbolic_shape("B")

    def first(x):
        return lstm.step(params, lstm.initial_state(x.shape[0]), x)[1]

    program = jax.export.export(jax.jit(first))(jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    x = np.ones((4, 3), np.float32)
    np.testing.assert_allclose(program.call(x), first(x), **tolerance(np.float32, 10))


def test_a_file_is_written_whole_or_not_at_all_and_not_replaced_silently(tmp_path, monkeypatch):
    lstm, params = network()
    program = export.step(lstm, params, platforms=("cpu",))
    path = tmp_path / "step"
    export.save(program, str(path))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="step exists; overwrite=True replaces it"):
        export.save(program, path)

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            export.save(program, path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("something else")
    export.save(program, path, overwrite=True)
    assert path.read_bytes() == before


def test_what_cannot_be_exported():
    lstm, params = network()
    for platforms in ("cpu", ()):
        with pytest.raises(ValueError, match="platforms must be a sequence of at least one name, got "):
            export.step(lstm, params, platforms=platforms)
    with pytest.raises(ValueError, match="platforms must be one of 'cpu', 'cuda', 'tpu', 'rocm'; got 'gpu'"):
        export.sequence(lstm, params, platforms=("cpu", "gpu"))
    for name in ("newton", "cudnn", "pallas", Newton()):
        known = dataclasses.replace(lstm, implementation=name)
        with pytest.raises(ValueError, match=r"implementation=.* has to know the number of steps; 'fused' does not"):
            export.sequence(known, params)
    with pytest.raises(ValueError, match="step is for one direction"):
        export.step(*network(bidirectional=True))
    with pytest.raises(ValueError, match=r"params.layers\[0\].forward.w_h must have shape"):
        export.sequence(lstm, network(proj_size=2)[1])
