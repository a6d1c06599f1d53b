"""Our certificates beside the published ones of the same test images: 500, or all 10,000.

Published certified accuracies are in reference/published_certificates.csv, counted on the images
0, 20, 40, ... and on all of them from the per-image rows that the authors of Consistency (NeurIPS
2020), SmoothMix (NeurIPS 2021) and CAT-RS (AAAI 2023) publish, caps of the radii restored. Prints a
table for each sigma and set of images (ours of all images are in reference/results/all_images), the
distribution of p_A's lower bounds, and draws the 500 to reference/figures/published_<sigma>.png.
The committed certificates of main_compare.py are drawn beside them, to the figures of COMPARISONS.

With --peers, a file of those per-image rows (tab-separated: dataset, sigma, method, idx, label,
predict, radius, correct), it also writes the differences of the average certified radius on the
same images with their bootstrap intervals to reference/results/published_differences.csv: ours
minus the published ones, and the ensemble minus its members.

Run: python -m benchmarks.published
"""

import argparse
import csv
import gzip
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from src.ranges import check_open_unit
from src.records.rows import read_rows, write_rows
from src.records.twins import read_twin
from src.reports.comparison import MODELS, certificates_path
from src.reports.plotting import plot_certified_accuracy
from src.reports.tables import format_table, summarise

REFERENCE = Path("reference")
# Recipe in the file name -> in the tables; "two cores" is the best with fewer epochs.
OURS = {"gaussian": "gaussian", "best": "best", "two_cores": "two cores"}
BEST, ENSEMBLE = "here, best", "here, ensemble"
DRAWN = ("here, gaussian", BEST)
SIGMAS = (0.25, 0.5, 1.0)
# Folder of certificates of so many images.
FOLDERS = {500: Path("results"), 10_000: Path("results/all_images")}
# Figure -> the folder of the certificates of the three models of main_compare.py.
COMPARISONS = {
    "comparison_certified_accuracy": Path("results"),
    "certified_accuracy_n_100000": Path("results/n_100000"),
}
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75)


def our_rows(sigma: float, results: Path) -> dict[str, list[dict]]:
    """The committed certificates at one sigma by the name of their recipe and seed."""
    found = {}
    for kind, recipe in OURS.items():
        for path in sorted(results.glob(f"smoothing_{kind}_{sigma:.2f}*_certificates.csv")):
            seed = path.stem.removesuffix("_certificates").partition("_seed")[2]
            found[f"here, {recipe}" + (f", seed {seed}" if seed else "")] = read_rows(path)
    ensemble = certificates_path(results / f"ensemble_{sigma:.2f}", "ensemble")
    return found | ({ENSEMBLE: read_rows(ensemble)} if ensemble.exists() else {})


def by_recipe(ours: Mapping[str, Sequence[Mapping]]) -> dict[str, dict[str, Sequence[Mapping]]]:
    """Recipe -> the certificates of its seeds by their name; the first seed has the recipe's."""
    recipes: dict[str, dict] = {}
    for name, rows in ours.items():
        recipes.setdefault(name.partition(", seed")[0], {})[name] = rows
    return recipes


def published_curves(sigma: float, path: Path, images: int = 500) -> dict[str, dict]:
    """Method -> its `acr` on so many images and certified accuracy `curve`, {radius: share}."""
    methods: dict[str, dict] = {}
    for row in read_rows(path):
        if (float(row["sigma"]), int(row["images"])) == (sigma, images):
            method = methods.setdefault(row["method"], {"acr": row["acr"], "curve": {}})
            method["curve"][float(row["radius"])] = int(row["certified"]) / int(row["images"])
    return methods


