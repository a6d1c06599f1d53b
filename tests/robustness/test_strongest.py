"""Strong attacks: the ball as stored, known optima, what each can do that PGD cannot."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import pgd_attack
from src.checkpoints import load_checkpoint
from src.engine.parts import apply_thresholds
from src.models import ConvNN
from src.robustness.apgd import apgd_attack
from src.robustness.square import square_attack
from src.robustness.strongest import hits_by_stage, strongest_attack, strongest_attack_stages
from src.robustness.thresholds import nearest_pixels, thresholds_attack
from src.utils import load_mnist, subset
from tests.attack_helpers import (
    Linear,
    Scaled,
    best_l2_change,
    equal,
    length,
    margin,
    mixed_modes,
    random_batch,
    snapshot,
    trained_network,
    wrong,
)

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = (0.4, 0.6)
BRIEF = {"steps": 3, "restarts": 2, "targets": 2, "queries": 10}
ATTACKS = {
    "apgd": partial(apgd_attack, steps=5, restarts=2),
    "outside": partial(apgd_attack, steps=3, shrinks=4),
    "dlr": partial(apgd_attack, steps=5, loss="dlr", targets=2),
    "ramp": partial(thresholds_attack, steps=5, restarts=2),
    "square": partial(square_attack, queries=20),
    "strongest": partial(strongest_attack, **BRIEF),
}
BALLS = [("linf", 0.1), ("linf", 0.45), ("l2", 1.0), ("l2", 4.0)]


class RampedLinear(Linear):
    """A linear network behind thresholds: what can be reached there is known."""

    def __init__(self, classes=2, scale=1.0, seed=0, thresholds=THRESHOLDS):
        super().__init__(classes, scale, seed)
        self.thresholds = thresholds

    def forward(self, images):
        return super().forward(apply_thresholds(images, self.thresholds))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Tensors are small here: on a busy machine two threads mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained():
    model, images, labels = trained_network()
    return model, images[:100], labels[:100]


# --- The contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["noise", "binary", "tiny"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.3), ("linf", 1e-4), *BALLS[2:]])
@pytest.mark.parametrize("attack", ATTACKS)
def test_results_lie_in_the_ball_and_in_the_box_as_stored(attack, norm, epsilon, kind, dtype):
    images, labels = random_batch(3)
    images = {"noise": images, "binary": images.round(), "tiny": images * 1e-6}[kind].to(dtype)
    attacked = ATTACKS[attack](RampedLinear(10), images, labels, epsilon, norm)
    assert (attacked.dtype, attacked.shape) == (dtype, images.shape)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    for change in (attacked - images, attacked.double() - images.double()):
        assert all(value <= epsilon for value in length(change, norm).tolist())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_radius_no_image_and_a_narrow_range(attack, norm):
    images, labels = random_batch(3)
    model, attack = RampedLinear(10), ATTACKS[attack]
    attacked = attack(model, images, labels, 0, norm)
    assert torch.equal(attacked, images)
    assert attacked.data_ptr() != images.data_ptr()
    assert len(attack(model, images[:0], labels[:0], 0.1, norm)) == 0
    assert attack(model, images / 2, labels, 0.9, norm, clip=(0.0, 0.5)).max() <= 0.5


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_model_the_images_and_the_generator_stay_as_they_were(attack, norm, context):
    torch.manual_seed(0)
    model = ConvNN((2, 4), thresholds=THRESHOLDS)
    mixed_modes(model)
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 7.0)
    with context():
        images, labels = random_batch(4)
        kept, before = images.clone(), snapshot(model)
        attacked = ATTACKS[attack](model, images, labels, 0.3, norm)
        assert equal(snapshot(model), before)
        assert model.thresholds == list(THRESHOLDS)
        assert torch.equal(images, kept)
    assert not attacked.requires_grad


@pytest.mark.parametrize("attack", ATTACKS)
def test_misclassified_images_are_left_alone(attack):
    images, labels = random_batch(20, classes=5)
    model = RampedLinear(5)
    attacked = ATTACKS[attack](model, images, labels, 0.3)
    broken = wrong(model, images, labels)
    assert 0 < broken.sum() < 20
    assert torch.equal(attacked[broken], images[broken])
    assert not torch.equal(attacked, images)


def test_misclassified_images_come_back_bit_for_bit_behind_wide_thresholds():
    # Between these the way to the ramp and back rounds.
    images, labels = random_batch(20, classes=5)
    model = RampedLinear(5, thresholds=(0.1, 0.9))
    attacked = thresholds_attack(model, images, labels, 0.3, steps=5)
    broken = wrong(model, images, labels)
    assert 0 < broken.sum() < 20
    assert torch.equal(attacked[broken], images[broken])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_only_the_generator_changes_the_result(trained, attack, norm):
    images, labels = trained[1:]
    epsilon = {"linf": 0.01, "l2": 0.2}[norm]
    model = ConvNN((2, 4), thresholds=THRESHOLDS)
    labels = model(images).argmax(dim=1)

    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return ATTACKS[attack](model, images, labels, epsilon, norm, generator=generator)

    first = [run(seed) for seed in (None, 1)]
    torch.manual_seed(123)
    assert equal([run(seed) for seed in (None, 1)], first)
    # From several starts Auto-PGD may find the same best point; random squares never do.
    if attack == "square":
        assert not torch.equal(*first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -1.0),
        ("norm", "l1"),
        ("steps", 0),
        ("restarts", 0),
        ("targets", -1),
        ("patience", 0),
        ("shrinks", -1),
        ("loss", "hinge"),
        ("clip", (0.5, 0.4)),
        ("labels", torch.full((5,), 10)),
    ],
)
@pytest.mark.parametrize("attack", [apgd_attack, thresholds_attack])
def test_bad_arguments_are_named(attack, name, value):
    images, labels = random_batch(5)
    arguments = {"images": images, "labels": labels, "epsilon": 0.1, name: value}
    with pytest.raises(ValueError, match=f"'{name}'"):
        attack(RampedLinear(10), **arguments)


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("name", ["steps", "restarts", "targets", "queries"])
def test_the_strongest_attack_names_bad_arguments_before_it_begins(name, count):
    images, labels = random_batch(count)
    stages = strongest_attack_stages(Linear(10), images, labels, 0.1, **{name: "100"})
    with pytest.raises(ValueError, match=f"'{name}'"):
        next(stages)


class AlwaysCut(Linear):
    """Cuts at its thresholds whatever the attribute says."""

    thresholds = THRESHOLDS

    def forward(self, images):
        return super().forward(apply_thresholds(images, THRESHOLDS))


def test_thresholds_that_stay_are_seen_on_images_of_black_and_white_too():
    # On pixels that are 0 and 1 already, to cut once more changes nothing.
    images, labels = random_batch(5)
    images = images.round()
    with pytest.raises(ValueError, match="'model' does not apply its thresholds"):
        thresholds_attack(AlwaysCut(10), images, labels, 0.1)
    with pytest.warns(UserWarning, match="thresholds that cannot be taken away"):
        stages = dict(strongest_attack_stages(AlwaysCut(10), images, labels, 0.1, **BRIEF))
    assert "apgd margin" in stages
    assert "thresholds apgd margin" not in stages


def test_behind_thresholds_a_network_in_float64_is_asked_in_its_own_precision():
    images, labels = random_batch(5)
    torch.manual_seed(0)
    model = Ramped(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double())
    stages = dict(strongest_attack_stages(model, images, labels, 0.1, **BRIEF))
    assert "thresholds apgd margin" in stages


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_default_device_for_new_tensors_changes_nothing(attack, norm):
    images, labels = random_batch(5)
    model = RampedLinear(10)
    expected = ATTACKS[attack](model, images, labels, 0.1, norm)
    # A stand-in for CUDA: every tensor that is made without a device would land there.
    with torch.device("meta"):
        found = ATTACKS[attack](model, images, labels, 0.1, norm)
    assert torch.equal(found, expected)


def test_no_queries_are_refused():
    with pytest.raises(ValueError, match="'queries'"):
        square_attack(Linear(10), *random_batch(5), 0.1, queries=0)


def test_losses_that_need_more_classes_and_models_without_a_ramp_are_refused():
    images, labels = random_batch(3, classes=2)
    for classes, targets in ((2, 0), (3, 1)):
        with pytest.raises(ValueError, match="'dlr'"):
            apgd_attack(Linear(classes), images, labels, 0.1, loss="dlr", targets=targets)
    with pytest.raises(ValueError, match="'model'"):
        thresholds_attack(Linear(2), images, labels, 0.1)
    deeper = nn.Sequential(RampedLinear())
    deeper.thresholds = THRESHOLDS
    with pytest.raises(ValueError, match="'model'"):
        thresholds_attack(deeper, images, labels, 0.1)


# --- Known answers --------------------------------------------------------------------------


def far_from_the_border(kind_of_model, kind_of_images, dtype=torch.float32):
    """A model, images and labels of which none falls on the way, and the direction that harms."""
    model, images = kind_of_model(scale=0.02), random_batch(20)[0].to(dtype)
    labels = torch.ones(20, dtype=torch.int64)
    model.bias.data = torch.tensor([0.0, 25.0])
    away = (model.weight[:, 1 - labels] - model.weight[:, labels]).T.detach()
    return model, images.round() if kind_of_images == "binary" else images, labels, away


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(("norm", "epsilon"), BALLS)
@pytest.mark.parametrize("shrinks", [0, 4])
def test_apgd_reaches_the_optimum_of_a_linear_model(shrinks, norm, epsilon, loss):
    # In float64, where the cross-entropy of such margins still has a gradient.
    model, images, labels, away = far_from_the_border(Linear, "binary", torch.float64)
    flat = images.flatten(1)
    if norm == "linf":
        change = (flat + epsilon * away.sign()).clamp(0, 1) - flat
    else:
        change = best_l2_change(flat, away, epsilon)
    gain = (away * change).sum(dim=1).double()
    attacked = apgd_attack(model, images, labels, epsilon, norm, loss=loss, shrinks=shrinks)
    reached = margin(model, images, labels) - margin(model, attacked, labels)
    assert (reached <= gain + 1e-4).all()
    assert (reached >= gain * (1 - 1e-3) - 1e-4).all()


def best_behind_ramp(images, away, epsilon, norm, low=THRESHOLDS[0], high=THRESHOLDS[1]):
    """Least upper bound known for away * (change of ramp(x)): exact in linf, by duality in l2."""
    images, away = images.flatten(1).double(), away.double()
    start, width = ((images - low) / (high - low)).clamp(0, 1), high - low
    if norm == "linf":
        ends = ((images + epsilon * away.sign()).clamp(0, 1) - low) / width
        return (away * (ends.clamp(0, 1) - start)).sum(dim=1)
    bounds = []
    for price in torch.logspace(-6, 3, 2000, dtype=torch.float64):
        # On the ramp the gain less its price is concave: the best point there, or none.
        best = ((images + away / (2 * price * width) - low) / width).clamp(0, 1)
        pixels = torch.where(best > 0, low + width * best, images.clamp(max=low))
        pixels = torch.where(best < 1, pixels, images.clamp(min=high))
        net = away * (best - start) - price * (pixels - images) ** 2
        bounds.append(net.clamp(min=0).sum(dim=1) + price * epsilon**2)
    return torch.stack(bounds).amin(dim=0)


@pytest.mark.parametrize("kind", ["binary", "noise"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.45), *BALLS])
def test_ramp_attack_reaches_the_optimum_of_a_linear_model_behind_a_ramp(norm, epsilon, kind):
    model, images, labels, away = far_from_the_border(RampedLinear, kind)
    best = best_behind_ramp(images, away, epsilon, norm)
    attacked = thresholds_attack(model, images, labels, epsilon, norm, steps=40)
    reached = margin(model, images, labels) - margin(model, attacked, labels)
    assert (reached <= best + 1e-4).all()
    if norm == "linf":
        assert (reached >= best - 1e-4).all()
    else:
        # Whole pixels have to be bought: some of the bound is out of reach for anyone.
        assert (reached >= 0.94 * best).all()


def test_nearest_pixels_are_those_that_the_ramp_takes_to_the_points():
    images, points = random_batch(50)[0], random_batch(50, seed=1)[0]
    points = torch.where(points < 0.3, 0.0, torch.where(points > 0.7, 1.0, points))
    found = nearest_pixels(images, points, THRESHOLDS)
    torch.testing.assert_close(apply_thresholds(found, THRESHOLDS), points, rtol=0, atol=1e-6)
    # Whatever other pixel gives the same point is no nearer.
    for other in torch.linspace(0, 1, 101):
        same = apply_thresholds(other, THRESHOLDS) == points
        assert ((other - images).abs() >= (found - images).abs() - 1e-6)[same].all()


def test_targets_are_approached_one_after_the_other():
    # Up to 9 targets each reach their own corner; the best of them is the global optimum, which
    # the largest other logit alone can miss.
    model = Linear(10, scale=0.02)
    images, _ = random_batch(30)
    model.bias.data *= 0
    labels = model(images).argmax(dim=1)
    own = 20 * nn.functional.one_hot(labels, 10)
    model.forward = lambda images, forward=model.forward: forward(images) + own
    weight, flat = model.weight.detach(), images.flatten(1)
    margins = []
    for target in range(10):
        away = (weight[:, [target] * 30] - weight[:, labels]).T
        corner = (flat + 0.2 * away.sign()).clamp(0, 1).view_as(images)
        margins.append(margin(model, corner, labels))
    best = torch.stack(margins).amin(dim=0)
    reached = margin(model, apgd_attack(model, images, labels, 0.2, steps=20, targets=9), labels)
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-4)


# --- Strength -------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [apgd_attack, thresholds_attack])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.8)])
def test_restarts_keep_the_worst(attack, norm, epsilon):
    # In float64: the points of broken images leave the batch, and must not change the others.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10)).double()
    model = Ramped(model) if attack is thresholds_attack else model
    images = random_batch(100)[0].double()
    labels = model(images).argmax(dim=1)
    results = [
        margin(model, attack(model, images, labels, epsilon, norm, steps=4, restarts=r), labels)
        for r in (1, 2, 4)
    ]
    # Once broken, how far does not count.
    results = [result.clamp(min=0) for result in results]
    assert (results[1] <= results[0] + 1e-9).all()
    assert (results[2] <= results[1] + 1e-9).all()
    assert (results[2] < results[0] - 1e-5).any()


class Ramped(nn.Module):
    """Another network behind thresholds of its own."""

    def __init__(self, model, thresholds=(0.3, 0.7)):
        super().__init__()
        self.model, self.thresholds = model, thresholds

    def forward(self, images):
        return self.model(apply_thresholds(images, self.thresholds))


@pytest.mark.parametrize("loss", ["margin", "dlr"])
@pytest.mark.parametrize("targets", [0, 2])
def test_the_scale_of_the_logits_does_not_matter(loss, targets):
    # In float64, where no rounding decides over an image.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    images = random_batch(100)[0].double()
    labels = model(images).argmax(dim=1)
    attack = partial(apgd_attack, loss=loss, targets=targets, steps=10)
    plain, large = (
        wrong(model, attack(Scaled(model, factor), images, labels, 0.03), labels)
        for factor in (1, 3000)
    )
    assert 10 < plain.sum() < 90
    assert torch.equal(plain, large)


class Quantised(nn.Module):
    """Pixels rounded to so many levels: the gradient is zero everywhere."""

    def __init__(self, model, levels):
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, images):
        return self.model((images * self.levels).round() / self.levels)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.15), ("l2", 2.5)])
def test_square_attack_needs_no_gradient(trained, norm, epsilon):
    images = trained[1]
    model = Quantised(trained[0], 10)
    labels = model(images).argmax(dim=1)
    pgd = pgd_attack(model, images, labels, epsilon, norm, steps=10, loss="margin")
    assert wrong(model, pgd, labels).float().mean() < 0.1
    square = square_attack(model, images, labels, epsilon, norm, queries=200)
    assert wrong(model, square, labels).float().mean() > 0.7
    # More queries of the same kind only help.
    assert (
        wrong(model, square_attack(model, images, labels, epsilon, norm, queries=1), labels).sum()
        <= wrong(model, square, labels).sum()
    )


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.98), ("l2", 0.5)])
def test_square_attack_comes_near_the_optimum_of_a_linear_model(norm, share):
    # Only squares of the right signs are kept, so in linf all pixels end in their corner; a
    # gradient that is constant on squares of 7 x 7 makes them few. In l2 the bumps never fit
    # exactly; a random direction would reach a 28th.
    model = Linear(2)
    pattern = random_batch(1)[0][:, :, :4, :4].repeat_interleave(7, 2).repeat_interleave(7, 3)
    away = (pattern - 0.5).flatten()
    model.weight.data = torch.stack([torch.zeros(784), -away], dim=1)
    model.bias.data = torch.tensor([0.0, 200.0])
    images, labels = torch.full((5, 1, 28, 28), 0.5), torch.ones(5, dtype=torch.int64)
    attacked = square_attack(model, images, labels, 0.3, norm, queries=3000)
    reached = margin(model, images, labels) - margin(model, attacked, labels)
    best = 0.3 * (away.abs().sum() if norm == "linf" else away.norm())
    assert (reached <= best + 1e-3).all()
    assert (reached >= share * best).all()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 1.0)])
def test_no_step_size_has_to_be_chosen(trained, norm, epsilon):
    model, images, labels = trained
    ours, theirs = (
        wrong(model, attack(model, images, labels, epsilon, norm, steps=20), labels).sum()
        for attack in (apgd_attack, partial(pgd_attack, loss="margin", early_stop=True))
    )
    assert ours >= theirs - 1


def test_few_pixels_moved_far_break_what_many_moved_a_little_cannot():
    # Of 784 black pixels, a change of l2 length 2 takes none across a ramp that starts at 0.4,
    # unless it is spent on eleven of them.
    model = RampedLinear(scale=0.02)
    images, labels = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)
    model.bias.data = torch.tensor([0.5, 0.0])
    spread = apgd_attack(model, images, labels, 2.0, "l2")
    assert not wrong(model, spread, labels).any()
    assert wrong(model, thresholds_attack(model, images, labels, 2.0, "l2"), labels).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stages_only_ever_break_more_and_the_last_is_the_strongest_attack(trained, norm):
    model, images, labels = trained
    model, epsilon = Ramped(model), {"linf": 0.08, "l2": 1.5}[norm]
    labels = model(images).argmax(dim=1)
    stages = dict(strongest_attack_stages(model, images, labels, epsilon, norm, **BRIEF))
    broken = [wrong(model, points, labels) for points in stages.values()]
    assert next(iter(stages)) == "clean"
    assert torch.equal(stages["clean"], images)
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(broken))
    worst = strongest_attack(model, images, labels, epsilon, norm, **BRIEF)
    assert torch.equal(worst, [*stages.values()][-1])
    dataset = TensorDataset(images, labels)
    hits = hits_by_stage(model, dataset, epsilon, norm, progress=False, **BRIEF)
    assert list(hits) == list(stages)
    assert torch.equal(torch.stack([*hits.values()]), ~torch.stack(broken))
    assert broken[-1].sum() > broken[0].sum()


class Counted(nn.Module):
    """A network that keeps the number of images of every call."""

    def __init__(self, network):
        super().__init__()
        self.network, self.counts = network, []

    def forward(self, images):
        self.counts.append(len(images))
        return self.network(images)


def test_later_stages_stop_at_the_first_eighth_in_which_nothing_breaks():
    images, labels = random_batch(400)
    network = Counted(Linear(10))
    labels = network(images).argmax(1)
    # A ball that breaks nothing: no margin can be crossed.
    stages = strongest_attack_stages(network, images, labels, 1e-6, **BRIEF)
    assert next(stages)[0] == "clean"
    assert next(stages)[0] == "apgd cross-entropy"
    network.counts.clear()
    assert len(list(stages)) == 3
    # One part for each: margin 1 + 2 starts, classes 1 + 3 of 2 * 2 starts (then its patience is
    # at an end), of 4 points each; Square 1 + 10 points; the verdict after each.
    assert network.counts == [50] * (10 + 14 + 12)
    network.counts.clear()
    list(strongest_attack_stages(network, images, labels, 1e-6, **BRIEF, thorough=True))
    assert network.counts.count(400) > 3 * 4


def test_shrinking_balls_find_what_a_search_from_the_middle_does_not(mnist_root):
    # A network trained in linf, attacked in l2: from the middle the gradient leads to nothing.
    network = load_checkpoint(ROOT / "reference" / "models" / "control_single_step.pt")
    data = subset(load_mnist("test", mnist_root), range(0, 1000, 20)).tensors
    middle = apgd_attack(network, *data, 2.0, "l2", steps=200)
    outside = apgd_attack(network, *data, 2.0, "l2", steps=10, shrinks=19)
    broken = [int(wrong(network, points, data[1]).sum()) for points in (middle, outside)]
    assert broken[1] > broken[0] + 10


def test_there_are_no_balls_to_shrink_behind_thresholds():
    images, labels = random_batch(5)
    with pytest.raises(ValueError, match="'shrinks'"):
        thresholds_attack(RampedLinear(10), images, labels, 0.1, shrinks=2)


def test_a_search_gives_up_after_barren_runs_in_a_row_and_a_break_sets_the_count_back(
    monkeypatch,
):
    runs = []

    def scripted(space, visit, start, standing, steps, size):
        runs.append(len(runs) + 1)
        if runs[-1] in (2, 4):
            standing[runs[-1]] = False

    monkeypatch.setattr("src.robustness.apgd._ascend", scripted)
    images, network = random_batch(10)[0], Linear(10)
    labels = network(images).argmax(1)
    for patience, expected in ((2, 6), (1, 1), (18, 18), (None, 18)):
        runs.clear()
        apgd_attack(network, images, labels, 0.1, restarts=2, targets=9, patience=patience)
        # Of two in a row, 3 and 4 are not, as 4 breaks an image; 5 and 6 are.
        assert len(runs) == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_quick_verdict_is_the_thorough_one_where_the_optimum_is_known(norm, scale):
    # Of two classes of a linear network the margin that an attack can cross is known. Times 3,000
    # the cross-entropy is saturated, so that only later stages break anything.
    images, _ = random_batch(200)
    network = Linear(2, scale)
    labels = network(images).argmax(1)
    epsilon = 0.02 if norm == "linf" else 0.5
    quick, thorough = (
        strongest_attack(network, images, labels, epsilon, norm, **BRIEF, thorough=way)
        for way in (False, True)
    )
    assert 10 < wrong(network, thorough, labels).sum() < 190
    assert torch.equal(wrong(network, quick, labels), wrong(network, thorough, labels))
