"""Writes an interactive page about a traced network: units over time, predictions, and gradients through time."""

import base64
import html
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.diagnostics.gate_statistics import sigmoid_gates
from jaxlstm.diagnostics.trace import DirectionTrace, Trace, trace
from jaxlstm.json_types import matches
from jaxlstm.params import Params
from jaxlstm.rnn import RNN

MAX_BYTES = 5_000_000  # of a page
LEVELS = (254, 126, 62, 46, 38, 28, 22, 14)  # steps of the quantization, the first that fits; even: zero stays zero
GRADIENT_STEPS = 64  # gradients reach this far back
MAX_MOMENTS = 100  # of the training
NUM_QUANTILES = 5  # of gates and time constants, in the rows of a training
NUM_PREDICTIONS = 8  # most probable classes shown at each step
WEB_FILES = {  # parts of the page by their names in it
    "STYLE": "explorer.css",
    "SCRIPT": "explorer.js",
    "UPLOT": "uPlot.iife.min.js",
    "UPLOT_STYLE": "uPlot.min.css",
    "UPLOT_LICENSE": "uPlot.LICENSE",
}
NAMES = {
    "i": "input gate i",
    "f": "forget gate f",
    "g": "candidate g",
    "o": "output gate o",
    "c": "cell state c",
    "h": "hidden state h",
}