def published_lines(
    sigma: float, ours: Mapping[str, Sequence[Mapping]], published: Mapping[str, Mapping]
) -> str:
    """The table: average radius and certified % at each radius by CERTIFY, our tightest last."""
    radii = list(next(iter(published.values()))["curve"])
    lines = [
        (name, method["acr"], *(f"{100 * share:.1f}" for share in method["curve"].values()), "")
        for name, method in published.items()
    ]
    for recipe, runs in by_recipe(ours).items():
        measured = np.array([_figures(rows, radii) for rows in runs.values()])
        for name, (acr, *shares, tight) in zip(runs, measured, strict=True):
            lines.append((name, f"{acr:.4f}", *(f"{s:.1f}" for s in shares), f"{tight:.4f}"))
        if len(runs) > 1:
            acr, *shares, tight = measured.mean(axis=0)
            averages = (f"{acr:.4f}", *(f"{s:.1f}" for s in shares), f"{tight:.4f}")
            lines.append((f"{recipe}, {len(runs)} seeds, mean", *averages))
            acr, *_, tight = measured.std(axis=0, ddof=1)
            blank = [""] * len(shares)
            lines.append(("  standard deviation", f"{acr:.4f}", *blank, f"{tight:.4f}"))
    rows = next(iter(ours.values()))
    last = "tightest" if "radius_tight" in rows[0] else "two-sided"
    first = f"sigma = {sigma:g}, {len(rows):,} images"
    header = (first, "ACR", *(f"r={at:g}" for at in radii), last)
    return format_table(header, lines)


def _figures(rows: Sequence[Mapping], radii: Sequence[float]) -> list[float]:
    """Average radius and certified % at each radius by CERTIFY; average tightest radius."""
    summary = summarise(rows, radii, "radius")
    # Rows of older releases have another radius from bounds on both sides.
    tight = summarise(rows, (), "radius_tight" if "radius_tight" in rows[0] else "radius_two_sided")
    shares = (100 * share for share, _, _ in summary["certified"].values())
    return [summary["acr"], *shares, tight["acr"]]


def bound_lines(results: Path) -> str:
    """The table of how p_A's lower bounds of the first seeds are distributed, right or not."""
    lines = [
        (
            f"sigma = {sigma:g}, {name}",
            *(f"{value:.4f}" for value in np.quantile(_column(rows, "p_lower"), QUANTILES)),
        )
        for sigma in SIGMAS
        for name, rows in our_rows(sigma, results).items()
        if "seed" not in name
    ]
    header = ("lower bound of p_A", *(f"{100 * quantile:g} % below" for quantile in QUANTILES))
    return format_table(header, lines)


def _column(rows: Iterable[Mapping], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def difference_lines(rows: Iterable[Mapping]) -> str:
    """The table of the paired differences."""
    lines = [
        (
            f"sigma = {float(row['sigma']):g}, {row['ours']}",
            row["method"],
            f"{int(row['images']):,}",
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(float(row[k]) for k in ("mean", "low", "high"))),
        )
        for row in rows
    ]
    header = ("average certified radius", "minus that of", "images", "[95 %, paired]")
    return format_table(header, lines)


def differences(peers: Path) -> list[dict]:
    """Ours minus each published method on the same images, with the bootstrap's interval.

    The ensemble is compared with its members too. Of a recipe with several seeds it is each image's
    mean over them that is compared: the interval is about other images, not about other seeds.
    """
    published: dict[tuple, dict[int, float]] = {}
    with gzip.open(peers, "rt") if peers.suffix == ".gz" else peers.open() as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            if row["dataset"] == "mnist":
                radii = published.setdefault((float(row["sigma"]), row["method"]), {})
                radii[int(row["idx"])] = float(row["radius"]) * int(row["correct"])
    found = []
    for sigma, folder in itertools.product(SIGMAS, FOLDERS.values()):
        recipes = by_recipe(our_rows(sigma, REFERENCE / folder))
        others = {method: radii for (at, method), radii in published.items() if at == sigma}
        for recipe, runs in recipes.items():
            own = radii_of(runs)
            # The plain training is beside the plain one only.
            beside = {"gaussian": others["gaussian"]} if "gaussian" in recipe else dict(others)
            if recipe == ENSEMBLE:
                beside[named(BEST, recipes[BEST])] = radii_of(recipes[BEST])
            for method, theirs in beside.items():
                pairs = [(radius, theirs[index]) for index, radius in own.items()]
                mean, low, high = paired_difference_interval(*zip(*pairs, strict=True))
                row = {"sigma": sigma, "ours": named(recipe, runs), "method": method}
                found.append(row | {"images": len(own), "mean": mean, "low": low, "high": high})
    return sorted(found, key=lambda row: (row["sigma"], row["images"], row["ours"]))


