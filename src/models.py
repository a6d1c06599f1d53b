"""The network `ConvNN`, and the classifier that smooths a network with Gaussian noise."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.certification import bounds, stopping
from src.checks import ask, check_count, check_images, check_number, check_shape
from src.engine import forms
from src.engine.parts import apply_thresholds, check_precision
from src.engine.untouched import alteration, are_thresholds, has_hooks, unwrapped
from src.engine.votes import NoisyImage, Workers, image_key
from src.ranges import check_open_unit

ABSTAIN = -1
# Wider layers fit into no memory.
WIDEST_LAYER = 2**20


class ConvNN(nn.Module):
    """Two 5x5 convolutions with batch normalisation, then a fully connected output.

    Each convolution has stride 2 (28 -> 14 -> 7 pixels); pooling was less accurate in the same
    training time (`benchmarks/architectures.py`). Pixels go in as they are: the first batch
    normalisation does the work of an input normalisation.

    Args:
        channels: widths of the two convolutions.
        hidden: width of one more fully connected layer before the output; None for none.
        num_classes: number of logits.
        thresholds: (low, high), 0 <= low < high <= 1; None for none. Every pixel is rescaled from
            [low, high] to [0, 1] first, and cut at both ends. MNIST is nearly black and white, so
            thresholds around one half undo most of a perturbation of size 0.3 per pixel. The
            gradient ignores the cut (straight-through, Bengio et al., 2013): otherwise it would be
            zero there and hide the network from attacks (Athalye et al., ICML 2018).

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        hidden: int | None = None,
        num_classes: int = 10,
        *,
        thresholds: tuple[float, float] | None = None,
    ):
        super().__init__()
        if len(channels) != 2:
            raise ValueError(f"'channels' = {tuple(channels)} must have two entries.")
        check_count("num_classes", num_classes, 2)
        widths = [*(("channels", width) for width in channels), ("num_classes", num_classes)]
        for name, width in widths if hidden is None else [*widths, ("hidden", hidden)]:
            check_count(name, width)
            if width > WIDEST_LAYER:
                raise ValueError(f"'{name}' must be at most {WIDEST_LAYER:,}.")
        self.config = {"channels": list(channels), "hidden": hidden, "num_classes": num_classes}
        if thresholds is not None:
            if not are_thresholds(thresholds):
                raise ValueError(f"'thresholds' = {thresholds} must be 0 <= low < high <= 1.")
            # Left out if there are none, so that older checkpoints keep their digests.
            self.config |= {"thresholds": [float(value) for value in thresholds]}
        self.thresholds = self.config.get("thresholds")
        first, second = channels
        features = second * 7 * 7
        self.conv1 = nn.Conv2d(1, first, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 5, stride=2, padding=2, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.hidden = nn.Linear(features, hidden) if hidden else None
        self.output = nn.Linear(hidden or features, num_classes)
        # On two CPU cores channels-last was 1.0 to 1.2 times as fast; not measured on a GPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28); ValueError for another shape."""
        check_shape(images)
        images = apply_thresholds(images, self.thresholds).to(next(self.parameters(), images).dtype)
        features = F.relu(self.norm1(self.conv1(images)))
        features = F.relu(self.norm2(self.conv2(features))).flatten(1)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        # In float32 even under autocast: in bfloat16 the two largest logits are sometimes equal.
        if torch.is_autocast_enabled(images.device.type):
            features = features.float()
        with torch.autocast(images.device.type, enabled=False):
            return self.output(features)

    def inference_form(self, precision: str = "float32") -> nn.Module:
        """A faster copy for evaluation only: the same function up to rounding.

        Args:
            precision: of all layers but the output, "float32", "bfloat16", "int16" or "int8".
                The integer forms have no gradients.

        Raises:
            ValueError: for another precision; if a weight has no integer (`QuantizedConvNN`); and
                for a network that was altered after it was made, which only `forward` knows.
        """
        return forms.inference_form(self, precision)

    def attacked_form(self, precision: str) -> nn.Module:
        """The fastest form that passes gradients to the images; `evaluation_form` asks for it."""
        return forms.attacked_form(self, precision)


class Certificate(NamedTuple):
    """What `certify` returns: one entry per image, on the CPU."""

    prediction: Tensor  # int64, the class, or ABSTAIN
    radius: Tensor  # float64, l2 in pixel units, 0 when abstaining
    top_count: Tensor  # int64, votes of the selected class among the n
    p_lower: Tensor  # float64, lower confidence bound of that class's probability
    rival_count: Tensor  # int64, most votes of any other class
    radius_two_sided: Tensor  # float64, a certificate of its own from the same votes

    def __repr__(self) -> str:
        """A line per image; radii and probabilities are rounded down."""
        lines = ["class  radius  votes for it  probability at least"]
        columns = (field.reshape(-1).tolist() for field in self[:4])
        for label, radius, votes, p in zip(*columns, strict=True):
            name = "none" if label == ABSTAIN else label
            radius, p = math.floor(radius * 1000) / 1000, math.floor(p * 1e6) / 1e6
            lines.append(f"{name:>5}  {radius:6.3f}  {votes:12,}  {p:.6f}")
        return "\n".join(lines)


class RadiusDecision(NamedTuple):
    """What `certify_radius` returns: one entry per image, on the CPU."""

    certified: Tensor  # bool
    prediction: Tensor  # int64, the class selected; guaranteed only if certified
    samples: Tensor  # int64, noisy copies drawn, including those that chose the class


class SmoothClassifier(nn.Module):
    """g(x) = argmax_c P(f(x + eta) = c), eta ~ N(0, sigma^2 I) (Cohen et al., ICML 2019).

    f votes in evaluation mode, with its own hooks. A NaN among the logits is a vote against every
    class. An f whose answer to an image depends on the rest of the batch, or changes from call to
    call, is refused. So are hooks on this module itself: they would act in `forward`, but not in
    the votes. The noise of an image depends only on `seed`, its index and the type of device.

    Args:
        base_classifier: f, images (B, C, H, W) -> logits (B, num_classes).
        sigma: standard deviation of the noise, in pixel units.
        num_classes: number of logits of f.
        precision: "float32", "bfloat16", "int16" or "int8", in which f votes. The rounded network
            is the f that is certified. All but float32 need an unaltered ConvNN.

    Raises:
        ValueError: for an argument out of its range.
    """

    # `forward` draws noise, so its answers change from call to call.
    draws_noise = True

    def __init__(
        self,
        base_classifier: nn.Module,
        sigma: float,
        num_classes: int = 10,
        *,
        precision: str = "float32",
    ):
        super().__init__()
        if not isinstance(base_classifier, nn.Module):
            raise ValueError("'base_classifier' must be a torch.nn.Module.")
        check_number("sigma", sigma, positive=True)
        check_count("num_classes", num_classes, 2)
        check_precision(precision)
        forms.check_form(precision, alteration(unwrapped(base_classifier)))
        self.precision = precision
        self.base_classifier = base_classifier
        self.sigma = float(sigma)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) at one noisy draw per image: what training under noise calls.

        Draws from torch's global generator, and leaves the mode of the base classifier alone.
        """
        return ask(self.base_classifier, images + self.sigma * torch.randn_like(images))

    def predict(
        self,
        images: Tensor,
        n: int = 1000,
        alpha: float = 0.001,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Class of the smoothed classifier, or ABSTAIN (PREDICT, Cohen et al., ICML 2019).

        For each image alone, over the draws of noise, the chance of returning a class other
        than g(x) is at most `alpha`.

        Args:
            images: (B, C, H, W) or (C, H, W), pixels in [0, 1].
            n: noisy copies per image.
            alpha: level of the two-sided binomial test of the two leading classes.
            batch_size: at most this many copies pass through the network at once.
            seed: of the noise.
            indices: numbers of the images in their data set, which also fix their noise; default:
                their positions here.

        Returns:
            int64 (B,), on the CPU; zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range.
        """
        check_count("n", n)
        check_open_unit("alpha", alpha)
        predictions = []
        with self._noisy(images, seed, indices, batch_size) as (noisy_images, workers):
            for noisy in noisy_images:
                counts = noisy.votes("predict", n, workers)
                second, first = np.sort(counts)[-2:]
                decided = bounds.abstain_p_value(first, second) <= alpha
                predictions.append([counts.argmax() if decided else ABSTAIN])
        return _columns(predictions, (int,), images)[0]

    def certify(
        self,
        images: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Certificate:
        """Certified l2 radius of the smoothed prediction (CERTIFY, Cohen et al., ICML 2019).

        `n0` noisy copies choose the class; `n` fresh ones bound its probability from below.
        For each image alone, over the draws of noise, the chance of returning a radius within
        which the smoothed prediction changes is at most `alpha`.

        `radius_two_sided` also bounds every other class from above, and splits `alpha` between
        the bounds (equation 3 there; `two_sided_bounds`). It is a certificate of its own: to take
        the larger of the two radii costs twice `alpha`. It is 0 where CERTIFY abstains.

        Args:
            n0: noisy copies that choose the class.
            n: noisy copies that bound its probability.
            alpha: one minus the confidence of the bound.
            images, batch_size, seed, indices: as for `predict`.

        Returns:
            Certificate of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `n` is too small to certify
                anything at `alpha`.
        """
        check_count("n0", n0)
        check_count("n", n)
        bounds.minimum_successes(n, alpha)  # Refuses an n that could not certify anything.
        certificates = []
        with self._noisy(images, seed, indices, batch_size) as (noisy_images, workers):
            for noisy in noisy_images:
                top = noisy.votes("select", n0, workers).argmax()
                # Fresh draws: bounding the counts that chose the class would bias p_A upwards.
                counts = noisy.votes("estimate", n, workers)
                certificates.append(self._certificate(top, counts, n, alpha))
        return Certificate(*_columns(certificates, (int, float) * 3, images))

    def _certificate(self, top: int, counts: np.ndarray, n: int, alpha: float) -> tuple:
        """The entries of a Certificate from the class selected and the votes (num_classes,)."""
        top_count, rival_count = counts[top], np.delete(counts, top).max()
        # This is where alpha is spent.
        p_lower = bounds.lower_confidence_bound(top_count, n, alpha)
        if p_lower <= 0.5:
            return ABSTAIN, 0.0, top_count, p_lower, rival_count, 0.0
        radius = bounds.certified_radius(p_lower, self.sigma)
        both = bounds.two_sided_bounds(top_count, rival_count, n, alpha, self.num_classes)
        two_sided = bounds.two_sided_radius(*both, self.sigma)
        return top, radius, top_count, p_lower, rival_count, two_sided

    def certify_radius(
        self,
        images: Tensor,
        radius: float,
        alpha: float = 0.001,
        *,
        n0: int = 100,
        max_n: int = 100_000,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> RadiusDecision:
        """Whether the smoothed prediction is constant within `radius`, from few draws.

        `n0` noisy copies choose the class. Its probability must exceed Phi(radius / sigma): fresh
        copies are drawn until `mixture_decision` settles whether it does. For each image alone,
        over the draws of noise, the chance of certifying a radius within which the smoothed
        prediction changes is at most `alpha`, wherever the drawing stops. An image that is not
        certified may still be robust.

        Args:
            radius: l2, in pixel units, at least 0.
            alpha: chance of a false certificate.
            n0: noisy copies that choose the class.
            max_n: most copies drawn after those.
            images, seed, indices: as for `predict`; the draws are those of `certify`.

        Returns:
            RadiusDecision of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `max_n` is too small to certify
                `radius` at `alpha`.
        """
        check_count("n0", n0)
        check_number("radius", radius)
        check_count("max_n", max_n)
        if radius > 7 * self.sigma:
            raise ValueError(f"'radius' = {radius:g} is beyond 7 sigma, out of reach of any draws.")
        p0 = float(bounds.required_probability(radius, self.sigma))
        looks = stopping.look_schedule(max_n, p0, alpha)

        def decide(noisy: NoisyImage) -> tuple[bool, int, int]:
            top = noisy.votes("select", n0).argmax()
            for look, counts in noisy.running_votes("estimate", looks):
                decision = stopping.mixture_decision(counts[top], look, p0, alpha, looks)
                if decision != stopping.CONTINUE:
                    return decision == stopping.CERTIFY, top, n0 + look
            raise AssertionError("A rule never answers CONTINUE at its last look.")

        with self._noisy(images, seed, indices) as (noisy_images, workers):
            decisions = list(workers.map(decide, noisy_images))
        return RadiusDecision(*_columns(decisions, (bool, int, int), images))

    @contextmanager
    def _noisy(
        self, images: Tensor, seed: int, indices, batch_size: int | None = None
    ) -> Iterator[tuple[list[NoisyImage], Workers]]:
        """Yield (each image under its noise, who shares the work), after the common checks."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_images(images, dims=(3, 4))
        check_count("seed", seed, 0)
        network = unwrapped(self.base_classifier)
        takes_28x28 = type(network).forward is ConvNN.forward and not has_hooks(network)
        if takes_28x28 and images.shape[-3:] != (1, 28, 28):
            raise ValueError(
                f"'images' has shape {tuple(images.shape)}; expected (B, 1, 28, 28) or (1, 28, 28)."
            )
        images = images[None] if images.dim() == 3 else images
        indices = range(len(images)) if indices is None else list(indices)
        for index in indices:
            check_count("indices", index, 0)
        if len(indices) != len(images):
            raise ValueError("'indices' must hold one number for each image.")
        if has_hooks(self) or "forward" in vars(self):
            raise ValueError("Hooks on a SmoothClassifier miss its votes; hook base_classifier.")
        # A network without parameters is wherever the images are.
        images = images.to(next(self.parameters(), images).device, torch.float32)
        keys = [image_key(seed, int(index)) for index in indices]
        with forms.voters(self.base_classifier, self.precision, images) as (voter, workers):
            yield (
                [
                    NoisyImage(voter, self.num_classes, image, key, self.sigma, batch_size)
                    for image, key in zip(images, keys, strict=True)
                ],
                workers,
            )


def _columns(rows: list, types: tuple[type, ...], images: Tensor) -> list[Tensor]:
    """The rows, one per image, as one tensor (B,) per type; zero-dimensional for one image."""
    columns = zip(*rows, strict=True) if rows else [()] * len(types)
    tensors = [torch.tensor(c, dtype=t) for c, t in zip(columns, types, strict=True)]
    return [tensor[0] if images.dim() == 3 else tensor for tensor in tensors]
