"""The numbers in the README are those of the committed rows."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import autoattack, cures, published, robust_models, strongest, worst_case
from src.certification.intervals import average_certified_radius
from src.checkpoints import load_checkpoint, weights_digest
from src.records.rows import read_rows, verify
from src.reports.comparison import MODELS
from src.reports.tables import attack_comparison, certificate_lines, population_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "reference" / "results"
PUBLISHED = ROOT / "reference" / "published_certificates.csv"
README = (ROOT / "README.md").read_text()


# The default run, and the models of the literature's protocol.
@pytest.fixture(scope="module", params=[RESULTS, RESULTS / "n_100000"], ids=lambda path: path.name)
def comparison(request):
    return request.param


@pytest.fixture(scope="module")
def certificates(comparison):
    return {name: read_rows(comparison / f"certificates_{name}.csv") for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_committed_certificates_verify(comparison, name):
    assert verify(comparison / f"certificates_{name}.csv") == []


def test_attack_table_is_that_of_the_rows(comparison):
    rows = read_rows(comparison / "comparison_attacks.csv")
    numbers = ("epsilon", "accuracy", "low", "high")
    tables = {
        name: [
            row | {key: float(row[key]) for key in numbers}
            for row in rows
            if (row["part"], row["model"]) == ("table", name)
        ]
        for name in MODELS
    }
    assert attack_comparison(tables) in README


def test_certificate_tables_are_those_of_the_rows(certificates):
    radii = [0.25 * step for step in range(7)]
    assert certificate_lines(certificates, radii) in README
    assert population_lines(certificates, radii[2::2]) in README


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_worst_case_of_the_default_run_is_that_of_the_rows(norm):
    rows = read_rows(RESULTS / f"worst_case_{norm}.csv")
    share, interval = worst_case.standing(rows).split(" ", 1)
    right = sum(int(row["square"]) for row in rows)
    assert f"**{share} %** {interval} ({right} of {len(rows)})" in README
    # Of the very model that the tables above it are of.
    twin = json.loads((RESULTS / f"worst_case_{norm}.json").read_text())
    certified = json.loads((RESULTS / "certificates_adversarial.json").read_text())
    assert twin["model_digest"] == certified["settings"]["model_digest"]


@pytest.mark.parametrize(
    ("images", "path"),
    [
        pytest.param(images, path, id=f"{path.stem}-{images}")
        for images, folder in published.FOLDERS.items()
        for path in sorted((ROOT / "reference" / folder).glob("smoothing_*_certificates.csv"))
    ],
)
def test_committed_certificates_beside_the_published_ones_verify(images, path):
    assert verify(path) == []
    rows = read_rows(path)
    # The protocol of the published rows, on the same images.
    assert [int(row["index"]) for row in rows] == list(range(0, 10_000, 10_000 // images))
    assert {(row["n0"], row["n"], row["alpha"]) for row in rows} == {("100", "100000", "0.001")}
    name = path.stem.removesuffix("_certificates")
    model = load_checkpoint(ROOT / f"reference/models/{name}.pt")
    settings = json.loads(path.with_suffix(".json").read_text())["settings"]
    assert settings["model_digest"] == weights_digest(model.state_dict())


@pytest.mark.parametrize(
    ("sigma", "images"), [*((sigma, 500) for sigma in published.SIGMAS), (0.25, 10_000)]
)
def test_tables_beside_the_published_ones_are_those_of_the_rows(sigma, images):
    ours = published.our_rows(sigma, ROOT / "reference" / published.FOLDERS[images])
    assert "here, best" in ours
    assert {len(rows) for rows in ours.values()} == {images}
    others = published.published_curves(sigma, PUBLISHED, images)
    assert published.published_lines(sigma, ours, others) in README


def test_table_of_the_lower_bounds_is_that_of_the_rows():
    assert published.bound_lines(RESULTS) in README


def test_differences_to_the_published_ones_are_those_of_the_rows():
    rows = read_rows(RESULTS / "published_differences.csv")
    assert published.difference_lines(rows) in README
    for row in rows:
        # The mean is the difference of two averages over the same images.
        sigma = float(row["sigma"])
        images = int(row["images"])
        ours = published.our_rows(sigma, ROOT / "reference" / published.FOLDERS[images])
        runs = published.by_recipe(ours)
        own = runs[re.sub(r", \d+ seeds$", "", row["ours"])].values()
        acr = statistics.mean(
            average_certified_radius(
                *([float(r[key]) for r in seed] for key in ("radius", "correct"))
            )
            for seed in own
        )
        others = published.published_curves(sigma, PUBLISHED, images)
        (theirs,) = (
            float(other["acr"])
            for name, other in others.items()
            if plain(name) == plain(row["method"])
        )
        assert float(row["mean"]) == pytest.approx(acr - theirs, abs=1e-4)


def plain(name):
    """The letters of a method's name: two files spell it in two ways."""
    return "".join(letter for letter in name.lower() if letter.isalpha())


def test_figures_of_the_readme_are_there():
    figures = re.findall(r"\]\((reference/figures/[^)]+)\)", README)
    assert figures
    assert all((ROOT / figure).exists() for figure in figures)


def test_tables_of_robust_models_are_those_of_the_rows():
    tables = [robust_models.model_lines(*ball, RESULTS) for ball in (("linf", 0.3), ("l2", 2.0))]
    assert all(table in README for table in tables)
    assert "single step, 3 seeds, mean ± sd" in tables[0]


def test_table_of_the_cures_is_that_of_the_rows():
    assert cures.cure_lines(read_rows(RESULTS / "cures.csv")) in README


@pytest.mark.parametrize("path", sorted(RESULTS.glob("autoattack_*.json")), ids=lambda p: p.stem)
def test_the_referee_judged_the_committed_model(path):
    name = path.stem.removeprefix("autoattack_")
    model = load_checkpoint(ROOT / f"reference/models/{name}.pt")
    judged = json.loads(path.read_text())
    assert judged["digest"] == weights_digest(model.state_dict())
    (ball,) = (
        ball
        for stem, (_, *ball) in robust_models.RECIPES.items()
        if stem == name.partition("_seed")[0]
    )
    assert [judged["norm"], judged["epsilon"]] == ball
    made = json.loads((RESULTS / f"{name}_attacks.json").read_text())
    assert made["commit"] == model.facts["commit"]
    # Any first part of the referee's order is spread over the test set.
    rows = read_rows(path.with_suffix(".csv"))
    assert [int(row["index"]) for row in rows] == autoattack.ORDER[: len(rows)]


def test_table_of_our_attacks_beside_autoattack_is_that_of_the_rows():
    rows = read_rows(RESULTS / "strongest.csv")
    assert strongest.strongest_lines(rows) in README
    # What the README says of them: a tenth of a point more at most, both no more than either.
    for row in rows:
        images, theirs, ours, both = (
            int(row[name]) for name in ("images", "autoattack", "ours", "both")
        )
        assert ours - theirs <= images / 1000
        assert both <= min(ours, theirs)
