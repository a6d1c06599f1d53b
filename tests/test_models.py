"""The network, and certificates against closed forms, invariances and the noise itself."""

import json
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import kstwobign, norm
from torch import nn

from src.certification import (
    ONE_SIDED,
    TWO_SIDED,
    certified_radius,
    lower_confidence_bound,
    required_probability,
    tight_radius,
)
from src.certification.stopping import CERTIFY, REJECT, look_schedule, mixture_decision
from src.engine.noise import Noise, to_grid
from src.engine.parts import PRECISIONS
from src.models import ABSTAIN, Certificate, ConvNN, SmoothClassifier

# On the grid of bytes, where nothing is lost.
GREY = torch.full((1, 28, 28), 128 / 255)


class Halfspace(nn.Module):
    """Class 0 where direction * x > offset, in logits of three classes."""

    def __init__(self, direction, offset, other=(0.0, -1e9)):
        super().__init__()
        self.direction, self.offset, self.other = direction.flatten(), offset, other

    def forward(self, images):
        distance = images.flatten(1) @ self.direction - self.offset
        return torch.stack([distance, *(0 * distance + o for o in self.other)], dim=1)


class FirstPixel(nn.Module):
    """Class 0 with probability `self.p` at GREY under noise of deviation `sigma`; else `loser`.

    After rounding to the grid this is a half-space that ends half-way between two steps, at the
    distance `sigma` Phi^-1(`self.p`). Of those it is the one whose probability is next to `p`.
    """

    def __init__(self, p, sigma=1.0, loser=(0.0, 1.0, 0.0)):
        super().__init__()
        margin = (round(255 * sigma * norm.ppf(p) - 0.5) + 0.5) / 255
        self.p, self.threshold = norm.cdf(margin / sigma), 128 / 255 - margin
        self.loser = torch.tensor(loser)

    def forward(self, images):
        wins = (images[:, 0, 0, 0] > self.threshold)[:, None]
        return torch.where(wins, torch.tensor([1.0, 0.0, 0.0]), self.loser)


