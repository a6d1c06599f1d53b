"""The benchmark that writes the worst of all our attacks as rows."""

import json

import pytest
import torch

from benchmarks import worst_case
from src.checkpoints import save_checkpoint, weights_digest
from src.models import ConvNN
from src.records.rows import read_rows
from src.robustness.strongest import hits_by_stage
from src.utils import load_mnist, subset


def test_rows_are_what_stands_after_each_stage(tmp_path, mnist_root, capsys):
    torch.manual_seed(0)
    model = ConvNN((2, 2)).eval()
    path = save_checkpoint(tmp_path / "x.pt", model)
    where = ["--data", str(mnist_root), "--rows", str(tmp_path / "rows.csv")]
    worst_case.main([str(path), "--every", "200", "--epsilon", "0.1", *where])
    rows = read_rows(tmp_path / "rows.csv")
    test = load_mnist("test", mnist_root)
    some = subset(test, range(0, 10_000, 200))
    expected = hits_by_stage(model, some, 0.1, progress=False)
    assert list(rows[0]) == ["index", "label", *expected]
    assert [int(row["index"]) for row in rows] == list(range(0, 10_000, 200))
    for stage, hits in expected.items():
        assert [int(row[stage]) for row in rows] == hits.int().tolist()
    twin = json.loads((tmp_path / "rows.json").read_text())
    assert twin["model_digest"] == weights_digest(model.state_dict())
    assert (twin["norm"], twin["epsilon"]) == ("linf", 0.1)
    assert worst_case.standing(rows) in capsys.readouterr().out


def test_standing_is_a_share_with_its_interval():
    rows = [{"index": k, "label": 0, "clean": 1, "square": int(k < 458)} for k in range(500)]
    # Clopper-Pearson at 95 %, as a table of it gives.
    assert worst_case.standing(rows) == "91.6 [88.8, 93.9]"
    assert worst_case.standing(rows, "clean") == "100.0 [99.3, 100.0]"


def test_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        worst_case.main([str(tmp_path / "nowhere.pt"), "--rows", str(tmp_path / "rows.csv")])
