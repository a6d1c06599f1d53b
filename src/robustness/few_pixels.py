"""A greedy attack that moves a few pixels far, where others move many pixels a little.

An l2 ball holds both kinds of change. Behind thresholds, a network hardly sees many small changes,
and PGD takes it for robust.
"""

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import per_image, projection
from src.engine.untouched import evaluation_form
from src.verdicts import batches, judge, margin, stands, with_gradients

# How far a pixel is moved: past a threshold in the middle, or from end to end.
MOVES = (0.5, 0.75, 1.0)
CLIP = (0.0, 1.0)


@with_gradients()
def few_pixels_attack(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = "l2"
) -> Tensor:
    """Move one pixel after the other as far as it goes, the one that raises the margin most first.

    After the saliency map attack (Papernot et al., EuroS&P 2016), with the gradient of the margin
    in place of its map. It runs once for each length in MOVES; the shortest change that breaks an
    image counts.

    Returns images in the ball and in [0, 1]; the clean image where nothing broke it. Arguments and
    errors as for `pgd_attack`, but `norm` must be "l2": in linf all pixels may move far at once.
    """
    images = checked(images, labels, epsilon, norm, CLIP)
    if norm != "l2":
        raise ValueError(f"'norm' = {norm!r}: few pixels are no restriction there; use 'l2'.")
    limits = torch.full((len(images),), float(epsilon), dtype=torch.float64)
    with evaluation_form(model) as network:
        points, _ = _shortest(network, images, labels, limits)
        points = projection(images, epsilon, norm, CLIP)(points)
        # The projection may have made a point harmless by rounding, so it is judged again.
        return torch.where(per_image(stands(network, points, labels)), images, points)


@with_gradients()
def few_pixels_lengths(
    model: nn.Module, images: Tensor, labels: Tensor, limits: Tensor, *, batch_size: int = 1000
) -> Tensor:
    """The least l2 length at which a few pixels broke each image, over all MOVES.

    Args:
        model, images, labels: as for `pgd_attack`.
        limits: (B,), per image the largest length to try, at least 0, in pixel units.
        batch_size: images per call.

    Returns:
        float64 (B,) on the CPU: 0 for misclassified images, inf where nothing was found.
    """
    found = []
    parts = batches(model, images, labels, batch_size=batch_size)
    with evaluation_form(model) as network:
        for (part, classes), most in zip(parts, limits.split(batch_size), strict=True):
            part = checked(part, classes, float(most.max()), "l2", CLIP)
            found.append(_shortest(network, part, classes, most.double())[1])
    return torch.cat(found)


def _shortest(network, images, labels, limits) -> tuple[Tensor, Tensor]:
    """The nearest misclassified points within `limits` that any move found, and their distances.

    Where there is none: the image, and inf.
    """
    points, lengths = images.clone(), torch.full_like(limits, torch.inf)
    for move in MOVES:
        _walk(network, images, labels, limits.minimum(lengths), move, points, lengths)
    return points, lengths


def _walk(network, images, labels, limits, move: float, points, lengths) -> None:
    """Move pixels by `move` until the class changes or the limit is reached.

    The first misclassified point of each image is written to `points`, its distance to `lengths`.
    """
    # `chosen`: positions of the images that are still on their way; `here`: where they are.
    chosen, here = torch.arange(len(images)), images.clone()
    most = int(float(limits.max()) ** 2 / move**2 * (1 + 1e-9)) if len(images) else -1
    for _ in range(most + 1):
        _, _, broken, gradient = judge(network, here, labels[chosen], margin)
        broken, gradient = broken.cpu(), torch.nan_to_num(gradient)
        length = (here - images[chosen]).double().flatten(1).norm(dim=1).cpu()
        # Rounding: four pixels moved by 0.5 are 1 long.
        within = length <= limits[chosen] * (1 + 1e-6)
        new = broken & within
        points[chosen[new]], lengths[chosen[new]] = here[new], length[new]
        going = (within & ~broken).nonzero()[:, 0]
        if not len(going):
            return
        chosen = chosen[going]
        here = _moved(here[going], images[chosen], gradient[going], move)


def _moved(points, images, gradient, move: float) -> Tensor:
    """`points` with one more pixel moved, the one that promises the largest gain."""
    moved = (images + move * gradient.sign()).clamp(*CLIP)
    # Each pixel moves once.
    gain = (gradient * (moved - points)).masked_fill(points != images, 0).flatten(1)
    best = gain.argmax(dim=1, keepdim=True)
    return points.flatten(1).scatter(1, best, moved.flatten(1).gather(1, best)).view_as(points)
