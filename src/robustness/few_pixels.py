"""A greedy attack that moves a few pixels far, where others move many pixels a little.

A ball in l2 holds both. A network that answers to a pixel only beyond some value, as behind a
threshold, is hardly touched by many small changes, and PGD takes it for robust.
"""

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import projection
from src.checks import predicted
from src.engine.untouched import evaluation_form
from src.verdicts import gradient_of, logits_of, margin, right, with_gradients

# How far a pixel is moved: past a threshold in the middle, or from end to end.
MOVES = (0.5, 0.75, 1.0)


@with_gradients()
def few_pixels_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "l2",
    *,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Move one pixel at a time as far as it goes, the one that promises most of the margin.

    After the saliency map attack (Papernot et al., EuroS&P 2016), with the gradient of the margin
    in place of its map, once for each of MOVES; the shortest change that breaks an image counts.

    Args:
        model: images -> logits (B, classes).
        images: (B, channels, height, width), pixels in [0, 1].
        labels: int64 (B,), the true classes.
        epsilon: radius of the ball, in pixel units.
        norm: "l2"; in linf all pixels may move far at once.
        clip: range of the result.

    Returns:
        Images in the ball and in `clip`; the clean image where nothing broke it.

    Raises:
        ValueError: for an argument out of its range, and for another norm.
    """
    images = checked(images, labels, epsilon, norm, clip)
    if norm != "l2":
        raise ValueError(f"'norm' = {norm!r}: few pixels are no restriction there; use 'l2'.")
    project = projection(images, epsilon, norm, clip)
    with evaluation_form(model) as network:
        limits = torch.full((len(images),), float(epsilon), dtype=torch.float64)
        points, _ = _shortest(network, images, labels, limits, clip)
        points = project(points)
        # Rounding may have put a point outside, where it is judged again.
        broken = ~right(network, points, labels)
        return torch.where(broken[:, None, None, None], points, images)


@with_gradients()
def few_pixels_lengths(
    model: nn.Module, images: Tensor, labels: Tensor, limits: Tensor, *, batch_size: int = 1000
) -> Tensor:
    """The least l2 length at which a few pixels broke each image, in one walk for each of MOVES.

    Args:
        model: images -> logits (B, classes).
        images: (B, channels, height, width), pixels in [0, 1].
        labels: int64 (B,), the true classes.
        limits: (B,), lengths of at least 0 beyond which no one walks, in pixel units.
        batch_size: images a call.

    Returns:
        float64 (B,) on the CPU: 0 for misclassified images, inf where nothing was found.
    """
    device, found = next(model.parameters(), images).device, []
    with evaluation_form(model) as network:
        parts = zip(*(t.split(batch_size) for t in (images, labels, limits)), strict=True)
        for part, classes, most in parts:
            part, classes = part.to(device), classes.to(device)
            part = checked(part, classes, float(most.max()), "l2", (0.0, 1.0))
            found.append(_shortest(network, part, classes, most.double(), (0.0, 1.0))[1])
    return torch.cat(found)


def _shortest(network, images, labels, limits, clip) -> tuple[Tensor, Tensor]:
    """The nearest misclassified points on any way within `limits`, and their distances.

    Where there is none: the image, and inf.
    """
    points, lengths = images.clone(), torch.full_like(limits, torch.inf)
    for move in MOVES:
        _walk(network, images, labels, torch.minimum(limits, lengths), move, clip, points, lengths)
    return points, lengths


def _walk(network, images, labels, limits, move: float, clip, points, lengths) -> None:
    """Move pixels by `move` until the class changes or the limit is reached; note what was found.

    `points` and `lengths` take the first misclassified point of each image.
    """
    going, here = torch.arange(len(images)), images.clone()
    for _ in range(int(float(limits.max()) ** 2 / move**2 * (1 + 1e-9)) + 1 if len(images) else 0):
        at = here.requires_grad_()
        logits = logits_of(network, at, labels[going])
        slope = torch.nan_to_num(gradient_of(margin(logits, labels[going]), at))
        here = here.detach()
        fallen = (predicted(logits.detach()) != labels[going]).cpu()
        length = (here - images[going]).double().flatten(1).norm(dim=1).cpu()
        # Rounding: four pixels moved by 0.5 are 1 long.
        near = length <= limits[going] * (1 + 1e-6)
        new = fallen & near
        points[going[new]], lengths[going[new]] = here[new], length[new]
        left = (near & ~fallen).nonzero()[:, 0]
        if not len(left):
            return
        going = going[left]
        here = _moved(here[left], images[going], slope[left], move, clip)


def _moved(points, images, slope, move: float, clip) -> Tensor:
    """`points` with one more pixel moved, the one that promises most."""
    aims = (images + move * slope.sign()).clamp(*clip)
    # Each pixel moves once: what it has been given is spent.
    gain = (slope * (aims - points)).masked_fill(points != images, 0).flatten(1)
    best = gain.argmax(dim=1, keepdim=True)
    aim = aims.flatten(1).gather(1, best)
    return points.flatten(1).scatter(1, best, aim).view_as(points)
