"""The balls that attacks stay in, in linf and l2: steepest ascent, random points, projection."""

from collections.abc import Callable

import torch
from torch import Tensor


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of unit length in `norm`; zero where the gradient is zero or not a number."""
    gradient = torch.nan_to_num(gradient)
    if norm == "linf":
        return gradient.sign()
    # Scaled by the largest entry first, so that no square under- or overflows.
    largest = gradient.flatten(1).abs().amax(dim=1)
    gradient = gradient / torch.where(largest > 0, largest, 1)[:, None, None, None]
    length = gradient.flatten(1).norm(dim=1)
    return gradient / torch.where(length > 0, length, 1)[:, None, None, None]


def random_in_ball(images: Tensor, epsilon: float, norm: str, generator) -> Tensor:
    """A perturbation drawn uniformly from the ball, on the device of `images`."""
    shape = images.shape
    if norm == "linf":
        noise = torch.rand(shape, generator=generator, device=generator.device) * 2 - 1
        return (epsilon * noise).to(images)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    # A uniform radius would crowd the centre: the volume grows as its d-th power.
    fraction = torch.rand(shape[0], generator=generator, device=generator.device)
    length = epsilon * fraction ** (1 / images[0].numel())
    return (direction(noise, "l2") * length[:, None, None, None]).to(images)


def projection(images: Tensor, epsilon: float, norm: str, clip) -> Callable[..., Tensor]:
    """points, chosen -> the nearest points of the balls around the chosen images, within `clip`."""
    if norm == "linf":
        low, high = linf_box(images, epsilon, clip)
        return lambda points, chosen=slice(None): points.clamp(low[chosen], high[chosen])
    # The sum image + perturbation is rounded once more when it is stored: leave room for that.
    rounding = torch.finfo(images.dtype).eps * images[0].numel() ** 0.5 * max(map(abs, clip))
    radius = max(epsilon * (1 - 1e-6) - rounding, 0)

    def project(points: Tensor, chosen=slice(None)) -> Tensor:
        change = points - images[chosen]
        length = change.flatten(1).norm(dim=1)
        shrink = (radius / torch.where(length > radius, length, radius or 1)).clamp(max=1)
        # Clipping to a box that holds the image only moves the point closer to it.
        return (images[chosen] + shrink[:, None, None, None] * change).clamp(*clip)

    return project


def linf_box(images: Tensor, epsilon: float, clip) -> tuple[Tensor, Tensor]:
    """Lowest and highest pixels of the linf balls, within `clip`."""
    return _inward(images, -epsilon).clamp(min=clip[0]), _inward(images, epsilon).clamp(max=clip[1])


def _inward(images: Tensor, change: float) -> Tensor:
    """images + change, rounded towards `images`: as stored, no further away than |change|.

    0.3 is not a floating-point number and neither is the sum, so plain addition would leave
    the ball by half a unit in the last place at every other pixel.
    """
    zero = torch.zeros((), dtype=images.dtype)
    stored = zero + change
    if abs(stored.item()) > abs(change):
        stored = torch.nextafter(stored, zero)
    # MPS has no float64.
    start = images.cpu() if images.device.type == "mps" else images
    bound = (start.double() + stored.item()).to(images.dtype)
    outside = (bound.double() - start.double()).abs() > abs(stored.item())
    return torch.where(outside, torch.nextafter(bound, start), bound).to(images.device)
