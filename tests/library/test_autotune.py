"""The search for the fastest backend: candidates, checks, order, time, report, and the file that keeps the choice."""

import json
import pickle
import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxlstm
from jaxlstm import checksum
from jaxlstm.autotuning import tune, tuning
from jaxlstm.autotuning.agreement import relative_error, tolerance
from jaxlstm.autotuning.candidates import Candidate, Candidates, list_candidates
from jaxlstm.autotuning.search import ENOUGH_RUNS, FEWEST_RUNS, search
from jaxlstm.cells import sigmoid
from jaxlstm.experimental.newton import Newton
from jaxlstm.recurrence import explain
from jaxlstm.recurrence.backends import get_backend
from jaxlstm.recurrence.fused import Fused
from jaxlstm.recurrence.layout import LayerSizes, choose_layout
from jaxlstm.recurrence.scan import Scan

SHAPE = (6, 2, 3)
FEATURE, BATCH = Fused("feature", True, 8), Fused("batch", True, 8)


class Machine:
    """Programs with given times on a clock of their own.

    Args:
      compiling: seconds to compile any candidate.
      running: seconds of a run by candidate, or an exception; 0.1 for others.
      errors: error of the results by candidate; 0 for others.
    """

    def __init__(self, compiling=1.0, running=(), errors=()):
        self.now, self.compiling = 100.0, compiling
        self.running, self.errors = dict(running), dict(errors)
        self.compiled, self.runs = [], []

    def compile(self, candidate):
        self.compiled.append(str(candidate))
        self.now += self.compiling
        seconds = self.running.get(str(candidate), 0.1)
        if isinstance(seconds, Exception):
            raise seconds

        def run():
            self.now += seconds
            self.runs.append(str(candidate))
            return self.errors.get(str(candidate), 0.0)

        return run

    def search(self, seconds, always=("fused", "scan"), seeds=(), others=(), excluded=()):
        candidates = Candidates(
            *(tuple(each if isinstance(each, Candidate) else Candidate(each, 1) for each in group)
              for group in (always, seeds, others)),
            dict(excluded),
        )  # fmt: skip
        return search(
            candidates,
            self.compile,
            lambda error: error,
            tolerance=1e-3,
            seconds=seconds,
            start=self.now,
            clock=lambda: self.now,
        )


def notes(result):
    return {trial.candidate: trial.note for trial in result.trials}


def runs(result):
    return {trial.candidate: trial.runs for trial in result.trials}


def test_search_halves_and_chooses_the_fastest():
    machine = Machine(0.01, {"fused": 0.05, "scan": 0.06, "a": 0.02, "b": 0.01, "c": 0.04, "d": 0.03})
    result = machine.search(60.0, seeds="abcd")
    assert str(result.chosen) == "b"
    assert [trial.candidate for trial in result.trials] == ["b", "a", "d", "c", "fused", "scan"]
    times = {trial.candidate: trial.seconds for trial in result.trials}
    assert times == pytest.approx({"b": 0.01, "a": 0.02, "d": 0.03, "c": 0.04, "fused": 0.05, "scan": 0.06})
    assert runs(result)["b"] == runs(result)["fused"] >= ENOUGH_RUNS  # the default is in the last comparison
    assert runs(result)["scan"] == runs(result)["c"] == 2  # dropped after the first round
    assert runs(result)["a"] > runs(result)["d"] > 2
    assert notes(result) == {"b": "chosen", **dict.fromkeys(("a", "c", "d", "fused", "scan"), "")}
    assert [trial.candidate for trial in result.trials if trial.is_default] == ["fused"]


