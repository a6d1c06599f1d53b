"""Adversarial training: its attack, the growing ball, and the watch for a collapse."""

import math
from functools import partial

import pytest
import torch

from src.attacks import gradient_attack
from src.methods.adversarial import (
    adversarial_loss_schedule,
    collapsed_epochs,
    held_out_watch,
    training_attack,
)
from src.models import ConvNN
from src.training_and_evaluation import accuracy, standard_loss, train_model
from tests.helpers import halves, linear


@pytest.mark.parametrize("warmup", [0.3, 0.5, 1.0])
def test_warmup_grows_linearly_and_stays(warmup):
    model, (images, labels) = linear(), halves(8).tensors
    used = []

    def attack(network, pixels, targets, epsilon):
        used.append(epsilon)
        return (pixels + epsilon).clamp(0, 1)

    schedule = adversarial_loss_schedule(attack, 0.3, warmup=warmup)
    losses = [schedule(warmup * part)(model, images, labels)[0] for part in (0, 0.25, 0.5, 1)]
    assert used == pytest.approx([0, 0.075, 0.15, 0.3])
    assert losses[0] == standard_loss(model, images, labels)[0]
    assert losses[3] == standard_loss(model, (images + 0.3).clamp(0, 1), labels)[0]
    # Schedules built first and called later must not share the last radius.
    early, late = schedule(0.5 * warmup), schedule(0.999)
    late(model, images, labels)
    early(model, images, labels)
    assert used[-2:] == pytest.approx([0.3 * min(0.999 / warmup, 1), 0.15])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["gradient", "pgd"])
def test_training_attack_starts_at_random_from_its_seed(name, norm):
    # Not a linear model: there, PGD finds the same optimum from every start.
    torch.manual_seed(0)
    model, (images, labels) = ConvNN((2, 3)).eval(), halves(8, side=28).tensors
    make = partial(training_attack, name, norm, steps=2)
    first, twin, other = (make(seed=seed) for seed in (0, 0, 1))
    results = [attack(model, images, labels, 0.1) for attack in (first, first, twin, other)]
    assert torch.equal(results[0], results[2])
    # Fresh starts from batch to batch, others for another seed.
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[3])
    order = math.inf if norm == "linf" else 2
    for attacked in results:
        assert (attacked - images).double().flatten(1).norm(order, dim=1).max() <= 0.1
        assert standard_loss(model, attacked, labels)[0] > standard_loss(model, images, labels)[0]


def test_training_attack_refuses_other_names():
    with pytest.raises(ValueError, match="'fgsm'; use 'gradient' or 'pgd'"):
        training_attack("fgsm", "linf", steps=1, seed=0)


def test_held_out_watch_measures_clean_and_attacked_accuracy():
    dataset, model = halves(64), linear()
    train_model(model, dataset, epochs=3, batch_size=16, progress=False)
    figures = held_out_watch(dataset, 0.25, "linf", steps=3)(model)
    step = accuracy(model, dataset, attack=partial(gradient_attack, epsilon=0.25))
    assert list(figures) == ["clean", "single_step", "pgd"]
    assert figures["clean"] == accuracy(model, dataset)
    assert figures["single_step"] == step
    # Of two linear logits the single step is the strongest attack there is.
    assert figures["pgd"] == step < figures["clean"]


@pytest.mark.parametrize(
    ("history", "collapsed"),
    [
        # Rows of clean, single-step and PGD accuracy.
        ([], []),
        ([(0.9, 0.6, 0.5), (0.95, 0.8, 0.75), (0.97, 0.9, 0.88)], []),
        # Single step above clean: label leaking.
        ([(0.97, 0.9, 0.85), (0.98, 0.995, 0.0), (0.98, 1.0, 0.0)], [2, 3]),
        # Below clean, but far above a PGD accuracy that was once better.
        ([(0.97, 0.9, 0.85), (0.98, 0.8, 0.3)], [2]),
        ([(0.97, 0.9, 0.85), (0.98, 0.97, 0.1), (0.98, 0.9, 0.86)], [2]),
        # Poor from the start, as in the first epochs of a warmup: nothing has been lost.
        ([(0.9, 0.5, 0.0), (0.95, 0.6, 0.1), (0.97, 0.8, 0.6)], []),
        # PGD falls together with the single step: unstable, but not overfitted to it.
        ([(0.97, 0.9, 0.85), (0.4, 0.3, 0.25)], []),
        # Never better under PGD: collapsed as soon as the ball has its full size.
        ([(0.99, 0.9, 0.15), (0.99, 0.95, 0.02), (0.99, 0.97, 0.0), (0.99, 0.975, 0.0)], [3, 4]),
        ([(0.993, 0.9964, 0.0)] * 12, list(range(5, 13))),
        # A tie with clean accuracy, within the noise of a held-out set.
        ([(0.113, 0.113, 0.113), (0.985, 0.99, 0.95)], []),
    ],
)
def test_collapse_is_told_from_health(history, collapsed):
    rows = [
        {"epoch": number, "clean": clean, "single_step": step, "pgd": pgd}
        for number, (clean, step, pgd) in enumerate(history, start=1)
    ]
    assert collapsed_epochs(rows) == collapsed


def test_a_ball_of_full_size_from_the_start_is_collapsed_from_the_start():
    rows = [
        {"epoch": number, "clean": 0.993, "single_step": 0.9964, "pgd": 0.0}
        for number in range(1, 13)
    ]
    assert collapsed_epochs(rows, warmup=0.0) == list(range(1, 13))
