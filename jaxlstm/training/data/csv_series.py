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
from jaxlstm.training.data.time_axis import NUMBER, TimeAxis, Times, infer_axis, is_date, read_times

TIME_COLUMNS = ("date", "time", "datetime", "timestamp", "ds")  # names of the column of times
DELIMITERS = ",;\t|"
OTHER_DECIMAL = {".": ",", ",": "."}
MISSING = ("", "na", "n/a", "nan", "null", "none")  # cells without a number, in any case


class Series(NamedTuple):
    """One series of a file, from the first step at which every target has had a number."""

    name: str  # its cell in the column of --series; "" for the only one of a file
    start: int  # its first step on the axis of the file
    values: np.ndarray  # (T, F) float64, targets up to the last number: in a gap, the last number before it
    known: np.ndarray  # (T, F) bool: False in gaps
    future: np.ndarray  # (T', K) float64 with T' >= T, covariates known in the future: NaN in gaps
    static: tuple[str, ...]  # (S,) cells of the columns of --static

    @property
    def end(self) -> int:
        """The step of the axis after the last number."""
        return self.start + len(self.values)


class Panel(NamedTuple):
    """The series of a file on one axis of evenly spaced times."""

    targets: tuple[str, ...]  # (F,) columns to forecast
    future: tuple[str, ...]  # (K,) columns of covariates known in the future
    static: tuple[str, ...]  # (S,) columns that are constant in each series
    series: tuple[Series, ...]  # in order of their first rows
    axis: TimeAxis
    times: Times
    time: str  # column of times
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


