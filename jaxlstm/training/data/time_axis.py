"""Reads the times of a series and infers its step: dates in ISO 8601 and common forms, time zones, or plain numbers."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import numpy as np

from jaxlstm.training.data.text import DataError
from jaxlstm.training.data.time_spelling import Zone, find_zone, iso_labels, spell_offset, spelled_like

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# Forms besides ISO 8601, with blanks for all separators. A year has four digits: the century of two is a guess.
DATE_FORMATS = (
    "%Y %m %d", "%m %d %Y", "%d %m %Y", "%d %b %Y", "%d %B %Y", "%b %d %Y", "%B %d %Y",
    "%Y %m", "%m %Y", "%b %Y", "%B %Y", "%Y %b", "%Y %B",
)  # fmt: skip
CLOCK_OR_HOUR = r"\d:\d\d|\d{4}[-/. ]?\d\d?[-/. ]?\d\d?[T ]\d"  # hours without minutes follow a date of ISO 8601
ZONE = rf"^(.*(?:{CLOCK_OR_HOUR}).*?)\s*((?i:Z|UTC|GMT)|[+-]\d\d?(?::?\d\d)?)$"
CLOCK = r"^(.*?)(?:[\sT,]+(\d{1,2}):(\d\d)(?::(\d\d(?:\.\d+)?))?\s*([AaPp][Mm])?)?$"
DAY = np.timedelta64(1, "D")
DURATIONS = {"week": 604_800_000_000, "day": 86_400_000_000, "hour": 3_600_000_000, "minute": 60_000_000,
             "second": 1_000_000, "microsecond": 1}  # fmt: skip


class Times(NamedTuple):
    """The times of N rows."""

    values: np.ndarray  # (N,) datetime64[us], or float64 for plain numbers
    to_clock: Callable[[np.ndarray], np.ndarray]  # times like ``values`` -> local times
    spell: Callable[[np.ndarray], list[str]]  # times like ``values`` -> cells as in the file


class TimeAxis(NamedTuple):
    """The evenly spaced times of a series of N rows, T steps from the first to the last of them."""

    order: np.ndarray  # (N,) int: the rows in order of time
    positions: np.ndarray  # (N,) int: the step of each row in this order, from 0; a missing row leaves one out
    labels: tuple[str, ...]  # (T,)
    step: str  # such as "1 week"
    at: Callable[[np.ndarray], np.ndarray]  # steps from 0, also past the last row -> times
    label: Callable[[np.ndarray], tuple[str, ...]]  # times -> labels


def read_times(cells: Sequence[str], lines: Sequence[int], date_format: str | None = None) -> Times:
    """Returns times as ``datetime64[us]``, or as float64 if they are plain numbers.

    Numbers of eight or six digits that are all dates ``YYYYMMDD`` or ``YYYYMM`` are dates. Times with one offset from
    UTC remain local times. With several, as where the clock changes, they remain local times if all are at the same
    hour, and become UTC otherwise.

    Args:
      cells: the times as spelled in the file, ``(N,)``.
      lines: their lines in the file, ``(N,)``, for error messages.
      date_format: format of the dates, in the codes of ``strptime``. None recognizes the form.

    Raises:
      DataError: if a cell is no time, or day and month cannot be told apart.
    """
    import pandas as pd

    text = pd.Series(list(cells), dtype=str)
    for line, cell in zip(lines, cells):
        if not cell:
            raise DataError(f"line {line} has no time")
    if date_format is not None:
        return _read_format(cells, lines, date_format)
    if text.str.fullmatch(NUMBER).all():
        for form, digits in (("%Y%m%d", 8), ("%Y%m", 6)):
            dates = to_dates(text, form)
            if text.str.fullmatch(rf"\d{{{digits}}}").all() and not np.isnat(dates).any():
                return _local_times(cells, dates)
        numbers = text.astype(float).to_numpy()
        if not np.isfinite(numbers).all():
            raise DataError(f"line {lines[int(np.argmin(np.isfinite(numbers)))]}: the time is not finite")
        return Times(numbers, lambda times: times, lambda times: [f"{time:.12g}" for time in times])
    zoned = text.str.extract(ZONE)
    has_zone = zoned[1].notna().to_numpy()
    if not has_zone.any():
        return _local_times(cells, _read_dates(text, cells, lines))
    if not has_zone.all():
        row = int(np.argmax(has_zone != has_zone[0]))
        without, other = (row, 0) if has_zone[0] else (0, row)
        raise DataError(f"line {lines[without]}: {cells[without]!r} has no time zone, line {lines[other]} has one")
    local = _read_dates(zoned[0], cells, lines)
    minutes = zoned[1].map({zone: offset_from_utc(zone) for zone in set(zoned[1])}).to_numpy().astype(int)
    values, zone = _zone(local, minutes)
    dates = zoned[0].tolist()
    endings = {cell[len(date) :] for cell, date in zip(cells, dates)}  # such as "+01:00"

    def spell(times: np.ndarray) -> list[str]:
        texts = spelled_like(dates, local)(zone.to_clock(times))
        if len(endings) == 1:
            return [text + next(iter(endings)) for text in texts]
        return [
            text + spell_offset(offset, cells[0][len(dates[0]) :]) for text, offset in zip(texts, zone.offsets(times))
        ]

    return Times(values, zone.to_clock, spell)


def _local_times(cells: Sequence[str], local: np.ndarray) -> Times:
    """Returns times without time zone."""
    return Times(local, lambda times: times, lambda times: spelled_like(cells, local)(times))


def _zone(local: np.ndarray, minutes: np.ndarray) -> tuple[np.ndarray, Zone]:
    """Returns times with offsets from UTC, local or in UTC as `read_times` describes, and their zone."""
    clock, utc = local - local.astype("M8[D]"), local - minutes.astype("m8[m]")
    changes = bool((minutes != minutes[0]).any())
    is_utc = changes and bool((clock != clock[0]).any())
    return utc if is_utc else local, Zone(minutes, is_utc, find_zone(utc, minutes) if changes else None)


def _read_format(cells: Sequence[str], lines: Sequence[int], date_format: str) -> Times:
    """Returns the dates in a format of ``strptime``."""
    if "%" not in date_format:
        raise DataError(f"--date-format {date_format}: expected codes of strptime, such as %d.%m.%Y or %m/%d/%Y")
    try:
        datetime.strptime(datetime(2020, 1, 6, tzinfo=UTC).strftime(date_format), date_format)
    except (ValueError, re.error) as error:  # the format, not a date, is wrong
        raise DataError(f"--date-format {date_format}: {error}") from None

    def parse(cell: str) -> datetime | None:
        try:
            return datetime.strptime(cell, date_format)
        except ValueError:
            return None

    dates = [parse(cell) for cell in cells]
    local = np.array([date and date.replace(tzinfo=None) for date in dates], "M8[us]")
    _check_dates(local, cells, lines, f"--date-format {date_format}")
    offsets = [(date and date.utcoffset()) or timedelta(0) for date in dates]
    values, zone = _zone(local, np.array([round(offset.total_seconds() / 60) for offset in offsets]))

    def spell(times: np.ndarray) -> list[str]:
        clock = zip(zone.to_clock(times).astype("M8[us]").tolist(), zone.offsets(times))
        zoned = (time.replace(tzinfo=None if n is None else timezone(timedelta(minutes=n))) for time, n in clock)
        return [time.strftime(date_format) for time in zoned]

    return Times(values, zone.to_clock, spell)


def offset_from_utc(zone: str) -> int:
    """Returns the minutes of an offset such as ``+01:00``; 0 for the names of UTC."""
    match = re.fullmatch(r"([+-])(\d\d?):?(\d\d)?", zone)
    return 0 if match is None else int(match[1] + "1") * (60 * int(match[2]) + int(match[3] or 0))


def to_dates(text: Any, date_format: str) -> np.ndarray:
    """Returns a ``pandas.Series`` of dates in one format as ``datetime64[us]``, NaT where a cell is none."""
    import pandas as pd

    text = text.where(text.str.contains(r"\d", na=False))  # pandas takes "now" and "today" for the current time
    return pd.to_datetime(text, format=date_format, errors="coerce", utc=True).dt.tz_localize(None).to_numpy("M8[us]")


def is_date(cell: str) -> bool:
    """Returns whether a cell is a date in a form that `read_times` recognizes; day and month may be in either order."""
    import pandas as pd

    text = pd.Series([cell], dtype=str)
    local = text.str.extract(ZONE)[0].fillna(text)
    return any(not np.isnat(times).any() for times in _date_candidates(local).values())


def _date_candidates(text: Any) -> dict[str, np.ndarray]:
    """Returns a ``pandas.Series`` of dates without time zone as ``datetime64[us]``, by form; NaT where a form fails.

    ISO 8601 is the only candidate if it fits all cells.
    """
    quarters = text.str.replace(r"^(\d{4})[- ]?Q([1-4])$", lambda m: f"{m[1]}-{3 * int(m[2]) - 2:02}", regex=True)
    dates = to_dates(quarters, "ISO8601")
    if not np.isnat(dates).any():
        return {"ISO8601": dates}
    parts = text.str.extract(CLOCK)
    days = parts[0].str.replace(r"[\s,./-]+", " ", regex=True).str.strip()
    begins = [form for form in DATE_FORMATS if not np.isnat(to_dates(days[:2], form)).all()]
    return {"ISO8601": dates} | {form: to_dates(days, form) + _time_of_day(parts) for form in begins}


def _read_dates(text: Any, cells: Sequence[str], lines: Sequence[int]) -> np.ndarray:
    """Returns the dates in the only form that fits all cells."""
    candidates = _date_candidates(text)
    fitting = [times for times in candidates.values() if not np.isnat(times).any()]
    if not fitting:
        best = min(candidates.values(), key=lambda times: np.isnat(times).sum())
        is_number = text.str.fullmatch(NUMBER).to_numpy()
        if is_number.sum() > (~np.isnat(best)).sum():
            row, example = int(np.argmin(is_number)), int(np.argmax(is_number))
            raise DataError(
                f"line {lines[row]}: {cells[row]!r} is not a number like {cells[example]!r} of line {lines[example]}"
            )
        _check_dates(best, cells, lines, "ISO 8601 or a common form; --date-format describes others, such as %d.%m.%y")
    for other in fitting[1:]:
        differs = fitting[0] != other
        if differs.any():
            row = int(np.argmax(differs))
            raise DataError(
                f"line {lines[row]}: {cells[row]!r} has day and month in an order that the file does not tell; "
                "--date-format tells it, such as %d/%m/%Y or %m/%d/%Y"
            )
    return fitting[0]


def _time_of_day(parts: Any) -> np.ndarray:
    """Returns the times in the groups of `CLOCK`, a ``pandas.DataFrame``, as ``timedelta64[us]``; NaT if impossible."""
    hours, minutes, seconds = (parts[n].fillna("0").astype(float).to_numpy() for n in (1, 2, 3))
    half = parts[4].fillna("").str.lower().to_numpy()
    valid = (hours < 24) & (minutes < 60) & (seconds < 60) & ((half == "") | ((hours >= 1) & (hours <= 12)))
    hours = np.where(half == "", hours, hours % 12 + 12 * (half == "pm"))
    microseconds = np.rint(1e6 * (3600 * hours + 60 * minutes + seconds)).astype("m8[us]")
    return np.where(valid, microseconds, np.timedelta64("NaT", "us"))


def _check_dates(times: np.ndarray, cells: Sequence[str], lines: Sequence[int], expected: str) -> None:
    """Raises an error that names the first line without a date, and a line with one."""
    missing = np.isnat(times)
    if missing.any():
        row, example = int(np.argmax(missing)), int(np.argmin(missing))
        unlike = f"like {cells[example]!r} of line {lines[example]}" if not missing.all() else f"in {expected}"
        raise DataError(f"line {lines[row]}: {cells[row]!r} is not a date {unlike}")


def infer_axis(times: np.ndarray, lines: Sequence[int]) -> TimeAxis:
    """Returns the axis of evenly spaced times; missing rows leave out steps.

    The step is the median of the differences: whole months, business days (no row on a weekend), or a duration.

    Args:
      times: times of the rows in the order of the file, ``(N,)``, from `read_times`.
      lines: their lines in the file, for error messages.

    Raises:
      DataError: if two rows have the same time, a row is not a whole number of steps after another, or more than half
        of the rows are missing. The message names the first such line.
    """
    if len(times) < 3:
        raise DataError(f"{len(times)} rows are too few to infer the step of time, expected 3 or more")
    label = _labels(times)
    _, first, inverse = np.unique(times, return_index=True, return_inverse=True)
    first = first[inverse]  # (N,) first row with the same time
    if (repeated := np.flatnonzero(first != np.arange(len(times)))).size:
        row = int(repeated[0])
        raise DataError(
            f"line {lines[row]} has the time of line {lines[int(first[row])]}, {label(times[[row]])[0]}; expected one "
            "row per time: of several series, --series names the column that tells them apart; "
            "of an hour that the clock repeats, times need an offset such as +01:00"
        )
    order = np.argsort(times)
    times = times[order]
    count, unit = _count_units(times)
    differences = np.diff(count)
    step = np.sort(differences)[(len(differences) - 1) // 2]
    steps = differences / step
    tolerance = 0.01 if unit == "" else 0.0  # numbers are rounded in the file, such as thirds
    off_step = ~(np.abs(steps - np.rint(steps)) <= tolerance) | (steps < 0.5)

    def error(row: int, text: str) -> DataError:
        now, before = label(times[[row, row - 1]])
        return DataError(f"line {lines[order[row]]}: {now} after {before} of line {lines[order[row - 1]]} {text}")

    if off_step.any():
        raise error(int(np.argmax(off_step)) + 1, f"is not a whole number of steps of {_quantity(step, unit)}")
    if steps.sum() + 1 > 2 * len(times):
        row = int(np.argmax(steps)) + 1
        raise error(
            row, f"leaves out {steps[row - 1] - 1:,.0f} steps of {_quantity(step, unit)}; most rows are missing"
        )
    positions = np.concatenate([[0], np.cumsum(np.rint(steps).astype(int))])
    last = int(positions[-1])
    mean_step = (count[-1] - count[0]) / last if unit == "" else step
    decimals = next((n for n in range(13) if unit == "" and (np.round(times, n) == times).all()), 12)

    def at(steps: np.ndarray) -> np.ndarray:
        inside = np.interp(steps, positions, count)
        counts = np.where(steps > last, count[-1] + (steps - last) * mean_step, inside)
        return np.round(counts, decimals) if unit == "" else _times_at(np.rint(counts).astype(int), unit, times)

    return TimeAxis(order, positions, label(at(np.arange(last + 1))), _quantity(step, unit), at, label)


def _count_units(times: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns sorted times as a count of the longest calendar unit that fits all, and its name, "" for numbers."""
    if times.dtype == np.float64:
        return times, ""
    days, months = times.astype("M8[D]"), times.astype("M8[M]")
    clock = times - days
    if (clock == clock[0]).all():
        if (days == _days_of_months(months, _day_of_month(days))).all():
            return months.astype(int), "month"
        num_days, weekdays = np.diff(days).astype(int), (days.astype(int) + 3) % 7  # Monday is 0
        if num_days.min() == 1 and num_days.sum() >= 7 and weekdays.max() < 5:
            return np.busday_count(days[0], days), "business day"
    return times.astype("M8[us]").astype(int), "microsecond"


