"""ConvNN in integers: the same features, to the bit, on every processor."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.folded import FoldedConvNN
from src.engine.parts import VotingOutput, apply_thresholds, check_precision

# A pixel is counted in steps of 1 / UNIT, up to 16. Noise of sigma = 2 is larger once in 1e13.
UNIT = 2048
PIXEL_LIMIT = 2**15 - 1
# With 8 bits, this many products are added up in 16 bits before they go to 32 bits.
SUMMED = 8


class Integers(NamedTuple):
    """What the layers after the first count in."""

    dtype: torch.dtype  # of the features
    weights: torch.dtype
    # Features are cut at `limit` steps: `spread` standard deviations above their mean.
    limit: int
    spread: int


INTEGERS = {
    "int16": Integers(torch.int16, torch.int16, 2**13 - 1, 32),
    "int8": Integers(torch.uint8, torch.int8, 2**7 - 1, 5),
}


class QuantizedConvNN(nn.Module):
    """A ConvNN for evaluation, its convolutions and hidden layer in integers of 16 or 8 bits.

    Pixels and features are rounded to integers. The weights of every channel are scaled to the
    largest 16-bit integers for which no sum of products can leave 32 bits. Sums are exact, so they
    do not depend on the processor. Half a step is 0.02 to 0.3 % of the mean weight of a layer of
    25 to 1,568 inputs, and at most 0.2 % of a feature's standard deviation; bfloat16 rounds by up
    to 0.4 %. The output layer is in float32. `native.c` computes the same with the limits above;
    this form works in float64, needs no compiler and is slow.

    "int8" counts features, and weights after the first layer, in 8 bits. Processors add up twice
    as many of them at once. They add eight products in 16 bits first, and the weights are small
    enough for that. The logits of the networks in `reference/` move by 1 % of their standard
    deviation.

    Args:
        network: a ConvNN.
        precision: "int16" or "int8".

    Raises:
        ValueError: if a weight is not finite or too large, and on MPS, which has no float64.
    """

    in_integers = True

    @torch.no_grad()
    def __init__(self, network: nn.Module, precision: str = "int16"):
        super().__init__()
        check_precision(precision, tuple(INTEGERS))
        if network.output.weight.device.type == "mps":
            raise ValueError(f"MPS has no float64, which {precision!r} needs there; use 'float32'.")
        folded = FoldedConvNN(network, "float32")
        self.thresholds = network.thresholds
        self.integers = later = INTEGERS[precision]
        self.dtype = later.dtype
        # Steps per unit in which the features after each normalisation are counted.
        norms = (network.norm1, network.norm2)
        largest = [(n.bias + later.spread * n.weight.abs()).max().item() for n in norms]
        units = [later.limit / max(value, 1e-6) for value in largest]
        *hidden, weight, bias = folded.connected
        layers = [
            _layer(folded.kernel1, folded.bias1, PIXEL_LIMIT, UNIT, units[0], torch.int16),
            _layer(folded.kernel2, folded.bias2, later.limit, *units, later.weights),
        ]
        if hidden:
            layers.append(_layer(*hidden, later.limit, units[1], 1.0, later.weights))
        if not (is_finite(network) and all(v.isfinite().all() for layer in layers for v in layer)):
            raise ValueError(f"A weight is not finite, or much too large for {precision!r}.")
        self.layers = len(layers)
        self.output = VotingOutput(weight if hidden else weight / units[1], bias)
        for number, layer in enumerate(layers, 1):
            for name, values in zip(("kernel", "bias", "scale"), layer, strict=True):
                self.register_buffer(f"{name}{number}", values)

    def layer(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Kernel, biases and scales of a layer: its output is (bias + sum) * scale."""
        return tuple(getattr(self, f"{name}{number}") for name in ("kernel", "bias", "scale"))

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.logits(self.hidden(features) if self.layers == 3 else features, images)

    def logits(self, features: Tensor, images: Tensor) -> Tensor:
        """Logits from the last features; NaN for an image with a NaN, which has no integer."""
        unknown = images.flatten(1).amax(1).isnan()[:, None]
        return self.output(features).masked_fill_(unknown, torch.nan)

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the first fully connected layer, integers (B, 49 * channels), channels last."""
        check_shape(images)
        pixels = apply_thresholds(images.float(), self.thresholds) * UNIT
        values = pixels.nan_to_num(0).round().clamp(-PIXEL_LIMIT, PIXEL_LIMIT)
        for number in (1, 2):
            kernel, bias, scale = self.layer(number)
            sums = F.conv2d(values.double(), kernel.double(), stride=2, padding=2)
            total = (bias[:, None, None] + sums.float()) * scale[:, None, None]
            values = total.round().clamp(0, self.integers.limit)
        return values.permute(0, 2, 3, 1).flatten(1).to(self.dtype)

    def hidden(self, features: Tensor) -> Tensor:
        """The hidden layer of integer features, float32 (B, width)."""
        kernel, bias, scale = self.layer(3)
        sums = F.linear(features.double(), kernel.double())
        return ((bias + sums.float()) * scale).relu()


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and statistics of a network are finite."""
    return all(values.isfinite().all() for values in network.state_dict().values())


def _layer(
    weights: Tensor, bias: Tensor, limit: int, unit: float, out_unit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of type `dtype` like `weights` (C, ...), biases and scales, float32 (C,).

    Inputs are counted in `unit` steps per unit, up to `limit`; outputs in `out_unit` steps.
    """
    rows = weights.double().flatten(1)
    # Rounding moves every weight by up to half a step, which must fit as well.
    room = (2**31 - 1) // limit - rows.shape[1] / 2
    if room <= 0:
        raise ValueError(f"A layer with {rows.shape[1]:,} inputs is too wide for integers.")
    steps = (room / rows.abs().sum(1)).minimum(torch.iinfo(dtype).max / rows.abs().amax(1))
    if dtype == torch.int8:
        sums = summed_in_16_bits(weights.double()).abs().sum(-1)
        steps = steps.minimum(((2**15 - 1) // limit - SUMMED / 2) / sums.flatten(1).amax(1))
    # The biases of a channel with tiny weights must not become infinite.
    steps = steps.nan_to_num(1.0, posinf=1e20).clamp(max=1e20)
    kernel = (rows * steps[:, None]).round().to(dtype).view(weights.shape)
    return kernel, (bias.double() * unit * steps).float(), (out_unit / (unit * steps)).float()


def summed_in_16_bits(weights: Tensor) -> Tensor:
    """The weights (C, ...) in groups that `native.c` adds up in 16 bits: (C, ..., SUMMED).

    16 neighbouring weights of a row make two groups: pairs 1, 3, 5, 7 and pairs 2, 4, 6, 8. A row
    of a kernel (C, inputs, 5, 5) has 5 * inputs weights, and zeros up to a multiple of 16.
    """
    rows = weights.permute(0, 2, 3, 1).flatten(2) if weights.dim() == 4 else weights
    rows = F.pad(rows, (0, -rows.shape[-1] % (2 * SUMMED)))
    return rows.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-2)
