"""What `train.py` knows of a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax import Array

from jaxlstm.lstm import LSTM
from jaxlstm.params import State
from jaxlstm.training.train_step import Loss

OF_LANGUAGE = ("embedding", "tied", "embedding_dropout", "activation", "temporal_activation")  # options of some tasks
OF_SERIES = ("horizon", "season")


def nothing_to_show(params: Any, key: Array) -> str:
    """No text."""
    del params, key
    return ""


def nothing_to_test(params: Any) -> dict[str, float]:
    """No figures."""
    del params
    return {}


def nothing_to_draw(params: Any, folder: Path) -> None:
    """No picture."""


@dataclass(frozen=True)
class Task:
    """Data, model and measure; parameters are whatever pytree ``init`` makes."""

    about: str  # the data in a line; a resumed run must have the same
    title: str  # of the curves
    unit: str  # of the loss
    counted: str  # what speed is measured in, as in "characters"
    per_step: int  # how many of them a step takes in
    evaluated: int  # how many of them the validation data hold
    say: Callable[[float], str]  # a loss, with its unit
    init: Callable[[Array], Any]  # parameters from a PRNG key
    carry: Callable[[Any], Any]  # recurrent state before the first batch; None where nothing is carried
    batches: Callable[[int], Iterator[Any]]  # endless, from a position: the number of batches already taken
    loss: Loss
    lstm: LSTM  # the recurrent network, whose parameters are those of the model under ``lstm``
    reads: Callable[[Any, Any, Any], tuple[Array, State | None]]  # (params, carry, batch) -> its inputs and first state
    evaluate: Callable[[Any], dict[str, float]]  # figures on the validation data; the smaller "loss", the better
    show: Callable[[Any, Array], str] = nothing_to_show  # what the model makes, in lines, after each validation
    test: Callable[[Any], dict[str, float]] = nothing_to_test  # figures of the best parameters, once, at the end
    draw: Callable[[Any, Path], None] = nothing_to_draw  # pictures of the best parameters, into the folder of the run
    fingerprint: str = ""  # of the data, where they are read and not made; a resumed run must have the same
    kept: tuple[tuple[str, Any], ...] = ()  # what config.json needs besides the options
