"""The noise: its generator, its law, its fields, and the same bits everywhere."""

import itertools
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from src.certification import bounds, stopping
from src.engine import exact_native, noise
from src.engine.exact import ExactConvNN
from src.engine.lattice import LEVELS, law, limit
from src.engine.native import compiled
from src.engine.noise import STAGES, Noise, philox, sampler_cost, to_grid
from src.engine.votes import NoisyImage, Workers
from src.models import ABSTAIN, ConvNN, SmoothClassifier
from tests.engine.test_lattice import masses


def through_torch(of, steps, stage, first, count):
    """The copies as they are drawn without a compiler."""
    drawn = of._draw(stage, first, count, steps.numel(), steps.device)
    cut = limit(of.levels)
    return (steps.flatten() + drawn).clamp(-cut, cut).int().view(count, *steps.shape)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (2**32 - 1,) * 4,
            2**64 - 1,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    # The known answers of Random123 (Salmon et al.).
    words = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_stored_answers_are_those_of_torch(monkeypatch):
    # `exact_library` compares a compiled library with them before it is used.
    monkeypatch.setattr(exact_native, "NativeExact", through_torch_network)
    monkeypatch.setattr(
        exact_native,
        "draw_copies",
        lambda _, steps, of, stage, first, count: through_torch(
            Noise(of.seed, of.index, of.sigma), steps, stage_name(stage), first, count
        ),
    )
    assert exact_native._answers(None) == exact_native.ANSWERS


def stage_name(number):
    return next(name for name, value in STAGES.items() if value == number)


class through_torch_network:
    """A made-up network in place of `NativeExact`, through torch."""

    def __init__(self, made_up, _):
        hidden = 16 if made_up.layers == 4 else None
        self.form = ExactConvNN(ConvNN((16, 32), hidden, made_up.num_classes).eval())
        self.form.pixels = made_up.pixels
        for number in range(1, made_up.layers + 1):
            names = ("kernel", "bias", "scale")
            for name, values in zip(names, made_up.layer(number), strict=False):
                setattr(self.form, f"{name}{number}", values)

    def logits(self, steps):
        return self.form.logits(steps).int()

    def votes(self, steps, of, stage, first, count):
        copies = through_torch(
            Noise(of.seed, of.index, of.sigma), steps, stage_name(stage), first, count
        )
        return self.form.classes(copies).bincount(minlength=3).numpy()


def test_a_library_with_wrong_answers_is_not_used(monkeypatch):
    monkeypatch.setattr(exact_native, "ANSWERS", "0" * 64)
    if compiled("exact.c") is None:
        pytest.skip("needs a C compiler")
    with pytest.warns(UserWarning, match=r"wrong answers"):
        assert exact_native.exact_library("-DUNUSED") is None


@pytest.mark.parametrize("flags", [(), ("-mno-avx512f",), ("-mno-avx", "-mno-avx2")])
@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 255), (3.0, 255), (0.1, 4080)])
def test_c_and_torch_draw_the_same_bits(flags, sigma, levels):
    library = exact_native.exact_library(*flags)
    if library is None:
        pytest.skip("needs a C compiler")
    for pixels, index, seed in ((1, 0, 0), (70, 2**32 - 1, 2**64 - 1), (3 * 32 * 32, 5, 2**40)):
        steps = (torch.arange(pixels) * 71 % (levels + 1)).int()
        of = Noise(seed, index, sigma, levels)
        for stage, first in product(STAGES, (0, 2**32 - 40)):
            drawn = exact_native.draw_copies(library, steps, of, STAGES[stage], first, 40)
            assert torch.equal(drawn, through_torch(of, steps, stage, first, 40))


def test_64_bits_decide_where_32_do_not():
    # At this copy one of 784 numbers stands exactly at its threshold (odds 1 in 2**21 each).
    of = Noise(2**63 + 5, 2**31 + 7, 0.25)
    whole = of._draw("estimate", 2787, 1, 784, torch.device("cpu"))
    seen = []

    class Counting(Noise):
        def _numbers(self, blocks, copies, last):
            seen.append(last)
            return super()._numbers(blocks, copies, last)

    assert torch.equal(Counting(*of)._draw("estimate", 2787, 1, 784, torch.device("cpu")), whole)
    assert seen == [STAGES["estimate"], STAGES["estimate"] + noise.REFINE]


