"""Result rows on disk."""

import csv
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.records.rows import COLUMNS, TWO_SIDED, check_rows, read_rows, write_rows

ROWS = [
    {"radius": 0.5, "correct": 1, "prediction": 3, "p_lower": 0.9},
    {"radius": 5e-324, "correct": 1, "prediction": 3, "p_lower": 0.51},
    {"radius": 0.0, "correct": 0, "prediction": -1, "p_lower": 0.25},
]


@given(
    st.lists(st.tuples(st.integers(), st.floats(), st.text("ab,\"' é")), min_size=1, max_size=20)
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_float_comes_back_from_the_text(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write_rows(path, [dict(zip("abc", value, strict=True)) for value in values])
    back = read_rows(path)
    assert len(back) == len(values)
    for (whole, number, text), line in zip(values, back, strict=True):
        assert (int(line["a"]), line["c"]) == (whole, text)
        # By bits: -0.0 is not 0.0, and a NaN stays one.
        assert np.float64(line["b"]).tobytes() == np.float64(number).tobytes() or (
            math.isnan(number) and math.isnan(float(line["b"]))
        )


@pytest.mark.parametrize("value", [0.1 + 0.2, 5e-324, 1 / 3, 2**-1074, math.nextafter(0.5, 1)])
def test_numpy_floats_are_written_at_full_precision_too(tmp_path, value):
    write_rows(tmp_path / "rows.csv", [{"radius": np.float64(value)}])
    assert (tmp_path / "rows.csv").read_text() == f"radius\n{value!r}\n"


def test_every_value_is_written_under_its_own_column(tmp_path):
    # The same keys in another order are the same row.
    write_rows(tmp_path / "rows.csv", [{"a": 1, "b": 2}, {"b": 2, "a": 1}])
    assert read_rows(tmp_path / "rows.csv") == [{"a": "1", "b": "2"}] * 2


def test_file_has_the_columns_in_order_and_one_line_a_row(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, ROWS)
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "radius,correct,prediction,p_lower"
    assert lines[1] == "0.5,1,3,0.9"
    assert len(lines) == len(ROWS) + 2
    assert lines[-1] == ""
    assert list(csv.reader(lines[:1])) == [list(ROWS[0])]
    # Overwriting with fewer rows leaves nothing of the old ones.
    write_rows(path, ROWS[:2])
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize("bad", [[{"a": 1}, {"b": 2}], []])
def test_rows_that_cannot_be_written_leave_the_old_file(tmp_path, bad):
    path = tmp_path / "rows.csv"
    write_rows(path, [{"a": 0}])
    with pytest.raises((ValueError, IndexError, KeyError)):
        write_rows(path, bad)
    assert read_rows(path) == [{"a": "0"}]
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_missing_rows_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_rows(tmp_path / "absent.csv")


def test_two_sided_columns_are_checked_against_their_counts(tmp_path):
    # (sigma / 2)(Phi^-1(p_A) - Phi^-1(p_B)), p_A at alpha / 2 and p_B at alpha / 18.
    n, alpha, top, rival = 1000, 0.001, 800, 150
    p_lower = stats.beta.ppf(alpha, top, n - top + 1)
    low = stats.beta.ppf(alpha / 2, top, n - top + 1)
    high = stats.beta.isf(alpha / 18, rival + 1, n - rival)
    radii = stats.norm.ppf(p_lower), (stats.norm.ppf(low) - stats.norm.ppf(high)) / 2
    values = (0, 7, 7, 1, radii[0], p_lower, top, 100, n, alpha, 1.0, 0, rival, radii[1])
    row = dict(zip(COLUMNS + TWO_SIDED, map(str, map(plain, values)), strict=True))
    path = tmp_path / "rows.csv"
    for changed, count in (({}, 0), ({"rival_count": "151"}, 1), ({"radius_two_sided": "0.9"}, 1)):
        write_rows(path, [row | changed])
        problems = check_rows([row | changed], path.read_text(), COLUMNS + TWO_SIDED)
        assert len(problems) == count
    # A column that the settings do not announce is no column of the table.
    assert check_rows([row], path.read_text())


def plain(value):
    return float(value) if isinstance(value, float) else value
