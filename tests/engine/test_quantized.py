"""ConvNN in integers: near the network, never out of 32 bits, nothing lost in silence."""

import pytest
import torch
from src.engine.quantized import INTEGERS, PIXEL_LIMIT, QuantizedConvNN, summed_in_16_bits

from src.models import ConvNN, SmoothClassifier
from tests.engine.test_native import images_of, trained

SHAPES = [
    {},
    {"channels": (3, 5), "hidden": 6},
    {"channels": (64, 128), "hidden": 32},
    {"channels": (4, 8), "thresholds": (0.4, 0.6)},
]


@pytest.fixture(params=SHAPES, ids=str)
def network(request):
    return trained(**request.param)


def test_it_is_as_near_to_the_network_as_bfloat16(network):
    images = images_of(50)
    with torch.no_grad():
        exact = network(images)
        errors = {
            name: (network.inference_form(name)(images) - exact).square().mean().sqrt().item()
            for name in ("int16", "bfloat16")
        }
    assert 0 < errors["int16"] < 1.3 * errors["bfloat16"]
    assert errors["int16"] < 0.01 * exact.std().item()


def test_bytes_are_as_near_as_seven_bits_allow(network):
    images = images_of(50)
    with torch.no_grad():
        exact = network(images)
        error = (network.inference_form("int8")(images) - exact).square().mean().sqrt()
    assert 0 < error < 0.06 * exact.std()


@pytest.mark.parametrize("precision", INTEGERS)
def test_no_sum_can_leave_32_bits_and_none_wastes_them(network, precision):
    form = network.inference_form(precision)
    for number in range(1, form.layers + 1):
        kernel = form.layer(number)[0].long()
        limit = PIXEL_LIMIT if number == 1 else INTEGERS[precision].limit
        largest = limit * kernel.flatten(1).abs().sum(1)
        assert largest.max() < 2**31
        # Either a sum or a weight is nearly as large as it may be.
        near = largest > 0.95 * 2**31
        near |= (
            kernel.flatten(1).abs().amax(1) > 0.99 * torch.iinfo(form.layer(number)[0].dtype).max
        )
        if number > 1 and precision == "int8":
            in16 = limit * summed_in_16_bits(kernel).abs().sum(-1).flatten(1).amax(1)
            assert in16.max() < 2**15
            near |= in16 > 0.95 * 2**15
        assert near.all()


def test_what_is_added_up_in_16_bits():
    # Of every word of four weights the first two in one sum, the others in another, of four words
    # each; a row is filled up to 16.
    rows = torch.arange(40).view(1, 40)
    (first, second), _, (last, empty) = summed_in_16_bits(rows)[0].tolist()
    assert first == [0, 1, 4, 5, 8, 9, 12, 13]
    assert second == [2, 3, 6, 7, 10, 11, 14, 15]
    assert last == [32, 33, 36, 37, 0, 0, 0, 0]
    assert empty == [34, 35, 38, 39, 0, 0, 0, 0]
    kernel = torch.arange(2 * 5 * 5).view(1, 2, 5, 5)
    # Inputs last: weights (channel, row, column) 0 0 0, 1 0 0, then 0 0 2, 1 0 2.
    assert summed_in_16_bits(kernel)[0, 0, 0, 0].tolist()[:4] == [0, 25, 2, 27]


@pytest.mark.parametrize("precision", INTEGERS)
def test_pixels_beyond_sixteen_are_cut(network, precision):
    # With thresholds nothing is beyond: they cut first.
    images = images_of(4)
    images[:, 0, 5:9, 5:9] = 15.9999
    further = images.clone()
    further[:, 0, 5:9, 5:9] = 1e6
    form = network.inference_form(precision)
    assert torch.equal(form.features(images), form.features(further))


@pytest.mark.parametrize("precision", INTEGERS)
def test_an_image_with_a_nan_has_no_logits_and_no_vote(network, precision):
    images = images_of(3)
    images[1, 0, 2, 2] = float("nan")
    logits = network.inference_form(precision)(images)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_an_integer_are_refused(value, precision):
    network = trained()
    network.conv2.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        QuantizedConvNN(network, precision)


@pytest.mark.parametrize(("precision", "tolerance"), [("int16", 0.01), ("int8", 0.05)])
@pytest.mark.parametrize("factor", [0, 1e-42, 1e-38, 1e-31, 1e-20])
def test_channels_with_hardly_any_weights_have_their_biases(factor, precision, tolerance):
    network = trained(channels=(4, 4), hidden=4)
    network.norm1.bias.data[1] = 0.7
    network.conv1.weight.data[1] *= factor
    network.conv2.weight.data[2] *= factor
    network.hidden.weight.data[3] *= factor
    images = images_of(5)
    with torch.no_grad():
        found, expected = network.inference_form(precision)(images), network(images)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_certificate_in_integers_is_about_the_same_probability():
    smooth = {
        name: SmoothClassifier(trained(hidden=16), 1.0, precision=name)
        for name in ("float32", "int16", "int8")
    }
    images = images_of(2).clamp(0, 1)
    counts = [s.certify(images, 100, 4000, 0.05).top_count for s in smooth.values()]
    # The same noise: rounding moves one vote in some hundred, with 8 bits in some thirty.
    assert (counts[0] - counts[1]).abs().max() < 40
    assert (counts[0] - counts[2]).abs().max() < 120


def test_it_follows_the_mode_of_nobody():
    network = ConvNN((2, 2)).train()
    form = network.inference_form("int16").eval()
    assert network.training
    assert not {*network.modules()} & {*form.modules()}
