"""Falsification: attacks on the smoothed classifier inside the balls that were certified."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from src.checks import check_count, check_number
from src.convnn import evaluation_form
from src.models import ABSTAIN, SmoothClassifier


def smoothed_attack(
    smooth: SmoothClassifier,
    images: Tensor,
    classes: Tensor,
    radii: Tensor,
    *,
    steps: int = 20,
    draws: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Push each image away from its class of the smoothed classifier, within its own l2 ball.

    Projected gradient descent on the log of the mean softmax over noise (SmoothAdv, Salman et
    al., NeurIPS 2019), from a random point of the ball, with the same noise for all steps.

    Args:
        smooth: the classifier.
        images: (B, 1, 28, 28), pixels in [0, 1].
        classes: int64 (B,), what the smoothed classifier says of them.
        radii: (B,), l2 in pixel units, at least 0.
        steps: gradient steps.
        draws: noisy copies of each image that stand in for the expectation.
        generator: of start and noise, on the CPU; default: one with seed 0.

    Returns:
        (B, 1, 28, 28), in the balls and in [0, 1] up to rounding.

    Raises:
        ValueError: for an argument out of its range.
    """
    check_count("steps", steps)
    check_count("draws", draws)
    generator = generator or torch.Generator().manual_seed(0)
    radii = radii.to(images)[:, None, None, None]
    start = torch.randn(images.shape, generator=generator).to(images)
    noise = torch.randn((draws, *images.shape), generator=generator).to(images) * smooth.sigma
    points = _within(images, images + radii * start, radii)
    with evaluation_form(smooth.base_classifier, probe=True) as base:
        for _ in range(steps):
            points = points.detach().requires_grad_()
            logits = base((points + noise).flatten(0, 1)).unflatten(0, (draws, -1))
            mean_log = F.log_softmax(logits, dim=2).logsumexp(dim=0)
            own = mean_log.gather(1, classes[:, None])
            (gradient,) = torch.autograd.grad(own.sum(), points)
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
            step = 2.5 / steps * radii * gradient / length
            points = _within(images, points.detach() - step, radii)
    return points


def _within(images: Tensor, points: Tensor, radii: Tensor) -> Tensor:
    """Points moved back into the l2 balls of `radii` around the images, and into [0, 1]."""
    change = points - images
    length = change.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
    return (images + change * (radii / length).clamp(max=1)).clamp(0, 1)


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
        rows: result rows; those that abstained are passed over.
        images: how many of the rest to try, spread over the radii.
        restarts: attacks on each.
        n: noisy copies that decide the class at the point found.
        stretch: factor on the radius; above 1 it plants an error that should be found.
        seed: of attacks and votes.
        progress: show a progress bar.

    Raises:
        ValueError: for an argument out of its range.
    """
    check_count("images", images)
    check_number("stretch", stretch, positive=True)
    certified = sorted((r for r in rows if int(r["prediction"]) != ABSTAIN), key=_radius)
    certified = certified[:: max(len(certified) // images, 1)][:images]
    generator = torch.Generator().manual_seed(seed)
    level = 1e-4 / max(len(certified) * restarts, 1)
    broken = 0
    for row in tqdm(certified, desc="challenging", unit="image", disable=not progress):
        device = next(smooth.parameters(), dataset.tensors[0]).device
        image = dataset.tensors[0][int(row["index"])].to(device)
        label = torch.tensor([int(row["prediction"])], device=device)
        radius = torch.tensor([_radius(row) * stretch], device=device)
        # Restarts as a batch: the same image, another start and another noise each.
        found = smoothed_attack(
            smooth,
            image.expand(restarts, -1, -1, -1),
            label.expand(restarts),
            radius.expand(restarts),
            generator=generator,
        )
        # A seed of its own: votes with the noise of the certificate would repeat its luck.
        classes = smooth.predict(found, n, level, seed=seed + 1)
        broken += bool(((classes != ABSTAIN) & (classes != int(row["prediction"]))).any())
    return broken, len(certified)


def _radius(row: Mapping) -> float:
    return float(row["radius"])


def broken_allowed(tried: int, alpha: float) -> int:
    """Most broken certificates that failure odds of `alpha` each explain, at 1 in 1,000."""
    return int(stats.binom.ppf(0.999, tried, alpha))
