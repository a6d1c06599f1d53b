"""The attacks without gradients of the checklist: in the ball, and true to closed forms."""

import pytest
import torch
from torch import nn

from src.robustness.checklist import SHORT_SEARCH
from src.robustness.noise import random_noise
from tests.helpers import MeanPixel, linear, shades

ATTACKS = (random_noise, SHORT_SEARCH)
BALLS = (("linf", 0.1), ("linf", 0.3), ("l2", 0.5), ("l2", 3.0))


def lengths(change, norm):
    change = change.double().flatten(1)
    return change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("norm", "epsilon"), BALLS)
def test_results_lie_in_the_ball_and_in_the_box(attack, norm, epsilon):
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    model = linear(side=28)
    labels = model(images).argmax(dim=1)
    attacked = attack(model, images, labels, epsilon, norm)
    assert (lengths(attacked.double() - images.double(), norm) <= epsilon).all()
    assert ((attacked >= 0) & (attacked <= 1)).all()
    assert attacked.dtype == images.dtype
    assert torch.equal(attacked, attack(model, images, labels, epsilon, norm))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("norm", "unit"), [("linf", 1), ("l2", 28)])
def test_no_image_falls_below_its_distance(attack, norm, unit):
    images, labels = shades([0.1001, -0.1001, 0.12]).tensors
    attacked = attack(MeanPixel(), images, labels, 0.1 * unit, norm)
    assert (MeanPixel()(attacked).argmax(dim=1) == labels).all()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 5.6)])
def test_search_breaks_what_is_well_within_reach(norm, epsilon):
    # Squares suit the mean, so in linf twice the distance is enough. In l2 the hill and the
    # valley of a new bump cancel in the mean: four times the distance.
    images, labels = shades([0.05, -0.05, 0.04]).tensors
    attacked = SHORT_SEARCH(MeanPixel(), images, labels, epsilon, norm)
    assert (MeanPixel()(attacked).argmax(dim=1) != labels).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_search_never_asks_for_a_gradient(norm):
    class Steps(nn.Module):
        def forward(self, images):
            assert not torch.is_grad_enabled()
            return MeanPixel()((10 * images).floor() / 10)

    images, labels = shades([0.08, -0.08]).tensors
    attacked = SHORT_SEARCH(Steps(), images, labels, 0.2 if norm == "linf" else 9.0, norm)
    with torch.no_grad():
        assert (Steps()(attacked).argmax(dim=1) != labels).all()


def test_noise_returns_the_clean_image_where_it_fails():
    images, labels = shades([0.2, -0.3]).tensors
    assert torch.equal(random_noise(MeanPixel(), images, labels, 0.1), images)
    # On the other side of the boundary from the start: nothing is drawn.
    assert torch.equal(random_noise(MeanPixel(), images, 1 - labels, 0.1), images)


@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_arguments_are_named(attack):
    images, labels = shades([0.2]).tensors
    with pytest.raises(ValueError, match="'norm'"):
        attack(MeanPixel(), images, labels, 0.1, "l1")
    with pytest.raises(ValueError, match="'images'"):
        attack(MeanPixel(), images + 1, labels, 0.1)
