"""Attacks without gradients, to hold attacks with gradients against.

They only ask for logits, so nothing that hides or bends the gradient stops them; where they
break images that a gradient attack does not, that attack has failed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.checks import check_ball, check_count, check_images, check_labels, predicted
from src.engine.untouched import evaluation_form
from src.verdicts import logits_of, right


def random_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    draws: int = 10,
    seed: int = 0,
) -> Tensor:
    """Noise of length `epsilon` in a random direction: the first draw that breaks the image.

    A random corner of the ball for "linf", a random point of the sphere for "l2", cut to [0, 1].

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes.
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        draws: tries an image.
        seed: of the noise.

    Returns:
        Images in the ball and in [0, 1]; the clean image where no draw broke it.
    """
    generator = _checked(images, labels, epsilon, norm, seed, draws=draws)
    points = images.detach().clone()
    radius = _inside(epsilon)
    with torch.no_grad(), evaluation_form(model) as network:
        left = (_lead(network, points, labels) >= 0).nonzero()[:, 0]
        for _ in range(draws):
            if not len(left):
                break
            noise = torch.randn(images.shape, generator=generator).to(images)
            noise = noise.sign() if norm == "linf" else noise / _length(noise)
            tried = (images[left] + radius * noise[left]).clamp(0, 1)
            broken = ~right(network, tried, labels[left])
            points[left[broken]] = tried[broken]
            left = left[~broken]
    return points


def random_search(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    queries: int = 300,
    seed: int = 0,
) -> Tensor:
    """Random changes of square windows, kept where they bring another class closer.

    A plain relative of the Square attack (Andriushchenko et al., ECCV 2020): for "linf" it starts
    from vertical stripes at the corners of the ball and sets windows to one end or the other; for
    "l2" it starts from the image, brightens or darkens windows, and scales back into the ball.
    Windows shrink as it goes. An image that is broken is left alone.

    Args:
        model, images, labels, epsilon, norm: as for `random_noise`.
        queries: calls of the model an image, at most.
        seed: of the windows.

    Returns:
        Images in the ball and in [0, 1].
    """
    generator = _checked(images, labels, epsilon, norm, seed, queries=queries)
    images, radius = images.detach(), _inside(epsilon)
    change = torch.zeros_like(images)
    if norm == "linf":
        stripes = torch.randint(2, (len(images), 1, 1, images.shape[3]), generator=generator)
        change += radius * (2 * stripes - 1).to(images)
    with torch.no_grad(), evaluation_form(model) as network:
        lead = _lead(network, (images + change).clamp(0, 1), labels)
        for query in range(1, queries):
            # Drawn for all images, so that no image's windows depend on which others stand.
            windows = _windows(images, query / queries, generator)
            left = (lead >= 0).nonzero()[:, 0]
            if not len(left):
                break
            tried = _PROPOSE[norm](change[left], windows[left], radius)
            found = _lead(network, (images[left] + tried).clamp(0, 1), labels[left])
            better = found < lead[left]
            change[left[better]], lead[left[better]] = tried[better], found[better]
    return (images + change).clamp(0, 1)


def _windows(images: Tensor, done: float, generator: torch.Generator) -> Tensor:
    """One random square an image, +1 or -1 inside and 0 outside, like `images`."""
    height, width = images.shape[2:]
    # From about half of the side of the image down to single pixels.
    side = max(round(0.5 * min(height, width) * (1 - done) ** 2), 1)
    count = len(images)
    top, left = (
        torch.randint(size - side + 1, (count, 1, 1, 1), generator=generator)
        for size in (height, width)
    )
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    sign = 2 * torch.randint(2, (count, 1, 1, 1), generator=generator) - 1
    return (inside * sign).to(images)


def _set_to_an_end(change: Tensor, windows: Tensor, radius: float) -> Tensor:
    return torch.where(windows == 0, change, radius * windows)


def _add_and_scale(change: Tensor, windows: Tensor, radius: float) -> Tensor:
    change = change + 0.3 * radius * windows / _length(windows)
    return change * (radius / _length(change)).clamp(max=1)


_PROPOSE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linf": _set_to_an_end,
    "l2": _add_and_scale,
}


def _lead(network: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's logit leads, (B,); negative where the image is misclassified."""
    logits = logits_of(network, points, labels)
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    # A tie goes to the first class, which may be another one.
    broken = predicted(logits) != labels
    # Of logits that are both infinite it is unknown: every other lead is nearer.
    lead = (own - others).nan_to_num(torch.inf, torch.inf, -torch.inf)
    return torch.where(broken, lead.clamp(max=-1e-30), lead)


def _length(change: Tensor) -> Tensor:
    """l2 norm of each image, (B, 1, 1, 1); 1e-30 at the least, to divide by."""
    return change.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]


def _inside(epsilon: float) -> float:
    """A radius that keeps sums rounded to float32 inside the ball: pixels, and their length."""
    return max(epsilon - 1e-5, 0.0)


def _checked(images, labels, epsilon, norm, seed, **counts) -> torch.Generator:
    """A generator on the CPU, after the arguments have been checked."""
    check_ball(epsilon, norm)
    check_images(images)
    check_labels(labels, len(images))
    for name, count in counts.items():
        check_count(name, count)
    return torch.Generator().manual_seed(seed)