def named(recipe: str, runs: Sequence) -> str:
    """A recipe in the table of differences."""
    return recipe if len(runs) == 1 else f"{recipe}, {len(runs)} seeds"


def radii_of(runs: Mapping[str, Sequence[Mapping]]) -> dict[int, float]:
    """Index of the image -> `mean_radii`, of the seeds of a recipe."""
    indices = [int(row["index"]) for row in next(iter(runs.values()))]
    return dict(zip(indices, mean_radii(runs.values()), strict=True))


def paired_difference_interval(first, second, confidence=0.95, *, resamples=10_000, seed=0):
    """Mean of `first - second`, with its confidence interval: (mean, low, high).

    The percentile bootstrap over images (Efron & Tibshirani, 1993). What is common to both values
    of an image cancels, so it can tell apart two models whose own intervals overlap widely.

    Args:
        first, second: (N,) one value per image, for the same images in the same order, N >= 2.
        confidence: in (0, 1), reached approximately.
        resamples: number of bootstrap samples, drawn with `seed`.
    Raises:
        ValueError: naming the argument that is out of its range.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.ndim != 1 or first.shape != second.shape or first.size < 2:
        raise ValueError("'first' and 'second' must be one-dimensional, alike and of two or more.")
    difference = first - second
    if not np.all(np.isfinite(difference)):
        raise ValueError("'first' and 'second' must hold finite numbers.")
    confidence = float(check_open_unit("confidence", confidence))
    rng = np.random.default_rng(seed)
    # One resample at a time: all of them would take a gigabyte for 10,000 images.
    means = [rng.choice(difference, difference.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(difference.mean()), float(low), float(high)


def mean_radii(runs: Iterable[Sequence[Mapping]]) -> list[float]:
    """Each image's certified radius, 0 where the answer is wrong, averaged over the runs."""
    return [
        float(np.mean([float(row["radius"]) * int(row["correct"]) for row in of_image]))
        for of_image in zip(*runs, strict=True)
    ]


def draw_comparisons() -> None:
    """Draw the certified accuracies of the three models out of their committed rows."""
    for name, folder in COMPARISONS.items():
        paths = [certificates_path(REFERENCE / folder, model) for model in MODELS]
        rows = dict(zip(MODELS, map(read_rows, paths), strict=True))
        first = rows["smoothed"][0]
        plot_certified_accuracy(
            rows,
            REFERENCE / "figures" / f"{name}.png",
            f"Certified accuracy: $\\sigma$ = {float(first['sigma']):g}, "
            f"{len(rows['smoothed'])} test images, n = {int(first['n']):,}",
            clean={
                model: read_twin(path.with_suffix(".json"))["facts"]["clean_accuracy"]
                for model, path in zip(MODELS, paths, strict=True)
            },
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--peers", type=Path, help="the published per-image rows, .tsv or .tsv.gz")
    args = parser.parse_args()
    if args.peers:
        write_rows(REFERENCE / "results" / "published_differences.csv", differences(args.peers))
    for sigma, images in itertools.product(SIGMAS, FOLDERS):
        ours = our_rows(sigma, REFERENCE / FOLDERS[images])
        if not ours:
            continue
        published = published_curves(sigma, REFERENCE / "published_certificates.csv", images)
        print(published_lines(sigma, ours, published) + "\n")
        if images != 500:
            continue  # One figure for each sigma, of the images that every recipe has.
        plot_certified_accuracy(
            {name: rows for name, rows in ours.items() if name in DRAWN},
            REFERENCE / "figures" / f"published_{sigma:.2f}.png",
            f"Certified accuracy, $\\sigma$ = {sigma:g}, 500 test images, n = 100,000",
            published={name: method["curve"] for name, method in published.items()},
        )
    draw_comparisons()
    print(bound_lines(REFERENCE / "results") + "\n")
    path = REFERENCE / "results" / "published_differences.csv"
    if path.exists():
        print(difference_lines(read_rows(path)))


if __name__ == "__main__":
    main()
