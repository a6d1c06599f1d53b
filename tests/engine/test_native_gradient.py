"""Gradients by the images in C: those of the network, whatever the vectors, and doing without."""

import pytest
import torch
import torch.nn.functional as F

from src.engine.folded import FoldedConvNN
from src.engine.forms import attacked_form
from src.engine.native import float_library
from src.engine.native_gradient import AttackedConvNN
from src.engine.parts import apply_thresholds
from src.engine.untouched import evaluation_form
from src.models import ConvNN
from tests.engine import test_native
from tests.engine.test_native import images_of, trained

pytestmark = test_native.pytestmark

SHAPES = [
    {"channels": (8, 24)},
    {"channels": (16, 32), "thresholds": (0.4, 0.6)},
    {"channels": (32, 16), "hidden": 20},
]
CASES = [
    (lanes, options)
    for lanes in (8, 16)
    for options in SHAPES
    if not any(width % lanes for width in options["channels"])
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """(a network in float64, as a function, and its form in C)."""
    lanes, options = request.param
    network = trained(**options)
    form = AttackedConvNN(network.inference_form(), float_library(f"-DLANES={lanes}"))
    return exact(network.double()), form


def exact(network):
    """The network as ConvNN.forward has it, the output in float64 as well."""

    def logits(images):
        features = F.relu(
            network.norm1(network.conv1(apply_thresholds(images, network.thresholds)))
        )
        features = F.relu(network.norm2(network.conv2(features))).flatten(1)
        features = features if network.hidden is None else F.relu(network.hidden(features))
        return network.output(features)

    return logits


def gradient(network, images):
    """By the images, of a sum in which every logit counts differently."""
    points = images.clone().requires_grad_()
    logits = network(points)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad((weights * logits.sin()).sum(), points)[0]


@pytest.mark.parametrize("count", [1, 5, 6, 8, 17])
def test_gradients_are_those_of_the_network(case, count):
    network, form = case
    images = images_of(count)
    expected = gradient(network, images.double())
    assert expected.flatten(1).norm(dim=1).min() > 0
    # A feature next to zero may be cut off in one of the two; not with this seed.
    largest = expected.abs().max().item()
    found = gradient(form, images)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * largest)
    with torch.no_grad():
        expected = network(images.double())
        torch.testing.assert_close(form(images).double(), expected, rtol=0, atol=1e-4)


def test_gradients_depend_neither_on_the_batch_nor_on_the_threads(case):
    # Of the convolutions: the fully connected layers are torch's.
    form, images = case[1], images_of(20)
    slope = torch.randn(20, 49 * form.widths[1], generator=torch.Generator().manual_seed(3))

    def back(images, slope):
        points = images.clone().requires_grad_()
        return torch.autograd.grad(form.features(points), points, slope)[0]

    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(back(images, slope))
    finally:
        torch.set_num_threads(threads)
    assert results[0].abs().max() > 0
    assert all(torch.equal(each, results[0]) for each in results)
    for part in (slice(0, 1), slice(3, 4), slice(7, 20)):
        assert torch.equal(back(images[part], slope[part]), results[0][part])
    assert torch.equal(
        back(images, slope[:, :1].expand_as(slope)), back(images, slope[:, :1] + 0 * slope)
    )
    assert back(images[:0], slope[:0]).shape == (0, 1, 28, 28)


def test_a_nan_spoils_the_gradient_of_its_image_alone(case):
    images = images_of(8)
    clean = gradient(case[1], images)
    images[3, 0, 14, 14] = float("nan")
    found = gradient(case[1], images)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert found[3].isnan().any()
    assert torch.equal(found[others], clean[others])


def test_only_first_derivatives(case):
    points = images_of(2).requires_grad_()
    (slope,) = torch.autograd.grad(case[1](points).sin().sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_it_is_taken_where_it_can_be(monkeypatch):
    with evaluation_form(trained()) as network:
        assert isinstance(network, AttackedConvNN)
    assert isinstance(attacked_form(ConvNN((16, 20)), "float32"), FoldedConvNN)
    rounded = attacked_form(ConvNN(), "bfloat16")
    assert isinstance(rounded, FoldedConvNN)
    assert rounded.dtype == torch.bfloat16
    # Whole numbers have no gradient.
    with pytest.raises(ValueError, match="'precision'"):
        attacked_form(ConvNN(), "exact")
    monkeypatch.setattr("src.engine.forms.float_library", lambda: None)
    assert isinstance(attacked_form(ConvNN(), "float32"), FoldedConvNN)


def test_weights_get_no_gradient():
    network, points = trained(), images_of(2).requires_grad_()
    with evaluation_form(network) as form:
        F.cross_entropy(form(points), torch.tensor([0, 1])).backward()
    assert points.grad.abs().max() > 0
    assert all(weight.grad is None for weight in network.parameters())
