"""Columns, times, steps and gaps of time series read from CSV files."""

import datetime
import types
import zoneinfo

import numpy as np
import pytest

from jaxlstm.training.data.csv_series import read_panel
from jaxlstm.training.data.text import DataError
from jaxlstm.training.tasks.forecast import co2_path


def read_series(path, **options):
    """The only series of a file, with the names and notes of the file."""
    panel = read_panel(path, **options)
    (one,) = panel.series
    dates = panel.axis.labels[one.start : one.end]
    return types.SimpleNamespace(
        names=panel.targets, dates=dates, values=one.values, known=one.known, notes=panel.notes
    )


DAYS = [datetime.date(2020, 1, 1) + datetime.timedelta(n) for n in range(40)]
HOURS = [datetime.datetime(2020, 3, 28, 12, tzinfo=datetime.UTC) + datetime.timedelta(hours=n) for n in range(30)]
MIDNIGHTS = [datetime.datetime(2020, 3, 20 + n, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")) for n in range(12)]
MONTHS = [datetime.date(2019 + n // 12, n % 12 + 1, 1) for n in range(30)]
VALUES = [n * 7 % 11 for n in range(40)]


def rows(times, form="%Y-%m-%d"):
    return [f"{time.strftime(form)},{value}" for time, value in zip(times, VALUES)]


DAILY = rows(DAYS)


@pytest.fixture
def read(tmp_path):
    """Reads the series in the given rows."""

    def read_rows(rows, header="date,a", **options):
        path = tmp_path / "s.csv"
        path.write_text("\n".join([header, *rows] if header else rows) + "\n")
        return read_series(path, **options)

    return read_rows


def test_read_series_prints_the_role_of_each_column(read):
    series = read([f"{n},{row},hot,{n * n % 5}," for n, row in enumerate(DAILY)], ",date,a,sky,b,")
    assert series.names == ("a", "b")
    assert series.notes == (
        "s.csv: time is 'date', 1 day per step from 2020-01-01 to 2020-02-09; forecasts 'a', 'b'; ignores 'column 1', "
        "which has no name; ignores 'sky', which is text; ignores 'column 6', which has no name",
    )
    np.testing.assert_array_equal(series.values[:, 0], VALUES)
    assert series.dates == tuple(map(str, DAYS))
    assert series.known.all()


def test_read_series_of_the_default_data():
    series = read_series(co2_path())
    assert series.values.shape == (2284, 1)
    assert (~series.known).sum() == 59
    assert "1 week per step from 1958-03-29 to 2001-12-29" in series.notes[0]


@pytest.mark.parametrize(
    ("order", "note"),
    [
        (range(40)[::-1], "rows were newest first: sorted by time"),
        (np.random.default_rng(0).permutation(40), "rows were not in order of time: sorted by time"),
    ],
)
def test_read_series_sorts_rows_by_time(read, order, note):
    expected = read(DAILY)
    series = read([DAILY[n] for n in order])
    np.testing.assert_array_equal(series.values, expected.values)
    assert series.dates == expected.dates
    assert series.notes == (*expected.notes, note)


@pytest.mark.parametrize(
    ("cells", "step", "first", "last"),
    [
        (rows(DAYS, "%m/%d/%Y"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS, "%d.%m.%Y"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS, "%Y/%m/%d"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS, "%d %b %Y"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS, "%d-%B-%Y"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS, "%Y%m%d"), "1 day", "2020-01-01", "2020-02-09"),
        (rows(DAYS[::7]), "1 week", "2020-01-01", "2020-02-05"),
        (rows(MONTHS, "%b %Y"), "1 month", "2019-01-01", "2021-06-01"),
        (rows(MONTHS, "%Y-%m"), "1 month", "2019-01-01", "2021-06-01"),
        (rows(MONTHS, "%Y%m"), "1 month", "2019-01-01", "2021-06-01"),
        (rows([day - datetime.timedelta(1) for day in MONTHS]), "1 month", "2018-12-31", "2021-05-31"),
        ([f"{1990 + n // 4}-Q{n % 4 + 1},{n * n % 7}" for n in range(12)], "3 months", "1990-01-01", "1992-10-01"),
        ([f"{1990 + n},{n * n % 7}" for n in range(12)], "1", "1990", "2001"),
        ([f"{n / 3:.3f},{n * n % 7}" for n in range(500)], "0.333", "0", "166.333"),
        ([f"{1577836800 + 60 * n},{n * n % 7}" for n in range(9)], "60", "1577836800", "1577837280"),
        (rows(HOURS, "%m/%d/%Y %I:%M %p"), "1 hour", "2020-03-28T12:00", "2020-03-29T17:00"),
        (rows(HOURS, "%d.%m.%Y %H:%M:%S"), "1 hour", "2020-03-28T12:00", "2020-03-29T17:00"),
        (rows(HOURS, "%Y-%m-%d %H:%M UTC"), "1 hour", "2020-03-28T12:00", "2020-03-29T17:00"),
        (rows(HOURS, "%Y-%m-%dT%H:%M:%SZ"), "1 hour", "2020-03-28T12:00", "2020-03-29T17:00"),
        (rows(HOURS, "%Y-%m-%dT%H:%M+05:30"), "1 hour", "2020-03-28T12:00", "2020-03-29T17:00"),
        (rows([h.astimezone(MIDNIGHTS[0].tzinfo) for h in HOURS], "%Y-%m-%d %H:%M %z"), "1 hour", "2020-03-28T12:00",
         "2020-03-29T17:00"),
        (rows(MIDNIGHTS, "%Y-%m-%dT%H:%M%z"), "1 day", "2020-03-20", "2020-03-31"),
    ],
)  # fmt: skip
def test_read_series_reads_common_forms_of_time(read, cells, step, first, last):
    series = read(cells)
    assert f"time is 'date', {step} per step from {first} to {last};" in series.notes[0]
    assert series.known.all()
    assert len(series.values) == len(cells)


ZONED_FORMS = (
    ("%Y-%m-%dT%H:%M%z", None),
    ("%Y%m%dT%H%M%S%z", None),
    ("%Y-%m-%dT%H:%M%z", "%Y-%m-%dT%H:%M%z"),
    ("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %z %Y"),
)


@pytest.mark.parametrize(("form", "date_format"), ZONED_FORMS)
def test_read_series_keeps_local_times_in_every_form(read, form, date_format):
    zone = datetime.timezone(datetime.timedelta(hours=2))
    weekdays = [datetime.datetime(2020, 1, 6 + n, tzinfo=zone) for n in range(19) if n % 7 < 5]
    series = read(rows(weekdays, form), date_format=date_format)
    assert "time is 'date', 1 business day per step from 2020-01-06 to 2020-01-24;" in series.notes[0]
    assert series.known.all()
    assert read(rows(MIDNIGHTS, form), date_format=date_format).dates[-1] == "2020-03-31"  # the clock changed
    hours = [hour.astimezone(MIDNIGHTS[0].tzinfo) for hour in HOURS]
    assert read(rows(hours, form), date_format=date_format).dates == read(rows(HOURS, "%Y-%m-%dT%H:%M")).dates


@pytest.mark.parametrize("time", ["T00+02", " 00+02", "T00:00+2", "T00+2:00", "T0000 +02:00", "T00Z"])
def test_read_series_keeps_local_times_with_short_offsets(read, time):
    assert read([f"2020-01-{n:02}{time},{n * n}" for n in range(6, 11)]).dates[0] == "2020-01-06"


def test_read_series_takes_the_format_of_dates(read):
    assert read(rows(DAYS[:12], "%d.%m.%y"), date_format="%d.%m.%y").dates == tuple(map(str, DAYS[:12]))
    assert read(rows(DAYS[:12], "%d/%m/%Y"), date_format="%d/%m/%Y").dates == tuple(map(str, DAYS[:12]))
    with pytest.raises(DataError, match=r"line 2: '2020-01-01' is not a date in --date-format %d\.%m\.%y"):
        read(DAILY, date_format="%d.%m.%y")
    with pytest.raises(DataError, match="--date-format %Q: 'Q' is a bad directive"):
        read(DAILY, date_format="%Q")
    with pytest.raises(DataError, match="--date-format %Y %Y: redefinition of group name"):
        read(DAILY, date_format="%Y %Y")


@pytest.mark.parametrize("date_format", ["mixed", "ISO8601", ""])
def test_read_series_refuses_a_format_without_codes(read, date_format):
    with pytest.raises(DataError, match=f"--date-format {date_format}: expected codes of strptime, such as %d.%m.%Y"):
        read(rows(DAYS[:12], "%d/%m/%Y"), date_format=date_format)


@pytest.mark.parametrize("word", ["now", "today"])
def test_read_series_takes_no_word_for_the_current_time(read, word):
    assert read(DAILY, f"date,{word}").names == (word,)
    with pytest.raises(DataError, match=f"line 42: '{word}' is not a date like '2020-01-01' of line 2"):
        read([*DAILY, f"{word},1"])
    with pytest.raises(DataError, match=f"line 42: '{word}' is not a date like"):
        read([*DAILY, f"{word},1"], date_format="%Y-%m-%d")


def test_read_series_counts_business_days(read):
    weekdays = [day for day in DAYS if day.weekday() < 5]
    series = read(rows(weekdays))
    assert "1 business day per step" in series.notes[0]
    assert series.known.all()
    weekdays.remove(datetime.date(2020, 1, 20))  # a holiday
    series = read(rows(weekdays))
    assert series.dates[int(np.argmin(series.known))] == "2020-01-20"
    assert "gaps: 1 of 28 numbers, 1 of 28 steps entirely" in series.notes[1]


def test_read_series_labels_a_missing_row_with_its_own_time(read):
    for times in (MONTHS, [day - datetime.timedelta(1) for day in MONTHS], HOURS):
        form = "%Y-%m-%d %H:%M"
        assert read(rows([*times[:3], *times[5:]], form)).dates == read(rows(times, form)).dates


def test_read_series_turns_missing_rows_and_cells_into_gaps_filled_from_the_past(read):
    series = read(
        ["2020-01-01,1,", "2020-01-02,2,5", "2020-01-03,,NA", "2020-01-06,3,nan", "2020-01-07,4,7"], "date,a,b"
    )
    assert series.dates[0] == "2020-01-02"
    np.testing.assert_array_equal(series.values.T, [[2, 2, 2, 2, 3, 4], [5, 5, 5, 5, 5, 7]])
    np.testing.assert_array_equal(series.known.T, [[1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]])
    assert series.notes[1:] == (
        "dropped the steps before 2020-01-02, the first number of 'b': 1",
        "gaps: 7 of 12 numbers, 3 of 6 steps entirely; filled with the last number before them, marked in the inputs, "
        "never scored",
    )


def test_read_series_never_fills_a_gap_from_the_future(read):
    missing = np.random.default_rng(0).random(40) < 0.3
    cells = [f"{day},{'' if gap and n else n * n}" for n, (day, gap) in enumerate(zip(DAYS, missing))]
    whole = read(cells)
    for end in (3, 11, 20, 39):
        other = read([*cells[:end], *(f"{day},999" for day in DAYS[end:])])
        np.testing.assert_array_equal(other.values[:end], whole.values[:end])


def test_read_series_names_columns_of_a_file_without_header_by_number(read):
    series = read(DAILY, header=None)
    assert (series.names, len(series.values)) == (("column 2",), 40)
    assert series.notes[1] == "the first line is not a header: columns are named by their number"
    numbers = read([f"{n},{n * n % 7}" for n in range(9)], header=None, time="column 1")
    assert (numbers.names, len(numbers.values)) == (("column 2",), 9)


def test_read_series_keeps_a_first_row_that_begins_with_a_gap(read):
    series = read([f"{n * n % 7 if n else ''},{row}" for n, row in enumerate(DAILY)], header=None, target="column 3")
    assert (series.dates, series.names) == (tuple(map(str, DAYS)), ("column 3",))
    assert series.notes[1] == "the first line is not a header: columns are named by their number"


def test_read_series_takes_an_unnamed_column_of_dates_for_time(read):
    series = read([f"{row},{n}" for n, row in enumerate(DAILY)], ",0,n")
    assert series.names == ("0",)
    assert "time is 'column 1'" in series.notes[0]
    assert "ignores 'n', which counts the rows" in series.notes[0]


def test_read_series_takes_the_chosen_columns(read):
    cells = [f"{row},{n},{n * n},x" for n, row in enumerate(DAILY)]
    series = read(cells, "from,a,b,c,d", time="from", target="b, a")
    assert series.names == ("b", "a")
    np.testing.assert_array_equal(series.values[:, 0], range(40))
    assert "ignores 'c', not in --target; ignores 'd', not in --target" in series.notes[0]


def test_read_series_reads_other_delimiters_and_decimal_commas(read):
    cells = [row.replace(",", ";") + ",5" for row in DAILY]
    np.testing.assert_array_equal(read(cells, "date;a", decimal=",").values[:, 0], np.array(VALUES) + 0.5)
    for delimiter, option in (("\t", None), ("\t", "\\t"), ("|", None), ("_", "_")):
        series = read([row.replace(",", delimiter) for row in DAILY], f"date{delimiter}a", delimiter=option)
        np.testing.assert_array_equal(series.values[:, 0], VALUES)


def test_read_series_counts_no_delimiters_in_quotes(read):
    cells = [f'"{row}";"{n * n % 7}"'.replace(",", '";"') for n, row in enumerate(DAILY)]
    assert read(cells, '"date";"Price, EUR";"Vol, t, ""net"""').names == ("Price, EUR", 'Vol, t, "net"')


@pytest.mark.parametrize(
    ("decimal", "cell"), [(",", "1.100"), (".", "1,100"), (".", "-12,345,678.9"), (",", "1.100,5")]
)
def test_read_series_tells_of_separators_of_thousands(read, decimal, cell):
    with pytest.raises(DataError, match=r"line 42, a: .* remove separators of thousands, or pass --decimal"):
        read([*(row.replace(",", ";") for row in DAILY), f"2020-02-10;{cell}"], "date;a", decimal=decimal)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "the file has no rows"),
        ("date\nx\n", "expected columns separated by one of .*; got one column: \\['date'\\]"),
        ("date,a\n", "expected rows after the header \\['date', 'a'\\]"),
        ("date,a\n2020-01-01,1\n", "1 rows are too few to infer the step of time"),
        ("date,a\n\n\n2020-01-01,1\nx,one\n", "line 5, a: 'one' is not a number; --target chooses columns"),
        ('date,a\nx,"' + "1" * 200_000, "line 2: field larger than field limit"),
        ('date,a\nx,"1\ny,2\n', "line 2: unexpected end of data"),
        ("date,a\nx,1\ny\n", "line 3 has 1 cells, the first line 2"),
        ("date,a,a\nx,1,2\n", "two columns are named 'a'"),
        ("date,a\nx,\n", "no column of numbers beside 'date'; ignores 'a', which is empty; --target names"),
        ("a,b\n3,5\n4,9\n", "no column of dates; --time names the column of times, one of 'a', 'b'"),
        ("a,b\n2020-01-01,2020-01-01\n", "several columns of dates, 'a', 'b'; --time names"),
        ("date;a\n2020-01-01;1,5\n", "line 2, a: '1,5' is not a number .*; --decimal , reads it"),
        ("date;a\n2020-01-01;0,125\n", "line 2, a: '0,125' is not a number .*; --decimal , reads it"),
        (
            "date,time,a\n2020-01-01,00:00,1\n2020-01-01,01:00,2\n2020-01-02,00:00,4\n",
            "line 3 has the time of line 2, .*; times are read from 'date' only, not from 'time'; --time names another",
        ),
    ],
)
def test_read_series_names_the_fault_of_a_file(tmp_path, content, message):
    path = tmp_path / "s.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_series(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [*r[:5], r[2], *r[5:], r[3]], "line 7 has the time of line 4, 2020-01-03; expected one row"),
        (lambda r: [*r, *r], "line 42 has the time of line 2, 2020-01-01; .*of several series, --series names"),
        (lambda r: [*r[:5], "2020-01-05 12:00,1", *r[5:]],
         "line 7: 2020-01-05T12:00 after 2020-01-05T00:00 of line 6 is not a whole number of steps of 1 day"),
        (lambda r: [*r[:3], "not-a-date-3,1", *r[3:]], "line 5: 'not-a-date-3' is not a date like '2020-01-01'"),
        (lambda r: ["2020-02-30,1", *r], "line 2: '2020-02-30' is not a date like '2020-01-01' of line 3"),
        (lambda r: [f"x{row}" for row in r], "line 2: 'x2020-01-01' is not a date in ISO 8601 or a"),
        (lambda r: rows(DAYS, "%d.%m.%y"), "line 2: '01.01.20' is not a date in ISO 8601 or a common form"),
        (lambda r: [*r[:3], ",1", *r[3:]], "line 5 has no time"),
        (lambda r: [*(f"{n},1" for n in range(20)), "oops,1"], "line 22: 'oops' is not a number like '0' of line 2"),
        (lambda r: ["nan,1", *(f"{n},1" for n in range(20))], "line 2: 'nan' is not a number like '0' of line 3"),
        (lambda r: [*rows(DAYS, "%Y%m%d"), "2020021o,1"], "line 42: '2020021o' is not a date like '20200101'"),
        (lambda r: rows(DAYS[:12], "%d/%m/%Y"), "line 3: '02/01/2020' has day and month in an order that .* not tell"),
        (lambda r: [*rows(HOURS, "%Y-%m-%d %H:%MZ")[:9], "2020-03-28 21:00,1"],
         "line 11: '2020-03-28 21:00' has no time zone, line 2 has one"),
        (lambda r: [*r, "2220-01-01,1"],
         "line 42: 2220-01-01 after 2020-02-09 of line 41 leaves out 73,008 steps of 1 day; most rows are missing"),
        (lambda r: [*r[:4], "2020-01-05,inf", *r[5:]], "line 6, a: inf is not finite"),
        (lambda r: [*r[:4], "2020-01-05,-Infinity", *r[5:]], "line 6, a: -Infinity is not finite"),
        (lambda r: [*r[:4], "2020-01-05,1e999", *r[5:]], "line 6, a: 1e999 is not finite"),
        (lambda r: ["1e999,1", "1e999,2", "1,7"], "line 2: the time is not finite"),
    ],
)  # fmt: skip
def test_read_series_names_the_first_offending_line(read, change, message):
    with pytest.raises(DataError, match=f"s.csv: {message}"):
        read(change(DAILY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "x"}, "--time x: no such column, expected one of 'date', 'a'"),
        ({"target": "a,x"}, "--target x: no such column of numbers, expected some of 'a'"),
        ({"target": "date"}, "--target date: the column is taken for --time"),
        ({"delimiter": "::"}, "--delimiter must be one character, got '::'"),
    ],
)
def test_read_series_refuses_options_that_do_not_fit_the_file(read, options, message):
    with pytest.raises(DataError, match=message):
        read(DAILY, **options)


def test_read_series_refuses_a_column_that_begins_late(read):
    with pytest.raises(DataError, match="b has no number before 2020-01-31, most of the file"):
        read([f"{row},{n if n >= 30 else ''}" for n, row in enumerate(DAILY)], "date,a,b")


def test_read_series_shortens_long_lists_of_columns(read):
    many = [f"{day}," + ",".join(str((n + 1) * k % 13) for k in range(1, 21)) for n, day in enumerate(DAYS)]
    series = read(many, "date," + ",".join(f"c{k}" for k in range(1, 21)))
    assert len(series.names) == 20
    assert series.notes[0].endswith("forecasts 'c1', 'c2', 'c3', 'c4', 'c5' and 15 more")
