"""Accuracy under attack: the table, and the rows it is made of."""

from functools import partial

import pytest
import torch
from scipy.stats import binom

from src.attacks import gradient_attack, pgd_attack
from src.certification.intervals import accuracy_interval
from src.robustness.fixed_radii import RADII, accuracy_row, attack_hits, table_rows
from src.training_and_evaluation import accuracy


def test_table_agrees_with_accuracy(untrained):
    rows = table_rows(attack_hits(*untrained, steps=3, progress=False))
    assert len(rows) == 1 + 2 * len(RADII)
    assert (rows[0]["attack"], rows[0]["epsilon"]) == ("none", 0.0)
    assert rows[0]["accuracy"] == accuracy(*untrained)
    plan = [(ball, name) for ball in RADII for name in ("single step", "PGD, 3 steps, 2 starts")]
    for row, ((norm, epsilon), name) in zip(rows[1:], plan, strict=True):
        assert (row["norm"], row["epsilon"], row["attack"]) == (norm, epsilon, name)
        attack = {
            "single step": gradient_attack,
            "PGD, 3 steps, 2 starts": partial(pgd_attack, steps=3, restarts=2),
        }[name]
        attacked = accuracy(*untrained, attack=partial(attack, epsilon=epsilon, norm=norm))
        assert row["accuracy"] == attacked == row["correct"] / row["images"]
    by_ball = {(row["norm"], row["epsilon"], row["attack"]): row["correct"] for row in rows}
    for norm, epsilon in RADII:
        # PGD starts from the single step, so it is at least as strong image by image.
        assert (
            by_ball[norm, epsilon, "PGD, 3 steps, 2 starts"]
            <= by_ball[norm, epsilon, "single step"]
        )


@pytest.mark.parametrize("hits", [0, 1, 17, 39, 40])
def test_row_carries_the_clopper_pearson_interval(hits):
    row = accuracy_row("PGD, 1 step, 2 starts", "l2", 1.5, torch.arange(40) < hits)
    assert (row["attack"], row["norm"], row["epsilon"]) == ("PGD, 1 step, 2 starts", "l2", 1.5)
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