def test_search_interleaves_and_rotates():
    times = {"fused": 0.5, "scan": 0.6, "a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    machine = Machine(0.0, times)
    machine.search(600.0, seeds="abcd")
    assert machine.runs[:4] == ["fused", "fused", "scan", "scan"]  # screening: a first run and a timed one
    first, second, third = machine.runs[12:18], machine.runs[18:22], machine.runs[22:26]
    assert sorted(first) == sorted(times)
    assert sorted(second) == sorted(third) == ["a", "b", "c", "fused"]
    assert second[1:] != third[1:]


def test_search_keeps_the_default_within_noise():
    result = Machine(0.0, {"fused": 0.1, "scan": 0.2, "a": 0.099}).search(60.0, seeds="a")
    assert str(result.chosen) == "fused"
    assert result.trials[0].note == "chosen"
    assert notes(result)["a"] == "not faster than the default by more than 2%"
    assert str(Machine(0.0, {"fused": 0.1, "scan": 0.2, "a": 0.097}).search(60.0, seeds="a").chosen) == "a"


@pytest.mark.parametrize("error", [2e-3, float("inf"), float("nan")])
def test_search_reports_wrong_candidate_and_never_chooses_it(error):
    result = Machine(0.1, {"a": 0.001}, {"a": error}).search(60.0, seeds="ab")
    (wrong,) = [trial for trial in result.trials if trial.candidate == "a"]
    assert str(result.chosen) == "fused"
    assert wrong.note == "wrong: differs from 'scan' by more than the tolerance 1.0e-03"
    assert (wrong.seconds, wrong.runs) == (None, 0)
    assert str(wrong.error) == str(error)


def test_search_does_not_choose_a_wrong_default():
    machine = Machine(0.1, {"fused": 0.001, "scan": 0.3}, {"fused": 1.0})
    result = machine.search(5.0)
    assert str(result.chosen) == "scan"
    assert notes(result)["fused"].startswith("wrong: ")
    assert [trial.candidate for trial in result.trials if trial.is_default] == ["fused"]


def test_search_reports_refusals_and_failures():
    errors = {"a": ValueError("needs a GPU\nsecond line"), "b": MemoryError(), "c": RuntimeError("no kernel")}
    result = Machine(0.1, errors).search(60.0, seeds="abc", excluded={"d": "only on Mars"})
    assert notes(result) == {
        "fused": "chosen",
        "scan": "",
        "a": "refused: needs a GPU",
        "b": "failed: MemoryError: MemoryError",
        "c": "failed: RuntimeError: no kernel",
        "d": "not a candidate: only on Mars",
    }


def test_search_without_a_candidate_that_works_gives_the_reasons():
    machine = Machine(0.1, {"fused": ValueError("too large")}, {"scan": 1.0})
    with pytest.raises(RuntimeError, match="no candidate can be chosen: fused: refused: too large; scan: wrong: "):
        machine.search(5.0)


def test_search_stops_in_time_and_says_what_it_did_not_try():
    machine = Machine(1.0, {"fused": 0.1, "scan": 0.1})
    result = machine.search(10.0, others=[Candidate("scan", n) for n in range(2, 50)])
    assert machine.now - 100.0 == pytest.approx(10.0, abs=0.11)
    tried = [trial for trial in result.trials if trial.seconds is not None]
    assert len(tried) == len(machine.compiled) >= 5
    assert [trial.note for trial in result.trials[len(tried) :]] == ["not tried: out of time"] * (50 - len(tried))
    assert {trial.candidate for trial in result.trials[len(tried) :]}.isdisjoint(machine.compiled)
    assert min(trial.runs for trial in tried) >= 2


def test_search_without_time_tries_default_and_reference_and_keeps_the_default():
    machine = Machine(1.0, {"fused": 0.2, "scan": 0.1})
    result = machine.search(0.001, seeds="ab")
    assert machine.compiled == ["fused", "scan"]
    assert str(result.chosen) == "fused"
    assert notes(result)["scan"] == "run too few times"
    assert runs(result)["scan"] < FEWEST_RUNS


def test_search_uses_the_time_that_short_programs_leave():
    machine = Machine(0.1, {"fused": 1e-5, "scan": 1e-5})
    machine.running |= {str(Candidate("scan", n)): 1e-5 for n in range(60)}
    machine.search(3.0, others=[Candidate("scan", n) for n in range(2, 60)])
    assert len(machine.compiled) > 25


def test_search_drops_a_very_slow_candidate_after_one_run():
    machine = Machine(0.1, {"a": 3.0})
    result = machine.search(20.0, seeds="ab")
    assert machine.runs.count("a") == 1
    assert notes(result)["a"] == "much slower: run once"
    assert {trial.candidate: trial.seconds for trial in result.trials}["a"] == pytest.approx(3.0)


def test_search_compares_after_a_candidate_that_took_too_long():
    machine = Machine(0.1, {"fused": 0.01, "scan": 0.02, "a": 0.008, "b": 50.0})
    result = machine.search(10.0, seeds="ab")
    assert str(result.chosen) == "a"
    assert runs(result)["a"] >= 30
    assert machine.now - 100.0 < 50.0 + 10.0


def test_search_tries_an_unknown_backend_in_the_first_half_only():
    scans = [Candidate("scan", n) for n in range(2, 10)]
    times = dict.fromkeys(("fused", "scan", *map(str, scans)), 1e-3)
    for seconds, is_tried in ((8.0, False), (40.0, True)):  # the others take five seconds
        machine = Machine(0.5, times)
        result = machine.search(seconds, others=[*scans, Candidate("newton", 1)])
        assert ("newton" in machine.compiled) == is_tried
        assert (notes(result)["newton"] == "not tried: out of time") != is_tried


def test_search_tries_similar_ones_to_the_fastest_first():
    near = [Candidate(Fused("feature", True, n), 1) for n in (16, 32)] + [Candidate(FEATURE, 2)]
    far = [Candidate(Fused("batch", True, n), 1) for n in (16, 32)]
    machine = Machine(0.1, {str(FEATURE): 0.01, str(BATCH): 0.02} | {str(each): 0.03 for each in near})
    machine.search(60.0, always=(BATCH, "scan"), seeds=(FEATURE,), others=(*far, *near))
    assert machine.compiled[3:] == [str(each) for each in (*near, *far)]


def test_num_changes():
    assert Candidate(FEATURE, 1).num_changes(Candidate(FEATURE, 1)) == 0
    assert Candidate(FEATURE, 1).num_changes(Candidate(BATCH, 2)) == 2
    assert Candidate("scan", 1).num_changes(Candidate("scan", 4)) == 1
    assert Candidate("scan", 1).num_changes(Candidate("fused", 1)) == float("inf")
    assert Candidate(Scan(), 1).num_changes(Candidate(FEATURE, 1)) == float("inf")


def all_candidates(lstm, shape=(100, 4, 3), *, training=True, experimental=True):
    groups = list_candidates(lstm, shape, training=training, experimental=experimental)
    return groups, [*groups.always, *groups.seeds, *groups.others]


def test_candidates_begin_with_the_default_and_have_no_duplicates():
    lstm = jaxlstm.LSTM(3, 5)
    groups, candidates = all_candidates(lstm)
    layout = choose_layout(LayerSizes(4, 3, 5), jnp.dtype("float32"), jnp.dtype("float32"))
    assert explain(lstm, (100, 4, 3)).name == "fused"
    assert groups.always == ((Fused(layout.order, layout.hoist_inputs, layout.chunk_size), 1), ("scan", 1))
    assert len(candidates) == len(set(candidates)) == 4 * 4 * 3 + 2 * 3 + 4
    assert Scan(concatenate=True) in [each.implementation for each in groups.seeds]
    assert groups.others[-1].implementation == Newton("diagonal")  # slow on a CPU, so it comes last
    assert "interpreter" in groups.excluded["pallas"]
    assert "tensor_parallel" in groups.excluded


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"cell": "gru"}, {"cell": "gru", "layer_norm": True}])
def test_default_candidate_is_the_program_of_the_default(options):
    def program(implementation):
        lstm = jaxlstm.RNN(3, 5, implementation=implementation, **{"cell": "lstm"} | options)
        gradient = jax.jit(jax.grad(lambda params, xs: lstm(params, xs)[0].sum()))
        return gradient.lower(lstm.param_shapes(), jax.ShapeDtypeStruct((9, 4, 3), jnp.float32)).as_text()

    groups, _ = all_candidates(jaxlstm.RNN(3, 5, **{"cell": "lstm"} | options), (9, 4, 3))
    default = groups.always[0].implementation
    assert program(default) == program("fused") == program(None)
    assert program(replace(default, order="feature")) != program("fused")


