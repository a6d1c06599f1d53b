"""Accuracy under attack: tables and curves on models whose robustness is known."""

from functools import partial

import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.intervals import accuracy_interval
from src.models import ConvNN
from src.robustness import CURVES, RADII, accuracy_row, attack_table, epsilon_curves
from src.training_and_evaluation import accuracy

PIXELS = 28 * 28


class MeanPixel(nn.Module):
    """Class 1 where the mean pixel is above 1/2: each image's distance is known."""

    def forward(self, images):
        margin = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-margin, margin], dim=1)


def shades(margins):
    """Grey images at 0.5 + margin, whose l-infinity distance to the boundary is |margin|."""
    margins = torch.tensor(margins)
    images = (0.5 + margins)[:, None, None, None].expand(-1, 1, 28, 28).contiguous()
    return TensorDataset(images, (margins > 0).long())


@pytest.fixture(scope="module")
def untrained():
    """A network that misleads single steps, and labels of which it gets most right."""
    torch.manual_seed(0)
    model = ConvNN((2, 3)).eval()
    images = torch.rand(40, 1, 28, 28)
    model.output.bias.data -= model(images).mean(dim=0)
    labels = model(images).argmax(dim=1).detach()
    labels[:5] = (labels[:5] + 1) % 10
    return model, TensorDataset(images, labels)


@pytest.fixture(scope="module")
def curves(untrained):
    return epsilon_curves(*untrained, steps=3, progress=False)


def test_pgd_curves_never_rise_and_start_at_clean_accuracy(untrained, curves):
    clean = accuracy(*untrained)
    assert clean == 35 / 40
    assert set(curves) == {"single step", "2x PGD-3"}
    for name, rows in curves.items():
        for norm, epsilons in CURVES.items():
            line = [row for row in rows if row["norm"] == norm]
            assert [row["epsilon"] for row in line] == list(epsilons)
            assert all(row["attack"] == name and row["images"] == 40 for row in line)
            hits = [row["correct"] for row in line]
            assert hits[0] == 35
            if name == "2x PGD-3":
                assert hits == sorted(hits, reverse=True)
                # It bites, or "never rises" would hold of a flat line as well.
                assert hits[-1] < 35


def test_an_image_once_broken_by_pgd_stays_broken():
    # A narrow band of errors, which larger steps leap over: alone, each radius would forgive.
    def leap(images):
        mean = images.flatten(1).mean(dim=1)
        band = (mean > 0.58) & (mean < 0.67)
        return torch.stack([0 * mean, 1e-3 * mean - 1 + 2 * band], dim=1)

    model = nn.Module()
    model.forward = leap
    dataset = TensorDataset(torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.int64))
    hits = {
        name: [row["correct"] for row in rows if row["norm"] == "linf"]
        for name, rows in epsilon_curves(model, dataset, steps=1, progress=False).items()
    }
    assert hits["single step"] == [3, 3, 0, 0, 3, 3, 3, 3, 3, 3]
    assert hits["2x PGD-1"] == [3, 3] + [0] * 8


def test_pgd_curve_is_at_most_what_each_radius_gives_alone(untrained, curves):
    for row in curves["2x PGD-3"]:
        attack = partial(pgd_attack, epsilon=row["epsilon"], norm=row["norm"], steps=3)
        assert row["accuracy"] <= accuracy(*untrained, attack=attack)


def test_single_step_curve_is_left_as_it_comes(untrained, curves):
    for row in curves["single step"]:
        attack = partial(gradient_attack, epsilon=row["epsilon"], norm=row["norm"])
        assert row["accuracy"] == accuracy(*untrained, attack=attack)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_curves_of_a_half_space_fall_where_its_margins_lie(norm):
    # The closed form: an image falls at |margin| in linf, at |margin| * sqrt(784) in l2.
    unit = 1 if norm == "linf" else PIXELS**0.5
    margins = [0.03, -0.07, 0.12, -0.22, 0.33, -0.45]
    for rows in epsilon_curves(MeanPixel(), shades(margins), steps=5, progress=False).values():
        for row in rows:
            if row["norm"] == norm:
                alive = sum(abs(margin) * unit > row["epsilon"] for margin in margins)
                assert row["correct"] == alive, row


def test_nothing_is_left_to_attack_once_all_are_broken():
    dataset = TensorDataset(shades([0.2, -0.2]).tensors[0], torch.tensor([0, 1]))
    for rows in epsilon_curves(MeanPixel(), dataset, steps=1, progress=False).values():
        assert [row["correct"] for row in rows] == [0] * sum(map(len, CURVES.values()))


def test_table_agrees_with_accuracy(untrained):
    rows = attack_table(*untrained, steps=3, progress=False)
    assert len(rows) == 1 + 2 * len(RADII)
    assert (rows[0]["attack"], rows[0]["epsilon"]) == ("none", 0.0)
    assert rows[0]["accuracy"] == accuracy(*untrained)
    plan = [(ball, name) for ball in RADII for name in ("single step", "2x PGD-3")]
    for row, ((norm, epsilon), name) in zip(rows[1:], plan, strict=True):
        assert (row["norm"], row["epsilon"], row["attack"]) == (norm, epsilon, name)
        attack = {
            "single step": gradient_attack,
            "2x PGD-3": partial(pgd_attack, steps=3, restarts=2),
        }[name]
        attacked = accuracy(*untrained, attack=partial(attack, epsilon=epsilon, norm=norm))
        assert row["accuracy"] == attacked == row["correct"] / row["images"]
    by_ball = {(row["norm"], row["epsilon"], row["attack"]): row["correct"] for row in rows}
    for norm, epsilon in RADII:
        # PGD starts from the single step, so it is at least as strong image by image.
        assert by_ball[norm, epsilon, "2x PGD-3"] <= by_ball[norm, epsilon, "single step"]


@pytest.mark.parametrize("hits", [0, 1, 17, 39, 40])
def test_row_carries_the_clopper_pearson_interval(hits):
    row = accuracy_row("2x PGD-1", "l2", 1.5, torch.arange(40) < hits)
    assert (row["attack"], row["norm"], row["epsilon"]) == ("2x PGD-1", "l2", 1.5)
    assert (row["images"], row["correct"], row["accuracy"]) == (40, hits, hits / 40)
    assert (row["low"], row["high"]) == accuracy_interval(hits, 40)
    assert (
        row["low"] == 0 if hits == 0 else binom.sf(hits - 1, 40, row["low"]) == pytest.approx(0.025)
    )
    assert (
        row["high"] == 1 if hits == 40 else binom.cdf(hits, 40, row["high"]) == pytest.approx(0.025)
    )
    # Plain numbers: the rows go to CSV and JSON.
    assert all(type(value) in (str, int, float) for value in row.values())
