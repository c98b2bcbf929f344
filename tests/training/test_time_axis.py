"""Times past the end of a file: months, leap days, business days, daylight saving, and their spelling."""

import datetime
import zoneinfo

import numpy as np
import pandas as pd
import pytest

from jaxlstm.training.data.calendar_features import calendar_features, useful_periods
from jaxlstm.training.data.text import DataError
from jaxlstm.training.data.time_axis import infer_axis, read_times

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def continued(cells, steps, date_format=None):
    """The step in words and the cells of the next steps."""
    lines = range(2, len(cells) + 2)
    times = read_times(cells, lines, date_format)
    axis = infer_axis(times.values, lines)
    return axis.step, times.spell(axis.at(len(axis.labels) + np.arange(steps)))


def spelled(index, form="%Y-%m-%d"):
    return index.strftime(form).tolist()


@pytest.mark.parametrize(
    ("freq", "start", "step"),
    [
        ("D", "2024-02-01", "1 day"),  # across a leap day
        ("D", "2023-02-01", "1 day"),
        ("7D", "2023-12-04", "1 week"),
        ("ME", "2023-07-31", "1 month"),
        ("ME", "2022-07-31", "1 month"),  # no leap year
        ("MS", "2023-07-01", "1 month"),
        ("QE", "2022-03-31", "3 months"),
        ("YE", "2015-12-31", "12 months"),
        ("B", "2024-01-30", "1 business day"),
        ("h", "2024-02-28 01:00", "1 hour"),
        ("15min", "2024-12-31 19:00", "15 minutes"),
    ],
)
def test_times_continue_as_pandas_has_them(freq, start, step):
    form = "%Y-%m-%d %H:%M" if freq in ("h", "15min") else "%Y-%m-%d"
    index = pd.date_range(start, periods=60, freq=freq)
    for end in (12, 19, 28):
        assert continued(spelled(index[:end], form), 60 - end) == (step, spelled(index[end:], form))


def test_a_day_of_the_month_that_some_months_lack_is_their_last():
    days = [str(pd.Timestamp(2023, 9, 30) + pd.DateOffset(months=n))[:10] for n in range(20)]
    assert days[5:7] == ["2024-02-29", "2024-03-30"]
    for end in (7, 12):  # with a February in the file, and before the next one
        assert continued(days[:end], 20 - end) == ("1 month", days[end:])


@pytest.mark.parametrize(
    "form",
    [
        "%d.%m.%Y", "%m/%d/%Y", "%Y/%m/%d", "%Y%m%d", "%d %b %Y", "%d-%B-%Y", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M",
        "%m/%d/%Y %I:%M %p",
    ],
)  # fmt: skip
def test_times_are_spelled_as_in_the_file(form):
    index = pd.date_range("2024-01-20", periods=60, freq="D")
    assert continued(spelled(index[:30], form), 30) == ("1 day", spelled(index[30:], form))


@pytest.mark.parametrize(
    ("cells", "date_format", "expected"),
    [
        ([f"{1990 + n // 4}-Q{n % 4 + 1}" for n in range(7)], None, ["1991-Q4", "1992-Q1"]),
        ([f"{1990 + n // 4} Q{n % 4 + 1}" for n in range(7)], None, ["1991 Q4", "1992 Q1"]),
        (["202310", "202311", "202312"], None, ["202401", "202402"]),
        (["Oct 2023", "Nov 2023", "Dec 2023"], None, ["Jan 2024", "Feb 2024"]),
        (["1990", "1991", "1992"], None, ["1993", "1994"]),
        (["0.5", "1", "1.5"], None, ["2", "2.5"]),
        (["30.12.23", "31.12.23", "01.01.24"], "%d.%m.%y", ["02.01.24", "03.01.24"]),
        (["1/30/2024", "1/31/2024", "2/1/2024"], None, ["02/02/2024", "02/03/2024"]),
        (
            ["2024-01-01T00:00Z", "2024-01-01T12:00Z", "2024-01-02T00:00Z"],
            None,
            ["2024-01-02T12:00Z", "2024-01-03T00:00Z"],
        ),
    ],
)
def test_times_continue_in_other_forms(cells, date_format, expected):
    assert continued(cells, 2, date_format)[1] == expected


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M%z", pytest.param("%Y-%m-%d %H:%M:%S %z", marks=pytest.mark.slow)])
@pytest.mark.parametrize("date_format", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("change", "days"), [("2024-03-31", 156), ("2024-10-27", 211)])
def test_hours_continue_across_a_change_of_the_clock(form, date_format, change, days):
    """The file has the change before, so its zone is known; hours are missing or repeated on the clock alone."""
    first = pd.Timestamp(change, tz="UTC") - datetime.timedelta(days=days)
    hours = [time.astimezone(BERLIN).strftime(form) for time in pd.date_range(first, periods=24 * (days + 3), freq="h")]
    cut = 24 * (days - 1) + 12
    step, got = continued(hours[:cut], 48, form if date_format else None)
    assert (step, got) == ("1 hour", hours[cut : cut + 48])


