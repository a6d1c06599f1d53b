"""The closest attacked image: against a linear model, whose distances are known."""

import pytest
import torch
from torch import nn

from src.robustness.closest import closest_attacked


class Half(nn.Module):
    """Class 1 where a weighted sum of the pixels is above `level`."""

    def __init__(self, weights, level):
        super().__init__()
        self.weights, self.level = nn.Parameter(weights), level

    def forward(self, images):
        score = (images * self.weights).sum(dim=(1, 2, 3)) - self.level
        return torch.stack([-score, score], dim=1)


def test_of_a_half_space_the_closest_images_lie_at_its_distance():
    weights = torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
    image = torch.full((1, 1, 6, 6), 0.5)
    model = Half(weights, -0.9)
    found = closest_attacked(model, image, torch.tensor([1]), steps=20)
    # No pixel reaches 0 or 1 on the way. The search is exact to 1/200 in linf and 1/20 in l2.
    distance = {"linf": 0.9 / float(weights.abs().sum()), "l2": 0.9 / float(weights.norm())}
    for norm, wide in (("linf", 1 / 200), ("l2", 1 / 20)):
        epsilon, point = found[norm]
        assert distance[norm] - 1e-6 <= epsilon <= distance[norm] + wide
        assert int(model(point).argmax()) == 0
        change = (point - image).flatten().double()
        assert epsilon == pytest.approx(float(change.norm(p=torch.inf if norm == "linf" else 2)))


def test_what_nothing_breaks_has_no_closest_image():
    model = Half(torch.zeros(1, 1, 6, 6), -1.0)
    assert closest_attacked(model, torch.rand(1, 1, 6, 6), torch.tensor([1]), steps=2) == {}
