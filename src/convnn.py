"""The convolutional network, and the form of it that evaluates fastest."""

import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.checks import check_count

# In which the folded network may run. The float32 results are those of the network itself up to
# the order of additions; in bfloat16 it is another classifier, with certificates of its own.
PRECISIONS = ("float32", "bfloat16")


class ConvNN(nn.Module):
    """Two strided 5x5 convolutions with batch normalisation, then a fully connected output.

    Stride 2 halves the image twice (28 -> 14 -> 7) in place of pooling: at equal training time
    it was the more accurate choice (`benchmarks/architectures.py`). Pixels go in as they are;
    the first batch normalisation takes the place of an input normalisation.

    Args:
        channels: widths of the two convolutions.
        hidden: width of one more fully connected layer before the output; None for none.
        num_classes: number of logits.
        pooled: halve the image by the maximum of 2x2 squares, in place of the stride.
        thresholds: (low, high) of a ramp that every pixel passes first: 0 up to low, 1 from high
            on; None for none. MNIST is nearly black and white, so a ramp around one half makes
            most of a ball of radius 0.3 vanish. Its gradient is passed straight through (Bengio
            et al., 2013), as if the ramp had no ends, lest it hide the rest of the network from
            attacks (Athalye et al., ICML 2018).
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        hidden: int | None = None,
        num_classes: int = 10,
        *,
        pooled: bool = False,
        thresholds: tuple[float, float] | None = None,
    ):
        super().__init__()
        if len(channels) != 2:
            raise ValueError(f"'channels' = {tuple(channels)} must have two entries.")
        for width in channels:
            check_count("channels", width)
        if hidden is not None:
            check_count("hidden", hidden)
        check_count("num_classes", num_classes, 2)
        if not isinstance(pooled, bool):
            raise ValueError(f"'pooled' = {pooled!r} must be True or False.")
        self.config = {"channels": list(channels), "hidden": hidden, "num_classes": num_classes}
        # Left out if it is the default, so that older checkpoints keep their digests.
        self.config |= {"pooled": True} if pooled else {}
        if thresholds is not None:
            low, high = map(float, thresholds)
            if not 0 <= low < high <= 1:
                raise ValueError(f"'thresholds' = {thresholds} must be 0 <= low < high <= 1.")
            self.config |= {"thresholds": [low, high]}
        self.thresholds = self.config.get("thresholds")
        self.halve = nn.MaxPool2d(2) if pooled else nn.Identity()
        stride = 1 if pooled else 2
        first, second = channels
        features = second * 7 * 7
        self.conv1 = nn.Conv2d(1, first, 5, stride, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 5, stride, padding=2, bias=False)
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
        images = _ramp(images, self.thresholds)
        features = self.halve(F.relu(self.norm1(self.conv1(images))))
        features = self.halve(F.relu(self.norm2(self.conv2(features)))).flatten(1)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        return self.output(features)

    def inference_form(self, precision: str = "float32") -> nn.Module:
        """A copy for evaluation only, the same function up to rounding, and faster.

        Args:
            precision: "float32", or "bfloat16" for all layers but the output.

        Raises:
            ValueError: for another precision.
        """
        return _FoldedConvNN(self, precision)


class _FoldedConvNN(nn.Module):
    """A ConvNN in evaluation mode: normalisation folded into the convolutions, no copies made.

    It shares no memory with the network it was made from. `benchmarks/certification.py` shows
    what it is good for.
    """

    @torch.no_grad()
    def __init__(self, network: ConvNN, precision: str):
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"'precision' is {precision!r}; use 'float32' or 'bfloat16'.")
        # A copy, since a constructor would draw weights from the global generator.
        network = copy.deepcopy(network).eval()
        self.conv1 = fuse_conv_bn_eval(network.conv1, network.norm1)
        self.conv2 = fuse_conv_bn_eval(network.conv2, network.norm2)
        self.hidden, self.output, self.halve = network.hidden, network.output, network.halve
        first = self.output if self.hidden is None else self.hidden
        # In the order in which channels-last features lie in memory, so that flattening them
        # needs no copy.
        weight = first.weight.unflatten(1, (-1, 7, 7)).permute(0, 2, 3, 1)
        first.weight = nn.Parameter(weight.flatten(1).contiguous())
        self.thresholds = network.thresholds
        self.dtype = getattr(torch, precision)
        self.to(self.dtype, memory_format=torch.channels_last)
        # Eight bits would tie the two largest logits now and then.
        self.output.float()
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        # The maximum before the ReLU: the same, at a quarter of the ReLU's work.
        images = _ramp(images, self.thresholds).to(self.dtype)
        features = F.relu_(self.halve(self.conv1(images)))
        features = F.relu_(self.halve(self.conv2(features))).permute(0, 2, 3, 1).flatten(1)
        if self.hidden is not None:
            features = F.relu_(self.hidden(features))
        return self.output(features.float())


def _ramp(images: Tensor, thresholds: Sequence[float] | None) -> Tensor:
    """Every pixel rescaled from [low, high] to [0, 1] and cut there; the gradient is not cut."""
    if thresholds is None:
        return images
    low, high = thresholds
    linear = (images - low) / (high - low)
    cut = linear.clamp(0, 1)
    # The difference is exactly zero: only its gradient counts.
    return cut.detach() + (linear - linear.detach()) if linear.requires_grad else cut


def fastest_precision(network: ConvNN, *, seconds: float = 0.05, margin: float = 1.15) -> str:
    """The precision in which `network` evaluates fastest where it is, measured.

    bfloat16 is several times as fast on processors and GPUs with units for it, and many times
    slower on others; nothing in between was met, so `margin` keeps the answer the same from call
    to call.

    Args:
        network: on the device to measure.
        seconds: to spend on each precision, about.
        margin: bfloat16 must be so many times as fast as float32 to be chosen.
    """
    images = next(network.parameters()).new_zeros(128, 1, 28, 28)
    rates = {name: _rate(network.inference_form(name), images, seconds) for name in PRECISIONS}
    return "bfloat16" if rates["bfloat16"] > margin * rates["float32"] else "float32"


@torch.no_grad()
def _rate(network: nn.Module, images: Tensor, seconds: float) -> float:
    """Batches a second, the first call not counted."""

    def call() -> None:
        # Reading a value waits for a GPU.
        network(images)[0, 0].item()

    call()
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)
