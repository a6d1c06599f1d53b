"""ConvNN in whole numbers: near the network, the same bits everywhere, no sum out of its range."""

import functools
import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.engine import exact_native, untouched
from src.engine.exact import (
    FEATURE_MOST,
    GROUP_LIMIT,
    LAST_MOST,
    LIMIT,
    PIXEL_MOST,
    SUM_LIMIT,
    ExactConvNN,
    _groups,
    _pixels,
)
from src.engine.exact_native import NativeExact, exact_library
from src.engine.forms import default_precision, form_name
from src.engine.noise import STAGES, Noise, to_grid
from src.engine.votes import exact_cast
from src.models import ConvNN, SmoothClassifier
from tests.engine import test_native
from tests.engine.test_native import images_of, seeded, trained

in_c = test_native.pytestmark

SHAPES = [
    {},
    {"channels": (1, 1)},
    {"channels": (1, 20), "hidden": 1},
    {"channels": (7, 1), "hidden": 3},
    {"channels": (3, 5), "hidden": 7},
    {"channels": (32, 16), "hidden": 20, "thresholds": (0.4, 0.6)},
    {"channels": (48, 80), "num_classes": 2},
    {"channels": (17, 33), "hidden": 40, "num_classes": 1000},
    {"channels": (64, 128), "hidden": 32, "num_classes": 17},
]
# What a compiler makes of `exact.c` on processors with fewer instructions. -O1 is compiled faster.
BUILDS = {
    "as it is": (),
    "AVX2": ("-mno-avx512f",),
    "8 lanes": ("-O1", "-DLANES=8"),
    "AVX-512 without VNNI": ("-O1", "-mno-avx512vnni"),
    "AVX2 without VNNI": ("-O1", "-mno-avx512f", "-mno-avxvnni"),
    "SSE": ("-O1", "-mno-avx2", "-mno-avx"),
}


@pytest.fixture(params=SHAPES, ids=str)
def network(request):
    return trained(**request.param)


@pytest.fixture(scope="module", params=BUILDS.values(), ids=BUILDS)
def library(request):
    flags = request.param
    if any(flag.startswith("-mno") for flag in flags) and platform.machine() != "x86_64":
        pytest.skip("another processor has other instructions")
    with pytest.MonkeyPatch.context() as patch:
        # One that gives up on a busy machine gives up for good.
        patch.setattr("src.engine.native.COMPILER_SECONDS", 300)
        made = exact_library(*flags)
    if made is None and "-mno-avxvnni" in flags:
        pytest.skip("the compiler is too old for AVX-VNNI")
    assert made is not None
    return made


@functools.cache
def steps_of(count=13):
    """Images in steps with noise on them, among them the darkest and the brightest there are."""
    steps = torch.randint(256, (count, 1, 28, 28), generator=seeded(1), dtype=torch.int32)
    steps += (255 * torch.randn(count, 1, 28, 28, generator=seeded(2))).round().int()
    steps[0], steps[1], steps[2], steps[3] = 0, 255, LIMIT, -LIMIT
    steps[4] = torch.where(steps[4] > 128, LIMIT, -LIMIT)
    return steps


def sums_of(form, steps):
    """The sums of every layer, the logits last, by other means than the form has."""
    low, high, factor, shift, zero = form.pixels
    values = (steps.long().clamp(low, high) * factor + shift).div(2**16, rounding_mode="floor")
    values, sums = values.clamp(0, PIXEL_MOST).double() - zero, []
    for number in range(1, form.layers + 1):
        kernel, bias, *scale = (tensor.double() for tensor in form.layer(number))
        if number <= 2:
            kernel = kernel.transpose(1, 2).unflatten(2, (5, 5))
            sums.append(F.conv2d(values, kernel, bias, stride=2, padding=2))
        else:
            values = values.movedim(1, -1).flatten(1)
            sums.append(F.linear(values, kernel.flatten(1), bias))
        most = LAST_MOST if number == form.layers - 1 else FEATURE_MOST
        for per_channel in scale:
            shape = [-1] + [1] * (sums[-1].dim() - 2)
            scaled = sums[-1].float() * per_channel.float().view(shape)
            values = scaled.clamp(0, most).round().double()
    return sums


def uniform(channels, hidden=None):
    """A network whose features are all as large as they may be, as are its sums.

    All weights of a layer are equal but for the sign of its last channel.
    """
    network = ConvNN(channels, hidden).eval()
    for layer in (network.conv1, network.conv2, network.hidden, network.output):
        if layer is not None:
            layer.weight.data.fill_(1.0)
            layer.weight.data[-1] = -1.0
            if layer.bias is not None:
                layer.bias.data.zero_()
    return network


