"""A greedy attack that moves a few pixels far, where others move many pixels a little.

A ball in l2 holds both. A network that answers to a pixel only beyond some value, as behind a
threshold, is hardly touched by many small changes, and PGD takes it for robust.
"""

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import projection
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
    in place of its map, once for each of MOVES; the first that breaks an image counts.

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
    if not len(images):
        return images.clone()
    with evaluation_form(model) as network:
        points, project = images.clone(), projection(images, epsilon, norm, clip)
        standing = right(network, images, labels).nonzero()[:, 0]
        for move in MOVES:
            if epsilon < move or not len(standing):
                continue
            moved = _moved(network, images[standing], labels[standing], epsilon, move, clip)
            tried = project(moved, standing)
            broken = ~right(network, tried, labels[standing])
            points[standing[broken]] = tried[broken]
            standing = standing[~broken]
    return points


def _moved(network, images, labels, epsilon: float, move: float, clip) -> Tensor:
    """`images` with pixels moved by `move`, as many as the ball pays for."""
    points = images.clone()
    for _ in range(int(epsilon**2 / move**2 * (1 + 1e-9))):
        here = points.clone().requires_grad_()
        gap = margin(logits_of(network, here, labels), labels)
        slope = torch.nan_to_num(gradient_of(gap, here))
        aims = (images + move * slope.sign()).clamp(*clip)
        # Each pixel moves once: what it has been given is spent.
        gain = (slope * (aims - points)).masked_fill(points != images, 0).flatten(1)
        best = gain.argmax(dim=1, keepdim=True)
        aim = aims.flatten(1).gather(1, best)
        points = points.flatten(1).scatter(1, best, aim).view_as(points)
    return points
