"""The greedy attack on few pixels: on models whose best answer is known."""

from contextlib import nullcontext

import pytest
import torch

from src.robustness.few_pixels import MOVES, few_pixels_attack
from tests.attack_helpers import (
    Linear,
    equal,
    length,
    margin,
    mixed_modes,
    random_batch,
    snapshot,
    trained_network,
    wrong,
)


def own_labels(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 0.5, 1.0, 2.0, 3.3])
def test_points_are_in_the_ball_and_break_or_are_clean(epsilon):
    images = random_batch(60)[0].round(decimals=1)
    model = Linear(classes=10, seed=1)
    labels = own_labels(model, images)
    points = few_pixels_attack(model, images, labels, epsilon)
    assert (length(points.double() - images.double(), "l2") <= epsilon).all()
    assert ((points >= 0) & (points <= 1)).all()
    moved = (points != images).flatten(1).any(dim=1)
    assert torch.equal(moved, wrong(model, points, labels))
    most = int(epsilon**2 / min(MOVES) ** 2 + 1e-9)
    assert ((points != images).flatten(1).sum(dim=1) <= most).all()
    assert moved.any() == (epsilon >= min(MOVES))


def test_on_a_linear_model_no_choice_of_pixels_does_better():
    model, epsilon = Linear(seed=3), 2.0
    images = random_batch(300, seed=4)[0]
    labels = own_labels(model, images)
    gaps = margin(model, images, labels)
    slope = (model.weight[:, 1] - model.weight[:, 0]).detach() * (1 - 2 * labels[:, None])
    breakable = torch.zeros(len(images), dtype=torch.bool)
    for move in MOVES:
        aims = (images.flatten(1) + move * slope.sign()).clamp(0, 1)
        gains = (slope * (aims - images.flatten(1))).double()
        best = gains.sort(dim=1, descending=True).values[:, : int(epsilon**2 / move**2)]
        breakable |= best.sum(dim=1) > gaps + 1e-3
    points = few_pixels_attack(model, images, labels, epsilon)
    broken = wrong(model, points, labels)
    assert breakable.any()
    assert not breakable.all()
    assert torch.equal(broken, breakable)


def test_misclassified_images_stay():
    model, images, labels = trained_network()
    assert torch.equal(few_pixels_attack(model, images, (labels + 1) % 10, 1.0)[:50], images[:50])


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_model_and_images_stay_as_they_were(context):
    model, images, labels = trained_network()
    mixed_modes(model)
    with context():
        # Made here: tensors made in inference mode are unknown to autograd.
        images, before = images.clone(), snapshot(model)
        kept = images.clone()
        points = few_pixels_attack(model, images, labels, 2.0)
        assert equal(before, snapshot(model))
        assert torch.equal(images, kept)
        assert not torch.equal(points, images)
    assert not points.requires_grad


def test_other_norms_are_refused():
    images, labels = random_batch(2)
    with pytest.raises(ValueError, match="few pixels are no restriction there; use 'l2'"):
        few_pixels_attack(Linear(classes=10), images, labels, 0.3, "linf")
