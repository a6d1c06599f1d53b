"""Attacks: the ball as stored, no side effects, known optima, strength, errors."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import attack_dataset, gradient_attack, pgd_attack, random_start_attack
from src.models import ConvNN
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

ATTACKS = {
    "single": gradient_attack,
    "targeted": partial(gradient_attack, targeted=True),
    "pgd": partial(pgd_attack, steps=3, restarts=2),
    "pgd_margin": partial(pgd_attack, steps=3, loss="margin", step_size=5.0),
    "random_start": random_start_attack,
}
# Drawn uniformly, on the border of [0, 1], constant, and where float32 is finest.
IMAGES = {
    "noise": lambda images: images,
    "binary": lambda images: images.round(),
    "bytes": lambda images: (images * 255).round() / 255,
    "grey": lambda images: torch.full_like(images, 0.5),
    "tiny": lambda images: images * 1e-6,
    "almost_one": lambda images: 1 - images * 1e-6,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Tensors are small here: on a busy machine two threads mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained():
    return trained_network()


# --- The ball -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    epsilon=st.sampled_from([1e-3, 0.01, 0.1, 0.3, 1.0, 2.0]) | st.floats(1e-7, 30),
    norm=st.sampled_from(["linf", "l2"]),
    attack=st.sampled_from(sorted(ATTACKS)),
    kind=st.sampled_from(sorted(IMAGES)),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_results_lie_in_the_ball_and_in_the_box_as_stored(epsilon, norm, attack, kind, dtype, seed):
    images, labels = random_batch(3, seed=seed)
    images = IMAGES[kind](images).to(dtype)
    attacked = ATTACKS[attack](Linear(10, seed=seed), images, labels, epsilon, norm)
    assert (attacked.dtype, attacked.shape) == (dtype, images.shape)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    # As a reader would measure it, and exactly.
    for change in (attacked - images, attacked.double() - images.double()):
        assert all(value <= epsilon for value in length(change, norm).tolist())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_radius_and_no_image_give_a_copy_of_the_input(attack, norm):
    images, labels = random_batch(3)
    attacked = ATTACKS[attack](Linear(10), images, labels, 0, norm)
    assert torch.equal(attacked, images)
    assert attacked.data_ptr() != images.data_ptr()
    assert len(ATTACKS[attack](Linear(10), images[:0], labels[:0], 0.1, norm)) == 0


def test_the_range_may_be_narrower_or_wider_but_must_hold_the_images():
    images, labels = random_batch(4)
    narrow = gradient_attack(Linear(10), images / 2, labels, 0.3, clip=(0.0, 0.5))
    assert narrow.max() == 0.5
    assert gradient_attack(Linear(10), images, labels, 0.3, clip=(-1.0, 2.0)).min() < 0
    with pytest.raises(ValueError, match="'clip'"):
        gradient_attack(Linear(10), images, labels, 0.1, clip=(0.4, 0.6))


# --- Side effects ---------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, mixed_modes])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_model_the_images_and_the_generator_stay_as_they_were(attack, mode, context):
    torch.manual_seed(0)
    model = ConvNN((4, 8))
    mode(model)
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 7.0)
    model.conv2.requires_grad_(False)
    with context():
        # Made here: tensors made in inference mode are unknown to autograd.
        images, labels = random_batch(4)
        kept, before = images.clone(), snapshot(model)
        attacked = ATTACKS[attack](model, images, labels, 0.3)
        assert equal(snapshot(model), before)
        assert torch.equal(images, kept)
        assert not torch.equal(attacked, images)
    assert not attacked.requires_grad
    assert images.grad is None


def test_an_image_inside_a_graph_is_attacked_outside_of_it():
    images, labels = random_batch(4)
    images.requires_grad_()
    for attack in ATTACKS.values():
        assert not attack(Linear(10), images * 1, labels, 0.1).requires_grad
        assert images.grad is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_modes_are_restored_when_the_attack_fails(attack):
    model = ConvNN((2, 2), num_classes=3)
    mixed_modes(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'labels'"):
        ATTACKS[attack](model, random_batch(4)[0], torch.full((4,), 3), 0.1)
    assert equal(snapshot(model), before)


# --- Known answers --------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_single_step_of_a_linear_model_is_its_closed_form(norm, epsilon, targeted):
    model = Linear(scale=0.1)
    images, labels = random_batch(20, classes=2)
    weight = model.weight.detach()
    # The gradient of -log softmax_y is a positive multiple of w_other - w_y.
    away = (weight[:, 1 - labels] - weight[:, labels]).T.reshape(images.shape)
    away = -away if targeted else away
    unit = away.sign() if norm == "linf" else away / away.flatten(1).norm(dim=1)[0]
    attacked = gradient_attack(model, images, labels, epsilon, norm, targeted=targeted)
    torch.testing.assert_close(
        attacked, (images + epsilon * unit).clamp(0, 1), rtol=0, atol=1e-5 if norm == "l2" else 1e-7
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("linf", 0.7), ("l2", 1), ("l2", 4)])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm, epsilon, loss):
    model = Linear(scale=0.02)
    images, labels = random_batch(20, classes=2)
    images = images.round()
    weight = model.weight.detach()
    away = (weight[:, 1 - labels] - weight[:, labels]).T
    flat = images.flatten(1)
    if norm == "linf":
        change = (flat + epsilon * away.sign()).clamp(0, 1) - flat
    else:
        change = best_l2_change(flat, away, epsilon)
    gain = (away * change).sum(dim=1).double()
    attacked = pgd_attack(model, images, labels, epsilon, norm, steps=40, loss=loss)
    reached = margin(model, images, labels) - margin(model, attacked, labels)
    assert (reached <= gain + 1e-4).all()
    # In linf the optimum is a corner of the box; in l2 the projections only approach it.
    assert (reached >= gain * (1 - (1e-4 if norm == "linf" else 2e-2))).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e30])
def test_l2_step_has_its_full_length_whatever_the_scale_of_the_gradient(factor):
    images, labels = random_batch(8, classes=2)
    images = 0.4 + 0.2 * images
    # The margin is linear in the logits, so only the scale of its gradient changes.
    plain, scaled = (
        pgd_attack(Scaled(Linear(), f), images, labels, 0.3, "l2", steps=1, loss="margin")
        for f in (1.0, factor)
    )
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-5)
    assert (length(plain - images, "l2") > 0.299).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_is_zero_or_no_number_gives_no_nan(attack, norm, value):
    images, labels = random_batch(3)
    attacked = ATTACKS[attack](Scaled(Linear(10), value), images, labels, 0.1, norm)
    assert attacked.isfinite().all()
    assert (length(attacked - images, norm) <= 0.1).all()
    if attack in ("single", "targeted") and value == 0:
        assert torch.equal(attacked, images)


# --- Strength -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.01), ("linf", 0.3), ("l2", 0.3)])
def test_pgd_is_at_least_as_strong_as_one_step_image_by_image(trained, norm, epsilon, steps, seed):
    model, images, labels = trained
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    attack = partial(pgd_attack, steps=steps, generator=generator)
    points = [a(model, images, labels, epsilon, norm) for a in (gradient_attack, attack)]
    step_wrong, pgd_wrong = (wrong(model, attacked, labels) for attacked in points)
    assert (pgd_wrong | ~step_wrong).all()
    assert (pgd_wrong | ~wrong(model, images, labels)).all()
    with torch.no_grad():
        losses = [F.cross_entropy(model(p), labels, reduction="none") for p in points]
    # Among points that are equally (mis)classified, the loss decides.
    assert ((losses[1] >= losses[0]) | (step_wrong != pgd_wrong)).all()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 1.0)])
def test_restarts_keep_the_worst(trained, norm, epsilon, seed):
    model, images, labels = trained
    results = []
    for restarts in (1, 2, 5):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        attack = partial(pgd_attack, steps=2, restarts=restarts, loss="margin")
        results.append(attack(model, images, labels, epsilon, norm, generator=generator))
    first, second, fifth = (margin(model, attacked, labels) for attacked in results)
    assert (second <= first).all()
    assert (fifth <= second).all()
    assert (fifth < first).any()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.06), ("l2", 1.2)])
def test_margin_loss_works_where_cross_entropy_is_saturated(trained, norm, epsilon):
    model, images, labels = trained
    attack = partial(pgd_attack, images=images, labels=labels, epsilon=epsilon, norm=norm, steps=10)
    harm = {
        (factor, loss): wrong(model, attack(Scaled(model, factor), loss=loss), labels).sum()
        for factor in (1, 3000)
        for loss in ("cross_entropy", "margin")
    }
    assert harm[3000, "cross_entropy"] < harm[3000, "margin"] / 2
    assert abs(harm[3000, "margin"] - harm[1, "margin"]) <= 2


@pytest.mark.parametrize(("norm", "largest"), [("linf", 0.3), ("l2", 6.0)])
def test_accuracy_falls_with_the_radius_down_to_nothing(trained, norm, largest):
    model, images, labels = trained
    harm = [
        int(
            wrong(
                model, pgd_attack(model, images, labels, share * largest, norm, steps=5), labels
            ).sum()
        )
        for share in (0.0, 0.02, 0.1, 0.3, 1.0)
    ]
    assert harm == sorted(harm)
    assert harm[0] < 20
    assert harm[-1] == len(labels)


@pytest.mark.parametrize("attack", [gradient_attack, pgd_attack])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 1.0)])
def test_targeted_attacks_approach_their_target(trained, attack, norm, epsilon):
    model, images, labels = trained
    targets = (labels + 3) % 10
    attacked = attack(model, images, targets, epsilon, norm, targeted=True)
    nearer = margin(model, attacked, targets) > margin(model, images, targets)
    assert nearer.float().mean() > 0.95
    if attack is pgd_attack:
        assert wrong(model, attacked, targets).float().mean() < 0.05


# --- Randomness -----------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [partial(pgd_attack, steps=2, restarts=2), random_start_attack])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 1.0)])
def test_only_the_generator_changes_the_result(trained, attack, norm, epsilon):
    model, images, labels = trained

    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return attack(model, images, labels, epsilon, norm, generator=generator)

    first = [run(seed) for seed in (None, 1, 2)]
    torch.manual_seed(123)
    assert equal([run(seed) for seed in (None, 1, 2)], first)
    assert not torch.equal(first[1], first[2])
    # A generator that goes on must not start the same way twice.
    generator = torch.Generator().manual_seed(1)
    again = [attack(model, images, labels, epsilon, norm, generator=generator) for _ in range(2)]
    assert not torch.equal(*again)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.4), ("l2", 2.0)])
def test_random_starts_are_uniform_in_the_ball(norm, epsilon):
    # A constant model has no gradient, so the start itself comes back; from grey, unclipped.
    images, labels = torch.full((400, 1, 28, 28), 0.5), torch.zeros(400, dtype=torch.int64)
    starts = random_start_attack(Scaled(Linear(), 0.0), images, labels, epsilon, norm)
    change = (starts - images).flatten(1).double() / epsilon
    if norm == "linf":
        level, pixel_variance = (change.flatten() + 1) / 2, 1 / 3
    else:
        # |x|^d is uniform on [0, 1] for a uniform point of the d-dimensional unit ball.
        level, pixel_variance = change.norm(dim=1) ** 784, 1 / 786
    # Kolmogorov-Smirnov: P(sqrt(n) * distance > 2.5) < 1e-5; 0.01 for the margin of rounding
    # that projected points keep from the sphere, 3e-6 of 2 to the power of 784.
    ranks = (torch.arange(len(level)) + 0.5) / len(level)
    assert (level.sort().values - ranks).abs().max() * len(level) ** 0.5 < 2.5 + 0.01 * (
        norm == "l2"
    ) * len(level) ** 0.5
    # Each mean and correlation is N(0, 1/400) or nearer to 0: six deviations, 2e-9 each.
    assert change.mean(dim=0).abs().max() < 6 * (pixel_variance / 400) ** 0.5
    assert torch.corrcoef(change[:, ::16].T).fill_diagonal_(0).abs().max() < 6 / 400**0.5
    assert change.var() == pytest.approx(pixel_variance, rel=0.02)


# --- Data sets and errors -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_attack_dataset_is_the_loop_over_its_batches(batch_size):
    model = ConvNN((2, 2)).train()
    images, labels = random_batch(20)
    attack = partial(gradient_attack, epsilon=0.1)
    twin = attack_dataset(model, TensorDataset(images, labels), attack, batch_size=batch_size)
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    assert isinstance(twin, TensorDataset)
    assert torch.equal(twin.tensors[0], torch.cat([attack(model, *batch) for batch in batches]))
    assert torch.equal(twin.tensors[1], labels)
    assert model.training


def too_large(labels):
    return labels + 10


FAULTS = {
    "images": [
        lambda images: (images * 255).to(torch.uint8),
        lambda images: images * 255,
        lambda images: images - 1e-3,
        lambda images: images[0],
        lambda images: images[:, 0],
        lambda images: images.numpy(),
        lambda images: torch.where(images > 0.5, images, torch.nan),
        lambda images: torch.where(images > 0.5, images, -torch.inf),
    ],
    "labels": [
        lambda labels: labels.int(),
        lambda labels: labels.float(),
        lambda labels: labels[:-1],
        lambda labels: labels[:, None],
        lambda labels: F.one_hot(labels, 10),
        lambda labels: labels.tolist(),
        lambda labels: labels - 10,
        too_large,
    ],
    "epsilon": [lambda epsilon, bad=bad: bad for bad in (-0.1, torch.nan, torch.inf, "0.1", None)],
    "norm": [lambda norm, bad=bad: bad for bad in ("l1", "Linf", 2, None)],
    "clip": [lambda clip, bad=bad: bad for bad in ((1.0, 0.0), (0.5, 0.5), (0.0, torch.nan))],
    "step_size": [lambda size, bad=bad: bad for bad in (0, -0.1, torch.nan, "0.1")],
    "steps": [lambda steps, bad=bad: bad for bad in (0, -1, 2.5, True)],
    "restarts": [lambda restarts, bad=bad: bad for bad in (0, 1.0)],
    "loss": [lambda loss, bad=bad: bad for bad in ("hinge", None)],
}
OWN_ARGUMENTS = {
    gradient_attack: [],
    random_start_attack: ["step_size"],
    pgd_attack: ["step_size", "steps", "restarts", "loss"],
}


@pytest.mark.parametrize("attack", OWN_ARGUMENTS)
@pytest.mark.parametrize("epsilon", [0.1, 0])
def test_bad_arguments_are_named(attack, epsilon):
    images, labels = random_batch(5)
    good = {"images": images, "labels": labels, "epsilon": epsilon, "norm": "l2", "clip": (0, 1)}
    good |= dict.fromkeys(OWN_ARGUMENTS[attack])
    for name in good:
        for fault in FAULTS[name]:
            arguments = {k: v for k, v in good.items() if v is not None}
            arguments[name] = fault(good[name])
            # How many classes there are is known only once the model has been called.
            if epsilon == 0 and fault is too_large:
                continue
            with pytest.raises(ValueError, match=f"'{name}'"):
                attack(Linear(10), **arguments)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seeded", [False, True])
def test_stopping_early_breaks_the_same_images(norm, loss, seeded):
    # In float64: another batch size rounds otherwise, and must not decide over an image.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    images, _ = random_batch(200)
    images = images.double()
    labels = model(images).argmax(dim=1)
    epsilon = {"linf": 0.03, "l2": 0.5}[norm]
    seen, found = [], []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for early_stop in (False, True):
        found.append(
            pgd_attack(
                model,
                images,
                labels,
                epsilon,
                norm,
                steps=8,
                restarts=3,
                loss=loss,
                generator=torch.Generator().manual_seed(5) if seeded else None,
                early_stop=early_stop,
            )
        )
        seen.append(0)
    hook.remove()
    broken = [model(points).argmax(dim=1) != labels for points in found]
    assert 20 < broken[0].sum() < 180
    assert torch.equal(*broken)
    # What still stands was pushed to the same worst point; what fell cost no more steps.
    standing = ~broken[0]
    torch.testing.assert_close(found[0][standing], found[1][standing], rtol=0, atol=1e-9)
    first = seen.index(0)
    assert sum(seen[first:]) < 0.8 * sum(seen[:first])
