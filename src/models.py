"""The network `ConvNN`, and the classifier obtained by smoothing it with Gaussian noise."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.certification.bounds import (
    abstain_p_value,
    certified_radius,
    lower_confidence_bound,
    minimum_successes,
    required_probability,
    two_sided_bounds,
    two_sided_radius,
)
from src.certification.stopping import (
    CERTIFY,
    CONTINUE,
    look_schedule,
    mixture_decision,
)
from src.checks import (
    check_count,
    check_function,
    check_images,
    check_number,
    check_shape,
    evaluation_mode,
)
from src.engine import forms
from src.engine.parts import apply_thresholds, check_precision
from src.engine.untouched import agrees, alteration, are_thresholds, has_hooks, unwrapped
from src.engine.votes import (
    IN_TURN,
    count_votes,
    image_key,
    running_votes,
    single_threaded_workers,
)
from src.ranges import check_open_unit

ABSTAIN = -1
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
        # On two CPU cores channels-last was 1.0 to 1.2 times as fast here; not measured on a GPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28).

        Raises:
            ValueError: for another shape.
        """
        check_shape(images)
        images = apply_thresholds(images, self.thresholds).to(next(self.parameters(), images).dtype)
        features = F.relu(self.norm1(self.conv1(images)))
        features = F.relu(self.norm2(self.conv2(features))).flatten(1)
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
        return forms.inference_form(self, precision)

    def attacked_form(self, precision: str) -> nn.Module:
        """What `evaluation_form` makes of this network; it passes gradients to the images."""
        return forms.attacked_form(self, precision)


def _check_width(name: str, width: int, minimum: int = 1) -> None:
    check_count(name, width, minimum)
    if width > WIDEST:
        raise ValueError(f"'{name}' must be at most {WIDEST:,}.")


class Certificate(NamedTuple):
    """What CERTIFY returns, one entry per image, on the CPU."""

    prediction: Tensor  # int64, the class, or ABSTAIN
    radius: Tensor  # float64, l2 in pixel units, 0 when abstaining
    top_count: Tensor  # int64, votes of the selected class among the n
    p_lower: Tensor  # float64, lower confidence bound of that class's probability
    rival_count: Tensor  # int64, most votes of any other class
    radius_two_sided: Tensor  # float64, a certificate of its own from the same votes

    def __repr__(self) -> str:
        """A line per image; radii and probabilities are rounded down."""
        lines = ["class  radius  votes for it  probability at least"]
        for label, radius, votes, p in zip(
            *(f.reshape(-1).tolist() for f in self[:4]), strict=True
        ):
            name = "none" if label == ABSTAIN else label
            radius, p = math.floor(radius * 1000) / 1000, math.floor(p * 1e6) / 1e6
            lines.append(f"{name:>5}  {radius:6.3f}  {votes:12,}  {p:.6f}")
        return "\n".join(lines)


class RadiusDecision(NamedTuple):
    """What `certify_radius` returns, one entry an image, on the CPU."""

    certified: Tensor  # bool
    prediction: Tensor  # int64, the class selected, with the guarantee only if certified
    samples: Tensor  # int64, noisy copies drawn, those that chose the class included


