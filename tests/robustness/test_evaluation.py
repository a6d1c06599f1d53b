"""Accuracy and certificate rows, on a classifier that is right by construction."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.models import SmoothClassifier
from src.training_and_evaluation import accuracy, correct, evaluate_robustness

COLUMNS = "index,label,prediction,correct,radius,p_lower,top_count,"
COLUMNS += "rival_count,radius_tight,test,n0,n,alpha,sigma,seed"


class Reader(nn.Module):
    """Reads the class off the first pixel: class k of ten at k / 10. Right by construction."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Dropout(0.9).eval()
        self.free = nn.Dropout(0.9)

    def forward(self, images):
        centres = torch.arange(10) / 10
        # In training mode, dropout would blank nine images in ten.
        pixel = self.free(self.frozen(images))[:, 0, 0, 0]
        return -((pixel[:, None] - centres) ** 2)


def readable(labels):
    # On the grid of bytes but for the first pixel, so that hardly anything is lost of a radius.
    images = torch.full((len(labels), 1, 28, 28), 128 / 255)
    images[:, 0, 0, 0] = labels / 10
    return images


@pytest.mark.parametrize("wrong", [0, 3, 20])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_accuracy_is_exact_and_leaves_every_mode(wrong, batch_size):
    labels = torch.arange(20) % 10
    shown = torch.where(torch.arange(20) < wrong, (labels + 1) % 10, labels)
    dataset, model = TensorDataset(readable(shown), labels), Reader()
    assert accuracy(model, dataset, batch_size=batch_size) == (20 - wrong) / 20
    assert correct(model, dataset, batch_size=batch_size).tolist() == [False] * wrong + [True] * (
        20 - wrong
    )
    assert (model.training, model.frozen.training, model.free.training) == (True, False, True)


def test_accuracy_under_attack_hands_over_the_batch_and_measures_the_result():
    labels = torch.arange(20) % 10
    dataset, model, seen = TensorDataset(readable(labels), labels), Reader(), []

    def attack(network, images, targets):
        seen.append((network is model, network.free.training, len(images)))
        assert torch.equal(images, readable(targets))
        # Even classes are left alone, odd ones become their neighbours.
        return readable(targets - targets % 2)

    assert accuracy(model, dataset, attack=attack, batch_size=8) == 0.5
    assert seen == [(True, False, 8), (True, False, 8), (True, False, 4)]
    with pytest.raises(ValueError, match="'dataset'"):
        accuracy(model, TensorDataset(torch.zeros(0, 1, 28, 28), torch.zeros(0).long()))


@pytest.mark.parametrize("indices", [None, [5, 0, 3], range(1, 6, 2)])
def test_rows_agree_with_certify_and_have_the_columns_of_the_contract(indices):
    labels = torch.tensor([0, 1, 2, 3, 4, 9])
    smooth = SmoothClassifier(Reader(), 0.03)
    dataset = TensorDataset(readable(torch.tensor([0, 1.5, 2.4, 3, 4.2, 1])), labels)
    settings = {"n0": 20, "n": 300, "alpha": 0.01, "seed": 4}
    rows = list(evaluate_robustness(smooth, dataset, indices=indices, progress=False, **settings))
    chosen = list(indices or range(6))
    assert all(",".join(row) == COLUMNS for row in rows)
    expected = smooth.certify(dataset.tensors[0][chosen], indices=chosen, **settings)
    for field in ("prediction", "radius", "radius_tight", "p_lower", "top_count", "rival_count"):
        assert [row[field] for row in rows] == getattr(expected, field).tolist()
    sides = {"one-sided": 1, "two-sided": 2}
    assert [sides[row.pop("test")] for row in rows] == expected.test.tolist()
    assert [row["index"] for row in rows] == chosen
    assert [row["label"] for row in rows] == labels[chosen].tolist()
    for row in rows:
        assert row["correct"] == (row["prediction"] == row["label"])
        assert row["sigma"] == 0.03
        assert {key: row[key] for key in settings} == settings
        assert all(type(value) in (int, float) for value in row.values())
    # Right, wrong and abstaining are among them, or the agreement would say little.
    if indices is None:
        assert {row["correct"] for row in rows} == {0, 1}
        assert -1 in {row["prediction"] for row in rows}


@pytest.mark.parametrize("arguments", [{"n": 5}, {"indices": [6]}, {"indices": [0.5]}, {"n0": 0}])
def test_rows_of_impossible_requests_name_the_argument(arguments):
    dataset = TensorDataset(readable(torch.arange(6)), torch.arange(6))
    with pytest.raises(ValueError, match=f"'{next(iter(arguments))}'"):
        next(evaluate_robustness(SmoothClassifier(Reader(), 0.1), dataset, **arguments))
