"""The search for the fastest candidate within a number of seconds.

Screening: candidates are compiled, checked against the reference and run, one after the other. The default, the
reference and one candidate of each kind come first; then always the candidate most similar to the fastest one so far.
Most of the time of a search is compilation, so the order decides which ones are reached. Screening ends when one more
candidate would leave too little time for the comparison. A backend of which nothing is known is tried in the first half
of the time only: on a CPU, one run of a parallel-in-time solver may take seconds.

Successive halving (Jamieson & Talwalkar 2016): the remaining candidates run in interleaved rounds whose order rotates;
then the slower half is dropped and the number of rounds doubles. The default is never dropped, so that the last
comparison is between it and its fastest rival.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxlstm.autotuning.candidates import Candidate, Candidates
from jaxlstm.autotuning.tuning import Trial
from jaxlstm.errors import first_line

COMPARISON = 0.3  # largest share of the seconds that is kept for the comparison
# A candidate is not run again if its first run takes more than
MUCH_SLOWER = 4.0  # times the fastest one, and
LONG = 0.05  # times the seconds of the search.
NOISE = 0.02  # a rival must be faster than the default by more than this
FEWEST_RUNS = 3  # of a rival that may be chosen instead of the default
ENOUGH_RUNS = 64  # of each of the last two candidates

Compile = Callable[[Candidate], Callable[[], Any]]  # returns a function that computes the results and waits for them


class SearchResult(NamedTuple):
    """Outcome of a search."""

    chosen: Candidate
    trials: tuple[Trial, ...]  # the chosen candidate, then by time, then without a time


@dataclass
class _Entry:
    """A candidate that runs and agrees with the reference."""

    candidate: Candidate
    run: Callable[[], Any]
    error: float
    times: list[float] = field(default_factory=list)  # seconds
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median_low(self.times)  # of two runs the faster: the other may have been disturbed


def search(
    candidates: Candidates,
    compile_candidate: Compile,
    error_of: Callable[[Any], float],
    *,
    tolerance: float,
    seconds: float,
    start: float,
    clock: Callable[[], float],
) -> SearchResult:
    """Finds the fastest candidate.

    Args:
      candidates: the candidates.
      compile_candidate: compiles a candidate; its errors are reported in the result.
      error_of: returns the error of a candidate's results.
      tolerance: largest error of a candidate that may be chosen.
      seconds: seconds for the search; only those in ``candidates.always`` are compiled and run once they are over.
      start: time at which the search began.
      clock: returns the time in seconds.

    Raises:
      RuntimeError: if no candidate gives results within the tolerance; the message has the reasons.
    """
    default = candidates.always[0]
    entries: list[_Entry] = []
    failures: list[Trial] = []
    waiting = [*candidates.always, *candidates.seeds, *candidates.others]
    num_first = len(candidates.always) + len(candidates.seeds)
    longest = 0.0  # seconds that one candidate took
    for n in range(len(waiting)):
        now = clock()
        is_late = now + longest + _comparison_seconds(entries, seconds) >= start + seconds
        if n >= len(candidates.always) and is_late:
            break
        index = 0 if n < num_first else _most_promising(waiting, entries)
        if n >= num_first and now >= start + seconds / 2 and _time_of_similar(waiting[index], entries) == math.inf:
            break
        candidate = waiting.pop(index)
        limit = max(MUCH_SLOWER * _fastest(entries), LONG * seconds)
        outcome = _screen(candidate, compile_candidate, error_of, tolerance, limit, clock)
        if isinstance(outcome, _Entry):
            entries.append(outcome)
        else:
            failures.append(replace(outcome, is_default=candidate == default))
        longest = max(longest, clock() - now)
    if not entries:
        raise RuntimeError(f"no candidate can be chosen: {'; '.join(f'{t.candidate}: {t.note}' for t in failures)}")
    # The last candidate may have taken longer than expected; the comparison is made nevertheless.
    deadline = max(start + seconds, clock() + _comparison_seconds(entries, seconds))
    chosen = _halve([e for e in entries if not e.note] or entries, default, deadline, clock)
    not_tried = [Trial(str(candidate), note="not tried: out of time") for candidate in waiting]
    excluded = [Trial(name, note=f"not a candidate: {why}") for name, why in candidates.excluded.items()]
    timed = sorted(entries, key=lambda entry: (entry is not chosen, entry.median))
    trials = [_timed_trial(entry, chosen, default) for entry in timed]
    return SearchResult(chosen.candidate, (*trials, *failures, *excluded, *not_tried))


def _screen(
    candidate: Candidate,
    compile_candidate: Compile,
    error_of: Callable[[Any], float],
    tolerance: float,
    limit: float,
    clock: Callable[[], float],
) -> _Entry | Trial:
    """Compiles, checks and runs a candidate; returns it with one time, or the reason why it cannot be chosen.

    The first run, which also allocates memory and starts threads, is timed only if it takes longer than ``limit``.
    """
    try:
        run = compile_candidate(candidate)
        first_start = clock()
        result = run()
        first = clock() - first_start
        error = error_of(result)
        if not error <= tolerance:
            note = f"wrong: differs from 'scan' by more than the tolerance {tolerance:.1e}"
            return Trial(str(candidate), error=error, note=note)
        entry = _Entry(candidate, run, error)
        if first > limit:
            entry.times, entry.note = [first], "much slower: run once"
        else:
            entry.times = [_time(run, clock)]
    except ValueError as refusal:  # as `jaxlstm.recurrence.explain` finds it
        return Trial(str(candidate), note=f"refused: {first_line(refusal)}")
    except Exception as failure:  # of a compiler or an allocation
        return Trial(str(candidate), note=f"failed: {type(failure).__name__}: {first_line(failure)}")
    return entry


def _time(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    result = run()
    seconds = clock() - start
    del result  # outside the timed region
    return seconds


def _fastest(entries: Sequence[_Entry]) -> float:
    return min((entry.median for entry in entries), default=math.inf)


def _comparison_seconds(entries: Sequence[_Entry], seconds: float) -> float:
    """Returns the time to keep for the comparison: little if the programs are short."""
    return min(COMPARISON * seconds, 4 * ENOUGH_RUNS * _fastest(entries))


def _most_promising(waiting: Sequence[Candidate], entries: Sequence[_Entry]) -> int:
    """Returns the index of the candidate that differs in one option from the fastest possible one that was tried."""
    return min(range(len(waiting)), key=lambda n: _time_of_similar(waiting[n], entries))


def _time_of_similar(candidate: Candidate, entries: Sequence[_Entry]) -> float:
    """Returns the time of the fastest entry that differs in one option; infinity without one."""
    return _fastest([entry for entry in entries if entry.candidate.num_changes(candidate) == 1])


def _halve(entries: list[_Entry], default: Candidate, deadline: float, clock: Callable[[], float]) -> _Entry:
    """Returns the fastest entry by successive halving; the default if nothing is faster by more than noise."""
    base = next((entry for entry in entries if entry.candidate == default), None)
    rivals = [entry for entry in entries if entry is not base]
    num_rounds = 1
    while True:
        remaining = rivals if base is None else [base, *rivals]
        if len(remaining) == 1 or not _run_rounds(remaining, num_rounds, deadline, clock):
            break
        rivals.sort(key=lambda entry: entry.median)
        rivals = rivals[: (len(rivals) + 1) // 2]
        if len(rivals) == 1 and len(rivals[0].times) >= ENOUGH_RUNS:
            break
        num_rounds *= 2
    if base is None:
        return min(remaining, key=lambda entry: entry.median)
    compared = [entry for entry in remaining if len(entry.times) >= FEWEST_RUNS]
    fastest = min(compared, key=lambda entry: entry.median, default=base)
    return fastest if fastest.median < (1 - NOISE) * base.median else base


def _run_rounds(entries: Sequence[_Entry], num_rounds: int, deadline: float, clock: Callable[[], float]) -> bool:
    """Times every entry once per round; returns False as soon as the time is over."""
    for n in range(num_rounds):
        rotation = n % len(entries)
        order = [*entries[rotation:], *entries[:rotation]]
        for entry in order[::-1] if n % 2 else order:
            if clock() >= deadline:
                return False
            entry.times.append(_time(entry.run, clock))
    return True


def _timed_trial(entry: _Entry, chosen: _Entry, default: Candidate) -> Trial:
    """Returns the row of an entry."""
    notes = ["chosen"] if entry is chosen else []
    if chosen.candidate == default and entry.median < chosen.median:
        few = len(entry.times) < FEWEST_RUNS
        notes.append("run too few times" if few else f"not faster than the default by more than {NOISE:.0%}")
    if entry.note:
        notes.append(entry.note)
    is_default = entry.candidate == default
    return Trial(str(entry.candidate), entry.median, len(entry.times), entry.error, is_default, "; ".join(notes))