class Recorder(nn.Module):
    """Keeps what passes through it, and votes for class 0."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(images.clone())
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    def noise(self, sigma=1.0, checks=3):
        """All draws since the last call, of one certificate or prediction, (n, 784)."""
        # Without the calls that check whether an image has one answer.
        copies = torch.cat(self.batches[checks:]).flatten(1)
        self.batches.clear()
        return copies / sigma


# The widths of the last fill the vectors of the convolutions in C.
SHAPES = {
    "narrow": {"channels": (3, 5), "hidden": 7},
    "wide": {"channels": (16, 16), "hidden": 7},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def network(request):
    """An untrained network with batch-norm statistics far from their initial values."""
    torch.manual_seed(0)
    model = ConvNN(**request.param)
    # So that not all of the few hidden units are zero for every image.
    model.hidden.bias.data += 0.5
    for module in (model.norm1, model.norm2):
        for tensor in (module.weight.data, module.bias.data, module.running_mean):
            tensor.normal_()
        module.running_var.uniform_(0.2, 3)
    # Several classes must get votes, or the tests of invariance would see nothing.
    noisy = images_of(100) + 0.5 * torch.randn(100, 1, 28, 28)
    model.output.bias.data.sub_(model.eval()(noisy).detach().mean(dim=0))
    return model.train()


def images_of(count):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- ConvNN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(16, 32), [1, 3]])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_network_is_described_by_its_config(channels, hidden, num_classes):
    model = ConvNN(channels, hidden, num_classes).eval()
    twin = ConvNN(**json.loads(json.dumps(model.config))).eval()
    twin.load_state_dict(model.state_dict())
    images = images_of(3)
    assert model(images).shape == (3, num_classes)
    assert model(images[:0]).shape == (0, num_classes)
    assert torch.equal(twin(images), model(images))
    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == ([num_classes] if hidden is None else [hidden, num_classes])


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32), (2, 784), (28, 28)])
def test_network_names_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"'images'.*28, 28"):
        ConvNN((1, 1))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("channels", value) for value in [(4,), (4, 4, 4), (0, 4), (4, 2.5)]),
        *(("hidden", value) for value in [0, -1, 1.5]),
        *(("num_classes", value) for value in [1, 0, 2.0]),
        *(("thresholds", value) for value in [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)]),
    ],
)
def test_network_names_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"'{name}'"):
        ConvNN(**{name: value})


def test_thresholds_cut_every_pixel():
    torch.manual_seed(0)
    plain, images = ConvNN((3, 5)).eval(), images_of(20)
    ramped = ConvNN((3, 5), thresholds=(0.25, 0.75)).eval()
    ramped.load_state_dict(plain.state_dict())
    expected = plain(((images - 0.25) * 2).clamp(0, 1))
    assert torch.equal(ramped(images), expected)
    # With gradients or without: the same logits to the last bit.
    assert torch.equal(ramped(images.clone().requires_grad_()), expected)
    torch.testing.assert_close(ramped.inference_form()(images), expected, rtol=1e-5, atol=1e-5)


def test_gradient_passes_straight_through_the_thresholds():
    torch.manual_seed(0)
    plain, images = ConvNN((3, 5)).eval(), images_of(20).requires_grad_()
    ramped = ConvNN((3, 5), thresholds=(0.25, 0.75)).eval()
    ramped.load_state_dict(plain.state_dict())
    cut = ((images.detach() - 0.25) * 2).clamp(0, 1).requires_grad_()
    (through,) = torch.autograd.grad(ramped(images)[:, 3].sum(), images)
    (behind,) = torch.autograd.grad(plain(cut)[:, 3].sum(), cut)
    assert ((cut == 0) | (cut == 1)).any()
    assert torch.equal(through, 2 * behind)


def test_bfloat16_form_rounds_features_but_not_logits(network):
    images = images_of(50)
    forms = network.inference_form(), network.inference_form("bfloat16")
    logits = forms[1](images)
    assert not torch.equal(logits, logits.bfloat16().float())
    for form in forms:
        form.connected[-2].data, form.connected[-1].data = torch.eye(7), torch.zeros(7)
    exact, rounded = (form(images) for form in forms)
    assert torch.equal(rounded, rounded.bfloat16().float())
    # Eight bits, 2 ** -8 relative, in three layers whose terms partly cancel.
    assert 0 < (rounded - exact).abs().max() < 6 * 2**-8 * exact.abs().max()


def test_another_precision_is_refused(network):
    for call in (
        lambda: network.inference_form("float16"),
        lambda: SmoothClassifier(network, 0.5, precision="float16"),
        lambda: SmoothClassifier(FirstPixel(0.9), 0.5, precision="bfloat16"),
    ):
        with pytest.raises(ValueError, match="'precision'"):
            call()


def test_votes_are_those_of_the_network_in_its_precision(network):
    # sigma = 2 leaves many votes close: rounding casts some of them differently.
    image, n = images_of(1)[0], 512
    (steps,), _ = to_grid(image[None])
    copies = Noise(0, 0, 2.0).copies(steps, "estimate", 0, n).float() / 255
    votes = {}
    for precision in PRECISIONS:
        smooth = SmoothClassifier(network, 2.0, precision=precision)
        certificate = smooth.certify(image, n0=128, n=n, alpha=0.05)
        form = network.inference_form(precision)
        votes[precision] = torch.cat([form(part).argmax(1) for part in copies.split(128)])
        assert certificate.top_count in votes[precision].bincount(minlength=10)
    assert not torch.equal(votes["float32"], votes["bfloat16"])
    assert not torch.equal(votes["float32"], votes["exact"])


def test_an_untouched_network_votes_in_whole_numbers_unless_something_else_is_asked_for(network):
    smooth, image = SmoothClassifier(network, 0.5), images_of(1)[0]
    assert (smooth.precision, smooth.exact) == ("exact", True)
    asked = SmoothClassifier(network, 0.5, precision="exact")
    assert equal(smooth.certify(image, n=500), asked.certify(image, n=500))
    for other in (
        SmoothClassifier(network, 0.5, precision="float32"),
        SmoothClassifier(network, 0.5, levels=510),
        SmoothClassifier(nn.Sequential(network), 0.5),
        SmoothClassifier(FirstPixel(0.9), 0.5),
    ):
        assert (other.precision, other.exact) == ("float32", False)
    # What has no whole numbers votes in float32, unless they are asked for.
    network.output.bias.data[0] = torch.nan
    assert (smooth.precision, smooth.exact) == ("float32", False)
    assert smooth.certify(image, n=50).prediction == ABSTAIN
    with pytest.raises(ValueError, match="not finite"):
        asked.certify(image, n=50)


@pytest.mark.parametrize("thresholds", [None, (0.25, 0.75)])
def test_inference_form_has_the_gradients_of_the_network(network, thresholds):
    network.thresholds = thresholds
    images = images_of(6).requires_grad_()
    weights = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    expected, found = (
        torch.autograd.grad((model(images) * weights).sum(), images)[0]
        for model in (network.eval(), network.inference_form())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_inference_form_is_the_same_function_in_other_memory(network):
    state = torch.get_rng_state()
    folded = network.inference_form()
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    images = images_of(50)
    expected = network.eval()(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in network.parameters())
    for tensor in folded.state_dict().values():
        tensor.zero_()
    assert torch.equal(network(images), expected)


# --- Closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("margin", [0.1, 0.4, 0.7])
def test_half_space_is_certified_up_to_its_margin(margin, sigma):
    # Smoothing leaves a half-space unchanged, so its exact radius is the margin. Rounding the noise
    # of 784 pixels widens it by a factor of at most 1 + 1 / (24 (255 sigma)^2) < 1.00002, which
    # only lowers the probability. The upper bound fails with probability alpha = 1e-3 a case; the
    # lower with less: it is 8 deviations away.
    direction = torch.randn(784, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    base = Halfspace(direction, float(GREY.flatten() @ direction) - margin)
    n = 4_000
    certificate = SmoothClassifier(base, sigma, 3).certify(GREY, n=n, alpha=1e-3)
    p = norm.cdf(margin / sigma)
    slack = 8 * sigma * (p * (1 - p) / n) ** 0.5 / norm.pdf(margin / sigma)
    assert certificate.prediction == 0
    assert margin - slack <= certificate.radius <= margin


@pytest.mark.parametrize("p", [0.55, 0.9, 0.999])
def test_known_vote_probability_is_met_and_its_bound_covers(p):
    # 300 independent certificates of one image. Their bounds exceed p Binomial(300, <= 0.1)
    # times: more than 60 has odds below 1e-6.
    smooth = SmoothClassifier(FirstPixel(p, sigma=0.5), 0.5, 3)
    certificate = smooth.certify(GREY.expand(300, 1, 28, 28), n0=20, n=100, alpha=0.1)
    p = smooth.base_classifier.p
    wrong = (certificate.p_lower > p) | (certificate.prediction == 1)
    assert wrong.sum() <= 60
    if p > 0.8:
        # Class 0 is always selected but for odds of 1e-4; its votes are Binomial(30_000, p), six
        # deviations have odds of 2e-9.
        votes = certificate.top_count.sum()
        assert abs(votes - 30_000 * p) < 6 * (30_000 * p * (1 - p)) ** 0.5 + 1
    radius = 0.5 * norm.ppf(certificate.p_lower.clamp(min=0.5).numpy())
    torch.testing.assert_close(certificate.radius, torch.tensor(radius), rtol=1e-9, atol=1e-9)


def test_predict_errs_at_most_alpha_of_the_time_and_abstains_otherwise():
    # Of two classes that are all but tied, the wrong one is named with probability at most
    # alpha / 2 = 0.1: of 400 times more than 80 has odds below 1e-8.
    batch = GREY.expand(400, 1, 28, 28)
    tied = SmoothClassifier(FirstPixel(0.5001), 1.0, 3).predict(batch, n=40, alpha=0.2)
    assert set(tied.tolist()) <= {0, 1, ABSTAIN}
    assert (tied == 1).sum() <= 80
    assert (tied == ABSTAIN).sum() > 200
    # P(abstain) < 1e-30 at p = 0.9, n = 1000.
    sure = SmoothClassifier(FirstPixel(0.9), 1.0, 3)
    assert sure.predict(GREY) == 0
    # 2 * 0.5^10 > 0.001: ten votes of ten are too few.
    assert sure.predict(GREY, n=10) == ABSTAIN


class FirstSign(nn.Module):
    """Class 0 where the first pixel that differs from GREY is brighter: exactly half of all."""

    def forward(self, images):
        signs = ((images - GREY).flatten(1) * 255).round().sign()
        first = signs.gather(1, signs.abs().argmax(1, keepdim=True))
        return torch.cat([first, -first, first - 9], dim=1)


@pytest.mark.parametrize("base", [FirstSign(), FirstPixel(0.4999)])
def test_half_of_the_votes_certify_nothing(base):
    # False alarm: alpha = 1e-3 a case, and six deviations for the votes; the seed is fixed.
    certificate = SmoothClassifier(base, 1.0, 3).certify(GREY, n=400)
    assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0)
    assert 0.3 < certificate.p_lower <= 0.5
    assert 140 < certificate.top_count < 260


@pytest.mark.parametrize("moved", [0.5 / 255, -0.3 / 255, 0.1 / 255])
def test_an_image_off_the_grid_has_the_certificate_of_the_nearest_one_less_the_distance(moved):
    smooth, image = SmoothClassifier(FirstPixel(0.97, 0.5), 0.5, 3), GREY.clone()
    image[0, :2] += moved * 0.999
    near, far = smooth.certify(GREY, n=2000), smooth.certify(image, n=2000)
    for field in ("top_count", "p_lower", "rival_count", "prediction"):
        assert getattr(far, field) == getattr(near, field)
    distance = (image.double() - 128 / 255)[0, :2].norm()
    for field in ("radius", "radius_tight"):
        lost = getattr(near, field) - getattr(far, field)
        assert distance <= lost < distance + 1e-8
    # A finer grid is nearer. These multiples of 1/510 lie on it.
    finer = SmoothClassifier(FirstPixel(0.97, 0.5), 0.5, 3, levels=510)
    between = torch.full((1, 28, 28), 257 / 510)
    certificate = finer.certify(between, n=2000)
    assert certificate.radius == certified_radius(float(certificate.p_lower), 0.5)
    assert smooth.certify(between, n=2000).radius < certificate.radius


# --- Not a number ---------------------------------------------------------------------------


def votes_of(certificate):
    return certificate.top_count.numpy(), certificate.rival_count.numpy()


@pytest.mark.parametrize("loser", [(1.0, torch.nan, 0.0), (torch.nan,) * 3, (torch.nan, 9.0, 9.0)])
def test_a_nan_is_a_vote_against_every_class(loser):
    def certify(loser):
        return SmoothClassifier(FirstPixel(0.9, loser=loser), 1.0, 3).certify(GREY, n=500)

    void, voted = certify(loser), certify((0.0, 1.0, 0.0))
    for field in ("prediction", "radius", "top_count", "p_lower"):
        assert getattr(void, field) == getattr(voted, field)
    # Void votes help no rival.
    assert void.rival_count <= voted.rival_count == 500 - voted.top_count
    assert void.radius_tight >= tight_radius(TWO_SIDED, *votes_of(voted), 500, 0.001, 0.5)


@pytest.mark.parametrize("other", [(torch.nan, 0.0), (torch.nan, torch.nan)])
def test_nothing_but_nans_abstains(other):
    smooth = SmoothClassifier(Halfspace(GREY, 0.0, other), 0.5, 3)
    certificate = smooth.certify(images_of(2), n=200)
    assert certificate.prediction.tolist() == [ABSTAIN] * 2
    assert all((values == 0).all() for values in certificate[1:-1])
    assert certificate.test.tolist() == [1, 1]
    assert smooth.predict(images_of(2)).tolist() == [ABSTAIN] * 2


# --- The form of the answers ----------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 0, 1, 3])
def test_answers_have_the_shape_and_types_of_the_contract(network, count):
    images = GREY if count is None else images_of(count)
    smooth = SmoothClassifier(network, 0.5)
    certificate, prediction = smooth.certify(images, n0=5, n=20), smooth.predict(images, n=20)
    assert isinstance(certificate, Certificate)
    names = ("prediction", "radius", "radius_tight", "top_count", "p_lower", "rival_count", "test")
    assert certificate._fields == names
    dtypes = [values.dtype for values in (*certificate, prediction)]
    whole, real = torch.int64, torch.float64
    assert dtypes == [whole, real, real, whole, real, whole, torch.int8, whole]
    shape = () if count is None else (count,)
    assert all(values.shape == shape for values in (*certificate, prediction))


def test_a_certificate_reads_as_a_line_per_image_rounded_down():
    fields = [
        torch.tensor([3, ABSTAIN, 7]),
        torch.tensor([0.99999, 0.0, 1.2345], dtype=torch.float64),
        torch.tensor([1.1, 0.0, 1.29999], dtype=torch.float64),
        torch.tensor([100_000, 48_210, 999]),
        torch.tensor([0.99993092, 0.4786, 0.9919999], dtype=torch.float64),
        torch.tensor([0, 40_000, 1]),
        torch.tensor([2, 1, 2], dtype=torch.int8),
    ]
    lines = [
        "class  radius  by CERTIFY  votes for it  probability at least",
        "    3   1.100       0.999       100,000  0.999930",
        " none   0.000       0.000        48,210  0.478600",
        "    7   1.299       1.234           999  0.991999",
    ]
    assert repr(Certificate(*fields)).splitlines() == lines
    for index, line in enumerate(lines[1:]):
        assert str(Certificate(*(f[index] for f in fields))).splitlines() == [lines[0], line]
    assert repr(Certificate(*(f[:0] for f in fields))) == lines[0]
    # What `certify` returns is shown the same way.
    certificate = SmoothClassifier(FirstPixel(0.5), 1.0, 3).certify(GREY, n=400)
    assert repr(certificate).splitlines()[1].split()[:2] == ["none", "0.000"]
    # No digit that is shown is above the value.
    sure = SmoothClassifier(FirstPixel(0.97), 1.0, 3).certify(images_of(20), n0=20, n=200)
    shown = [line.split() for line in repr(sure).splitlines()[1:]]
    assert len(shown) == 20
    columns = zip(sure.radius_tight, sure.radius, sure.p_lower, strict=True)
    for line, (tight, radius, p) in zip(shown, columns, strict=True):
        assert tight - 1e-3 < float(line[1]) <= tight
        assert radius - 1e-3 < float(line[2]) <= radius
        assert p - 1e-6 < float(line[4]) <= p


def test_too_few_draws_are_refused_with_the_number_that_would_do():
    smooth = SmoothClassifier(Recorder(), 1.0, 2)
    with pytest.raises(ValueError, match=r"'n' = 9 .*n >= 10\b"):
        smooth.certify(GREY, n=9, alpha=0.001)
    assert smooth.certify(GREY, n=10, alpha=0.001).prediction == 0


FAULTS = [
    ("images", (GREY * 255).to(torch.uint8)),
    ("images", GREY * 3),
    ("images", GREY[0]),
    ("images", GREY * torch.nan),
    *(("n", value) for value in (0, -1, 100.0, None)),
    *(("alpha", value) for value in (0, 1, 1.5, -0.1, torch.nan)),
    *(("batch_size", value) for value in (0, -1, 2.5)),
    *(("seed", value) for value in (-1, 0.5, None, 2**64)),
    *(("indices", value) for value in ([], [0, 1], [-1], [0.5], torch.tensor([0.5]), ["a"])),
    ("indices", [2**32]),
]


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        *((method, *fault) for method in ("certify", "predict") for fault in FAULTS),
        *(("certify", "n0", value) for value in (0, 1.5)),
    ],
)
def test_bad_arguments_are_named(method, name, value):
    arguments = {"images": GREY, "n": 100, name: value}
    with pytest.raises(ValueError, match=f"'{name}'"):
        getattr(SmoothClassifier(Recorder(), 1.0, 2), method)(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sigma", value) for value in (0, -1, torch.nan, torch.inf, "1")),
        ("num_classes", 1),
        *(("levels", value) for value in (0, 0.5, 4081)),
    ],
)
def test_bad_smoothing_is_named(name, value):
    with pytest.raises(ValueError, match=f"'{name}'"):
        SmoothClassifier(Recorder(), **({"sigma": 1.0} | {name: value}))


def test_a_wrong_number_of_classes_is_named_and_modes_are_restored():
    base = nn.Sequential(nn.Dropout(), Recorder().eval())
    with pytest.raises(ValueError, match="'num_classes'"):
        SmoothClassifier(base, 1.0, num_classes=3).certify(GREY, n=20)
    assert [module.training for module in base.modules()] == [True, True, False]


# --- Invariances ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16", "of another"])
def test_votes_of_an_image_depend_on_the_seed_and_its_index_only(network, precision):
    # In floats, batches of another size round differently: a draw in 1e5 could vote otherwise, the
    # chance of which is below 1e-2 for all the draws here; the seeds are fixed.
    images = images_of(5)
    if precision == "of another":
        smooth = SmoothClassifier(nn.Sequential(network), 0.5)
    else:
        smooth = SmoothClassifier(network, 0.5, precision=precision)

    def run(images, **options):
        certificate = smooth.certify(images, n0=40, n=300, alpha=0.01, **options)
        return (*certificate, smooth.predict(images, n=150, alpha=0.01, **options))

    whole = run(images)
    # Neither unanimous nor empty: otherwise the comparisons would be of nothing.
    assert (whole[3] < 300).all()
    assert len(whole[3].unique()) > 2
    for batch_size in (3, 128, 1000):
        assert equal(run(images, batch_size=batch_size), whole)
    order = torch.tensor([3, 0, 4])
    assert equal(run(images[order], indices=order), [values[order] for values in whole])
    assert equal(run(images[2], indices=[2]), [values[2] for values in whole])
    assert not torch.equal(run(images, seed=1)[3], whole[3])
    assert not torch.equal(run(images, indices=range(5, 10))[3], whole[3])


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_votes_do_not_depend_on_the_number_of_threads(network, precision):
    smooth = SmoothClassifier(network, 0.5, precision=precision)
    images, before = images_of(4), torch.get_num_threads()
    certificates = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            certificates.append(smooth.certify(images, n0=200, n=1_000))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert equal(certificates[0], certificates[1])
    assert equal(certificates[0], certificates[2])


def test_a_subclass_of_the_network_votes_with_its_own_forward(network):
    class Constant(ConvNN):
        def forward(self, images):
            return super().forward(images) * 0 + torch.eye(10)[4]

    model = Constant(**network.config)
    assert SmoothClassifier(model, 0.5).certify(GREY, n=50).prediction == 4


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_certificates_have_no_side_effects(network, wrap, context):
    network.norm1.eval()
    base = wrap(network)
    modes = [module.training for module in base.modules()]
    state = {name: value.clone() for name, value in base.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    with context():
        images = images_of(2)
        kept = images.clone()
        smooth = SmoothClassifier(base, 0.5)
        certificate = smooth.certify(images, n0=10, n=200)
        smooth.predict(images, n=20)
    assert torch.equal(images, kept)
    assert [module.training for module in base.modules()] == modes
    assert equal(base.state_dict().values(), state.values())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    # The votes are cast in evaluation mode, whatever the mode was.
    assert equal(certificate, SmoothClassifier(base.eval(), 0.5).certify(images, n0=10, n=200))


# --- The noise ------------------------------------------------------------------------------


def test_draws_are_prefixes_of_longer_runs_and_never_used_twice():
    black, recorder = torch.zeros(1, 28, 28), Recorder()
    smooth, drawn = SmoothClassifier(recorder, 1.0, 2), []
    for seed, index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        runs = []
        for n0, n, batch_size in ((20, 50, None), (150, 300, 64)):
            options = {"seed": seed, "indices": [index], "batch_size": batch_size}
            smooth.certify(black, n0=n0, n=n, **options)
            draws = recorder.noise()
            smooth.predict(black, n=n, **options)
            runs.append((*draws.split([n0, n]), recorder.noise()))
        for short, long in zip(*runs, strict=True):
            assert torch.equal(short, long[: len(short)])
        drawn.extend(runs[1])
    drawn = torch.cat(drawn)
    # Two numbers agree by chance with odds of 0.0011, eight with another eight with 1e-17 overall.
    assert len(drawn[:, :8].unique(dim=0)) == len(drawn) == 4 * 750


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_noise_is_standard_normal_and_independent(sigma):
    # Every statistic below is N(0, 1), all but exactly: rounding moves it by 0.03 at most. Six
    # deviations have odds of 2e-9, and there are 700 of them with the correlations: 1.4e-6.
    # Kolmogorov-Smirnov: 1e-6, or less because the numbers are whole.
    recorder = Recorder()
    images = torch.zeros(6, 1, 28, 28)
    SmoothClassifier(recorder, sigma, 2).certify(images, n0=128, n=5 * 128)
    z = recorder.noise(sigma).double()
    assert z.shape == (6 * 6 * 128, 784)
    size = z.numel() ** 0.5
    moments = [z.mean(), (z**2 - 1).mean() / 2**0.5, (z**3).mean() / 15**0.5]
    moments += [((z**4) - 3).mean() / 96**0.5]
    # Neighbouring pixels, and neighbouring draws.
    moments += [(z[:, 1:] * z[:, :-1]).mean(), (z[1:] * z[:-1]).mean()]
    assert all(abs(m) * size < 6 for m in moments)
    # 36 parts: two stages of six images.
    parts = z.reshape(36, -1)
    correlations = torch.corrcoef(parts).fill_diagonal_(0)
    assert correlations.abs().max() * parts.shape[1] ** 0.5 < 6
    # Between two steps the chance of a smaller number is that of the noise before rounding.
    steps, counts = (z * (255 * sigma)).round().unique(return_counts=True)
    assert (steps - z.flatten().unique() * (255 * sigma)).abs().max() < 0.01
    below = counts.cumsum(0).numpy() / z.numel()
    gap = abs(below - norm.cdf((steps.numpy() + 0.5) / (255 * sigma))).max()
    assert kstwobign.sf(gap * size) > 1e-6


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_forward_adds_one_draw_of_global_noise_to_each_image(sigma, training):
    base = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784)).train(training)
    smooth, images = SmoothClassifier(base, sigma), images_of(500)
    torch.manual_seed(5)
    noise = torch.randn_like(images)
    torch.manual_seed(5)
    logits = smooth(images)
    assert torch.equal(logits, base(images + sigma * noise))
    assert [module.training for module in base.modules()] == [training] * 3
    # Fresh draws, unclipped, of deviation sigma: 392,000 of them, six deviations, 2e-9.
    recorder = Recorder()
    SmoothClassifier(recorder, sigma)(images)
    z = recorder.noise(checks=0) / sigma - images.flatten(1) / sigma
    assert abs((z**2).mean() - 1) < 6 * (2 / z.numel()) ** 0.5
    assert not torch.equal(z, noise.flatten(1))
    logits.sum().backward()
    assert base[1].bias.grad is not None


# --- Both radii, and certificates of one radius ---------------------------------------------


def test_both_radii_follow_from_the_same_votes(network):
    smooth = SmoothClassifier(network, 1.0)
    images = (images_of(20) * 255).round() / 255
    certificate = smooth.certify(images, n0=50, n=1000, alpha=0.01)
    top, rival = votes_of(certificate)
    assert ((rival > 0) & (top + rival < 1000)).any()
    test = np.array([ONE_SIDED, TWO_SIDED])[certificate.test.numpy() - 1]
    alpha = 0.01 - smooth.sampler_cost(784, 1050)
    plain = certified_radius(lower_confidence_bound(top, 1000, alpha), 1.0)
    tight = tight_radius(test, top, rival, 1000, alpha, 1.0)
    stands = certificate.prediction.numpy() != ABSTAIN
    assert np.array_equal(certificate.radius.numpy(), np.where(stands, plain, 0))
    assert np.array_equal(certificate.radius_tight.numpy(), np.where(stands, tight, 0))


def certificate_of(first, counts, alpha=0.001, distance=0.0):
    """The entries of the certificate that these votes give, at sigma = 0.5."""
    smooth = SmoothClassifier(Recorder(), 0.5, len(first))
    entries = smooth._certificate(
        np.array(first), np.array(counts), sum(first), 100_000, alpha, distance
    )
    return dict(zip(Certificate._fields, entries, strict=True))


def test_the_first_votes_choose_class_and_test_whatever_the_fresh_ones_are():
    fresh = [80_000, 15_000, 5000]
    two, one = certificate_of([90, 5, 5], fresh), certificate_of([100, 0, 0], fresh)
    assert (one["test"], two["test"]) == (1, 2)
    assert one["radius"] == two["radius"] == one["radius_tight"]
    assert two["radius_tight"] == tight_radius(TWO_SIDED, 80_000, 15_000, 100_000, 0.001, 0.5)
    assert two["radius_tight"] == pytest.approx(0.9236 / 2, abs=5e-5)
    # Class 1 has hardly any of the fresh votes, and nothing else may be claimed in its place.
    lost = certificate_of([5, 90, 5], fresh)
    assert (lost["prediction"], lost["top_count"], lost["rival_count"]) == (ABSTAIN, 15_000, 80_000)
    # Where CERTIFY abstains, the two-sided radius is 0 too, which would be 0.17 here.
    assert tight_radius(TWO_SIDED, 45_000, 20_000, 100_000, 0.001, 0.5) > 0.17
    most = certificate_of([45, 20, 20, 15], [45_000, 20_000, 20_000, 15_000])
    assert (most["prediction"], most["radius_tight"], most["test"]) == (ABSTAIN, 0, 2)


def test_the_distance_of_the_point_that_was_voted_on_is_taken_off_both_radii():
    votes = [90, 5, 5], [80_000, 15_000, 5000]
    near, far = certificate_of(*votes), certificate_of(*votes, distance=0.1)
    for field in ("radius", "radius_tight"):
        exact = Fraction(near[field]) - Fraction(0.1)
        assert 0 <= exact - Fraction(far[field]) < Fraction(1, 2**50)
    # Nothing is left of CERTIFY's radius, 0.4138.
    gone = certificate_of(*votes, distance=0.42)
    assert (gone["prediction"], gone["radius"], gone["radius_tight"]) == (ABSTAIN, 0, 0)


def test_what_the_sampler_costs_comes_out_of_alpha(monkeypatch):
    asked = []

    def cost(self, pixels, draws):
        asked.append((pixels, draws))
        return 0.0004

    image, smooth = images_of(1)[0], SmoothClassifier(FirstPixel(0.9), 0.5, 3)
    plain = smooth.certify(image, n=1000, alpha=0.001)
    monkeypatch.setattr(SmoothClassifier, "sampler_cost", cost)
    paid = smooth.certify(image, n0=100, n=1000, alpha=0.001)
    assert set(asked) == {(784, 1100)}
    assert paid.top_count == plain.top_count
    assert paid.p_lower == lower_confidence_bound(int(paid.top_count), 1000, 0.0006)
    assert paid.radius < plain.radius
    assert paid.radius_tight < plain.radius_tight
    calls = (smooth.certify, smooth.predict, lambda x, alpha: smooth.certify_radius(x, 0.1, alpha))
    for call in calls:
        with pytest.raises(ValueError, match=r"'alpha' = 0\.0004 does not cover the 0\.0004"):
            call(image, alpha=0.0004)


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9, 0.99, 0.9999])
def test_one_radius_takes_few_draws_which_are_those_of_certify(p):
    # Radius 1 at sigma = 1 takes a probability above 0.8413. Class 0 has p, class 1 the rest, and
    # whichever of them has more is selected. A false certificate has odds of alpha = 1e-3 an
    # image; the draws are seeded.
    smooth, images = SmoothClassifier(FirstPixel(p), 1.0, 3), GREY.expand(4, -1, -1, -1)
    found = smooth.certify_radius(images, 1.0, n0=100, max_n=30_000)
    p0, alpha = required_probability(1.0, 1.0), 0.001 - smooth.sampler_cost(784, 30_100)
    looks = look_schedule(30_000, p0, alpha)
    assert found.certified.all() if p > p0 else not found.certified.any()
    # 2,000 draws or fewer settle every one of these, of 30,000.
    assert found.samples.max() <= 100 + 2000
    for index, (certified, top, samples) in enumerate(zip(*found, strict=True)):
        look = int(samples) - 100
        options = {"n0": 100, "indices": [index], "alpha": 0.5}
        votes = smooth.certify(images[index], n=look, **options)
        if votes.prediction != ABSTAIN:
            assert votes.prediction == top
        decision = mixture_decision(int(votes.top_count), look, p0, alpha, looks)
        assert decision == (CERTIFY if certified else REJECT)


@pytest.mark.parametrize("radius", [3.6, 3.98, 4.5])
def test_a_radius_beyond_the_reach_of_any_draws_is_named(radius):
    smooth = SmoothClassifier(Recorder(), 0.5, 2)
    with pytest.raises(ValueError, match="'radius'") as error:
        smooth.certify_radius(GREY, radius)
    assert "p0" not in str(error.value)
    assert not smooth.base_classifier.batches
