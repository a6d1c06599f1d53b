"""What the training scripts report: console tables, result rows and figures."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.checks import predicted
from src.files import write_json
from src.models import ABSTAIN, SmoothClassifier
from src.records.certify import certify_dataset
from src.records.rows import write_rows
from src.reports.plotting import (
    GREEN,
    RED,
    plot_accuracy_against_epsilon,
    plot_certified_accuracy,
    plot_gallery,
)
from src.reports.tables import attack_lines, certificate_lines, format_table, median_lines, percent
from src.robustness.checklist import short_warnings, warning_lines
from src.robustness.evaluation import attack_evaluation, attack_rows
from src.robustness.fixed_radii import RADII, accuracy_row
from src.training_and_evaluation import accuracy
from src.utils import spread, spread_indices, subset


def figure_title(name: str, words: str, default: str) -> str:
    """What a run of this `--name` is called: in `words` if it is the default, else its name."""
    # A pair of dollar signs would be read as mathematics, and seldom be any.
    return words if name == default else name.replace("$", r"\$")


def report_attacks(
    model: nn.Module,
    test: TensorDataset,
    *,
    name: str,
    title: str,
    figures: str | Path,
    results: str | Path,
    facts: Mapping,
    images: int,
    curve_images: int,
    steps: int,
    radii: Sequence[tuple[str, float]] = RADII,
) -> list[dict]:
    """Attack a model on test images: print the table, write the rows, draw the figures.

    Args:
        model: images -> logits.
        test: the test set.
        name: of the model, the stem of the files.
        title: of the model, for people.
        figures, results: folders.
        facts: what made the result, for the JSON twin of the rows.
        images: how many test images the table takes, at equal distances.
        curve_images: for how many the smallest epsilon is looked for.
        steps: of PGD in the table; the search takes half as many.
        radii: pairs of norm and epsilon in the table.

    Returns:
        The rows of the table.
    """
    found = attack_evaluation(
        model,
        test,
        spread_indices(len(test), images),
        spread_indices(len(test), curve_images),
        steps=steps,
        radii=radii,
    )
    table, smallest = found["table"], found["smallest_epsilons"]
    print(f"\n{title} under attack ({table[0]['images']:,} test images)")
    print(attack_lines(table))
    print("\n" + median_lines({title: smallest}))
    print("\n" + warning_lines(found["warnings"]))
    results, figures = Path(results), Path(figures)
    write_rows(results / f"{name}_attacks.csv", attack_rows(found))
    write_json(results / f"{name}_attacks.json", {**facts, "warnings": found["warnings"]})
    write_rows(results / f"{name}_smallest_epsilons.csv", smallest)
    plot_accuracy_against_epsilon(
        {title: found["curve"]},
        figures / f"{name}_accuracy_against_epsilon.png",
        f"{title} under attack",
        warnings=short_warnings(found["warnings"]),
    )
    plot_gallery(
        *_adversarial_gallery(model, test, steps),
        path=figures / f"{name}_adversarial_examples.png",
        title=f"{title}: the same digits, clean and attacked",
    )
    return table


def _adversarial_gallery(model: nn.Module, test: TensorDataset, steps: int):
    """The first test image of each class, clean and attacked: (rows, row labels)."""
    images, labels = first_of_each_class(test)
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    pgd = partial(pgd_attack, model, images, labels, steps=steps)
    versions = {
        "clean": images,
        "single step\n$\\ell_\\infty$, $\\epsilon$ = 0.2": gradient_attack(
            model, images, labels, 0.2
        ),
        "PGD\n$\\ell_\\infty$, $\\epsilon$ = 0.2": pgd(0.2),
        "PGD\n$\\ell_2$, $\\epsilon$ = 2": pgd(2.0, "l2"),
    }
    rows = [captioned(model, version, labels) for version in versions.values()]
    return rows, list(versions)


def first_of_each_class(dataset: TensorDataset) -> tuple[Tensor, Tensor]:
    """The first image of every class that occurs, and their labels."""
    labels = dataset.tensors[1]
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    return subset(dataset, chosen).tensors


@torch.no_grad()
def captioned(model: nn.Module, images: Tensor, labels: Tensor) -> list[tuple]:
    """(image (28, 28), "class (confidence)", green if correct, else red) for each image."""
    logits = model(images)
    confidence, prediction = logits.softmax(dim=1).amax(dim=1), predicted(logits)
    return [
        (image[0].numpy(), f"{guess} ({100 * sure:.0f} %)", GREEN if guess == label else RED)
        for image, guess, sure, label in zip(
            images.cpu(), prediction.tolist(), confidence.tolist(), labels.tolist(), strict=True
        )
    ]


def report_smoothing(
    smooth: SmoothClassifier,
    test: TensorDataset,
    *,
    name: str,
    title: str,
    figures: str | Path,
    results: str | Path,
    facts: Mapping,
    images: int,
    indices: Sequence[int],
    n: int,
    alpha: float,
    seed: int,
    resume: bool = False,
) -> None:
    """Accuracy of a smoothed classifier and its base, and a first set of certificates.

    Args:
        smooth: the classifier.
        test: the test set.
        name, title, figures, results, facts: as for `report_attacks`.
        images: how many test images the smoothed prediction is made for, at equal distances.
        indices: the test images that are certified.
        n, alpha: noisy copies and failure odds of a certificate.
        seed: of the noise.
        resume: go on with the certificates of an interrupted run, see `record_certificates`.
    """
    clean, lines = _accuracy_lines(smooth, test, images, seed)
    print("\n" + format_table((title, "images", "% [95 % interval]"), lines))
    rows = certify_dataset(
        smooth,
        test,
        Path(results) / f"{name}_certificates.csv",
        n=n,
        alpha=alpha,
        seed=seed,
        indices=indices,
        resume=resume,
        two_sided=True,
        facts={**facts, "clean_accuracy": clean},
    )
    radii = [step * smooth.sigma / 2 for step in range(6)]
    print("\n" + certificate_lines({title: rows}, radii))
    plot_certified_accuracy(
        {title: rows},
        Path(figures) / f"{name}_certified_accuracy.png",
        f"{title}, $\\sigma$ = {smooth.sigma:g}: {len(rows)} test images, n = {n:,}",
        clean={title: clean},
    )
    plot_gallery(
        *_noisy_gallery(smooth, test, seed),
        path=Path(figures) / f"{name}_noisy_digits.png",
        title=f"{title}, trained at $\\sigma$ = {smooth.sigma:g}: the same digits under noise",
    )


def _accuracy_lines(smooth: SmoothClassifier, test: TensorDataset, images: int, seed: int):
    """The base's accuracy on clean images, and the table's lines about it and the smoothed one."""
    few = spread(test, images)
    predictions = smooth.predict(few.tensors[0], n=1000, seed=seed)
    hits, abstained = predictions == few.tensors[1], predictions == ABSTAIN
    base = smooth.base_classifier.inference_form(smooth.precision)
    clean = accuracy(base, test)
    noisy = accuracy(SmoothClassifier(base, smooth.sigma), test)
    return clean, [
        (f"base, clean images, {smooth.precision}", f"{len(test):,}", percent(clean)),
        (f"base, one noisy draw, {smooth.precision}", f"{len(test):,}", percent(noisy)),
        ("smoothed (n = 1,000)", f"{len(few):,}", percent(*proportion(hits))),
        ("abstentions", f"{len(few):,}", percent(*proportion(abstained))),
    ]


def _noisy_gallery(smooth: SmoothClassifier, test: TensorDataset, seed: int):
    """The first test image of each class at several levels of noise: (rows, row labels)."""
    images, labels = first_of_each_class(test)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    device = next(smooth.parameters()).device
    levels = (0.0, 0.25, 0.5, 1.0, 1.5)
    rows = [
        captioned(smooth.base_classifier, (images + sigma * noise).to(device), labels)
        for sigma in levels
    ]
    return rows, [f"$\\sigma$ = {sigma:g}" for sigma in levels]


def proportion(hits: Tensor) -> tuple[float, float, float]:
    """Share of true entries with its 95 % interval."""
    row = accuracy_row("", "", 0.0, hits)
    return row["accuracy"], row["low"], row["high"]
