"""What is taken where no implementation is named, and why."""

import jax
import jax.numpy as jnp
import pytest

import jaxlstm
from jaxlstm import recurrence
from jaxlstm.experimental import cudnn
from jaxlstm.experimental.pallas import mosaic_tpu_scan
from jaxlstm.recurrence import explain, selection


@pytest.fixture(autouse=True)
def _kernels_need_their_chip():
    with mosaic_tpu_scan.making_for(None):
        yield


def test_every_row_takes_one_and_has_a_reason_for_each_other():
    for platform, row in {**selection.TABLE, "other": selection.OTHER}.items():
        refused = {"gpu": set(), "tpu": {"cudnn"}}.get(platform, {"cudnn", "pallas"})
        assert {row.takes, *row.others} == set(recurrence.IMPLEMENTATIONS) - refused
        assert row.takes not in row.others
        assert all([row.because, *row.others.values()])


def test_what_is_explained_is_what_runs(monkeypatch):
    ran = []
    for name, run in recurrence.IMPLEMENTATIONS.items():
        monkeypatch.setitem(recurrence.IMPLEMENTATIONS, name, lambda *a, n=name, run=run: (ran.append(n), run(*a))[1])
    lstm = jaxlstm.LSTM(3, 7)
    said = explain(lstm, (5, 2, 3))
    ran.clear()
    lstm(lstm.init(jax.random.key(0)), jnp.ones((5, 2, 3), jnp.float32))
    assert ran == [said.takes] == ["fused"]


def test_each_other_has_a_line_that_says_why_not():
    said = explain(jaxlstm.LSTM(3, 4, proj_size=2, implementation="scan"), (5, 2, 3))
    assert said.others["cudnn"] == "refused: implementation='cudnn' needs an NVIDIA GPU, got the backend 'cpu'"
    assert said.others["pallas"] == (
        "refused: implementation='pallas' is a kernel for TPUs and Hopper GPUs, got the backend 'cpu'; "
        "'fused' and 'scan' run on every backend"
    )
    assert said.others["scan"].startswith("slower: ")
    assert said.others["newton"].startswith("slower: ")
    lines = str(said).splitlines()
    assert [line.split(":")[0] for line in lines] == ["fused", "scan", "newton", "pallas", "cudnn"]
    assert [line.split(";")[0].split(": ")[1] for line in lines] == ["taken", *["not taken"] * 4]


def test_where_nothing_is_measured_it_says_so(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "_on_cuda", lambda: True)
    said = explain(jaxlstm.LSTM(3, 4, proj_size=2), (5, 2, 3))
    assert said.takes == "fused"
    assert said.because == "all are unmeasured on this platform"
    assert said.others["newton"] == "unmeasured on this platform"
    assert said.others["cudnn"] == "refused: implementation='cudnn' does not take a projection"
    assert said.others["pallas"].startswith("refused: implementation='pallas' is a kernel for TPUs and Hopper GPUs, of")


def test_a_kernel_for_a_hopper_gpu_is_unmeasured_or_refused_with_its_arithmetic(monkeypatch):
    class Gpu:
        device_kind, compute_capability, core_count = "NVIDIA H100 PCIe", "9.0", 114

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(cudnn, "_on_cuda", lambda: True)
    lstm = jaxlstm.LSTM(3, 768, dtype=jnp.bfloat16)
    assert explain(lstm, (5, 16, 3)).others["pallas"] == "unmeasured on this platform"
    said = explain(lstm, (5, 65, 3))
    assert said.takes == "fused"
    assert said.others["pallas"].startswith(
        "refused: implementation='pallas' keeps the recurrent weights in the shared"
    )
    assert said.others["pallas"].endswith(
        "114 blocks run at once; hidden_size fits up to 1600, and a batch with 768 units up to 64"
    )


def test_wrong_inputs_are_an_error_and_not_a_refusal():
    with pytest.raises(ValueError, match="xs must have shape"):
        explain(jaxlstm.LSTM(3, 4), (5, 2, 4))


def test_without_a_step_it_is_as_with_one():
    assert explain(jaxlstm.LSTM(3, 4), (0, 2, 3)) == explain(jaxlstm.LSTM(3, 4), (1, 2, 3))
