"""Auto-PGD, without a step size to choose (Croce and Hein, ICML 2020), in any search space."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from src.attacks import check_loss, checked
from src.balls import direction, per_image, projection, random_in_ball
from src.checks import check_count
from src.engine.untouched import evaluation_form
from src.verdicts import Verdict, Worst, cross_entropy, judge, known, margin, with_gradients

MOMENTUM = 0.75
# Halve the step where fewer than this share of the steps since the last checkpoint went up.
RISING = 0.75
# The first steps, in radii: from a point in the middle, and from one that a wider ball gave.
FIRST_STEP, LATER_STEP = 2.0, 0.5
# Radius of the first of several shrinking balls: nearly the whole box.
WIDEST_BALL = 8.0


@dataclass(frozen=True)
class Plan:
    """The options of `apgd_attack` and `thresholds_attack`, checked.

    Attributes:
        steps: gradient steps per start.
        restarts: number of starts (with `targets`, per target).
        loss: "cross_entropy"; "margin", the largest other logit minus that of the label; or
            "dlr", the margin divided by the distance between the first and the third largest
            logit. The scale of the logits does not matter to the last two.
        targets: how many of the most likely other classes to approach, one after the other;
            `loss` then measures how near that class is to being chosen. 0: no single class.
        patience: give up after so many runs in a row (of a start and a target) that broke nothing;
            default: never.
        shrinks: every run comes from outside, through so many wider balls. The first is eight times
            as wide; each search goes on where the one before ended. In l2 it finds what a search
            from the middle does not, where that is led to the wrong place.
        clip: range of the result.
        generator: source of the random starts, on the CPU; default: one with seed 0.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "margin"
    targets: int = 0
    patience: int | None = None
    shrinks: int = 0
    clip: tuple[float, float] = (0.0, 1.0)
    generator: torch.Generator | None = None

    def __post_init__(self):
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_count("targets", self.targets, 0)
        check_count("shrinks", self.shrinks, 0)
        if self.patience is not None:
            check_count("patience", self.patience)
        check_loss(self.loss, LOSSES)


@with_gradients()
def apgd_attack(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = "linf", **options
) -> Tensor:
    """Auto-PGD (Croce and Hein, ICML 2020): steps of 2 * epsilon, halved where they stop helping.

    The first start is the image itself, further ones are random in the ball. Once a step makes an
    image misclassified it is left alone. For it a misclassified point is returned, for the others
    the point of highest margin. Arguments and errors as for `pgd_attack`; `options`: see `Plan`.
    """
    plan = Plan(**options)
    images = checked(images, labels, epsilon, norm, plan.clip)
    if epsilon == 0 or not len(images):
        return images.clone()
    space = Ball(images, epsilon, norm, plan.clip)
    with evaluation_form(model) as network:
        return search(network, space, labels, plan).points


class Ball:
    """The space in which a search takes place. Other spaces have the same, but for `wider`.

    origin: (B, C, H, W), the points from which the search sets out.
    """

    def __init__(self, images: Tensor, epsilon: float, norm: str, clip):
        self.origin, self.epsilon, self.norm, self.clip = images, epsilon, norm, clip
        # (points, chosen) -> the nearest points of the space, for the images at these positions.
        self.project = projection(images, epsilon, norm, clip)

    def ascent(self, gradient: Tensor, chosen: Tensor) -> Tensor:
        """The change of steepest ascent; its length is the radius of the space."""
        return self.epsilon * direction(gradient, self.norm)

    def random(self, generator: torch.Generator) -> Tensor:
        """A random point of the space per image."""
        change = random_in_ball(self.origin, self.epsilon, self.norm, generator)
        return self.project(self.origin + change)

    def wider(self, factor: float) -> "Ball":
        """The ball of `factor` times the radius."""
        return Ball(self.origin, factor * self.epsilon, self.norm, self.clip)


def search(network, space, labels: Tensor, plan: Plan) -> Worst:
    """Auto-PGD from every start and to every target, on the images that still stand.

    `network` gives logits (B, classes) for the points of `space`, a `Ball` or the like.
    """
    generator = plan.generator or torch.Generator().manual_seed(0)
    worst = Worst(network, space.origin, labels, "margin", False)
    logits = worst.visit(space.origin, want_gradient=False).logits
    if plan.loss == "dlr" and logits.shape[1] < (4 if plan.targets else 3):
        raise ValueError("'loss' = 'dlr' needs a third class, and a fourth for 'targets'.")
    others = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    targets = min(plan.targets, logits.shape[1] - 1)
    aims, barren = others[:, :targets].T if targets else (None,), 0
    for restart, target in itertools.product(range(plan.restarts), aims):
        # Drawn for all images, so that no image's start depends on which others stand.
        start, before = space.random(generator) if restart else space.origin, worst.standing.clone()
        visit, size = _visitor(worst, plan.loss, target), FIRST_STEP
        if plan.shrinks:
            start, size = _from_outside(worst, space, start, target, plan), LATER_STEP
        _ascend(space, visit, start, worst.standing, plan.steps, size)
        barren = barren + 1 if torch.equal(before, worst.standing) else 0
        if barren == plan.patience:
            break
    return worst


