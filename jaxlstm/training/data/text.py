"""Text for language models: sources, vocabularies, and the streams that batches are cut from.

Depends on NumPy and the standard library only.
"""

import hashlib
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlstm.atomic_write import atomic_write

EMBEDDED = "python-reference"  # the name of the text that ships with CPython


class DataError(ValueError):
    """Raised for data that cannot be read or are unusable; the message is one line that names the source."""


class Download(NamedTuple):
    """A public file and its expected hash."""

    url: str
    sha256: str


DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


def load_text(source: str) -> str:
    """Returns the text with the given name or path.

    Args:
      source: ``"python-reference"``, a name in `DOWNLOADS`, or the path of a UTF-8 text file.

    Raises:
      DataError: if it is neither a known name nor a readable, non-empty UTF-8 file, or cannot be downloaded.
    """
    if source == EMBEDDED:
        return embedded_text()
    if source in DOWNLOADS:
        path = fetch_cached(source, DOWNLOADS[source], cache_folder())
    else:
        path = Path(source)
        if not path.exists():
            names = ", ".join([EMBEDDED, *DOWNLOADS])
            raise DataError(f"no text {source!r}: neither a file nor one of the known names {names}")
    return read_text(path)


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without its byte order mark.

    Raises:
      DataError: if it is not a regular file, cannot be read, is empty, is not UTF-8, or changes while it is read.
    """
    try:
        if path.exists() and not path.is_file():  # a named pipe would wait for a writer
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise DataError(f"{path} is {kind}; expected a text file")
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            content = file.read()
            after = os.fstat(file.fileno())
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, len(content)):
            raise changed(path)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise DataError(f"{path} is empty; expected text")
    return text


def changed(path: Path) -> DataError:
    """Returns the error of a file that another program writes."""
    return DataError(f"{path} changed while it was read; start again once no program writes it")


def embedded_text() -> str:
    """Returns the Python language reference, which ships with CPython: about 465,000 characters in 3.11."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cache_folder() -> Path:
    """Returns ``$XDG_CACHE_HOME/jaxlstm``, or ``~/.cache/jaxlstm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlstm"


def fetch_cached(name: str, download: Download, folder: Path) -> Path:
    """Returns the path of a downloaded file in ``folder``; fetches it if it is missing or has the wrong hash.

    Raises:
      DataError: if the URL cannot be read, its content has another hash, or the file cannot be written.
    """
    path = folder / f"{name}.txt"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == download.sha256:
        return path
    try:
        with urllib.request.urlopen(download.url, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"cannot fetch {name} from {download.url}: {reason}; pass a file with --data FILE") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != download.sha256:
        raise DataError(f"{download.url} sent {len(content)} bytes of SHA-256 {sha256}, expected {download.sha256}")
    make_folder(folder)
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(str(error)) from None
    return path


def make_folder(folder: Path) -> None:
    """Creates a folder with its parents unless it exists.

    Raises:
      DataError: if it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {folder}: {error.strerror}") from None


@dataclass(frozen=True)
class CharVocabulary:
    """The characters of a text in code point order; the id of a character is its index.

    Raises:
      DataError: if the characters are not distinct or in another order.
    """

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or self.characters != "".join(sorted(set(self.characters))):
            raise DataError("the vocabulary must be one or more distinct characters in code point order")

    @classmethod
    def from_text(cls, text: str) -> "CharVocabulary":
        """Returns the vocabulary of all characters in ``text``."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of the characters of ``text``, int32 ``(len(text),)``.

        Raises:
          DataError: if characters are not in the vocabulary; the message names them.
        """
        known = np.array([ord(c) for c in self.characters], np.uint32)
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(known, code_points)
        missing = code_points[known[np.minimum(ids, len(known) - 1)] != code_points]
        if missing.size:
            names = ", ".join(repr(chr(point)) for point in dict.fromkeys(missing.tolist()))
            raise DataError(
                f"not in the vocabulary of {len(self)} characters: {names}; remove or replace them in the text"
            )
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text with the given ids."""
        return "".join(self.characters[i] for i in np.asarray(ids).tolist())


UNKNOWN, END = "<unk>", "<eos>"  # as in the files of the Penn Treebank


@dataclass(frozen=True)
class WordVocabulary:
    """The words of a text, most frequent first; the id of a word is its index. The end of a line is the word `END`.

    Raises:
      DataError: if the words are not distinct, or do not begin with `END` and `UNKNOWN`.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:2] != (END, UNKNOWN) or len(set(self.words)) < len(self.words):
            raise DataError(f"the vocabulary must be distinct words that begin with {END} and {UNKNOWN}")

    @classmethod
    def from_text(cls, text: str, min_count: int = 2) -> "WordVocabulary":
        """Returns the vocabulary of words that occur at least ``min_count`` times; `UNKNOWN` stands for the others."""
        counts = Counter(text.split())
        frequent = [word for word, n in counts.most_common() if n >= min_count and word not in (UNKNOWN, END)]
        return cls((END, UNKNOWN, *frequent))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of the words of ``text``, int32; each newline becomes the id of `END`."""
        id_of = {word: n for n, word in enumerate(self.words)}
        unknown = id_of[UNKNOWN]
        return np.array([id_of.get(word, unknown) for word in text.replace("\n", f" {END} ").split()], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text with the given ids."""
        return " ".join(self.words[i] for i in np.asarray(ids).tolist()).replace(f" {END} ", "\n").replace(END, "\n")