@pytest.mark.parametrize("sigma", [0.12, 0.5, 2.5])
def test_frequencies_are_those_of_the_law(sigma):
    # False alarm: 1 in 1,000 per sigma, and the seed is fixed.
    table, found = law(sigma), np.array(masses(law(sigma)), dtype=object)
    drawn = Noise(11, 3, sigma)._draw("estimate", 0, 500, 784, torch.device("cpu")).numpy().ravel()
    expected = np.array([float(mass) / 2**64 for mass in found]) * len(drawn)
    counts = np.bincount(drawn - table.lowest, minlength=len(expected))
    often = expected > 20
    seen = np.append(counts[often], counts[~often].sum())
    hoped = np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(seen, hoped * (seen.sum() / hoped.sum())).pvalue > 0.001


@pytest.mark.parametrize(
    "shift", [(0, 1), (0, 64), (1, 0)], ids=["next pixel", "next group", "next copy"]
)
def test_neighbours_are_independent(shift):
    # False alarm: 1 in 1,000 each. Correlations of both the noise and its size.
    drawn = Noise(0, 0, 0.5)._draw("select", 0, 400, 784, torch.device("cpu")).double()
    rows, columns = shift
    for values in (drawn, drawn.abs()):
        values = values - values.mean()
        first = values[: 400 - rows, : 784 - columns].flatten()
        second = values[rows:, columns:].flatten()
        z = (first * second).mean() / values.square().mean() * len(first) ** 0.5
        assert abs(z) < 3.3


def test_no_two_counters_of_a_data_set_are_equal(monkeypatch):
    # Every number is a function of (key, counter), so equal noise needs equal counters.
    seen = []

    def record(counter, seed):
        fields = torch.stack(counter, -1).flatten(0, -2)
        assert fields.min() >= 0
        assert fields.max() < 2**32
        seen.append(torch.cat([torch.full((len(fields), 1), seed), fields], 1))
        # Every number at its threshold: so the second halves are drawn too.
        return [torch.zeros_like(field) for field in counter]

    monkeypatch.setattr(noise, "philox", record)
    entries = torch.zeros(2 ** law(0.5).bits, dtype=torch.int64)
    monkeypatch.setattr(noise, "_tables_on", lambda *_: (entries, entries))
    for seed, index, stage in product((0, 5, 5 + 2**32), (0, 7, 37, 5576, 2**32 - 1), STAGES):
        for first in (0, 40, 2**32 - 3):
            Noise(seed, index, 0.5)._draw(stage, first, 3, 784, torch.device("cpu"))
    counters = torch.cat(seen)
    # 3 seeds, 5 images, 3 stages, 9 copies, 208 blocks, both halves of the 64 bits.
    assert len(counters) == 3 * 5 * 3 * 9 * 208 * 2
    assert len(counters.unique(dim=0)) == len(counters)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 37), (0, 5576)),
        ((5, 7), (5 + 7 * 2**32, 7)),
        ((5, 7), (5 + 2**32, 7)),
        ((0, 0), (2**63, 0)),
        ((0, 1), (1, 0)),
        ((0, 0), (0, 2**31)),
    ],
)
def test_no_two_images_or_seeds_share_noise(one, other):
    first, second = (
        Noise(*of, 0.5)._draw("estimate", 0, 200, 784, torch.device("cpu")).double()
        for of in (one, other)
    )
    # Equal values by chance, of independent draws; false alarm: 1 in 15,000 each.
    odds = sum(Fraction(mass, 2**64) ** 2 for mass in masses(law(0.5)))
    equal, n = (first == second).sum().item(), first.numel()
    assert abs(equal - n * odds) < 4 * (n * odds) ** 0.5
    z = (first * second).mean() / first.square().mean() * n**0.5
    assert abs(z) < 4


@pytest.mark.parametrize(
    "arguments",
    [{"seed": 2**64}, {"seed": -1}, {"indices": [2**32]}, {"indices": [-1]}, {"seed": 0.5}],
)
def test_numbers_that_do_not_fit_their_field_are_refused(arguments):
    smooth = SmoothClassifier(ConvNN(), 0.5)
    for call in (smooth.certify, smooth.predict):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            call(torch.zeros(1, 1, 28, 28), n=100, **arguments)