# --- The integers ---------------------------------------------------------------------------


def test_logits_are_those_of_whole_numbers_in_any_order_of_additions(network):
    form = network.inference_form("exact")
    logits = form.logits(steps_of())
    assert torch.equal(logits, sums_of(form, steps_of())[-1])
    assert torch.equal(logits, logits.round())
    assert logits.std() > 1e5
    # Not a bit depends on the rest of the batch.
    for part in (slice(0, 1), slice(3, 4), slice(5, 13)):
        assert torch.equal(form.logits(steps_of()[part]), logits[part])
    assert form.logits(steps_of()[:0]).shape == (0, network.output.out_features)


def test_no_sum_can_leave_its_range_and_none_wastes_it(network):
    form = network.inference_form("exact")
    for number in range(1, form.layers + 1):
        kernel, bias = (tensor.long() for tensor in form.layer(number)[:2])
        last, most = number == form.layers, PIXEL_MOST if number == 1 else FEATURE_MOST
        most = LAST_MOST if last else most
        largest = most * kernel.abs().sum((1, 2)) + bias.abs()
        assert largest.max() < (2**31 if last else SUM_LIMIT + 1)
        # A sum or a weight is nearly as large as it may be; of the output the largest.
        most_of_a_weight = 2**15 - 1 if last else 127
        near = largest > 0.95 * (2**31 if last else SUM_LIMIT)
        near |= kernel.abs().amax((1, 2)) > 0.99 * most_of_a_weight
        if not last:
            in16 = most * torch.from_numpy(_groups(kernel.numpy())).abs().sum(-1)
            assert in16.max() <= GROUP_LIMIT
            near |= in16.amax(1) > 0.9 * GROUP_LIMIT
        assert near.any() if last else near.all()


@pytest.mark.parametrize(
    ("channels", "hidden"),
    [((16, 32), None), ((16, 32), 16), ((176, 96), 16), ((1, 2), None), ((2, 1), 1)],
)
def test_the_largest_sums_that_there_are(channels, hidden):
    form = uniform(channels, hidden).inference_form("exact")
    sums = sums_of(form, steps_of())
    assert torch.equal(form.logits(steps_of()), sums[-1])
    assert all(s.abs().max() <= SUM_LIMIT for s in sums[:-1])
    assert sums[-1].abs().max() < 2**31
    if channels == (176, 96):
        # Of the second convolution and the hidden layer, which are wide enough for it.
        assert all(s.abs().max() > 0.95 * SUM_LIMIT for s in sums[1:3])
    if min(channels) > 1:
        in16 = FEATURE_MOST * _groups(form.kernel2.int().numpy()).sum(-1)
        assert channels[0] > 16 or in16.max() > 0.95 * GROUP_LIMIT
        assert sums[-1].abs().max() > 0.9 * 2**31


def test_what_is_added_up_in_16_bits():
    # Of every 16 inputs the first two of four in one sum, the others in another.
    rows = torch.arange(40).view(1, 1, 40).numpy()
    (first, second), _, (last, empty) = _groups(rows).reshape(3, 2, 8).tolist()
    assert first == [0, 1, 4, 5, 8, 9, 12, 13]
    assert second == [2, 3, 6, 7, 10, 11, 14, 15]
    assert last == [32, 33, 36, 37, 0, 0, 0, 0]
    assert empty == [34, 35, 38, 39, 0, 0, 0, 0]
    # Pixels have one input: neighbours in a row of five.
    pairs = _groups(torch.arange(25).view(1, 25, 1).numpy())
    assert pairs[0, :4].tolist() == [[0, 1], [2, 3], [4, 0], [5, 6]]


def test_pixels_are_counted_in_eighths_of_the_thresholds_range():
    steps = torch.arange(-LIMIT, LIMIT + 1)
    for thresholds in (None, (0.0, 1.0), (0.4, 0.6), (0.25, 0.75), (0.99, 1.0)):
        (low, high, factor, shift, zero), unit = _pixels(thresholds)
        found = ((steps.clamp(low, high) * factor + shift) >> 16).clamp(0, 255) - zero
        start, end = thresholds or (0.0, 1.0)
        expected = (steps.double() / 255 - start) / (end - start) * unit
        expected = expected.clamp(-zero, 255 - zero)
        # To the nearest, but for ties, and for 16 bits after the point where the range is narrow.
        assert (found - expected).abs().max() < 0.5 + 255 * 2**-15 / (end - start)
        # C and torch compute it in 32 bits.
        assert max(abs(s * factor + shift) for s in (low, high)) < 2**31


