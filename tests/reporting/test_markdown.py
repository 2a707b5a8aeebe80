import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.reporting.markdown import duration, fenced, integer, mebibytes, number, percent, quantity, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (35.48123, "35.48"),
        (421.26, "421.3"),
        (1205.3, "1,205"),
        (123456.7, "123,457"),
        (0.0123456, "0.01235"),
        (-2.5, "-2.500"),
        (9.99996, "10.00"),
        (999.97, "1,000"),
        (3.21e-7, "3.210e-07"),
        (987654321.0, "987,654,321"),
        (-1.2345e9, "-1.234e+09"),
        (6.5e250, "6.500e+250"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@given(st.floats(1e-12, 1e12), st.integers(2, 6))
def test_number_keeps_its_digits(value, digits):
    # Half a unit of the last digit, and the rounding of the decimal text itself.
    assert math.isclose(float(number(value, digits).replace(",", "")), value, rel_tol=0.51 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234e-5, "12.3 µJ"),
        (0.0, "0 J"),
        (2.5, "2.50 J"),
        (6.19e-4, "619 µJ"),
        (4.6e-12, "4.60 pJ"),
        (999.97, "1.00 kJ"),
    ],
)
def test_quantity(value, text):
    assert quantity(value, "J") == text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "0 %"), (1, "100.0 %"), (0.2213, "22.1 %"), (0.0043, "0.43 %"), (0.00002, "0.002 %")]
)
def test_percent(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.36, "8.4 s"), (59.97, "1 min 00 s"), (430.4, "7 min 10 s"), (11100, "3 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_sizes_and_counts():
    assert (mebibytes(300 * 2**20), mebibytes(2.5 * 2**30), integer(163840)) == ("300 MiB", "2.50 GiB", "163,840")


def test_table_drops_columns_without_entries_and_escapes_bars():
    assert table(["", "a", "b"], [["x|y", "", "1"], ["z", "", ""]]) == [
        "|  | b |",
        "| --- | ---: |",
        "| x\\|y | 1 |",
        "| z |  |",
    ]


def test_numbers_are_set_to_the_right_and_words_to_the_left():
    rows = [["1", "helps", "1.5 (1.4 to 1.6)", "-3 %"], ["2", "2 seeds", "not run", ".5"], ["3", "", "2.5", ""]]
    assert table(["n", "verdict", "mean", "change"], rows)[1] == "| --- | --- | ---: | ---: |"


@given(st.text("`a\n", max_size=30))
def test_no_text_ends_its_own_fence(text):
    fence, *inside, end = fenced(text)
    assert fence == end and not any(line.startswith(fence) for line in inside)
    assert "\n".join(inside) == text.rstrip("\n")