@pytest.mark.parametrize("name", ["n0", "n", "max_n"])
def test_more_copies_than_their_field_holds_are_refused(name, monkeypatch):
    # Copy 2**32 would be copy 0 again, at a cost of the sampler that alpha = 0.01 covers.
    smooth, image = SmoothClassifier(ConvNN().eval(), 0.5), torch.zeros(1, 28, 28)
    assert smooth.sampler_cost(784, 2**32 + 1) < 0.01
    monkeypatch.setattr(NoisyImage, "votes", lambda *_: pytest.fail("copies were drawn"))
    calls = [smooth.certify_radius] if name == "max_n" else [smooth.certify]
    options = {"radius": 0.1} if name == "max_n" else {}
    calls += [smooth.predict] if name == "n" else []
    for call in calls:
        with pytest.raises(ValueError, match=rf"'{name}' = 4294967297 .*2\*\*32"):
            call(image, **options, alpha=0.01, **{name: 2**32 + 1})
    assert noise.checked_copies(n0=1, n=2**32) == [1, 2**32]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64, torch.tensor])
def test_whole_numbers_of_any_type_count_as_what_they_are(kind):
    smooth, images = SmoothClassifier(ConvNN().eval(), 0.5), torch.zeros(2, 1, 28, 28)
    expected = smooth.certify(images, 90, 120, seed=200, indices=[3, 4])
    given = {"seed": kind(200), "indices": [kind(3), kind(4)]}
    found = smooth.certify(images, kind(90), kind(120), **given)
    assert all(map(torch.equal, found, expected))
    decided = smooth.certify_radius(images, 0.1, n0=kind(90), max_n=kind(120), seed=kind(200))
    again = smooth.certify_radius(images, 0.1, n0=90, max_n=120, seed=200)
    assert all(map(torch.equal, decided, again))


def test_many_large_images_need_no_more_memory_than_a_few(monkeypatch):
    # Float64 of all of them at once would be five times what is given.
    images, seen = torch.rand(40, 3, 128, 128), []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda t: seen.append(t.numel()) or double(t))
    steps, distances = to_grid(images)
    assert max(seen) <= 2**20 < images.numel()
    monkeypatch.undo()
    assert torch.equal(steps, (images.double() * 255).round().int())
    assert distances == [to_grid(image[None])[1][0] for image in images]
    assert to_grid(images[:0])[0].shape == (0, 3, 128, 128)


def test_the_number_of_tasks_does_not_grow_with_the_copies():
    # Each keeps some memory until the last one ends.
    sizes = []

    def cast(steps, of, stage, first, count):
        sizes.append((first, count))
        return count

    image = NoisyImage(cast, torch.zeros(1, 28, 28, dtype=torch.int32), Noise(0, 0, 0.5))
    for n in (1, 100, 100_000, 10**9 + 1):
        sizes.clear()
        assert image.votes("estimate", n, Workers(map, 2)) == n
        assert len(sizes) <= 10_100
        assert all(a + b == c for (a, b), (c, _) in itertools.pairwise(sizes))


def test_the_sampler_is_paid_out_of_alpha():
    n0, n, alpha = 10, 1000, 0.01
    cost = sampler_cost(0.5, 784, n0 + n)
    assert 784 * (n0 + n) * law(0.5).distance <= cost < 1e-9
    smooth = SmoothClassifier(ConvNN().eval(), 0.5)
    assert smooth.sampler_cost(784, n0 + n) == cost
    certificate = smooth.certify(torch.zeros(1, 28, 28), n0, n, alpha)
    paid = bounds.lower_confidence_bound(certificate.top_count.item(), n, alpha - cost)
    assert certificate.p_lower == paid < bounds.lower_confidence_bound(n, n, alpha)
    with pytest.raises(ValueError, match="alpha"):
        smooth.certify(torch.zeros(1, 28, 28), n0, n, 1e-12)


def test_float32_multiples_of_the_grid_lie_on_it():
    greys = torch.arange(256)
    for images in (greys.float() / 255, greys.double() / 255, (greys / 255).to(torch.bfloat16)):
        exact = images.double() * 255
        steps, distances = to_grid(images.view(256, 1, 1, 1))
        assert torch.equal(steps.flatten(), exact.round().int())
        if images.dtype != torch.bfloat16:
            assert steps.flatten().tolist() == greys.tolist()
            assert distances == [0.0] * 256


