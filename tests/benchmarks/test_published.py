"""Our certificates beside the published ones: what the benchmark counts and draws."""

import csv

import numpy as np
import pytest

from benchmarks import published
from benchmarks.published import paired_difference_interval
from src.records.rows import write_rows
from src.reports.plotting import plot_certified_accuracy

# Three images: one certified far, one near, one wrong.
RADII, CORRECT = (0.4, 0.1, 0.3), (1, 1, 0)


def rows(shift=0.0):
    return [
        {"index": 20 * k, "correct": c, "radius": r + shift, "prediction": 1, "p_lower": 0.7}
        | {"radius_tight": r + 0.3}
        for k, (r, c) in enumerate(zip(RADII, CORRECT, strict=True))
    ]


def test_table_counts_what_is_certified_at_each_radius():
    theirs = {"Other": {"acr": "0.1000", "curve": {0.0: 1.0, 0.2: 0.5}}}
    header, _, other, ours = published.published_lines(0.25, {"here": rows()}, theirs).split("\n")
    assert header.split()[3:] == ["3", "images", "ACR", "r=0", "r=0.2", "tightest"]
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


def test_the_ensemble_is_compared_with_its_members_too(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "REFERENCE", tmp_path)
    results = tmp_path / "results"
    (results / "ensemble_0.25").mkdir(parents=True)
    write_rows(results / "smoothing_best_0.25_certificates.csv", rows())
    write_rows(results / "smoothing_best_0.25_seed1_certificates.csv", rows(0.1))
    write_rows(results / "ensemble_0.25" / "certificates_ensemble.csv", rows(0.2))
    peers = tmp_path / "peers.tsv"
    peers.write_text(
        "dataset\tsigma\tmethod\tidx\tlabel\tpredict\tradius\tcorrect\n"
        + "".join(f"mnist\t0.25\tother\t{20 * k}\t0\t0\t0.3\t1\n" for k in range(3))
    )
    found = {(row["ours"], row["method"]): row["mean"] for row in published.differences(peers)}
    # The correct two of three images: 0.45 + 0.15 of the members, 0.6 + 0.3 of the ensemble.
    assert found == {
        ("here, best, 2 seeds", "other"): pytest.approx((0.6 - 0.9) / 3),
        ("here, ensemble", "other"): pytest.approx((0.9 - 0.9) / 3, abs=1e-12),
        ("here, ensemble", "here, best, 2 seeds"): pytest.approx(0.1),
    }


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


def test_paired_interval_covers_the_mean_difference():
    # Coverage of a 90 % interval in 400 draws; below 83 % happens with odds 1e-5 at 90 %, and
    # the bootstrap is allowed a point less.
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        common = rng.exponential(5, 60)
        difference = rng.exponential(0.3, 60)
        mean, low, high = paired_difference_interval(
            common + difference, common, 0.9, resamples=400, seed=seed
        )
        assert mean == pytest.approx(difference.mean())
        covered += low <= 0.3 <= high
    assert 0.82 < covered / 400 < 0.96


def test_paired_interval_is_narrow_where_the_images_vary_together():
    rng = np.random.default_rng(1)
    radius = rng.exponential(1, 500)
    mean, low, high = paired_difference_interval(radius + 0.01, radius)
    assert mean == pytest.approx(0.01)
    assert high - low < 1e-12
    # The closed form of the standard error, for independent columns.
    other = rng.exponential(1, 500)
    _, low, high = paired_difference_interval(radius, other)
    error = np.std(radius - other) / np.sqrt(500)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("pair", [([1.0], [1.0]), ([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2])])
def test_paired_interval_refuses_what_is_not_paired(pair):
    with pytest.raises(ValueError, match="'first' and 'second'"):
        paired_difference_interval(*pair)


def test_rows_of_older_releases_have_their_own_last_column():
    theirs = {"Other": {"acr": "0.1000", "curve": {0.0: 1.0, 0.2: 0.5}}}
    older = [row | {"radius_two_sided": row["radius"] + 0.6} for row in rows()]
    for row in older:
        del row["radius_tight"]
    header, *_, ours = published.published_lines(0.25, {"here": older}, theirs).split("\n")
    assert header.split()[-1] == "two-sided"
    assert ours.split() == ["here", "0.1667", "66.7", "33.3", "0.5667"]


def test_published_curves_are_drawn_beside_the_radii_of_certify_only(monkeypatch):
    figures = []
    monkeypatch.setattr("src.reports.plotting._save", lambda figure, path: figures.append(figure))
    for theirs, end in ((None, 0.7), ({"Other": {0.0: 0.9, 0.2: 0.5}}, 0.4)):
        plot_certified_accuracy({"here": rows()}, "unused.png", published=theirs)
        (line,) = (line for line in figures[-1].axes[0].lines if line.get_label() == "here")
        last = line.get_xdata()[line.get_ydata() > 0].max()
        assert end - 0.01 < last <= end
