"""Spells times as the cells of a file do, and finds the time zone of offsets that change."""

import re
import warnings
import zoneinfo
from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Literal, NamedTuple

import numpy as np

# Forms that pandas does not guess; quarters have no code of strftime.
FORMS = ("%Y%m", "%b %Y", "%B %Y", "%Y %b", "%Y %B", "%m/%d/%Y %I:%M %p", "%d/%m/%Y %I:%M %p")
CONTINENTS = ("Europe/", "America/", "Asia/", "Australia/")  # their names are preferred to others with the same clock


class Zone(NamedTuple):
    """Offsets from UTC of the cells of a file."""

    minutes: np.ndarray  # (N,) int: the offsets
    is_utc: bool  # whether the times of the file were converted to UTC, because the offset changes
    zone: zoneinfo.ZoneInfo | None  # with the same offsets at all times of the file; None if there is none

    def to_clock(self, times: np.ndarray) -> np.ndarray:
        """Returns the local times of times in the form of the axis."""
        if not self.is_utc or self.zone is None:
            return times
        import pandas as pd

        local = pd.DatetimeIndex(times).tz_localize("UTC").tz_convert(self.zone).tz_localize(None)
        return local.to_numpy("M8[us]")

    def offsets(self, times: np.ndarray) -> list[int | None]:
        """Returns the offsets in minutes of times in the form of the axis; None where they are not known."""
        if (self.minutes == self.minutes[0]).all():
            return [int(self.minutes[0])] * len(times)
        if self.is_utc:
            return (self.to_clock(times) - times).astype("m8[m]").astype(int).tolist()
        if self.zone is None:
            return [None] * len(times)
        clock = [time.replace(tzinfo=self.zone) for time in times.astype("M8[us]").tolist()]
        return [round(time.utcoffset().total_seconds() / 60) for time in clock]


def spell_offset(minutes: int | None, like: str) -> str:
    """Returns an offset in minutes, spelled like another one: ``+01:00``, ``+0100`` or ``+01``, blanks included."""
    if minutes is None:
        return ""
    blanks = like[: len(like) - len(like.lstrip())]
    sign, hours = "-" if minutes < 0 else "+", abs(minutes) // 60
    separator = ":" if ":" in like else ""
    is_short = not separator and len(like.strip()) <= 3 and minutes % 60 == 0
    return f"{blanks}{sign}{hours:02}" + ("" if is_short else f"{separator}{abs(minutes) % 60:02}")


def find_zone(utc: np.ndarray, minutes: np.ndarray) -> zoneinfo.ZoneInfo | None:
    """Returns a time zone with these offsets at all of these times; None if there is none.

    The offsets of one winter and summer fit many zones, such as all of Central Europe. They have the same clock.

    Args:
      utc: times, datetime64 ``(N,)``.
      minutes: their offsets from UTC, ``(N,)``.
    """
    import pandas as pd

    order = np.argsort(utc)
    utc, minutes = utc[order], minutes[order]
    changes = np.flatnonzero(np.diff(minutes))
    few = np.unique(np.concatenate([[0, len(utc) - 1], changes, changes + 1]))
    sample = [(time.replace(tzinfo=UTC), int(offset)) for time, offset in zip(utc[few].tolist(), minutes[few])]
    index = pd.DatetimeIndex(utc).tz_localize("UTC")
    names = zoneinfo.available_timezones()
    for name in sorted(names, key=lambda name: (not name.startswith(CONTINENTS), CONTINENTS[0] not in name, name)):
        zone = zoneinfo.ZoneInfo(name)
        if all(time.astimezone(zone).utcoffset().total_seconds() == 60 * offset for time, offset in sample):
            local = index.tz_convert(zone).tz_localize(None).to_numpy("M8[us]")
            if ((local - utc).astype("m8[m]").astype(int) == minutes).all():
                return zone
    return None


def spelled_like(cells: Sequence[str], times: np.ndarray) -> Callable[[np.ndarray], list[str]]:
    """Returns a function that spells dates as all of the cells do, or in ISO 8601 if it finds no form for all.

    Args:
      cells: dates without offsets, ``(N,)``.
      times: the same dates, datetime64 ``(N,)``.
    """
    import pandas as pd
    from pandas.tseries.api import guess_datetime_format

    def spell(form: str) -> Callable[[np.ndarray], list[str]]:
        return lambda values: pd.Series(values.astype("M8[us]")).dt.strftime(form).tolist()

    def quarters(values: np.ndarray) -> list[str]:
        blank = re.sub(r"[\dQ]", "", cells[0])
        return [f"{time.year}{blank}Q{(time.month + 2) // 3}" for time in values.tolist()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the order of day and month is checked below
        guesses = [guess_datetime_format(cells[0], dayfirst=dayfirst) for dayfirst in (False, True)]
    expected = [_without_leading_zeros(cell) for cell in cells]
    for form in (*map(spell, filter(None, (*guesses, *FORMS))), quarters):
        if [_without_leading_zeros(text) for text in form(times)] == expected:
            return form
    return iso_labels(times)


def _without_leading_zeros(text: str) -> str:
    """Returns text with ``01/02`` written ``1/2``, in small letters, and without zeros that end a fraction."""
    text = re.sub(r"(\.\d+?)0+$", r"\1", text)
    return re.sub(r"(?<!\d)0(\d)(?!\d{2,})", r"\1", text).lower()


def iso_labels(times: np.ndarray) -> Callable[[np.ndarray], list[str]]:
    """Returns a function that spells dates in ISO 8601 as precisely as ``times`` need it."""
    unit: Literal["us", "s", "m", "D"] = "us"
    shorter: Literal["s", "m", "D"]
    for shorter in ("s", "m", "D"):
        if (times.astype(f"M8[{shorter}]") == times).all():
            unit = shorter
    return lambda values: np.datetime_as_string(values, unit=unit, casting="unsafe").tolist()
