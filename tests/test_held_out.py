"""The figure by which recipes are chosen."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.held_out import protocol_radii


def test_shares_of_votes_count_as_if_found_among_the_protocols_copies():
    found = SimpleNamespace(
        top_count=torch.tensor([1000, 800, 1000, 505]), prediction=torch.tensor([3, 4, 5, -1])
    )
    smooth = SimpleNamespace(sigma=0.5, certify=lambda images, **_: found)
    radii = protocol_radii(smooth, None, torch.tensor([3, 4, 6, 1]), n=1000, seed=0)
    # Bounds of 100,000 and of 80,000 votes out of 100,000; then a wrong one and an abstention.
    assert radii.tolist() == pytest.approx([0.5 * 3.811456563, 0.5 * 0.827651563, 0, 0], abs=1e-6)
