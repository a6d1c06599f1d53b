"""What the training scripts report of one model: console tables, result rows and figures."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.checks import predicted
from src.models import ABSTAIN, SmoothClassifier
from src.records.certify import certify_dataset
from src.reports.output import Output, save_attacks
from src.reports.plotting import (
    GREEN,
    RED,
    plot_certified_accuracy,
    plot_gallery,
)
from src.reports.tables import attack_lines, certificate_lines, format_table, percent
from src.robustness.checklist import warning_lines
from src.robustness.evaluation import attack_evaluation
from src.robustness.fixed_radii import RADII, accuracy_row
from src.training_and_evaluation import accuracy
from src.utils import spread, spread_indices, subset


def report_attacks(
    model: nn.Module,
    test: TensorDataset,
    output: Output,
    *,
    quick: bool = False,
    radii: Sequence[tuple[str, float]] = RADII,
) -> None:
    """Measure a model on clean and attacked test images: print, write rows, draw figures.

    Args:
        model: images -> logits.
        test: the test set.
        output: where the results go.
        quick: use fewer images and steps, for a smoke run.
        radii: pairs of norm and epsilon in the table.
    """
    images, curve_images, steps = (100, 50, 4) if quick else (1000, 500, 40)
    clean = accuracy(model, test)
    print(f"Test accuracy: {clean:.2%} of {len(test):,} images")
    chosen = [spread_indices(len(test), number) for number in (images, curve_images)]
    found = attack_evaluation(model, test, *chosen, steps=steps, radii=radii)
    print(f"\n{output.title} under attack ({found['table'][0]['images']:,} test images)")
    print(attack_lines(found["table"]))
    save_attacks({output.title: found}, output, {"test_accuracy": clean})
    print("\n" + warning_lines(found["warnings"]))
    plot_gallery(
        *_adversarial_gallery(model, test, steps),
        output.figure("adversarial_examples"),
        f"{output.title}: the same digits, clean and attacked",
    )


def _adversarial_gallery(model: nn.Module, test: TensorDataset, steps: int):
    """The first test image of each class, clean and attacked: (rows, row labels)."""
    device = next(model.parameters()).device
    images, labels = (tensor.to(device) for tensor in _first_of_each_class(test))
    pgd = partial(pgd_attack, model, images, labels, steps=steps)
    single_step = gradient_attack(model, images, labels, 0.2)
    versions = {
        "clean": images,
        "single step\n$\\ell_\\infty$, $\\epsilon$ = 0.2": single_step,
        "PGD\n$\\ell_\\infty$, $\\epsilon$ = 0.2": pgd(0.2),
        "PGD\n$\\ell_2$, $\\epsilon$ = 2": pgd(2.0, "l2"),
    }
    return [_captioned(model, version, labels) for version in versions.values()], list(versions)


def _first_of_each_class(dataset: TensorDataset) -> tuple[Tensor, Tensor]:
    """The first image of every class that occurs, and their labels."""
    labels = dataset.tensors[1]
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    return subset(dataset, chosen).tensors


@torch.no_grad()
def _captioned(model: nn.Module, images: Tensor, labels: Tensor) -> list[tuple]:
    """Per image: pixels (28, 28), "class (confidence)", and green if correct, else red."""
    logits = model(images)
    confidence, prediction = logits.softmax(dim=1).amax(dim=1), predicted(logits)
    columns = (images.cpu(), prediction.tolist(), confidence.tolist(), labels.tolist())
    return [
        (image[0].numpy(), f"{guess} ({100 * sure:.0f} %)", GREEN if guess == label else RED)
        for image, guess, sure, label in zip(*columns, strict=True)
    ]


def report_smoothing(
    smooth: SmoothClassifier,
    test: TensorDataset,
    output: Output,
    *,
    images: int,
    indices: Sequence[int],
    n: int,
    alpha: float,
    seed: int,
    resume: bool = False,
) -> None:
    """Accuracy of a smoothed classifier and its base, and certificates of test images.

    Args:
        smooth: the classifier.
        test: the test set.
        output: where the results go.
        images: number of test images for the accuracy of the smoothed prediction.
        indices: the test images to certify.
        n: number of noisy copies that bound the probability of the class.
        alpha: chance of a false certificate, per image.
        seed: of the noise.
        resume: keep the certificates of an interrupted run, see `record_certificates`.
    """
    title, sigma = output.title, f"$\\sigma$ = {smooth.sigma:g}"
    accuracies = _print_accuracies(smooth, test, images, seed, title)
    rows = certify_dataset(
        smooth,
        test,
        output.rows("certificates.csv"),
        n=n,
        alpha=alpha,
        seed=seed,
        indices=indices,
        resume=resume,
        facts={**output.facts, **accuracies},
    )
    print("\n" + certificate_lines({title: rows}, [step * smooth.sigma / 2 for step in range(6)]))
    plot_certified_accuracy(
        {title: rows},
        output.figure("certified_accuracy"),
        f"{title}, {sigma}: {len(rows)} test images, n = {n:,}",
        clean={title: accuracies["clean_accuracy"]},
    )
    plot_gallery(
        *_noisy_gallery(smooth, test, seed),
        output.figure("noisy_digits"),
        f"{title}, trained at {sigma}: the same digits under noise",
    )


def _print_accuracies(smooth: SmoothClassifier, test, images: int, seed: int, title: str) -> dict:
    """Print the accuracies of the base and the smoothed classifier; return those of the base."""
    few = spread(test, images)
    predictions = smooth.predict(few.tensors[0], n=1000, seed=seed)
    facts, lines, count = {}, [], f"{len(test):,}"
    for precision in dict.fromkeys((smooth.precision, "float32")):
        base = smooth.base_classifier.inference_form(precision)
        # The same noise for both.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            shares = accuracy(base, test), accuracy(SmoothClassifier(base, smooth.sigma), test)
        ending = "" if precision == smooth.precision else f"_{precision}"
        kinds = {"clean": "clean images", "noisy": "one noisy draw"}
        for (kind, words), share in zip(kinds.items(), shares, strict=True):
            facts[f"{kind}_accuracy{ending}"] = share
            lines.append((f"base, {words}, {precision}", count, percent(share)))
    lines += [
        ("smoothed (n = 1,000)", f"{len(few):,}", _share(predictions == few.tensors[1])),
        ("abstentions", f"{len(few):,}", _share(predictions == ABSTAIN)),
    ]
    print("\n" + format_table((title, "images", "% [95 % interval]"), lines))
    return facts


def _noisy_gallery(smooth: SmoothClassifier, test: TensorDataset, seed: int):
    """The first test image of each class at several levels of noise: (rows, row labels)."""
    images, labels = _first_of_each_class(test)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    device = next(smooth.parameters()).device
    levels = (0.0, 0.25, 0.5, 1.0, 1.5)
    noisy = [(images + sigma * noise).to(device) for sigma in levels]
    rows = [_captioned(smooth.base_classifier, copies, labels) for copies in noisy]
    return rows, [f"$\\sigma$ = {sigma:g}" for sigma in levels]


def _share(chosen: Tensor) -> str:
    """Percentage of true entries, with its 95 % interval."""
    row = accuracy_row("", "", 0.0, chosen)
    return percent(row["accuracy"], row["low"], row["high"])
