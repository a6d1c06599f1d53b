"""ConvNN in whole numbers from the first layer to the last: one function on every machine."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.lattice import LEVELS, limit

LIMIT = limit()
# Where the numbers between two layers are cut: pixels, features, and the features of the output.
PIXEL_MOST, FEATURE_MOST, LAST_MOST = 255, 127, 8191
# Features of a layer reach so many standard deviations above their mean before they are cut.
SPREAD = 5
# A pixel is counted in 2**SHIFT steps of the grid, so from -4 to 4: as far as noise of sigma = 1.
SHIFT = 3
# Sums up to here are exact in float32, in any order of additions.
SUM_LIMIT = 2**24 - 1
# Places of the features of the second convolution.
PLACES = 49
# `exact.c` adds products in 16 bits where a processor has no dot products: neighbours in the first
# layer, groups of eight later.
GROUP_LIMIT = 2**15 - 1
# Bits of the whole numbers that bring the logits of several networks to one scale.
MULTIPLIER_BITS = 20


class WholeLogits(nn.Module):
    """A form that decides in whole numbers: in `logits`, of which `unit` stand for 1."""

    num_classes: int
    unit: float
    # Images (B, 1, 28, 28) in steps -> whole logits (B, num_classes), float64 or int64.
    logits: Callable[[Tensor], Tensor]

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float64 (B, num_classes), of images (B, 1, 28, 28) moved to the grid.

        They are whole numbers divided by one constant, so equal ones stay equal. NaN for an image
        with a NaN.
        """
        check_shape(images)
        unknown = images.flatten(1).isnan().any(1)[:, None]
        steps = (images.double().nan_to_num(0) * LEVELS).round().clamp(-LIMIT, LIMIT)
        return (self.logits(steps).double() / self.unit).masked_fill(unknown, torch.nan)

    def classes(self, steps: Tensor) -> Tensor:
        """The class of images (B, 1, 28, 28) in steps: int64 (B,); of equal logits the first."""
        logits = self.logits(steps)
        # argmax may choose any of several.
        first = torch.arange(self.num_classes, 0, -1, device=logits.device)
        return ((logits == logits.amax(1, keepdim=True)) * first).argmax(1)


