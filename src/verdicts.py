"""What a model says of points: logits, verdicts, margins, gradients, and the worst point so far."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from src.checks import checked_logits, predicted

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
        value, success, gradient = value_and_gradient(
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


def value_and_gradient(network, points, labels, loss, targeted, want_gradient=True):
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
