"""The nearest misclassified image that several attacks find, for one image."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from src.engine.untouched import unwrapped
from src.robustness.few_pixels import few_pixels_attack
from src.robustness.fixed_radii import attacks, multi_step_name
from src.robustness.smallest_epsilon import GRID, LARGEST
from src.robustness.thresholds import thresholds_attack
from src.verdicts import stands, with_gradients


@with_gradients()
def closest_attacked(
    model: nn.Module, image: Tensor, label: Tensor, *, steps: int = 20
) -> dict[str, tuple[float, Tensor]]:
    """Per norm the smallest perturbation found that changes the class of one image.

    Bisects the radius of PGD, and of the attack behind the thresholds if the model has some; in l2
    also moves a few pixels far. What one norm found counts in the other. So each epsilon is an
    upper bound on the true robustness, and the image proves it.

    Args:
        model: images -> logits (B, classes).
        image: (1, C, H, W) in [0, 1], where the model is.
        label: int64 (1,), the class that should change.
        steps: of the attacks by gradient.

    Returns:
        norm -> (epsilon, attacked image (1, C, H, W)); a norm is missing if nothing was found
        within LARGEST.
    """
    tried = [attacks(steps)[multi_step_name(steps)]]
    if getattr(unwrapped(model), "thresholds", None) is not None:
        tried.append(partial(thresholds_attack, steps=steps))
    points = [few_pixels_attack(model, image, label, LARGEST["l2"])]
    points += [
        point
        for norm in LARGEST
        for attack in tried
        for point in _bisected(model, image, label, attack, norm)
    ]
    broken = [point for point in points if not bool(stands(model, point, label))]
    found = {}
    for norm, largest in LARGEST.items():
        lengths = [_length(point, image, norm) for point in broken]
        if lengths and min(lengths) <= largest:
            found[norm] = (min(lengths), broken[lengths.index(min(lengths))])
    return found


def _bisected(model, image, label, attack: Callable, norm: str) -> list[Tensor]:
    """The misclassified images that bisecting the radius of an attack finds."""
    found, low = [], 0
    largest = high = round(LARGEST[norm] * GRID[norm])
    # What fails in the largest ball may work in a smaller one: long steps leap over errors.
    plan = [largest, largest // 2, largest // 4]
    while plan or (found and high - low > 1):
        middle = plan.pop(0) if plan else (low + high) // 2
        point = attack(model, image, label, epsilon=middle / GRID[norm], norm=norm)
        if not bool(stands(model, point, label)):
            found.append(point)
            high, plan = min(high, middle), []
        elif not plan and found:
            low = middle
    return found


def _length(point: Tensor, image: Tensor, norm: str) -> float:
    change = (point.double() - image.double()).flatten()
    return float(torch.linalg.vector_norm(change, torch.inf if norm == "linf" else 2))
