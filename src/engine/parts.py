"""What the forms of ConvNN share: precisions, thresholds, ensembles, folded layers, the output."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# In which a network may vote. float32 gives the network itself, up to the order of additions. The
# others give another classifier, with certificates of its own.
PRECISIONS = ("exact", "float32", "bfloat16")
# In which a network may be trained and attacked.
FLOATS = PRECISIONS[1:]
# How far the logits of a form may be from those of `forward`, as a share of the largest. Rounding
# moved them by up to 0.25, 2e-6 and 0.01 on 280 random networks and those in `reference/`, but for
# exact ones whose logits are nearly constant.
TOLERANCES = {"exact": 0.5, "float32": 1e-4, "bfloat16": 0.05}


def check_precision(precision: str, allowed: Sequence[str] = PRECISIONS) -> None:
    """Raise ValueError unless `precision` is one of those `allowed`."""
    if precision not in allowed:
        raise ValueError(f"'precision' is {precision!r}; use {' or '.join(map(repr, allowed))}.")


def apply_thresholds(images: Tensor, thresholds: Sequence[float] | None) -> Tensor:
    """Rescale every pixel from [low, high] to [0, 1] and cut it there; the gradient is not cut."""
    if thresholds is None:
        return images
    low, high = thresholds
    linear = (images - low) / (high - low)
    cut = linear.clamp(0, 1)
    # The difference is exactly zero: only its gradient counts.
    return cut.detach() + (linear - linear.detach()) if linear.requires_grad else cut


def members_of(network: nn.Module) -> list[nn.Module]:
    """The ConvNNs that an ensemble is made of, its `networks`; of a ConvNN itself alone."""
    return list(getattr(network, "networks", [network]))


def mean_logits(members: Iterable[nn.Module], images: Tensor) -> Tensor:
    """The mean of the logits of several networks."""
    return torch.stack([member(images) for member in members]).mean(0)


class MeanForm(nn.Module):
    """The forms of an ensemble's members as one form.

    Thresholds that all of them have are applied once, and can be taken away as those of a ConvNN.
    """

    def __init__(self, members: Sequence[nn.Module], thresholds: Sequence[float] | None):
        super().__init__()
        self.members, self.thresholds = nn.ModuleList(members), thresholds
        for member in members if thresholds is not None else ():
            member.thresholds = None

    def forward(self, images: Tensor) -> Tensor:
        return mean_logits(self.members, apply_thresholds(images, self.thresholds))


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d, dtype) -> tuple[nn.Parameter, ...]:
    """Kernel and bias of a convolution and the normalisation after it, in channels-last order."""
    statistics = norm.running_mean, norm.running_var, norm.eps
    kernel, bias = fuse_conv_bn_weights(
        convolution.weight, None, *statistics, norm.weight, norm.bias
    )
    kernel = kernel.to(dtype).contiguous(memory_format=torch.channels_last)
    return constant(kernel), constant(bias.to(dtype))


def constant(values: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(values.detach(), requires_grad=False)


class VotingOutput(nn.Module):
    """The output layer in float32, with empty classes up to a multiple of 16, left out afterwards.

    They make the product of matrices nearly twice as fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.classes, empty = len(bias), -len(bias) % 16
        self.weight = constant(F.pad(weight, (0, 0, 0, empty)))
        self.bias = constant(F.pad(bias, (0, empty)))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias)[:, : self.classes]