class ExactConvNN(WholeLogits):
    """A ConvNN for evaluation in whole numbers, decided in whole numbers.

    Weights have 8 bits, those of the output 16. Every channel has a scale of its own, the largest
    for which no sum can leave its range. Pixels have 8 bits, features 7, those of the output layer
    13. Between two layers a sum below 2**24, which float32 holds exactly, is multiplied once by a
    float32 and rounded to the nearest whole number, ties to even. IEEE 754 fixes both results, so a
    noisy image has the same class on every machine, in every batch, from every library.

    The weights themselves are computed from those of the network by single float64 operations,
    which IEEE 754 fixes too, and by sums of whole numbers. `exact.c` computes the same, faster.

    Args:
        network: a ConvNN.

    Raises:
        ValueError: if a weight is not finite, a variance is negative, a layer is too wide, weights
            are of extreme sizes, or the thresholds are closer than 1/100; and on MPS, which has no
            float64.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module):
        super().__init__()
        if network.output.weight.device.type == "mps":
            raise ValueError("MPS has no float64, which 'exact' needs there; use 'float32'.")
        if not is_finite(network):
            raise ValueError("A weight is not finite, so the network has no integers.")
        self.num_classes = network.output.out_features
        self.pixels, unit = _pixels(network.thresholds)
        last = network.hidden is None
        first = _layer(*_folded(network.conv1, network.norm1), PIXEL_MOST, unit)
        unit = _unit(network.norm1, FEATURE_MOST)
        layers = [_with_scale(first, unit)]
        second = _layer(*_folded(network.conv2, network.norm2), FEATURE_MOST, unit)
        unit = _unit(network.norm2, LAST_MOST if last else FEATURE_MOST)
        layers.append(_with_scale(second, unit))
        if not last:
            weights = _by_place(_array(network.hidden.weight), PLACES)
            hidden = _layer(weights, _array(network.hidden.bias), FEATURE_MOST, unit)
            unit = _uncut_unit(*hidden)
            layers.append(_with_scale(hidden, unit))
        weights = _by_place(_array(network.output.weight), PLACES if last else 1)
        *output, self.unit = _output(weights, _array(network.output.bias), unit)
        device = network.output.weight.device
        for number, layer in enumerate([*layers, output], 1):
            for name, values in zip(("kernel", "bias", "scale"), layer, strict=False):
                self.register_buffer(f"{name}{number}", torch.from_numpy(values).to(device))
        self.layers = len(layers) + 1

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """Kernel, biases and scales of a layer, whole numbers but the scales; no scales at last."""
        names = ("kernel", "bias", "scale")[: 2 if number == self.layers else 3]
        return tuple(getattr(self, f"{name}{number}") for name in names)

    @torch.no_grad()
    def logits(self, steps: Tensor) -> Tensor:
        # Autocast would round the sums.
        with torch.autocast(steps.device.type, enabled=False):
            return self._logits(steps)

    def _logits(self, steps: Tensor) -> Tensor:
        low, high, factor, shift, zero = self.pixels
        scaled = steps.clamp(low, high).long() * factor + shift
        values = (scaled >> 16).clamp(0, PIXEL_MOST).float() - zero
        for number in (1, 2):
            # A product of matrices: some libraries convolve in ways that round.
            kernel, side = self.layer(number)[0].transpose(1, 2).flatten(1), values.shape[-1] // 2
            sums = kernel.float() @ F.unfold(values, 5, padding=2, stride=2)
            values = self._scaled(number, sums.unflatten(2, (side, side)))
        values = values.flatten(2).transpose(1, 2).flatten(1)
        if self.layers == 4:
            values = self._scaled(3, values @ self.layer(3)[0].flatten(1).float().T)
        kernel, bias = self.layer(self.layers)
        return values.double() @ kernel.flatten(1).double().T + bias

    def _scaled(self, number: int, sums: Tensor) -> Tensor:
        """The sums (B, C, ...) of a layer without its biases, as the next layer counts them."""
        _, bias, scale = self.layer(number)
        most = FEATURE_MOST if number < self.layers - 1 else LAST_MOST
        shape = (-1, *[1] * (sums.dim() - 2))
        return ((sums + bias.view(shape)) * scale.view(shape)).clamp(0, most).round()


class ExactEnsemble(WholeLogits):
    """The mean of the logits of several ConvNNs, for evaluation in whole numbers.

    What stands for 1 differs between the whole logits of the members. Whole numbers, by which they
    are multiplied, bring them to one scale, up to half a millionth of the largest logit that any
    member can have. Then they are added in 64 bits. So a noisy image has the same class on every
    machine here too. `exact.c` computes the same, faster.

    Args:
        networks: ConvNNs with the same number of classes.

    Raises:
        ValueError: as for `ExactConvNN`, and for more members than 64 bits have room for.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        if len(networks) > 2 ** (63 - 31 - MULTIPLIER_BITS):
            raise ValueError(f"{len(networks):,} networks are too many for 'exact'.")
        self.members = nn.ModuleList(map(ExactConvNN, networks))
        self.num_classes = self.members[0].num_classes
        # The coarsest member has the largest multiplier.
        least, most = min(member.unit for member in self.members), 2**MULTIPLIER_BITS
        self.multipliers = [round(most * (least / member.unit)) for member in self.members]
        self.unit = most * least * len(self.members)

    def logits(self, steps: Tensor) -> Tensor:
        pairs = zip(self.multipliers, self.members, strict=True)
        return sum(times * member.logits(steps).long() for times, member in pairs)


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and statistics of a network are finite."""
    return all(values.isfinite().all() for values in network.state_dict().values())


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (C, 25, inputs) and biases of a convolution with the normalisation after it."""
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias, mean, variance = map(_array, statistics)
    if not (variance + norm.eps > 0).all():
        raise ValueError("A running variance is negative, so the network has no integers.")
    factor = weight / np.sqrt(variance + norm.eps)
    kernel = _array(convolution.weight.flatten(2)).transpose(0, 2, 1)
    return kernel * factor[:, None, None], bias - mean * factor


def _by_place(weight: np.ndarray, places: int) -> np.ndarray:
    """Weights (C, inputs * places) as (C, places, inputs)."""
    return weight.reshape(len(weight), -1, places).transpose(0, 2, 1)


def _unit(norm: nn.BatchNorm2d, most: int) -> float:
    """Steps per unit in which the features after a normalisation are counted."""
    largest = (_array(norm.bias) + SPREAD * np.abs(_array(norm.weight))).max()
    return most / max(largest, 1e-6)


