"""The reference models of adversarial training beside the published ones, out of committed rows.

Each model's clean accuracy (all 10,000 test images) and its accuracy under PGD come from what
main_adv_training.py wrote, those under AutoAttack and then an attack of ours from
benchmarks/autoattack.py; a mean over seeds is of the images on which all of them were judged.
Published figures are AutoAttack (standard) on all 10,000 images: of the papers' models named, and
for SmallCNN as a README that publishes its checkpoints gives them.

Run: python -m benchmarks.robust_models
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from src.certification.intervals import accuracy_interval
from src.records.rows import read_rows
from src.reports.tables import format_table, percent

RESULTS = Path("reference/results")
# Stem of the files: the name of the recipe, the ball it is judged in.
RECIPES = {
    "adversarial_single_step": ("single step", "linf", 0.3),
    "adversarial_multi_step": ("multi-step", "linf", 0.3),
    "adversarial_l2": ("multi-step, l2", "l2", 2.0),
}
PUBLISHED = {
    ("linf", 0.3): (
        ("Wong et al. 2020, single step", "98.50", "82.93"),
        ("Madry et al. 2018, PGD-40", "98.53", "88.50"),
        ("PGD, SmallCNN (four convolutions)", "99.46", "92.78"),
        ("TRADES, SmallCNN (four convolutions)", "99.23", "94.01"),
        ("Gowal et al. 2020, WRN-28-10", "99.26", "96.34"),
    ),
}


def measured(stem: str, norm: str, epsilon: float, results: Path) -> dict | None:
    """What the committed rows say of one model; None if they are not all there."""
    paths = [results / f"{stem}_attacks.csv", results / f"autoattack_{stem}.csv"]
    if not all(path.exists() for path in paths):
        return None
    facts = json.loads(paths[0].with_suffix(".json").read_text())
    (pgd,) = (
        row
        for row in read_rows(paths[0])
        if (row["part"], row["norm"], float(row["epsilon"])) == ("table", norm, epsilon)
        and "PGD" in row["attack"]
    )
    rows = {int(row["index"]): row for row in read_rows(paths[1])}
    return {
        "seed": facts["options"]["seed"],
        "minutes": facts["seconds"] / 60,
        "commit": facts["commit"],
        "clean": facts["test_accuracy"],
        "pgd": float(pgd["accuracy"]),
        "autoattack": {index: int(row["square"]) for index, row in rows.items()},
        "worst": {index: int(row["robust"]) for index, row in rows.items()},
    }


def model_lines(norm: str, epsilon: float, results: Path = RESULTS) -> str:
    """The table of one ball: every seed of every recipe, their means, the published figures."""
    lines = []
    for stem, (recipe, *ball) in RECIPES.items():
        seeds = [stem, *(f"{stem}_seed{seed}" for seed in range(1, 10))]
        found = [
            measured(name, norm, epsilon, results) for name in seeds if ball == [norm, epsilon]
        ]
        found = [model for model in found if model]
        lines += [_line(recipe, model) for model in found]
        if len(found) > 1:
            lines.append(_mean_line(recipe, found))
    lines += [
        (name, "", "", clean, "", under, "", "")
        for name, clean, under in PUBLISHED.get((norm, epsilon), ())
    ]
    header = (f"{norm}, epsilon = {epsilon:g}", "commit", "minutes", "clean %", "2x PGD-40 %")
    return format_table((*header, "AutoAttack %", "then ours % [95 %]", "images"), lines)


def _line(recipe: str, model: dict) -> tuple[str, ...]:
    standing, images = sum(model["worst"].values()), len(model["worst"])
    low, high = map(float, accuracy_interval(standing, images))
    return (
        f"{recipe}, seed {model['seed']}",
        model["commit"],
        f"{model['minutes']:.1f}",
        f"{100 * model['clean']:.2f}",
        f"{100 * model['pgd']:.1f}",
        f"{100 * statistics.mean(model['autoattack'].values()):.1f}",
        percent(standing / images, low, high),
        f"{images:,}",
    )


def _mean_line(recipe: str, models: list[dict]) -> tuple[str, ...]:
    def spread(values: Iterable[float], digits: int) -> str:
        values = list(values)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        return f"{100 * mean:.{digits}f} ± {100 * deviation:.{digits}f}"

    # Other images would move a mean by more than other seeds do.
    shared = set.intersection(*(set(model["worst"]) for model in models))

    def under(attack: str) -> str:
        shares = (statistics.mean(model[attack][index] for index in shared) for model in models)
        return spread(shares, 1)

    return (
        f"{recipe}, {len(models)} seeds, mean ± sd",
        "",
        f"{statistics.mean(model['minutes'] for model in models):.1f}",
        spread((model["clean"] for model in models), 2),
        spread((model["pgd"] for model in models), 1),
        under("autoattack"),
        under("worst"),
        f"{len(shared):,}",
    )


def main():
    for norm, epsilon in dict.fromkeys((norm, epsilon) for _, norm, epsilon in RECIPES.values()):
        print(model_lines(norm, epsilon) + "\n")


if __name__ == "__main__":
    main()
