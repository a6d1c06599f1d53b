"""Committed certificates, drawn again bit for bit."""

import json
from pathlib import Path

import pytest

from src import ensemble
from src.records import redraw

ROOT = Path(__file__).resolve().parents[2] / "reference"
EXACT = ("smoothing_gaussian_0.25", "smoothing_gaussian_1.00", "smoothing_best_0.50")


@pytest.mark.parametrize("name", EXACT)
def test_committed_rows_can_be_drawn_again_on_any_machine(name, mnist_root):
    path = ROOT / "results" / f"{name}_certificates.csv"
    assert json.loads(path.with_suffix(".json").read_text())["settings"]["exact"] is True
    # Rows chosen by chance; every vote must be the same.
    assert redraw(path, 2, str(ROOT / "models" / f"{name}.pt"), str(mnist_root)) == []


def test_rows_of_an_ensemble_can_be_drawn_again_from_the_checkpoints_of_its_members(
    tmp_path, mnist_root
):
    path = ROOT / "results" / "ensemble_0.25" / "certificates_ensemble.csv"
    best = ROOT / "models" / "smoothing_best_0.25.pt"
    members = [best, *(best.with_stem(f"{best.stem}_seed{seed}") for seed in (1, 2))]
    ensemble.main([*map(str, members), "--out", str(tmp_path / "ensemble.pt")])
    assert redraw(path, 2, str(tmp_path / "ensemble.pt"), str(mnist_root)) == []
