"""The figure by which recipes are chosen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import held_out
from benchmarks.held_out import protocol_radii
from src.utils import spread_indices


def test_shares_of_votes_count_as_if_found_among_the_protocols_copies():
    found = SimpleNamespace(
        top_count=torch.tensor([1000, 800, 1000, 505]), prediction=torch.tensor([3, 4, 5, -1])
    )
    smooth = SimpleNamespace(sigma=0.5, certify=lambda images, **_: found)
    radii = protocol_radii(smooth, None, torch.tensor([3, 4, 6, 1]), n=1000, seed=0)
    # Bounds of 100,000 and of 80,000 votes out of 100,000; then a wrong one and an abstention.
    assert radii.tolist() == pytest.approx([0.5 * 3.811456563, 0.5 * 0.827651563, 0, 0], abs=1e-6)


@pytest.mark.parametrize(("size", "options"), [(50, ["--images", "10"]), (5000, [])])
def test_polled_images_are_spread_over_the_held_out_ones(monkeypatch, size, options):
    # MNIST is in the order of its writers, two sources in turn: the first 800 of 5,000 are of a
    # handful of people, and those at an even distance of one source.
    data = TensorDataset(torch.zeros(size, 1, 1, 1), torch.arange(size))
    polled = []

    def radii(smooth, images, labels, n, seed):
        polled.extend(labels.tolist())
        return np.zeros(len(labels))

    monkeypatch.setattr(held_out, "load_training_data", lambda *args, **_: (data, data, data))
    script = held_out.main_random_smoothing
    monkeypatch.setattr(script, "untrained", lambda *args: SimpleNamespace(sigma=1.0))
    monkeypatch.setattr(script, "train", lambda *args: {"epochs": [{"seconds": 1.0}]})
    monkeypatch.setattr(held_out, "protocol_radii", radii)
    held_out.main([*options, "--device", "cpu"])
    assert polled == spread_indices(size, size // 5)
    # Both sources are among them, in about equal numbers.
    assert sum(number % 2 for number in polled) == pytest.approx(size / 10, rel=0.1)