def explore(
    lstm: RNN,
    params: Params,
    xs: Float[ArrayLike, "T I"],
    *,
    labels: Sequence[str] | None = None,
    layer: int = 0,
    logits: Callable[[Array], Array] | None = None,
    targets: Int[ArrayLike, " T"] | None = None,
    classes: Sequence[str] | None = None,
    properties: Mapping[str, Shaped[ArrayLike, " T"]] | None = None,
    title: str = "Explorer",
    training: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns an HTML page that shows the gates and states of one layer at every step.

    The page is one file without references to others; any current browser opens it. It has a heat map of all units,
    the labels shaded by a unit, and a search for the steps at which the units of a selected range are active again
    (Strobelt et al. 2018). Units are ordered by index, by the time constant -1 / mean(ln f), by their correlation with
    a property, or by clusters. Values are rounded to 255 levels, or to fewer (at least 15) if the page would exceed
    5 MB.

    With ``logits`` and ``targets`` it also shows the most probable classes, the loss of every step in nats, and the
    norm of its gradient with respect to the state (h and c of all layers) after each of the 64 steps before, as
    float16. A bidirectional network has no such gradient in its page; its backward units follow the forward ones.

    With ``training`` it plays back the gates, time constants and gradients of the layer over a run of `train.py`, at up
    to 100 of the recorded moments.

    Args:
      lstm: the network.
      params: from ``lstm.init``.
      xs: inputs of one sequence, with T at least 1.
      labels: T texts, for example the characters, or values to be shown as texts; the numbers of the steps by default.
      layer: the layer to show, from 0.
      logits: from outputs ``(T, D*P)`` to the logits ``(T, V)`` of a prediction at each step.
      targets: the class that each prediction is compared with.
      classes: V names of the classes; their numbers by default.
      properties: numbers per step that units may track, by name.
      title: title of the page.
      training: rows of ``diagnosis.jsonl`` in a run directory.

    Raises:
      ValueError, TypeError: as the call of the network does, and for batch axes, a layer that does not exist,
        ``logits`` without ``targets``, arrays of other lengths, values that are not finite, too many values, or rows
        of another network.
    """
    traced = trace(lstm, params, xs)
    if traced.step_mask.ndim != 1:
        raise ValueError(f"xs must be one sequence (T, I) without batch axes, got shape {list(np.shape(xs))}")
    layer = validation.index_below("layer", layer, lstm.num_layers)
    validation.instance("title", title, str, "a text")
    validation.instance("properties", properties or {}, Mapping, "a dict of numbers per step, by name")
    if (logits is None) != (targets is None):
        raise ValueError("logits and targets belong together: give both or neither")
    num_steps = len(traced.ys)
    texts = _texts("labels", range(num_steps) if labels is None else labels)
    _check_length("labels", texts, num_steps, "step of xs")
    units = _unit_values(traced, layer)
    header: dict[str, Any] = {"title": title, "layer": layer, "labels": texts}
    header["values"] = {name: NAMES.get(name, name) for name in units}
    arrays = {"clusters": cluster_order(units["c" if "c" in units else [*units][-1]])}
    if traced.cell.forget_gate in set(units) & set(sigmoid_gates(traced.cell)):
        arrays["timeConstants"] = _time_constants(units[traced.cell.forget_gate])
    for name, values in (properties or {}).items():
        try:
            arrays[f"property {name}"] = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise TypeError(f"property {name!r} must be numbers, got {validation.describe(values)}") from None
        _check_length(name, arrays[f"property {name}"], num_steps, "step of xs")
    if logits is not None:
        targets = np.asarray(validation.array("targets", targets, jnp.integer))
        _check_length("targets", targets, num_steps, "step of xs")
        if not callable(logits):
            raise TypeError(
                f"logits must be a function from outputs (T, D*P) to logits (T, V), got {validation.describe(logits)}"
            )
        scores = logits(traced.ys)
        if np.ndim(scores) != 2 or len(scores) != num_steps:
            raise ValueError(f"logits must return (T, V) with T={num_steps}, got shape {list(np.shape(scores))}")
        log_probabilities = np.asarray(jax.nn.log_softmax(scores), np.float32)
        num_classes = log_probabilities.shape[-1]
        if not 0 <= targets.min() <= targets.max() < num_classes:
            raise ValueError(f"targets must be 0 to {num_classes - 1}, got {targets.min()} to {targets.max()}")
        header["classes"] = _texts("classes", range(num_classes) if classes is None else classes)
        _check_length("classes", header["classes"], num_classes, "logit")
        arrays |= _predictions(log_probabilities, targets)
        if not lstm.bidirectional:
            norms = loss_gradients(lstm, params, jnp.asarray(xs), jnp.asarray(targets), logits, GRADIENT_STEPS)
            largest = np.asarray(norms).max(1, keepdims=True)
            arrays["gradientScale"] = largest[:, 0]
            arrays["gradients"] = (np.asarray(norms) / np.where(largest > 0, largest, 1)).astype(np.float16)
    if training:
        header["training"] = _playback(lstm, training, layer)
    for name, values in (units | arrays).items():
        if name != "timeConstants" and not np.isfinite(values).all():  # a unit that never forgets is infinite
            raise ValueError(f"the page needs finite numbers, but {name} has values that are not")
    for levels in LEVELS:
        page = _page(header | {"levels": levels}, _quantize(traced.cell, units, levels) | arrays)
        if len(page.encode()) <= MAX_BYTES:
            return page
    size = f"{num_steps} steps of {len(arrays['clusters'])} units"
    raise ValueError(f"a page holds {MAX_BYTES:,} bytes, too few for {size}; give fewer steps")


def _check_length(name: str, values: Any, expected: int, what: str) -> None:
    if len(values) != expected or np.ndim(values) != 1:
        raise ValueError(f"{name} must have one entry per {what}, {expected}, got shape {list(np.shape(values))}")


def _texts(name: str, values: Any) -> list[str]:
    """Returns values as texts that UTF-8 can encode."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of texts, got {validation.describe(values)}")
    return [str(value).encode("utf-8", "replace").decode("utf-8") for value in values]


def _unit_values(traced: Trace, layer: int) -> dict[str, np.ndarray]:
    """Returns gates, cell states and outputs of a layer by name, ``(T, D*H)`` each."""

    def by_name(values: DirectionTrace) -> dict[str, Array]:
        # A projected h has no value per unit.
        h = {"h": values.h} if values.h.shape == values.cell_output.shape else {"output": values.cell_output}
        return values.gates | traced.cell.states_by_name(values.c) | h

    directions = [by_name(values) for values in traced.layers[layer].directions]
    return {
        name: np.concatenate([np.asarray(each[name], np.float32) for each in directions], 1) for name in directions[0]
    }


def _time_constants(f: np.ndarray) -> np.ndarray:
    """Returns -1 / mean(ln f) of each unit, the steps in which c decays to 1/e on average; infinite if f stays 1."""
    with np.errstate(divide="ignore"):
        return (1 / -np.log(np.maximum(f, np.finfo(np.float32).tiny)).mean(0, dtype=np.float64)).astype(np.float32)


