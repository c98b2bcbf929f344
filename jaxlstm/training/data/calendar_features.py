"""Features of the calendar: position in the day, the week and the year, known for the future too."""

from typing import Literal

import numpy as np

HARMONICS = 2  # sine and cosine of the position in the day and the year, and of its double


def useful_periods(clock: np.ndarray) -> list[str]:
    """Returns the periods that the times of the training part repeat, and that are longer than two steps.

    Args:
      clock: local times, datetime64 ``(T,)``, or plain numbers, which have no calendar.
    """
    if clock.dtype.kind != "M" or len(clock) < 2:
        return []
    span, step = clock[-1] - clock[0], np.median(np.diff(clock))
    lengths = {"day": np.timedelta64(1, "D"), "week": np.timedelta64(7, "D"), "year": np.timedelta64(365, "D")}
    return [name for name, length in lengths.items() if 2 * length <= span and 2 * step < length]


def calendar_features(clock: np.ndarray, periods: list[str]) -> np.ndarray:
    """Returns the features of local times, float32 ``(T, C)``.

    Day and year have sines and cosines; the week has one feature per weekday.

    Args:
      clock: local times, datetime64 ``(T,)``; plain numbers for no periods.
      periods: ``"day"``, ``"week"`` and ``"year"``, or some of them.
    """
    columns: list[np.ndarray] = []
    for name in periods:
        if name == "week":
            weekday = (clock.astype("M8[D]").astype(int) + 3) % 7  # Monday is 0
            columns += [weekday == n for n in range(7)]
            continue
        unit: Literal["D", "Y"] = "D" if name == "day" else "Y"
        begin = clock.astype(f"M8[{unit}]")
        end = (begin + np.timedelta64(1, unit)).astype("M8[us]")
        position = (clock - begin.astype("M8[us]")) / (end - begin.astype("M8[us]"))
        for n in range(1, HARMONICS + 1):
            columns += [np.sin(2 * np.pi * n * position), np.cos(2 * np.pi * n * position)]
    if not columns:
        return np.zeros((len(clock), 0), np.float32)
    return np.stack(columns, -1).astype(np.float32)
