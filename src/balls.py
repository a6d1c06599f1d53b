"""The balls that attacks stay in, in linf and l2: steepest ascent, random points, projection.

Images, gradients and points are tensors (B, C, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def per_image(values: Tensor) -> Tensor:
    """One value per image, (B,), in the shape (B, 1, 1, 1) that images can be multiplied by."""
    return values[:, None, None, None]


def l2_length(change: Tensor) -> Tensor:
    """l2 norm per image, (B, 1, 1, 1)."""
    return per_image(change.flatten(1).norm(dim=1))


def scaled_to_largest(gradient: Tensor) -> Tensor:
    """Each image's gradient divided by its largest absolute entry; NaN and zero become zero."""
    gradient = torch.nan_to_num(gradient)
    largest = per_image(gradient.flatten(1).abs().amax(dim=1))
    return gradient / torch.where(largest > 0, largest, 1)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of unit length in `norm`; zero where the gradient is zero or NaN."""
    if norm == "linf":
        return torch.nan_to_num(gradient).sign()
    # Scaled first, so that no square under- or overflows.
    gradient = scaled_to_largest(gradient)
    length = l2_length(gradient)
    return gradient / torch.where(length > 0, length, 1)


def random_in_ball(images: Tensor, epsilon: float, norm: str, generator) -> Tensor:
    """A perturbation per image, drawn uniformly from the ball, on the device of `images`."""
    shape = images.shape
    if norm == "linf":
        noise = torch.rand(shape, generator=generator, device=generator.device) * 2 - 1
        return (epsilon * noise).to(images)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    # A uniform radius would crowd the centre: the volume grows as its d-th power.
    fraction = torch.rand(shape[0], generator=generator, device=generator.device)
    length = epsilon * fraction ** (1 / images[0].numel())
    return (direction(noise, "l2") * per_image(length)).to(images)


def l2_rounding(images: Tensor, clip) -> float:
    """How far in l2 rounding may move an image + perturbation when it is stored."""
    return torch.finfo(images.dtype).eps * images[0].numel() ** 0.5 * max(map(abs, clip))


def projection(images: Tensor, epsilon: float, norm: str, clip) -> Callable[..., Tensor]:
    """A function that moves points into the balls around the images, and into `clip`.

    It takes the points and, if they belong to some of the images only, the positions of these
    (`chosen`). It returns the nearest points of the balls, which lie in them as stored.
    """
    if norm == "linf":
        low, high = linf_box(images, epsilon, clip)
        return lambda points, chosen=slice(None): points.clamp(low[chosen], high[chosen])
    radius = max(epsilon * (1 - 1e-6) - l2_rounding(images, clip), 0)

    def project(points: Tensor, chosen=slice(None)) -> Tensor:
        change = points - images[chosen]
        length = l2_length(change)
        shrink = (radius / torch.where(length > radius, length, radius or 1)).clamp(max=1)
        # Clipping to a box that holds the image only moves the point closer to it.
        return (images[chosen] + shrink * change).clamp(*clip)

    return project


def linf_box(images: Tensor, epsilon: float, clip) -> tuple[Tensor, Tensor]:
    """Lowest and highest pixels of the linf balls, within `clip`."""
    return _inward(images, -epsilon).clamp(min=clip[0]), _inward(images, epsilon).clamp(max=clip[1])


def _inward(images: Tensor, change: float) -> Tensor:
    """images + change, rounded towards `images`: as stored, no further away than |change|.

    0.3 is not a floating-point number and neither is the sum, so plain addition would leave
    the ball by half a unit in the last place at every other pixel.
    """
    zero = torch.zeros((), dtype=images.dtype, device="cpu")
    stored = zero + change
    if abs(stored.item()) > abs(change):
        stored = torch.nextafter(stored, zero)
    # MPS has no float64.
    start = images.cpu() if images.device.type == "mps" else images
    bound = (start.double() + stored.item()).to(images.dtype)
    outside = (bound.double() - start.double()).abs() > abs(stored.item())
    return torch.where(outside, torch.nextafter(bound, start), bound).to(images.device)