def cluster_order(values: Shaped[np.ndarray, "T H"]) -> np.ndarray:
    """Returns the units in the order of their clusters: average linkage by the magnitude of Pearson's correlation."""
    centered = values - values.mean(0, dtype=np.float64)
    norms = np.linalg.norm(centered, axis=0)
    centered /= np.where(norms > 0, norms, 1)
    similarity = np.abs(centered.T @ centered)
    np.fill_diagonal(similarity, -1)
    members = [[n] for n in range(len(similarity))]
    for _ in range(len(members) - 1):
        a, b = sorted(map(int, np.unravel_index(similarity.argmax(), similarity.shape)))
        sizes = len(members[a]), len(members[b])
        merged = np.average(similarity[[a, b]], axis=0, weights=sizes)
        merged[similarity[a] == -2] = -2
        similarity[a] = similarity[:, a] = merged
        similarity[a, a] = -1
        similarity[b] = similarity[:, b] = -2  # merged into a
        members[a] += members[b]
    return np.array(members[0], np.uint16)


def _predictions(log_probabilities: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the most probable classes of each step, their probabilities, the targets and their surprise in nats."""
    surprise = -np.take_along_axis(log_probabilities, targets[:, None], -1)[:, 0]
    top = np.argsort(-log_probabilities, axis=-1, kind="stable")[:, :NUM_PREDICTIONS]
    return {
        "targets": targets.astype(np.uint32),
        "surprise": surprise,
        "topClasses": top.astype(np.uint32),
        "topProbabilities": np.exp(np.take_along_axis(log_probabilities, top, -1)).astype(np.float16),
    }


@partial(jax.jit, static_argnames=("lstm", "logits", "num_steps"))
def loss_gradients(
    lstm: RNN,
    params: Params,
    xs: Float[Array, "T I"],
    targets: Int[Array, " T"],
    logits: Callable[[Array], Array],
    num_steps: int,
) -> Float[Array, "T K"]:
    """Computes norms of the gradient of every step's cross-entropy with respect to the states before it.

    All steps are one batch: a backward pass through one step propagates the gradients of all losses by one step, so
    that K passes give all numbers.

    Args:
      lstm: the network, in one direction.
      params: its parameters.
      xs: inputs.
      targets: classes.
      logits: from outputs ``(T, P)`` to logits ``(T, V)``.
      num_steps: K.

    Returns:
      At ``[t, k]`` the Euclidean norm of the gradient of the loss of step t with respect to the state of all layers
      after step t-1-k; zero if t-1-k is negative.
    """

    def run_step(state: Any, x: Array) -> tuple[Any, Any]:
        return lstm.step(params, state, x)[0], state

    def run_steps(states: Any) -> tuple[Any, Array]:
        new_states, ys = lstm.step(params, states, xs)
        log_probabilities = jax.nn.log_softmax(logits(ys))
        return new_states, -jnp.take_along_axis(log_probabilities, targets[:, None], -1)[:, 0]

    states = lax.scan(run_step, lstm.initial_state((), params), xs)[1]
    states = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), states)  # before each step, as a batch: (L, T, units)
    (_, losses), vjp = jax.vjp(run_steps, states)

    def norm(gradient: Any) -> Array:
        return jnp.sqrt(sum(jnp.square(a).sum((0, -1)) for a in jax.tree.leaves(gradient)))

    def step_back(gradient: Any, _: None) -> tuple[Any, Array]:
        """From the states before each step to the states before the step before it, for losses k steps later."""
        later = jax.tree.map(lambda a: jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], 1), gradient)
        return vjp((later, jnp.zeros_like(losses)))[0], norm(gradient)

    first = vjp((jax.tree.map(jnp.zeros_like, states), jnp.ones_like(losses)))[0]
    norms = lax.scan(step_back, first, length=num_steps)[1]  # (K, T), at [k, s] of the loss of step s + k
    steps, back = jnp.arange(len(xs))[:, None], jnp.arange(num_steps)[None]
    return jnp.where(steps - back > 0, norms[back, steps - back], 0)  # the state before step s is the one after s - 1


def _playback(lstm: RNN, rows: Sequence[Mapping[str, Any]], layer: int) -> dict[str, Any]:
    """Returns what the page shows of the rows of ``diagnosis.jsonl``: one layer, with four digits."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_MOMENTS)).round().astype(int))
    moments = []
    for row in (rows[n] for n in chosen):
        if not _describes(row, lstm):
            raise ValueError(
                f"the row of step {row.get('step')} of diagnosis.jsonl does not describe {lstm}; remove it or give "
                "the network of the run"
            )
        moments.append({"step": row["step"], "layer": _round(row["layers"][layer])})
    return {"steps": rows[0]["steps"], "rows": moments}


def _describes(row: Mapping[str, Any], lstm: RNN) -> bool:
    """Returns whether a row of ``diagnosis.jsonl`` has the entries, layers, directions and gates of a network."""
    layers, steps = row.get("layers"), row.get("steps")
    sides = {"forward", "backward"} if lstm.bidirectional else {"forward"}
    return (
        matches(row.get("step"), int)
        and isinstance(steps, list)
        and matches(steps, list[int])
        and isinstance(layers, list)
        and len(layers) == lstm.num_layers
        and all(isinstance(layer, dict) and layer.keys() == sides for layer in layers)
        and all(_describes_side(side, lstm, len(steps)) for layer in layers for side in layer.values())
    )


def _describes_side(side: Any, lstm: RNN, num_steps: int) -> bool:
    """Returns whether one direction of a layer has the entries that the page draws."""
    if not isinstance(side, dict) or not matches(side.get("gates"), dict[str, dict[str, Any]]):
        return False
    cell, gates, constants = lstm.resolved_cell, side["gates"], side.get("time_constants")
    return (
        gates.keys() <= set(sigmoid_gates(cell))
        and all(_is_numbers(gate.get("quantiles"), NUM_QUANTILES) for gate in gates.values())
        and all(_is_numbers([gate.get("shut"), gate.get("open")], 2) for gate in gates.values())
        and (constants is None if cell.forget_gate not in gates else _is_numbers(constants, NUM_QUANTILES))
        and _is_numbers([side.get("dead")], 1)
        and all(_is_numbers(side.get(name), num_steps) for name in ("gradient", "elementwise"))
    )


def _is_numbers(values: Any, length: int) -> bool:
    """Returns whether values from JSON are so many numbers, None in place of those that were not finite."""
    return (
        matches(values, list[float | None]) and len(values) == length and all(v is None or isfinite(v) for v in values)
    )


def _round(value: Any) -> Any:
    """Returns a JSON value whose floating-point numbers have four digits."""
    if isinstance(value, Mapping):
        return {name: _round(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_round(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _quantize(cell: Cell, units: Mapping[str, np.ndarray], levels: int) -> dict[str, np.ndarray]:
    """Returns integers from 0 to ``levels`` by name, ``(H, T)``, and scales by ``scale NAME``, ``(H,)``.

    Time is the last axis, since the values of one unit resemble each other and compress better side by side. Gates
    between 0 and 1 are ``integer / levels``, other values ``(2 * integer / levels - 1) * scale``.
    """
    result = {}
    for name, values in units.items():
        if name in sigmoid_gates(cell):
            result[name] = np.rint(values.T * levels).astype(np.uint8)
            continue
        scale = np.abs(values).max(0)
        result[f"scale {name}"] = scale
        result[name] = np.rint((values / np.where(scale > 0, scale, 1) + 1).T / 2 * levels).astype(np.uint8)
    return result


def _page(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the page: code, style, header and the compressed arrays in one file."""
    described = {name: [a.dtype.name, a.shape] for name, a in arrays.items()}
    header_text = json.dumps({**header, "arrays": described}, ensure_ascii=False, allow_nan=False)
    content = b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays.values())
    parts = {
        "TITLE": html.escape(header["title"]),
        "HEADER": header_text.replace("<", "\\u003c"),
        "ARRAYS": base64.b64encode(zlib.compress(content)).decode(),
    }
    web = resources.files("jaxlstm.diagnostics").joinpath("web")
    page = web.joinpath("explorer.html").read_text(encoding="utf-8")
    for name, file in WEB_FILES.items():
        parts[name] = web.joinpath(file).read_text(encoding="utf-8")
    before, *rest = page.split("{{")  # each piece begins with a name
    pieces = (piece.split("}}", 1) for piece in rest)
    return before + "".join(parts[name] + after for name, after in pieces)