def test_candidates_leave_out_options_without_effect():
    _, inference = all_candidates(jaxlstm.LSTM(3, 5), training=False)
    assert {each.implementation.chunk_size for each in inference if isinstance(each.implementation, Fused)} == {64}
    _, short = all_candidates(jaxlstm.LSTM(3, 5, unroll=3), (10, 4, 3))
    assert {each.implementation.chunk_size for each in short if isinstance(each.implementation, Fused)} == {64, 8}
    assert {each.unroll for each in short} == {1, 2, 3, 4}
    _, chunked = all_candidates(jaxlstm.LSTM(3, 5, remat=10))
    assert {each.implementation.chunk_size for each in chunked if isinstance(each.implementation, Fused)} == {64, 8}
    groups, normalized = all_candidates(jaxlstm.LSTM(3, 5, layer_norm=True))
    assert {each.implementation.hoist_inputs for each in normalized if isinstance(each.implementation, Fused)} == {
        True,
        False,
    }
    assert groups.excluded["Scan(concatenate=True)"] == "not with layer normalization"
    groups, candidates = all_candidates(jaxlstm.LSTM(3, 5), experimental=False)
    assert {each.implementation for each in candidates if isinstance(each.implementation, str)} == {"scan"}
    assert groups.excluded["newton"] == "experimental"


