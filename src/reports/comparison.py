"""The comparison of several models: attacks, certificates, tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch.utils.data import TensorDataset

from src.checkpoints import load_checkpoint
from src.files import drop_equal_copies, set_aside, write_json
from src.models import ConvNN, SmoothClassifier
from src.optimisation.processes import is_main
from src.records.certify import certify_dataset
from src.records.merging import merge
from src.records.rows import read_rows, write_rows
from src.reports.plotting import (
    plot_accuracy_against_epsilon,
    plot_certified_accuracy,
    plot_gallery,
    plot_p_lower,
)
from src.reports.tables import (
    attack_comparison,
    certificate_lines,
    median_lines,
    population_lines,
    round_down,
)
from src.robustness.challenge import broken_allowed, challenge_certificates
from src.robustness.checklist import short_warnings, warning_lines
from src.robustness.evaluation import attack_evaluation, attack_rows
from src.robustness.fixed_radii import radii_with
from src.training_and_evaluation import accuracy
from src.utils import subset

# Checkpoint and the script that makes it, for each model in the order of the tables.
MODELS = {
    "standard": ("standard_training", "main_training.py"),
    "adversarial": ("adversarial_training", "main_adv_training.py"),
    "smoothed": ("randomized_smoothing", "main_random_smoothing.py"),
}

TABLES = ("attacks", "smallest_epsilons")


def load_models(
    folder: str | Path, device, chosen: Mapping[str, str | Path | None] | None = None
) -> dict[str, ConvNN]:
    """The three checkpoints by the names of the tables: those `chosen`, else those in `folder`.

    Raises:
        FileNotFoundError: if one is missing; the message names the script that makes it.
        ValueError: if one is damaged.
    """
    models = {}
    for name, (stem, script) in MODELS.items():
        path = (chosen or {}).get(name)
        path = Path(path or Path(folder) / f"{stem}.pt")
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint {path}; run python {script} first.")
        models[name] = load_checkpoint(path, device)
    return models


def smoothing_sigma(model: ConvNN) -> float:
    """The sigma that a checkpoint was trained for.

    Raises:
        ValueError: if it does not say.
    """
    if "sigma" not in model.facts:
        raise ValueError("The checkpoint of the smoothed model has no sigma; give --sigma.")
    return model.facts["sigma"]


def trained_ball(model: ConvNN) -> tuple[str, float] | None:
    """Norm and epsilon of the attack that a checkpoint was trained with, if it was."""
    options = model.facts.get("options", {})
    return (options["norm"], options["epsilon"]) if {"norm", "epsilon"} <= options.keys() else None


def attack_models(
    models: Mapping[str, ConvNN], test: TensorDataset, indices: Sequence[int], *, steps: int
) -> dict[str, dict[str, list[dict]]]:
    """Each model's `attack_evaluation` on the same images; returns {model: evaluation}.

    The smoothed model stands there with its base network: these attacks do not see the noise.
    """
    evaluations, radii = {}, radii_with(*filter(None, map(trained_ball, models.values())))
    for name, model in models.items():
        print(f"Attacking the {name} model on {len(indices)} test images")
        evaluations[name] = attack_evaluation(
            model, test, indices, indices, steps=steps, radii=radii
        )
        print(warning_lines(evaluations[name]["warnings"]))
    return evaluations


def certify_models(
    models: Mapping[str, ConvNN],
    test: TensorDataset,
    indices: Sequence[int],
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    precision: str,
    results: str | Path,
    facts: Mapping,
    resume: bool,
    shard: tuple[int, int] = (1, 1),
    two_sided: bool = False,
) -> dict[str, list[dict]]:
    """Certify each model, smoothed with the same noise, on the same images; see `certify`.

    Of the images only the k-th of n parts is taken if `shard` is (k, n). Rows go to
    results/certificates_<model>.csv, or .shard-k-of-n.csv, as they are finished; `resume` takes
    up those of an interrupted run, see `record_certificates`. Returns {model: rows}.
    """
    part, parts = shard
    rows = {}
    for name, model in models.items():
        print(f"Certifying the {name} model at sigma = {sigma:g}, n = {n:,}, alpha = {alpha:g}")
        clean = accuracy(model.inference_form(precision), test)
        print(f"Its accuracy on all clean test images, in {precision}: {clean:.2%}")
        rows[name] = certify_dataset(
            SmoothClassifier(model, sigma, precision=precision),
            test,
            certificates_path(results, name, shard),
            n0=n0,
            n=n,
            alpha=alpha,
            seed=seed,
            indices=indices[part - 1 :: parts],
            resume=resume,
            two_sided=two_sided,
            facts={**facts, "clean_accuracy": clean},
            shard=f"{part}/{parts}" if parts > 1 else None,
            progress=is_main(),
        )
    return rows


def set_targets_aside(
    models: Iterable[str], results: Path, shard: tuple[int, int], *, tables: bool
) -> None:
    """Move all earlier rows of the models, or of this shard, and the tables out of the way.

    All at the start: an interrupted run must not leave rows of another one to be resumed.
    """
    paths = [certificates_path(results, name, shard) for name in models]
    if tables:
        paths += [certificates_path(results, name) for name in models]
        paths += [results / f"comparison_{table}.csv" for table in TABLES]
    for path in dict.fromkeys(paths):
        set_aside(path)


def merge_shards(models: Iterable[str], results: str | Path, parts: int) -> dict[str, list[dict]]:
    """Put together what `parts` processes certified of each model; returns {model: rows}."""
    rows = {}
    for name in models:
        path = certificates_path(results, name)
        merge(path, [certificates_path(results, name, (k + 1, parts)) for k in range(parts)])
        rows[name] = read_rows(path)
    return rows


def drop_shards(models: Iterable[str], results: str | Path, parts: int) -> None:
    """Delete the shards that `merge_shards` put together."""
    for name in models:
        for k in range(parts):
            shard = certificates_path(results, name, (k + 1, parts))
            shard.unlink(missing_ok=True)
            shard.with_suffix(".json").unlink(missing_ok=True)


def certificates_path(results: str | Path, name: str, shard: tuple[int, int] = (1, 1)) -> Path:
    """The file of a model's certificates, or of the k-th of n parts of them."""
    part = ".shard-{}-of-{}".format(*shard) if shard[1] > 1 else ""
    return Path(results) / f"certificates_{name}{part}.csv"