def test_midnights_continue_across_a_change_of_the_clock():
    days = [datetime.datetime(2023, 9, 1, tzinfo=BERLIN) + datetime.timedelta(n) for n in range(240)]
    cells = [day.isoformat() for day in days]
    assert cells[210] == "2024-03-29T00:00:00+01:00"
    step, got = continued(cells[:211], 4)
    assert step == "1 day"
    assert got == ["2024-03-30T00:00:00+01:00", "2024-03-31T00:00:00+01:00", "2024-04-01T00:00:00+02:00",
                   "2024-04-02T00:00:00+02:00"]  # fmt: skip


def test_hours_with_one_offset_keep_it():
    zone = datetime.timezone(datetime.timedelta(hours=-5))
    hours = [time.astimezone(zone).isoformat() for time in pd.date_range("2024-03-09", periods=48, freq="h", tz="UTC")]
    assert continued(hours[:12], 36) == ("1 hour", hours[12:])  # right instants, across the change in New York too


def test_hours_of_no_zone_continue_in_utc():
    """No clock changes by these offsets."""
    cells = ["2024-01-01T10:00+01:00", "2024-01-01T11:07+01:07", "2024-01-01T13:00+02:00"]
    assert continued(cells, 1)[1] == ["2024-01-01T12:00+00:00"]


def test_a_local_hour_that_the_clock_repeats_is_an_error_with_a_remedy():
    cells = ["2024-10-27 01:00", "2024-10-27 02:00", "2024-10-27 02:00", "2024-10-27 03:00"]
    with pytest.raises(DataError, match=r"line 4 has the time of line 3, .* an offset such as \+01:00"):
        continued(cells, 1)


def test_calendar_reads_the_local_clock():
    times = pd.date_range("2024-03-29 23:00", periods=24 * 5, freq="h", tz="UTC")
    cells = [time.astimezone(BERLIN).isoformat() for time in times]
    read = read_times(cells, range(2, len(cells) + 2))
    clock = read.to_clock(read.values)
    np.testing.assert_array_equal(clock, [np.datetime64(cell[:19]) for cell in cells])
    features = calendar_features(clock, ["day", "week"])
    hour = np.array([time.astimezone(BERLIN).hour for time in times])
    np.testing.assert_allclose(features[:, 0], np.sin(2 * np.pi * hour / 24), atol=1e-6)
    np.testing.assert_array_equal(np.argmax(features[:, 4:], -1), [time.astimezone(BERLIN).weekday() for time in times])


def test_calendar_has_the_periods_that_the_training_part_repeats():
    hours = np.arange("2023-01-01", "2023-03-01", dtype="M8[h]").astype("M8[us]")
    assert useful_periods(hours) == ["day", "week"]
    assert useful_periods(hours[:30]) == []
    assert useful_periods(np.arange("2020-01", "2023-01", dtype="M8[M]").astype("M8[us]")) == ["year"]
    assert useful_periods(np.arange("2020-01-01", "2023-01-01", dtype="M8[D]").astype("M8[us]")) == ["week", "year"]
    assert useful_periods(np.arange(1000.0)) == []
    day = np.array(["2024-12-31T12:00"], "M8[us]")
    position = 365.5 / 366  # of a leap year
    np.testing.assert_allclose(calendar_features(day, ["year"])[0, 0], np.sin(2 * np.pi * position), atol=1e-6)
