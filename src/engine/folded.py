"""The form of ConvNN that evaluates and is attacked fastest, and in which precision."""

import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from src.checks import check_shape

# In which the network may vote. The float32 results are those of the network itself up to the
# order of additions; in the others it is another classifier, with certificates of its own.
PRECISIONS = ("float32", "bfloat16", "int16", "int8")
# In which it may be trained and attacked.
FLOATS = PRECISIONS[:2]
# How far the logits of a form may be from those of `forward`, as a share of the largest. Rounding
# on the networks in `reference/` and on 280 random ones made 2e-6, 0.01, 0.02 and 0.17.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "int16": 0.1, "int8": 0.5}


def check_precision(precision: str, allowed: Sequence[str] = PRECISIONS) -> None:
    """Raise ValueError unless `precision` is one of those `allowed`."""
    if precision not in allowed:
        raise ValueError(f"'precision' is {precision!r}; use {' or '.join(map(repr, allowed))}.")


def ramp(images: Tensor, thresholds: Sequence[float] | None) -> Tensor:
    """Every pixel rescaled from [low, high] to [0, 1] and cut there; the gradient is not cut."""
    if thresholds is None:
        return images
    low, high = thresholds
    linear = (images - low) / (high - low)
    cut = linear.clamp(0, 1)
    # The difference is exactly zero: only its gradient counts.
    return cut.detach() + (linear - linear.detach()) if linear.requires_grad else cut


class FoldedConvNN(nn.Module):
    """A ConvNN in evaluation mode: normalisation folded into the convolutions, no copies made.

    It shares no memory with the network it was made from, and passes gradients to the images
    only. `benchmarks/certification.py` and `benchmarks/attacks.py` show what it is good for.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        check_precision(precision, FLOATS)
        # A copy, whose mode can change without that of the network.
        self.thresholds, self.halve = network.thresholds, copy.copy(network.halve)
        self.stride = network.conv1.stride[0]
        self.dtype = getattr(torch, precision)
        self.kernel1, self.bias1 = _folded(network.conv1, network.norm1, self.dtype)
        self.kernel2, self.bias2 = _folded(network.conv2, network.norm2, self.dtype)
        self.reverse1 = _constant(_reversed(self.kernel1, self.stride))
        self.connected, layers = nn.ParameterList(), (network.hidden, network.output)
        for layer in filter(None, layers):
            weight, bias = layer.weight.clone(), layer.bias.clone()
            if not len(self.connected):
                # In the order in which channels-last features lie in memory, so that
                # flattening them needs no copy.
                weight = weight.unflatten(1, (-1, 7, 7)).permute(0, 2, 3, 1).flatten(1)
            # The output in float32, as in ConvNN.
            dtype = torch.float32 if layer is network.output else self.dtype
            self.connected += [_constant(weight.to(dtype).contiguous()), _constant(bias.to(dtype))]

    def forward(self, images: Tensor) -> Tensor:
        check_shape(images)
        images = ramp(images, self.thresholds).to(self.dtype)
        features = _FirstConvolution.apply(
            images, self.kernel1, self.bias1, self.reverse1, self.stride
        )
        # The maximum before the ReLU: the same, at a quarter of the ReLU's work.
        features = F.relu_(self.halve(features))
        features = F.conv2d(features, self.kernel2, self.bias2, self.stride, padding=2)
        features = F.relu_(self.halve(features)).permute(0, 2, 3, 1).flatten(1)
        if len(self.connected) > 2:
            features = F.relu_(F.linear(features, *self.connected[:2]))
        with torch.autocast(images.device.type, enabled=False):
            return F.linear(features.float(), *self.connected[-2:])


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d, dtype) -> tuple[nn.Parameter, ...]:
    """Kernel and bias of a convolution and the normalisation after it, in channels-last order."""
    kernel, bias = fuse_conv_bn_weights(
        convolution.weight,
        None,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    kernel = kernel.to(dtype).contiguous(memory_format=torch.channels_last)
    return _constant(kernel), _constant(bias.to(dtype))


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)


class VotingOutput(nn.Module):
    """The output layer in float32, with empty classes up to a multiple of 16 computed and left out.

    The product of matrices is nearly twice as fast so.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.classes, empty = len(bias), -len(bias) % 16
        self.weight = _constant(F.pad(weight, (0, 0, 0, empty)))
        self.bias = _constant(F.pad(bias, (0, empty)))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias)[:, : self.classes]


class _FirstConvolution(torch.autograd.Function):
    """The 5x5 convolution of one-channel images, with a faster gradient by the images.

    With one input channel the usual transposed convolution keeps few lanes of a processor busy.
    The gradients of the four pixels of a 2x2 square, taken as four channels, are an ordinary
    convolution of the incoming gradient: see `_reversed`.
    """

    @staticmethod
    def forward(ctx, images, kernel, bias, reverse, stride):
        ctx.save_for_backward(reverse)
        ctx.stride = 2 // stride
        return F.conv2d(images, kernel, bias, stride, padding=2)

    @staticmethod
    def backward(ctx, gradient):
        (reverse,) = ctx.saved_tensors
        squares = F.conv2d(gradient, reverse, stride=ctx.stride, padding=ctx.stride)
        return F.pixel_shuffle(squares, 2), None, None, None, None


def _reversed(kernel: Tensor, stride: int) -> Tensor:
    """The kernel (4, C, 6 / stride, 6 / stride) that takes the gradient back to 2x2 squares.

    Without stride, the gradient at pixel i is the incoming one correlated with the flipped kernel
    around i; for the two pixels 2p and 2p + 1 that is one window of six with the kernel at its
    first or second place. With stride 2 every other entry of the incoming gradient is a zero.
    """
    flipped = kernel.flip(2, 3)[:, 0]
    window = kernel.new_zeros(4, len(kernel), 6, 6)
    for row in range(2):
        for column in range(2):
            window[2 * row + column, :, row : row + 5, column : column + 5] = flipped
    return window[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)


def as_one_call(network: FoldedConvNN) -> nn.Module:
    """The same network, bit for bit, as one call that lets go of Python's lock until it is done.

    Otherwise worker threads wait for one another between the layers: with two of them this was
    1.09 times as fast. TorchScript is deprecated, but what follows it needs a compiler; without
    it the network stays as it is.
    """
    example = network.kernel1.new_zeros(2, 1, 28, 28, dtype=torch.float32)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network.eval(), example, check_trace=False)
            return torch.jit.freeze(traced)
    except (AttributeError, RuntimeError):
        return network
