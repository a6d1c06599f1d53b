"""Losses and the training loop."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.engine.untouched import evaluation_form
from src.methods.adversarial import trades_loss
from src.models import ConvNN
from src.optimisation.augmentation import random_shift, random_warp, shuffled
from src.training_and_evaluation import accuracy, adversarial_loss, standard_loss, train_model
from src.utils import progress_bar
from tests.helpers import halves, linear


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_standard_loss_is_the_closed_form():
    logits = 5 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1])
    loss, returned = standard_loss(lambda images: logits, torch.zeros(7), labels)
    log_odds = [
        math.log(sum(math.exp(z) for z in row)) - row[label]
        for row, label in zip(logits.double().tolist(), labels, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(log_odds) / 7, rel=1e-6)
    assert torch.equal(returned, logits)
    assert standard_loss(lambda images: 0 * logits, None, labels)[0].item() == pytest.approx(
        math.log(4)
    )


def test_trades_loss_is_its_formula():
    # Linear logits: KL(p || q) written out, on images moved by a known amount.
    model, (images, labels) = linear(), halves(8).tensors

    def attack(model, images, labels):
        return images + 0.1 * labels[:, None, None, None]

    loss, logits = trades_loss(model, images, labels, attack=attack, beta=3.0)
    moved = attack(model, images, labels)
    p, q = model(images).softmax(1), model(moved).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = standard_loss(model, images, labels)[0] + 3 * divergence
    assert divergence > 1e-5
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits, model(moved))
    # Both terms teach the network: the clean predictions are no fixed target.
    weight = next(model.parameters())
    (gradient,) = torch.autograd.grad(divergence, weight)
    (clean,) = torch.autograd.grad(standard_loss(model, images, labels)[0], weight)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], clean + 3 * gradient)


@pytest.mark.parametrize("name", ["gradient", "pgd"])
def test_adversarial_loss_is_the_standard_loss_at_the_attacked_images(name):
    model, (images, labels) = linear(), halves(16).tensors
    attack = {"gradient": gradient_attack, "pgd": partial(pgd_attack, steps=3)}[name]
    attack = partial(attack, epsilon=0.2)
    loss, logits = adversarial_loss(model, images, labels, attack=attack)
    expected, at_attacked = standard_loss(model, attack(model, images, labels), labels)
    assert loss == expected
    assert torch.equal(logits, at_attacked)
    assert loss > standard_loss(model, images, labels)[0]
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("updates", range(1, 9))
def test_any_small_number_of_updates_will_do(updates):
    history = train_model(linear(), halves(4), epochs=updates, batch_size=4, progress=False)
    assert len(history["step_loss"]) == updates


@pytest.mark.parametrize("averaging", [0, 0.995])
def test_training_learns_and_its_history_has_a_row_an_update(averaging):
    dataset, model = halves(250), linear().eval()
    assert accuracy(model, dataset) < 0.8
    history = train_model(
        model, dataset, epochs=6, batch_size=32, averaging=averaging, progress=False
    )
    assert accuracy(model, halves(seed=1)) > 0.98
    assert not model.training
    # The last incomplete batch of each epoch is left out.
    updates = 6 * (250 // 32)
    assert len(history["step_loss"]) == len(history["step_accuracy"]) == updates
    assert sum(history["step_loss"][-7:]) < 0.5 * sum(history["step_loss"][:7])
    assert [row["epoch"] for row in history["epochs"]] == list(range(1, 7))
    assert history["best_epoch"] == 6
    for number, row in enumerate(history["epochs"]):
        part = slice(7 * number, 7 * number + 7)
        assert row["train_loss"] == pytest.approx(sum(history["step_loss"][part]) / 7, rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(sum(history["step_accuracy"][part]) / 7)
    seconds = [row["seconds"] for row in history["epochs"]]
    assert seconds == sorted(seconds)


def test_history_says_what_the_untrained_model_does():
    # The first entry is measured before any update, on the whole of a one-batch data set.
    model, dataset = linear(), halves(20)
    loss, logits = standard_loss(model, *dataset.tensors)
    hits = (logits.argmax(dim=1) == dataset.tensors[1]).float().mean()
    history = train_model(model, dataset, epochs=1, batch_size=999, shift=0, progress=False)
    assert history["step_loss"] == pytest.approx([loss.item()], rel=1e-5)
    assert history["step_accuracy"] == pytest.approx([hits.item()])


@pytest.mark.parametrize("averaging", [0, 0.9])
def test_weights_depend_on_the_seed_and_not_on_the_progress_bar(averaging):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(48, 1, 28, 28, generator=generator)
    dataset = TensorDataset(images, torch.randint(10, (48,), generator=generator))
    torch.manual_seed(0)
    start = state(ConvNN((2, 3)))
    results = []
    for seed, progress in ((0, False), (0, True), (0, False), (1, False)):
        model = ConvNN((2, 3))
        model.load_state_dict(start)
        options = {"epochs": 3, "batch_size": 16, "averaging": averaging, "seed": seed}
        history = train_model(model, dataset, progress=progress, **options)
        results.append((state(model), history["step_loss"]))
    assert all(same(results[0][0], other) for other, _ in results[1:3])
    assert results[0][1] == results[1][1] == results[2][1]
    assert not same(results[0][0], results[3][0])


@pytest.mark.parametrize("progress", [True, False])
def test_loss_schedule_sees_progress_rise_from_zero_towards_one(progress):
    # Once it read the counter of a bar, which stays at 0 when the bar is switched off.
    seen = []

    def schedule(done):
        seen.append(done)
        return standard_loss

    options = {"epochs": 3, "batch_size": 16, "progress": progress}
    train_model(linear(), halves(64), loss_schedule=schedule, **options)
    assert seen == pytest.approx([k / 12 for k in range(12)])


@pytest.mark.parametrize("averaging", [0, 0.5, 0.99])
def test_average_lies_within_the_path_of_the_weights(averaging):
    model, path, averages = linear(), [], []

    def loss(network, images, labels):
        path.append(state(network)["1.weight"])
        return standard_loss(network, images, labels)

    def watch(averaged):
        averages.append(state(averaged)["1.weight"])
        path.append(state(model)["1.weight"])
        return {}

    options = {"epochs": 2, "batch_size": 32, "loss": loss, "watch": watch, "progress": False}
    train_model(model, halves(128), averaging=averaging, **options)
    visited = torch.stack(path)
    assert torch.equal(averages[-1], path[-1]) == (averaging == 0)
    assert torch.equal(model[1].weight, averages[-1])
    assert (averages[-1] >= visited.amin(dim=0) - 1e-6).all()
    assert (averages[-1] <= visited.amax(dim=0) + 1e-6).all()
    # The random start is forgotten: the average is nearer to the end than to the beginning.
    assert (averages[-1] - path[-1]).norm() < (averages[-1] - path[0]).norm()


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ((0.2, 0.9, 0.5), 2),
        ((0.9, 0.9, 0.1), 1),
        ((0.1, 0.2, 0.3), 3),
        ((-3.0, -1.0, -2.0), 2),
        ((math.nan, 0.1, math.nan), 2),
        ((0.0, 0.0, 0.0), 1),
    ],
)
def test_select_ends_with_the_weights_of_the_best_epoch(figures, best):
    states, torch_model = [], linear()

    def watch(averaged):
        states.append(state(averaged))
        return {"made_up": figures[len(states) - 1], "other": -figures[len(states) - 1]}

    history = train_model(
        torch_model, halves(64), epochs=3, watch=watch, select="made_up", progress=False
    )
    assert history["best_epoch"] == best
    assert [same(state(torch_model), other) for other in states] == [
        epoch == best for epoch in (1, 2, 3)
    ]
    assert [row["made_up"] for row in history["epochs"]] == pytest.approx(figures, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_training(value):
    def schedule(done):
        factor = value if done >= 0.5 else 1.0
        return lambda *args: (factor * standard_loss(*args)[0], standard_loss(*args)[1])

    with pytest.raises(RuntimeError, match="no longer finite in epoch 2"):
        train_model(linear(), halves(64), epochs=2, loss_schedule=schedule, progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, -1, 1.5, True, "3", None)),
        *(("batch_size", value) for value in (0, -4, 2.0)),
        *(("shift", value) for value in (-1, 0.5)),
        *(("warp", value) for value in (-0.1, math.nan, math.inf, "0.1")),
        *(("learning_rate", value) for value in (0, -0.1, math.nan, math.inf, "0.1")),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    model = linear()
    before = state(model)
    with pytest.raises(ValueError, match=f"'{name}'"):
        train_model(model, halves(8), **{"epochs": 1, "progress": False} | {name: value})
    assert same(before, state(model))


@pytest.mark.parametrize("shift", [0, 1, 2, 9])
def test_random_shift_is_one_of_the_shifts_with_zeros_coming_in(shift):
    generator = torch.Generator().manual_seed(0)
    images = 0.1 + 0.9 * torch.rand(400, 1, 6, 7, generator=generator)
    before = images.clone()
    moved = random_shift(images, shift, generator)
    assert torch.equal(images, before)
    padded = F.pad(images, (shift,) * 4)
    # No pixel is 0 and no two are alike, so that each shift gives another image.
    hits = torch.zeros(400)
    offsets = [(r, c) for r in range(2 * shift + 1) for c in range(2 * shift + 1)]
    drawn = set()
    for row, column in offsets:
        window = padded[:, :, row : row + 6, column : column + 7]
        equal = (moved == window).flatten(1).all(dim=1)
        if equal.any() and window.any():
            drawn.add((row, column))
        hits += equal
    assert (hits >= 1).all()
    if shift <= 2:
        # 400 draws miss one of 25 shifts with chance 2e-6; the seed is fixed.
        assert (hits == 1).all()
        assert drawn == set(offsets)


@pytest.mark.parametrize("warp", [0.05, 0.15, 0.6])
def test_random_warp_is_a_linear_map_about_the_centre(warp):
    images = torch.rand(30, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    warped = random_warp(images, warp, torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    entries = 2 * torch.rand((30, 2, 2), generator=torch.Generator().manual_seed(1)) - 1
    for image, result, entry in zip(images, warped, entries, strict=True):
        # SciPy counts rows first, columns second, and from the corner.
        map_of_rows = (torch.eye(2) + warp * entry).flip(0, 1).double().numpy()
        expected = ndimage.affine_transform(
            image[0].double().numpy(),
            map_of_rows,
            offset=[4, 4] - map_of_rows @ [4, 4],
            order=1,
            mode="grid-constant",
        )
        # 1e-5 is rounding; the map of another corner or transposed is off by tenths.
        assert result[0].numpy() == pytest.approx(expected, abs=1e-5)


def test_no_warp_is_none():
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert random_warp(images, 0, torch.Generator()) is images


def test_warps_stay_in_the_range_of_the_pixels():
    images = torch.ones(200, 1, 28, 28)
    images[:, :, 10:18] = 0
    warped = random_warp(images, 0.2, torch.Generator().manual_seed(0))
    assert warped.min() == 0
    assert warped.max() == 1


def test_processes_share_the_warps_of_one(monkeypatch):
    images = TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8))
    settings = {"batch_size": 4, "shift": 1, "warp": 0.1}

    def batches():
        return list(shuffled(images, **settings, generator=torch.Generator().manual_seed(0)))

    alone = batches()
    monkeypatch.setattr("src.optimisation.processes.process_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("src.optimisation.processes.rank", lambda rank=rank: rank)
        for (whole, labels), (share, own) in zip(alone, batches(), strict=True):
            assert torch.equal(share, whole[rank::2])
            assert torch.equal(own, labels[rank::2])


def enlarged(count):
    """The halves at the size of MNIST."""
    images, labels = halves(count).tensors
    return TensorDataset(F.interpolate(images, 28), labels)


def test_bfloat16_training_rounds_features_but_keeps_weights_and_logits():
    data = enlarged(256)
    losses = {}
    for precision in ("float32", "bfloat16"):
        seen = []

        def loss(model, images, labels, seen=seen):
            value, logits = standard_loss(model, images, labels)
            seen.append((value.dtype, logits.dtype))
            return value, logits

        torch.manual_seed(0)
        model = ConvNN((4, 8))
        options = {"epochs": 3, "batch_size": 64, "precision": precision, "progress": False}
        losses[precision] = train_model(model, data, loss=loss, **options)["step_loss"]
        assert set(seen) == {(torch.float32, torch.float32)}
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert accuracy(model, data) == 1
    # The same training but for rounding, which 2 ** -8 relative in two layers can explain.
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=0.03)


def test_attacks_in_bfloat16_training_use_the_bfloat16_form():
    torch.manual_seed(0)
    model, images = ConvNN((4, 8)).eval(), enlarged(4).tensors[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), evaluation_form(model) as form:
        rounded = form(images)
    with torch.no_grad():
        assert torch.equal(rounded, model.inference_form("bfloat16")(images))
        assert not torch.equal(rounded, model.inference_form()(images))


def test_unknown_precision_of_training_is_named():
    with pytest.raises(ValueError, match="'precision' is 'half'"):
        train_model(ConvNN((2, 2)), halves(8), epochs=1, precision="half")


def test_three_channels_are_shifted_alike_and_trained_on():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved, *alone = (
        random_shift(part, 2, torch.Generator().manual_seed(1))
        for part in (images, *images.split(1, dim=1))
    )
    assert torch.equal(moved, torch.cat(alone, dim=1))
    assert moved.is_contiguous()
    # The class is in the last channel alone.
    labels = torch.arange(64) % 2
    images = torch.zeros(64, 3, 32, 32)
    images[:, 2] = labels[:, None, None] * 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 5, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(images)
    dataset = TensorDataset(images, labels)
    train_model(model, dataset, epochs=4, batch_size=16, warp=0.05, progress=False)
    assert accuracy(model, dataset) == 1


def test_without_stderr_there_is_no_bar_and_no_failure(monkeypatch):
    # What `2>&-` makes of it.
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress_bar(True, range(3), desc="three")) == [0, 1, 2]
    with progress_bar(True, total=3) as bar:
        bar.update(3)
    dataset = halves(64)
    train_model(linear(), dataset, loss=standard_loss, epochs=1, batch_size=32)