@pytest.mark.parametrize(
    ("cell", "options"),
    [("gru", {}), ("lstm", {"heads": 5}), ("ea", {"static_size": 2}), ("minlstm", {}), ("indrnn", {})],
)
def test_candidates_of_every_cell_begin_with_a_default_that_runs(cell, options):
    """At this shape the layout of an LSTM multiplies x inside the loop, which block-diagonal weights refuse."""
    assert not choose_layout(LayerSizes(4, 3, 5), jnp.dtype("float32"), jnp.dtype("float32")).hoist_inputs
    groups, candidates = all_candidates(jaxlstm.RNN(3, 5, cell=cell, **options))
    assert isinstance(groups.always[0].implementation, Fused)
    hoists = {each.implementation.hoist_inputs for each in candidates if isinstance(each.implementation, Fused)}
    assert hoists == ({False, True} if cell in ("gru", "ea") else {True})


def test_candidates_contain_the_backend_of_the_network():
    groups, _ = all_candidates(jaxlstm.LSTM(3, 5, implementation=Newton(damping=0.5)))
    assert groups.always[1] == (Newton(damping=0.5), 1)
    assert groups.always[2] == ("scan", 1)


def test_candidates_on_gpu_try_kernels_early(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    groups, candidates = all_candidates(jaxlstm.LSTM(3, 5))
    assert [each.implementation for each in groups.seeds[:3]] == ["pallas", "cudnn", "newton"]
    assert Scan(concatenate=True) not in [each.implementation for each in candidates]
    assert [each.unroll for each in candidates if each.implementation == "pallas"] == [1]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    _, candidates = all_candidates(jaxlstm.LSTM(3, 5))
    assert [each.unroll for each in candidates if each.implementation == "pallas"] == [1, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "options"), [("gru", {}), ("ea", {"static_size": 2}), ("mingru", {})])
def test_autotune_of_every_cell_chooses_a_backend_that_runs(cell, options):
    """The default and the reference are timed, so none of them refuses the cell."""
    network = jaxlstm.RNN(3, 4, cell=cell, **options)
    result = jaxlstm.autotune(network, SHAPE, seconds=0.1)
    timed = {trial.candidate: trial for trial in result.table if trial.runs}
    assert "scan" in timed
    assert [trial.candidate.startswith("Fused") for trial in timed.values() if trial.is_default] == [True]
    static = {"static": jnp.ones((2, 2))} if options else {}
    ys, _ = result.lstm(network.init(jax.random.key(0)), jnp.ones(SHAPE), **static)
    assert ys.shape == (6, 2, 4)