def _day_of_month(days: np.ndarray) -> int:
    """Returns the day of the month, from 1, that all dates may have: 31 if each is the last day of its month."""
    is_last_day = (days + DAY).astype("M8[M]") != days.astype("M8[M]")
    return 31 if is_last_day.all() else int((days - days.astype("M8[M]").astype("M8[D]")).astype(int).max()) + 1


def _days_of_months(months: np.ndarray, day: int) -> np.ndarray:
    """Returns the given day of each month, or its last day if it is shorter, datetime64[D]."""
    last = (months + np.timedelta64(1, "M")).astype("M8[D]") - DAY
    return np.minimum(months.astype("M8[D]") + np.timedelta64(day - 1, "D"), last)


def _times_at(count: np.ndarray, unit: str, times: np.ndarray) -> np.ndarray:
    """Returns the times with the given counts of units, as `_count_units` gives them for ``times``."""
    if unit == "microsecond":
        return count.astype("M8[us]")
    days = times.astype("M8[D]")
    if unit == "business day":
        dates = np.busday_offset(days[0], count)
    else:
        dates = _days_of_months(count.astype("M8[M]"), _day_of_month(days))
    return dates + (times[0] - days[0])


def _quantity(count: Any, unit: str) -> str:
    """Returns a step in words: ``1 week``, ``3 months``, or a number."""
    if unit == "":
        return f"{count:.6g}"
    if unit == "microsecond":
        unit = next(name for name, length in DURATIONS.items() if count % length == 0)
        count //= DURATIONS[unit]
    return f"{count:,} {unit}{'s' if count != 1 else ''}"


def _labels(times: np.ndarray) -> Callable[[np.ndarray], tuple[str, ...]]:
    """Returns a function that spells times as precisely as ``times`` need it."""
    if times.dtype == np.float64:
        return lambda values: tuple(f"{value:.12g}" for value in values)
    spell = iso_labels(times)
    return lambda values: tuple(spell(values))