class SmoothClassifier(nn.Module):
    """g(x) = argmax_c P(f(x + eta) = c), eta ~ N(0, sigma^2 I) (Cohen et al., ICML 2019).

    Votes are cast by `base_classifier` in evaluation mode, with its own hooks; a NaN among the
    logits is a vote against every class. An answer of it that depends on the other images in the
    batch, or changes from call to call, is refused, and so are hooks on this module itself: they
    would act in `forward`, but not in the votes. The noise of an image depends on (`seed`, its
    index) and the type of device only.

    Args:
        base_classifier: f, images (B, 1, 28, 28) -> logits (B, num_classes).
        sigma: standard deviation of the noise, in pixel units.
        num_classes: number of logits of f.
        precision: "float32", "bfloat16", "int16" or "int8", of the network that votes, which is the
            classifier then certified (others than float32 for a ConvNN as it was made only).
    """

    # One draw per image: its answers change from call to call.
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
        _check_form(precision, alteration(unwrapped(base_classifier)))
        self.precision = precision
        self.base_classifier = base_classifier
        self.sigma = float(sigma)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) at one noisy draw per image: what training under noise calls.

        Draws from torch's global generator, and leaves the mode of the base classifier alone.
        """
        return self.base_classifier(images + self.sigma * torch.randn_like(images))

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
            images: (B, 1, 28, 28) or (1, 28, 28), pixels in [0, 1].
            n: noisy copies of each image.
            alpha: level of the two-sided binomial test of the two leading classes.
            batch_size: at most so many copies pass through the network at once.
            seed: of the noise.
            indices: numbers of the images in their data set; default: their position here.

        Returns:
            int64 (B,), on the CPU; zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range.
        """
        check_count("n", n)
        check_open_unit("alpha", alpha)
        predictions = []
        for votes in self._counters(images, batch_size, seed, indices):
            counts = votes("predict", n)
            second, first = np.sort(counts)[-2:]
            decided = abstain_p_value(first, second) <= alpha
            predictions.append(int(counts.argmax()) if decided else ABSTAIN)
        return _as_batch(torch.tensor(predictions, dtype=torch.int64), images)

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

        `radius_two_sided` bounds every other class from above as well and splits `alpha` between
        the bounds (equation 3 there; `two_sided_bounds`). It is a certificate of its own: whoever
        takes the larger of the two radii must double `alpha`. It is 0 where CERTIFY abstains.

        Args:
            images: (B, 1, 28, 28) or (1, 28, 28), pixels in [0, 1].
            n0: noisy copies that choose the class.
            n: noisy copies that bound its probability.
            alpha: one minus the confidence of the bound.
            batch_size: at most so many copies pass through the network at once.
            seed: of the noise.
            indices: numbers of the images in their data set; default: their position here.

        Returns:
            Certificate of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `n` is too small to certify
                anything at `alpha`.
        """
        check_count("n0", n0)
        check_count("n", n)
        minimum_successes(n, alpha)  # Refuses an n that could not certify anything.
        rows = []
        for votes in self._counters(images, batch_size, seed, indices):
            top = int(votes("select", n0).argmax())
            # Fresh draws: bounding the counts that chose the class would bias p_A upwards.
            rows.append((top, votes("estimate", n)))
        top, counts = (np.array([row[k] for row in rows], int) for k in (0, 1))
        return self._certificate(top, counts.reshape(len(rows), self.num_classes), n, alpha, images)

    def _certificate(self, top, counts, n, alpha, images) -> Certificate:
        """Bounds and radii out of the classes selected (B,) and the votes (B, num_classes)."""
        chosen = np.arange(self.num_classes) == top[:, None]
        top_count, rivals = counts[chosen], counts[~chosen].reshape(len(top), self.num_classes - 1)
        rival_count = rivals.max(axis=1)
        # This is where alpha is spent.
        p_lower = lower_confidence_bound(top_count, n, alpha)
        bounds = two_sided_bounds(top_count, rival_count, n, alpha, self.num_classes)
        sure = p_lower > 0.5
        fields = (
            np.where(sure, top, ABSTAIN),
            certified_radius(p_lower, self.sigma),
            top_count,
            p_lower,
            rival_count,
            np.where(sure, two_sided_radius(*bounds, self.sigma), 0.0),
        )
        return Certificate(*(_as_batch(torch.from_numpy(np.asarray(f)), images) for f in fields))

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
        """Whether the smoothed prediction is constant within `radius`, out of few draws.

        `n0` noisy copies choose the class. Fresh ones are drawn until `mixture_decision` settles
        whether its probability exceeds Phi(radius / sigma), which is what the radius takes. For
        each image alone, over the draws of noise, the chance of certifying a radius within which
        the smoothed prediction changes is at most `alpha`, wherever the drawing stops. An image
        that is not certified may still be robust.

        Args:
            images: (B, 1, 28, 28) or (1, 28, 28), pixels in [0, 1].
            radius: l2, in pixel units, at least 0.
            alpha: chance of a false certificate.
            n0: noisy copies that choose the class.
            max_n: most copies drawn after those.
            seed: of the noise; the draws are those of `certify`.
            indices: numbers of the images in their data set; default: their position here.

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
        p0 = float(required_probability(radius, self.sigma))
        looks = look_schedule(max_n, p0, alpha)
        keyed = self._keyed(images, seed, indices)

        def decide(pair: tuple[Tensor, int]) -> tuple[bool, int, int]:
            image, key = pair
            poll = (self.sigma, self.num_classes)
            top = int(count_votes(network, image, n0, *poll, (key, "select")).argmax())
            for look, counts in running_votes(network, image, looks, *poll, (key, "estimate")):
                decision = mixture_decision(counts[top], look, p0, alpha, looks)
                if decision != CONTINUE:
                    return decision == CERTIFY, top, n0 + look
            raise AssertionError("A rule never answers CONTINUE at its last look.")

        with self._voters(images) as (network, workers):
            outcomes = np.array(list(workers.map(decide, keyed)), int).reshape(-1, 3)
        fields = (outcomes[:, 0] == 1, outcomes[:, 1].copy(), outcomes[:, 2].copy())
        return RadiusDecision(*(_as_batch(torch.from_numpy(f), images) for f in fields))

    def _keyed(self, images: Tensor, seed: int, indices) -> list[tuple[Tensor, int]]:
        """Each image (1, 28, 28) with the key of its noise, after the checks they share."""
        check_images(images, dims=(3, 4))
        check_count("seed", seed, 0)
        network = unwrapped(self.base_classifier)
        own = type(network).forward is ConvNN.forward and not has_hooks(network)
        if own and images.shape[-3:] != (1, 28, 28):
            raise ValueError(
                f"'images' has shape {tuple(images.shape)}; expected (B, 1, 28, 28) or (1, 28, 28)."
            )
        images = images[None] if images.dim() == 3 else images
        indices = list(range(len(images)) if indices is None else indices)
        for index in indices:
            check_count("indices", index, 0)
        if len(indices) != len(images):
            raise ValueError("'indices' must hold one number for each image.")
        images = images.to(self._device(images), torch.float32)
        return [(i, image_key(seed, int(index))) for i, index in zip(images, indices, strict=True)]

    def _counters(self, images, batch_size, seed, indices) -> Iterator[Callable]:
        """Yield for each image a function (stage, n) -> votes (num_classes,) of noisy copies."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        keyed = self._keyed(images, seed, indices)
        with self._voters(images) as (network, workers):
            for image, key in keyed:

                def votes(stage, n, image=image, key=key):
                    noise = (self.sigma, self.num_classes, (key, stage))
                    return count_votes(network, image, n, *noise, batch_size, workers)

                yield votes

    def _device(self, images: Tensor) -> torch.device:
        """Where the base classifier is; where the images are if it has no parameters."""
        return next(self.parameters(), images).device

    def _voting_form(self) -> nn.Module | None:
        """The form of the base classifier that casts votes; None if only itself can."""
        if has_hooks(self) or "forward" in vars(self):
            raise ValueError("Hooks on a SmoothClassifier miss its votes; hook base_classifier.")
        network = unwrapped(self.base_classifier)
        reason = alteration(network)
        if not reason:
            form = forms.voting_form(network, self.precision)
            if agrees(form, network, self.precision):
                return form
        _check_form(self.precision, reason or "its forward pass gives other answers")
        return None

    @contextmanager
    def _voters(self, images: Tensor):
        """The network in the form that casts votes, and who shares the work."""
        network = self._voting_form()
        if network is None:
            # Nothing is known of its forward pass: no folding, and one call at a time.
            given = images[None] if images.dim() == 3 else images
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
            given = given.to(self._device(images), dtype or torch.float32)
            check_function(self.base_classifier, given)
            with evaluation_mode(self.base_classifier) as network:
                yield lambda noisy: network(noisy.to(given.dtype)), IN_TURN
            return
        on_cpu = self._device(images).type == "cpu"
        with single_threaded_workers() if on_cpu else nullcontext(IN_TURN) as workers:
            yield network, workers


def _check_form(precision: str, reason: str) -> None:
    """Raise ValueError if the network must vote as it is, for a `reason`, in another precision."""
    if reason and precision != "float32":
        raise ValueError(f"'precision' = {precision!r} needs a ConvNN as it is made, but {reason}.")


def _as_batch(values: Tensor, images: Tensor) -> Tensor:
    """`values` (B,), or zero-dimensional if `images` was a single one."""
    return values[0] if images.dim() == 3 else values