def fingerprint(*parts: np.ndarray | str) -> str:
    """Returns the SHA-256 of arrays and texts; a resumed run compares it to detect changed data."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data.cast("B")
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def split(ids: np.ndarray, fraction: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first ``fraction`` of ``ids`` for training and the rest for validation."""
    cut = int(len(ids) * fraction)
    return ids[:cut], ids[cut:]


class Window(NamedTuple):
    """A training batch: consecutive steps of all streams."""

    inputs: np.ndarray  # (T, B) int, a view of the text: nothing is read before the array is used
    targets: np.ndarray  # (T, B) int: the inputs one step later
    restart: bool  # True if the streams begin here, so the state of the previous window must be dropped


def training_windows(
    ids: np.ndarray, batch_size: int, window: int, seed: int, start: int = 0, *, unit_name: str = "tokens"
) -> Iterator[Window]:
    """Yields windows of contiguous streams without end; each window continues the previous one.

    Every epoch begins with a random shift of less than a window, so that the gradient is not truncated at the same
    positions each time.

    Args:
      ids: token ids of the text.
      batch_size: number of streams, B.
      window: number of steps, T.
      seed: seed of the shifts.
      start: number of windows to skip, for a resumed run.
      unit_name: name of the tokens in error messages, such as "characters".

    Raises:
      DataError: if the text is too short for one window of every stream. Raised by the call, not by the first window.
    """
    needed = batch_size * window + window
    if len(ids) < needed:
        raise DataError(
            f"{len(ids):,} {unit_name} to train on are too few for --batch {batch_size} and --window {window}, which "
            f"need {needed:,}: use a longer text, or lower them"
        )
    return _generate_windows(ids, batch_size, window, seed, start)


def _generate_windows(ids: np.ndarray, batch_size: int, window: int, seed: int, start: int) -> Iterator[Window]:
    rng = np.random.default_rng(seed)
    skip = start
    while True:
        shifted = ids[rng.integers(window) :]
        length = (len(shifted) - 1) // batch_size
        num_windows = length // window
        inputs = shifted[: batch_size * length].reshape(batch_size, length).T
        targets = shifted[1 : batch_size * length + 1].reshape(batch_size, length).T
        for n in range(skip, num_windows):
            steps = slice(n * window, (n + 1) * window)
            yield Window(inputs[steps], targets[steps], restart=n == 0)
        skip = max(skip - num_windows, 0)


class EvaluationWindow(NamedTuple):
    """An evaluation batch: consecutive steps of all streams."""

    inputs: np.ndarray  # (T, B) int32
    targets: np.ndarray  # (T, B) int32
    loss_mask: np.ndarray  # (T, B) bool: False for context and padding
    resets: np.ndarray  # (T, B) bool: True at the first token of the text


def evaluation_windows(ids: np.ndarray, batch_size: int, window: int) -> Iterator[EvaluationWindow]:
    """Yields windows that predict every token but the first exactly once.

    The text is split into ``batch_size`` streams. Each stream reads the ``window`` tokens before its part as context,
    which the loss leaves out.
    """
    num_targets = len(ids) - 1
    per_stream = -(-num_targets // batch_size)
    begin = np.arange(batch_size) * per_stream  # (B,) first position that each stream predicts from
    steps = -(-(window + per_stream) // window) * window
    for start in range(-window, steps - window, window):
        position = begin + np.arange(start, start + window)[:, None]  # (T, B)
        loss_mask = (position >= begin) & (position < np.minimum(begin + per_stream, num_targets))
        inputs, targets = (ids[np.clip(position + shift, 0, num_targets)].astype(np.int32) for shift in (0, 1))
        yield EvaluationWindow(inputs, targets, loss_mask, position == 0)
