"""The cures of collapse: each loss against its formula, on linear models."""

import pytest
import torch

from benchmarks import cures
from src.training_and_evaluation import standard_loss
from tests.attack_helpers import Linear, random_batch

EPSILON = 0.3


def sign_of_the_gradient(model, images, labels):
    points = images.clone().requires_grad_()
    loss, _ = standard_loss(model, points, labels)
    return torch.autograd.grad(loss, points)[0].sign()


def test_noise_augmented_start_is_cut_before_the_step():
    # Of two classes the sign of a linear model's gradient is the same everywhere.
    model, (images, labels) = Linear(scale=0.01, seed=1), random_batch(40, classes=2)
    images = images.round()  # black and white
    sign = sign_of_the_gradient(model, images, labels)
    torch.manual_seed(5)
    found = cures.noise_augmented(model, images, labels, EPSILON)
    torch.manual_seed(5)
    noise = 2 * EPSILON * (2 * torch.rand_like(images) - 1)
    expected = ((images + noise).clamp(0, 1) + EPSILON * sign).clamp(0, 1)
    torch.testing.assert_close(found, expected)
    # A black pixel that has to rise does so by epsilon at least, however low the noise was.
    rising = (images == 0) & (sign > 0)
    assert found[rising].min() >= EPSILON * (1 - 1e-6)


def test_the_smallest_third_of_the_gradient_is_dropped():
    model, (images, labels) = Linear(seed=2), random_batch(40, classes=2)
    images = 0.4 + 0.2 * images  # far from the ends of the range
    torch.manual_seed(5)
    found = cures.without_smallest(model, images, labels, EPSILON)
    torch.manual_seed(5)
    noise = EPSILON * (2 * torch.rand_like(images) - 1)
    kept = torch.isclose(found, images + noise, atol=1e-6).flatten(1)
    slope = (model.weight[:, 1] - model.weight[:, 0]).abs()
    assert kept.float().mean().item() == pytest.approx(0.35, abs=0.01)
    assert slope[kept[0]].max() < slope[~kept[0]].min()
    assert (found - images).abs().max() <= EPSILON * (1 + 1e-6)


@pytest.mark.parametrize(("bend", "expected"), [(0.0, 0.0), (1.0, 2.0)])
def test_alignment_is_one_minus_the_cosine(bend, expected):
    # Of a linear model gradients agree everywhere; here they turn round beyond the image.
    torch.manual_seed(0)
    weight = torch.randn(784) / 784
    images, labels = torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.int64)

    class Bent(torch.nn.Module):
        def forward(self, points):
            lead = points.flatten(1) @ weight
            turned = (points - images).flatten(1).abs().sum(dim=1) > 0
            lead = torch.where(turned & (bend > 0), -lead, lead)
            return torch.stack([lead, -lead], dim=1)

    model = Bent()
    with_it, _ = cures.aligned_loss(model, images, labels, EPSILON, weight=1.0)
    without, _ = cures.aligned_loss(model, images, labels, EPSILON, weight=0.0)
    assert (with_it - without).item() == pytest.approx(expected, abs=1e-4)


def test_random_starts_come_from_the_seed_and_from_nothing_before():
    model, (images, labels) = Linear(seed=3), random_batch(8, classes=2)

    def first(seed):
        loss, *_ = cures.cures(seed)["bounded random start"]
        return loss(model, images, labels, EPSILON)[0].item()

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_epsilon_grows_or_is_there_from_the_start():
    def loss(epsilon):
        return epsilon

    grown = [cures.growing(loss, 0.3)(progress)() for progress in (0, 0.15, 0.3, 0.9)]
    assert grown == pytest.approx([0, 0.15, 0.3, 0.3])
    assert [cures.growing(loss, 0.0)(progress)() for progress in (0, 0.9)] == [0.3, 0.3]