@pytest.mark.parametrize(
    ("implementation", "cell", "reason"),
    [
        ("associative", "gru", "refused: implementation='associative' does not support a cell that is not declared"),
        ("cudnn", "gru", "refused: "),
        (Scan(concatenate=True), "gru", "refused: Scan(concatenate=True) does not support a cell with gates that do"),
        ("newton", "mingru", "refused: implementation='newton' does not support a cell with gates that do not read"),
    ],
    ids=["associative", "cudnn", "concatenated scan", "newton"],
)
def test_autotune_reports_backend_that_refuses_the_cell(implementation, cell, reason):
    """The backend of the network is always tried."""
    network = jaxlstm.RNN(3, 4, cell=cell, implementation=implementation)
    result = jaxlstm.autotune(network, SHAPE, training=False, seconds=0.1)
    (trial,) = [trial for trial in result.table if trial.candidate == str(Candidate(implementation, 1))]
    assert trial.note.startswith(reason)
    assert result.table[0].note == "chosen"


def test_relative_error_is_the_largest_of_all_arrays():
    expected = [np.array([1.0, -10.0]), np.zeros(2), np.array([100.0])]
    assert relative_error(expected, expected) == 0
    assert relative_error([np.array([1.0, -9.0]), np.zeros(2), np.array([101.0])], expected) == pytest.approx(0.1)
    assert relative_error([expected[0], np.array([0.0, 1e-9]), expected[2]], expected) == np.inf
    assert relative_error([np.array([1.0, np.nan]), *expected[1:]], expected) == np.inf


def test_tolerance_follows_from_the_narrowest_dtype():
    def bound(**options):
        return tolerance(jaxlstm.LSTM(64, 128, **options), (50, 16, 64))

    assert 1e-14 < bound(param_dtype=jnp.float64) < 1e-12 < 1e-5 < bound() < 1e-3
    assert 1e-3 < bound(dtype=jnp.float16) < bound(dtype=jnp.bfloat16) == bound(param_dtype=jnp.bfloat16) < 0.05
    assert bound(num_layers=4) == 2 * bound()


def test_tolerance_of_float32_knows_how_the_platform_multiplies(monkeypatch):
    lstm = jaxlstm.LSTM(64, 128)
    on_cpu = tolerance(lstm, (50, 16, 64))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert on_cpu < tolerance(lstm, (50, 16, 64)) < 0.01
    with jax.default_matmul_precision("highest"):
        assert tolerance(lstm, (50, 16, 64)) == on_cpu


def forgetful(cell, directions, context):
    """A wrong backend: it loses the recurrent weights, and with them a part of every gradient."""
    directions = tuple(d._replace(weights=d.weights._replace(w_h=0 * d.weights.w_h)) for d in directions)
    return get_backend("scan")(cell, directions, context)


def detached(cell, directions, context):
    """A backend with right results and a wrong gradient: it does not pass the recurrent weights."""
    weights = [d.weights._replace(w_h=jax.lax.stop_gradient(d.weights.w_h)) for d in directions]
    return get_backend("scan")(cell, tuple(d._replace(weights=w) for d, w in zip(directions, weights)), context)


@pytest.mark.slow
def test_autotune_checks_gradients_in_training_only():
    lstm = jaxlstm.LSTM(3, 5, implementation=detached)
    for training in (True, False):
        result = jaxlstm.autotune(lstm, SHAPE, training=training, seconds=0.1)
        (row,) = [trial for trial in result.table if "detached" in trial.candidate]
        assert row.note.startswith("wrong: ") == training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_autotune_never_chooses_a_wrong_backend(training, dtype):
    lstm = jaxlstm.LSTM(3, 5, dtype=dtype, implementation=forgetful)
    result = jaxlstm.autotune(lstm, SHAPE, training=training, seconds=0.1)
    (wrong,) = [trial for trial in result.table if "forgetful" in trial.candidate]
    assert wrong.note.startswith("wrong: ")
    assert wrong.error > tolerance(lstm, SHAPE)
    assert result.lstm.implementation != forgetful
    for trial in result.table:
        if trial is not wrong and trial.error is not None:
            assert trial.error < tolerance(lstm, SHAPE) / 5