def _pixels(thresholds) -> tuple[tuple[int, int, int, int, int], float]:
    """How steps of the grid become pixels of 8 bits, and how many steps of those make a unit.

    p steps become (p * factor + shift) // 2**16, after p was cut at `low` and `high`; `zero`
    stands for 0.
    """
    if thresholds is None:
        zero, factor = (PIXEL_MOST + 1) // 2, 2 ** (16 - SHIFT)
        shift = (zero << 16) + 2**15
        return (-LIMIT, LIMIT, factor, shift, zero), LEVELS / 2**SHIFT
    low, high = thresholds
    if high - low < 0.00999:
        raise ValueError("The thresholds are closer than 1/100: too steep for integers.")
    factor = round(2**16 * PIXEL_MOST / (LEVELS * (high - low)))
    shift = 2**15 - round(2**16 * PIXEL_MOST * low / (high - low))
    return (0, LEVELS, factor, shift, 0), float(PIXEL_MOST)


def _layer(weights: np.ndarray, bias: np.ndarray, most: int, unit: float) -> tuple:
    """Whole kernel (C, places, inputs) and biases (C,), float64, and their steps per unit (C,).

    Inputs are counted in `unit` steps per unit, up to `most`.
    """
    sizes = np.abs(weights)
    largest = np.maximum(sizes.max((1, 2)), 1e-30)
    # Whole numbers: their sums do not depend on the order.
    sizes = np.rint(sizes * (2.0**30 / largest)[:, None, None])
    total, groups = sizes.sum((1, 2)) / 2**30, _groups(sizes)
    # Rounding moves every weight by up to half a step, which must fit as well.
    group_room = GROUP_LIMIT // most - groups.shape[-1] / 2
    room = SUM_LIMIT - most * weights[0].size / 2 - 1
    if room <= 0:
        raise ValueError(f"A layer of {weights[0].size:,} inputs is too wide for 'exact'.")
    steps = np.minimum(127.0, group_room / np.maximum(groups.sum(-1).max(1) / 2**30, 1e-30))
    steps = np.minimum(steps, room / (most * total + np.abs(bias) * unit / largest + 1e-30))
    steps = steps / largest
    return np.rint(weights * steps[:, None, None]), np.rint(bias * unit * steps), unit * steps


def _with_scale(layer: tuple, out_unit: float) -> tuple:
    """Kernel int8, biases int32 and scales float32 (C,) of a layer.

    Outputs are counted in `out_unit` steps per unit.
    """
    kernel, bias, steps = layer
    with np.errstate(over="ignore"):
        scale = (out_unit / steps).astype(np.float32)
    if not np.isfinite(scale).all():
        raise ValueError("Weights of two layers are too far apart in size for 'exact'.")
    return kernel.astype(np.int8), bias.astype(np.int32), scale


def _groups(weights: np.ndarray) -> np.ndarray:
    """Weights (C, places, inputs) in the groups that `exact.c` adds up in 16 bits: (C, ..., group).

    Of pixels: neighbours in a row of 5. Of 16 inputs: pairs 1, 3, 5, 7 and pairs 2, 4, 6, 8.
    """
    if weights.shape[1:] == (25, 1):
        rows = np.pad(weights.reshape(-1, 5), [(0, 0), (0, 1)])
        return rows.reshape(len(weights), -1, 2)
    rows = np.pad(weights, [(0, 0), (0, 0), (0, -weights.shape[2] % 16)])
    return rows.reshape(-1, 4, 2, 2).swapaxes(1, 2).reshape(len(weights), -1, 8)


def _uncut_unit(kernel: np.ndarray, bias: np.ndarray, steps: np.ndarray) -> float:
    """Steps per unit in which no output of this layer of features is cut, whatever its inputs."""
    highest = np.abs(kernel).sum((1, 2)) * FEATURE_MOST + np.abs(bias)
    return LAST_MOST / max((highest / steps).max(), 1e-30)


def _output(weights: np.ndarray, bias: np.ndarray, unit: float) -> tuple:
    """Kernel int16 and biases int32 of the output, and the steps per unit of a logit."""
    largest = max(np.abs(weights).max(), 1e-30)
    room = 2**31 - 2 - LAST_MOST * weights[0].size / 2
    if room <= 0:
        raise ValueError(f"An output of {weights[0].size:,} inputs is too wide for 'exact'.")
    total = LAST_MOST * np.rint(np.abs(weights) * (2.0**30 / largest)).sum((1, 2)).max() / 2**30
    steps = room / (total + np.abs(bias).max() * unit / largest + 1e-30)
    steps = min(2.0**15 - 1, steps) / largest
    kernel = np.rint(weights * steps).astype(np.int16)
    return kernel, np.rint(bias * unit * steps).astype(np.int32), unit * steps