def test_pixels_beyond_what_counts_are_cut(network):
    # With thresholds nothing is beyond: they cut first.
    images = images_of(4)
    images[:, 0, 5:9, 5:9] = 4.0
    further = images.clone()
    further[:, 0, 5:9, 5:9] = 1e6
    form = network.inference_form("exact")
    assert torch.equal(form(images), form(further))
    infinite = images.clone()
    infinite[:, 0, 5:9, 5:9] = torch.inf
    assert torch.equal(form(images), form(infinite))


# --- Near the network -----------------------------------------------------------------------


def test_it_is_as_near_to_the_network_as_seven_bits_allow(network):
    images = images_of(50)
    with torch.no_grad():
        expected = network(images)
        error = (network.inference_form("exact")(images) - expected).square().mean().sqrt()
    assert 0 < error < 0.06 * expected.std()


@pytest.mark.parametrize("hidden", [None, 4])
@pytest.mark.parametrize("factor", [0, 1e-42, 1e-38, 1e-31, 1e-20])
def test_channels_with_hardly_any_weights_have_their_biases(factor, hidden):
    network = trained(channels=(4, 4), hidden=hidden)
    network.norm1.bias.data[1] = 0.7
    network.conv1.weight.data[1] *= factor
    network.conv2.weight.data[2] *= factor
    network.output.weight.data[5] *= factor
    if hidden:
        network.hidden.weight.data[3] *= factor
    images = images_of(5)
    with torch.no_grad():
        found, expected = network.inference_form("exact")(images), network(images)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e6, 1e15])
def test_the_size_of_all_weights_of_a_layer_does_not_matter(factor):
    # Normalisation takes it away, and of the output it is the unit.
    plain, scaled = trained(hidden=16), trained(hidden=16)
    scaled.conv1.weight.data *= factor
    scaled.norm1.running_mean *= factor
    scaled.norm1.running_var *= factor**2
    scaled.norm1.eps = plain.norm1.eps * factor**2
    scaled.output.weight.data *= factor
    scaled.output.bias.data *= factor
    images = images_of(20)
    with torch.no_grad():
        logits = [ExactConvNN(network)(images) for network in (plain, scaled)]
    assert (logits[1] / factor - logits[0]).abs().max() < 0.01 * logits[0].std()


def test_a_network_of_zeros_has_its_biases():
    network = trained(hidden=5)
    for layer in (network.conv1, network.conv2, network.hidden, network.output):
        layer.weight.data.zero_()
    logits = network.inference_form("exact")(images_of(3))
    torch.testing.assert_close(logits.float(), network.output.bias.expand(3, -1))
    network.output.bias.data.zero_()
    form = network.inference_form("exact")
    assert (form(images_of(3)) == 0).all()
    assert form.classes(steps_of()).tolist() == [0] * 13


def test_a_certificate_in_whole_numbers_is_about_the_same_probability():
    counts = []
    for precision in ("float32", "exact"):
        smooth = SmoothClassifier(trained(hidden=16), 1.0, precision=precision)
        counts.append(smooth.certify(images_of(2).clamp(0, 1), 100, 4000, 0.05).top_count)
    # The same noise: rounding to 7 bits moves one vote in some thirty.
    assert counts[0].min() > 500
    assert (counts[0] - counts[1]).abs().max() < 120


# --- What it cannot do is said --------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["conv2.weight", "norm1.running_var", "output.bias"])
def test_weights_without_an_integer_are_refused(value, name):
    network = trained()
    network.state_dict()[name][-1:] = value
    with pytest.raises(ValueError, match="not finite"):
        network.inference_form("exact")
    assert default_precision(network) == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (10_600, 1)}, "A layer of 265,000 inputs is too wide"),
        ({"channels": (1, 5400), "hidden": 1}, "A layer of 264,600 inputs is too wide"),
        ({"channels": (1, 10_800)}, "An output of 529,200 inputs is too wide"),
        ({"thresholds": (0.5, 0.505)}, "closer than 1/100"),
    ],
)
def test_what_has_no_whole_numbers_is_refused_in_a_sentence(options, message):
    network = ConvNN(**options).eval()
    with pytest.raises(ValueError, match=message):
        network.inference_form("exact")
    assert default_precision(network) == "float32"


def test_an_image_with_a_nan_has_no_logits(network):
    images = images_of(3)
    images[1, 0, 2, 2] = float("nan")
    logits = network.inference_form("exact")(images)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="28"):
        trained().inference_form("exact")(torch.zeros(2, 1, 27, 28))