@pytest.fixture(scope="module")
def result():
    return jaxlstm.autotune(jaxlstm.LSTM(3, 5, num_layers=2, zoneout_h=0.1, dropout=0.2), SHAPE, seconds=3)


def test_autotune_returns_the_same_network_with_a_backend(result):
    lstm = result.lstm
    assert replace(lstm, implementation=None, unroll=1) == jaxlstm.LSTM(3, 5, num_layers=2, zoneout_h=0.1, dropout=0.2)
    assert pickle.loads(pickle.dumps(result)) == result
    assert hash(lstm) == hash(pickle.loads(pickle.dumps(lstm)))
    params, xs = lstm.init(jax.random.key(0)), jnp.ones(SHAPE, jnp.float32)
    ys, _ = replace(lstm, implementation="scan")(params, xs)
    np.testing.assert_allclose(lstm(params, xs)[0], ys, atol=1e-6)
    assert result.xs_shape == SHAPE
    assert result.training


def test_autotune_table_prints_every_row(result):
    table = {trial.candidate: trial for trial in result.table}
    chosen = result.table[0]
    assert chosen.note == "chosen"
    assert str(Candidate(result.lstm.implementation, result.lstm.unroll)) == chosen.candidate
    assert table["scan"].error == 0
    assert table["scan"].seconds > 0
    lines = str(result).splitlines()
    assert lines[0].startswith(f"{result.lstm}: value and gradient, xs [6, 2, 3], cpu (")
    assert lines[1].split() == ["candidate", "median", "runs", "error"]
    assert lines[2].startswith(chosen.candidate)
    assert "chosen" in lines[2]
    not_tried = [trial for trial in result.table if trial.note == "not tried: out of time"]
    assert len(lines) == 2 + len(result.table) - len(not_tried) + bool(not_tried)
    if not_tried:
        assert lines[-1] == f"{len(not_tried)} more not tried: out of time"


@pytest.mark.parametrize(
    ("lstm", "shape", "seconds", "error", "message"),
    [
        (jaxlstm.ConvLSTM(1, 2, (3,)), SHAPE, 1, TypeError, "lstm must be a jaxlstm.LSTM, got ConvLSTM"),
        (jaxlstm.LSTM(3, 5), (6, 2, 4), 1, ValueError, r"xs_shape must be \(T, \*batch, 3\), got \(6, 2, 4\)"),
        (jaxlstm.LSTM(3, 5), (3,), 1, ValueError, r"xs_shape must be \(T, \*batch, 3\), got \(3,\)"),
        (jaxlstm.LSTM(3, 5), (0, 2, 3), 1, ValueError, "at least one step and one sequence, got"),
        (jaxlstm.LSTM(3, 5), (6, 0, 3), 1, ValueError, "at least one step and one sequence, got"),
        (jaxlstm.LSTM(3, 5), "abc", 1, TypeError, "xs_shape must be an int or a tuple of ints"),
        (jaxlstm.LSTM(3, 5), SHAPE, 0, ValueError, "seconds must be above 0, got 0"),
        (jaxlstm.LSTM(3, 5), SHAPE, float("inf"), ValueError, "seconds must be finite, got inf"),
        (jaxlstm.LSTM(3, 5), SHAPE, "1", TypeError, "seconds must be a number, got '1'"),
    ],
)
def test_autotune_refuses_wrong_arguments(lstm, shape, seconds, error, message):
    with pytest.raises(error, match=message):
        jaxlstm.autotune(lstm, shape, seconds=seconds)


def test_autotune_inside_of_jit_says_so():
    message = r"^jaxlstm\.autotune runs programs to time them: call it outside of jax\.jit"

    def double(x):
        jaxlstm.autotune(jaxlstm.LSTM(3, 5), SHAPE, seconds=0.1)
        return 2 * x

    for transformed in (jax.jit(double), jax.grad(jax.jit(double))):
        with pytest.raises(RuntimeError, match=message):
            transformed(1.0)


