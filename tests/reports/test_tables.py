"""Tables: the summary of certificates, and columns that line up."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from src.certification.intervals import accuracy_interval
from src.records.rows import read_rows, write_rows
from src.reports.tables import (
    WIDEST,
    attack_lines,
    certificate_lines,
    format_table,
    median_lines,
    percent,
    population_lines,
    summarise,
)


def row(radius, correct, prediction=3, p_lower=0.9):
    return {"radius": radius, "correct": correct, "prediction": prediction, "p_lower": p_lower}


# By hand: three right (one of them certified at nothing), two wrong, one abstention.
ROWS = [
    row(0.5, 1, p_lower=0.9),
    row(1.0, 1, p_lower=0.99),
    row(5e-324, 1, p_lower=0.51),
    row(2.0, 0, prediction=4, p_lower=0.999),
    row(0.75, 0, prediction=5, p_lower=0.95),
    row(0.0, 0, prediction=-1, p_lower=0.25),
]


@pytest.mark.parametrize("through_text", [False, True])
def test_summary_of_a_hand_made_example(tmp_path, through_text):
    rows = ROWS
    if through_text:
        write_rows(tmp_path / "rows.csv", ROWS)
        rows = read_rows(tmp_path / "rows.csv")
    radii = (0.0, 5e-324, 0.5, math.nextafter(0.5, 1), 1.0, 1.5)
    summary = summarise(rows, radii)
    assert (summary["images"], summary["abstained"], summary["wrong"]) == (6, 1, 2)
    shares = [summary["certified"][at][0] for at in radii]
    # At its own radius an image still counts; one unit in the last place further, not.
    assert shares == pytest.approx([3 / 6, 3 / 6, 2 / 6, 1 / 6, 1 / 6, 0])
    assert summary["acr"] == pytest.approx((0.5 + 1.0) / 6, rel=1e-15)
    assert summary["mean_p_lower"] == pytest.approx(
        (0.9 + 0.99 + 0.51 + 0.999 + 0.95 + 0.25) / 6, rel=1e-15
    )
    for share, low, high in summary["certified"].values():
        hits = round(6 * share)
        assert low <= share <= high
        # Clopper and Pearson: at each end the count is a 2.5 % surprise.
        assert low == 0 if hits == 0 else binom.sf(hits - 1, 6, low) == pytest.approx(0.025)
        assert high == 1 if hits == 6 else binom.cdf(hits, 6, high) == pytest.approx(0.025)


@pytest.mark.parametrize("seed", range(5))
def test_summary_does_not_depend_on_the_order_and_falls_with_the_radius(seed):
    draw = np.random.default_rng(seed)
    rows = [
        row(float(r), int(c), prediction=int(p))
        for r, c, p in zip(
            draw.exponential(1, 37), draw.integers(0, 2, 37), draw.integers(0, 9, 37), strict=True
        )
    ]
    radii = np.linspace(0, 4, 20)
    summary = summarise(rows, radii)
    shares = [value[0] for value in summary["certified"].values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == sum(line["correct"] for line in rows) / 37
    shuffled = summarise([rows[k] for k in draw.permutation(37)], radii)
    assert shuffled["certified"] == summary["certified"]
    assert shuffled["acr"] == pytest.approx(summary["acr"], rel=1e-14)
    # The area under the curve is the average radius (Zhai et al.).
    fine = np.linspace(0, 12, 4001)
    area = np.mean([value[0] for value in summarise(rows, fine)["certified"].values()]) * 12
    assert area == pytest.approx(summary["acr"], abs=0.01)


@pytest.mark.parametrize("fault", [{"radius": -0.1}, {"radius": math.nan}])
def test_impossible_radii_are_refused(fault):
    with pytest.raises(ValueError, match="'radius'"):
        summarise([ROWS[0], ROWS[1] | fault], (0.5,))


def test_table_columns_line_up():
    text = format_table(("name", "a", "long header"), [("x", "1", "2"), ("longer", "100", "")])
    lines = text.split("\n")
    assert lines == [
        "name      a  long header",
        "------------------------",
        "x         1            2",
        "longer  100",
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.921,), "92.1"),
        ((1.0,), "100.0"),
        ((0.0, 0.0, 0.0369), "0.0 [0.0, 3.7]"),
        ((0.5, 0.4, 0.6), "50.0 [40.0, 60.0]"),
    ],
)
def test_percent(arguments, text):
    assert percent(*arguments) == text


def test_certificate_table_has_a_column_a_model():
    lines = certificate_lines({"first": ROWS, "second": ROWS[:1]}, (0.0, 1.0)).split("\n")
    cells = {line[:28].strip(): line[28:].split() for line in lines}
    assert lines[0].split()[-2:] == ["first", "second"]
    assert cells["images"] == ["6", "1"]
    assert cells["abstentions"] == ["1", "0"]
    assert cells["wrong predictions"] == ["2", "0"]
    # Closed forms: one of one leaves 0.025 <= p; 11.8 to 88.2 is 3 of 6 in any table.
    assert cells["certified % at r = 0"] == ["50.0", "[11.8,", "88.2]", "100.0", "[2.5,", "100.0]"]
    assert cells["certified % at r = 1"] == ["16.7", "[0.4,", "64.1]", "0.0", "[0.0,", "97.5]"]
    assert cells["average certified radius"] == ["0.2500", "0.5000"]
    assert cells["mean p_lower"] == ["0.7665", "0.9000"]


def test_attack_table_names_the_ball():
    rows = [
        {"attack": "none", "norm": "", "epsilon": 0.0, "accuracy": 1.0, "low": 0.9, "high": 1.0},
        {"attack": "PGD-40", "norm": "linf", "epsilon": 0.1, "accuracy": 0.5, "low": 0, "high": 1},
    ]
    lines = attack_lines(rows).split("\n")
    assert lines[2].split() == ["clean", "100.0", "[90.0,", "100.0]"]
    assert lines[3].split() == ["linf", "0.1", "PGD-40", "50.0", "[0.0,", "100.0]"]


def test_median_table_by_hand():
    rows = [{"norm": "linf", "smallest_epsilon": k / 10} for k in range(10)]
    rows += [{"norm": "l2", "smallest_epsilon": str(k)} for k in (1.0, 2.5, np.inf)]
    lines = median_lines({"A": rows}).split("\n")[2:]
    assert lines[0].split() == ["linf,", "median", "0.450", "[0.100,", "0.800]"]
    assert lines[1].split() == ["linf,", "not", "broken", "0", "of", "10"]
    assert lines[2].split() == ["l2,", "median", "2.500", "[-inf,", "inf]"]
    assert lines[3].split() == ["l2,", "not", "broken", "1", "of", "3"]


def test_median_table_is_of_the_worst_known():
    pgd = [{"attack": "PGD, 2 steps", "norm": "l2", "smallest_epsilon": 2.0} for _ in range(9)]
    worst = [row | {"attack": "worst known", "smallest_epsilon": 0.5} for row in pgd]
    for rows, median in ((pgd + worst, "0.500"), (pgd, "2.000")):
        line = median_lines({"A": rows}).split("\n")[2]
        assert line.split()[:3] == ["l2,", "median", median]


def test_population_interval_is_wider_than_sampling_alone():
    # 90 of 100 images certified, 5 more not settled: alpha shifts both ends outwards.
    rows = [
        {"label": 3, "prediction": 3, "correct": 1, "radius": 0.6, "top_count": 990, "n": 1000}
        | {"alpha": 0.01, "sigma": 0.5}
        for _ in range(90)
    ]
    rows += [row | {"radius": 0.49, "top_count": 870} for row in rows[:5]]
    rows += [row | {"prediction": 4, "correct": 0} for row in rows[:5]]
    header, _, line = population_lines({"model": rows}, [0.5]).splitlines()
    assert "CERTIFY" not in header
    # They are about the radii of CERTIFY, whatever else the rows have.
    tighter = [row | {"radius_tight": 0.7} for row in rows]
    header, _, same = population_lines({"model": tighter}, [0.5]).splitlines()
    assert "over images and noise, by CERTIFY" in header
    assert same.split() == line.split()
    low, high = (float(end) for end in line.split("[")[1].rstrip("]").split(", "))
    sampling = accuracy_interval(90, 100)[0], accuracy_interval(95, 100)[1]
    assert low == pytest.approx(100 * (sampling[0] - 0.01) / 0.99, abs=0.06)
    assert high == pytest.approx(min(100 * sampling[1] / 0.99, 100), abs=0.06)


def test_tables_show_the_tightest_radius_and_that_of_certify_below():
    rows = [line | {"radius_tight": line["radius"] + 0.5 * line["correct"]} for line in ROWS]
    lines = certificate_lines({"A": rows}, (1.0,)).split("\n")
    cells = {line[:28].strip(): line[28:].split() for line in lines}
    assert (
        cells["certified % at r = 1"][0]
        == f"{100 * summarise(rows, (1.0,))['certified'][1.0][0]:.1f}"
    )
    tight, plain = summarise(rows, ()), summarise(ROWS, ())
    assert tight["acr"] == pytest.approx(plain["acr"] + 0.25)
    assert cells["average certified radius"] == [f"{tight['acr']:.4f}"]
    assert cells["the same by CERTIFY"] == [f"{plain['acr']:.4f}"]
    assert summarise(rows, (), "radius")["acr"] == plain["acr"]
    # Rows of older releases have one radius.
    assert "the same by CERTIFY" not in certificate_lines({"A": rows, "B": ROWS}, (1.0,))


def test_many_columns_go_into_several_tables():
    names = [f"a model with the name {k}" for k in "abcdefghijkl"]
    rows = [("first", *map(str, range(12))), ("second", *map(str, range(12, 24)))]
    tables = format_table(("", *names), rows).split("\n\n")
    assert len(tables) > 1
    assert max(map(len, "\n".join(tables).splitlines())) <= WIDEST
    header, _, first, second = zip(*(table.splitlines() for table in tables), strict=True)
    assert all(sum(name in line for line in header) == 1 for name in names)
    assert " ".join(line.removeprefix("first") for line in first).split() == list(rows[0][1:])
    assert " ".join(line.removeprefix("second") for line in second).split() == list(rows[1][1:])
