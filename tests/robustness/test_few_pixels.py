"""The greedy attack on few pixels: on models whose best answer is known."""

from contextlib import nullcontext

import pytest
import torch

from src.robustness.few_pixels import MOVES, few_pixels_attack, few_pixels_lengths
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


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_the_least_length_on_a_linear_model_is_known(batch_size):
    model, largest = Linear(seed=3), 1.7
    images = random_batch(200, seed=4)[0]
    labels = own_labels(model, images)
    labels[:5] = 1 - labels[:5]
    limits = torch.full((200,), largest)
    found = few_pixels_lengths(model, images, labels, limits, batch_size=batch_size)
    gaps = margin(model, images, labels)
    slope = (model.weight[:, 1] - model.weight[:, 0]).detach().double() * (1 - 2 * labels[:, None])
    expected = torch.where(gaps < 0, 0.0, torch.inf)
    for move in MOVES:
        # The pixels go in the order of what they gain, until that is more than the gap.
        change = (images.flatten(1) + move * slope.sign()).clamp(0, 1) - images.flatten(1)
        gains, order = (slope * change).sort(dim=1, descending=True)
        lengths = change.gather(1, order).square().cumsum(dim=1).sqrt()
        short = (gains.cumsum(dim=1) < gaps[:, None]).sum(dim=1, keepdim=True).clamp(max=783)
        needed = lengths.gather(1, short)[:, 0]
        # Clipped moves are shorter; no more are made than whole ones fit into the ball.
        found_here = (needed <= largest) & (short[:, 0] < int(largest**2 / move**2))
        expected = torch.where(found_here, expected.minimum(needed), expected)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    assert (found == 0).sum() == 5
    assert 20 < torch.isinf(found).sum() < 180


def test_lengths_are_those_of_points_that_the_attack_finds():
    model, images, labels = trained_network()
    limits = torch.full((len(images),), 2.0, dtype=torch.float64)
    before = snapshot(model)
    lengths = few_pixels_lengths(model, images, labels, limits)
    assert equal(before, snapshot(model))
    points = few_pixels_attack(model, images, labels, 2.0)
    broken = wrong(model, points, labels)
    assert torch.equal(broken, lengths <= 2)
    moved = length(points.double() - images.double(), "l2")
    assert moved[broken].numpy() == pytest.approx(lengths[broken].numpy(), abs=1e-5)
    # No image is followed beyond its own limit, and the radius is one at which it breaks.
    limits[::2] = 1.0
    again = few_pixels_lengths(model, images, labels, limits)
    near = lengths <= limits
    assert torch.equal(again[near], lengths[near])
    assert torch.isinf(again[~near]).all()


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
