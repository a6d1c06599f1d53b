"""The benchmark that referees: resumed rows, refusals and columns, the four attacks replaced."""

import json
from argparse import Namespace

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import autoattack
from src.attacks import gradient_attack, pgd_attack
from src.checkpoints import save_checkpoint
from src.models import ConvNN
from src.records.rows import read_rows


@pytest.fixture
def call(tmp_path, mnist_root, monkeypatch):
    """Run the script on a fresh network with stand-ins for the attacks of the package."""
    torch.manual_seed(0)
    path = save_checkpoint(tmp_path / "x.pt", ConvNN((2, 2), thresholds=(0.4, 0.6)))

    def stand_in(name, network, args):
        attack = gradient_attack if name == "apgd_ce" else pgd_attack
        # Twice too far: what is judged must lie in the ball all the same.
        return lambda images, labels: attack(network, images, labels, 2 * args.epsilon, args.norm)

    monkeypatch.setattr(autoattack, "published", stand_in)

    def main(rows, images, *more):
        fixed = [str(path), "--data", str(mnist_root), "--batch-size", "4", "--epsilon", "0.02"]
        autoattack.main([*fixed, "--rows", str(tmp_path / rows), "--images", str(images), *more])
        return tmp_path / rows

    return main


def test_a_run_that_was_stopped_ends_with_the_same_rows(call, capsys):
    whole = call("a.csv", 8).read_bytes()
    assert "robust" in capsys.readouterr().out
    stopped = call("b.csv", 4)
    with stopped.open("a") as stream:
        stream.write("4,9,1")
    assert call("b.csv", 8).read_bytes() == whole
    assert call("b.csv", 8).read_bytes() == whole


def test_the_twin_says_which_run_made_which_rows(call):
    call("a.csv", 4)
    call("a.csv", 4)
    path = call("a.csv", 8, "--batch-size", "2")
    runs = json.loads(path.with_suffix(".json").read_text())["runs"]
    assert [run["from_row"] for run in runs] == [0, 4]
    assert [run["batch_size"] for run in runs] == [4, 2]
    assert "--images 8" in runs[1]["command"]
    assert all(run["commit"] and run["device"] for run in runs)


def test_no_image_rises_again_and_the_last_column_is_the_answer(call):
    rows = read_rows(call("a.csv", 16))
    names = ["clean", *autoattack.ATTACKS, "robust"]
    assert list(rows[0]) == ["index", "label", *names]
    for row in rows:
        results = [int(row[name]) for name in names]
        assert results == sorted(results, reverse=True)
        assert results[-1] == results[-2]


def test_any_first_part_of_the_images_is_spread_over_the_test_set(call):
    assert sorted(autoattack.ORDER) == list(range(10_000))
    assert autoattack.ORDER[:500] == list(range(0, 10_000, 20))
    assert autoattack.ORDER[500:1000] == list(range(1, 10_000, 20))
    # The test set of these tests is smaller; the rows say which image each is.
    indices = [int(row["index"]) for row in read_rows(call("a.csv", 12))]
    assert len(set(indices)) == 12
    assert [index % 20 for index in indices] == sorted(index % 20 for index in indices)


def test_rows_of_other_settings_are_refused(call):
    call("a.csv", 4)
    for other in (["--seed", "1"], ["--norm", "l2"]):
        with pytest.raises(ValueError, match="other settings"):
            call("a.csv", 8, *other)


@pytest.mark.parametrize("thresholds", [None, (0.4, 0.6)])
def test_what_autoattack_leaves_meets_an_attack_of_ours(thresholds, monkeypatch):
    """Without a ramp nothing followed once."""
    monkeypatch.setattr(autoattack, "published", lambda *_: lambda images, labels: images)
    torch.manual_seed(0)
    model = ConvNN((2, 2), thresholds=thresholds).eval()
    images = torch.rand(4, 1, 28, 28)
    batch = TensorDataset(images, model(images).argmax(dim=1))
    args = Namespace(norm="l2", epsilon=10.0, seed=0, batch_size=4, strongest=False)
    hits = autoattack.attacked(model, batch, args)
    assert hits["square"].all()
    assert not hits["ours"].any()
    assert not hits["robust"].any()
    assert "ours" not in autoattack.attacked(model, batch, args, autoattack.AUTOATTACK)
