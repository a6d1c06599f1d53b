"""Our certificates beside the published ones: what the benchmark counts and draws."""

import csv

import pytest

from benchmarks import published
from src.records.rows import write_rows
from src.reports.plotting import plot_certified_accuracy

# Three images: one certified far, one near, one wrong.
RADII, CORRECT = (0.4, 0.1, 0.3), (1, 1, 0)


def rows(shift=0.0):
    return [
        {"index": 20 * k, "correct": c, "radius": r + shift, "prediction": 1, "p_lower": 0.7}
        | {"radius_two_sided": r + 0.3}
        for k, (r, c) in enumerate(zip(RADII, CORRECT, strict=True))
    ]


def test_table_counts_what_is_certified_at_each_radius():
    theirs = {"Other": {"acr": "0.1000", "curve": {0.0: 1.0, 0.2: 0.5}}}
    header, _, other, ours = published.published_lines(0.25, {"here": rows()}, theirs).split("\n")
    assert header.split()[3:] == ["3", "images", "ACR", "r=0", "r=0.2", "two-sided"]
    assert other.split() == ["Other", "0.1000", "100.0", "50.0"]
    # (0.4 + 0.1) / 3, and with 0.3 more on each of the two correct ones (1.1) / 3.
    assert ours.split() == ["here", "0.1667", "66.7", "33.3", "0.3667"]


def test_seeds_of_a_recipe_are_averaged():
    theirs = {"Other": {"acr": "0.1000", "curve": {0.0: 1.0, 0.2: 0.5}}}
    ours = {"here, best": rows(), "here, best, seed 1": rows(0.15), "here, gaussian": rows()}
    *_, second, mean, deviation, plain = published.published_lines(0.25, ours, theirs).split("\n")
    assert second.split()[-4:] == ["0.2667", "66.7", "66.7", "0.3667"]
    # Means of 0.1667 and 0.2667, of 33.3 and 66.7; deviations of two are their distance / sqrt(2).
    assert mean.split()[-4:] == ["0.2167", "66.7", "50.0", "0.3667"]
    assert deviation.split() == ["standard", "deviation", "0.0707", "0.0000"]
    assert plain.startswith("here, gaussian ")
    # The wrong image counts as 0 in either.
    assert published.mean_radii([rows(), rows(0.15)]) == pytest.approx([0.475, 0.175, 0.0])


def test_bounds_are_counted_from_below(tmp_path):
    bounds = [row | {"p_lower": 0.02 * k} for k, row in enumerate(rows() * 7)]
    write_rows(tmp_path / "smoothing_best_1.00_certificates.csv", bounds)
    header, _, line = published.bound_lines(tmp_path).split("\n")
    assert header.split()[4:10] == ["5", "%", "below", "10", "%", "below"]
    # 21 values 0, 0.02, ..., 0.4, of which the second has a twentieth below it.
    assert line.split()[-5:] == ["0.0200", "0.0400", "0.1000", "0.2000", "0.3000"]


def test_differences_are_paired_by_image(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "REFERENCE", tmp_path)
    (tmp_path / "results").mkdir()
    write_rows(tmp_path / "results" / "smoothing_best_0.25_certificates.csv", rows(0.05))
    peers = tmp_path / "peers.tsv"
    with peers.open("w", newline="") as stream:
        names = ("dataset", "sigma", "method", "idx", "label", "predict", "radius", "correct")
        writer = csv.DictWriter(stream, names, restval=0, delimiter="\t")
        writer.writeheader()
        shared = {"dataset": "mnist", "sigma": 0.25, "method": "other"}
        # In another order, with images that we do not have and of another data set.
        for k in (2, 0, 1):
            radius = {"radius": RADII[k], "correct": CORRECT[k]}
            writer.writerow({**shared, "idx": 20 * k, **radius})
            writer.writerow({**shared, "idx": 20 * k + 1, "radius": 9, "correct": 1})
            writer.writerow({**shared, "dataset": "cifar", "idx": 20 * k, "radius": 9})
    (row,) = published.differences(peers)
    assert (row["ours"], row["method"], row["images"]) == ("here, best", "other", 3)
    assert row["mean"] == pytest.approx(0.1 / 3)
    assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 0.0500001


def test_published_curves_pass_through_their_points(monkeypatch):
    figures = []
    monkeypatch.setattr("src.reports.plotting._save", lambda figure, path: figures.append(figure))
    theirs = {"Other": {0.0: 0.9, 0.2: 0.5}}
    plot_certified_accuracy({"here": rows()}, "unused.png", "title", published=theirs)
    drawn = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert drawn["Other"].get_xydata().tolist() == [[0.0, 0.9], [0.2, 0.5]]
    assert "here" in drawn


def test_published_methods_can_be_told_apart(monkeypatch):
    figures = []
    monkeypatch.setattr("src.reports.plotting._save", lambda figure, path: figures.append(figure))
    names = ["A", "B", "C", "D", "E"]
    theirs = {name: {0.0: 0.9, 0.2: 0.5} for name in names}
    plot_certified_accuracy({"here": rows()}, "unused.png", published=theirs)
    lines = [line for line in figures[0].axes[0].lines if line.get_label() in [*names, "here"]]
    assert len(lines) == 6
    assert len({line.get_color() for line in lines}) == 6
    assert all(line.get_linestyle() != "None" for line in lines)
