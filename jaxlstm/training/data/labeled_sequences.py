"""Sequences of unequal length with one label each: files, the built-in data, the split, batches of similar length."""

import csv
import io
import json
import math
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlstm.training.data.csv_series import DELIMITERS, MISSING
from jaxlstm.training.data.shuffling import shuffled_batches
from jaxlstm.training.data.text import DataError, read_text
from jaxlstm.training.data.time_axis import NUMBER

EMBEDDED = "python-packages"  # the name of the lines of code that ship with CPython
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
SHORTEST_LINE = 20  # characters
BATCHES_PER_POOL = 8
SMALLEST_PADDED = 16  # steps
NOT_NUMBERS = (*MISSING, *(sign + name for sign in ("", "+", "-") for name in ("inf", "infinity")))

Labels = np.ndarray | tuple[str, ...]  # (N,) float64 numbers, or names of classes


class LabeledSequences(NamedTuple):
    """N sequences and their labels."""

    sequences: tuple[str, ...] | tuple[np.ndarray, ...]  # texts, or arrays (length, F) float32
    labels: Labels | None  # numbers for regression, names for classification, None without labels

    @property
    def is_text(self) -> bool:
        """Whether the sequences are texts."""
        return isinstance(self.sequences[0], str)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers."""
        return isinstance(self.labels, np.ndarray)


class PaddedBatch(NamedTuple):
    """Sequences padded to the same number of steps."""

    inputs: np.ndarray  # (T, B) int32 ids of characters, or (T, B, F) float32
    lengths: np.ndarray  # (B,) int32
    targets: np.ndarray  # (B,) int32 classes, or float32 numbers


def load_labeled(source: str, *, needs_labels: bool = True) -> LabeledSequences:
    """Returns the sequences with a name or in a file.

    Args:
      source: ``"python-packages"``; an ``.npz`` file with arrays ``values (N, T, F)`` or ``(N, T)``, ``lengths (N,)``
        (T without it) and ``labels (N,)``; a ``.jsonl`` file of objects, or a CSV file with a header, with ``text`` and
        ``label``.
      needs_labels: whether a file without labels is an error.

    Raises:
      DataError: if the file cannot be read, or is of another form. The message names the first wrong row.
    """
    if source == EMBEDDED:
        return python_lines()
    path = Path(source)
    if not path.exists():
        raise DataError(f"no data {source!r}: neither a file nor {EMBEDDED}")
    try:
        data = _read_npz(path) if path.suffix.lower() == ".npz" else _read_texts(path)
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if data.labels is None and needs_labels:
        name = "an array labels" if path.suffix.lower() == ".npz" else "a column label"
        raise DataError(f"{path} has no labels; expected {name}")
    return data


def python_lines() -> LabeledSequences:
    """Returns distinct lines of code of eight packages of Python's standard library, labeled by package.

    A line that occurs in two packages is left out.

    Raises:
      DataError: if the sources are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    packages: dict[str, str] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if "test" in path.relative_to(root).parts:  # as in Python 3.11
                continue
            for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()):
                if len(line) >= SHORTEST_LINE:
                    packages[line] = package if packages.get(line, package) == package else ""
    kept = {line: package for line, package in packages.items() if package}
    if set(kept.values()) != set(PACKAGES):
        raise DataError(f"{root} lacks the sources of {', '.join(sorted(set(PACKAGES) - set(kept.values())))}")
    return LabeledSequences(tuple(kept), tuple(kept.values()))


