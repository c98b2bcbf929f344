"""The backend that runs if none is named, and the reasons against the others."""

import jax
import jax.numpy as jnp
import pytest

import jaxlstm
import jaxlstm.rnn
from jaxlstm import recurrence
from jaxlstm.recurrence import backends, explain, selection

NAMES = {*recurrence.BACKENDS, *recurrence.MULTILAYER_BACKENDS}


def refuse(*args, **kwargs):
    """Stands in for a backend that cannot run a network."""
    raise ValueError("this network is too large")


@pytest.fixture
def experimental_backends_refuse(monkeypatch):
    for name in recurrence.EXPERIMENTAL:
        table = recurrence.BACKENDS if name in recurrence.BACKENDS else recurrence.MULTILAYER_BACKENDS
        monkeypatch.setitem(table, name, f"{__name__}:refuse")


@pytest.mark.parametrize("platform", [*selection.PLATFORM_DEFAULTS, "unknown"])
def test_platform_default_has_reason_for_every_backend(platform):
    default = selection.PLATFORM_DEFAULTS.get(platform, selection.UNKNOWN_PLATFORM)
    assert default.name == selection.default_backend(platform)
    assert default.name not in recurrence.EXPERIMENTAL
    assert {default.name, *default.others} == NAMES
    assert default.name not in default.others
    assert all([default.reason, *default.others.values()])
    for name in recurrence.EXPERIMENTAL:
        assert default.others[name].startswith("experimental")


def test_backends_are_functions_of_their_modules():
    for name in ("scan", "fused", "tensor_parallel"):
        assert callable(backends.get_backend(name))
    assert backends.get_backend(refuse) is refuse


def test_explain_names_backend_that_runs(monkeypatch, experimental_backends_refuse):
    names = []

    def get_backend(implementation):
        names.append(implementation)
        return backends.get_backend(implementation)

    monkeypatch.setattr(jaxlstm.rnn, "get_backend", get_backend)
    lstm = jaxlstm.LSTM(3, 7)
    choice = explain(lstm, (5, 2, 3))
    assert set(names) == set(recurrence.BACKENDS)
    names.clear()
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), lstm.param_shapes())
    lstm(params, jnp.ones((5, 2, 3), jnp.float32))
    assert names == [choice.name] == ["fused"]


def test_explain_gives_reason_against_every_other_backend(experimental_backends_refuse):
    choice = explain(jaxlstm.LSTM(3, 4, proj_size=2, implementation="scan"), (5, 2, 3))
    assert choice.others["scan"].startswith("slower: ")
    assert choice.others["tensor_parallel"] == selection.TENSOR_PARALLEL
    lines = str(choice).splitlines()
    names = ["fused", "scan", "tensor_parallel", "associative", "newton", "pallas", "cudnn"]
    assert [line.split(":")[0] for line in lines] == names
    assert [line.split(";")[0].split(": ")[1] for line in lines] == ["chosen", *["not chosen"] * 6]


def test_explain_quotes_refusals(experimental_backends_refuse):
    choice = explain(jaxlstm.LSTM(3, 4), (5, 2, 3))
    for name in recurrence.EXPERIMENTAL:
        assert choice.others[name] == "experimental; refused: this network is too large"


def test_explain_marks_experimental_backends_on_cpu():
    choice = explain(jaxlstm.LSTM(3, 5), (5, 2, 3))  # a size of no other test: JAX caches programs that were traced
    assert choice.others["newton"] == selection.PLATFORM_DEFAULTS["cpu"].others["newton"]
    assert all(choice.others[name].startswith("experimental") for name in recurrence.EXPERIMENTAL)
    assert "refused" in choice.others["cudnn"]


def test_explain_says_that_nothing_was_measured_on_gpu(monkeypatch, experimental_backends_refuse):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choice = explain(jaxlstm.LSTM(3, 4, proj_size=2), (5, 2, 3))
    assert choice.name == "fused"
    assert choice.reason == "no backend was measured on this platform"
    assert choice.others["scan"] == selection.UNMEASURED


def test_explain_raises_for_wrong_inputs():
    with pytest.raises(ValueError, match="xs must have shape"):
        explain(jaxlstm.LSTM(3, 4), (5, 2, 4))


def test_explain_without_steps_equals_one_step(experimental_backends_refuse):
    choice = explain(jaxlstm.LSTM(3, 4), (0, 2, 3))
    assert choice == explain(jaxlstm.LSTM(3, 4), (1, 2, 3))
    assert "refused" in choice.others["pallas"]
