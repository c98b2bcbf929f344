"""The candidates of a search: backends, layouts of the fused backend, and steps per iteration of the loop."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import astuple
from typing import NamedTuple

import jax

from jaxlstm.recurrence.backends import EXPERIMENTAL, OPTION_CLASSES, Implementation, load
from jaxlstm.recurrence.fused import Fused
from jaxlstm.recurrence.layout import ORDERS, LayerSizes, choose_layout
from jaxlstm.recurrence.scan import Scan
from jaxlstm.recurrence.selection import TENSOR_PARALLEL, default_backend
from jaxlstm.recurrence.step import unsupported_form
from jaxlstm.rnn import RNN

CHUNK_SIZES = (8, 16, 32, 64)  # the range of the measured rules in `jaxlstm.recurrence.layout`
UNROLLS = (1, 2, 4)  # steps per iteration; more multiply the time of compilation


class Candidate(NamedTuple):
    """A backend with its options, and the number of steps per iteration."""

    implementation: Implementation
    unroll: int

    def __str__(self) -> str:
        """Shows the options as they are given to `jaxlstm.LSTM`."""
        name = self.implementation if isinstance(self.implementation, str) else repr(self.implementation)
        return name if self.unroll == 1 else f"{name}, unroll={self.unroll}"

    def num_changes(self, other: "Candidate") -> float:
        """Returns the number of options in which two candidates of one backend differ; infinity for two backends."""
        mine, others = _options(self), _options(other)
        if len(mine) != len(others) or mine[0] != others[0]:
            return math.inf
        return sum(a != b for a, b in zip(mine, others))


def _options(candidate: Candidate) -> tuple:
    """Returns the backend, its options and the steps per iteration."""
    implementation = candidate.implementation
    if isinstance(implementation, Fused | Scan):
        return (type(implementation), *astuple(implementation), candidate.unroll)
    return (implementation, candidate.unroll)


class Candidates(NamedTuple):
    """The candidates of a network, in the order in which they are tried.

    After the seeds, the order is by the times of similar candidates; see `jaxlstm.autotuning.search`.
    """

    always: tuple[Candidate, ...]  # tried however short the time is: the default, first, and the reference
    seeds: tuple[Candidate, ...]  # one of each kind
    others: tuple[Candidate, ...]
    excluded: dict[str, str]  # by name of the backend: why it is no candidate


def list_candidates(lstm: RNN, xs_shape: tuple[int, ...], *, training: bool, experimental: bool) -> Candidates:
    """Returns the candidates of a network, each with a program of its own.

    Args:
      lstm: the network.
      xs_shape: ``(T, *batch, I)``.
      training: whether derivatives are computed: the steps per chunk matter then.
      experimental: whether the experimental backends are candidates.
    """
    platform = jax.default_backend()
    layouts, fused_options = _fused_options(lstm, xs_shape, training=training)
    name = default_backend(platform)
    default: Implementation = layouts[0] if name == "fused" else name
    own: list[Implementation] = [] if lstm.implementation in (None, name) else [lstm.implementation]
    concatenated = [Scan(concatenate=True)] if platform == "cpu" and not lstm.layer_norm else []
    kernels: list[Implementation] = ["cudnn"] if platform == "cpu" else ["pallas", "cudnn"]
    parallel: list[Implementation] = ["associative"]
    newton: list[Implementation] = ["newton", load(OPTION_CLASSES["Newton"])(mode="diagonal")]
    excluded = {"tensor_parallel": TENSOR_PARALLEL}
    if platform == "cpu":
        excluded["pallas"] = "a kernel for TPUs and Hopper GPUs, which only an interpreter runs on a CPU"
    if platform == "cpu" and lstm.layer_norm:
        excluded[str(Scan(concatenate=True))] = "not with layer normalization"
    if not experimental:
        excluded |= dict.fromkeys(EXPERIMENTAL, "experimental")
        kernels, newton, parallel = [], [], []
    early: list[Implementation] = [*kernels, *([] if platform == "cpu" else newton), *parallel]
    late: list[Implementation] = newton if platform == "cpu" else []  # slower on every CPU measured
    unrolled: list[Implementation] = [*fused_options, "scan", *concatenated]
    if platform == "tpu" and experimental:
        unrolled.append("pallas")  # its kernel takes several steps at once, too
    unrolls = _distinct_up_to(_chunk_steps(lstm, xs_shape), (lstm.unroll, *UNROLLS))
    first: list[Implementation] = [default, *own, "scan"]
    kinds: list[Implementation] = [*early, *concatenated, *layouts]
    always, seeds, others = _without_repetition(
        [Candidate(each, lstm.unroll) for each in first],
        [Candidate(each, lstm.unroll) for each in kinds],
        [
            *itertools.starmap(Candidate, itertools.product(unrolled, unrolls)),
            *(Candidate(e, lstm.unroll) for e in late),
        ],
    )
    return Candidates(always, seeds, others, excluded)


def _fused_options(lstm: RNN, xs_shape: tuple[int, ...], *, training: bool) -> tuple[list[Fused], list[Fused]]:
    """Returns the fused backend in each layout, first the default one, and with all options."""
    sizes = LayerSizes(math.prod(xs_shape[1:-1]), lstm.input_size, lstm.hidden_size)
    cell = lstm.resolved_cell
    is_hoisted = lstm.num_heads > 1 or cell.recurrent != "dense" or not cell.slabs_reading("h")
    layout = choose_layout(
        sizes,
        lstm.output_dtype,
        lstm.state_dtype,
        may_project_first=not is_hoisted and unsupported_form(cell) is None,
        layer_norm=lstm.layer_norm,
    )
    orders = _distinct((layout.order, *ORDERS))
    hoisting = (True,) if is_hoisted else (layout.hoist_inputs, not layout.hoist_inputs)  # otherwise it refuses
    chunk_sizes = (layout.chunk_size, *CHUNK_SIZES) if training else (layout.chunk_size,)
    chunk_sizes = _distinct_up_to(_chunk_steps(lstm, xs_shape), chunk_sizes)
    layouts = [Fused(*each, layout.chunk_size) for each in itertools.product(orders, hoisting)]
    return layouts, [Fused(*each) for each in itertools.product(orders, hoisting, chunk_sizes)]


def _chunk_steps(lstm: RNN, xs_shape: tuple[int, ...]) -> int:
    """Returns the number of steps of a loop."""
    return xs_shape[0] if lstm.remat is None else min(xs_shape[0], lstm.remat)


def _distinct(values: Iterable) -> tuple:
    """Returns the values without repetition, in their order."""
    return tuple(dict.fromkeys(values))


def _distinct_up_to(limit: int, sizes: Iterable[int]) -> tuple[int, ...]:
    """Returns sizes that differ below a limit; all sizes of at least the limit have the same effect."""
    distinct: dict[int, int] = {}
    for size in sizes:
        distinct.setdefault(min(size, limit), size)
    return tuple(distinct.values())


def _without_repetition(*groups: Iterable[Candidate]) -> list[tuple[Candidate, ...]]:
    """Removes from each group the candidates of the groups before it."""
    seen: dict[Candidate, None] = {}
    result = []
    for group in groups:
        new = tuple(each for each in _distinct(group) if each not in seen)
        seen |= dict.fromkeys(new)
        result.append(new)
    return result