def test_it_follows_the_mode_of_nobody_and_shares_no_memory():
    network = ConvNN((2, 2)).train()
    form = network.inference_form("exact").eval()
    assert network.training
    assert not {*network.modules()} & {*form.modules()}
    before = form.logits(steps_of())
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()
    assert torch.equal(form.logits(steps_of()), before)


def test_another_number_of_classes_is_refused():
    smooth = SmoothClassifier(trained(num_classes=7), 0.5, 10)
    with pytest.raises(ValueError, match=r"\(1, 7\).*'num_classes'"):
        smooth.certify(images_of(1).clamp(0, 1), n=50)


# --- Ties -----------------------------------------------------------------------------------


def undecided(**options):
    """A network whose classes are nearly equal on average, so that noise decides."""
    network = trained(**options)
    noisy = images_of(1).clamp(0, 1) + 0.7 * torch.randn(200, 1, 28, 28, generator=seeded(3))
    with torch.no_grad():
        network.output.bias -= network(noisy).mean(0)
    return network


def tied():
    """Classes 2, 3 and 6 always have equal logits."""
    network = undecided(hidden=16)
    for values in (network.output.weight.data, network.output.bias.data):
        values[[3, 6]] = values[2].clone()
    return network


def test_ties_go_to_the_lowest_class():
    form = tied().inference_form("exact")
    logits, classes = form.logits(steps_of(500)), form.classes(steps_of(500))
    assert torch.equal(logits[:, 2], logits[:, 6])
    assert 20 < (classes == 2).sum() < 450
    assert not torch.isin(classes, torch.tensor([3, 6])).any()
    assert (logits.gather(1, classes[:, None]) == logits.amax(1, keepdim=True)).all()


# --- In C -----------------------------------------------------------------------------------


@in_c
def test_c_gives_the_logits_of_torch_to_the_bit(library, network):
    form = network.inference_form("exact")
    native = NativeExact(form, library)
    expected = form.logits(steps_of())
    assert torch.equal(native.logits(steps_of()).double(), expected)
    for part in (slice(0, 1), slice(2, 11), slice(5, 13)):
        assert torch.equal(native.logits(steps_of()[part]).double(), expected[part])


@in_c
@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform((16, 32)),
        lambda: uniform((16, 32), 16),
        lambda: uniform((176, 96), 16),
        lambda: uniform((5, 9), 3),
    ],
)
def test_the_largest_sums_are_right_in_c(library, make):
    form = make().inference_form("exact")
    found = NativeExact(form, library).logits(steps_of())
    assert torch.equal(found.double(), sums_of(form, steps_of())[-1])


@in_c
@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.conv1.weight.data.zero_(),
        lambda n: n.conv1.weight.data[1].mul_(1e-38),
        lambda n: n.conv1.weight.data[1].mul_(1e15),
        lambda n: n.conv2.weight.data.mul_(1e-30),
        lambda n: n.norm1.weight.data.mul_(1e12),
        lambda n: n.norm2.bias.data.sub_(100),
        lambda n: n.hidden.bias.data.sub_(1e6),
        lambda n: n.output.weight.data.zero_(),
        lambda n: n.output.bias.data.mul_(1e9),
    ],
)
def test_odd_weights_are_the_same_in_c(library, change):
    network = trained(channels=(17, 20), hidden=9)
    change(network)
    form = network.inference_form("exact")
    expected = sums_of(form, steps_of())[-1]
    assert torch.equal(form.logits(steps_of()), expected)
    assert torch.equal(NativeExact(form, library).logits(steps_of()).double(), expected)


@in_c
@pytest.mark.parametrize("make", [tied, lambda: undecided(channels=(3, 5), num_classes=2)])
def test_c_casts_the_votes_of_torch(library, make, monkeypatch):
    network = make()
    form, image = network.inference_form("exact"), images_of(1).clamp(0, 1)
    (steps,), _ = to_grid(image)
    in_c = exact_cast(form, NativeExact(form, library), form.num_classes)
    in_torch = exact_cast(form, None, form.num_classes)
    noise = Noise(2**63 + 5, 7, 0.7)
    monkeypatch.setattr("src.engine.noise.exact_library", lambda: None)
    for stage in STAGES:
        expected = in_torch(steps, noise, stage, 11, 301)
        assert (in_c(steps, noise, stage, 11, 301) == expected).all()
        assert (in_c(steps, noise, stage, 11, 0) == 0).all()
    assert (expected > 20).sum() >= 2
    if make is tied:
        assert 20 < expected[2] < 250
        assert expected[3] == expected[6] == 0


