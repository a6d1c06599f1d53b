"""The losses of training under noise, against their formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.methods.smoothing import METHODS, _ascend, smoothing_loss, smoothing_loss_schedule
from src.models import ConvNN, SmoothClassifier
from src.training_and_evaluation import standard_loss

SIGMA = 0.5


@pytest.fixture
def smooth():
    torch.manual_seed(0)
    return SmoothClassifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), SIGMA, 3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 1, 28, 28, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def noise_of(draws, seed=7):
    """The noise that a loss draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return SIGMA * torch.randn(draws, 5, 1, 28, 28)


def at(smooth, images, noise):
    """Log-probabilities at every draw, one draw at a time."""
    return torch.stack([F.log_softmax(smooth.base_classifier(images + eta), 1) for eta in noise])


def test_gaussian_training_is_the_standard_loss_under_noise(smooth, batch):
    torch.manual_seed(7)
    expected, expected_logits = standard_loss(smooth, *batch)
    torch.manual_seed(7)
    loss, logits = smoothing_loss_schedule("gaussian")(0.5)(smooth, *batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, expected_logits)


def test_consistency_is_its_formula(smooth, batch):
    images, labels = batch
    log_p = at(smooth, images, noise_of(3))
    mean = log_p.exp().mean(0)
    cross_entropy = torch.stack([F.nll_loss(p, labels) for p in log_p]).mean()
    divergence = torch.stack([(mean * (mean.log() - p)).sum(1).mean() for p in log_p]).mean()
    entropy = -(mean * mean.log()).sum(1).mean()
    torch.manual_seed(7)
    loss, _ = smoothing_loss(smooth, *batch, draws=3, consistency=5.0, entropy=0.5)
    assert divergence > 0.01
    torch.testing.assert_close(loss, cross_entropy + 5 * divergence + 0.5 * entropy)


def test_confidence_weights_each_image_by_a_power_of_its_mean_probability(smooth, batch):
    images, labels = batch
    own = at(smooth, images, noise_of(3))[:, range(5), labels]
    weights = own.exp().mean(0) ** 0.7
    torch.manual_seed(7)
    loss, _ = smoothing_loss(smooth, *batch, draws=3, confidence=0.7)
    assert weights.max() > 1.3 * weights.min()
    torch.testing.assert_close(loss, (weights * -own.mean(0)).mean())


def test_confidence_with_one_draw_descends_the_generalised_cross_entropy(smooth, batch):
    images, labels = batch
    own = at(smooth, images, noise_of(1))[0, range(5), labels]
    generalised = ((1 - own.exp() ** 0.7) / 0.7).mean()
    torch.manual_seed(7)
    loss, _ = smoothing_loss(smooth, *batch, confidence=0.7)
    weights = list(smooth.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, weights), torch.autograd.grad(generalised, weights)
    )


def test_confidence_weights_the_further_terms_too(smooth, batch):
    images, labels = batch
    losses = []
    for one in range(5):
        torch.manual_seed(7)
        noise = torch.randn(2, 5, 1, 28, 28)[:, one : one + 1]
        log_p = F.log_softmax(
            torch.cat([smooth.base_classifier(images[one] + SIGMA * n) for n in noise]), 1
        )
        mean, own = log_p.exp().mean(0), log_p[:, labels[one]]
        divergence = torch.stack([(mean * (mean.log() - p)).sum() for p in log_p]).mean()
        entropy = -(mean * mean.log()).sum()
        whole = -own.mean() + 5 * divergence + 0.5 * entropy
        losses.append(whole * own.exp().mean() ** 0.7)
    torch.manual_seed(7)
    terms = {"consistency": 5.0, "entropy": 0.5, "confidence": 0.7}
    loss, _ = smoothing_loss(smooth, *batch, draws=2, **terms)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("seen", [1, 2, None])
