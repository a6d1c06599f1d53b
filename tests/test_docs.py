"""What docs/ says is what the committed rows say, and what it names is there.

Tables are printed again from the rows and must stand in the document as they are. For the text,
each `..._words` function below formats the very words that hold a figure; they must stand in the
document, and in the documents of `WORDS` no number may stand outside of them but a setting.
"""

# ruff: noqa: RUF001 -- the documents write sigma, l2 and minus as the papers do.

import importlib
import itertools
import json
import re
import statistics
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri

from benchmarks import (
    autoattack,
    controls,
    cures,
    exact,
    published,
    robust_models,
    strongest,
    worst_case,
)
from src.certification import (
    abstain_p_value,
    accuracy_interval,
    average_certified_radius,
    certified_accuracy,
    lower_confidence_bound,
    maximum_radius,
    minimum_successes,
    minimum_trials,
    required_probability,
    tight_radius,
)
from src.checkpoints import load_checkpoint, weights_digest
from src.methods.adversarial import collapsed_epochs
from src.models import Ensemble
from src.records import read_rows, verify
from src.records.rows import shown_radius
from src.reports.comparison import MODELS
from src.reports.tables import (
    attack_comparison,
    certificate_lines,
    median_lines,
    percent,
    population_lines,
    round_down,
)
from src.robustness.fixed_radii import WORST_KNOWN, multi_step_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "reference" / "results"
LARGE = RESULTS / "n_100000"
PUBLISHED = ROOT / "reference" / "published_certificates.csv"
MODEL_FILES = list((ROOT / "reference" / "models").glob("*.pt"))
DOCUMENTS = ["README.md", "reference/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


@cache
def document(name):
    return (ROOT / name).read_text()


def missing(name, *words):
    """Which of `words` do not stand in a document, whatever its line breaks (README.md too)."""
    text = " ".join(document(name).split())
    return [phrase for phrase in words if " ".join(phrase.split()) not in text]


@cache
def rows_of(path):
    return read_rows(RESULTS / path)


def twin(path):
    return json.loads((RESULTS / f"{path}.json").read_text())


# Tables


def attack_table(folder):
    rows = rows_of(folder / "comparison_attacks.csv")
    numbers = ("epsilon", "accuracy", "low", "high")
    tables = {
        name: [
            row | {key: float(row[key]) for key in numbers}
            for row in rows
            if (row["part"], row["model"]) == ("table", name)
        ]
        for name in MODELS
    }
    return attack_comparison(tables)


def certificates(folder):
    return {name: rows_of(folder / f"certificates_{name}.csv") for name in MODELS}


def comparison_tables(folder):
    radii = [0.25 * step for step in range(7)]
    return [
        attack_table(folder),
        certificate_lines(certificates(folder), radii),
        population_lines(certificates(folder), radii[2::2]),
    ]


def median_table():
    rows = rows_of("comparison_smallest_epsilons.csv")
    return median_lines({name: [r for r in rows if r["model"] == name] for name in MODELS})


def worst_cases():
    parts = []
    for norm, epsilon in (("linf", 0.3), ("l2", 2)):
        rows = rows_of(f"worst_case_{norm}.csv")
        parts.append(f"{norm} {epsilon:g}, {len(rows)} images\n" + worst_case.stage_lines(rows))
    return "\n\n".join(parts)


def published_table(sigma, images):
    ours = published.our_rows(sigma, ROOT / "reference" / published.FOLDERS[images])
    assert "here, best" in ours
    assert {len(rows) for rows in ours.values()} == {images}
    others = published.published_curves(sigma, PUBLISHED, images)
    return published.published_lines(sigma, ours, others)


PAIRS = [(0.25, 500), (0.25, 10_000), (0.5, 500), (0.5, 10_000), (1.0, 500)]
TABLES = {
    "default": lambda: "\n\n".join([*comparison_tables(RESULTS), median_table()]),
    "large": lambda: "\n\n".join(comparison_tables(LARGE)),
    "worst": worst_cases,
    "linf": lambda: robust_models.model_lines("linf", 0.3, RESULTS),
    "l2": lambda: robust_models.model_lines("l2", 2.0, RESULTS),
    "controls": lambda: controls.control_lines(rows_of("controls.csv")),
    "strongest": lambda: strongest.strongest_lines(rows_of("strongest.csv")),
    "quick": lambda: strongest.quick_lines(rows_of("verdicts.csv")),
    "cures": lambda: cures.cure_lines(rows_of("cures.csv")),
    "published": lambda: "\n\n".join(published_table(*pair) for pair in PAIRS),
    "bounds": lambda: published.bound_lines(RESULTS),
    "exact": lambda: exact.exact_lines(rows_of("exact.csv")),
    "differences": lambda: published.difference_lines(rows_of("published_differences.csv")),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_is_that_of_the_rows(name):
    assert TABLES[name]() in document("docs/results.md")


def test_share_certified_with_a_fixed_n_is_that_of_the_rows():
    # The other columns of this table have no rows.
    for line in re.findall(r"^0?\.?\d+ +[\d.]+ +500 .*$", document("docs/results.md"), re.M):
        sigma, radius, *_, share = map(float, line.replace(",", "").split())
        assert f"{100 * certified('best', sigma, radius) / 500:.1f}" == f"{share:.1f}"


# Figures in the text


def certificate_rows(recipe, sigma, seed=0):
    of = f"_seed{seed}" if seed else ""
    return rows_of(f"smoothing_{recipe}_{sigma:.2f}{of}_certificates.csv")


def certified(recipe, sigma, at, seed=0):
    """Images that are correct and certified at `at`."""
    rows = certificate_rows(recipe, sigma, seed)
    share = certified_accuracy(*columns(rows), at)
    return round(share * len(rows))


def columns(rows):
    """Radii by CERTIFY, as others publish theirs, and whether the answers are right."""
    return [float(row["radius"]) for row in rows], [int(row["correct"]) for row in rows]


def shown(rows):
    """The same with the radii that our own tables and figures show."""
    return [shown_radius(row) for row in rows], [int(row["correct"]) for row in rows]


def acr(recipe, sigma, seed=0):
    return average_certified_radius(*columns(certificate_rows(recipe, sigma, seed)))


def judged(name, column="robust", chosen=lambda index: True):
    """Standing images of a reference model, and images, in the referee's rows."""
    rows = [r for r in rows_of(f"autoattack_adversarial_{name}.csv") if chosen(int(r["index"]))]
    return sum(int(row[column]) for row in rows), len(rows)


def share(standing, images):
    return f"{100 * standing / images:.1f}"


def counted(standing, images):
    """9,370 of 10,000: 93.7 % [93.2, 94.2]"""
    low, high = map(float, accuracy_interval(standing, images))
    number, interval = percent(standing / images, low, high).split(" ", 1)
    return f"{standing:,} of {images:,}: {number} % {interval}"


def spread_over_seeds(values, digits):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


SEEDS = ("", "_seed1", "_seed2")


def default_run_words():
    linf, l2 = rows_of("worst_case_linf.csv"), rows_of("worst_case_l2.csv")
    standing = [sum(int(row["square"]) for row in rows) for rows in (linf, l2)]
    (pgd,) = (
        100 * float(row["accuracy"])
        for row in rows_of("comparison_attacks.csv")
        if (row["part"], row["model"], row["norm"]) == ("table", "adversarial", "linf")
        and (row["attack"], float(row["epsilon"])) == (multi_step_name(40), 0.3)
    )
    (warned,) = (
        warning
        for warning in twin("comparison_attacks")["warnings"]["adversarial"]
        if warning["check"] == "few pixels stronger"
    )
    seen = certificates(RESULTS)["adversarial"]
    eights = sum(row["prediction"] == "8" for row in seen)
    far = [row for row in seen if row["correct"] == "1" and shown_radius(row) >= 1]
    of_eights = sum(row["label"] == "8" for row in far)
    every = rows_of("all_images/randomized_smoothing_certificates.csv")
    tight, by_certify = (
        average_certified_radius(*columns_of(every)) for columns_of in (shown, columns)
    )
    at_one = sum(row["correct"] == "1" and shown_radius(row) >= 1 for row in every)
    return [
        f"{tight:.4f} ({by_certify:.4f} by CERTIFY). At radius 1 it certifies "
        f"{counted(at_one, len(every))}.",
        f"{share(standing[0], len(linf))} % ({standing[0]} of {len(linf)}), and PGD leaves "
        f"{pgd:.1f} %",
        f"{standing[1]} of {len(l2)} images stand at ℓ2 2",
        f"of {warned['of']} images that withstand PGD, moving a few pixels far breaks "
        f"{warned['images']}.",
        f"takes {eights} of the {len(seen)} digits for an eight. Of the {len(far)} images that it "
        f"certifies correctly at radius 1, {of_eights} are eights",
        f"certify at most radius {round_down(maximum_radius(0.5, 10_000, 0.001), 4)},",
    ]


def large_n_words():
    rows = certificates(LARGE)

    def at(name, radius):
        right = certified_accuracy(*shown(rows[name]), radius)
        return f"{100 * right:.1f} %"

    widest = max(
        float(row["high"]) - float(row["low"])
        for row in rows_of("n_100000/comparison_attacks.csv")
        if row["part"] == "table"
    )
    population = re.findall(r"\[([\d.]+), ([\d.]+)\]", population_lines(rows, (0.5, 1, 1.5)))
    over_noise = [float(high) - float(low) for low, high in population]
    return [
        f"the adversarial model has {at('adversarial', 1)} and the standard one "
        f"{at('standard', 1)}.",
        f"{at('smoothed', 1.5)} at radius 1.5",
        f"up to {100 * widest:.0f} points, and over the noise as well of {max(over_noise):.0f}.",
    ]


def referee_words():
    def held(recipe):
        values = [100 * np.divide(*judged(recipe + seed)) for seed in SEEDS]
        return spread_over_seeds(values, 1)

    def halves(name):
        first, second = (
            judged(name, chosen=lambda i: i < 5000),
            judged(name, chosen=lambda i: i >= 5000),
        )
        return f"{share(*first)} and {share(*second)} %"

    names = [recipe + seed for recipe in ("single_step", "multi_step") for seed in SEEDS]
    most = max(judged(name, "square")[0] - judged(name)[0] for name in names)
    few, whole = judged("multi_step", chosen=lambda i: i % 20 == 0), judged("multi_step")
    stages = ["apgd_ce", "apgd_t", "fab_t", "square", "ours"]
    left = [judged("l2", stage)[0] for stage in stages]
    broken = [a - b for a, b in itertools.pairwise(left[1:])]
    others = {name: figure for name, _, figure in robust_models.PUBLISHED["linf", 0.3]}
    for name in names:
        # No seed collapsed.
        assert collapsed_epochs(twin(f"adversarial_{name}_attacks")["epochs"]) == []
    return [
        f"Multi-step training holds {held('multi_step')} % of all test images",
        f"above the {others['TRADES, SmallCNN (four convolutions)']} %",
        f"Single-step training holds {held('single_step')} %",
        f"above the {others['PGD, SmallCNN (four convolutions)']} %",
        f"leads with {others['Gowal et al. 2020, WRN-28-10']} %",
        f"breaks at most {most} images",
        f"{halves('multi_step')} of multi-step seed 0, in ℓ2 {halves('l2')}.",
        f"({share(*few)} and {share(*whole)} % of multi-step seed 0)",
        f"leaves {share(left[0], 10_000)} % and the targeted one {share(left[1], 10_000)} %. "
        f"FAB breaks {broken[0]} images more, Square {broken[1]} and our PGD {broken[2]}.",
    ]


def stands(stem, norm, column="worst"):
    """Share in % of the images of `controls.csv` that stand."""
    (row,) = (
        row for row in rows_of("controls.csv") if (row["checkpoint"], row["norm"]) == (stem, norm)
    )
    return share(int(row[column]), int(row["images"]))


def control_words():
    def without_and_with(norm, training):
        return " and ".join(stands(s, norm) for s in controls.TRAININGS[training]) + " %"

    single, multi = (without_and_with("linf", t) for t in ("single step", "multi-step"))
    l2 = [without_and_with("l2", t) for t in ("single step", "multi-step")]
    plain, sparse = "control_multi_step", "adversarial_multi_step"
    return [
        f"leave {stands('control_standard', 'linf')} % in ℓ∞",
        f"leaves {single} without and with them",
        f"leaves {multi}",
        f"leaves {l2[0]} in a single step, {l2[1]} in several",
        f"say the contrary: {stands(plain, 'l2', 'autoattack')} and "
        f"{stands(sparse, 'l2', 'autoattack')} % in several steps",
        f"PGD leaves {stands(sparse, 'l2', 'pgd')} %, AutoAttack "
        f"{stands(sparse, 'l2', 'autoattack')} % and ours {stands(sparse, 'l2')} %",
    ]


def front_page_words():
    """What README.md says of the smoothed models, the controls and the ensembles."""
    single, multi = (controls.TRAININGS[name] for name in ("single step", "multi-step"))
    linf, l2 = ({s: stands(s, norm) for s in (*single, *multi)} for norm in controls.BALLS)
    acrs = ensemble_acrs()
    return [
        *smoothing_lines(),
        f"**What the thresholds give.** With ordinary training they leave "
        f"{stands('control_standard', 'linf')} % of 1,000 images at ℓ∞ 0.3 under AutoAttack and "
        f"ours. They lift training in a single step from {linf[single[0]]} to {linf[single[1]]} %, "
        f"in several from {linf[multi[0]]} to {linf[multi[1]]} %; at ℓ2 2 they lower it from "
        f"{l2[single[0]]} to {l2[single[1]]} % and from {l2[multi[0]]} to {l2[multi[1]]} %.",
        f"**Three seeds as one.** The mean of the logits of three seeds has an average certified "
        f"radius of {acrs[0]}, {acrs[1]} and {acrs[2]} at the three σ, for nearly three "
        f"times the time.",
    ]


def smoothing_lines():
    """The lines of the best smoothed models in the table of README.md."""
    every, record, _ = of_all_images(0.5)
    means, records = [], []
    for sigma in published.SIGMAS:
        seeds = [acr("best", sigma, seed) for seed in range(3)]
        means.append(f"{statistics.mean(seeds):.4f} ± {statistics.stdev(seeds):.4f} on 500")
        others = published.published_curves(sigma, PUBLISHED).values()
        records.append(f"{max(float(method['acr']) for method in others):.4f}")
    return [
        f"| average certified radius {means[0]} images, 3 seeds (published: {records[0]}) |",
        f"| {every} on all 10,000, seed 0 ({record}); {means[1]}, 3 seeds ({records[1]}) |",
        f"| {means[2]} images, 3 seeds ({records[2]}) |",
    ]


def test_the_front_page_says_of_models_and_controls_what_the_rows_say():
    assert missing("README.md", *front_page_words()) == []


def strongest_words():
    rows = {row["model"]: row for row in rows_of("strongest.csv")}

    def left(row, name):
        return 100 * int(row[name]) / int(row["images"])

    most = max(
        left(r, "ours") - left(r, "autoattack") for r in rows.values() if r["norm"] == "linf"
    )
    l2 = rows["multi-step, l2"]
    for row in rows.values():
        assert left(row, "both") <= min(left(row, "ours"), left(row, "autoattack"))
    names = ("ours", "autoattack", "both")
    ours, theirs, both = (f"{left(l2, name):.1f} %" for name in names)
    return [
        f"at most {most:.1f} points more than AutoAttack",
        f"ours leaves {ours}, AutoAttack {theirs}, and both together {both}",
    ]


def quick_words():
    rows = rows_of("verdicts.csv")
    times = [float(row["autoattack_seconds"]) / float(row["quick_seconds"]) for row in rows]
    less = [
        f"{strongest.share(row, 'autoattack') - strongest.share(row, 'quick'):.1f}" for row in rows
    ]
    return [
        f"{min(times):.2f} to {max(times):.2f} times as fast",
        f"leaves {', '.join(less[:-1])} and {less[-1]} points less",
    ]


def cure_words():
    rows = rows_of("cures.csv")

    def of(*cures, column="referee"):
        return [100 * int(r[column]) / int(r["images"]) for r in rows if r["cure"] in cures]

    def ends(values):
        return f"{min(values):.1f} to {max(values):.1f} %"

    behind = ("threshold ramp on the pixels", "threshold ramp, best epoch")
    plain = [row for row in rows if row["cure"] not in behind]
    collapsed = {row["cure"] for row in plain if row["collapsed_epochs"]}
    assert {row["cure"] for row in plain} - collapsed == {"smallest gradients dropped"}
    assert of(*behind) == of(*behind, column="standing")
    ramp = [r["collapsed_epochs"] for r in rows if r["cure"] == "random start, epsilon ramp"]
    assert sum(not epochs for epochs in ramp) == 1
    first = min(int(epochs.split()[0]) for epochs in ramp if epochs)
    more = max((int(r["standing"]) - int(r["referee"])) / int(r["images"]) for r in plain)
    published_of = {name: figure for name, _, figure in robust_models.PUBLISHED["linf", 0.3]}
    wong = published_of["Wong et al. 2020, single step"]
    assert max(of("bounded random start")) < float(wong)
    averaged, bounded = of("random start, averaged weights"), of("bounded random start")
    widest = max(
        high - low
        for row in rows
        for low, high in [accuracy_interval(int(row["referee"]), int(row["images"]))]
    )
    return [
        f"It leaves {ends(of('smallest gradients dropped'))}.",
        f"Thresholds leave {ends(of(*behind))}.",
        f"publish {wong} % for a bounded random start",
        f"comes in epoch {first} or later, or not at all in one seed. "
        f"At the end {ends(of('random start, epsilon ramp'))} stand.",
        f"{max(averaged):.1f} % in the best seed, where {max(bounded):.1f} % stand without",
        f"breaks up to {100 * more:.1f} points more than ours",
        f"up to {100 * widest:.0f} points wide",
    ]


def published_words():
    means, spreads, peers = [], [], []
    for sigma in published.SIGMAS:
        values = [acr("best", sigma, seed) for seed in range(3)]
        means.append(f"{statistics.mean(values):.4f}")
        spreads.append(f"{statistics.stdev(values):.4f}")
        others = published.published_curves(sigma, PUBLISHED)
        above = statistics.mean(values) > max(float(other["acr"]) for other in others.values())
        assert above == (sigma in (0.25, 1.0))  # At 0.5 the text says level, and with whom.
        peers.append(others)
    cat = [others["CAT-RS"] for others in peers]

    def mean_share(sigma, at):
        return statistics.mean(certified("best", sigma, at, seed) / 5 for seed in range(3))

    *small, last = cat[0]["curve"].items()
    assert all(mean_share(0.25, at) >= 100 * peer for at, peer in small)
    assert mean_share(0.25, last[0]) < 100 * last[1]
    halves = [f"{mean_share(sigma, 0.5):.1f}" for sigma in (0.5, 1.0)]
    theirs = {
        name: " and ".join(f"{100 * others[name]['curve'][0.5]:.1f}" for others in peers[1:])
        for name in ("CAT-RS", "Consistency")
    }
    for sigma, others in zip(published.SIGMAS, peers, strict=True):
        assert acr("gaussian", sigma) > float(others["Gaussian"]["acr"])
        assert certified("gaussian", sigma, 0.5) > 500 * others["Gaussian"]["curve"][0.5]
    two = [acr("two_cores", sigma) for sigma in (0.5, 1.0)]
    for value, others in zip(two, peers[1:], strict=True):
        assert value > max(float(other["acr"]) for other in others.values())
    minutes = [load("smoothing_two_cores_" + s).facts["seconds"] / 60 for s in ("0.50", "1.00")]
    above = [difference(sigma, "here, two cores", "cat-rs") for sigma in (0.5, 1.0)]
    tight = statistics.mean(
        average_certified_radius(
            [float(row["radius_tight"]) for row in rows],
            [int(row["correct"]) for row in rows],
        )
        for rows in (certificate_rows("best", 1.0, seed) for seed in range(3))
    )
    return [
        f"{means[0]}, {means[1]} and {means[2]} (means of three seeds), where CAT-RS has "
        f"{cat[0]['acr']}, {cat[1]['acr']} and {cat[2]['acr']}",
        f"{halves[0]} % (σ = 0.5) and {halves[1]} % (σ = 1); CAT-RS has {theirs['CAT-RS']} %, "
        f"Consistency {theirs['Consistency']} %",
        f"took {minutes[0]:.0f} and {minutes[1]:.0f} minutes",
        f"have {two[0]:.4f} and {two[1]:.4f} (one seed each)",
        f"above all published rows. Over CAT-RS that is {above[0]} and {above[1]}.",
        f"by {spreads[0]}, {spreads[1]} and {spreads[2]} at the three σ",
        f"({tight:.4f} in place of {means[2]})",
    ]


def of_all_images(sigma):
    """ACR on all 10,000 images of the best model, the largest published one, and our rows."""
    rows = rows_of(f"all_images/smoothing_best_{sigma:.2f}_certificates.csv")
    assert [int(row["index"]) for row in rows] == list(range(10_000))
    others = published.published_curves(sigma, PUBLISHED, 10_000)
    record = max(float(other["acr"]) for other in others.values())
    assert others["CAT-RS"]["acr"] == f"{record:.4f}"
    return f"{average_certified_radius(*columns(rows)):.4f}", f"{record:.4f}", rows


def all_images_words():
    (quarter, first, _), (half, second, rows) = of_all_images(0.25), of_all_images(0.5)
    over = [difference(sigma, "here, best", "cat-rs", 10_000) for sigma in (0.25, 0.5)]
    at_one = sum(row["correct"] == "1" and shown_radius(row) >= 1 for row in rows)
    tight = average_certified_radius(*shown(rows))
    seeds = [acr("best", 0.5, seed) for seed in range(3)]
    above = seeds[0] - statistics.mean(seeds)
    return [
        f"have {quarter} and {half} at σ = 0.25 and 0.5, where CAT-RS has {first} and {second}",
        f"Over CAT-RS that is {over[0]} and {over[1]}.",
        f"its ACR is {above:.4f} above the mean of three seeds",
        f"average of {tight:.4f} and certifies {counted(at_one, len(rows))} at radius 1.",
    ]


def all_images_card():
    quarter, half = (of_all_images(sigma)[0] for sigma in (0.25, 0.5))
    return [f"an ACR of {quarter} at σ = 0.25 (float votes of an older release) and {half} at σ"]


def ensemble_acrs():
    rows = [rows_of(f"ensemble_{s:.2f}/certificates_ensemble.csv") for s in published.SIGMAS]
    return [f"{average_certified_radius(*columns(of_sigma)):.4f}" for of_sigma in rows]


def ensemble_words():
    def minus(method):
        values = [difference(sigma, "here, ensemble", method) for sigma in published.SIGMAS]
        return ", ".join(values[:2]) + f" and {values[2]}"

    acrs = ensemble_acrs()
    rows = rows_of("ensemble_0.25/certificates_ensemble.csv")
    for sigma, own in zip(published.SIGMAS, acrs, strict=True):
        others = published.published_curves(sigma, PUBLISHED).values()
        assert float(own) > max(float(other["acr"]) for other in others)
    most = round_down(maximum_radius(0.25, 100_000, 0.001), 6)
    largest = sum(round_down(row["radius"], 6) == most for row in rows)
    return [
        f"ACR of {acrs[0]}, {acrs[1]} and {acrs[2]}",
        f"Over its members that is {minus('here, best, 3 seeds')}",
        f"over CAT-RS {minus('cat-rs')}",
        f"{largest} of {len(rows)} images have the largest radius",
    ]


@cache
def load(name):
    return load_checkpoint(ROOT / f"reference/models/{name}.pt")


def difference(sigma, ours, method, images=500):
    sought = (sigma, ours, method, images)
    (row,) = (
        row
        for row in rows_of("published_differences.csv")
        if (float(row["sigma"]), row["ours"], row["method"], int(row["images"])) == sought
    )
    mean, low, high = (f"{float(row[k]):.4f}".replace("-", "−") for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def test_intervals_that_hold_zero_are_those_that_the_text_names():
    held = {
        (float(row["sigma"]), row["method"], int(row["images"]))
        for row in rows_of("published_differences.csv")
        if row["ours"].startswith("here, best") and float(row["low"]) <= 0
    }
    assert held == {
        (0.5, "cat-rs", 500),
        *((0.25, method, n) for method in ("cat-rs", "smoothmix") for n in (500, 10_000)),
    }


# The cards of docs/models.md


def attacked_lines(recipe, seeds=SEEDS):
    """The table of a recipe's seeds under the referee."""
    lines = []
    for seed, of in enumerate(seeds):
        name = f"adversarial_{recipe}{of}"
        facts = twin(f"{name}_attacks")
        cells = [f"{seed}", f"{100 * facts['test_accuracy']:.2f} %", counted(*judged(recipe + of))]
        few = [w for w in facts["warnings"] if w["check"] == "few pixels stronger"]
        cells += [f"{warning['images']} of {warning['of']}" for warning in few]
        lines.append(cells)
    header = ["seed", "clean, 10,000 images", "AutoAttack, then ours"]
    header += ["broken by a few pixels, ℓ2 2"]
    return markdown(header[: len(lines[0])], lines)


def certified_lines(recipe, sigmas, seeds=1):
    """The table of a recipe's certificates."""
    lines = []
    for sigma in sigmas:
        for seed in range(seeds):
            rows = certificate_rows(recipe, sigma, seed)
            name = f"smoothing_{recipe}_{sigma:.2f}" + (f"_seed{seed}" if seed else "")
            clean = twin(f"{name}_certificates")["facts"].get("clean_accuracy")
            lines.append(
                [
                    f"{sigma:g}",
                    f"{seed}",
                    "not recorded" if clean is None else f"{100 * clean:.2f} %",
                    f"{acr(recipe, sigma, seed):.4f}",
                    counted(certified(recipe, sigma, 0, seed), 500),
                    counted(certified(recipe, sigma, 2 * sigma, seed), 500),
                    f"{sum(row['prediction'] == '-1' for row in rows)}",
                ]
            )
    header = ["σ", "seed", "clean", "ACR", "correct and certified", "the same at radius 2σ"]
    return markdown([*header, "abstentions"], lines)


def standard_lines():
    facts = twin("standard_attacks")
    cells = [f"{100 * facts['test_accuracy']:.2f} %"]
    for ball in (("linf", 0.1), ("l2", 1.0), ("l2", 2.0)):
        cells.append(counted(*under_pgd("standard", *ball)))
    header = ["clean, 10,000 images", "2x PGD-40, ℓ∞ 0.1", "ℓ2 1", "ℓ2 2"]
    return markdown(header, [cells])


def markdown(header, lines):
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)
    )


def under_pgd(name, norm, epsilon):
    """Images that stand under PGD in the table of a script, and images."""
    (row,) = (
        row
        for row in rows_of(f"{name}_attacks.csv")
        if (row["part"], row["norm"], float(row["epsilon"])) == ("table", norm, epsilon)
        and "PGD" in row["attack"]
    )
    return int(row["correct"]), int(row["images"])


CARDS = {
    "single": lambda: attacked_lines("single_step"),
    "multi": lambda: attacked_lines("multi_step"),
    "attacked l2": lambda: attacked_lines("l2", [""]),
    "best": lambda: certified_lines("best", published.SIGMAS, 3),
    "two cores": lambda: certified_lines("two_cores", (0.5, 1.0)),
    "gaussian": lambda: certified_lines("gaussian", published.SIGMAS),
    "standard": standard_lines,
}


@pytest.mark.parametrize("name", CARDS)
def test_card_is_that_of_the_rows(name):
    assert CARDS[name]() in document("docs/models.md")


def network_words():
    """The line "Network" of each card, from the checkpoints themselves."""
    cards = {
        "adversarial_single_step": "{channels}, {hidden}, {thresholds}; {weights}.",
        "adversarial_multi_step": "{channels}, {hidden}, {thresholds}; {weights}.",
        "adversarial_l2": "{channels}, {hidden}, {thresholds}; {weights}.",
        "smoothing_best_0.25": "{channels} at σ = 0.25 ({weights})",
        "smoothing_best_0.50": "{channels} at σ = 0.5 and 1 ({weights}); {hidden}, {thresholds}.",
        "smoothing_best_1.00": "{channels} at σ = 0.5 and 1 ({weights}); {hidden}, {thresholds}.",
        "smoothing_two_cores_0.50": "{channels}, {hidden}, {thresholds}; {weights}.",
        "smoothing_gaussian_0.25": "{channels}, {hidden}, {thresholds}; {weights}.",
        "standard": "{channels}, {hidden}, {thresholds}; {weights}.",
    }
    for name, card in cards.items():
        model = load(name)
        config = model.config
        hidden, thresholds = config.get("hidden"), config.get("thresholds")
        yield card.format(
            channels="{} and {} channels".format(*config["channels"]),
            hidden=f"hidden layer of {hidden}" if hidden else "no hidden layer",
            thresholds="thresholds at {} and {}".format(*thresholds)
            if thresholds
            else "no thresholds",
            weights=f"{sum(p.numel() for p in model.parameters()):,} weights",
        )


def training_words():
    """What the line "Training" of each card says of epochs and the like."""
    single, multi, l2 = (
        load(f"adversarial_{n}").facts["options"] for n in ("single_step", "multi_step", "l2")
    )
    quarter, half, one = (
        load(f"smoothing_best_{s}").facts["options"] for s in ("0.25", "0.50", "1.00")
    )
    gaussian, standard = (
        load(name).facts["options"] for name in ("smoothing_gaussian_0.25", "standard")
    )
    two = [load(f"smoothing_two_cores_{s}").facts for s in ("0.50", "1.00")]
    epochs = [facts["options"]["epochs"] for facts in two]
    minutes = [f"{facts['seconds'] / 60:.0f}" for facts in two]
    assert [multi["steps"], l2["steps"], quarter["shift"], one["shift"]] == [5, 7, 1, 0]
    pgd, images = under_pgd("adversarial_l2", "linf", 0.3)
    assert under_pgd("standard", "linf", 0.2) == (0, 1000)
    medians = [
        np.median([float(r["smallest_epsilon"]) for r in rows if r["norm"] == "linf"])
        for rows in (rows_of(f"adversarial_single_step{s}_smallest_epsilons.csv") for s in SEEDS)
    ]
    assert len({round(float(median), 2) for median in medians}) == 1
    (l2_pgd,) = (
        f"{100 * float(row['accuracy']):.1f} % of {row['images']}"
        for row in rows_of("comparison_attacks.csv")
        if (row["part"], row["model"], row["norm"]) == ("table", "adversarial", "l2")
        and (row["attack"], float(row["epsilon"])) == (multi_step_name(40), 2)
    )
    standing = sum(int(row["square"]) for row in rows_of("worst_case_l2.csv"))
    most = max(
        sum(row["prediction"] == "-1" for row in certificate_rows("best", 1.0, seed))
        for seed in range(3)
    )
    return [
        f"ℓ∞ ball of {single['epsilon']}, {single['epochs']} epochs, AdamW, "
        f"warps of {single['warp']}.",
        f"ℓ∞ ball of {multi['epsilon']}, {multi['epochs']} epochs, Muon, bfloat16, "
        f"warps of {multi['warp']}.",
        f"ℓ2 ball of {l2['epsilon']:g}, {l2['epochs']} epochs, Muon, warps of {l2['warp']}.",
        f"two noisy copies, {quarter['epochs']} epochs, Muon, shifts by up to a pixel",
        f"a shorter step ({half['epsilon']}) that sees one of the copies, {half['epochs']} epochs, "
        f"Muon, bfloat16, warps of {half['warp']}, weight decay {half['weight_decay']}.",
        f"mean probability, {one['epochs']} epochs, Muon, bfloat16, no shifts",
        f"with {epochs[0]} epochs at σ = 0.5 and {epochs[1]} at σ = 1, by two processes on two "
        f"cores, in {minutes[0]} and {minutes[1]} minutes",
        f"per image, {gaussian['epochs']} epochs, AdamW, no shifts",
        f"cross-entropy, {standard['epochs']} epochs, AdamW",
        f"2x PGD-40 leaves {pgd} of {images:,} images.",
        f"from {medians[0]:.2f} on half of the images are broken",
        f"{standing} of {len(rows_of('worst_case_l2.csv'))} images stand at ℓ2 2",
        f"PGD alone leaves {l2_pgd}.",
        f"up to {most} of 500 images",
        f"{len(MODEL_FILES)} checkpoints",
    ]


# What a run is told about its surroundings, and not about the network that it trains.
SURROUNDINGS = {
    "models",
    "results",
    "figures",
    "every",
    "n",
    "precision",
    "resume",
    "quick",
    "name",
}


@pytest.mark.parametrize("name", [path.stem for path in sorted(MODEL_FILES)])
def test_make_model_trains_what_the_checkpoint_says(name):
    # -n runs nothing; -o takes the environment as it is. Inside `make test` it is a make in a make.
    make = ["make", "-n", "--no-print-directory", "-o", ".venv/ready", "model", f"NAME={name}"]
    shown = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    script, words = re.search(r"(main_\w+)\.py ([^|&]*)$", shown.replace("\\\n", " ")).groups()
    facts = load(name).facts["options"]
    # The --precision of older files was that of the training.
    facts.setdefault("training_precision", facts.get("precision"))
    module = importlib.import_module(script)
    args = module.option_parser().parse_args(words.split())
    args = vars(module.complete(args) if script == "main_adv_training" else args)
    assert args["name"] == name
    # None now stands for an option that has no effect, such as the steps of a single step.
    unused = {key for key in ("steps", "stride") if args.get(key) is None}
    shared = (args.keys() & facts.keys()) - SURROUNDINGS - unused
    assert {key: args[key] for key in shared} == {key: facts[key] for key in shared}


@pytest.mark.parametrize("name", [path.stem for path in sorted(MODEL_FILES)])
def test_every_model_is_on_a_card(name):
    kind, _, seed = name.partition("_seed")
    assert f"make model NAME={kind}" in document("docs/models.md")
    assert not seed or f"_seed{seed}" in document("docs/models.md")


# Every number in these documents must be covered. For one that only repeats a few figures, such as
# README.md, `missing("README.md", *referee_words())` says which of the words are not there.
WORDS = {
    "docs/results.md": [
        default_run_words,
        large_n_words,
        referee_words,
        control_words,
        strongest_words,
        quick_words,
        cure_words,
        published_words,
        all_images_words,
        ensemble_words,
    ],
    "docs/models.md": [network_words, training_words, all_images_card],
}


@pytest.mark.parametrize(
    ("name", "words"),
    [pytest.param(name, words, id=words.__name__) for name in WORDS for words in WORDS[name]],
)
def test_words_about_the_rows_stand_in_the_text(name, words):
    assert missing(name, *words()) == []


# Settings, sizes and names: numbers that nobody measured.
SETTINGS = {
    *("0", "0.001", "0.2", "0.25", "0.3", "0.4", "0.5", "0.6", "1", "2", "3", "95"),
    *("10", "12", "16", "20", "21", "32", "40", "100", "200", "250", "500", "3.5.1"),
    *("1,000", "3,000", "3,980", "10,000", "100,000", "100,100"),
}
YEAR = re.compile(r"(19|20)\d\d")


def prose(name):
    """The text of a document without its tables, code, addresses and numbers of papers."""
    text = re.sub(r"^```.*?^```$", " ", document(name), flags=re.M | re.S)
    text = re.sub(r"^\|.*\|$", " ", text, flags=re.M)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:\S+", " ", text)
    return " ".join(text.split())


@pytest.mark.parametrize("name", WORDS)
def test_no_number_in_the_text_is_anybodys_memory(name):
    text = prose(name)
    for words in WORDS[name]:
        for phrase in words():
            text = text.replace(" ".join(phrase.split()), " ")
    numbers = re.findall(r"(?<![\w.\-−])\d[\d,]*(?:\.\d+)*", text)
    numbers = [number.rstrip(",") for number in numbers]
    assert [n for n in numbers if n not in SETTINGS and not YEAR.fullmatch(n)] == []


# docs/mathematics.md


def mathematics_words():
    alpha = 0.001
    for n in (10, 100, 1000, 10_000, 100_000):
        few, radius = minimum_successes(n, alpha), round_down(maximum_radius(1, n, alpha), 4)
        yield f"| {n:,} | {few:,} | {radius} σ |"
    with pytest.raises(ValueError, match="can never certify"):
        minimum_successes(9, alpha)
    yield "| 9 | none | none |"
    draws = [minimum_trials(alpha, float(required_probability(r, 1))) for r in (1, 2, 3, 4)]
    yield (
        f"needs {draws[0]} draws for a radius of σ, {draws[1]} for 2σ, {draws[2]:,} for 3σ and "
        f"{draws[3]:,} for 4σ"
    )
    p = [abstain_p_value(k, 0) for k in (10, 11)]
    assert p[1] <= alpha < p[0]
    yield f"too few to answer (p = {p[0]:.5f})"
    yield f"are enough (p = {p[1]:.5f})"
    one = ndtri(lower_confidence_bound(80_000, 100_000, alpha))
    two = tight_radius("two-sided", 80_000, 15_000, 100_000, alpha, 1)
    yield f"radius is {round_down(one, 4)} σ, the two-sided one {round_down(two, 4)} σ"
    one, two = (
        tight_radius(test, 100_000, 0, 100_000, alpha, 1) for test in ("one-sided", "two-sided")
    )
    yield f"one-sided radius is {round_down(one, 4)} σ, the two-sided one {round_down(two, 4)} σ"


def test_figures_of_the_mathematics_are_those_of_the_code():
    assert missing("docs/mathematics.md", *mathematics_words()) == []


# What lies behind the rows


@pytest.mark.parametrize("folder", [RESULTS, LARGE], ids=lambda path: path.name)
@pytest.mark.parametrize("name", MODELS)
def test_committed_certificates_verify(folder, name):
    assert verify(folder / f"certificates_{name}.csv") == []


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_worst_case_is_of_the_model_of_the_default_run(norm):
    certified = twin("certificates_adversarial")
    assert twin(f"worst_case_{norm}")["model_digest"] == certified["settings"]["model_digest"]


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
    model = load(path.stem.removesuffix("_certificates"))
    settings = json.loads(path.with_suffix(".json").read_text())["settings"]
    assert settings["model_digest"] == weights_digest(model.state_dict())


@pytest.mark.parametrize("sigma", published.SIGMAS)
def test_certificates_of_the_ensembles_verify_and_are_of_the_committed_members(sigma):
    path = RESULTS / f"ensemble_{sigma:.2f}" / "certificates_ensemble.csv"
    assert verify(path) == []
    rows = read_rows(path)
    assert [int(row["index"]) for row in rows] == list(range(0, 10_000, 20))
    assert {(row["n0"], row["n"], row["alpha"]) for row in rows} == {("100", "100000", "0.001")}
    members = Ensemble([load(f"smoothing_best_{sigma:.2f}{seed}") for seed in SEEDS])
    settings = json.loads(path.with_suffix(".json").read_text())["settings"]
    assert settings["exact"] is True
    assert settings["model_digest"] == weights_digest(members.state_dict())


def test_differences_to_the_published_ones_are_those_of_the_rows():
    for row in rows_of("published_differences.csv"):
        # The mean is the difference of two averages over the same images.
        sigma = float(row["sigma"])
        images = int(row["images"])
        ours = published.our_rows(sigma, ROOT / "reference" / published.FOLDERS[images])
        runs = published.by_recipe(ours)
        own = runs[re.sub(r", \d+ seeds$", "", row["ours"])].values()
        mean = statistics.mean(average_certified_radius(*columns(seed)) for seed in own)
        others = published.published_curves(sigma, PUBLISHED, images)
        theirs = {plain(name): float(other["acr"]) for name, other in others.items()}
        members = runs[published.BEST].values()
        theirs[plain(published.named(published.BEST, members))] = statistics.mean(
            average_certified_radius(*columns(seed)) for seed in members
        )
        assert float(row["mean"]) == pytest.approx(mean - theirs[plain(row["method"])], abs=1e-4)


def plain(name):
    """The letters of a method's name: two files spell it in two ways."""
    return "".join(letter for letter in name.lower() if letter.isalpha())


def test_tables_of_robust_models_hold_all_seeds():
    assert "single step, 3 seeds, mean ± sd" in TABLES["linf"]()


def ball_of(path):
    """The model of a file of the referee's rows, and its ball."""
    if path.parent.name == "controls":
        name, norm = path.stem.rsplit("_", 1)
        return name, [norm, controls.BALLS[norm]]
    name = path.stem.removeprefix("autoattack_")
    (ball,) = (
        ball
        for stem, (_, *ball) in robust_models.RECIPES.items()
        if stem == name.partition("_seed")[0]
    )
    return name, ball


REFEREE = [*RESULTS.glob("autoattack_*.json"), *RESULTS.glob("controls/*.json")]


@pytest.mark.parametrize("path", sorted(REFEREE), ids=lambda path: path.stem)
def test_the_referee_judged_the_committed_model(path):
    name, ball = ball_of(path)
    model = load(name)
    judged = json.loads(path.read_text())
    assert judged["digest"] == weights_digest(model.state_dict())
    assert [judged["norm"], judged["epsilon"]] == ball
    made = json.loads((RESULTS / f"{name}_attacks.json").read_text())
    assert made["commit"] == model.facts["commit"]
    # Any first part of the referee's order is spread over the test set.
    rows = read_rows(path.with_suffix(".csv"))
    assert [int(row["index"]) for row in rows] == autoattack.ORDER[: len(rows)]


def test_the_table_of_controls_counts_the_rows_of_the_referee():
    for row in rows_of("controls.csv"):
        path = RESULTS / "controls" / f"{row['checkpoint']}_{row['norm']}.csv"
        if not path.exists():
            path = RESULTS / f"autoattack_{row['checkpoint']}.csv"
        rows = read_rows(path)[: int(row["images"])]
        assert [int(r["index"]) for r in rows] == autoattack.ORDER[: controls.IMAGES]
        for name, column in (("clean", "clean"), ("autoattack", "square")):
            assert int(row[name]) == sum(int(r[column]) for r in rows)
        standing = sum(int(r["robust"]) for r in rows)
        assert int(row["worst"]) <= min(standing, int(row["pgd"]))
    assert len(rows_of("controls.csv")) == 2 * 2 * len(controls.TRAININGS)


def test_the_table_of_the_front_page_is_that_of_the_default_run():
    attacks = [row for row in rows_of("comparison_attacks.csv") if row["part"] == "table"]

    def line(attack, norm, epsilon):
        chosen = [r for r in attacks if (r["attack"], r["norm"]) == (attack, norm)]
        chosen = {r["model"]: r for r in chosen if float(r["epsilon"]) == epsilon}
        return [f"{100 * float(chosen[name]['accuracy']):.1f}" for name in MODELS]

    rows = certificates(RESULTS)
    proven = [f"{100 * certified_accuracy(*shown(rows[name]), 1):.1f}" for name in MODELS]
    expected = [line("none", "", 0), line(WORST_KNOWN, "linf", 0.3), line(WORST_KNOWN, "l2", 2)]
    table = re.findall(
        r"^\| (?:\*\*proven\*\* )?correct[^|]*\| (.*) \|$", document("README.md"), re.M
    )
    numbers = [re.findall(r"\d+\.\d", cells) for cells in table]
    assert numbers == [*expected, proven]
    first, *others = proven
    assert f": {first}, {' and '.join(others)} % proven" in document("main_compare.py")
    assert f": {others[-1]} % proven" in document("main_random_smoothing.py")


# Links and commands


def test_the_figure_of_any_rows_is_drawn_as_the_front_page_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(from src.reports[^`]*)```", document("README.md"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "theirs"):
        rows = (RESULTS / "certificates_smoothed.csv").read_bytes()
        (tmp_path / f"{name}.csv").write_bytes(rows)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def exists(path):
    return (ROOT / path).exists()


def module_exists(module):
    return any(
        (ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py")
    )


def anchors(name):
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document(name), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower())
        yield kept.replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", document(name))
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_are_there(name):
    named = re.findall(r"`((?:src|benchmarks|tests|reference|docs)/[\w./]+\.\w+)`", document(name))
    assert [path for path in named if not exists(path)] == []


def commands(name):
    """Every command in the blocks of a document that a shell can run."""
    for block in re.findall(r"^```sh\n(.*?)^```$", document(name), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.split(" # ")[0]


def pasteable(name):
    """The commands of the blocks, and those within the text."""
    inline = re.findall(r"`((?:python|make|torchrun) [^`]+)`", document(name))
    return [*commands(name), *(" ".join(command.split()) for command in inline)]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_commands_can_be_pasted(name):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in pasteable(name):
        assert not re.search(r"…|\.\.\.|<\w", command), command
        make = re.match(r"make ([a-z][a-z0-9-]*)", command)
        assert make is None or make[1] in targets, command
        script = re.search(r"(?:python|--) (main_\w+\.py)", command)
        module = re.search(r"python -m ([\w.]+)", command)
        if script:
            assert (ROOT / script[1]).exists(), command
        if module:
            assert module_exists(module[1]), command
        if script or module:
            known = "".join(path.read_text() for path in sources())
            own = command.rpartition(" -- ")[2]
            options = re.findall(r" (--[a-z][a-z0-9-]*)", own)
            assert [option for option in options if f'"{option}"' not in known] == [], command


@cache
def sources():
    """Files that define options."""
    return [*ROOT.glob("main_*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("src/**/*.py")]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*?[^\\])$", makefile, re.M | re.S)[1].replace("\\", " ").split()
    described = re.findall(r"^([a-z0-9-]+):.*## .", makefile, re.M)
    assert sorted(described) == sorted(phony)