def read_panel(
    path: Path,
    *,
    time: str | None = None,
    target: str | Sequence[str] | None = None,
    series: str | None = None,
    future: str | None = None,
    static: str | None = None,
    delimiter: str | None = None,
    decimal: str = ".",
    date_format: str | None = None,
) -> Panel:
    """Returns the series in a CSV file, sorted by time.

    Missing rows and cells become gaps, filled from the past only. Steps before the first number of a target are
    dropped, because nothing can fill them, and a series ends with its last number: later rows have covariates only.

    Args:
      path: a UTF-8 text file.
      time: column of times. None takes a column with a name in `TIME_COLUMNS`, or else the only one of dates.
      target: columns of numbers, separated by commas. None takes all with a name but those that count the rows, and
        those with another role.
      series: column whose cells tell several series apart. None for one series.
      future: columns of numbers known in the future, separated by commas.
      static: columns of numbers or texts that are constant in each series, separated by commas.
      delimiter: separator of cells. None takes the most frequent one of the first line.
      decimal: decimal separator.
      date_format: see `jaxlstm.training.data.time_axis.read_times`.

    Raises:
      DataError: if the file cannot be read, or the rows of a series are not evenly spaced. The message names the first
        offending line.
      ImportError: if pandas is not installed.
    """
    with optional_package("pandas", extra="tasks", purpose="--task forecast"):
        import pandas as _  # noqa: F401
    text = read_text(path)
    try:
        table = read_table(text, delimiter, decimal)
        time = _time_column(table, time)
        future_names, static_names = _listed(table, "future", future), _listed(table, "static", static)
        roles = _roles(table, {time: "time"}, series, future_names, static_names)
        columns, ignored = _number_columns(table, roles, target, decimal)
        covariates = {name: _future_column(table, name, decimal) for name in future_names}
        times, axis, positions = _time_axis(table, time, series, date_format)
        found, notes = _split_series(table, axis, positions, columns, covariates, series, static_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    notes = [
        f"{path.name}: time is {time!r}, {axis.step} per step from {axis.labels[0]} to {axis.labels[-1]}; "
        f"forecasts {name_list(columns)}"
        + ("" if series is None else f" of {len(found):,} series, by {series!r}")
        + (f"; known in the future: {name_list(future_names)}" if future_names else "")
        + (f"; static: {name_list(static_names)}" if static_names else "")
        + "".join(f"; ignores {name!r}, {reason}" for name, reason in ignored[:5]),
        *(
            [f"ignores {len(ignored) - 5:,} more columns: they have no name or no numbers, or count the rows"]
            if len(ignored) > 5
            else []
        ),
        *notes,
    ]
    return Panel(tuple(columns), future_names, static_names, tuple(found), axis, times, time, tuple(notes))


def _split_names(table: Table, names: str) -> list[str]:
    """Returns names separated by commas; the name of a column may have some itself."""
    return [names] if names in table.names else [name.strip() for name in names.split(",")]


def _listed(table: Table, option: str, names: str | None) -> tuple[str, ...]:
    """Returns the columns that an option lists, separated by commas."""
    listed = () if names is None else tuple(_split_names(table, names))
    for name in listed:
        if name not in table.names:
            raise DataError(f"--{option} {name}: no such column, expected some of {name_list(table.names)}")
    return listed


def _roles(
    table: Table, roles: dict[str, str], series: str | None, future: tuple[str, ...], static: tuple[str, ...]
) -> dict[str, str]:
    """Returns the option that names each column that is not to be forecast."""
    if series is not None and series not in table.names:
        raise DataError(f"--series {series}: no such column, expected one of {name_list(table.names)}")
    named = {"series": () if series is None else (series,), "future": future, "static": static}
    for option, names in named.items():
        for name in names:
            if name in roles:
                raise DataError(f"--{option} {name}: the column is taken for --{roles[name]}")
            roles = roles | {name: option}
    return roles


def _future_column(table: Table, name: str, decimal: str) -> np.ndarray:
    """Returns a column of covariates, ``(N,)``, NaN where a cell is empty."""
    cells = table.column(name)
    numbers = read_numbers(cells, decimal)
    for line, cell, number in zip(table.lines, cells, numbers):
        if is_wrong(cell, number):
            raise DataError(f"line {line}, {name}: {_number_error(cell, decimal, name)}")
    return numbers


def _split_series(
    table: Table,
    axis: TimeAxis,
    positions: np.ndarray,
    columns: dict[str, np.ndarray],
    covariates: dict[str, np.ndarray],
    series: str | None,
    static: tuple[str, ...],
) -> tuple[list[Series], list[str]]:
    """Returns the series of a table, and notes on rows and gaps.

    Raises:
      DataError: if the only series cannot be used, or none of several can.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.column(series) if series is not None else [""] * len(table.rows)):
        rows.setdefault(name, []).append(row)
    targets, future = (
        np.stack(list(values.values()), -1) if values else np.zeros((len(positions), 0))
        for values in (columns, covariates)
    )
    fixed = [table.column(name) for name in static]
    found: list[Series] = []
    reasons: list[str] = []
    dropped, later = 0, 0
    for name, members in rows.items():
        of_series = "" if series is None else f"{series} {name!r}: "
        cells = []
        for column, values in zip(static, fixed):
            other = next((row for row in members if values[row] != values[members[0]]), None)
            if other is not None:
                raise DataError(
                    f"line {table.lines[other]}: {of_series}--static {column} changes from {values[members[0]]!r} to "
                    f"{values[other]!r}, expected one value per series"
                )
            cells.append(values[members[0]])
        try:
            one = _make_series(name, tuple(columns), axis, positions[members], targets[members], future[members])
        except DataError as error:
            reasons.append(f"{of_series}{error}")
            continue
        found.append(one._replace(static=tuple(cells)))
        dropped += one.start - int(positions[members].min())
        later += len(one.future) - len(one.values)
    if not found:
        raise DataError(reasons[0])
    notes = [f"leaves out {len(reasons):,} of {len(rows):,} series: {reasons[0]}"] if reasons else []
    if not table.has_header:
        notes.append("the first line is not a header: columns are named by their number")
    if series is None and (np.diff(positions) < 0).any():
        newest_first = bool((np.diff(positions) < 0).all())
        notes.append(f"rows were {'newest first' if newest_first else 'not in order of time'}: sorted by time")
    if dropped and series is None:
        begins = {name: int(positions[np.isfinite(column)].min()) for name, column in columns.items()}
        latest = max(begins, key=lambda name: begins[name])
        notes.append(
            f"dropped the steps before {axis.labels[begins[latest]]}, the first number of {latest!r}: {dropped:,}"
        )
    elif dropped:
        notes.append(f"dropped the steps before the first number of every column of a series: {dropped:,}")
    if later:
        notes.append(f"steps after the last number of a series, which have no number to forecast: {later:,}")
    known = np.concatenate([one.known for one in found])
    if not known.all():
        empty_steps = int((~known.any(1)).sum())
        notes.append(
            f"gaps: {int((~known).sum()):,} of {known.size:,} numbers, {empty_steps:,} of {len(known):,} steps "
            "entirely; filled with the last number before them, marked in the inputs, never scored"
        )
    return found, notes


def _make_series(
    name: str,
    columns: tuple[str, ...],
    axis: TimeAxis,
    positions: np.ndarray,
    targets: np.ndarray,
    future: np.ndarray,
) -> Series:
    """Returns the series in rows at the given steps, gaps filled from the past.

    Raises:
      DataError: if a target has no number, or its first one comes after most of the rows.
    """
    first, steps = int(positions.min()), int(np.ptp(positions)) + 1
    rows, covariates = np.full((steps, targets.shape[1]), np.nan), np.full((steps, future.shape[1]), np.nan)
    rows[positions - first], covariates[positions - first] = targets, future
    known = np.isfinite(rows)
    for column, is_known in zip(columns, known.T):
        if not is_known.any():
            raise DataError(f"{column} has no number")
    begins = known.argmax(0)
    start, latest = int(begins.max()), columns[int(begins.argmax())]
    if 2 * start > steps:
        raise DataError(
            f"{latest} has no number before {axis.labels[first + start]}, most of the file; choose others with --target"
        )
    end = int(np.flatnonzero(known.any(1))[-1]) + 1
    rows, known = rows[start:end], known[start:end]
    last_known = np.maximum.accumulate(np.where(known, np.arange(len(rows))[:, None], 0), axis=0)
    values = np.take_along_axis(rows, last_known, axis=0)
    return Series(name, first + start, values, known, covariates[start:], ())


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


def _time_axis(
    table: Table, time: str, series: str | None, date_format: str | None
) -> tuple[Times, TimeAxis, np.ndarray]:
    """Returns the times of a column, their axis and the step of each row, ``(N,)``.

    Several series share the axis. An error names other columns that may belong to the times.
    """
    try:
        times = read_times(table.column(time), table.lines, date_format)
        if series is None:
            axis = infer_axis(times.values, table.lines)
            positions = np.empty(len(times.values), int)
            positions[axis.order] = axis.positions
            return times, axis, positions
        _, first, inverse = np.unique(times.values, return_index=True, return_inverse=True)
        rows = np.sort(first)
        axis = infer_axis(times.values[rows], [table.lines[row] for row in rows])
        positions = axis.positions[inverse.reshape(-1)]
    except DataError as error:
        others = [name for name in table.names if name != time and name.lower() in TIME_COLUMNS]
        if not others:
            raise
        raise DataError(
            f"{error}; times are read from {time!r} only, not from {name_list(others)}; --time names another, or "
            "write date and time into one column"
        ) from None
    seen: dict[tuple[str, int], int] = {}
    for line, key in zip(table.lines, zip(table.column(series), positions.tolist())):
        if key in seen:
            raise DataError(
                f"line {line} has the time and the {series!r} of line {seen[key]}, {axis.labels[key[1]]} and "
                f"{key[0]!r}; "
                "expected one row per time and series"
            )
        seen[key] = line
    return times, axis, positions


def _number_columns(
    table: Table, roles: dict[str, str], target: str | Sequence[str] | None, decimal: str
) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """Returns the columns to forecast by name, ``(N,)`` each, and names of the others, each with a reason."""
    available = [name for name in table.names if name not in roles]
    if target is None:
        names = available
    else:
        names = _split_names(table, target) if isinstance(target, str) else list(target)
        for name in names:
            if name in roles:
                raise DataError(f"--target {name}: the column is taken for --{roles[name]}")
            if name not in available:
                others = name_list(available)
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
        ignored = [(name, "not in --target") for name in available if name not in names]
    if not columns:
        time = next(iter(roles))
        reasons = "".join(f"; ignores {name!r}, {reason}" for name, reason in ignored[:5])
        raise DataError(f"no column of numbers beside {time!r}{reasons}; --target names the columns to forecast")
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


def _number_error(cell: str, decimal: str, target: str | Sequence[str] | None) -> str:
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
