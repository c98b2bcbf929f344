"""A SHA-256 inside the file that it protects, so that file and digest are always replaced together.

The digest is computed with 64 zeros in its place and covers every other byte. It is the first string of 64 hexadecimal
digits in the file: the first entry of a JSON file, or the only metadata of a safetensors file. To check a file without
this package:

    content = open("config.json", "rb").read()
    digest = json.loads(content)["sha256"]
    hashlib.sha256(content.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlstm.atomic_write import atomic_write
from jaxlstm.regular_file import read_regular

KEY = "sha256"
PLACEHOLDER = "0" * 64


def insert_digest(content: bytes) -> bytes:
    """Replaces the first `PLACEHOLDER` by the SHA-256 of the content."""
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(PLACEHOLDER.encode(), digest.encode(), 1)


def check_digest(path: Path, content: bytes, digest: Any) -> None:
    """Checks the contents of a file against the digest found in them.

    Raises:
      ValueError: if they differ, or ``digest`` is not a digest.
    """
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{path} is damaged or was not written by this version: it has no {KEY} of its contents")
    if insert_digest(content.replace(digest.encode(), PLACEHOLDER.encode(), 1)) != content:
        raise ValueError(f"{path} is damaged: its contents differ from those that were written, by their {KEY}")


def write_checked_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values as indented JSON with their SHA-256, atomically."""
    text = json.dumps({KEY: PLACEHOLDER} | dict(values), indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(insert_digest(text.encode()))


def read_checked_json(path: Path) -> dict[str, Any]:
    """Returns the values that `write_checked_json` wrote, after checking their SHA-256.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is damaged.
    """
    content = read_regular(path)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    check_digest(path, content, values.pop(KEY, None))
    return values
