"""Attacks on classifiers: pure functions, images in, adversarial images out.

Each returns a detached tensor of the dtype and device of `images`, and leaves the model as it
was: modes, batch-normalisation statistics, `.grad` of every parameter. The model is attacked in
evaluation mode. Results lie in the ball and in `clip` as stored, not only up to rounding.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.checks import (
    check_ball,
    check_count,
    check_dataset,
    check_images,
    check_labels,
    check_number,
    checked_logits,
    predicted,
)
from src.convnn import evaluation_form

LOSSES = ("cross_entropy", "margin")
# What has been warned of in the outermost block `with_gradients`; None outside of one.
_told: ContextVar[list | None] = ContextVar("told", default=None)


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients are on, whatever the caller has switched off, and missing ones warned of once."""
    outermost = _told.set([]) if _told.get() is None else None
    try:
        # It undoes no_grad as well.
        with torch.inference_mode(False):
            yield
    finally:
        if outermost:
            _told.reset(outermost)


@with_gradients()
def gradient_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    targeted: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One step of size `epsilon` along the gradient of the cross-entropy.

    x_adv = clip(x + epsilon * sign(grad)) for `norm="linf"` (FGSM, Goodfellow et al., ICLR
    2015), clip(x + epsilon * grad / |grad|_2) for `"l2"`.

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes (`targeted`: the classes to reach).
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        targeted: step towards `labels` instead of away from them.
        clip: range of the result.

    Raises:
        ValueError: for an argument out of its range.
    """
    images = checked(images, labels, epsilon, norm, clip)
    if epsilon == 0 or not len(images):
        return images.clone()
    with evaluation_form(model) as network:
        _, _, gradient = _value_and_gradient(network, images, labels, "cross_entropy", targeted)
    project = projection(images, epsilon, norm, clip)
    return project(images + epsilon * direction(gradient, norm))


@with_gradients()
def pgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "cross_entropy",
    targeted: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    early_stop: bool = False,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018), per image the worst point visited.

    The first start is the image moved by one full step up `loss` (`gradient_attack`, if that is
    the cross-entropy), so the result is at least as strong, image by image; further starts, and
    the first as well when a `generator` is given, are random in the ball. A point beats another
    if it is misclassified and the other is not, or else if its loss is higher.

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes (`targeted`: the classes to reach).
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        steps: gradient steps per restart.
        step_size: length of a step in `norm`; default 2.5 * epsilon / steps.
        restarts: number of starts.
        loss: "cross_entropy", or "margin", the largest other logit minus that of the label:
            its gradient survives saturated probabilities.
        targeted: approach `labels` instead of leaving them.
        clip: range of the result.
        generator: source of the random starts, on the CPU; without it a private one with
            seed 0, so that the same call gives the same result.
        early_stop: leave an image alone once it is misclassified. The same images fall, sooner;
            the points returned for them are the first that were found, not the worst.

    Raises:
        ValueError: for an argument out of its range.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    if loss not in LOSSES:
        raise ValueError(f"'loss' is {loss!r}; use one of {', '.join(map(repr, LOSSES))}.")
    if epsilon == 0 or not len(images):
        return images.clone()
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    starts = generator or torch.Generator().manual_seed(0)
    project = projection(images, epsilon, norm, clip)
    with evaluation_form(model) as network:
        worst = Worst(network, images, labels, loss, targeted)
        gradient = worst.visit(images)
        single_step = project(images + epsilon * direction(gradient, norm))
        for restart in range(restarts):
            if restart == 0 and generator is None:
                points = single_step
            else:
                # Drawn for all images, so that no image's start depends on which others stand.
                points = project(images + random_in_ball(images, epsilon, norm, starts))
            chosen = worst.standing() if early_stop else slice(None)
            points = points[chosen]
            for _ in range(steps):
                gradient = worst.visit(points, chosen)
                points = project(points + step_size * direction(gradient, norm), chosen)
                if early_stop:
                    left = worst.standing(chosen)
                    chosen, points = chosen[left], points[left]
            worst.visit(points, chosen, want_gradient=False)
        if generator is not None:
            worst.visit(single_step, want_gradient=False)
    return worst.points


@with_gradients()
def random_start_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    step_size: float | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """One gradient step from a random point of the ball: the attack of "fast" training.

    Wong, Rice and Kolter, ICLR 2020. Arguments as for `pgd_attack`; `step_size` defaults to
    1.25 * epsilon as in the paper. Costs one gradient.
    """
    images = checked(images, labels, epsilon, norm, clip)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    if epsilon == 0 or not len(images):
        return images.clone()
    step_size = 1.25 * epsilon if step_size is None else step_size
    project = projection(images, epsilon, norm, clip)
    generator = generator or torch.Generator().manual_seed(0)
    points = project(images + random_in_ball(images, epsilon, norm, generator))
    with evaluation_form(model) as network:
        _, _, gradient = _value_and_gradient(network, points, labels, "cross_entropy", False)
    return project(points + step_size * direction(gradient, norm))


@with_gradients()
def attack_dataset(
    model: nn.Module,
    dataset: TensorDataset,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
) -> TensorDataset:
    """The adversarial twin of a data set: `attack(model, images, labels)` batch by batch.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        attack: returns the attacked images of one batch.
        batch_size: images a batch.
        device: where the attack runs; default: where the model is.

    Returns:
        TensorDataset of the attacked images and the same labels, on the CPU.
    """
    check_count("batch_size", batch_size)
    check_dataset(dataset)
    device = device or next(model.parameters(), dataset.tensors[0]).device
    batches = [
        attacked_batch(attack, model, images.to(device), labels.to(device)).cpu()
        for images, labels in zip(*(t.split(batch_size) for t in dataset.tensors), strict=True)
    ]
    return TensorDataset(torch.cat(batches), dataset.tensors[1].clone())


def attacked_batch(attack: Callable, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What `attack` makes of copies of a batch, detached.

    Raises:
        ValueError: unless it returns images in [0, 1] of the same shape and dtype.
    """
    found = attack(model, images.clone(), labels.clone())
    given, wanted = (
        f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        for x in (found, images)
    )
    if given != wanted:
        raise ValueError(f"'attack' returned {given}; expected the attacked images, {wanted}.")
    # A NaN fails both comparisons.
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("'attack' returned pixels outside [0, 1] or NaN; clamp them to [0, 1].")
    return found.detach().to(images.device)


