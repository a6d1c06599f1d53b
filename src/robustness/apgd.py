"""Auto-PGD, without a step size to choose (Croce and Hein, ICML 2020), in any search space."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.attacks import checked
from src.balls import direction, projection, random_in_ball
from src.checks import check_count, predicted
from src.engine.untouched import evaluation_form
from src.verdicts import Worst, gradient_of, known, logits_of, margin, with_gradients

MOMENTUM = 0.75
# Halve the step where fewer than this share of the steps since the last checkpoint went up.
RISING = 0.75


@with_gradients()
def apgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str = "margin",
    targets: int = 0,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD (Croce and Hein, ICML 2020): steps of 2 * epsilon, halved where they stop helping.

    The first start is the image itself, further ones are random in the ball. A misclassified
    image is left alone: what is returned for it is the first such point, for the others the
    point of highest margin visited.

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes.
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        steps: gradient steps per start.
        restarts: number of starts (with `targets`, for each of them).
        loss: "cross_entropy"; "margin", the largest other logit minus that of the label; or
            "dlr", the margin divided by the distance between the first and the third largest
            logit. The last two do not mind how large the logits are.
        targets: 0, or how many of the most likely other classes to approach, one after the
            other: `loss` then measures how near that class is to being chosen.
        clip: range of the result.
        generator: source of the random starts, on the CPU; default: one with seed 0.

    Raises:
        ValueError: for an argument out of its range.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_search(steps, restarts, loss, targets)
    if epsilon == 0 or not len(images):
        return images.clone()
    project = projection(images, epsilon, norm, clip)
    with evaluation_form(model) as network:
        space = Space(
            network,
            images,
            project,
            lambda gradient, chosen: epsilon * direction(gradient, norm),
            lambda source: project(images + random_in_ball(images, epsilon, norm, source)),
        )
        return search(space, labels, steps, restarts, loss, targets, generator).points


@dataclass(frozen=True)
class Space:
    """Where a search takes place: the ball itself, or its image under a first layer.

    network: points (B, 1, 28, 28) -> logits (B, classes).
    origin: (B, 1, 28, 28), the points from which the search sets out.
    project: points, chosen -> the nearest admissible points of the chosen images.
    ascent: gradient, chosen -> the steepest ascent, as long as the admissible set is wide.
    random: generator -> a random admissible point for every image.
    """

    network: Callable[[Tensor], Tensor]
    origin: Tensor
    project: Callable[..., Tensor]
    ascent: Callable[[Tensor, Tensor], Tensor]
    random: Callable[[torch.Generator], Tensor]


def check_search(steps: int, restarts: int, loss: str, targets: int) -> None:
    """Raise ValueError for an argument of `search` out of its range."""
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_count("targets", targets, 0)
    if loss not in LOSSES:
        raise ValueError(f"'loss' is {loss!r}; use one of {', '.join(map(repr, LOSSES))}.")


def search(space, labels, steps, restarts, loss, targets, generator) -> Worst:
    """Auto-PGD from every start and to every target, as far as images are still standing."""
    generator = generator or torch.Generator().manual_seed(0)
    worst = Worst(space.network, space.origin, labels, "margin", False)
    with torch.no_grad():
        logits = logits_of(space.network, space.origin, labels)
    if loss == "dlr" and logits.shape[1] < (4 if targets else 3):
        raise ValueError("'loss' = 'dlr' needs a third class, and a fourth for 'targets'.")
    worst.keep(space.origin, slice(None), margin(logits, labels), predicted(logits) != labels)
    others = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    targets = min(targets, logits.shape[1] - 1)
    for restart in range(restarts):
        for target in others[:, :targets].T if targets else (None,):
            # Drawn for all images, so that no image's start depends on which others stand.
            starts = space.random(generator) if restart else space.origin
            chosen = worst.standing()
            look = partial(_look, space.network, worst, labels, loss, target)
            _ascend(space, look, starts[chosen], chosen, steps)
    return worst


def _ascend(space: Space, look: Callable, points: Tensor, chosen: Tensor, steps: int) -> None:
    """One run of Auto-PGD from `points`, of the images with the numbers `chosen`."""
    if not len(chosen):
        return
    value, gradient, _ = look(points, chosen)
    run = {"chosen": chosen, "points": points, "before": points, "gradient": gradient}
    run |= {"value": value, "best": value, "best_points": points, "best_gradient": gradient}
    run |= {"size": torch.full_like(value, 2.0, dtype=points.dtype), "best_then": value}
    run |= {"rises": torch.zeros_like(value), "halved": torch.zeros_like(value, dtype=torch.bool)}
    ends, begin = _checkpoints(steps), 0
    for step in range(1, steps + 1):
        points, chosen = run["points"], run["chosen"]
        move = run["size"][:, None, None, None] * space.ascent(run["gradient"], chosen)
        ahead = space.project(points + move, chosen)
        if step > 1:
            ahead = points + MOMENTUM * (ahead - points)
            ahead = space.project(ahead + (1 - MOMENTUM) * (points - run["before"]), chosen)
        value, gradient, fallen = look(ahead, chosen)
        run["rises"] += value > run["value"]
        run |= {"points": ahead, "before": points, "value": value, "gradient": gradient}
        _keep_best(run)
        if fallen.any():
            run = {name: entry[~fallen] for name, entry in run.items()}
            if fallen.all():
                return
        if step in ends:
            _halve(run, step - begin)
            begin = step


def _keep_best(run: dict) -> None:
    better = run["value"] > run["best"]
    wide = better[:, None, None, None]
    run["best"] = torch.where(better, run["value"], run["best"])
    for name in ("points", "gradient"):
        run[f"best_{name}"] = torch.where(wide, run[name], run[f"best_{name}"])


def _halve(run: dict, span: int) -> None:
    """At a checkpoint: halve the steps that are too long, and return to the best point.

    Too long if too few of the last `span` steps went up, or if neither the step nor the best
    value has changed since the last checkpoint (conditions 1 and 2 of the paper).
    """
    stuck = ~run["halved"] & (run["best"] <= run["best_then"])
    halve = (run["rises"] < RISING * span) | stuck
    wide = halve[:, None, None, None]
    run["size"] = torch.where(halve, run["size"] / 2, run["size"])
    run["value"] = torch.where(halve, run["best"], run["value"])
    # The point before as well: a momentum that led away must not be taken along.
    run["before"] = torch.where(wide, run["best_points"], run["before"])
    run["points"] = torch.where(wide, run["best_points"], run["points"])
    run["gradient"] = torch.where(wide, run["best_gradient"], run["gradient"])
    run |= {"best_then": run["best"], "halved": halve, "rises": torch.zeros_like(run["rises"])}


def _checkpoints(steps: int) -> set[int]:
    """The steps after which lengths are reconsidered: 22 % first, then shorter and shorter."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}


