"""The optimiser Muon."""

import math

import pytest
import torch
from torch import nn

from src.models import ConvNN
from src.optimisation.muon import Muon, orthogonal
from src.optimisation.updates import updater
from src.training_and_evaluation import train_model
from tests.helpers import bits, halves


def normals(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# bfloat16 rounds by up to 2^-9, in each of the iterations.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(32, 400), (40, 64), (200, 30), (1, 7)])
def test_orthogonal_brings_singular_values_near_one_and_turns_nothing(shape, dtype, rounding):
    matrix = normals(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (s > matrix.norm() / 300).all()
    found = orthogonal(matrix, dtype=dtype)
    assert found.dtype == torch.float32
    inner = u.T @ found @ vh.T
    values = inner.diagonal()
    torch.testing.assert_close(inner, values.diag(), atol=rounding, rtol=0)
    assert (values > 0.68 - rounding).all()
    assert (values < 1.21 + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decades", [2, 4, 6, math.inf])
@pytest.mark.parametrize("shape", [(64, 800), (256, 300)])
def test_orthogonal_blows_up_no_small_singular_value(shape, decades, dtype):
    # As gradients have: from one down to 10^-decades. In bfloat16 it gave values of 300 once.
    rows, columns = (torch.linalg.qr(normals(side, shape[0])).Q for side in shape)
    sizes = torch.logspace(0, -decades, shape[0]) if decades < math.inf else torch.eye(shape[0])[0]
    values = torch.linalg.svdvals(orthogonal(rows * sizes @ columns.T, dtype=dtype))
    assert values.max() < 1.26
    assert values.max() > 0.6


def test_orthogonal_is_the_published_iteration():
    # Jordan et al. iterate X <- a X + b (X X^T) X + c (X X^T)^2 X.
    matrix = normals(8, 20, dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    torch.testing.assert_close(orthogonal(matrix), x)
    torch.testing.assert_close(orthogonal(matrix.T), x.T)
    torch.testing.assert_close(orthogonal(1e-20 * matrix), x)


def test_a_gradient_of_zero_moves_nothing_but_the_decay():
    weight = torch.nn.Parameter(normals(3, 2, 5, 5))
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), 0.95 * before)


def test_an_update_has_the_length_of_one_of_adamw():
    # Root mean square of AdamW's first update: the learning rate. Of Muon's 0.2 sqrt(max) times
    # that of an orthogonal matrix of full rank, 1 / sqrt(max), and the singular values.
    weight = torch.nn.Parameter(torch.zeros(32, 16, 5, 5))
    weight.grad = normals(32, 16, 5, 5)
    Muon([weight], lr=0.01).step()
    length = weight.detach().square().mean().sqrt().item()
    assert 0.2 * 0.01 * 0.68 < length < 0.2 * 0.01 * 1.21


def test_momentum_is_that_of_nesterov():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([weight], lr=1.0, momentum=0.5, weight_decay=0.0)
    first, second = normals(2, 4, 6)
    expected, mean = torch.zeros(4, 6), torch.zeros(4, 6)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        mean = (mean + gradient) / 2
        expected -= 0.2 * 6**0.5 * orthogonal((mean + gradient) / 2)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_takes_what_lies_between_the_first_and_the_last_layer(precision):
    network = ConvNN(channels=(2, 3), hidden=4)
    start = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    slope = {name: normals(*weight.shape) for name, weight in start.items()}

    def loss(model, images, labels):
        return sum(
            (slope[name] * weight).sum() for name, weight in model.named_parameters()
        ), images

    zeros = torch.zeros(4, 10)
    settings = {"learning_rate": 0.01, "weight_decay": 0.0, "precision": precision}
    update = updater(network, lambda progress: loss, 10, optimizer="muon", **settings)
    update(zeros, zeros[:, 0].long(), 0.0)
    # The cycle begins at a 25th of the learning rate.
    for name, weight in network.named_parameters():
        change = (start[name] - weight.detach()) / (0.01 / 25)
        expected = slope[name].sign()
        if name in ("conv2.weight", "hidden.weight"):
            matrix = slope[name].flatten(1)
            update = orthogonal(matrix, dtype=getattr(torch, precision))
            expected = 0.2 * max(matrix.shape) ** 0.5 * update.view(change.shape)
        torch.testing.assert_close(change, expected, rtol=0.01, atol=0.01)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="'optimizer' is 'sgd'; use one of adamw, muon"):
        train_model(ConvNN(), halves(8), epochs=1, optimizer="sgd")


def test_a_network_without_weights_for_muon_is_refused_untouched():
    # Two matrices are the first and the last one, which stay with AdamW.
    layers = [nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2)]
    model = nn.Sequential(*layers)
    before = bits(model.state_dict())
    with pytest.raises(ValueError, match="'optimizer' = 'muon'"):
        train_model(model, halves(8), epochs=1, optimizer="muon", progress=False)
    assert bits(model.state_dict()) == before
    train_model(
        nn.Sequential(*layers[:3], nn.Linear(4, 4), layers[3]),
        halves(8),
        epochs=1,
        optimizer="muon",
        progress=False,
    )
