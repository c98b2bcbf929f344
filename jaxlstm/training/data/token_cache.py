"""Character ids of large text files, stored in the cache folder and mapped into memory."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxlstm.atomic_write import atomic_write
from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.json_types import from_json
from jaxlstm.regular_file import open_regular
from jaxlstm.training.data.text import (
    DOWNLOADS,
    EMBEDDED,
    CharVocabulary,
    DataError,
    cache_folder,
    changed,
    load_text,
    make_folder,
)
from jaxlstm.training.file_lock import file_lock

MEMORY_MAP_BYTES = 2**28  # text files of at least this size are encoded into a file that is mapped into memory
PIECE_BYTES = 2**20


def load_characters(source: str) -> tuple[np.ndarray, CharVocabulary]:
    """Returns the character ids of a text and their vocabulary; see `jaxlstm.training.data.text.load_text`.

    The ids of a file of at least `MEMORY_MAP_BYTES` are stored in the cache folder and mapped into memory, so a text
    larger than memory can be used for training.

    Raises:
      DataError: under the conditions of ``load_text``.
    """
    path = Path(source)
    if source == EMBEDDED or source in DOWNLOADS or not path.is_file() or path.stat().st_size < MEMORY_MAP_BYTES:
        text = load_text(source)
        vocabulary = CharVocabulary.from_text(text)
        return vocabulary.encode(text), vocabulary
    return map_characters(path, cache_folder())


@dataclass(frozen=True)
class Entry:
    """Description of a file of ids, stored beside it.

    Raises:
      DataError: if the characters are not a vocabulary.
    """

    characters: str  # the vocabulary
    length: int  # number of ids
    ids_sha256: str

    def __post_init__(self) -> None:
        CharVocabulary(self.characters)  # checks them

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids in the file."""
        return np.dtype("<u2" if len(self.characters) < 2**16 else "<i4")


def map_characters(path: Path, folder: Path) -> tuple[np.ndarray, CharVocabulary]:
    """Returns the character ids of a file as a memory map of a file in ``folder``, and their vocabulary.

    The ids are stored under the SHA-256 of the text. Before they are used, they and their description are compared
    with their own hashes, their number and the size of the vocabulary; damaged ones are replaced. One process writes
    them while others wait.

    Raises:
      DataError: if the text is not UTF-8, changes while it is read, or the ids cannot be written.
    """
    make_folder(folder)
    try:
        with path.open("rb") as file:
            text_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        ids_path = folder / f"{text_sha256}.ids"
        with file_lock(ids_path.with_suffix(".lock"), wait=True):
            entry = read_entry(ids_path) or _encode_file(path, text_sha256, ids_path)
            ids = np.memmap(ids_path, entry.dtype, "r", shape=(entry.length,))
    except OSError as error:
        raise DataError(str(error)) from None
    return ids, CharVocabulary(entry.characters)


def read_entry(ids_path: Path) -> Entry | None:
    """Returns the entry of a file of ids, or None if either is missing or damaged.

    The ids are read, not mapped: an unreadable page of a mapping ends the process with a bus error.
    """
    digest, largest, length = hashlib.sha256(), 0, 0
    try:
        entry = from_json(Entry, read_checked_json(ids_path.with_suffix(".json")), "entry")
        with open_regular(ids_path) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                ids = np.frombuffer(piece, entry.dtype)
                largest, length = max(largest, int(ids.max())), length + len(ids)
    except (OSError, ValueError):
        return None
    matches = length == entry.length and digest.hexdigest() == entry.ids_sha256
    return entry if matches and largest < len(entry.characters) else None


def _encode_file(path: Path, text_sha256: str, ids_path: Path) -> Entry:
    """Writes the character ids of a text file, then their entry; reads the text twice, in pieces."""
    characters: set[str] = set()
    length = 0
    for piece in _read_pieces(path, text_sha256):
        characters.update(piece)
        length += len(piece)
    vocabulary, digest = CharVocabulary("".join(sorted(characters))), hashlib.sha256()
    dtype = Entry(vocabulary.characters, length, "").dtype
    try:
        with atomic_write(ids_path) as file:
            for piece in _read_pieces(path, text_sha256):
                if not characters.issuperset(piece):
                    raise changed(path)
                ids = vocabulary.encode(piece).astype(dtype).tobytes()
                digest.update(ids)
                file.write(ids)
        entry = Entry(vocabulary.characters, length, digest.hexdigest())
        write_checked_json(ids_path.with_suffix(".json"), asdict(entry))
    except OSError:
        ids_path.unlink(missing_ok=True)  # without an entry it only takes space
        raise
    return entry


def _read_pieces(path: Path, sha256: str) -> Iterator[str]:
    """Yields the text of a file in pieces; raises an error at its end if its hash is not the given one."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if digest.hexdigest() != sha256:
        raise changed(path)
