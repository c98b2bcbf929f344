"""Time series from CSV files. Stands alone: NumPy and the standard library."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlstm.training.data.text import DataError

DATES = ("date", "time", "datetime", "timestamp")  # names of the column that is not a number; else the first column


class Series(NamedTuple):
    """Numbers that go by the clock."""

    names: tuple[str, ...]  # of the F columns
    dates: tuple[str, ...]  # T, as they are in the file
    values: np.ndarray  # (T, F) float64


def read(path: Path) -> Series:
    """The series in a CSV file with a header and a column of dates; gaps are filled by linear interpolation.

    Raises:
      DataError: if it cannot be read, has no column of numbers, or a cell is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not lines:
        raise DataError(f"{path} is empty")
    (_, header), *rows = lines
    if len(header) < 2:
        raise DataError(f"{path}: expected a column of dates and columns of numbers, with commas between, got {header}")
    at = next((n for n, name in enumerate(header) if name.strip().lower() in DATES), 0)
    names = tuple(name.strip() for n, name in enumerate(header) if n != at)
    values = np.full((len(rows), len(names)), np.nan)
    for n, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} has {len(row)} cells, the header {len(header)}")
        cells = [cell.strip() for k, cell in enumerate(row) if k != at]
        for f, cell in enumerate(cells):
            try:
                values[n, f] = float(cell) if cell else np.nan
            except ValueError:
                raise DataError(f"{path}: line {line}, {names[f]}: {cell!r} is not a number") from None
    for column, name in zip(values.T, names):
        known = np.isfinite(column)
        if not known.any():
            raise DataError(f"{path}: {name} has no number")
        column[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), column[known])
    return Series(names, tuple(row[at].strip() for _, row in rows), values)
