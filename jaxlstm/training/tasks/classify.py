"""Classification of sequences, or regression: one label for each text or each array of unequal length.

Labels that are floating-point numbers make it regression. Two thirds of the data are for training, a sixth for
validation, a sixth for the test, each class in the same shares. Without ``--data`` the sequences are lines of Python
code, and the label is the package that they are from.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlstm.atomic_write import atomic_write
from jaxlstm.diagnostics.plots import literal
from jaxlstm.errors import optional_package
from jaxlstm.json_types import check_entries
from jaxlstm.rnn import RNN
from jaxlstm.training.config import Options
from jaxlstm.training.data import labeled_sequences
from jaxlstm.training.data.labeled_sequences import LabeledSequences, Labels, PaddedBatch
from jaxlstm.training.data.text import CharVocabulary, DataError, fingerprint
from jaxlstm.training.data.time_axis import NUMBER
from jaxlstm.training.models.build import build_lstm
from jaxlstm.training.models.linear_baseline import linear_predictions
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks.task import LoadParams, Task, unused_options
from jaxlstm.training.train_step import Loss

DEFAULTS: dict[str, Any] = {
    "data": labeled_sequences.EMBEDDED,
    "hidden": 64,
    "embedding": 32,
    "bidirectional": True,
    "pooling": "max",
    "dropout": 0.3,
    "window": 128,
    "batch": 64,
    "learning_rate": 6e-3,
    "max_steps": 2000,
    "valid_every": 250,
}
UNUSED = unused_options("data", "window", "embedding", "classification")
SCALING_TYPES: dict[str, Any] = dict.fromkeys(("input_mean", "input_std", "target_mean", "target_std"), list[float])
MIN_EXAMPLES = 6  # one in six is for the test
MAX_WRITTEN = 16  # classes of a confusion matrix with numbers in its cells
MAX_NAMED = 60  # classes of a confusion matrix with names


@dataclass(frozen=True)
class Encoding:
    """Maps sequences and labels to arrays, and outputs of the model to labels; saved in ``config.json``.

    Args:
      classes: names of the classes, K of them; empty for regression.
      vocabulary: characters that have an id from 1 on, in the order of their code points; empty for arrays.
      scaling: ``input_mean`` and ``input_std`` of each feature, ``target_mean`` and ``target_std``.
    """

    classes: tuple[str, ...]
    vocabulary: str
    scaling: Mapping[str, Sequence[float]]

    @classmethod
    def fit(cls, data: LabeledSequences, train: np.ndarray) -> "Encoding":
        """Returns the encoding that the training part of the data gives: the examples with these indices."""
        sequences = [data.sequences[n] for n in train]
        vocabulary, mean, std = "", np.zeros(0), np.ones(0)
        if data.is_text:
            counts = Counter(itertools.chain.from_iterable(str(text) for text in sequences))
            vocabulary = "".join(sorted(character for character, n in counts.items() if n > 1))
        else:
            steps = np.concatenate([np.asarray(array, np.float64) for array in sequences])
            mean, std = steps.mean(0), np.where(steps.std(0) > 0, steps.std(0), 1)
        if isinstance(data.labels, np.ndarray):
            classes, numbers = (), data.labels[train]
        else:
            classes, numbers = tuple(sorted(set(data.labels or ()))), np.array([-1.0, 1.0])  # not scaled
        scaling = {
            "input_mean": mean,
            "input_std": std,
            "target_mean": numbers.mean(keepdims=True),
            "target_std": np.where(numbers.std(keepdims=True) > 0, numbers.std(keepdims=True), 1),
        }
        return cls(classes, vocabulary, {name: values.tolist() for name, values in scaling.items()})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Encoding":
        """Returns the encoding of a run, from its ``config.json``.

        Raises:
          ValueError: if the entries do not fit together.
        """
        scaling = config["scaling"]
        check_entries(scaling, SCALING_TYPES, "config.json: scaling")
        if config["vocabulary"]:
            CharVocabulary(config["vocabulary"])  # raises an error for characters in another order
        sizes = {name: len(values) for name, values in scaling.items()}
        if sizes["input_mean"] != sizes["input_std"] or sizes["target_mean"] != 1 or sizes["target_std"] != 1:
            raise ValueError(f"config.json: scaling has lists of other lengths than expected, got {sizes}")
        return cls(tuple(config["classes"]), config["vocabulary"], scaling)

    @property
    def num_features(self) -> int | None:
        """Number of features of a step; None for texts."""
        return len(self.scaling["input_mean"]) or None

    def sequences(self, data: LabeledSequences) -> list[np.ndarray]:
        """Returns ids of characters, int32 ``(length,)``, with 0 for unknown ones; or scaled arrays ``(length, F)``.

        Raises:
          DataError: if the data are of another kind.
        """
        if data.is_text:
            if self.num_features is not None:
                raise DataError(f"the data are texts, expected arrays of {self.num_features} features")
            known = np.array([ord(c) for c in self.vocabulary] or [0], np.uint32)
            arrays = []
            for text in data.sequences:
                points = np.frombuffer(str(text).encode("utf-32-le", "surrogatepass"), np.uint32)
                places = np.minimum(np.searchsorted(known, points), len(known) - 1)
                arrays.append(np.where(known[places] == points, places + 1, 0).astype(np.int32))
            return arrays
        found = np.shape(data.sequences[0])[1]
        if found != self.num_features:
            expected = "texts" if self.num_features is None else f"{self.num_features} features"
            raise DataError(f"the data are arrays of {found} features, expected {expected}")
        mean, std = (np.array(self.scaling[f"input_{name}"], np.float32) for name in ("mean", "std"))
        return [(np.asarray(array, np.float32) - mean) / std for array in data.sequences]

    def targets(self, labels: Labels) -> np.ndarray:
        """Returns classes, int32 ``(N,)``, or scaled numbers, float32 ``(N,)``."""
        if isinstance(labels, np.ndarray):
            return ((labels - self.scaling["target_mean"][0]) / self.scaling["target_std"][0]).astype(np.float32)
        index = {name: n for n, name in enumerate(self.classes)}
        return np.array([index[label] for label in labels], np.int32)

    def labels_as_trained(self, labels: Labels) -> np.ndarray:
        """Returns the labels of other data as names of classes ``(N,)``, or as numbers ``(N,)`` for regression.

        The form of a label depends on the others of its file: 1 is a name, and a number beside 2.5.

        Raises:
          DataError: for a label of a regression that is not a number.
        """
        if self.classes:
            if not isinstance(labels, np.ndarray):
                return np.array(labels)
            names = {float(name): name for name in self.classes if re.fullmatch(NUMBER, name, re.ASCII)}
            return np.array([names.get(number, f"{number:g}") for number in labels.tolist()])
        if wrong := [label for label in labels if not re.fullmatch(NUMBER, str(label), re.ASCII)]:
            raise DataError(f"the label {wrong[0]!r} is not a number, as the labels of the run are")
        return np.array([float(label) for label in labels])

    def unscale(self, outputs: np.ndarray) -> np.ndarray:
        """Returns predicted numbers ``(N,)`` in the units of the labels, from outputs ``(N, 1)``."""
        return outputs[:, 0] * self.scaling["target_std"][0] + self.scaling["target_mean"][0]


class Part(NamedTuple):
    """One part of the data."""

    sequences: list[np.ndarray]  # of the encoding
    targets: np.ndarray  # (N,)
    originals: list[Any]  # texts or arrays, of at most --window steps


def make(options: Options) -> Task:
    """Returns the task on the sequences of ``--data``.

    Raises:
      DataError: for data that cannot be read, are too few or have one label only.
    """
    import_sklearn()
    data = labeled_sequences.load_labeled(options.data)
    assert data.labels is not None
    check_labels(options.data, data.labels)
    indices = labeled_sequences.split_indices(data.labels)
    encoding = Encoding.fit(data, indices[0])
    sequences, targets = encoding.sequences(data), encoding.targets(data.labels)
    train, valid, test = (
        Part([sequences[n] for n in part], targets[part], [data.sequences[n][: options.window] for n in part])
        for part in indices
    )
    weights = class_weights(options, train.targets, len(encoding.classes))
    model = build_model(options, encoding)
    outputs = make_outputs(model, options)
    lengths = np.minimum([len(sequence) for sequence in train.sequences], options.window)
    batch_indices = labeled_sequences.bucketed_batches(lengths, options.batch, options.seed)

    def batches(start: int) -> Iterator[PaddedBatch]:
        for number in itertools.count(start):
            chosen = batch_indices(number)
            yield labeled_sequences.pad([train.sequences[n] for n in chosen], train.targets[chosen], options.window)

    def make_loss(lstm: RNN) -> Loss:
        def loss(params: Any, carry: None, batch: PaddedBatch, key: Array) -> tuple[Array, tuple[Array, None]]:
            predicted = replace(model, lstm=lstm)(params, batch.inputs, batch.lengths, key=key)
            if data.is_regression:
                value = ((predicted[:, 0] - batch.targets) ** 2).mean()
            else:
                nats = optax.softmax_cross_entropy_with_integer_labels(predicted, batch.targets)
                weight = jnp.asarray(weights, nats.dtype)[batch.targets]
                value = (weight * nats).sum() / weight.sum()
            return value, (value, carry)

        return loss

    def metrics(params: Any, part: Part) -> dict[str, float]:
        predicted = outputs(params, part.sequences)
        if data.is_regression:
            loss = float(((predicted[:, 0] - part.targets) ** 2).mean())
            return {"loss": loss} | errors(encoding.unscale(predicted), encoding.unscale(part.targets[:, None]))
        nats = -log_softmax(predicted)[np.arange(len(predicted)), part.targets]
        loss = float(np.average(nats, weights=weights[part.targets]))
        return {"loss": loss} | scores(part.targets, predicted.argmax(-1))

    def evaluate_test(params: Any, folder: Path) -> dict[str, float]:
        del folder
        model_figures = metrics(params, test)
        balanced = options.class_weights == "balanced"
        predicted = linear_predictions(train.originals, train.targets, test.originals, balanced=balanced)
        if data.is_regression:
            truth = encoding.unscale(test.targets[:, None])
            linear = errors(encoding.unscale(predicted[:, None]), truth)
            baseline = {"mean_rmse": errors(np.full(len(truth), encoding.scaling["target_mean"][0]), truth)["rmse"]}
        else:
            linear = scores(test.targets, predicted)
            majority = np.bincount(train.targets).argmax()
            baseline = {"majority_accuracy": float((test.targets == majority).mean())}
        figures = model_figures | {f"linear_{name}": value for name, value in linear.items()} | baseline
        return {f"test_{name}": value for name, value in figures.items()}

    def draw(params: Any, folder: Path) -> None:
        predicted = outputs(params, test.sequences)
        title = f"{Path(options.data).stem}: {len(test.targets):,} sequences of the test"
        if data.is_regression:
            truth = encoding.unscale(test.targets[:, None])
            draw_numbers(folder / "predictions.png", truth, encoding.unscale(predicted), title)
        else:
            draw_confusion(folder / "confusion.png", test.targets, predicted.argmax(-1), encoding.classes, title)

    unit = "squared error" if data.is_regression else "nats per sequence"
    longest = max(len(sequence) for sequence in sequences)
    return Task(
        description=f"{len(train.targets):,} sequences to train on, {len(valid.targets):,} to validate, "
        f"{len(test.targets):,} to test; {describe_labels(encoding, data.labels)}",
        title=f"{Path(options.data).stem}: LSTM",
        loss_unit=unit,
        unit_name="sequences",
        units_per_step=options.batch,
        validation_units=len(valid.targets),
        format_loss=lambda value: f"{value:.4f} {unit.removesuffix(' per sequence')}",
        init=model.init,
        batches=batches,
        make_loss=make_loss,
        lstm=model.lstm,
        lstm_inputs=lambda params, carry, batch: (model.embed(params, batch.inputs), None),
        evaluate=lambda params: metrics(params, valid),
        test=evaluate_test,
        draw=draw,
        notes=cut_notes(longest, options.window) + rare_notes(data.labels),
        fingerprint=fingerprint(*data.sequences, repr(np.asarray(data.labels).tolist())),
        extra_config={
            "classes": list(encoding.classes),
            "vocabulary": encoding.vocabulary,
            "scaling": dict(encoding.scaling),
        },
    )


def predict(
    options: Options,
    config: Mapping[str, Any],
    load_params: LoadParams,
    out: Path,
) -> str:
    """Writes one row per sequence: the label and the probability of each class, or the number.

    Args:
      options: options of the run, with the data to predict.
      config: the run's ``config.json``.
      load_params: returns the best parameters, given the function that initializes them.
      out: the CSV file to write.

    Returns:
      A line with the number of labels; if the data have labels, also the figures, and how many labels are no class of
      the run.

    Raises:
      DataError: for data that cannot be read or are of another kind.
    """
    import_sklearn()
    encoding = Encoding.from_config(config)
    data = labeled_sequences.load_labeled(options.data, needs_labels=False)
    model = build_model(options, encoding)
    try:
        truth = None if data.labels is None else encoding.labels_as_trained(data.labels)
        sequences = encoding.sequences(data)
    except DataError as error:
        raise DataError(f"{options.data}: {error}") from None
    predicted = make_outputs(model, options)(load_params(model.init), sequences)
    figures: dict[str, float] = {}
    note = ""
    if encoding.classes:
        names = np.array(encoding.classes)[predicted.argmax(-1)]
        probabilities = np.exp(log_softmax(predicted))
        header = ["label", *(f"p_{name}" for name in encoding.classes)]
        rows = [[name, *(f"{p:.4g}" for p in row)] for name, row in zip(names.tolist(), probabilities)]
        if truth is not None:
            figures = scores(truth, names)
            if unknown := [name for name in truth.tolist() if name not in encoding.classes]:
                note = f"; {len(unknown):,} of the file's labels are no class of the run, such as {unknown[0]!r}"
    else:
        numbers = encoding.unscale(predicted)
        header, rows = ["label"], [[f"{number:.6g}"] for number in numbers]
        if truth is not None:
            figures = errors(numbers, truth)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with atomic_write(out) as file:
        file.write(text.getvalue().encode())
    found = "".join(f"; {name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
    return f"{out}: {len(rows):,} labels{found}{note}"


def import_sklearn() -> None:
    """Imports scikit-learn, which computes the scores.

    Raises:
      ImportError: if it is not installed.
    """
    with optional_package("sklearn", extra="tasks", purpose="--task classify", distribution="scikit-learn"):
        import sklearn.metrics as _  # noqa: F401


def check_labels(source: str, labels: Labels) -> None:
    """Checks that the examples are enough and differ in their labels.

    Raises:
      DataError: if not.
    """
    if len(labels) < MIN_EXAMPLES:
        raise DataError(f"{source}: expected at least {MIN_EXAMPLES} sequences, got {len(labels)}")
    if len(set(np.asarray(labels).tolist())) == 1:
        raise DataError(
            f"{source}: all labels are {np.asarray(labels).tolist()[0]!r}; expected at least two different ones"
        )
    parts = labeled_sequences.split_indices(labels)
    for name, part in zip(("validation", "test"), parts[1:]):
        if not len(part):
            raise DataError(f"{source}: the {name} part is empty: no class has {MIN_EXAMPLES} sequences")


def build_model(options: Options, encoding: Encoding) -> SequenceRegressor:
    """Returns the model for an encoding."""
    embedding = options.embedding
    return SequenceRegressor(
        build_lstm(options, embedding if encoding.num_features is None else encoding.num_features),
        len(encoding.classes) or 1,
        options.dropout,
        options.pooling,
        None if encoding.num_features is not None else len(encoding.vocabulary) + 1,
    )


def make_outputs(model: SequenceRegressor, options: Options) -> Callable[[Any, list[np.ndarray]], np.ndarray]:
    """Returns a function ``(params, sequences) -> outputs (N, O)``, which runs batches of similar length."""
    compiled = jax.jit(lambda params, batch: model(params, batch.inputs, batch.lengths))

    def outputs(params: Any, sequences: list[np.ndarray]) -> np.ndarray:
        order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
        result = np.empty((len(sequences), model.output_size))
        for begin in range(0, len(order), options.batch):
            chosen = order[begin : begin + options.batch]
            filled = np.resize(chosen, options.batch)  # repeats examples, so that no other size is compiled
            batch = labeled_sequences.pad([sequences[n] for n in filled], filled.astype(np.int32), options.window)
            result[chosen] = np.asarray(compiled(params, batch))[: len(chosen)]
        return result

    return outputs


def class_weights(options: Options, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the weight of each class in the loss, ``(K,)``: 1, or inversely proportional to its frequency."""
    if options.class_weights == "equal" or not num_classes:
        return np.ones(num_classes)
    return len(classes) / (num_classes * np.bincount(classes, minlength=num_classes))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns the accuracy, and the mean of the F1 scores of all classes."""
    from sklearn.metrics import f1_score

    options: dict[str, Any] = {"average": "macro", "zero_division": 0}
    f1 = f1_score(truth, predicted, **options)
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": float(f1)}


def errors(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Returns the root mean squared and the mean absolute error, in the units of the labels."""
    difference = predicted - truth
    return {"rmse": float(np.sqrt((difference**2).mean())), "mae": float(np.abs(difference).mean())}


