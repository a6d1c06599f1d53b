"""The convolutional network, and the form of it that evaluates fastest."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.checks import check_count


class ConvNN(nn.Module):
    """Two strided 5x5 convolutions with batch normalisation, then a fully connected output.

    Stride 2 halves the image twice (28 -> 14 -> 7) in place of pooling: at equal training time
    it was the more accurate choice (`benchmarks/architectures.py`). Pixels go in as they are;
    the first batch normalisation takes the place of an input normalisation.

    Args:
        channels: widths of the two convolutions.
        hidden: width of one more fully connected layer before the output; None for none.
        num_classes: number of logits.
    """

    def __init__(
        self, channels: Sequence[int] = (16, 32), hidden: int | None = None, num_classes: int = 10
    ):
        super().__init__()
        if len(channels) != 2:
            raise ValueError(f"'channels' = {tuple(channels)} must have two entries.")
        for width in channels:
            check_count("channels", width)
        if hidden is not None:
            check_count("hidden", hidden)
        check_count("num_classes", num_classes, 2)
        self.config = {"channels": list(channels), "hidden": hidden, "num_classes": num_classes}
        first, second = channels
        features = second * 7 * 7
        self.conv1 = nn.Conv2d(1, first, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 5, stride=2, padding=2, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.hidden = nn.Linear(features, hidden) if hidden else None
        self.output = nn.Linear(hidden or features, num_classes)
        # On two CPU cores channels-last was 1.0 to 1.2 times as fast here; not measured on a GPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28).

        Raises:
            ValueError: for another shape.
        """
        if images.dim() != 4 or images.shape[1:] != (1, 28, 28):
            raise ValueError(f"'images' has shape {tuple(images.shape)}; expected (B, 1, 28, 28).")
        features = F.relu(self.norm1(self.conv1(images)))
        features = F.relu(self.norm2(self.conv2(features))).flatten(1)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        return self.output(features)

    def inference_form(self) -> nn.Module:
        """A copy for evaluation only, the same function up to rounding, and faster."""
        return _FoldedConvNN(self)


class _FoldedConvNN(nn.Module):
    """A ConvNN in evaluation mode: normalisation folded into the convolutions, no copies made.

    It shares no memory with the network it was made from. `benchmarks/certification.py` shows
    what it is good for.
    """

    @torch.no_grad()
    def __init__(self, network: ConvNN):
        super().__init__()
        # A copy, since a constructor would draw weights from the global generator.
        network = copy.deepcopy(network).eval()
        self.conv1 = fuse_conv_bn_eval(network.conv1, network.norm1)
        self.conv2 = fuse_conv_bn_eval(network.conv2, network.norm2)
        self.to(memory_format=torch.channels_last)
        self.hidden, self.output = network.hidden, network.output
        first = self.output if self.hidden is None else self.hidden
        # In the order in which channels-last features lie in memory, so that flattening them
        # needs no copy.
        weight = first.weight.unflatten(1, (-1, 7, 7)).permute(0, 2, 3, 1)
        first.weight = nn.Parameter(weight.flatten(1).contiguous())
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu_(self.conv1(images))
        features = F.relu_(self.conv2(features)).permute(0, 2, 3, 1).flatten(1)
        if self.hidden is not None:
            features = F.relu_(self.hidden(features))
        return self.output(features)