def test_smoothadv_steps_up_the_loss_of_the_mean_prediction(smooth, batch, seen):
    images, labels = batch
    noise = noise_of(2)

    def mean_loss(points):
        mean = at(smooth, points, noise[:seen]).exp().mean(0)
        return -mean.gather(1, labels[:, None]).log().sum()

    points = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(points), points)
    length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    moved = (images + 0.8 * gradient / length).clamp(0, 1)
    expected = torch.stack([F.nll_loss(p, labels) for p in at(smooth, moved, noise)]).mean()
    torch.manual_seed(7)
    loss, _ = smoothing_loss(smooth, *batch, draws=2, attack_draws=seen, epsilon=0.8)
    torch.testing.assert_close(loss, expected)
    torch.manual_seed(7)
    assert loss > smoothing_loss(smooth, *batch, draws=2)[0]
    assert mean_loss(moved) > mean_loss(images)


@pytest.mark.parametrize("margin", [0.0, 20.0, 55.0, 60.0])
def test_smoothadv_steps_are_of_their_length_however_sure_the_network_is(margin):
    # The gradient shrinks like exp(-margin); from 50 on the squares of its entries underflow.
    base = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        base[1].weight.copy_(torch.randn(2, 784) / 784)
        base[1].bias.copy_(torch.tensor([margin, 0.0]))
    images, labels = torch.full((3, 1, 28, 28), 0.5), torch.zeros(3, dtype=torch.int64)
    moved = _ascend(base, images, labels, torch.zeros(2, 3, 1, 28, 28), 0.7)
    lengths = (moved - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((3,), 0.7), rtol=1e-5, atol=0)


def test_methods_start_as_gaussian_training_and_grow(smooth, batch):
    for method, terms in METHODS.items():
        values = []
        for progress in (0.0, 0.15, 0.3, 0.9):
            torch.manual_seed(7)
            values.append(smoothing_loss_schedule(method)(progress)(smooth, *batch)[0].item())
        torch.manual_seed(7)
        plain = smoothing_loss(smooth, *batch, draws=terms["draws"])[0].item()
        torch.manual_seed(7)
        full = smoothing_loss(smooth, *batch, **terms)[0].item()
        assert values[0] == plain
        assert values[2] == values[3] == full
        if "confidence" not in terms:  # its weights are below one
            assert (values[0] < values[1] < values[2]) == (method != "gaussian")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("progress", [0.0, 0.15, 0.9])
def test_progress_may_be_a_tensor(batch, method, progress):
    torch.manual_seed(0)
    # In training mode the first loss would move the statistics that the second one meets.
    network = ConvNN(channels=(2, 3), hidden=4).eval()
    found = []
    for given in (progress, torch.tensor(progress)):
        torch.manual_seed(7)
        loss, _ = smoothing_loss_schedule(method)(given)(SmoothClassifier(network, 0.5), *batch)
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'macer'; use one of 'gaussian'"):
        smoothing_loss_schedule("macer")


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        ("smoothadv", "epsilon"),
        ("smoothadv", "attack_draws"),
        ("smoothadv-consistency", "consistency"),
        ("confidence", "confidence"),
    ],
)
def test_a_weight_of_a_method_may_be_another(smooth, batch, method, weight):
    other = {weight: 1 if weight == "attack_draws" else 0.4}
    losses = []
    for loss in (
        smoothing_loss_schedule(method, **other)(0.9),
        partial(smoothing_loss, **METHODS[method] | other),
        partial(smoothing_loss, **METHODS[method]),
    ):
        torch.manual_seed(7)
        losses.append(loss(smooth, *batch)[0])
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match=f"'gaussian' has no '{weight}'"):
        smoothing_loss_schedule("gaussian", **other)


@pytest.mark.parametrize("seen", [0, 3])
def test_the_smoothadv_step_sees_draws_that_there_are(seen):
    with pytest.raises(
        ValueError, match=f"'attack_draws' is {seen}; use one from 1 to the 2 draws"
    ):
        smoothing_loss_schedule("smoothadv", attack_draws=seen)
