"""The adaptive attack on networks that first cut every pixel at two thresholds.

Such a network sees only z = apply_thresholds(x): 0 up to the lower threshold, 1 from the upper
threshold on, linear between them. So the attack searches the z that the ball of x reaches, with
the exact gradient of the network behind the thresholds, where nothing is masked. (On attacks that
know the defence: Tramer et al., NeurIPS 2020.)
"""

import copy

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import direction, l2_rounding, linf_box, projection, scaled_to_largest
from src.checks import ask, checked_logits
from src.engine.parts import apply_thresholds
from src.engine.untouched import evaluation_form, unwrapped
from src.robustness.apgd import Plan, search
from src.verdicts import Worst, with_gradients

# How often the search for a price halves its logarithmic range of nine orders of magnitude: 0.1 %.
HALVINGS = 15
# Half the first step of the most sensitive pixel behind the thresholds, in l2; z is 0 to 1 there.
LEAP = 16.0


@with_gradients()
def thresholds_attack(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = "linf", **options
) -> Tensor:
    """Auto-PGD behind the thresholds of `model`; arguments as for `apgd_attack`.

    In linf the reachable z are a box, because z never falls as x rises. The search is that of any
    other network, in a ball whose width differs from pixel to pixel. In l2 they are not convex:
    the cheapest changes take a few pixels all the way from 0 to 1, and the projection chooses
    which. Random starts are corners of the box in linf, and a random choice of pixels in l2.

    Raises:
        ValueError: for an argument out of its range, and for a model that has no `thresholds`, or
            whose copy still applies them after they are set to None.
    """
    plan = Plan(**options)
    images = checked(images, labels, epsilon, norm, plan.clip)
    model = unwrapped(model)
    if getattr(model, "thresholds", None) is None:
        raise ValueError("'model' has no thresholds; use apgd_attack.")
    if plan.shrinks:
        raise ValueError("'shrinks' must be 0: behind thresholds there are no balls to shrink.")
    if epsilon == 0 or not len(images):
        return images.clone()
    with evaluation_form(model) as network:
        behind = behind_thresholds(network, images, model.thresholds)
        space = (_Box if norm == "linf" else _Sparse)(images, epsilon, plan.clip, model.thresholds)
        found = search(behind, space, labels, plan).points
        points = projection(images, epsilon, norm, plan.clip)(space.pixels(found))
        # The network itself judges the pixels: its rounding may differ.
        worst = Worst(network, images, labels, "margin", False)
        worst.visit(images, want_gradient=False)
        chosen = worst.standing.nonzero()[:, 0]
        worst.visit(points[chosen], chosen, want_gradient=False)
    return worst.points


@torch.no_grad()
def behind_thresholds(network: nn.Module, images: Tensor, thresholds) -> nn.Module:
    """`network` without its thresholds; ValueError if it is not the rest of the network.

    That is seen on random images of the size of `images`: on pixels that are 0 and 1 already, to
    cut once more changes nothing.
    """
    # Shallow: the same weights, but only the copy loses its thresholds.
    behind = copy.copy(network)
    # Past a property, which an altered Ensemble has: the check below finds that it has no effect.
    vars(behind)["thresholds"] = None
    shape, generator = (8, *images.shape[1:]), torch.Generator().manual_seed(0)
    probes = torch.rand(shape, generator=generator, device=generator.device).to(images)
    expected = checked_logits(ask(network, probes), len(probes))
    found = ask(behind, apply_thresholds(probes, thresholds))
    size = float(expected.nan_to_num().abs().max())
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
        raise ValueError(
            "'model' does not apply its thresholds as ConvNN does, first and only once; "
            "use apgd_attack."
        )
    return behind


class _Box:
    """What an linf ball reaches behind the thresholds: a space like `apgd.Ball`."""

    def __init__(self, images: Tensor, epsilon: float, clip, thresholds):
        self.images, self.thresholds = images, thresholds
        self.pixel_box = linf_box(images, epsilon, clip)
        self.low, self.high = (apply_thresholds(bound, thresholds) for bound in self.pixel_box)
        self.origin = apply_thresholds(images, thresholds)

    def project(self, points: Tensor, chosen: Tensor) -> Tensor:
        return points.clamp(self.low[chosen], self.high[chosen])

    def ascent(self, gradient: Tensor, chosen: Tensor) -> Tensor:
        # In units of each pixel's half width, in which the box is a ball.
        return direction(gradient, "linf") * (self.high[chosen] - self.low[chosen]) / 2

    def random(self, generator: torch.Generator) -> Tensor:
        coins = torch.rand(self.images.shape, generator=generator, device=generator.device) < 0.5
        return torch.where(coins.to(self.images.device), self.low, self.high)

    def pixels(self, points: Tensor) -> Tensor:
        """The pixels nearest to the image's own that give `points`."""
        return nearest_pixels(self.images, points, self.thresholds).clamp(*self.pixel_box)


