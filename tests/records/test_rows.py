"""Result rows on disk."""

import csv
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.certification import certified_radius, lower_confidence_bound, tight_radius
from src.records.rows import (
    COLUMNS,
    OLDER,
    check_rows,
    older_columns,
    read_rows,
    shown_radius,
    verify,
    write_rows,
)
from src.records.twins import text_digest, write_twin

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


def older_row():
    # (sigma / 2)(Phi^-1(p_A) - Phi^-1(p_B)), p_A at alpha / 2 and p_B at alpha / 18.
    n, alpha, top, rival = 1000, 0.001, 800, 150
    p_lower = stats.beta.ppf(alpha, top, n - top + 1)
    low = stats.beta.ppf(alpha / 2, top, n - top + 1)
    high = stats.beta.isf(alpha / 18, rival + 1, n - rival)
    radii = stats.norm.ppf(p_lower), (stats.norm.ppf(low) - stats.norm.ppf(high)) / 2
    values = (0, 7, 7, 1, radii[0], p_lower, top, 100, n, alpha, 1.0, 0, rival, radii[1])
    return dict(zip(OLDER[1], map(str, map(plain, values)), strict=True))


def test_both_tables_of_older_releases_are_still_verified(tmp_path):
    path, both = tmp_path / "rows.csv", older_row()
    alone = {column: both[column] for column in OLDER[0]}
    for row, changed, count in (
        (both, {}, 0),
        (both, {"rival_count": "151"}, 1),
        (both, {"radius_two_sided": "0.9"}, 1),
        (alone, {}, 0),
        (alone, {"radius": "0.9"}, 1),
    ):
        write_rows(path, [row | changed])
        text = path.read_text()
        settings = {"two_sided": True, "n": 1000}
        digest = {"rows": 1, "rows_sha256": text_digest(text)}
        twin = {"settings": settings, "facts": {}, "finished": True}
        write_twin(tmp_path / "rows.json", twin | digest)
        assert len(verify(path)) == count
        assert older_columns(text) == tuple(row)
        assert shown_radius(row) == float(row["radius"])
        # A table that is written now has all columns of today.
        assert check_rows([row], text)


def row_of(top, rival, test, alpha=0.001, distance=0.0):
    """A row at sigma = 0.5 and n = 1000, of class 7."""
    p_lower = lower_confidence_bound(top, 1000, alpha)
    radii = certified_radius(p_lower, 0.5), tight_radius(test, top, rival, 1000, alpha, 0.5)
    radius, tight = (max(r - distance, 0.0) for r in radii)
    stands = p_lower > 0.5 and radius > 0
    radius, tight = (radius, tight) if stands else (0.0, 0.0)
    values = (0, 7, 7 if stands else -1, int(stands), radius, p_lower, top, rival, tight, test)
    values = (*values, 100, 1000, 0.001, 0.5, 0)
    return dict(zip(COLUMNS, map(str, map(plain, values)), strict=True))


def problems_of(row, **settings):
    return check_rows(
        [row], ",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n", COLUMNS, settings
    )


@pytest.mark.parametrize("test", ["one-sided", "two-sided"])
@pytest.mark.parametrize(("top", "rival"), [(800, 150), (1000, 0), (560, 20), (520, 30)])
def test_the_sampler_is_paid_out_of_alpha(top, rival, test):
    row = row_of(top, rival, test, alpha=0.001 - 1e-4)
    assert problems_of(row, sampler_cost=1e-4) == []
    assert problems_of(row) == ["line 2 contradicts itself"]
    assert problems_of(row, sampler_cost=0.001) == ["line 2 contradicts itself"]
    for cost in (-1e-4, math.nan, "1"):
        assert "the sampler_cost of the twin is no number of at least 0" in problems_of(
            row, sampler_cost=cost
        )


@pytest.mark.parametrize("test", ["one-sided", "two-sided"])
@pytest.mark.parametrize("distance", [0.0, 0.03, 0.4])
def test_radii_of_images_off_the_grid_may_be_shorter_but_no_more_than_their_distance(
    test, distance
):
    row = row_of(800, 150, test, distance=distance)
    assert (row["prediction"] == "-1") == (distance == 0.4)
    for farthest in (0.0, 0.02, 0.03, 0.04, 0.5):
        sound = problems_of(row, off_grid=farthest) == []
        assert sound == (farthest >= distance)
    for column in ("radius", "radius_tight"):
        assert problems_of(row | {column: "0.9"}, off_grid=0.04) == ["line 2 contradicts itself"]


def test_users_are_shown_the_tightest_radius():
    row = row_of(800, 150, "two-sided")
    assert shown_radius(row) == float(row["radius_tight"]) > float(row["radius"])


def plain(value):
    return float(value) if isinstance(value, float) else value
