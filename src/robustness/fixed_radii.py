"""Accuracy under attack at fixed radii."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.certification.intervals import accuracy_interval
from src.training_and_evaluation import correct
from src.utils import progress_bar
from src.verdicts import with_gradients

# The radii of the tables, in pixel units.
RADII = (("linf", 0.1), ("linf", 0.2), ("linf", 0.3), ("l2", 1.0), ("l2", 2.0))
SINGLE_STEP = "single step"
# The (attack, norm, epsilon) of images without an attack.
CLEAN = ("none", "", 0.0)
# The name in rows for what all attacks of an evaluation found together.
WORST_KNOWN = "worst known"


def radii_with(*balls: tuple[str, float]) -> list[tuple[str, float]]:
    """RADII and these pairs of norm and epsilon, without repeats: linf first, then by epsilon."""
    return sorted({*RADII, *balls}, key=lambda ball: (ball[0] != "linf", ball[1]))


def attacks(steps: int = 40) -> dict[str, Callable]:
    """The attacks of tables and curves by name: (model, images, labels, epsilon, norm)."""
    return {
        SINGLE_STEP: gradient_attack,
        # From the single step and from a random point: on some images either start is the weaker.
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
) -> dict[tuple[str, str, float], Tensor]:
    """Which images are still classified correctly: clean, and under each attack at each radius.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        steps: of PGD.
        radii: pairs of norm and epsilon.
        progress: show a progress bar.

    Returns:
        (attack, norm, epsilon) -> bool (N,); the clean images are at CLEAN.
    """
    standing = {CLEAN: correct(model, dataset)}
    plan = [(name, attack, *ball) for ball in radii for name, attack in attacks(steps).items()]
    for name, attack, norm, epsilon in progress_bar(progress, plan, desc="attacking"):
        attack = partial(attack, epsilon=epsilon, norm=norm)
        standing[name, norm, epsilon] = correct(model, dataset, attack=attack)
    return standing


def table_rows(standing: Mapping[tuple[str, str, float], Tensor]) -> list[dict]:
    """The rows of a table from what `attack_hits` returns; see `accuracy_row`."""
    return [accuracy_row(*where, still) for where, still in standing.items()]


def accuracy_row(attack: str, norm: str, epsilon: float, standing: Tensor) -> dict:
    """One row of a table, from which images are still classified correctly, bool (N,).

    It has `attack`, `norm`, `epsilon`, the counts `images` and `correct`, `accuracy`, and its 95 %
    interval `low`, `high` (Clopper-Pearson, for the choice of the test images).
    """
    successes, images = int(standing.sum()), len(standing)
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
