"""ConvNN with its normalisation folded into the convolutions, in floats."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.parts import FLOATS, apply_thresholds, check_precision, constant, folded


class FoldedConvNN(nn.Module):
    """A ConvNN in evaluation mode with normalisation folded in; features are never rearranged.

    It shares no memory with the network it is made from, and passes gradients to the images only.
    `benchmarks/certification.py` and `benchmarks/attacks.py` measure its speed.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        check_precision(precision, FLOATS)
        self.thresholds = network.thresholds
        self.dtype = getattr(torch, precision)
        self.kernel1, self.bias1 = folded(network.conv1, network.norm1, self.dtype)
        self.kernel2, self.bias2 = folded(network.conv2, network.norm2, self.dtype)
        self.reverse1 = constant(_reversed(self.kernel1))
        self.connected = nn.ParameterList()
        for layer in filter(None, (network.hidden, network.output)):
            weight, bias = layer.weight.clone(), layer.bias.clone()
            if not len(self.connected):
                # In the order in which channels-last features lie in memory: flattening the
                # features then needs no copy.
                weight = weight.unflatten(1, (-1, 7, 7)).permute(0, 2, 3, 1).flatten(1)
            # The output is in float32, as in ConvNN.
            dtype = torch.float32 if layer is network.output else self.dtype
            self.connected += [constant(weight.to(dtype).contiguous()), constant(bias.to(dtype))]

    def forward(self, images: Tensor) -> Tensor:
        check_shape(images)
        images = apply_thresholds(images, self.thresholds).to(self.dtype)
        features = _FirstConvolution.apply(images, self.kernel1, self.bias1, self.reverse1)
        features = F.conv2d(F.relu_(features), self.kernel2, self.bias2, stride=2, padding=2)
        features = F.relu_(features).permute(0, 2, 3, 1).flatten(1)
        if len(self.connected) > 2:
            features = F.relu_(F.linear(features, *self.connected[:2]))
        with torch.autocast(images.device.type, enabled=False):
            return F.linear(features.float(), *self.connected[-2:])


class _FirstConvolution(torch.autograd.Function):
    """The 5x5 convolution of one-channel images, with a faster gradient for the images.

    torch's gradient uses few lanes of a processor if there is one input channel. Here the four
    pixels of a 2x2 square count as four channels: their gradients are an ordinary convolution of
    the incoming gradient with the kernel that `_reversed` makes.
    """

    @staticmethod
    def forward(ctx, images, kernel, bias, reverse):
        ctx.save_for_backward(reverse)
        return F.conv2d(images, kernel, bias, stride=2, padding=2)

    @staticmethod
    def backward(ctx, gradient):
        (reverse,) = ctx.saved_tensors
        squares = F.conv2d(gradient, reverse, padding=1)
        return F.pixel_shuffle(squares, 2), None, None, None


def _reversed(kernel: Tensor) -> Tensor:
    """The kernel (4, C, 3, 3) that takes the gradient back to the pixels of 2x2 squares.

    With stride 1, the gradient at pixel i is the incoming gradient around i, weighted by the
    flipped kernel. Pixels 2p and 2p + 1 share a window of six entries per axis; the kernel begins
    at its first or second entry. With stride 2 every second incoming entry is zero: left out.
    """
    flipped = kernel.flip(2, 3)[:, 0]
    window = kernel.new_zeros(4, len(kernel), 6, 6)
    for row in range(2):
        for column in range(2):
            window[2 * row + column, :, row : row + 5, column : column + 5] = flipped
    return window[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
