"""The convolutional network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_count, check_shape, evaluation_mode
from src.engine.folded import FLOATS, FoldedConvNN, check_precision, ramp
from src.engine.native_gradient import attacked_form
from src.engine.quantized import QuantizedConvNN
from src.engine.untouched import agrees, alteration, is_ramp, is_untouched, unwrapped

# Of a layer: wider ones fit into no memory.
WIDEST = 2**20


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
            _check_width("channels", width)
        if hidden is not None:
            _check_width("hidden", hidden)
        _check_width("num_classes", num_classes, 2)
        if not isinstance(pooled, bool):
            raise ValueError(f"'pooled' = {pooled!r} must be True or False.")
        self.config = {"channels": list(channels), "hidden": hidden, "num_classes": num_classes}
        # Left out if it is the default, so that older checkpoints keep their digests.
        self.config |= {"pooled": True} if pooled else {}
        if thresholds is not None:
            if not is_ramp(thresholds):
                raise ValueError(f"'thresholds' = {thresholds} must be 0 <= low < high <= 1.")
            self.config |= {"thresholds": [float(value) for value in thresholds]}
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
        check_shape(images)
        images = ramp(images, self.thresholds).to(next(self.parameters(), images).dtype)
        features = self.halve(F.relu(self.norm1(self.conv1(images))))
        features = self.halve(F.relu(self.norm2(self.conv2(features)))).flatten(1)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        # In float32 under autocast too: eight bits would tie the two largest logits now and then.
        if torch.is_autocast_enabled(images.device.type):
            features = features.float()
        with torch.autocast(images.device.type, enabled=False):
            return self.output(features)

    def inference_form(self, precision: str = "float32") -> nn.Module:
        """A copy for evaluation only, the same function up to rounding, and faster.

        Args:
            precision: "float32", or "bfloat16", "int16" or "int8" for all layers but the output.
                Integers have no gradients.

        Raises:
            ValueError: for another precision, where `QuantizedConvNN` does, and for a network that
                was altered after it was made: only `forward` knows what that does.
        """
        check_precision(precision)
        if reason := alteration(self):
            raise ValueError(f"Only a ConvNN as it is made has other forms, but {reason}.")
        form = FoldedConvNN if precision in FLOATS else QuantizedConvNN
        return form(self, precision)


def _check_width(name: str, width: int, minimum: int = 1) -> None:
    check_count(name, width, minimum)
    if width > WIDEST:
        raise ValueError(f"'{name}' must be at most {WIDEST:,}.")


@contextmanager
def evaluation_form(model: nn.Module, *, probe: bool = False) -> Iterator[nn.Module]:
    """The form in which a model is best evaluated and attacked: a ConvNN folded, another as it is.

    The folded one runs in bfloat16 under autocast, else in float32, see `attacked_form`. The
    other is in evaluation mode until the block ends, see `evaluation_mode`; so is a ConvNN that was
    altered after it was made and, if `probe`, one whose forward pass gives other answers.
    """
    network = unwrapped(model)
    if is_untouched(network):
        cast = torch.is_autocast_enabled(network.output.weight.device.type)
        precision = "bfloat16" if cast else "float32"
        form = attacked_form(FoldedConvNN(network, precision))
        if not probe or agrees(form, network, precision):
            yield form
            return
    with evaluation_mode(model):
        yield model