def _read_npz(path: Path) -> LabeledSequences:
    """Returns the padded arrays of a file as arrays without padding."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile and NumPy raise errors of several types
        raise DataError(f"cannot read {path} as a file of NumPy arrays: {error}") from None
    if "values" not in arrays:
        raise DataError(f"expected arrays values, lengths and labels, got {', '.join(arrays) or 'none'}")
    values = arrays["values"]
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiub" or 0 in values.shape:
        raise DataError(
            f"values must be numbers of shape (N, T) or (N, T, features), got {values.dtype}{list(values.shape)}"
        )
    count, steps = values.shape[:2]
    with np.errstate(over="ignore"):  # an infinite value is an error, except in the padding
        values = values.reshape(count, steps, -1).astype(np.float32)
    lengths = arrays.get("lengths", np.full(count, steps))
    if lengths.shape != (count,) or lengths.dtype.kind not in "iu":
        raise DataError(f"lengths must be {count:,} integers, got {lengths.dtype}{list(lengths.shape)}")
    for row, length in enumerate(lengths):
        if not 0 < length <= steps:
            raise DataError(f"lengths must be in 1 to {steps:,}, got {length} in row {row}")
        if not np.isfinite(values[row, :length]).all():
            raise DataError(f"values of row {row} must be finite up to its length")
    labels = arrays.get("labels")
    if labels is not None:
        if labels.shape != (count,) or labels.dtype.kind not in "fiubU":
            raise DataError(
                f"labels must be {count:,} integers, texts or floating-point numbers, got "
                f"{labels.dtype}{list(labels.shape)}"
            )
        labels = _checked_numbers(labels) if labels.dtype.kind == "f" else tuple(map(str, labels.tolist()))
    return LabeledSequences(tuple(values[row, :length] for row, length in enumerate(lengths)), labels)


def _checked_numbers(labels: np.ndarray) -> np.ndarray:
    """Returns numbers in float64.

    Raises:
      DataError: for one that is not finite.
    """
    wrong = np.flatnonzero(~np.isfinite(labels))
    if len(wrong):
        raise DataError(f"the label of row {wrong[0]} must be finite, got {labels[wrong[0]]}")
    return labels.astype(np.float64)


def _read_texts(path: Path) -> LabeledSequences:
    """Returns the texts and labels of a file of JSON lines or a CSV file."""
    content = read_text(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = [(n + 1, _parse_object(line, n + 1)) for n, line in enumerate(content.split("\n")) if line.strip()]
    else:
        rows = _read_csv(content)
    if not rows:
        raise DataError("the file has no rows")
    texts, labels = [], []
    has_labels = any("label" in row for _, row in rows)
    for line, row in rows:
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text:
            raise DataError(f"line {line}: text must be a text of at least one character, got {text!r}")
        if not is_unicode(text) or not is_unicode(str(label)):
            raise DataError(f"line {line} has half of a surrogate pair, which is no character")
        if has_labels and (not isinstance(label, str | int | float) or label == ""):
            raise DataError(f"line {line}: label must be a text or a number, got {label!r}")
        texts.append(text)
        labels.append(label)
    return LabeledSequences(tuple(texts), _typed_labels(labels) if has_labels else None)


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(content: str) -> list[tuple[int, dict[str, Any]]]:
    """Returns the rows of CSV text by column, each with the number of its last line.

    Raises:
      DataError: if there is no column text, or a row has another number of cells than the header.
    """
    header = content.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if "text" not in names:
            raise DataError(f"expected columns text and label, got {', '.join(names)}")
        if repeated := [name for name in ("text", "label") if names.count(name) > 1]:
            raise DataError(f"two columns are named {repeated[0]!r}")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"line {reader.line_num} has another number of cells than the header")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num + 1}: {error}") from None
    return rows


def _parse_object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"line {number} must be an object with text and label, got {line[:40]!r}")
    return row


def _typed_labels(labels: Sequence[str | int | float]) -> Labels:
    """Returns numbers if all labels are numbers and one of them is not an integer, else names of classes.

    Raises:
      DataError: for a label that is missing or infinite if all others are numbers.
    """
    cells = [label if isinstance(label, str) else json.dumps(label) for label in labels]
    others = [row for row, cell in enumerate(cells) if not re.fullmatch(NUMBER, cell, re.ASCII)]
    if 0 < len(others) < len(cells) and all(cells[row].strip().lower() in NOT_NUMBERS for row in others):
        raise DataError(
            f"the label of row {others[0]} must be a finite number as the others are, got {cells[others[0]]}"
        )
    if not others and not all(re.fullmatch(r"[+-]?\d+", cell, re.ASCII) for cell in cells):
        return _checked_numbers(np.array([float(cell) for cell in cells]))
    return tuple(cells)


def split_indices(labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of two thirds of the examples for training and of a sixth each for validation and test.

    The order is random and fixed. Each class, or each range of numbers, is split in the same shares.
    """
    shuffled = np.random.default_rng(0).permutation(len(labels))
    values = np.asarray(labels)[shuffled]
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values))
    if not isinstance(labels, np.ndarray):  # from 0 in each class
        rank -= np.searchsorted(values[order], values)
    place = rank % 6
    return shuffled[place < 4], shuffled[place == 4], shuffled[place == 5]


def padded_length(longest: int, window: int) -> int:
    """Returns the number of steps of a batch: the next power of two, so that few programs are compiled."""
    return min(window, max(SMALLEST_PADDED, 2 ** math.ceil(math.log2(longest))))


def pad(sequences: Sequence[np.ndarray], targets: np.ndarray, window: int) -> PaddedBatch:
    """Returns sequences ``(length, ...)`` as one batch; only their first ``window`` steps are used."""
    lengths = np.minimum([len(sequence) for sequence in sequences], window).astype(np.int32)
    steps = padded_length(int(lengths.max()), window)
    inputs = np.zeros((steps, len(sequences), *sequences[0].shape[1:]), sequences[0].dtype)
    for b, (sequence, length) in enumerate(zip(sequences, lengths)):
        inputs[:length, b] = sequence[:length]
    return PaddedBatch(inputs, lengths, targets)


def bucketed_batches(lengths: np.ndarray, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Returns a function from the number of a batch to the indices of its examples, which have similar lengths.

    Eight batches at a time are drawn, sorted by length, cut into batches, and used in random order. Every example is
    drawn once before any is drawn again, and any batch can be computed without the ones before it.

    Args:
      lengths: lengths of all examples.
      batch_size: examples per batch.
      seed: seed of the order.
    """
    pools = shuffled_batches(len(lengths), BATCHES_PER_POOL * batch_size, seed)

    def indices(number: int) -> np.ndarray:
        pool_number, n = divmod(number, BATCHES_PER_POOL)
        pool = pools(pool_number)
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        place = np.random.default_rng((seed, pool_number)).permutation(BATCHES_PER_POOL)[n]
        return pool[place * batch_size : (place + 1) * batch_size]

    return indices