def _look(network, worst: Worst, labels, loss, target, points, chosen):
    """Loss (B,), its gradient, and which images have fallen; `worst` takes note of the points."""
    points = points.detach().clone().requires_grad_()
    # Autograd keeps the labels, and refuses those that were made in inference mode.
    labels = labels[chosen].clone()
    with torch.enable_grad():
        logits = logits_of(network, points, labels)
        value = LOSSES[loss](logits, labels, None if target is None else target[chosen].clone())
    gradient = gradient_of(value, points)
    points, logits = points.detach(), logits.detach()
    fallen = predicted(logits) != labels
    worst.keep(points, chosen, margin(logits, labels), fallen)
    return known(value.detach()), gradient, fallen


def _cross_entropy(logits, labels, target):
    if target is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def _margin(logits, labels, target):
    if target is None:
        return margin(logits, labels)
    return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def _dlr(logits, labels, target):
    """Difference of logits ratio; for a target, with the mean of the third and fourth logit."""
    ordered = logits.sort(dim=1, descending=True).values
    third = ordered[:, 2] if target is None else (ordered[:, 2] + ordered[:, 3]) / 2
    return _margin(logits, labels, target) / (ordered[:, 0] - third).clamp(min=1e-12)


LOSSES = {"cross_entropy": _cross_entropy, "margin": _margin, "dlr": _dlr}