def test_autotune_in_float64_compares_in_float64():
    result = jaxlstm.autotune(jaxlstm.LSTM(3, 5, param_dtype=jnp.float64), (6, 3), training=False, seconds=0.01)
    assert result.table[0].error < 1e-14
    with jax.enable_x64(False), pytest.raises(ValueError, match="param_dtype is float64, which needs"):
        jaxlstm.autotune(jaxlstm.LSTM(3, 5, param_dtype=jnp.float64), (6, 3), seconds=0.01)


# A cell of this module.


def halved(f, g, c):
    return 0.5 * c + f * g


def shown(c):
    return c


HALVED = jaxlstm.Cell({"f": sigmoid, "g": None}, shown, halved, input_gate="f", peepholes=("f",))


def saved(lstm, **entries):
    """A result with the given network."""
    table = (tuning.Trial("scan", 0.5, 3, 0.0, True, "chosen"), tuning.Trial("pallas", note="refused"))
    values = {"xs_shape": SHAPE, "training": True, "device": tuning.device_name(), "jax_version": jax.__version__}
    return jaxlstm.Tuning(lstm, table, **values | entries)


@pytest.mark.parametrize(
    "lstm",
    [
        jaxlstm.LSTM(3, 5, implementation="scan", unroll=4),
        jaxlstm.LSTM(3, 5, implementation=FEATURE, dtype=jnp.bfloat16, proj_size=2, bidirectional=True, remat=3),
        jaxlstm.LSTM(3, 5, implementation=Scan(concatenate=True), cell="rnn", activation="relu", zoneout_h=0.5),
        jaxlstm.LSTM(3, 5, implementation=Newton("diagonal", damping=0.1), forget_bias=2, layer_norm=False),
        jaxlstm.LSTM(3, 5, cell=HALVED, num_layers=2, param_dtype=jnp.float64),
    ],
)
def test_saved_choice_is_the_same_when_loaded(lstm, tmp_path):
    choice = saved(lstm)
    choice.save(tmp_path / "tuning.json")
    assert jaxlstm.load_tuning(str(tmp_path / "tuning.json")) == choice
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_loading_gives_no_warning_that_the_network_gave(tmp_path):
    with pytest.warns(UserWarning, match="dropout option"):
        lstm = jaxlstm.LSTM(3, 5, dropout=0.5)
    saved(lstm).save(tmp_path / "tuning.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jaxlstm.load_tuning(tmp_path / "tuning.json").lstm == lstm


def test_cell_or_backend_without_an_importable_name_is_not_saved(tmp_path):
    local = replace(HALVED, output=lambda c: c)
    with pytest.raises(ValueError, match=r"the cell's function .*<lambda> cannot be saved: expected one at the top"):
        saved(jaxlstm.LSTM(3, 5, cell=local)).save(tmp_path / "tuning.json")
    with pytest.raises(ValueError, match=r"forgetful.* cannot be saved; expected a name or one of Scan, Fused, Newton"):
        saved(jaxlstm.LSTM(3, 5, implementation=forgetful)).save(tmp_path / "tuning.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("device", "TPU v9"), ("jax_version", "0.1")])
def test_choice_of_another_device_or_version_is_not_loaded(tmp_path, name, value):
    saved(jaxlstm.LSTM(3, 5), **{name: value}).save(tmp_path / "tuning.json")
    expected = getattr(saved(jaxlstm.LSTM(3, 5)), name)
    message = re.escape(f"tuning.json: {name} is {value!r}, expected {expected!r}: the choice may not be the fastest ")
    with pytest.raises(ValueError, match=f"{message}here; jaxlstm.autotune finds it$"):
        jaxlstm.load_tuning(tmp_path / "tuning.json")


SAVED_CELL = {
    "gates": {"f": None, "g": None},
    "output": f"{__name__}:shown",
    "update": f"{__name__}:halved",
    "reads": {},
    "state": {"c": "0.0"},
    "recurrent": "dense",
    "affine": False,
    "forget_gate": None,
    "forget_bias": 1.0,
    "input_gate": None,
    "candidate": None,
    "peepholes": [],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": 3}, "table must be "),
        ({"extra": 1}, "has an unknown key 'extra'"),
        ({"lstm": {"input_size": 3}}, "has no key "),
        ({"table": [{"candidate": "scan"}]}, "has no key "),
        ({("lstm", "hidden_size"): 0}, "lstm: hidden_size must be at least 1, got 0"),
        ({("lstm", "hidden_size"): "5"}, "lstm: hidden_size must be int"),
        ({("lstm", "param_dtype"): "int99"}, "lstm: param_dtype must be a floating-point dtype"),
        ({("lstm", "implementation"): "fuse"}, "lstm: implementation must be one of "),
        ({("lstm", "implementation"): {"class": "Fuse", "options": {}}}, "lstm: implementation: class must be one of "),
        ({("lstm", "implementation"): {"class": "Scan", "options": {}}}, "options has no key 'concatenate'"),
        ({("lstm", "cell"): {"gates": "os:nothing"}}, "lstm: cell has no key "),
        ({("lstm", "cell"): SAVED_CELL | {"update": "os:nothing"}}, "lstm: module 'os' has no attr"),
        ({("lstm", "cell"): SAVED_CELL | {"output": "nowhere:f"}}, "lstm: No module named 'nowhere'"),
        ({("lstm", "cell"): SAVED_CELL | {"gates": {"f": 1}}}, "lstm: cell: gates"),
        ({("lstm", "cell"): SAVED_CELL | {"forget_gate": "z"}}, "forget_gate of the cell must be one of its gates "),
    ],
)
def test_damaged_file_gives_one_line(tmp_path, change, message):
    path = tmp_path / "tuning.json"
    saved(jaxlstm.LSTM(3, 5)).save(path)
    values = json.loads(path.read_text())
    del values["sha256"]
    for name, value in change.items():
        if isinstance(name, tuple):
            values[name[0]][name[1]] = value
        else:
            values[name] = value
    checksum.write_checked_json(path, values)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}") as raised:
        jaxlstm.load_tuning(path)
    assert "\n" not in str(raised.value)