class Worst:
    """The worst point visited so far, image by image."""

    def __init__(self, network, images, labels, loss, targeted):
        self.network, self.labels, self.how = network, labels, (loss, targeted)
        # Not of inference mode: in one of its blocks or not, they are written to later on.
        with torch.inference_mode(False):
            self.points = images.clone()
            self.value = images.new_full((len(images),), -torch.inf)
            self.success = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def standing(self, chosen=slice(None)) -> Tensor:
        """Positions among the `chosen` images of those that are not misclassified yet."""
        return (~self.success[chosen]).nonzero()[:, 0]

    def visit(self, points: Tensor, chosen=slice(None), want_gradient=True) -> Tensor | None:
        """Evaluate and `keep` the points; returns the gradient there, if it is wanted."""
        if not len(points):
            return points
        value, success, gradient = _value_and_gradient(
            self.network, points, self.labels[chosen], *self.how, want_gradient
        )
        self.keep(points, chosen, value, success)
        return gradient

    def keep(self, points: Tensor, chosen, value: Tensor, success: Tensor) -> None:
        """Keep `points`, of the `chosen` images, where they beat the worst so far."""
        before, highest = self.success[chosen], self.value[chosen]
        # A network in float64 may be given images in float32.
        value = known(value).to(highest.dtype)
        better = (success & ~before) | ((success == before) & (value > highest))
        self.points[chosen] = torch.where(better[:, None, None, None], points, self.points[chosen])
        self.value[chosen] = torch.where(better, value, highest)
        self.success[chosen] = before | success


def _value_and_gradient(network, points, labels, loss, targeted, want_gradient=True):
    """What the attacker maximises (B,), whether it succeeded (B,), and the gradient."""
    points = points.detach().clone().requires_grad_(want_gradient)
    # Autograd keeps the labels, and refuses those that were made in inference mode.
    labels = labels.clone()
    with torch.set_grad_enabled(want_gradient):
        logits = logits_of(network, points, labels)
        if loss == "cross_entropy":
            value = F.cross_entropy(logits, labels, reduction="none")
        else:
            value = margin(logits, labels)
        value = -value if targeted else value
    gradient = gradient_of(value, points) if want_gradient else None
    hit = predicted(logits) == labels
    return value.detach(), hit if targeted else ~hit, gradient


def gradient_of(value: Tensor, points: Tensor) -> Tensor:
    """Gradient of the sum of `value` by `points`; zero, and warned of, if there is none."""
    gradient, reason = None, "its logits are cut off from them"
    if value.requires_grad:
        try:
            # autograd.grad and not backward: the gradients of the parameters stay as they are.
            (gradient,) = torch.autograd.grad(value.sum(), points, allow_unused=True)
        except RuntimeError as error:
            if "implement" not in str(error):
                raise
            reason = str(error)
    if gradient is not None:
        return gradient
    told = _told.get()
    if not told:
        warnings.warn(
            f"'model' has no gradient by the images ({reason}): it is taken for zero, so count "
            "attacks without gradients too, such as square_attack.",
            stacklevel=2,
        )
    if told is not None:
        told.append(reason)
    return torch.zeros_like(points)


def logits_of(network, points: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, classes), which must have all the classes of `labels`."""
    return checked_logits(network(points), len(points), labels)


@torch.no_grad()
def right(network, points: Tensor, labels: Tensor) -> Tensor:
    """Whether each point is classified correctly, bool (B,)."""
    return predicted(logits_of(network, points, labels)) == labels


def known(value: Tensor) -> Tensor:
    """`value` with -inf for NaN, which every later value beats."""
    return value.masked_fill(value.isnan(), -torch.inf)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of the other classes minus that of the label (B,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own[:, 0]


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


def checked(images, labels, epsilon, norm, clip) -> Tensor:
    """Detached images, after every argument that the attacks share has been checked."""
    check_ball(epsilon, norm)
    check_images(images)
    check_labels(labels, len(images))
    low, high = clip
    if not low < high:
        raise ValueError(f"'clip' = {tuple(clip)} must be (low, high) with low < high.")
    if not bool(((images >= low) & (images <= high)).all()):
        raise ValueError(f"'clip' = {tuple(clip)} leaves out pixels of the images themselves.")
    return images.detach()
