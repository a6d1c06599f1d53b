"""The comparison of several models: attacks, certificates, tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch.utils.data import TensorDataset

from src.certificates import read_rows, read_twin, record_certificates, write_rows
from src.challenge import broken_allowed, challenge_certificates
from src.checkpoints import load_checkpoint
from src.distributed import is_main
from src.files import write_json
from src.models import ConvNN, SmoothClassifier
from src.plotting import (
    plot_accuracy_against_epsilon,
    plot_certified_accuracy,
    plot_gallery,
    plot_p_lower,
)
from src.redraw import certificate_settings
from src.robustness import attack_table, epsilon_curves
from src.shards import merge
from src.tables import certificate_lines, format_table, percent, population_lines, round_down
from src.training_and_evaluation import accuracy, evaluate_robustness
from src.utils import subset

# Checkpoint and the script that makes it, for each model in the order of the tables.
MODELS = {
    "standard": ("standard_training", "main_training.py"),
    "adversarial": ("adversarial_training", "main_adv_training.py"),
    "smoothed": ("randomized_smoothing", "main_random_smoothing.py"),
}


def load_models(folder: str | Path, device) -> dict[str, ConvNN]:
    """The three checkpoints by the names of the tables.

    Raises:
        FileNotFoundError: if one is missing; the message names the script that makes it.
        ValueError: if one is damaged.
    """
    models = {}
    for name, (stem, script) in MODELS.items():
        path = Path(folder) / f"{stem}.pt"
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


def attack_models(
    models: Mapping[str, ConvNN], dataset: TensorDataset, *, steps: int
) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Tables {model: rows} and curves {"model, attack": rows} of accuracy under attack.

    The smoothed model stands there with its base network: these attacks do not see the noise.
    """
    tables, curves = {}, {}
    for name, model in models.items():
        print(f"Attacking the {name} model on {len(dataset)} test images")
        tables[name] = attack_table(model, dataset, steps=steps)
        for attack, rows in epsilon_curves(model, dataset, steps=max(steps // 2, 1)).items():
            curves[f"{name}, {attack}"] = rows
    return tables, curves


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
    settings = {"n0": n0, "n": n, "alpha": alpha, "seed": seed}
    settings |= {"two_sided": True} if two_sided else {}
    part, parts = shard
    indices = indices[part - 1 :: parts]
    of = {"shard": f"{part}/{parts}"} if parts > 1 else {}
    rows = {}
    for name, model in models.items():
        print(f"Certifying the {name} model at sigma = {sigma:g}, n = {n:,}, alpha = {alpha:g}")
        clean = accuracy(model.inference_form(precision), test)
        print(f"Its accuracy on all clean test images, in {precision}: {clean:.2%}")
        smooth = SmoothClassifier(model, sigma, precision=precision)
        rows[name] = record_certificates(
            _certificates(results, name, shard),
            indices,
            lambda left, smooth=smooth: evaluate_robustness(
                smooth, test, **settings, indices=left, progress=is_main()
            ),
            certificate_settings(smooth, test, **settings) | of,
            {**facts, "clean_accuracy": clean},
            resume=resume,
        )
    return rows


def recorded_precision(
    results: str | Path, name: str, shard: tuple[int, int] = (1, 1)
) -> str | None:
    """The precision of a model's certificates from an earlier run; None if there are none."""
    twin = _certificates(results, name, shard).with_suffix(".json")
    return read_twin(twin)["settings"].get("precision") if twin.exists() else None


def merge_shards(models: Iterable[str], results: str | Path, parts: int) -> dict[str, list[dict]]:
    """Put together what `parts` processes certified of each model; returns {model: rows}."""
    rows = {}
    for name in models:
        path = _certificates(results, name)
        merge(path, [_certificates(results, name, (k + 1, parts)) for k in range(parts)])
        rows[name] = read_rows(path)
    return rows


def drop_shards(models: Iterable[str], results: str | Path, parts: int) -> None:
    """Delete the shards that `merge_shards` put together."""
    for name in models:
        for k in range(parts):
            shard = _certificates(results, name, (k + 1, parts))
            shard.unlink(missing_ok=True)
            shard.with_suffix(".json").unlink(missing_ok=True)


def _certificates(results: str | Path, name: str, shard: tuple[int, int] = (1, 1)) -> Path:
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


def attack_comparison(tables: Mapping[str, Sequence[Mapping]]) -> str:
    """Accuracy of each model on clean images and under each attack, side by side."""
    lines = []
    for rows in zip(*tables.values(), strict=True):
        row = rows[0]
        ball = f"{row['norm']} {row['epsilon']:g}, {row['attack']}"
        cells = (percent(r["accuracy"], r["low"], r["high"]) for r in rows)
        lines.append(("clean" if row["attack"] == "none" else ball, *cells))
    return format_table(("accuracy % [95 % interval]", *tables), lines)


def report_comparison(
    tables: Mapping[str, Sequence[Mapping]],
    curves: Mapping[str, Sequence[Mapping]],
    certificates: Mapping[str, Sequence[Mapping]],
    test: TensorDataset,
    *,
    sigma: float,
    facts: Mapping,
    results: str | Path,
    figures: str | Path,
) -> None:
    """Print the tables, write the attack rows, draw the figures."""
    print("\n" + attack_comparison(tables))
    radii = [step * sigma / 2 for step in range(7)]
    print("\n" + certificate_lines(certificates, radii))
    print("\n" + population_lines(certificates, radii[2::2]))
    rows = [
        {"part": "table", "model": name, **row} for name, rows in tables.items() for row in rows
    ]
    rows += [
        {"part": "curve", "model": name.split(", ")[0], **row}
        for name, curve in curves.items()
        for row in curve
    ]
    write_rows(Path(results) / "comparison_attacks.csv", rows)
    write_json(Path(results) / "comparison_attacks.json", dict(facts))

    figures = Path(figures)
    first = next(iter(certificates.values()))
    setting = f"$\\sigma$ = {sigma:g}, {len(first)} test images, n = {int(first[0]['n']):,}"
    # Twelve curves in two panels cannot be read: the figure takes the stronger attack.
    strongest = {n.split(", ")[0]: rows for n, rows in curves.items() if "PGD" in n}
    plot_accuracy_against_epsilon(
        strongest, figures / "comparison_accuracy_against_epsilon.png", "Accuracy under PGD"
    )
    plot_certified_accuracy(
        certificates,
        figures / "comparison_certified_accuracy.png",
        f"Certified accuracy: {setting}",
    )
    plot_p_lower(certificates, figures / "comparison_p_lower.png", f"Lower bounds: {setting}")
    plot_gallery(
        *_extremes(certificates, test),
        path=figures / "comparison_radii.png",
        title=f"Smallest and largest certified radii of correct predictions, $\\sigma$ = {sigma:g}",
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