def test_changed_or_missing_file_is_not_loaded(tmp_path):
    path = tmp_path / "tuning.json"
    saved(jaxlstm.LSTM(3, 5)).save(path)
    path.write_bytes(path.read_bytes().replace(b'"unroll": 1', b'"unroll": 2'))
    with pytest.raises(ValueError, match="is damaged: its contents differ"):
        jaxlstm.load_tuning(path)
    with pytest.raises(OSError, match=r"none\.json"):
        jaxlstm.load_tuning(tmp_path / "none.json")


def test_options_of_backends_are_checked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the test suite's own check of types comes first
    with pytest.raises(ValueError, match="order must be one of 'batch', 'feature'; got 'rows'"):
        Fused(order="rows")
    with pytest.raises(TypeError, match="hoist_inputs must be True or False, got 1"):
        Fused(hoist_inputs=1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Fused(chunk_size=0)
    with pytest.raises(TypeError, match="concatenate must be True or False, got 'yes'"):
        Scan(concatenate="yes")
    assert repr(Fused()) == "Fused()"
    assert repr(Fused(chunk_size=3)) == "Fused(chunk_size=3)"
    assert Fused(order="batch", chunk_size=np.int64(3)) == Fused("batch", None, 3)


def test_concatenated_scan_refuses_layer_normalization():
    lstm = jaxlstm.LSTM(3, 4, layer_norm=True, implementation=Scan(concatenate=True))
    with pytest.raises(ValueError, match=r"does not support layer_norm=True, .*; expected "):
        jax.eval_shape(lstm, lstm.param_shapes(), jax.ShapeDtypeStruct(SHAPE, jnp.float32))


def test_tuning_program_draws_parameters_that_matter():
    lstm = jaxlstm.LSTM(3, 5, cell="peephole", layer_norm=True, learned_state=True, proj_size=2)
    args = tune._draw_args(lstm, SHAPE, training=True)
    lstm.check_params(args.params)
    assert all(jnp.all(a != 0) for a in jax.tree.leaves(args.params))
    assert args.key is None
