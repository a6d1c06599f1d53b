"""Smallest epsilons: on models whose distance to the boundary is known in closed form."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.records.rows import read_rows, write_rows
from src.robustness.fixed_radii import attacks, multi_step_name
from src.robustness.smallest_epsilon import (
    CURVE_EPSILONS,
    GRID,
    LARGEST,
    epsilon_curves,
    epsilon_rows,
    smallest_epsilons,
)
from src.training_and_evaluation import correct
from tests.helpers import MeanPixel, linear, shades

NORMS = ("linf", "l2")


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def grey(count, shade=0.5):
    return TensorDataset(torch.full((count, 1, 28, 28), shade), torch.zeros(count).long())


def half_space(norm):
    """A linear model, images well inside [0, 1], and their exact distances to its boundary."""
    model = linear(seed=3)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().double()
    images = 0.5 + 0.02 * torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    # Spread across the boundary, which is put through their middle.
    across = torch.linspace(-0.9, 0.9, 40)[:, None] * weight / weight.norm()
    images += across.float().reshape(images.shape)
    with torch.no_grad():
        model[1].bias -= model(images).mean(dim=0)
    margins = model(images).detach().double().diff(dim=1)[:, 0]
    # Distance |w.x + b| / |w|_q with the dual norm: q = 1 for linf, q = 2 for l2.
    exact = margins.abs() / torch.linalg.vector_norm(weight, 1 if norm == "linf" else 2)
    return model, TensorDataset(images, (margins > 0).long()), exact.numpy()


@pytest.mark.parametrize("batch_size", [7, 1000])
@pytest.mark.parametrize("norm", NORMS)
def test_half_space_is_broken_at_its_distance(norm, batch_size):
    model, dataset, exact = half_space(norm)
    assert exact.min() < 1 / GRID[norm] < 10 / GRID[norm] < exact.max()
    found = smallest_epsilons(model, dataset, norm, batch_size=batch_size, progress=False)
    assert found.dtype == np.float64
    # Float32 logits at the boundary are known to about 1e-6.
    assert (found >= exact - 1e-5).all()
    assert (found <= exact + 1 / GRID[norm] + 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_misclassified_is_zero_and_out_of_reach_is_infinite(norm):
    images = shades([0.2, -0.2, 0.3]).tensors[0]
    dataset = TensorDataset(images, torch.tensor([0, 0, 1]))
    found = smallest_epsilons(MeanPixel(), dataset, norm, progress=False)
    assert found[0] == 0
    assert 0 < found[1] < np.inf
    constant = Function(lambda x: torch.stack([0 * x.mean((1, 2, 3)) + 1, x.mean((1, 2, 3))], 1))
    assert (smallest_epsilons(constant, grey(3), norm, progress=False) == np.inf).all()


def test_bracket_shrinks_to_the_perturbation_that_was_found():
    # White is misclassified. Clipping stops every larger step there, off the grid.
    def white(images):
        margin = images[:, 0, 0, 0] - 0.999
        return torch.stack([-margin, margin], dim=1)

    found = smallest_epsilons(Function(white), grey(2, 0.868), "linf", progress=False)
    assert found == pytest.approx(0.132, abs=1e-6)


def test_errors_that_long_steps_leap_over_are_found():
    # A narrow band of errors: the attack at the largest radius ends beyond it.
    def leap(images):
        mean = images.flatten(1).mean(dim=1)
        band = (mean > 0.7) & (mean < 0.8)
        return torch.stack([0 * mean, 1e-3 * mean - 1 + 2 * band], dim=1)

    model, attack = Function(leap), attacks(1)[multi_step_name(1)]
    images, labels = grey(3).tensors
    attacked = attack(model, images, labels, LARGEST["linf"], "linf")
    assert (model(attacked).argmax(dim=1) == 0).all()
    found = smallest_epsilons(model, grey(3), "linf", steps=1, progress=False)
    assert ((found > 0.2) & (found < 0.205 + 1e-6)).all()


@pytest.fixture(scope="module")
def rows():
    dataset = shades([0.03, -0.07, 0.12, -0.22, 0.33, -0.45, 0.2])
    dataset.tensors[1][-1] = 0
    return epsilon_rows(MeanPixel(), dataset, [6, 0, 1, 2, 3, 4, 5], steps=5, progress=False)


def test_rows_name_images_and_survive_the_file(rows, tmp_path):
    assert [row["index"] for row in rows] == 2 * [6, 0, 1, 2, 3, 4, 5]
    assert [row["label"] for row in rows] == 2 * [0, 1, 0, 1, 0, 1, 0]
    assert [row["norm"] for row in rows] == 7 * ["linf"] + 7 * ["l2"]
    assert {row["attack"] for row in rows} == {"PGD, 5 steps, 2 starts"}
    assert rows[0]["smallest_epsilon"] == rows[7]["smallest_epsilon"] == 0
    # Out of reach in l2: 0.33 * 28 is more than the largest radius.
    assert rows[-2]["smallest_epsilon"] == np.inf
    write_rows(tmp_path / "rows.csv", rows)
    assert epsilon_curves(read_rows(tmp_path / "rows.csv")) == epsilon_curves(rows)


@pytest.mark.parametrize("norm", NORMS)
def test_curves_fall_where_the_margins_lie(rows, norm):
    unit = 1 if norm == "linf" else 28
    line = [row for row in epsilon_curves(rows) if row["norm"] == norm]
    assert tuple(row["epsilon"] for row in line) == CURVE_EPSILONS[norm]
    for row in line:
        margins = (0.03, 0.07, 0.12, 0.22, 0.33, 0.45)
        assert row["correct"] == sum(margin * unit > row["epsilon"] for margin in margins)
        assert (row["images"], row["attack"]) == (7, "PGD, 5 steps, 2 starts")
    hits = [row["correct"] for row in line]
    assert hits == sorted(hits, reverse=True)


def test_rows_with_names_of_old_and_of_several_attacks_make_a_curve_each():
    old = [
        {"norm": "l2", "attack": "2x PGD-20", "smallest_epsilon": text} for text in ("1.0", "inf")
    ]
    new = [row | {"attack": "worst known", "smallest_epsilon": 0.5} for row in old]
    curve = epsilon_curves(old + new)
    assert [row["attack"] for row in curve] == 11 * ["2x PGD-20"] + 11 * ["worst known"]
    assert [row["correct"] for row in curve] == [2, 2, *9 * [1], 2, *10 * [0]]


def test_an_image_that_broke_at_a_radius_does_not_stand_there():
    # In float32 0.05 is more than 0.05.
    rows = [{"norm": "linf", "attack": "any", "smallest_epsilon": at} for at in (0.05, 0.1, 0.35)]
    curve = {row["epsilon"]: row["correct"] for row in epsilon_curves(rows)}
    assert [curve[at] for at in (0.0, 0.05, 0.1, 0.3, 0.35)] == [3, 2, 1, 1, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_radii_of_the_curves_are_tried_exactly(norm):
    # So that no image counts as standing at a radius at which it was never attacked.
    for epsilon in CURVE_EPSILONS[norm]:
        assert round(epsilon * GRID[norm]) / GRID[norm] == epsilon


@pytest.mark.parametrize("norm", NORMS)
def test_curve_is_at_most_what_each_radius_gives_alone(norm):
    model, dataset, _ = half_space(norm)
    rows = epsilon_rows(model, dataset, range(40), steps=3, progress=False)
    for row in epsilon_curves(rows):
        attack = partial(attacks(3)[multi_step_name(3)], epsilon=row["epsilon"], norm=row["norm"])
        assert row["correct"] <= int(correct(model, dataset, attack=attack).sum())
