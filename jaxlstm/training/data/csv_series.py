"""Reads time series from CSV files: columns, numbers, gaps; see `jaxlstm.training.data.time_axis` for the times."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlstm.errors import optional_package
from jaxlstm.training.data.text import DataError, read_text
from jaxlstm.training.data.time_axis import NUMBER, TimeAxis, infer_axis, is_date, read_times

TIME_COLUMNS = ("date", "time", "datetime", "timestamp", "ds")  # names of the column of times
DELIMITERS = ",;\t|"
OTHER_DECIMAL = {".": ",", ",": "."}
MISSING = ("", "na", "n/a", "nan", "null", "none")  # cells without a number, in any case


class Series(NamedTuple):
    """A multivariate time series of T evenly spaced steps and F columns."""

    names: tuple[str, ...]  # (F,)
    dates: tuple[str, ...]  # (T,)
    values: np.ndarray  # (T, F) float64: in a gap, the last number before it
    known: np.ndarray  # (T, F) bool: False in gaps
    notes: tuple[str, ...]  # lines for the user: the role of each column, changes of order, gaps


class Table(NamedTuple):
    """The cells of a CSV file of N rows, without its header."""

    names: tuple[str, ...]  # (C,)
    rows: list[list[str]]  # (N, C), stripped
    lines: list[int]  # (N,) line of each row in the file
    has_header: bool
    unnamed: tuple[str, ...]  # names given to columns that the header leaves blank

    def column(self, name: str) -> list[str]:
        """Returns the cells of a column."""
        index = self.names.index(name)
        return [row[index] for row in self.rows]


def read_series(
    path: Path,
    *,
    time: str | None = None,
    target: str | None = None,
    delimiter: str | None = None,
    decimal: str = ".",
    date_format: str | None = None,
) -> Series:
    """Returns the series in a CSV file, sorted by time.

    Missing rows and cells become gaps, filled from the past only. Steps before the first number of a column are
    dropped, because nothing can fill them.

    Args:
      path: a UTF-8 text file.
      time: column of times. None takes a column with a name in `TIME_COLUMNS`, or else the only one of dates.
      target: columns of numbers, separated by commas. None takes all with a name but those that count the rows.
      delimiter: separator of cells. None takes the most frequent one of the first line.
      decimal: decimal separator.
      date_format: see `jaxlstm.training.data.time_axis.read_times`.

    Raises:
      DataError: if the file cannot be read, or its rows do not form one evenly spaced series. The
        message names the first offending line.
      ImportError: if pandas is not installed.
    """
    with optional_package("pandas", extra="tasks", purpose="--task forecast"):
        import pandas as _  # noqa: F401
    text = read_text(path)
    try:
        table = read_table(text, delimiter, decimal)
        time = _time_column(table, time)
        columns, ignored = _number_columns(table, time, target, decimal)
        axis = _time_axis(table, time, date_format)
        rows = np.full((len(axis.labels), len(columns)), np.nan)
        rows[axis.positions] = np.stack(list(columns.values()), -1)[axis.order]
        series, gaps = _fill_gaps(tuple(columns), axis.labels, rows)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    notes = [
        f"{path.name}: time is {time!r}, {axis.step} per step from {axis.labels[0]} to {axis.labels[-1]}; "
        f"forecasts {name_list(columns)}" + "".join(f"; ignores {name!r}, {reason}" for name, reason in ignored[:5])
    ]
    if len(ignored) > 5:
        notes.append(f"ignores {len(ignored) - 5:,} more columns: they have no name or no numbers, or count the rows")
    if not table.has_header:
        notes.append("the first line is not a header: columns are named by their number")
    if (axis.order != np.arange(len(axis.order))).any():
        newest_first = (axis.order == np.arange(len(axis.order))[::-1]).all()
        notes.append(f"rows were {'newest first' if newest_first else 'not in order of time'}: sorted by time")
    return series._replace(notes=(*notes, *gaps))


def name_list(names: Sequence[str] | dict[str, np.ndarray]) -> str:
    """Returns the first names, quoted, and the number of the others."""
    shown = ", ".join(repr(name) for name in list(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"


def read_table(text: str, delimiter: str | None = None, decimal: str = ".") -> Table:
    """Returns the cells of CSV text; columns without a name, or a file without header, are named by their number.

    Raises:
      DataError: if rows differ in their number of cells, two columns have the same name, or there is no row.
    """
    delimiter = {"\\t": "\t", "tab": "\t"}.get(delimiter or "", delimiter)
    if delimiter is None:
        first_line = next((line for line in text.splitlines() if line.strip()), "")
        unquoted = re.sub('"[^"]*("|$)', "", first_line)
        delimiter = max(DELIMITERS.replace(decimal, ""), key=unquoted.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, strict=True)
    except (TypeError, ValueError):
        raise DataError(f"--delimiter must be one character, got {delimiter!r}") from None
    lines, begin = [], 1
    try:
        for row in reader:
            if any(map(str.strip, row)):
                lines.append((begin, [cell.strip() for cell in row]))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"line {begin}: {error}") from None
    if not lines:
        raise DataError("the file has no rows")
    header = lines[0][1]
    for line, row in lines:
        if len(row) != len(header):
            raise DataError(f"line {line} has {len(row)} cells, the first line {len(header)}")
    if len(header) < 2:
        raise DataError(
            f"expected columns separated by one of {DELIMITERS!r}, or --delimiter; got one column: {header}"
        )
    has_header = is_header(header)
    by_number = tuple(f"column {n + 1}" for n in range(len(header)))
    names = tuple(name or number for name, number in zip(header, by_number)) if has_header else by_number
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise DataError(f"two columns are named {repeated[0]!r}")
    rows = lines[has_header:]
    if not rows:
        raise DataError(f"expected rows after the header {header}")
    unnamed = tuple(number for number, name in zip(by_number, header) if has_header and not name)
    return Table(names, [row for _, row in rows], [line for line, _ in rows], has_header, unnamed)


def is_header(cells: list[str]) -> bool:
    """Returns whether the first row names the columns: it has neither a date nor numbers only.

    Numbers after a blank first cell are names too, as in a data frame with an unnamed index.
    """
    is_number = [re.fullmatch(NUMBER.replace(r"\.", "[.,]"), cell) is not None for cell in cells]
    has_date = any(is_date(cell) for cell, number in zip(cells, is_number) if cell and not number)
    return not has_date and (not cells[0] or not all(number or not cell for cell, number in zip(cells, is_number)))


def _time_column(table: Table, name: str | None) -> str:
    """Returns the name of the column of times."""
    if name is not None:
        if name not in table.names:
            raise DataError(f"--time {name}: no such column, expected one of {name_list(table.names)}")
        return name
    if named := [column for column in table.names if column.lower() in TIME_COLUMNS]:
        return named[0]
    samples = {column: next(filter(None, table.column(column)), "") for column in table.names}
    dates = [column for column, cell in samples.items() if not re.fullmatch(NUMBER, cell) and is_date(cell)]
    if len(dates) != 1:
        found = f"several columns of dates, {name_list(dates)}" if dates else "no column of dates"
        raise DataError(f"{found}; --time names the column of times, one of {name_list(table.names)}")
    return dates[0]


def _time_axis(table: Table, time: str, date_format: str | None) -> TimeAxis:
    """Returns the axis of a column of times; an error names other columns that may belong to the times."""
    try:
        return infer_axis(read_times(table.column(time), table.lines, date_format), table.lines)
    except DataError as error:
        others = [name for name in table.names if name != time and name.lower() in TIME_COLUMNS]
        if not others:
            raise
        raise DataError(
            f"{error}; times are read from {time!r} only, not from {name_list(others)}; --time names another, or "
            "write date and time into one column"
        ) from None


def _number_columns(
    table: Table, time: str, target: str | None, decimal: str
) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """Returns the columns to forecast by name, ``(N,)`` each, and names of the others, each with a reason."""
    if target is None:
        names = [name for name in table.names if name != time]
    else:
        names = [target] if target in table.names else [name.strip() for name in target.split(",")]
        for name in names:
            if name not in table.names or name == time:
                others = name_list([column for column in table.names if column != time])
                raise DataError(f"--target {name}: no such column of numbers, expected some of {others}")
    columns: dict[str, np.ndarray] = {}
    ignored = []
    for name in names:
        cells = table.column(name)
        numbers = read_numbers(cells, decimal)
        wrong = [n for n, (cell, number) in enumerate(zip(cells, numbers)) if is_wrong(cell, number)]
        counts_rows = len(cells) > 2 and np.array_equal(np.sort(numbers), numbers.min() + np.arange(len(cells)))
        other_decimal = np.isfinite(read_numbers(cells, OTHER_DECIMAL[decimal])).any()
        if target is None and name in table.unnamed:
            ignored.append((name, "which has no name"))
        elif target is None and counts_rows:
            ignored.append((name, "which counts the rows"))
        elif target is None and np.isnan(numbers).all() and not other_decimal:
            ignored.append((name, "which is text" if wrong else "which is empty"))
        elif wrong:
            raise DataError(f"line {table.lines[wrong[0]]}, {name}: {_number_error(cells[wrong[0]], decimal, target)}")
        else:
            columns[name] = numbers
    if target is not None:
        ignored = [(name, "not in --target") for name in table.names if name != time and name not in names]
    if not columns:
        raise DataError(f"no column of numbers beside {time!r}; ignored {name_list([name for name, _ in ignored])}")
    return columns, ignored


def read_numbers(cells: list[str], decimal: str) -> np.ndarray:
    """Returns cells as float64, NaN where a cell is not a number."""
    pattern = re.compile(NUMBER.replace(r"\.", re.escape(decimal)), re.ASCII)
    return np.array(
        [float(cell.replace(decimal, ".")) if pattern.fullmatch(cell) else math.nan for cell in cells], np.float64
    )


def is_wrong(cell: str, number: float) -> bool:
    """Returns whether a cell is neither missing nor a finite number."""
    return not math.isfinite(number) and cell.lower() not in MISSING


def _number_error(cell: str, decimal: str, target: str | None) -> str:
    """Returns the message about a cell that is not a finite number."""
    if re.fullmatch(rf"[+-]?inf(inity)?|{NUMBER}", cell, re.IGNORECASE) and not math.isfinite(float(cell)):
        return f"{cell} is not finite; leave the cell empty if the number is missing"
    other = OTHER_DECIMAL[decimal]
    not_a_number = f"{cell!r} is not a number with the decimal separator {decimal!r}"
    if re.fullmatch(rf"[+-]?[1-9]\d{{0,2}}([{other}]\d{{3}})+([{decimal}]\d*)?", cell):
        return (
            f"{not_a_number}; remove separators of thousands, or pass --decimal {other} if {other!r} is the decimal one"
        )
    if math.isfinite(read_numbers([cell], other)[0]):
        return f"{not_a_number}; --decimal {other} reads it"
    return f"{cell!r} is not a number" + ("; --target chooses columns" if target is None else "")


def _fill_gaps(names: tuple[str, ...], labels: tuple[str, ...], rows: np.ndarray) -> tuple[Series, list[str]]:
    """Returns the series from the first step at which every column has had a number, gaps filled, and notes on them."""
    known = np.isfinite(rows)
    for name, column in zip(names, known.T):
        if not column.any():
            raise DataError(f"{name} has no number")
    first = known.argmax(0)
    start, latest = int(first.max()), names[int(first.argmax())]
    if 2 * start > len(rows):
        raise DataError(f"{latest} has no number before {labels[start]}, most of the file; choose others with --target")
    notes = []
    if start:
        notes.append(f"dropped the steps before {labels[start]}, the first number of {latest!r}: {start:,}")
    rows, known, labels = rows[start:], known[start:], labels[start:]
    last_known = np.maximum.accumulate(np.where(known, np.arange(len(rows))[:, None], 0), axis=0)
    if not known.all():
        empty_steps = int((~known.any(1)).sum())
        notes.append(
            f"gaps: {int((~known).sum()):,} of {known.size:,} numbers, {empty_steps:,} of {len(known):,} steps "
            "entirely; filled with the last number before them, marked in the inputs, never scored"
        )
    return Series(names, labels, np.take_along_axis(rows, last_known, axis=0), known, ()), notes