def describe_labels(encoding: Encoding, labels: Labels) -> str:
    """Returns a phrase about the labels."""
    if isinstance(labels, np.ndarray):
        return f"labels are numbers from {labels.min():g} to {labels.max():g}"
    _, most = Counter(labels).most_common(1)[0]
    return f"{len(encoding.classes):,} classes; always answering the most frequent gives {most / len(labels):.1%}"


def cut_notes(longest: int, window: int) -> tuple[str, ...]:
    """Returns a line for the user if sequences are longer than ``--window``."""
    if longest <= window:
        return ()
    return (f"sequences have up to {longest:,} steps: the first {window:,} are used; --window sets their number",)


def rare_notes(labels: Labels) -> tuple[str, ...]:
    """Returns a line for the user if classes have too few examples for all parts."""
    if isinstance(labels, np.ndarray):
        return ()
    rare = [name for name, count in sorted(Counter(labels).items()) if count < MIN_EXAMPLES]
    if not rare:
        return ()
    shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in rare[:5])
    more = f" and {len(rare) - 5:,} more" if len(rare) > 5 else ""
    return (f"fewer than {MIN_EXAMPLES} sequences of {shown}{more}: too few to be in validation and test",)


def draw_confusion(path: Path, truth: np.ndarray, predicted: np.ndarray, classes: tuple[str, ...], title: str) -> None:
    """Draws the confusion matrix as a PNG: a row per true class, its shares of predictions as colors.

    Args:
      path: path of the figure.
      truth: true classes ``(N,)``.
      predicted: predicted classes ``(N,)``.
      classes: names of the classes.
      title: title of the figure.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    k = len(classes)
    counts = confusion_matrix(truth, predicted, labels=range(k))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(0.62 * k + 2.4, 4.2), 12)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    names = [literal(name) for name in classes] if k <= MAX_NAMED else []
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(literal(title), fontsize=11)
    if k <= MAX_WRITTEN:
        for row, column in np.ndindex(k, k):
            color = "white" if shares[row, column] > 0.5 else "#333333"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def draw_numbers(path: Path, truth: np.ndarray, predicted: np.ndarray, title: str) -> None:
    """Draws predicted over true numbers as a PNG, with the line on which they are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(truth, predicted, s=9, alpha=0.5, color="#b3341f", linewidths=0)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="#333333", linewidth=1)
    axes.set(xlabel="true", ylabel="predicted")
    axes.set_title(literal(title), fontsize=11)
    axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
