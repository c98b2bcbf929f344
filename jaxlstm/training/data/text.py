"""Text for language models: where it comes from, its alphabet, and how it is cut into streams.

Stands alone: NumPy and the standard library.
"""

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

EMBEDDED = "python-reference"


class DataError(ValueError):
    """A text that cannot be had or used; one line that says which and why."""


class Download(NamedTuple):
    """A public file, and what it must hash to."""

    url: str
    sha256: str


DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


def load_text(source: str) -> str:
    """The text of a name or of a file.

    Args:
      source: ``"python-reference"``, a name in `DOWNLOADS`, or the path of a UTF-8 text file.

    Raises:
      DataError: if it is neither a known name nor a readable, non-empty UTF-8 file, or cannot be downloaded.
    """
    if source == EMBEDDED:
        return embedded_text()
    if source in DOWNLOADS:
        path = cached(source, DOWNLOADS[source], cache_folder())
    else:
        path = Path(source)
        if not path.is_file():
            known = ", ".join([EMBEDDED, *DOWNLOADS])
            raise DataError(f"no text {source!r}: neither a file nor one of the known names {known}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise DataError(f"{path} is empty")
    return text


def embedded_text() -> str:
    """The language reference that ships inside every CPython, topic after topic: about 465,000 characters in 3.11."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/jaxlstm``, or ``~/.cache/jaxlstm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlstm"


def cached(name: str, download: Download, folder: Path) -> Path:
    """The path of a download, fetched if ``folder`` does not hold it yet; a broken copy is fetched again.

    Raises:
      DataError: if the address does not answer or what it sends has another hash.
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
    found = hashlib.sha256(content).hexdigest()
    if found != download.sha256:
        raise DataError(f"{download.url} sent {len(content)} bytes of SHA-256 {found}, expected {download.sha256}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)  # whole or not at all
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    return path


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a text, in code point order; a character's id is its place."""

    characters: str

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """Every character that occurs in ``text``."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """``text`` as int32 ids ``(len(text),)``.

        Raises:
          DataError: naming the characters that are not in the vocabulary.
        """
        known = np.array([ord(c) for c in self.characters], np.uint32)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(known, points)
        missing = points[known[np.minimum(ids, len(known) - 1)] != points]
        if missing.size:
            strangers = ", ".join(repr(chr(point)) for point in dict.fromkeys(missing.tolist()))
            raise DataError(f"not in the vocabulary of {len(self)} characters: {strangers}")
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of an array of ids."""
        return "".join(self.characters[i] for i in np.asarray(ids).tolist())


LARGE = 2**28  # bytes of a file from which its tokens are kept in a file instead of memory


def characters(source: str) -> tuple[np.ndarray, Vocabulary]:
    """The text of a name or a file as ids, and its vocabulary; see `load_text`.

    The ids of a file of `LARGE` bytes or more lie in a file of the cache folder, mapped into memory, so that a text
    larger than memory can be trained on.

    Raises:
      DataError: as `load_text` does.
    """
    path = Path(source)
    if source == EMBEDDED or source in DOWNLOADS or not path.is_file() or path.stat().st_size < LARGE:
        text = load_text(source)
        vocabulary = Vocabulary.of(text)
        return vocabulary.encode(text), vocabulary
    return mapped(path, cache_folder())


def mapped(path: Path, folder: Path) -> tuple[np.ndarray, Vocabulary]:
    """The characters of a file as ids in a file of ``folder``, mapped into memory, and their vocabulary.

    The file is read a piece at a time, twice: for its alphabet and for its ids. They are found again as long as path,
    size and time of the text stay the same.
    """
    stat = path.stat()
    known_by = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = folder / f"{path.stem}-{known_by}.npy"
    names = target.with_suffix(".txt")
    if not (target.exists() and names.exists()):
        alphabet: set[str] = set()
        length = 0
        for piece in _pieces(path):
            alphabet.update(piece)
            length += len(piece)
        vocabulary = Vocabulary("".join(sorted(alphabet)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            dtype = np.uint16 if len(vocabulary) < 2**16 else np.int32
            ids = np.lib.format.open_memmap(partial, "w+", dtype, (length,))
            start = 0
            for piece in _pieces(path):
                ids[start : start + len(piece)] = vocabulary.encode(piece)
                start += len(piece)
            ids.flush()
            names.write_text(vocabulary.characters, encoding="utf-8", newline="")
            os.replace(partial, target)  # whole or not at all
        except OSError as error:
            raise DataError(f"cannot write {target}: {error.strerror}") from None
    with names.open(encoding="utf-8", newline="") as file:
        return np.load(target, mmap_mode="r"), Vocabulary(file.read())


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, a million characters at a time."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while piece := file.read(2**20):
                yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


UNKNOWN, END = "<unk>", "<eos>"  # as in the Penn Treebank's files


@dataclass(frozen=True)
class Words:
    """The words of a text, the most frequent first; a word's id is its place. Line ends are words, `END`."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str, least: int = 2) -> "Words":
        """Every word that occurs at least ``least`` times in ``text``; the others become `UNKNOWN`."""
        counts = Counter(text.split())
        known = [word for word, count in counts.most_common() if count >= least and word not in (UNKNOWN, END)]
        return cls((END, UNKNOWN, *known))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> np.ndarray:
        """``text`` as int32 ids, each line followed by that of `END` but for the last where it is not ended."""
        place = {word: n for n, word in enumerate(self.words)}
        unknown = place[UNKNOWN]
        return np.array([place.get(word, unknown) for word in text.replace("\n", f" {END} ").split()], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of an array of ids."""
        return " ".join(self.words[i] for i in np.asarray(ids).tolist()).replace(f" {END} ", "\n").replace(END, "\n")


def fingerprint(*parts: np.ndarray | str) -> str:
    """SHA-256 of arrays and texts, by which data are known again."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data.cast("B")
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def split(ids: np.ndarray, fraction: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The first ``fraction`` for training, the rest for validation."""
    cut = int(len(ids) * fraction)
    return ids[:cut], ids[cut:]


class Window(NamedTuple):
    """A cut of all streams: predict ``targets`` from ``inputs`` and what came before."""

    inputs: np.ndarray  # (T, B) int, a view of the text: nothing is read before it is asked for
    targets: np.ndarray  # (T, B) int: the inputs one step later
    first: bool  # True where the streams begin, so that the state carried so far does not belong to them


def training_windows(ids: np.ndarray, batch: int, window: int, seed: int, start: int = 0) -> Iterator[Window]:
    """Windows of ``batch`` contiguous streams, without end: each window goes on where the last one stopped.

    An epoch begins with a random shift of less than a window, so that the gradient is not cut at the same places
    every time.

    Args:
      ids: the text.
      batch: number of streams, B.
      window: T.
      seed: of the shifts.
      start: the position, in windows from the beginning of training: the number of those already taken.

    Raises:
      DataError: if the text is too short for one window of every stream.
    """
    needed = batch * window + window
    if len(ids) < needed:
        raise DataError(f"{len(ids):,} tokens to train on are fewer than batch x window + window = {needed:,}")

    def epochs() -> Iterator[Window]:
        rng = np.random.default_rng(seed)
        behind = start
        while True:
            shifted = ids[rng.integers(window) :]
            length = (len(shifted) - 1) // batch
            if behind >= length // window:
                behind -= length // window
                continue
            inputs = shifted[: batch * length].reshape(batch, length).T
            targets = shifted[1 : batch * length + 1].reshape(batch, length).T
            for n in range(behind, length // window):
                rows = slice(n * window, (n + 1) * window)
                yield Window(inputs[rows], targets[rows], first=n == 0)
            behind = 0

    return epochs()


class ScoredWindow(NamedTuple):
    """A cut of all streams for evaluation."""

    inputs: np.ndarray  # (T, B) int32
    targets: np.ndarray  # (T, B) int32
    counted: np.ndarray  # (T, B) bool: False for context and padding
    resets: np.ndarray  # (T, B) bool: True at the first character of the text


def evaluation_windows(ids: np.ndarray, batch: int, window: int) -> Iterator[ScoredWindow]:
    """Windows that predict every character but the first exactly once, ``batch`` parts of the text side by side.

    So that a part does not begin without memory, it is led in by the ``window`` characters before it, not counted.
    """
    predicted = len(ids) - 1
    per_stream = -(-predicted // batch)
    begin = np.arange(batch) * per_stream  # (B,) the first position that each stream predicts from
    steps = -(-(window + per_stream) // window) * window
    for start in range(-window, steps - window, window):
        at = begin + np.arange(start, start + window)[:, None]  # (T, B) position in the text
        counted = (at >= begin) & (at < np.minimum(begin + per_stream, predicted))
        inputs, targets = (ids[np.clip(at + ahead, 0, predicted)].astype(np.int32) for ahead in (0, 1))
        yield ScoredWindow(inputs, targets, counted, at == 0)