def _from_outside(worst: Worst, space: Ball, start: Tensor, target, plan: Plan) -> Tensor:
    """Points of `space`, in which searches of ever smaller balls around it end."""
    size = FIRST_STEP
    for number in range(plan.shrinks):
        ball = space.wider(WIDEST_BALL ** (1 - number / plan.shrinks))
        found = Worst(worst.network, start, worst.labels, "margin", False)
        visit = _visitor(found, plan.loss, target)
        _ascend(ball, visit, ball.project(start), worst.standing, plan.steps, size)
        start, size = found.points, LATER_STEP
    return space.project(start)


def _visitor(worst: Worst, loss: str, target: Tensor | None) -> Callable[..., Verdict]:
    """A function that judges points by `loss`, while `worst` keeps those of highest margin."""

    def visit(points: Tensor, chosen: Tensor) -> Verdict:
        labels, aims = worst.labels[chosen], None if target is None else target[chosen]
        verdict = judge(
            worst.network, points, labels, lambda logits, own: LOSSES[loss](logits, own, aims)
        )
        worst.keep(points, chosen, margin(verdict.logits, labels), verdict.broken)
        return verdict._replace(loss=known(verdict.loss))

    return visit


@dataclass
class _Run:
    """The state of one run of Auto-PGD. Every entry has one row per image that still stands."""

    chosen: Tensor  # positions of these images in the batch
    points: Tensor  # where they are
    previous: Tensor  # where they were one step before
    loss: Tensor  # at `points`
    gradient: Tensor  # of the loss at `points`
    best_points: Tensor  # where the loss was highest
    best_loss: Tensor
    best_gradient: Tensor
    checkpoint_loss: Tensor  # `best_loss` at the last checkpoint
    size: Tensor  # length of the steps, as a multiple of the radius
    rises: Tensor  # how many steps since the last checkpoint raised the loss
    halved: Tensor  # whether the last checkpoint halved the steps

    def select(self, rows: Tensor) -> "_Run":
        """The state of some of the images."""
        return _Run(*(getattr(self, field.name)[rows] for field in fields(self)))

    def ahead(self, space, momentum: float) -> Tensor:
        """The points after the next step; `momentum` is the share that the gradient decides."""
        change = per_image(self.size) * space.ascent(self.gradient, self.chosen)
        ahead = space.project(self.points + change, self.chosen)
        if momentum == 1:
            return ahead
        ahead = self.points + momentum * (ahead - self.points)
        return space.project(ahead + (1 - momentum) * (self.points - self.previous), self.chosen)

    def move(self, points: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Take note of a step to `points`."""
        self.rises += loss > self.loss
        self.previous, self.points, self.loss, self.gradient = self.points, points, loss, gradient
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_points = torch.where(per_image(better), points, self.best_points)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)

    def halve(self, steps: int) -> None:
        """At a checkpoint: halve the steps that are too long, and return to the best point.

        A step is too long if too few of the last `steps` steps went up, or if neither it nor the
        best loss has changed since the last checkpoint (conditions 1 and 2 of the paper).
        """
        stuck = ~self.halved & (self.best_loss <= self.checkpoint_loss)
        halve = (self.rises < RISING * steps) | stuck
        self.size = torch.where(halve, self.size / 2, self.size)
        self.loss = torch.where(halve, self.best_loss, self.loss)
        # The previous point as well: a momentum that led away must not be taken along.
        self.previous = torch.where(per_image(halve), self.best_points, self.previous)
        self.points = torch.where(per_image(halve), self.best_points, self.points)
        self.gradient = torch.where(per_image(halve), self.best_gradient, self.gradient)
        self.checkpoint_loss, self.halved = self.best_loss, halve
        self.rises = torch.zeros_like(self.rises)


def _ascend(
    space, visit: Callable, start: Tensor, standing: Tensor, steps: int, size: float
) -> None:
    """One run of Auto-PGD from `start`, for the images that are `standing`.

    The first step is `size` times as long as the radius.
    """
    chosen = standing.nonzero()[:, 0]
    if not len(chosen):
        return
    points = start[chosen]
    _, loss, _, gradient = visit(points, chosen)
    lengths, zeros = torch.full_like(loss, size, dtype=points.dtype), torch.zeros_like(loss)
    now = (points, loss, gradient)
    run = _Run(chosen, points, *now, *now, loss, lengths, zeros, zeros.bool())
    checkpoints, last = _checkpoints(steps), 0
    for step in range(1, steps + 1):
        points = run.ahead(space, 1 if step == 1 else MOMENTUM)
        _, loss, broken, gradient = visit(points, run.chosen)
        run.move(points, loss, gradient)
        if broken.all():
            return
        if broken.any():
            run = run.select(~broken)
        if step in checkpoints:
            run.halve(step - last)
            last = step


def _checkpoints(steps: int) -> set[int]:
    """The steps after which lengths are reconsidered: 22 % first, then shorter and shorter."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}


def _cross_entropy(logits, labels, target):
    return cross_entropy(logits, labels) if target is None else -cross_entropy(logits, target)


def _margin(logits, labels, target):
    if target is None:
        return margin(logits, labels)
    return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def _dlr(logits, labels, target):
    """Difference of logits ratio; for a target, with the mean of the third and fourth logit."""
    ordered = logits.sort(dim=1, descending=True).values
    third = ordered[:, 2] if target is None else (ordered[:, 2] + ordered[:, 3]) / 2
    return _margin(logits, labels, target) / (ordered[:, 0] - third).clamp(min=1e-12)


# (logits, labels, target) -> (B,); the target is int64 (B,), or None.
LOSSES = {"cross_entropy": _cross_entropy, "margin": _margin, "dlr": _dlr}
