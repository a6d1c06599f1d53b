"""Attacks on a smoothed classifier inside the balls that were certified: do they hold?"""

from collections.abc import Mapping, Sequence

import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import TensorDataset

from src.balls import direction, l2_length, per_image
from src.checks import (
    check_classes,
    check_count,
    check_dataset,
    check_images,
    check_labels,
    check_number,
)
from src.engine.noise import to_grid
from src.engine.untouched import evaluation_form
from src.methods.smoothing import mean_log_softmax
from src.models import ABSTAIN, SmoothClassifier
from src.records.rows import shown_radius
from src.utils import progress_bar, spread_indices, subset
from src.verdicts import gradient_of, with_gradients

# Noisy copies per image that stand in for the expectation.
DRAWS = 16


@with_gradients()
def smoothed_attack(
    smooth: SmoothClassifier,
    images: Tensor,
    classes: Tensor,
    radii: Tensor,
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Push each image away from its class of the smoothed classifier, within its own l2 ball.

    Projected gradient descent on the log of the mean softmax over noise (SmoothAdv, Salman et
    al., NeurIPS 2019), from a random point of the ball, with the same noise for all steps.

    Args:
        smooth: the classifier.
        images: (B, C, H, W), pixels in [0, 1].
        classes: int64 (B,), the classes that the smoothed classifier predicts.
        radii: (B,), l2 in pixel units, at least 0.
        steps: gradient steps.
        generator: source of start and noise, on the CPU; default: one with seed 0.

    Returns:
        (B, C, H, W), in the balls and in [0, 1] up to rounding.

    Raises:
        ValueError: for an argument out of its range.
    """
    check_images(images)
    check_labels(classes, len(images), name="classes")
    check_classes(classes, smooth.num_classes)
    numbers = isinstance(radii, Tensor) and radii.shape == (len(images),)
    if not (numbers and bool(((radii >= 0) & radii.isfinite()).all())):
        raise ValueError("'radii' must hold one finite number of at least 0 for each image.")
    check_count("steps", steps)
    generator = generator or torch.Generator().manual_seed(0)
    radii = per_image(radii.to(images))
    start = torch.randn(images.shape, generator=generator).to(images)
    noise = torch.randn((DRAWS, *images.shape), generator=generator).to(images) * smooth.sigma
    points = _within(images, images + radii * start, radii)
    with evaluation_form(smooth.base_classifier, probe=True) as base:
        for _ in range(steps):
            points = points.detach().requires_grad_()
            # A copy: autograd refuses classes that were made in inference mode.
            own = mean_log_softmax(base, points, noise).gather(1, classes[:, None].clone())
            step = 2.5 / steps * radii * direction(gradient_of(own, points), "l2")
            points = _within(images, points.detach() - step, radii)
    return points


def _within(images: Tensor, points: Tensor, radii: Tensor) -> Tensor:
    """Points moved back into the l2 balls of `radii` around the images, and into [0, 1]."""
    change = points - images
    shrink = (radii / l2_length(change).clamp(min=1e-30)).clamp(max=1)
    return (images + change * shrink).clamp(0, 1)


@with_gradients()
def challenge_certificates(
    smooth: SmoothClassifier,
    dataset: TensorDataset,
    rows: Sequence[Mapping],
    *,
    images: int,
    restarts: int = 3,
    n: int = 2000,
    stretch: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> tuple[int, int]:
    """Try to break certificates by attack: (broken, tried).

    A certificate counts as broken if at a point within its radius PREDICT, at a level that
    leaves less than one false alarm in 10,000 challenges, returns another class.

    Args:
        smooth: the classifier that was certified.
        dataset: the data set that the rows number.
        rows: result rows; those that abstained are left out.
        images: how many of the rest to try, at most; their radii are spread, the largest included.
        restarts: attacks per image.
        n: noisy copies that decide the class at the point found.
        stretch: factor on the radius; above 1, the certificates are wrong and should break.
        seed: of attacks and votes.
        progress: show a progress bar.

    Raises:
        ValueError: for an argument out of its range.
    """
    check_count("images", images)
    check_count("restarts", restarts)
    check_number("stretch", stretch, positive=True)
    certified = [row for row in rows if int(row["prediction"]) != ABSTAIN]
    # The largest first, so that it is always among those chosen.
    certified.sort(key=shown_radius, reverse=True)
    certified = [certified[number] for number in spread_indices(len(certified), images)]
    chosen = subset(dataset, [int(row["index"]) for row in certified])
    check_dataset(chosen)
    check_classes(chosen.tensors[1], smooth.num_classes)
    generator = torch.Generator().manual_seed(seed)
    level = 1e-4 / max(len(certified) * restarts, 1)
    broken = 0
    device = next(smooth.parameters(), dataset.tensors[0]).device
    for row in progress_bar(progress, certified, desc="challenging", unit="image"):
        # Restarts as a batch: the same image, with a start and noise of its own each time.
        image = dataset.tensors[0][int(row["index"])].to(device).expand(restarts, -1, -1, -1)
        label = torch.full((restarts,), int(row["prediction"]), device=device)
        # In float64: as float32 it may be larger.
        radius = torch.tensor([shown_radius(row) * stretch] * restarts, dtype=torch.float64)
        found = smoothed_attack(smooth, image, label, radius, generator=generator)
        found, inside = on_grid(found, image[0], radius, smooth.levels)
        # A seed of its own: votes with the noise of the certificate would repeat its luck.
        classes = smooth.predict(found, n, level, seed=seed + 1)
        other = (classes != ABSTAIN) & (classes != int(row["prediction"]))
        broken += bool((other & inside).any())
    return broken, len(certified)


def on_grid(points: Tensor, image: Tensor, radii: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Points (B, ...) moved to the grid of 1 / levels, where votes are cast, and which stay inside.

    Each is rounded to the nearest point of the grid. If that is farther than its radius from the
    image, it is first moved a little towards the image. `inside`, (B,) on the CPU, says whether it
    is within its radius then.
    """
    steps, (distance,) = to_grid(image[None], levels)
    # float32(k / 255) stands for k / 255, around which the ball lies.
    start = image.cpu().double() if distance else steps[0].cpu().double() / levels
    limit = radii.cpu().double()
    change = points.cpu().double() - start

    def rounded(change: Tensor) -> tuple[Tensor, Tensor]:
        found = ((start + change) * levels).round() / levels
        return found, (found - start).flatten(1).norm(dim=1) <= limit

    # Every pixel towards the image.
    found, inside = rounded(change.sign() * (change.abs() - 0.5 / levels).clamp(min=0))
    for share in (0.9, 0.97, 0.99, 0.999, 1):
        nearest, fits = rounded(share * change)
        found, inside = torch.where(per_image(fits), nearest, found), inside | fits
    return found.to(points), inside


def broken_allowed(tried: int, alpha: float) -> int:
    """How many of `tried` sound certificates may break, if each fails with probability `alpha`.

    More would break with a probability of at most 1 in 1,000.
    """
    return int(stats.binom.ppf(0.999, tried, alpha))
