"""Time series from CSV files. Stands alone: NumPy and the standard library."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlstm.data import DataError

DATES = ("date", "time", "datetime", "timestamp")  # names of the column that is not a number; else the first column


class Series(NamedTuple):
    """Numbers that go by the clock."""

    names: tuple[str, ...]  # of the F columns
    dates: tuple[str, ...]  # T, as they are in the file
    values: np.ndarray  # (T, F) float64


def read(path: Path) -> Series:
    """The series in a CSV file with a header and a column of dates; gaps are filled by linear interpolation.

    Raises:
      DataError: if it cannot be read or a cell is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except ValueError:
        raise DataError(f"{path} is empty") from None
    at = next((n for n, name in enumerate(header) if name.strip().lower() in DATES), 0)
    names = tuple(name.strip() for n, name in enumerate(header) if n != at)
    values = np.full((len(rows), len(names)), np.nan)
    for n, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: row {n + 2} has {len(row)} cells, the header {len(header)}")
        cells = [cell.strip() for k, cell in enumerate(row) if k != at]
        for f, cell in enumerate(cells):
            try:
                values[n, f] = float(cell) if cell else np.nan
            except ValueError:
                raise DataError(f"{path}: row {n + 2}, {names[f]}: {cell!r} is not a number") from None
    for column, name in zip(values.T, names):
        known = np.isfinite(column)
        if not known.any():
            raise DataError(f"{path}: {name} has no number")
        column[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), column[known])
    return Series(names, tuple(row[at].strip() for row in rows), values)