def challenge_models(
    models: Mapping[str, ConvNN],
    test: TensorDataset,
    certificates: Mapping[str, Sequence[Mapping]],
    *,
    sigma: float,
    precision: str,
    images: int,
    seed: int,
) -> None:
    """Attack the smoothed models inside certified balls and print what became of them.

    Raises:
        RuntimeError: if more certificates were broken than their failure odds explain.
    """
    excessive = []
    for name, rows in certificates.items():
        smooth = SmoothClassifier(models[name], sigma, precision=precision)
        broken, tried = challenge_certificates(smooth, test, rows, images=images, seed=seed)
        allowed = broken_allowed(tried, float(rows[0]["alpha"]))
        print(f"{name}: {broken} of {tried} certificates broken by attack, {allowed} allowed")
        if broken > allowed:
            excessive.append(name)
    if excessive:
        raise RuntimeError(
            f"More certificates of {', '.join(excessive)} were broken than alpha allows; "
            "something is wrong with the certificates."
        )


def report_comparison(
    evaluations: Mapping[str, Mapping[str, list[dict]]],
    certificates: Mapping[str, Sequence[Mapping]],
    test: TensorDataset,
    *,
    sigma: float,
    facts: Mapping,
    results: str | Path,
    figures: str | Path,
) -> None:
    """Print the tables, write the attack rows, draw the figures."""
    _report_attacks(evaluations, facts, Path(results), Path(figures))
    radii = [step * sigma / 2 for step in range(7)]
    print("\n" + certificate_lines(certificates, radii))
    print("\n" + population_lines(certificates, radii[2::2]))
    figures = Path(figures)
    clean = {name: found["table"][0]["accuracy"] for name, found in evaluations.items()}
    first = next(iter(certificates.values()))
    setting = f"$\\sigma$ = {sigma:g}, {len(first)} test images, n = {int(first[0]['n']):,}"
    plot_certified_accuracy(
        certificates,
        figures / "comparison_certified_accuracy.png",
        f"Certified accuracy: {setting}",
        clean=clean,
    )
    plot_p_lower(certificates, figures / "comparison_p_lower.png", f"Lower bounds: {setting}")
    plot_gallery(
        *_extremes(certificates, test),
        path=figures / "comparison_radii.png",
        title=f"Smallest and largest certified radii of correct predictions, $\\sigma$ = {sigma:g}",
    )


def _report_attacks(
    evaluations: Mapping[str, Mapping[str, list[dict]]],
    facts: Mapping,
    results: Path,
    figures: Path,
) -> None:
    """The part of `report_comparison` that is about attacks."""

    def of_all(part: str) -> dict[str, list[dict]]:
        return {name: found[part] for name, found in evaluations.items()}

    print("\n" + attack_comparison(of_all("table")))
    print("\n" + median_lines(of_all("smallest_epsilons")))
    rows = [row for name, found in evaluations.items() for row in attack_rows(found, model=name)]
    write_rows(results / "comparison_attacks.csv", rows)
    warnings = of_all("warnings")
    write_json(results / "comparison_attacks.json", {**facts, "warnings": warnings})
    smallest = [
        {"model": name, **row} for name, rows in of_all("smallest_epsilons").items() for row in rows
    ]
    write_rows(results / "comparison_smallest_epsilons.csv", smallest)
    for table in TABLES:
        drop_equal_copies(results / f"comparison_{table}.csv")
    plot_accuracy_against_epsilon(
        of_all("curve"),
        figures / "comparison_accuracy_against_epsilon.png",
        "Accuracy under the worst attack known",
        warnings=[
            f"{name}, {text}" for name in warnings for text in short_warnings(warnings[name])
        ],
    )


def _extremes(certificates: Mapping[str, Sequence[Mapping]], test: TensorDataset, show: int = 8):
    """Images with the smallest and largest certified radius: (rows, row labels)."""
    rows, labels = [], []
    for name, certified in certificates.items():
        right = sorted(
            (r for r in certified if int(r["correct"])), key=lambda r: float(r["radius"])
        )
        for label, chosen in (
            (f"{name}\nsmallest", right[:show]),
            (f"{name}\nlargest", right[-show:]),
        ):
            images = subset(test, [int(row["index"]) for row in chosen]).tensors[0]
            rows.append(
                [
                    (
                        image[0].numpy(),
                        f"{row['prediction']}: r = {round_down(row['radius'], 2)}",
                        "black",
                    )
                    for image, row in zip(images, chosen, strict=True)
                ]
            )
            labels.append(label)
    return rows, labels
