"""Rows of certificates drawn again from their model."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.checkpoints import save_checkpoint
from src.engine.noise import sampler_cost
from src.engine.parts import PRECISIONS
from src.models import ConvNN, SmoothClassifier
from src.records.certify import certificate_settings, off_grid
from src.records.recording import record_certificates
from src.records.redrawing import redraw
from src.records.rows import OLDER, read_rows, verify, write_rows
from src.records.twins import read_twin, write_twin
from src.training_and_evaluation import evaluate_robustness
from src.utils import load_mnist

SETTINGS = {"n0": 100, "n": 500, "alpha": 0.001, "seed": 3}
INDICES = [7, 1234, 9999]


@pytest.fixture(scope="module", params=PRECISIONS)
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


@pytest.mark.parametrize("column", ["top_count", "rival_count", "radius_tight", "test"])
def test_an_altered_column_is_found(recorded, mnist_root, tmp_path, column):
    rows = read_rows(recorded / "rows.csv")
    other = {"one-sided": "two-sided", "two-sided": "one-sided"}
    value = rows[1][column]
    rows[1][column] = other.get(value) or f"{float(value) + 1:.{0 if value.isdecimal() else 16}f}"
    write_rows(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.json").write_bytes((recorded / "rows.json").read_bytes())
    (problem,) = redraw(tmp_path / "rows.csv", 3, recorded / "model.pt", mnist_root)
    assert problem == "image 1234 drawn again gives another row"


@pytest.mark.parametrize(("votes", "told"), [(0, False), (2, False), (3, True)])
def test_another_form_may_differ_in_a_few_votes(
    recorded, mnist_root, tmp_path, monkeypatch, votes, told
):
    monkeypatch.setattr("src.records.redrawing.form_name", lambda network, precision: "other")
    content, rows = read_twin(recorded / "rows.json"), read_rows(recorded / "rows.csv")
    # Exact votes may differ in none.
    told |= votes > 0 and content["settings"]["precision"] == "exact"
    rows[1]["top_count"] = str(int(rows[1]["top_count"]) + votes)
    write_rows(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.json").write_bytes((recorded / "rows.json").read_bytes())
    problems = redraw(tmp_path / "rows.csv", 3, recorded / "model.pt", mnist_root)
    assert len(problems) == told
    assert all("image 1234" in p and p.endswith("here it is 'other'") for p in problems)


def test_exact_votes_must_be_equal_in_every_form(recorded, mnist_root, tmp_path, monkeypatch):
    monkeypatch.setattr("src.records.redrawing.form_name", lambda network, precision: "other")
    content, rows = read_twin(recorded / "rows.json"), read_rows(recorded / "rows.csv")
    assert content["settings"]["exact"] is (content["settings"]["precision"] == "exact")
    rows[1]["rival_count"] = str(int(rows[1]["rival_count"]) + 1)
    write_rows(tmp_path / "rows.csv", rows)
    for exact in (False, True):
        content["settings"]["exact"] = exact
        write_twin(tmp_path / "rows.json", content)
        problems = redraw(tmp_path / "rows.csv", 3, recorded / "model.pt", mnist_root)
        assert len(problems) == exact


@pytest.mark.parametrize("older", OLDER)
def test_rows_of_older_releases_are_not_drawn_again(older, tmp_path, mnist_root):
    results = Path(__file__).resolve().parents[2] / "reference"
    name = "smoothing_gaussian_0.25"
    twin = read_twin(results / "results" / f"{name}_certificates.json")
    path = tmp_path / "older.csv"
    path.write_text(",".join(older) + "\n")
    write_twin(path.with_suffix(".json"), twin)
    with pytest.raises(ValueError, match="older release"):
        redraw(path, 1, results / "models" / f"{name}.pt", mnist_root)


def test_the_twin_says_what_the_sampler_costs_and_how_far_the_images_are_off_the_grid(monkeypatch):
    monkeypatch.setattr(
        SmoothClassifier, "sampler_cost", lambda self, pixels, draws: pixels * draws
    )
    images = (torch.arange(2 * 784) % 256 / 255).reshape(2, 1, 28, 28)
    network, labels = ConvNN((2, 3)), torch.zeros(2, dtype=torch.int64)
    smooth = SmoothClassifier(network, 0.5)
    on_grid = certificate_settings(smooth, TensorDataset(images, labels), n0=10, n=100)
    assert on_grid["sampler_cost"] == 784 * 110
    assert (on_grid["exact"], on_grid["precision"], on_grid["levels"]) == (True, "exact", 255)
    assert on_grid["off_grid"] == 0
    floats = SmoothClassifier(network, 0.5, levels=510)
    finer = certificate_settings(floats, TensorDataset(images, labels), n0=10, n=100)
    assert (finer["exact"], finer["precision"], finer["levels"]) == (False, "float32", 510)
    assert finer["off_grid"] == 0
    # Both are less than half a grey level, 0.00196, from the nearest one.
    images[1, 0, 0, :2] = torch.tensor([0.0015, 1 - 0.001])
    settings = certificate_settings(smooth, TensorDataset(images, labels), n0=10, n=100)
    assert settings["off_grid"] == pytest.approx((0.0015**2 + 0.001**2) ** 0.5, rel=1e-4)
    assert off_grid(images[:0], 255) == 0
    grey = torch.full((1, 1, 28, 28), 0.5)
    assert off_grid(grey, 255) == pytest.approx(28 * 0.5 / 255)
    assert off_grid(grey, 510) == 0


def test_other_test_images_are_named(recorded, mnist_root, monkeypatch):
    test = load_mnist("test", mnist_root)
    test.tensors[1][5] += 1
    monkeypatch.setattr("src.records.redrawing.load_mnist", lambda split, root: test)
    (problem,) = redraw(recorded / "rows.csv", 1, recorded / "model.pt", mnist_root)
    assert "not those behind the rows" in problem


def test_rows_in_floats_of_a_device_that_is_not_here_are_not_drawn_on_another(
    recorded, mnist_root, tmp_path
):
    content = read_twin(recorded / "rows.json")
    content["settings"]["device"] = "tpu"
    write_twin(tmp_path / "rows.json", content)
    (tmp_path / "rows.csv").write_bytes((recorded / "rows.csv").read_bytes())
    again = tmp_path / "rows.csv", 1, recorded / "model.pt", mnist_root
    if content["settings"]["exact"]:
        # Whole numbers are the same everywhere.
        assert redraw(*again) == []
        return
    with pytest.raises(ValueError, match="'device' = 'tpu' is not available"):
        redraw(*again)


def test_another_model_is_named(recorded, mnist_root, tmp_path):
    save_checkpoint(tmp_path / "other.pt", ConvNN((2, 3)))
    (problem,) = redraw(recorded / "rows.csv", 1, tmp_path / "other.pt", mnist_root)
    assert "other.pt is not the model" in problem


def test_rows_of_two_networks_are_not_mixed_when_the_twin_names_none(mnist_root, tmp_path):
    # One's own rows, with settings by hand: only a row drawn again tells the networks apart.
    test, path = load_mnist("test", mnist_root), tmp_path / "rows.csv"
    settings = {"n0": 10, "n": 100, "alpha": 0.001, "sigma": 0.5, "seed": 0}
    settings["sampler_cost"] = sampler_cost(0.5, 784, 110)

    def record(seed, stop=None, **options):
        torch.manual_seed(seed)
        smooth = SmoothClassifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 0.5)
        options |= {"labels": test.tensors[1][:20].tolist()}

        def certify(left):
            drawn = {key: settings[key] for key in ("n0", "n", "alpha", "seed")}
            rows = evaluate_robustness(smooth, test, **drawn, indices=left, progress=False)
            return (row for row in rows if row["index"] != stop)

        return record_certificates(path, range(20), certify, settings, {}, **options)

    with pytest.raises(ValueError, match="image 11 where image 10"):
        record(0, stop=10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="drawn again"):
        record(1, resume=True)
    assert path.read_bytes() == before
    assert len(record(0, resume=True)) == 20
    assert verify(path) == []