class _Sparse:
    """What an l2 ball reaches behind the thresholds: all z whose nearest pixels are in it."""

    def __init__(self, images: Tensor, epsilon: float, clip, thresholds):
        self.images, self.thresholds = images, thresholds
        # Smaller than the ball of `projection`, which leaves room for rounding.
        self.budget = max(epsilon * (1 - 2e-6) - 2 * l2_rounding(images, clip), 1e-12) ** 2
        self.low, self.high = apply_thresholds(images.new_tensor(clip), thresholds)
        self.origin = apply_thresholds(images, thresholds)
        self.width = thresholds[1] - thresholds[0]

    def ascent(self, gradient: Tensor, chosen: Tensor) -> Tensor:
        # Far beyond 0 and 1: at first only the gradient per cost decides which pixels move, and
        # not where they were.
        return LEAP * scaled_to_largest(gradient)

    def random(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.images.shape, generator=generator, device=generator.device)
        return self.project(self.origin + noise.to(self.images), slice(None))

    def pixels(self, points: Tensor) -> Tensor:
        return nearest_pixels(self.images, points, self.thresholds)

    def project(self, points: Tensor, chosen) -> Tensor:
        """Near `points`: a Lagrange multiplier spends most of the budget, one pixel the rest.

        The multiplier is a price for squared distance, at which each pixel decides for itself.
        Bisection finds the lowest price at which the budget suffices. If `points` are far away,
        this chooses the pixels with the most gradient for their cost.
        """
        images, origin = self.images[chosen].flatten(1), self.origin[chosen].flatten(1)
        wanted = points.flatten(1)
        free = wanted.clamp(self.low, self.high)
        # A pixel never pays more than it gains by moving, so at this price the budget suffices.
        most = (wanted - origin).square().sum(dim=1, keepdim=True) / self.budget
        least = most * 1e-9
        for _ in range(HALVINGS):
            price = (least * most).sqrt()
            moved = self._at_price(images, origin, wanted, price)
            affordable = self._cost(images, moved) <= self.budget
            least = torch.where(affordable, least, price)
            most = torch.where(affordable, price, most)
        found = self._at_price(images, origin, wanted, most)
        found = self._spend_rest(images, wanted, found)
        affordable = self._cost(images, free) <= self.budget
        return torch.where(affordable, free, found).view_as(points)

    def _at_price(self, images, origin, wanted, price):
        """Per pixel, the z of least (z - wanted)^2 + price * (change of the pixel)^2."""
        # The best z if z grew without end, cut to its range; then the better of this and staying.
        best = wanted + price * self.width * (images - self.thresholds[0])
        best = (best / (1 + price * self.width**2)).clamp(self.low, self.high)
        moving = (best - wanted).square() + price * self._costs(images, best)
        staying = (origin - wanted).square()
        return torch.where(moving < staying, best, origin)

    def _spend_rest(self, images, wanted, found):
        """Spend what is left of the budget on the one pixel where it helps most."""
        costs = self._costs(images, found)
        rest = (self.budget - costs.sum(dim=1, keepdim=True)).clamp(min=0)
        change = (rest + costs).sqrt() * (wanted - found).sign()
        further = apply_thresholds(images + change, self.thresholds).clamp(self.low, self.high)
        # No further than wanted.
        further = torch.where(
            wanted > found, further.minimum(wanted.maximum(found)), further.maximum(wanted)
        )
        gain = (found - wanted).square() - (further - wanted).square()
        best = gain.argmax(dim=1, keepdim=True)
        chosen = torch.where(gain.gather(1, best) > 0, further, found).gather(1, best)
        return found.scatter(1, best, chosen)

    def _costs(self, images: Tensor, points: Tensor) -> Tensor:
        """Squared change of each pixel, (B, pixels)."""
        return (nearest_pixels(images, points, self.thresholds) - images).square()

    def _cost(self, images: Tensor, points: Tensor) -> Tensor:
        return self._costs(images, points).sum(dim=1, keepdim=True)


def nearest_pixels(images: Tensor, points: Tensor, thresholds) -> Tensor:
    """The pixels nearest to those of `images` that `apply_thresholds` takes to `points`.

    Every pixel up to the lower threshold gives 0, every one from the upper threshold on gives 1;
    for each value between 0 and 1 there is one pixel.
    """
    low, high = thresholds
    above = torch.where(points >= 1, images.clamp(min=high), low + points * (high - low))
    return torch.where(points <= 0, images.clamp(max=low), above)
