"""The check of compiled kernels before their first run: here the interpreter stands for the device."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jaxlstm
from jaxlstm.autotuning import tune
from jaxlstm.autotuning.candidates import Candidate, Candidates
from jaxlstm.experimental.pallas import mosaic_tpu, probe, target
from jaxlstm.recurrence import explain

pytestmark = pytest.mark.slow
LSTM = jaxlstm.LSTM(3, 4, implementation="pallas", dtype=jnp.bfloat16)
XS = jnp.ones((2, 4, 3))


@pytest.fixture
def checks(monkeypatch):
    """Makes kernels count as compiled for this device; returns the dtype and kind of kernel of each check."""
    made = []

    def compare(run_kernels, weights_sharing, dtype):
        made.append((weights_sharing, dtype.name))
        return small_compare(run_kernels, weights_sharing, dtype)

    small_compare = probe._compare
    probe._find_failure.cache_clear()
    jax.clear_caches()  # calls that were traced before are not checked again
    monkeypatch.setattr(target, "runs_here", lambda: True)
    monkeypatch.setattr(probe, "UNITS", {None: 4})
    monkeypatch.setattr(probe, "STEPS", 3)
    monkeypatch.setattr(probe, "_compare", compare)
    yield made
    probe._find_failure.cache_clear()
    jax.clear_caches()


@pytest.fixture
def wrong_kernel(monkeypatch, checks):
    """Makes the backward kernel wrong by one part in four."""
    solve = mosaic_tpu.solve_cotangents

    def wrong(*args):
        return jax.tree.map(lambda a: a + jnp.asarray(0.25, a.dtype) * a, solve(*args))

    monkeypatch.setattr(mosaic_tpu, "solve_cotangents", wrong)
    return checks


def params():
    return jax.tree.map(lambda a: jnp.full(a.shape, 0.1, a.dtype), LSTM.param_shapes())


def call(lstm, xs):
    return lstm(params(), xs)[0]


def test_correct_kernel_is_checked_once_per_dtype(checks):
    for _ in range(2):
        call(LSTM, XS)
    assert checks == [(None, "bfloat16")]
    call(jaxlstm.LSTM(3, 4, implementation="pallas"), XS)
    assert checks == [(None, "bfloat16"), (None, "float32")]


def test_wrong_kernel_raises_once_checked_and_names_the_remedy(wrong_kernel):
    message = (
        r"^implementation='pallas' was not run: its kernel in bfloat16 for this cpu differs from 'scan' at a small "
        r"size by \d.\de-\d\d of the largest number, expected at most 4.4e-02; use implementation='fused', which runs "
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as raised:
            call(LSTM, XS)
        assert "\n" not in str(raised.value)
    assert len(wrong_kernel) == 1


def test_kernel_that_fails_raises(monkeypatch, checks):
    def fail(*args):
        raise NotImplementedError("no such instruction\non this chip")

    monkeypatch.setattr(mosaic_tpu, "compute_outputs", fail)
    with pytest.raises(
        RuntimeError, match="failed in a check at a small size: NotImplementedError: no such instruction;"
    ):
        call(LSTM, XS)


TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(XS),
    "grad": lambda f: jax.grad(lambda xs: f(xs).astype(jnp.float32).sum())(XS),
    "jit grad": lambda f: jax.jit(jax.grad(lambda xs: f(xs).astype(jnp.float32).sum()))(XS),
    "vmap": lambda f: jax.vmap(f, 1)(XS),
    "scan": lambda f: lax.scan(lambda carry, xs: (carry, f(xs)), 0, XS[None]),
    "eval_shape": lambda f: jax.eval_shape(f, XS),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_check_runs_while_tracing(transform, wrong_kernel):
    with pytest.raises(RuntimeError, match="differs from 'scan'"):
        TRANSFORMS[transform](partial(call, LSTM))
    assert len(wrong_kernel) == 1


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_check_runs_within_shard_map(axis_type, checks):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    spec = PartitionSpec(None, "data")
    with jax.set_mesh(mesh):
        xs = jax.device_put(XS, spec)
        mapped = jax.shard_map(partial(call, LSTM), in_specs=spec, out_specs=spec, check_vma=False)
        actual = jax.jit(mapped)(xs)
    assert checks == [(None, "bfloat16")]
    assert actual.shape == (2, 4, 4)


def test_explain_runs_no_check(wrong_kernel):
    assert "experimental" in explain(LSTM, XS.shape).others["pallas"]
    assert wrong_kernel == []


def test_interpreted_kernels_are_not_checked(monkeypatch):
    monkeypatch.setattr(probe, "_compare", lambda *args: pytest.fail("the kernel was checked"))
    assert call(LSTM, XS).shape == (2, 4, 4)


def test_autotune_tries_the_kernel_only_if_it_is_correct(wrong_kernel, monkeypatch):
    candidates = Candidates((Candidate("fused", 1), Candidate("scan", 1)), (Candidate("pallas", 1),), (), {})
    monkeypatch.setattr(tune, "list_candidates", lambda *args, **options: candidates)
    rows = {row.candidate: row for row in jaxlstm.autotune(LSTM, XS.shape, seconds=60).table}
    assert rows["pallas"].note.startswith("failed: RuntimeError: implementation='pallas' was not run: ")
    assert rows["pallas"].seconds is None
    assert "chosen" in rows["fused"].note + rows["scan"].note
