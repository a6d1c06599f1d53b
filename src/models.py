"""The network `ConvNN`, and the classifier obtained by smoothing it with Gaussian noise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src.certification.bounds import (
    abstain_p_value,
    certified_radius,
    check_open_unit,
    lower_confidence_bound,
    minimum_successes,
    required_probability,
    two_sided_bounds,
    two_sided_radius,
)
from src.certification.stopping import (
    CERTIFY,
    CONTINUE,
    is_settled,
    look_schedule,
    mixture_decision,
    staged_looks,
)
from src.checks import (
    check_count,
    check_function,
    check_images,
    check_number,
    evaluation_mode,
)
from src.convnn import ConvNN
from src.engine.folded import check_precision
from src.engine.native import WORTH_ONE_CALL, voting_form
from src.engine.untouched import agrees, alteration, has_hooks, unwrapped
from src.engine.votes import (
    IN_TURN,
    count_votes,
    image_key,
    running_votes,
    single_threaded_workers,
)

ABSTAIN = -1


class Certificate(NamedTuple):
    """What CERTIFY returns, one entry an image, on the CPU."""

    prediction: Tensor  # int64, the class, or ABSTAIN
    radius: Tensor  # float64, l2 in pixel units, 0 when abstaining
    top_count: Tensor  # int64, votes of the selected class among the n
    p_lower: Tensor  # float64, lower confidence bound of that class's probability
    rival_count: Tensor  # int64, most votes of any other class
    radius_two_sided: Tensor  # float64, a certificate of its own from the same votes
    samples: Tensor  # int64, the n behind counts and bounds: fewer if it stopped early


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
            classifier then certified (others than float32 for a ConvNN only; see
            `fastest_precision`).
    """

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
        for poll in self._polls(images, n, batch_size, seed, indices):
            (second, first), leader = _two_largest(poll("predict", n))
            decided = abstain_p_value(first, second) <= alpha
            predictions.append(leader if decided else ABSTAIN)
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
        stop: str = "fixed",
        tolerance: float = 0.05,
    ) -> Certificate:
        """Certified l2 radius of the smoothed prediction (CERTIFY, Cohen et al., ICML 2019).

        `n0` noisy copies choose the class; `n` fresh ones bound its probability from below.
        For each image alone, over the draws of noise, the chance of returning a radius within
        which the smoothed prediction changes is at most `alpha`.

        `radius_two_sided` bounds every rival class from above as well and splits `alpha` between
        them (equation 3 there; see `tight_bounds`). Its guarantee is as good, and apart from the
        plain one's: whoever takes the larger of the two for an image must double `alpha`. It is
        0 where the plain certificate abstains.

        Args:
            images: (B, 1, 28, 28) or (1, 28, 28), pixels in [0, 1].
            n0: noisy copies that choose the class.
            n: noisy copies that bound its probability.
            alpha: one minus the confidence of the bound.
            batch_size: at most so many copies pass through the network at once.
            seed: of the noise.
            indices: numbers of the images in their data set; default: their position here.
            stop: "fixed" draws all of `n`; "auto" looks now and then, at a price out of `alpha`,
                and leaves an image whose radius will not grow much (`src/stopping.py`).
            tolerance: what "auto" considers not much, in units of sigma.

        Returns:
            Certificate of tensors (B,), zero-dimensional for one image.

        Raises:
            ValueError: for an argument out of its range, and if `n` is too small to certify
                anything at `alpha`.
        """
        check_count("n0", n0)
        check_count("n", n)
        check_number("tolerance", tolerance)
        minimum_successes(n, alpha)  # Refuses an n that could not certify anything.
        if stop not in ("fixed", "auto"):
            raise ValueError(f"'stop' is {stop!r}; use 'fixed' or 'auto'.")
        looks, levels = staged_looks(n, alpha) if stop == "auto" else ((n,), (alpha,))
        rows = []
        for poll in self._polls(images, n, batch_size, seed, indices):
            # Fresh draws: bounding the counts that chose the class would bias p_A upwards.
            top = int(poll("select", n0).argmax())
            counts, drawn = np.zeros(self.num_classes, int), 0
            for look, level in zip(looks, levels, strict=True):
                counts += poll("estimate", look, start=drawn)
                drawn = look
                if look == n or is_settled(int(counts[top]), look, looks, levels, tolerance):
                    rows.append((top, *self._bounded(counts, top, look, level), look))
                    break
        columns = zip(*rows, strict=True) if rows else [()] * 7
        kinds = (int, float, int, float, int, float, int)
        fields = [np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)]
        fields[0][fields[3] <= 0.5] = ABSTAIN
        return Certificate(*(_as_batch(torch.from_numpy(f), images) for f in fields))

    def _bounded(self, counts: np.ndarray, top: int, n: int, alpha: float) -> tuple:
        """radius, top_count, p_lower, rival_count and radius_two_sided out of the votes."""
        p_lower = lower_confidence_bound(counts[top], n, alpha)
        rival = int(np.delete(counts, top).max())
        bounds = two_sided_bounds(counts[top], rival, n, alpha, self.num_classes)
        two_sided = two_sided_radius(*bounds, self.sigma) if p_lower > 0.5 else 0.0
        return certified_radius(p_lower, self.sigma), counts[top], p_lower, rival, two_sided

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

        `n0` noisy copies choose the class. Fresh ones are drawn until the mixture rule of
        `src/stopping.py` settles whether its probability exceeds Phi(radius / sigma), which is
        what the radius takes. For each image alone, over the draws of noise, the chance of
        certifying a radius within which the smoothed prediction changes is at most `alpha`,
        wherever the drawing stops. An image that is not certified may still be robust.

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
        if radius > 8 * self.sigma:
            raise ValueError(f"'radius' = {radius:g} is beyond 8 sigma: no draws can certify it.")
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

    def _polls(self, images, n, batch_size, seed, indices) -> Iterator[Callable[..., np.ndarray]]:
        """Yield for each image a function (stage, n, start=0) -> votes (num_classes,)."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        keyed = self._keyed(images, seed, indices)
        with self._voters(images, n * len(keyed)) as (network, workers):
            votes = partial(count_votes, network, batch_size=batch_size, workers=workers)
            for image, key in keyed:

                def poll(stage, n, start=0, image=image, key=key):
                    stream = (key, stage)
                    return votes(image, n, self.sigma, self.num_classes, stream, start=start)

                yield poll

    def _device(self, images: Tensor) -> torch.device:
        """Where the base classifier is; where the images are if it has no parameters."""
        return next(self.parameters(), images).device

    def _voting_form(self, copies: int) -> nn.Module | None:
        """The form of the base classifier that casts `copies` votes; None if only itself can."""
        if has_hooks(self) or "forward" in vars(self):
            raise ValueError("Hooks on a SmoothClassifier miss its votes; hook base_classifier.")
        network = unwrapped(self.base_classifier)
        reason = alteration(network)
        if not reason:
            form = voting_form(network, self.precision, often=copies >= WORTH_ONE_CALL)
            if agrees(form, network, self.precision):
                return form
        _check_form(self.precision, reason or "its forward pass gives other answers")
        return None

    @contextmanager
    def _voters(self, images: Tensor, copies: int = 0):
        """The network in the form that casts `copies` votes or so, and who shares the work."""
        network = self._voting_form(copies)
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


def _two_largest(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """The two largest counts, ascending, and the class of the largest."""
    return np.sort(counts)[-2:], int(counts.argmax())


def _as_batch(values: Tensor, images: Tensor) -> Tensor:
    """`values` (B,), or zero-dimensional if `images` was a single one."""
    return values[0] if images.dim() == 3 else values
