"""The adaptive attack on networks that cut every pixel at two thresholds first.

Such a network sees z = apply_thresholds(x) only. So the attack searches all z that the ball of x
reaches, with the exact gradient of the network behind the thresholds: nothing is masked there. (On
attacks that know the defence: Tramer et al., NeurIPS 2020.)
"""

import copy

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import direction, linf_box, projection
from src.checks import checked_logits, predicted
from src.engine.parts import apply_thresholds
from src.engine.untouched import evaluation_form, unwrapped
from src.robustness.apgd import Space, check_search, search
from src.verdicts import Worst, logits_of, margin, with_gradients


@with_gradients()
def thresholds_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str = "margin",
    targets: int = 0,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD behind the ramp of `model.thresholds`; arguments as for `apgd_attack`.

    In linf the reachable z are a box, for the ramp never falls: the search is that of a network
    without a ramp, in a ball of another width at every pixel. In l2 they are not convex: the
    cheapest changes take a few pixels all the way across the ramp, and the projection chooses
    which. Random starts are corners of the box in linf, and a random choice of pixels in l2.

    Raises:
        ValueError: for an argument out of its range, and for a model without `thresholds`, or
            whose ramp stays when a copy of it has None for them.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_search(steps, restarts, loss, targets)
    model = unwrapped(model)
    if getattr(model, "thresholds", None) is None:
        raise ValueError("'model' has no thresholds; use apgd_attack.")
    if epsilon == 0 or not len(images):
        return images.clone()
    with evaluation_form(model) as network:
        behind = behind_thresholds(network, images, model.thresholds)
        reachable = _Box if norm == "linf" else _Sparse
        reach = reachable(images, epsilon, clip, model.thresholds)
        space = Space(behind, reach.origin, reach.project, reach.ascent, reach.random)
        found = search(space, labels, steps, restarts, loss, targets, generator).points
        points = projection(images, epsilon, norm, clip)(reach.pixels(found))
        # What counts is the network itself at the pixels: rounding may differ.
        worst = Worst(network, images, labels, "margin", False)
        with torch.no_grad():
            for candidates in (images, points):
                logits = logits_of(network, candidates, labels)
                fallen = predicted(logits) != labels
                worst.keep(candidates, slice(None), margin(logits, labels), fallen)
    return worst.points


def behind_thresholds(network: nn.Module, images: Tensor, thresholds) -> nn.Module:
    """`network` without its ramp; ValueError unless it is that network after the ramp."""
    # Shallow: the same weights, but the ramp of the copy alone is taken away.
    behind = copy.copy(network)
    behind.thresholds = None
    with torch.no_grad():
        expected = checked_logits(network(images), len(images))
        found, size = (
            behind(apply_thresholds(images, thresholds)),
            float(expected.nan_to_num().abs().max()),
        )
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
        raise ValueError(
            "'model' does not apply its thresholds as ConvNN does, first and only once; "
            "use apgd_attack."
        )
    return behind


# Of the logarithm of the price: to 0.1 % of its nine orders of magnitude.
HALVINGS = 15
# Half the first step of the most sensitive pixel behind the ramp, in l2; the ramp is 1 wide.
LEAP = 16.0


class _Box:
    """What an linf ball reaches behind the ramp."""

    def __init__(self, images: Tensor, epsilon: float, clip, thresholds):
        self.images, self.thresholds = images, thresholds
        self.pixel_box = linf_box(images, epsilon, clip)
        self.low, self.high = (apply_thresholds(bound, thresholds) for bound in self.pixel_box)
        self.origin = apply_thresholds(images, thresholds)

    def project(self, points: Tensor, chosen=slice(None)) -> Tensor:
        return points.clamp(self.low[chosen], self.high[chosen])

    def ascent(self, gradient: Tensor, chosen=slice(None)) -> Tensor:
        # In units of each pixel's half width, in which the box is a ball.
        return direction(gradient, "linf") * (self.high[chosen] - self.low[chosen]) / 2

    def random(self, generator: torch.Generator) -> Tensor:
        coins = torch.rand(self.images.shape, generator=generator, device=generator.device) < 0.5
        return torch.where(coins.to(self.images.device), self.low, self.high)

    def pixels(self, points: Tensor) -> Tensor:
        """The pixels nearest to the image's own that the ramp takes to `points`."""
        return nearest_pixels(self.images, points, self.thresholds).clamp(*self.pixel_box)


