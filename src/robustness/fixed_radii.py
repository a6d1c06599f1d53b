"""Accuracy under attack at fixed radii."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.certification.intervals import accuracy_interval
from src.training_and_evaluation import correct
from src.utils import progress_bar
from src.verdicts import with_gradients

# The radii of the tables, in pixel units.
RADII = (("linf", 0.1), ("linf", 0.2), ("linf", 0.3), ("l2", 1.0), ("l2", 2.0))
SINGLE_STEP = "single step"
# What every attack of an evaluation has found, taken together.
WORST_KNOWN = "worst known"


def radii_with(*balls: tuple[str, float]) -> list[tuple[str, float]]:
    """RADII and these pairs of norm and epsilon, each once: linf first, then by epsilon."""
    return sorted({*RADII, *balls}, key=lambda ball: (ball[0] != "linf", ball[1]))


def attacks(steps: int = 40) -> dict[str, Callable]:
    """The attacks of tables and curves by name: (model, images, labels, epsilon, norm)."""
    return {
        SINGLE_STEP: gradient_attack,
        # From the single step and from a random point: each start is the weaker one somewhere.
        multi_step_name(steps): partial(pgd_attack, steps=steps, restarts=2, early_stop=True),
    }


def multi_step_name(steps: int) -> str:
    """The name of PGD in `attacks`, in rows and in figures."""
    return f"PGD, {steps} step{'' if steps == 1 else 's'}, 2 starts"


@with_gradients()
def attack_hits(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    steps: int = 40,
    radii: Sequence[tuple[str, float]] = RADII,
    progress: bool = True,
) -> dict[tuple[str, str, float], torch.Tensor]:
    """Which images are classified correctly: clean, and under each attack at each radius.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        steps: of PGD.
        radii: pairs of norm and epsilon.
        progress: show a progress bar.

    Returns:
        (attack, norm, epsilon) -> bool (N,); ("none", "", 0.0) are the clean images.
    """
    hits = {("none", "", 0.0): correct(model, dataset)}
    plan = [(name, attack, *ball) for ball in radii for name, attack in attacks(steps).items()]
    for name, attack, norm, epsilon in progress_bar(progress, plan, desc="attacking"):
        bounded = partial(attack, epsilon=epsilon, norm=norm)
        hits[name, norm, epsilon] = correct(model, dataset, attack=bounded)
    return hits


def table_rows(hits: Mapping[tuple[str, str, float], torch.Tensor]) -> list[dict]:
    """The rows of a table out of `attack_hits`, see `accuracy_row`."""
    return [accuracy_row(*where, right) for where, right in hits.items()]


def accuracy_row(attack: str, norm: str, epsilon: float, hits: torch.Tensor) -> dict:
    """One row of a table out of per-image results, bool (N,).

    `attack`, `norm`, `epsilon`, `images`, `correct` (counts), `accuracy` and its 95 % interval
    `low`, `high` (Clopper-Pearson, test sampling).
    """
    successes, images = int(hits.sum()), len(hits)
    low, high = (float(np.squeeze(bound)) for bound in accuracy_interval(successes, images))
    return {
        "attack": attack,
        "norm": norm,
        "epsilon": epsilon,
        "images": images,
        "correct": successes,
        "accuracy": successes / images,
        "low": low,
        "high": high,
    }
