"""The network `ConvNN`, several of them as one, and smoothing with Gaussian noise."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.certification import bounds, stopping, tightest
from src.checks import ask, check_count, check_images, check_number, check_shape
from src.engine import forms
from src.engine.lattice import LEVELS
from src.engine.noise import (
    Noise,
    check_levels,
    check_numbers,
    checked_copies,
    sampler_cost,
    to_grid,
)
from src.engine.parts import apply_thresholds, check_precision, mean_logits
from src.engine.untouched import alteration, are_thresholds, has_hooks, unwrapped
from src.engine.votes import NoisyImage, Workers
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
            precision: "float32"; "bfloat16" for all layers but the output; or "exact", whole
                numbers throughout (`ExactConvNN`), without gradients.

        Raises:
            ValueError: for another precision; if "exact" is not possible (`ExactConvNN`); and for
                a network that was altered after it was made, which only `forward` knows.
        """
        return forms.inference_form(self, precision)

    def attacked_form(self, precision: str) -> nn.Module:
        """The fastest form that passes gradients to the images; `evaluation_form` asks for it."""
        return forms.attacked_form(self, precision)


class Ensemble(nn.Module):
    """Several ConvNNs as one: the mean of their logits (Horvath et al., ICLR 2022).

    Under noise, members trained from other seeds err on other copies, so their mean votes more
    often for the right class. It takes as long as all its members one after the other. Like a
    ConvNN it is attacked, saved, and certified in whole numbers.

    Args:
        networks: the members, which are not copied, or the arguments that make each. Their widths
            and thresholds may differ.

    Raises:
        ValueError: if there is no member, one is no ConvNN, or their numbers of classes differ.
    """

    def __init__(self, networks: Sequence[ConvNN | Mapping]):
        super().__init__()
        members = [ConvNN(**n) if isinstance(n, Mapping) else n for n in networks]
        for member in members:
            if not isinstance(member, ConvNN):
                raise ValueError(f"'networks' must hold ConvNNs, no {type(member).__name__}.")
        classes = sorted({member.config["num_classes"] for member in members})
        if len(classes) != 1:
            found = f"have {' and '.join(map(str, classes))} classes" if classes else "are none"
            raise ValueError(f"'networks' {found}; give ConvNNs of the same number of classes.")
        self.networks = nn.ModuleList(members)

    @property
    def config(self) -> dict:
        """The argument that makes such an ensemble, as plain values."""
        return {"networks": [network.config for network in self.networks]}

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """The thresholds of the members if all have the same, else None."""
        found = {network.thresholds and tuple(network.thresholds) for network in self.networks}
        return found.pop() if len(found) == 1 else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28); ValueError for another shape."""
        return mean_logits(self.networks, images)

    def inference_form(self, precision: str = "float32") -> nn.Module:
        """A faster copy for evaluation only; see `ConvNN.inference_form`."""
        return forms.inference_form(self, precision)

    def attacked_form(self, precision: str) -> nn.Module:
        """The fastest form that passes gradients to the images; `evaluation_form` asks for it."""
        return forms.attacked_form(self, precision)


class Certificate(NamedTuple):
    """What `certify` returns: one entry per image, on the CPU."""

    prediction: Tensor  # int64, the class, or ABSTAIN
    radius: Tensor  # float64, that of CERTIFY, l2 in pixel units, 0 when abstaining
    radius_tight: Tensor  # float64, the tightest sound one, by the test that was chosen
    top_count: Tensor  # int64, votes of the selected class among the n
    p_lower: Tensor  # float64, lower confidence bound of that class's probability
    rival_count: Tensor  # int64, most votes of any other class
    test: Tensor  # int8, sides of the test behind `radius_tight`: 1 or 2

    def __repr__(self) -> str:
        """A line per image; radii and probabilities are rounded down."""
        lines = ["class  radius  by CERTIFY  votes for it  probability at least"]
        columns = (field.reshape(-1).tolist() for field in self[:5])
        for label, *radii, votes, p in zip(*columns, strict=True):
            name = "none" if label == ABSTAIN else label
            plain, tight = (math.floor(radius * 1000) / 1000 for radius in radii)
            p = math.floor(p * 1e6) / 1e6
            lines.append(f"{name:>5}  {tight:6.3f}  {plain:10.3f}  {votes:12,}  {p:.6f}")
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
    the votes.

    Votes are cast on images of whole steps of 1/255: the image, moved to the nearest such point,
    plus noise rounded to whole steps, cut at 4,095 steps. Rounding and cut count as part of f. So
    the theorem holds for the very numbers that are computed, as far as f is a function of them. The
    noise of an image depends on `seed` and its index alone, on every machine.

    Args:
        base_classifier: f, images (B, C, H, W) -> logits (B, num_classes).
        sigma: standard deviation of the noise, in pixel units.
        num_classes: number of logits of f.
        precision: "exact", "float32" or "bfloat16", in which f votes. The rounded network is the f
            that is certified. In "exact" it is one function on every machine (`ExactConvNN`); in
            floats, rounding may depend on machine and batch, which no certificate covers. All but
            float32 need an unaltered ConvNN, or an Ensemble of such. None: exact for such a network
            on a CPU, else float32.
        levels: steps of the grid per unit, for floats: 255, or up to 4,080 for images that are not
            of bytes. Radii lose the distance from an image to the grid.

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
        precision: str | None = None,
        levels: int = LEVELS,
    ):
        super().__init__()
        if not isinstance(base_classifier, nn.Module):
            raise ValueError("'base_classifier' must be a torch.nn.Module.")
        check_number("sigma", sigma, positive=True)
        check_count("num_classes", num_classes, 2)
        if precision is not None:
            check_precision(precision)
            forms.check_form(precision, alteration(unwrapped(base_classifier)))
            if precision == "exact" and levels != LEVELS:
                raise ValueError(f"'exact' counts pixels in bytes; leave 'levels' at {LEVELS}.")
        check_levels(levels)
        self._precision = precision
        self.levels = int(levels)
        self.base_classifier = base_classifier
        self.sigma = float(sigma)
        self.num_classes = num_classes

    @property
    def precision(self) -> str:
        """In which the base classifier votes, as it is now."""
        if self._precision or self.levels != LEVELS:
            return self._precision or "float32"
        return forms.default_precision(self.base_classifier)

    @property
    def exact(self) -> bool:
        """Whether the votes are the same on every machine."""
        return self.precision == "exact"

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
        than g(x) is at most `alpha`. An image off the grid is moved to it first: the answer is then
        that of g at the nearest point.

        Args:
            images: (B, C, H, W) or (C, H, W), pixels in [0, 1]. A pixel that is no multiple of
                1/255 is moved to the nearest one.
            n: noisy copies per image, at most 2**32.
            alpha: level of the two-sided binomial test of the two leading classes; it also pays
                for `sampler_cost`.
            batch_size: at most this many copies pass through the network at once.
            seed: of the noise, below 2**64.
            indices: numbers of the images in their data set, below 2**32, which also fix their
                noise; default: their positions here.

        Returns:
            int64 (B,), on the CPU; zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range.
        """
        (n,) = checked_copies(n=n)
        alpha = self._left_of(alpha, images, n)
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

        `prediction`, `radius` and `p_lower` are those of CERTIFY. `radius_tight` has the same
        guarantee by itself and is often larger: the `n0` copies also choose, before the fresh ones
        are seen, whether to spend `alpha` on the class alone or to bound its strongest rival too
        (equation 3 there; `choose_test`). It is 0 where CERTIFY abstains. So the prediction and
        `radius_tight` hold together at `alpha`: where the class selected is not g(x), any claim
        needs CERTIFY's test to pass, and where it is, only `radius_tight` can be false. To take the
        larger of the two radii costs up to 1.5 `alpha`.

        Args:
            n0: noisy copies that choose the class, at most 2**32.
            n: noisy copies that bound its probability, at most 2**32.
            alpha: chance of a false certificate; it also pays for `sampler_cost`.
            images, batch_size, seed, indices: as for `predict`.

        Returns:
            Certificate of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `n` is too small to certify
                anything at `alpha`.
        """
        n0, n = checked_copies(n0=n0, n=n)
        alpha = self._level(images, n0, n, alpha)
        rows = self._certificates(images, n0, n, alpha, batch_size, seed, indices)
        return _certificate_of(list(rows), images)

    def certify_each(
        self,
        images: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Certificate]:
        """The certificate of each image, as soon as it is finished; arguments as for `certify`."""
        n0, n = checked_copies(n0=n0, n=n)
        alpha = self._level(images, n0, n, alpha)
        for row in self._certificates(images, n0, n, alpha, batch_size, seed, indices):
            yield _certificate_of([row], images[0] if images.dim() == 4 else images)

    def _certificates(
        self, images: Tensor, n0: int, n: int, alpha: float, batch_size, seed: int, indices
    ) -> Iterator[tuple]:
        with self._noisy(images, seed, indices, batch_size) as (noisy_images, workers):
            for noisy in noisy_images:
                first = noisy.votes("select", n0, workers)
                # Fresh draws: bounding the counts that chose the class would bias p_A upwards.
                counts = noisy.votes("estimate", n, workers)
                yield self._certificate(first, counts, n0, n, alpha, noisy.distance)

    def _level(self, images: Tensor, n0: int, n: int, alpha: float) -> float:
        """What a certificate may spend; ValueError for budgets that could not certify anything."""
        alpha = self._left_of(alpha, images, n0 + n)
        bounds.minimum_successes(n, alpha)
        return alpha

    def sampler_cost(self, pixels: int, draws: int) -> float:
        """What `draws` copies of an image take from alpha: the sampler's distance from its law."""
        return sampler_cost(self.sigma, pixels, draws, self.levels)

    def _left_of(self, alpha: float, images: Tensor, draws: int) -> float:
        """`alpha` less what the sampler costs; ValueError if nothing is left."""
        check_open_unit("alpha", alpha)
        check_images(images, dims=(3, 4))
        cost = self.sampler_cost(images.shape[-3:].numel(), draws)
        if cost >= alpha:
            raise ValueError(
                f"'alpha' = {alpha:g} does not cover the {cost:.2g} that the sampler costs; "
                "use a larger alpha or fewer copies."
            )
        return alpha - cost

    def _certificate(
        self,
        first: np.ndarray,
        counts: np.ndarray,
        n0: int,
        n: int,
        alpha: float,
        distance: float = 0.0,
    ) -> tuple:
        """The entries of a Certificate.

        Args:
            first: votes (num_classes,) of the `n0` copies that choose the class and the test.
            counts: votes (num_classes,) of the `n` fresh copies.
            alpha: what these votes may spend.
            distance: l2, from the image to the point that was voted on; both radii lose it.
        """
        top = first.argmax()
        rival_count, top_count = np.delete(counts, top).max(), counts[top]
        leads = first[top], np.delete(first, top).max()
        test = tightest.choose_test(*leads, n0, n, alpha, self.num_classes)
        sides = 2 if test == tightest.TWO_SIDED else 1
        # This is where alpha is spent.
        p_lower = bounds.lower_confidence_bound(top_count, n, alpha)
        votes = (top_count, rival_count, n, alpha, self.sigma)
        radius = _shortened(bounds.certified_radius(p_lower, self.sigma), distance)
        tight = _shortened(tightest.tight_radius(test, *votes), distance)
        if p_lower <= 0.5 or (distance and radius == 0):
            return ABSTAIN, 0.0, 0.0, top_count, p_lower, rival_count, sides
        return top, radius, tight, top_count, p_lower, rival_count, sides

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
            max_n: most copies drawn after those, at most 2**32.
            images, seed, indices: as for `predict`; the draws are those of `certify`.

        Returns:
            RadiusDecision of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `max_n` is too small to certify
                `radius` at `alpha`.
        """
        check_number("radius", radius)
        n0, max_n = checked_copies(n0=n0, max_n=max_n)
        if radius > 7 * self.sigma:
            raise ValueError(f"'radius' = {radius:g} is beyond 7 sigma, out of reach of any draws.")
        alpha = self._left_of(alpha, images, n0 + max_n)
        stopping.look_schedule(max_n, self._required(radius), alpha)  # Refuses too few copies.

        @functools.cache
        def rule(distance: float) -> tuple[Sequence[int], Callable[[int, int], int]]:
            """When to look at an image so far from its point of the grid, and what to decide."""
            p0 = self._required(radius, distance)
            try:
                looks = stopping.look_schedule(max_n, p0, alpha)
            except ValueError:
                # The image lies too far from the point that is voted on.
                return (), None
            # Most images have the votes of another: all of them for one class.
            return looks, functools.cache(
                lambda count, look: stopping.mixture_decision(count, look, p0, alpha, looks)
            )

        def decide(noisy: NoisyImage) -> tuple[bool, int, int]:
            top = noisy.votes("select", n0).argmax()
            looks, decision_at = rule(noisy.distance)
            if not looks:
                return False, top, n0
            for look, counts in noisy.running_votes("estimate", looks):
                decision = decision_at(int(counts[top]), look)
                if decision != stopping.CONTINUE:
                    return decision == stopping.CERTIFY, top, n0 + look
            raise AssertionError("A rule never answers CONTINUE at its last look.")

        with self._noisy(images, seed, indices) as (noisy_images, workers):
            decisions = list(workers.map(decide, noisy_images))
        return RadiusDecision(*_columns(decisions, (bool, int, int), images))

    def _required(self, radius: float, distance: float = 0.0) -> float:
        """The probability above which `radius` is certified, `distance` away from the image."""
        radius = math.nextafter(radius + distance, math.inf) if distance else radius
        return float(bounds.required_probability(radius, self.sigma))

    @contextmanager
    def _noisy(
        self, images: Tensor, seed: int, indices, batch_size: int | None = None
    ) -> Iterator[tuple[list[NoisyImage], Workers]]:
        """Yield (each image under its noise, who shares the work), after the common checks."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_images(images, dims=(3, 4))
        network = unwrapped(self.base_classifier)
        own = type(network).forward in (ConvNN.forward, Ensemble.forward)
        takes_28x28 = own and not has_hooks(network)
        if takes_28x28 and images.shape[-3:] != (1, 28, 28):
            raise ValueError(
                f"'images' has shape {tuple(images.shape)}; expected (B, 1, 28, 28) or (1, 28, 28)."
            )
        images = images[None] if images.dim() == 3 else images
        indices = range(len(images)) if indices is None else list(indices)
        check_numbers(seed, indices)
        if len(indices) != len(images):
            raise ValueError("'indices' must hold one number for each image.")
        if has_hooks(self) or "forward" in vars(self):
            raise ValueError("Hooks on a SmoothClassifier miss its votes; hook base_classifier.")
        steps, distances = to_grid(images, self.levels)
        # A network without parameters is wherever the images are.
        device = next(self.parameters(), images).device
        steps, few = steps.to(device), images[:4].to(device, torch.float32)
        precision = "float32" if self.levels != LEVELS else None
        options = self._precision or precision, few, self.num_classes, batch_size
        with forms.voters(self.base_classifier, *options) as (cast, workers):
            noises = (Noise(int(seed), int(index), self.sigma, self.levels) for index in indices)
            yield list(map(NoisyImage, repeat(cast), steps, noises, distances)), workers


def _certificate_of(rows: list[tuple], images: Tensor) -> Certificate:
    types = (int, float, float, int, float, int, torch.int8)
    return Certificate(*_columns(rows, types, images))


def _shortened(radius: float, distance: float) -> float:
    """`radius - distance`, rounded down, at least 0."""
    return max(math.nextafter(radius - distance, -math.inf), 0.0) if distance else radius


def _columns(rows: list, types: tuple[type, ...], images: Tensor) -> list[Tensor]:
    """The rows, one per image, as one tensor (B,) per type; zero-dimensional for one image."""
    columns = zip(*rows, strict=True) if rows else [()] * len(types)
    tensors = [torch.tensor(c, dtype=t, device="cpu") for c, t in zip(columns, types, strict=True)]
    return [tensor[0] if images.dim() == 3 else tensor for tensor in tensors]
