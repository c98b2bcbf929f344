"""Reads time series from CSV files. Depends on NumPy and the standard library only."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlstm.training.data.text import DataError

DATE_COLUMNS = ("date", "time", "datetime", "timestamp")  # names of the date column; by default the first column


class Series(NamedTuple):
    """A multivariate time series of T steps and F columns."""

    names: tuple[str, ...]  # (F,)
    dates: tuple[str, ...]  # (T,) as spelled in the file
    values: np.ndarray  # (T, F) float64


def read_series(path: Path) -> Series:
    """Returns the series in a CSV file with a header and a date column; fills gaps by linear interpolation.

    Raises:
      DataError: if the file cannot be read, has no column of numbers, or a cell is not a number.
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
        raise DataError(f"{path}: expected a date column and number columns separated by commas, got {header}")
    date_index = next((n for n, name in enumerate(header) if name.strip().lower() in DATE_COLUMNS), 0)
    names = tuple(name.strip() for n, name in enumerate(header) if n != date_index)
    values = np.full((len(rows), len(names)), np.nan)
    for t, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} has {len(row)} cells, the header {len(header)}")
        cells = [cell.strip() for n, cell in enumerate(row) if n != date_index]
        for f, cell in enumerate(cells):
            try:
                values[t, f] = float(cell) if cell else np.nan
            except ValueError:
                raise DataError(f"{path}: line {line}, {names[f]}: {cell!r} is not a number") from None
    for column, name in zip(values.T, names):
        _interpolate(column, f"{path}: {name}")
    return Series(names, tuple(row[date_index].strip() for _, row in rows), values)


def _interpolate(column: np.ndarray, name: str) -> None:
    """Fills the non-finite values of a column in place by linear interpolation."""
    known = np.isfinite(column)
    if not known.any():
        raise DataError(f"{name} has no number")
    column[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), column[known])