def test_an_image_off_the_grid_loses_its_distance():
    network = ConvNN().eval()
    # All votes are for one class.
    torch.nn.init.constant_(network.output.bias[3:4], 100.0)
    smooth = SmoothClassifier(network, 0.5)
    on, off = torch.full((1, 28, 28), 128 / 255), torch.full((1, 28, 28), 0.5)
    near, far = (smooth.certify(image, n=2000) for image in (on, off))
    distance = 28 * 0.5 / 255
    assert far.prediction == near.prediction != ABSTAIN
    for name in ("radius", "radius_tight"):
        lost = getattr(near, name) - getattr(far, name)
        assert distance <= lost < distance * (1 + 1e-6)
    # The anytime rule loses it too. The largest radius that 4,000 copies certify:
    most = float(bounds.maximum_radius(0.5, 4000, stopping.LAST_SHARE * 0.001)) - 1e-6
    assert smooth.certify_radius(on, most, max_n=4000).certified
    assert smooth.certify_radius(off, most - distance * 1.01, max_n=4000).certified
    assert not smooth.certify_radius(off, most - distance * 0.99, max_n=4000).certified
    # A finer grid holds 1/2.
    finer = SmoothClassifier(network, 0.5, precision="float32", levels=510)
    assert to_grid(off[None], 510)[1] == [0.0]
    assert finer.certify(off, n=2000).radius > 0


class LowBits(nn.Module):
    """Class 1 if every noisy pixel is a multiple of 2**-28 or at least 2**-8, as in a float."""

    def forward(self, images):
        whole = (images.double() * 2**28) % 1 == 0
        inside = (whole | (images.abs() >= 2**-8)).flatten(1).all(1)
        return torch.stack([~inside, inside], 1).float()


def test_no_contradiction_from_low_bits_of_floats():
    # Float noise gave class 0 within 1.14 of black and class 1 within 1.70 of grey, 0.988 apart.
    smooth = SmoothClassifier(LowBits(), 0.5, num_classes=2)
    images = torch.stack([torch.zeros(1, 28, 28), torch.full((1, 28, 28), 0.0353)])
    certificate = smooth.certify(images, n=20_000)
    apart = (images[1] - images[0]).norm().double()
    if certificate.prediction[0] != certificate.prediction[1]:
        assert certificate.radius.sum() <= apart
    assert certificate.prediction.tolist() == [1, 1]


@pytest.mark.parametrize("hidden", [None, 24])
def test_votes_are_the_same_in_every_batch_order_thread_and_without_a_compiler(hidden, monkeypatch):
    torch.manual_seed(3)
    network = ConvNN((8, 20), hidden).eval()
    images = (torch.rand(4, 1, 28, 28) * 255).round() / 255
    smooth = SmoothClassifier(network, 0.7)
    assert smooth.exact
    options = {"n0": 50, "n": 700, "seed": 2**50}
    expected = smooth.certify(images, **options)
    threads = torch.get_num_threads()

    def rows(certificate):
        return b"".join(field.numpy().tobytes() for field in certificate)

    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert rows(smooth.certify(images, **options, batch_size=number)) == rows(expected)
    finally:
        torch.set_num_threads(threads)
    order = [2, 0, 3]
    some = smooth.certify(images[order], **options, indices=order)
    assert rows(some) == rows(type(expected)(*(field[order] for field in expected)))
    one = smooth.certify(images[1], **options, indices=[1])
    assert rows(one) == rows(type(expected)(*(field[1] for field in expected)))
    each = list(smooth.certify_each(images, **options))
    assert rows(type(expected)(*map(torch.stack, zip(*each, strict=True)))) == rows(expected)
    with monkeypatch.context() as context:
        for module in ("src.engine.noise", "src.engine.forms"):
            context.setattr(f"{module}.exact_library", lambda *_: None)
        assert rows(smooth.certify(images, **options)) == rows(expected)


def test_float_networks_vote_on_the_same_noise():
    # A threshold on the sum of all pixels, in whole steps: exact in floats.
    class Sum(nn.Module):
        def forward(self, images):
            total = (images * LEVELS).round().double().flatten(1).sum(1)
            return torch.stack([total, 300 - total], 1).float()

    steps = (torch.arange(3 * 5 * 7) % 7).int().view(3, 5, 7)
    smooth = SmoothClassifier(Sum(), 0.2, num_classes=2)
    found = smooth.certify(steps.float() / LEVELS, n0=20, n=500, seed=9, indices=[4])
    copies = Noise(9, 4, 0.2).copies(steps, "estimate", 0, 500)
    high = (copies.flatten(1).sum(1) >= 150).sum().item()
    assert found.top_count in (high, 500 - high)
    assert found.top_count + found.rival_count == 500