class _Sparse:
    """What an l2 ball reaches behind the ramp: all z whose nearest pixels are near enough."""

    def __init__(self, images: Tensor, epsilon: float, clip, thresholds):
        self.images, self.thresholds = images, thresholds
        # Narrower than the ball by more than the margin of rounding that its projection keeps.
        rounding = torch.finfo(images.dtype).eps * images[0].numel() ** 0.5 * max(map(abs, clip))
        self.budget = max(epsilon * (1 - 2e-6) - 2 * rounding, 1e-12) ** 2
        edge = images.new_tensor(clip)
        self.low, self.high = apply_thresholds(edge, thresholds)
        self.origin = apply_thresholds(images, thresholds)
        self.width = thresholds[1] - thresholds[0]

    def ascent(self, gradient: Tensor, chosen=slice(None)) -> Tensor:
        # So far beyond the end of the ramp that at first the gradient for the cost alone decides
        # which pixels move, and not where they were.
        gradient = torch.nan_to_num(gradient)
        largest = gradient.flatten(1).abs().amax(dim=1)[:, None, None, None]
        return LEAP * gradient / torch.where(largest > 0, largest, 1)

    def random(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.images.shape, generator=generator, device=generator.device)
        return self.project(self.origin + noise.to(self.images))

    def pixels(self, points: Tensor) -> Tensor:
        return nearest_pixels(self.images, points, self.thresholds)

    def project(self, points: Tensor, chosen=slice(None)) -> Tensor:
        """Near `points`, by a Lagrange multiplier for the budget and one pixel for the rest.

        For a price of squared distance each pixel decides for itself; the lowest price that the
        budget can pay is found by bisection. Far `points` make this the choice of the pixels
        with the most gradient for their cost.
        """
        images, origin = self.images[chosen].flatten(1), self.origin[chosen].flatten(1)
        wanted = points.flatten(1)
        free = wanted.clamp(self.low, self.high)
        # A pixel never pays more than moving gains, so this price is one that the budget can pay.
        most = (wanted - origin).square().sum(dim=1, keepdim=True) / self.budget
        least = most * 1e-9
        for _ in range(HALVINGS):
            price = (least * most).sqrt()
            moved = self._at_price(images, origin, wanted, price)
            paid = self._cost(images, moved).sum(dim=1, keepdim=True) <= self.budget
            least, most = torch.where(paid, least, price), torch.where(paid, price, most)
        found = self._at_price(images, origin, wanted, most)
        affordable = self._cost(images, free).sum(dim=1, keepdim=True) <= self.budget
        found = torch.where(affordable, free, self._spend_rest(images, wanted, found))
        return found.view_as(points)

    def _at_price(self, images, origin, wanted, price):
        """Per pixel the z of least (z - wanted)^2 + price * (change of the pixel)^2."""
        low = self.thresholds[0]
        # The minimum over the line without ends, then the better of its nearest end and staying.
        slope = 1 + price * self.width**2
        line = (wanted + price * self.width * (images - low)) / slope
        line = line.clamp(self.low, self.high)
        moving = (line - wanted).square() + price * self._cost(images, line)
        staying = (origin - wanted).square()
        return torch.where(moving < staying, line, origin)

    def _spend_rest(self, images, wanted, found):
        """What is left of the budget to the one pixel where it helps most."""
        cost = self._cost(images, found)
        rest = (self.budget - cost.sum(dim=1, keepdim=True)).clamp(min=0)
        far = (rest + cost).sqrt() * (wanted - found).sign()
        further = apply_thresholds((images + far), self.thresholds).clamp(self.low, self.high)
        # No further than wanted.
        further = torch.where(
            wanted > found, further.minimum(wanted.maximum(found)), further.maximum(wanted)
        )
        help_ = (found - wanted).square() - (further - wanted).square()
        best = help_.argmax(dim=1, keepdim=True)
        useful = help_.gather(1, best) > 0
        value = torch.where(useful, further.gather(1, best), found.gather(1, best))
        return found.scatter(1, best, value)

    def _cost(self, images: Tensor, points: Tensor) -> Tensor:
        return (nearest_pixels(images, points, self.thresholds) - images).square()


def nearest_pixels(images: Tensor, points: Tensor, thresholds) -> Tensor:
    """The pixels nearest to those of `images` that the ramp takes to `points`.

    Black behind the ramp is every pixel up to the lower threshold, white every one from the
    upper on; between them there is one pixel for each value.
    """
    low, high = thresholds
    between = low + points * (high - low)
    return torch.where(
        points <= 0,
        images.clamp(max=low),
        torch.where(points >= 1, images.clamp(min=high), between),
    )
