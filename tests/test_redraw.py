"""Rows of certificates drawn again from their model."""

import pytest
import torch

from src.certificates import (
    read_rows,
    read_twin,
    record_certificates,
    verify,
    write_rows,
    write_twin,
)
from src.checkpoints import save_checkpoint
from src.models import ConvNN, SmoothClassifier
from src.redraw import certificate_settings, redraw
from src.training_and_evaluation import evaluate_robustness
from src.utils import load_mnist

SETTINGS = {"n0": 100, "n": 500, "alpha": 0.001, "seed": 3, "two_sided": True}
INDICES = [7, 1234, 9999]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int16", "int8"])
def recorded(request, tmp_path_factory, mnist_root):
    """Rows of an untrained network, whose votes are close, and its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model, test = ConvNN((16, 16)).eval(), load_mnist("test", mnist_root)
    # Several classes must get votes, or every run would give the same counts.
    noisy = test.tensors[0][INDICES].repeat(40, 1, 1, 1) + torch.randn(120, 1, 28, 28)
    model.output.bias.data -= model(noisy).detach().mean(dim=0)
    smooth = SmoothClassifier(model, 1.0, precision=request.param)
    save_checkpoint(folder / "model.pt", model)
    record_certificates(
        folder / "rows.csv",
        INDICES,
        lambda left: evaluate_robustness(smooth, test, **SETTINGS, indices=left, progress=False),
        certificate_settings(smooth, test, **SETTINGS),
        {"command": "test"},
        resume=False,
    )
    return folder


def test_rows_drawn_again_are_the_same(recorded, mnist_root):
    assert verify(recorded / "rows.csv") == []
    assert redraw(recorded / "rows.csv", 99, recorded / "model.pt", mnist_root) == []


@pytest.mark.parametrize("count", ["top_count", "rival_count"])
def test_altered_counts_are_found(recorded, mnist_root, tmp_path, count):
    rows = read_rows(recorded / "rows.csv")
    rows[1][count] = str(int(rows[1][count]) + 1)
    write_rows(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.json").write_bytes((recorded / "rows.json").read_bytes())
    (problem,) = redraw(tmp_path / "rows.csv", 3, recorded / "model.pt", mnist_root)
    assert problem == "image 1234 drawn again gives another row"


def test_another_form_is_named_where_counts_differ(recorded, mnist_root, monkeypatch):
    monkeypatch.setattr("src.redraw.form_name", lambda network, precision: "other")
    assert redraw(recorded / "rows.csv", 3, recorded / "model.pt", mnist_root) == []
    monkeypatch.setattr("src.redraw._COUNTED", ("radius", "absent"))
    monkeypatch.setattr("src.models.certified_radius", lambda p_lower, sigma: 9.0)
    first, *_ = redraw(recorded / "rows.csv", 3, recorded / "model.pt", mnist_root)
    assert first.endswith("here it is 'other'")


def test_rows_of_a_device_that_is_not_here_are_not_drawn_on_another(recorded, mnist_root, tmp_path):
    content = read_twin(recorded / "rows.json")
    content["settings"]["device"] = "tpu"
    write_twin(tmp_path / "rows.json", content)
    (tmp_path / "rows.csv").write_bytes((recorded / "rows.csv").read_bytes())
    with pytest.raises(ValueError, match="'device' = 'tpu' is not available"):
        redraw(tmp_path / "rows.csv", 1, recorded / "model.pt", mnist_root)


def test_another_model_is_named(recorded, mnist_root, tmp_path):
    save_checkpoint(tmp_path / "other.pt", ConvNN((2, 3)))
    (problem,) = redraw(recorded / "rows.csv", 1, tmp_path / "other.pt", mnist_root)
    assert "other.pt is not the model" in problem