@in_c
def test_votes_are_the_same_without_a_compiler(monkeypatch):
    smooth = SmoothClassifier(trained(hidden=20), 1.0)
    assert smooth.exact
    assert form_name(smooth.base_classifier, "exact") == "whole numbers"
    images, found = images_of(2).clamp(0, 1), []
    for missing in (False, True):
        if missing:
            for module in ("forms", "noise"):
                monkeypatch.setattr(f"src.engine.{module}.exact_library", lambda: None)
        found.append(
            (
                *smooth.certify(images, n0=100, n=1000, alpha=0.05),
                smooth.predict(images, n=500),
                *smooth.certify_radius(images, 0.1, max_n=2000),
            )
        )
    assert all(map(torch.equal, *found))
    assert found[0][3].min() > 300
    assert form_name(smooth.base_classifier, "exact") == "whole numbers"


@in_c
def test_a_library_that_answers_otherwise_is_not_used(monkeypatch):
    monkeypatch.setattr(exact_native, "ANSWERS", "0" * 64)
    with pytest.warns(UserWarning, match=r"exact\.c gives wrong answers here.* CC"):
        assert exact_library.__wrapped__() is None


def test_a_wrapped_network_votes_in_whole_numbers_too():
    images = images_of(2).clamp(0, 1)
    smooth = SmoothClassifier(nn.DataParallel(trained()), 0.5)
    assert smooth.exact
    expected = SmoothClassifier(trained(), 0.5, precision="exact").certify(images, n=500)
    assert torch.equal(smooth.certify(images, n=500).top_count, expected.top_count)


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request):
    """Other defaults of torch: a type of numbers, or a device."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)


@in_c
def test_the_library_and_the_votes_are_the_same_under_any_defaults(defaults):
    # The stored answers were once made in the default type, and the right library refused.
    assert exact_library.__wrapped__("-O1") is not None


def test_votes_do_not_depend_on_the_defaults(defaults):
    untouched._probe.cache_clear()
    with torch.device("cpu"):
        network, images = trained().float(), images_of(2).float().clamp(0, 1)
    smooth = SmoothClassifier(network, 0.5)
    assert smooth.exact
    found = smooth.certify(images, n=300)
    assert all(field.device.type == "cpu" for field in found)
    with torch.device("cpu"):
        assert torch.equal(found.top_count, smooth.certify(images, n=300).top_count)


def test_autocast_rounds_no_whole_number(network):
    form, steps = ExactConvNN(network), steps_of()
    expected = form.logits(steps), form(steps / 255)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form.logits(steps), expected[0])
        assert torch.equal(form(steps / 255), expected[1])


class SameLayers(nn.Module):
    """The layers of a ConvNN under their names, in a class of one's own."""

    def __init__(self, **config):
        super().__init__()
        made = ConvNN(**config)
        self.config, self.thresholds, self.hidden = made.config, None, None
        for name, layer in made.named_children():
            setattr(self, name, layer)

    def forward(self, images):
        return ConvNN.forward(self, images)

    def inference_form(self, precision):
        return ConvNN.inference_form(self, precision)


@pytest.mark.parametrize("shape", [(1, 14, 14), (1, 28, 27), (3, 56, 56)])
def test_images_of_another_shape_are_never_read_by_the_library(shape):
    # C would read 784 pixels of whatever lies there, and certify an image that was never given.
    smooth = SmoothClassifier(SameLayers().eval(), 0.5)
    assert smooth.exact
    with pytest.raises(ValueError, match=r"expected \(B, 1, 28, 28\)"):
        smooth.certify(torch.zeros(shape), n=100)


def test_a_network_of_nans_has_no_whole_numbers():
    # Its state is finite. Every logit is NaN, a vote for no class; whole numbers would name one.
    network = trained()
    network.norm1.running_var.fill_(-1.0)
    with pytest.raises(ValueError, match="variance is negative"):
        ExactConvNN(network)
    smooth = SmoothClassifier(network, 0.5)
    assert not smooth.exact
    assert smooth.certify(torch.zeros(1, 28, 28), n=100).top_count == 0


def test_layers_too_far_apart_in_size_are_refused():
    # The scale between them would be infinite, and 0 times it NaN in torch, but not in C.
    network = trained()
    network.norm1.weight.data.fill_(1e30)
    network.conv2.weight.data.fill_(1e30)
    network.norm2.weight.data.fill_(1e-9)
    network.norm2.bias.data.fill_(0)
    network.norm2.running_var.fill_(1e-30)
    with pytest.raises(ValueError, match="too far apart"):
        ExactConvNN(network)
