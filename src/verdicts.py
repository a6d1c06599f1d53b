"""What a model says of points: logits, losses, gradients, and the worst point so far.

An image *stands* while it is classified correctly, and is *broken* once it is not. Points are
tensors (B, C, H, W), labels int64 (B,).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import ask, checked_logits, predicted

# Warnings given in the outermost block `with_gradients`; None outside of such a block.
_warned: ContextVar[list | None] = ContextVar("warned", default=None)


@contextmanager
def with_gradients() -> Iterator[None]:
    """Switch gradients on, whatever the caller switched off. A missing one is warned of once."""
    outermost = _warned.set([]) if _warned.get() is None else None
    try:
        # It undoes no_grad as well.
        with torch.inference_mode(False):
            yield
    finally:
        if outermost:
            _warned.reset(outermost)


def gradient_of(value: Tensor, points: Tensor) -> Tensor:
    """Gradient of the sum of `value` with respect to `points`; zero, with a warning, if none."""
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
    warned = _warned.get()
    if not warned:
        warnings.warn(
            f"'model' has no gradient by the images ({reason}): it is taken for zero, so count "
            "attacks without gradients too, such as square_attack.",
            stacklevel=2,
        )
    if warned is not None:
        warned.append(reason)
    return torch.zeros_like(points)


def batches(model: nn.Module, *tensors: Tensor, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of several tensors of the same length, moved to where the model is."""
    device = next(model.parameters(), tensors[0]).device
    for batch in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
        yield tuple(tensor.to(device) for tensor in batch)


def logits_of(network, points: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, classes), after a check that they cover all the classes of `labels`."""
    return checked_logits(ask(network, points), len(points), labels)


@torch.no_grad()
def stands(network, points: Tensor, labels: Tensor) -> Tensor:
    """Whether each point is classified correctly, bool (B,)."""
    return predicted(logits_of(network, points, labels)) == labels


def known(value: Tensor) -> Tensor:
    """`value` with -inf in place of NaN, so that every other value is larger."""
    return value.masked_fill(value.isnan(), -torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per image, (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of the other classes minus that of the label, (B,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own[:, 0]


LOSSES = {"cross_entropy": cross_entropy, "margin": margin}


class Verdict(NamedTuple):
    """What a network says of a batch of points."""

    logits: Tensor  # (B, classes)
    loss: Tensor  # (B,), what the attacker wants to raise
    broken: Tensor  # bool (B,), whether the points are misclassified
    gradient: Tensor | None  # of the loss, (B, C, H, W), if it was asked for


def judge(network, points: Tensor, labels: Tensor, loss: Callable, want_gradient=True) -> Verdict:
    """The verdict on `points`, with the loss (logits, labels) -> (B,)."""
    points = points.detach().clone().requires_grad_(want_gradient)
    # Autograd keeps the labels, and refuses those that were made in inference mode.
    labels = labels.clone()
    with torch.set_grad_enabled(want_gradient):
        logits = logits_of(network, points, labels)
        value = loss(logits, labels)
    gradient = gradient_of(value, points) if want_gradient else None
    return Verdict(logits.detach(), value.detach(), predicted(logits) != labels, gradient)


class Worst:
    """Per image, the worst point visited so far: `points`, and `value`, the loss there.

    `standing`, bool (B,): no point of the image broke it. A targeted attack breaks an image when
    it is put into the class of its label.
    """

    def __init__(self, network, images: Tensor, labels: Tensor, loss: str, targeted: bool):
        self.network, self.labels, self.loss, self.targeted = network, labels, loss, targeted
        # These are written to later on, so they must not belong to the caller's inference mode.
        with torch.inference_mode(False):
            self.points = images.clone()
            self.value = images.new_full((len(images),), -torch.inf)
            self.standing = torch.ones(len(images), dtype=torch.bool, device=images.device)

    def visit(self, points: Tensor, chosen=slice(None), want_gradient=True) -> Verdict:
        """Judge points of the `chosen` images, keep the worse ones, and return the verdict."""
        sign = -1 if self.targeted else 1
        verdict = judge(
            self.network,
            points,
            self.labels[chosen],
            lambda logits, labels: sign * LOSSES[self.loss](logits, labels),
            want_gradient,
        )
        # The label of a targeted attack is the class to reach.
        broken = ~verdict.broken if self.targeted else verdict.broken
        self.keep(points, chosen, verdict.loss, broken)
        return verdict

    def keep(self, points: Tensor, chosen, value: Tensor, broken: Tensor) -> None:
        """Keep `points` of the `chosen` images where they are worse than the worst so far."""
        stood, highest = self.standing[chosen], self.value[chosen]
        # A network in float64 may be given images in float32.
        value = known(value).to(highest.dtype)
        better = (broken & stood) | ((broken != stood) & (value > highest))
        self.points[chosen] = torch.where(better[:, None, None, None], points, self.points[chosen])
        self.value[chosen] = torch.where(better, value, highest)
        self.standing[chosen] = stood & ~broken
