"""Attacks on certificates: sound ones stand, stretched ones fall."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.engine.noise import to_grid
from src.models import SmoothClassifier
from src.robustness.challenge import (
    broken_allowed,
    challenge_certificates,
    on_grid,
    smoothed_attack,
)
from src.training_and_evaluation import evaluate_robustness


class HalfSpace(nn.Module):
    """Class 0 where the first pixels' sum, scaled to unit length, is above a threshold."""

    def __init__(self, threshold):
        super().__init__()
        weight = torch.zeros(784)
        weight[:64] = 1 / 8
        self.register_buffer("weight", weight)
        self.threshold = threshold

    def forward(self, images):
        score = 20 * (images.flatten(1) @ self.weight - self.threshold)
        return torch.stack([score, -score], dim=1)


@pytest.fixture(scope="module")
def certified():
    """Grey images of bytes whose exact radius is the margin, 0.22 to 0.69, and their rows."""
    images = torch.full((6, 1, 28, 28), 128 / 255)
    images.flatten(1)[:, :64] += torch.arange(7, 23, 3)[:, None] / 255
    smooth = SmoothClassifier(HalfSpace(8 * 128 / 255), 0.5, num_classes=2)
    dataset = TensorDataset(images, torch.zeros(6, dtype=torch.int64))
    return smooth, dataset, list(evaluate_robustness(smooth, dataset, n=20_000, progress=False))


def test_sound_certificates_are_not_broken(certified):
    # False alarm: at most 6 alpha = 0.006 for the certificates, 1e-4 for the votes.
    assert challenge_certificates(*certified, images=6, progress=False) == (0, 6)


def test_radii_stretched_by_half_are_broken(certified):
    # The smoothed half-space changes exactly at the margin, so every stretched ball is wrong.
    options = {"images": 6, "n": 20_000, "stretch": 1.5, "progress": False}
    broken, tried = challenge_certificates(*certified, **options)
    assert (broken, tried) == (6, 6)


@pytest.mark.parametrize("off", [0.0, 0.4])
@pytest.mark.parametrize("levels", [255, 510])
def test_the_points_that_are_voted_on_lie_in_the_ball(off, levels):
    # PREDICT moves a point to the grid, and might move it out of the ball.
    generator = torch.Generator().manual_seed(0)
    image = (torch.randint(256, (1, 28, 28), generator=generator) + off) / 256
    radii = torch.linspace(0.02, 2, 200)
    change = torch.randn(200, 1, 28, 28, generator=generator)
    points = (image + change * (radii / change.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)).clamp(
        0, 1
    )
    found, inside = on_grid(points, image, radii, levels)
    steps, moved = to_grid(found, levels)
    assert moved == [0.0] * 200
    length = (steps.double() / levels - image.double()).flatten(1).norm(dim=1)
    assert (length <= radii.double())[inside].all()
    assert inside[radii > 0.1].all()
    # Hardly anything is lost of the way, and no pixel moves by more than half a step where the
    # nearest point is in the ball.
    before = (points - image).flatten(1).norm(dim=1)
    assert (length > 0.98 * before)[radii > 0.5].all()
    pixels = (found.double() - points.double()).abs().flatten(1).amax(1) * levels
    nearest = (points.double() * levels).round() / levels
    stays = (nearest - image.double()).flatten(1).norm(dim=1) <= radii
    assert 0 < stays.sum() < 200
    assert pixels[stays].max() < 0.501
    # An image on the grid is never too far from a point on it.
    grey = torch.full((1, 28, 28), 77 / 255)
    points = (grey + 0.01 * change).clamp(0, 1)
    assert on_grid(points, grey, (points - grey).flatten(1).norm(dim=1) * (1 + 1e-6), 255)[1].all()


def test_a_point_is_outside_its_ball_by_whatever_little():
    # Images are float32(k / 255), but the ball is around k / 255; radii have all their digits.
    length = torch.tensor([50 / 255], dtype=torch.float64)
    for grey in range(206):
        image, point = torch.full((2, 1, 28, 28), grey / 255)
        point[0, 3, 4] = (grey + 50) / 255
        for radius, reached in ((length * (1 - 1e-12), False), (length * (1 + 1e-12), True)):
            found, inside = on_grid(point[None], image, radius, 255)
            assert inside.all()
            moved = (to_grid(found)[0] - to_grid(image[None])[0]).abs().sum()
            assert (moved == 50) == reached


def test_a_radius_keeps_all_its_digits_in_a_challenge(certified, monkeypatch):
    seen = []

    def recorded(points, image, radii, levels):
        seen.extend(radii.tolist())
        return on_grid(points, image, radii, levels)

    monkeypatch.setattr("src.robustness.challenge.on_grid", recorded)
    smooth, dataset, rows = certified
    challenge_certificates(smooth, dataset, rows, images=2, restarts=1, n=50, progress=False)
    assert seen
    assert set(seen) <= {row["radius_tight"] for row in rows}


def test_attack_stays_in_ball_and_box_and_reaches_the_boundary(certified):
    smooth, dataset, _ = certified
    images, labels = dataset.tensors
    radii = torch.linspace(0.1, 3.0, 6)
    points = smoothed_attack(smooth, images, labels, radii)
    length = (points - images).flatten(1).norm(dim=1)
    assert (length <= radii * (1 + 1e-5)).all()
    assert points.min() >= 0
    assert points.max() <= 1
    # A linear score falls fastest straight towards the boundary: the optimum is the radius.
    moved = (images - points).flatten(1) @ smooth.base_classifier.weight
    assert torch.allclose(moved[:3], radii[:3], rtol=0.02)


@pytest.mark.parametrize(("images", "largest", "smallest"), [(50, 0.99, 0.01), (1, 0.99, 0.99)])
def test_choice_is_spread_over_the_radii_up_to_the_largest(monkeypatch, images, largest, smallest):
    tried = []

    def attack(smooth, image, label, radius, **options):
        tried.append(float(radius[0]))
        return image

    monkeypatch.setattr("src.robustness.challenge.smoothed_attack", attack)
    rows = [{"index": 0, "prediction": 0, "radius": k / 100} for k in range(1, 100)]
    rows.append({"index": 0, "prediction": -1, "radius": 0})
    smooth = SmoothClassifier(HalfSpace(4.0), 0.5, num_classes=2)
    dataset = TensorDataset(torch.full((1, 1, 28, 28), 0.5), torch.zeros(1, dtype=torch.int64))
    options = {"images": images, "n": 20, "progress": False}
    assert challenge_certificates(smooth, dataset, rows, **options)[1] == images
    assert len(tried) == images
    assert max(tried) == pytest.approx(largest)
    assert min(tried) == pytest.approx(smallest)


def test_allowed_breaks_follow_the_binomial():
    assert broken_allowed(1, 0.001) == 0
    assert broken_allowed(100, 0.001) == 2
    assert broken_allowed(100, 0.5) > 60
