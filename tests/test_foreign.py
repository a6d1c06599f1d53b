"""Models and images of other people: everything that judges ours judges theirs."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.attacks import attack_dataset, gradient_attack, pgd_attack, random_start_attack
from src.models import SmoothClassifier
from src.robustness import attack_evaluation, hits_by_stage, strongest_attack
from src.robustness.challenge import challenge_certificates, smoothed_attack
from src.robustness.checklist import CHECKS, evaluation_warnings
from src.robustness.fixed_radii import attack_hits
from src.robustness.smallest_epsilon import epsilon_rows, smallest_epsilons
from src.robustness.square import square_attack
from src.training_and_evaluation import accuracy, evaluate_robustness
from tests.attack_helpers import equal, snapshot

COUNT = 6
QUIET = {"progress": False}
FEW = {"steps": 2, "queries": 10}


def conv(channels, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def hooked(model):
    model[0].register_forward_hook(lambda module, given, output: output * 2)
    return model


class Mean(nn.Module):
    """No weights: class 1 where the mean is above 1/2."""

    def forward(self, images):
        margin = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-margin, margin], dim=1)


# Name -> (model, shape of the images, classes, dtype of the images).
MODELS = {
    "100 classes": (lambda: conv(1, 100), (1, 28, 28), 100, torch.float32),
    "3 x 32 x 32": (lambda: conv(3, 10), (3, 32, 32), 10, torch.float32),
    "float64": (lambda: nn.DataParallel(conv(3, 7).double()), (3, 12, 9), 7, torch.float32),
    "float64 images": (lambda: conv(2, 3), (2, 9, 12), 3, torch.float64),
    "bfloat16": (lambda: conv(3, 5).bfloat16(), (3, 8, 8), 5, torch.float32),
    "hooks, 1,000 classes": (lambda: hooked(conv(3, 1000)), (3, 8, 4), 1000, torch.float32),
    "no weights": (Mean, (4, 1, 3), 2, torch.float32),
    "one pixel": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(1, 2)),
        (1, 1, 1),
        2,
        torch.float32,
    ),
}


def setting(name):
    """A model, images that it gets right, and the model smoothed."""
    make, shape, classes, dtype = MODELS[name]
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(1)
    images = (torch.randint(256, (COUNT, *shape), generator=generator) / 255).to(dtype)
    weights = next((p.dtype for p in model.parameters()), dtype)
    with torch.no_grad():
        # In evaluation mode only for this: the judges must see to that themselves.
        labels = model.eval()(images.to(weights)).argmax(dim=1)
    model.train()
    return model, TensorDataset(images, labels), SmoothClassifier(model, 0.25, classes)


ATTACKS = {
    "gradient": gradient_attack,
    "random start": random_start_attack,
    "pgd": partial(pgd_attack, steps=2, restarts=2),
    "strongest": partial(strongest_attack, **FEW),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_stay_in_the_ball_and_leave_the_model_as_it_was(name, norm):
    model, dataset, _ = setting(name)
    images, labels = dataset.tensors
    before, data = snapshot(model), [images.clone(), labels.clone()]
    for attack in ATTACKS.values():
        found = attack(model, images, labels, 0.1, norm)
        assert (found.shape, found.dtype) == (images.shape, images.dtype)
        order = torch.inf if norm == "linf" else 2
        change = (found.double() - images.double()).flatten(1)
        assert (torch.linalg.vector_norm(change, order, dim=1) <= 0.1).all()
        assert ((found >= 0) & (found <= 1)).all()
    assert equal(before, snapshot(model))
    assert equal(data, [images, labels])


@pytest.mark.parametrize("name", MODELS)
def test_judges_agree_on_the_clean_images_and_leave_the_model_as_it_was(name):
    model, dataset, smooth = setting(name)
    before = snapshot(model)
    assert accuracy(model, dataset) == 1
    assert accuracy(model, dataset, attack=partial(gradient_attack, epsilon=0.0)) == 1
    twin = attack_dataset(model, dataset, partial(pgd_attack, epsilon=0.1, steps=2))
    stages = hits_by_stage(model, dataset, 0.1, **FEW, **QUIET)
    assert stages["clean"].all()
    assert torch.equal(twin.tensors[1], dataset.tensors[1])
    smallest = smallest_epsilons(model, dataset, "linf", steps=2, **QUIET)
    assert (smallest > 0).all()
    rows = epsilon_rows(model, dataset, [0, 3], steps=2, **QUIET)
    assert [row["index"] for row in rows] == [0, 3, 0, 3]
    standing = attack_hits(model, dataset, steps=2, radii=[("linf", 0.1)], **QUIET)
    search = partial(square_attack, queries=10)
    warned = evaluation_warnings(model, dataset, standing, search=search)
    assert {warning["check"] for warning in warned} <= CHECKS.keys()
    assert equal(before, snapshot(model))
    # One noisy draw per image, from the global generator.
    assert accuracy(smooth, dataset) >= 0


@pytest.mark.parametrize("name", ["100 classes", "3 x 32 x 32", "float64"])
def test_whole_evaluation_leaves_the_model_as_it_was(name):
    model, dataset, _ = setting(name)
    before = snapshot(model)
    found = attack_evaluation(model, dataset, range(3), [0], steps=1, radii=[("linf", 0.5)])
    assert found["table"][0]["accuracy"] == 1
    assert len(found["smallest_epsilons"]) == 4
    assert equal(before, snapshot(model))


@pytest.mark.parametrize("name", MODELS)
def test_votes_are_those_of_the_images_alone_and_leave_the_model_as_it_was(name):
    model, dataset, smooth = setting(name)
    images, labels = dataset.tensors
    before = snapshot(model)
    whole, one = smooth.certify(images, 10, 300), smooth.certify(images[2], 10, 300, indices=[2])
    assert whole.radius[2] == one.radius
    assert whole.top_count[2] == one.top_count
    rows = list(evaluate_robustness(smooth, dataset, n0=10, n=300, **QUIET))
    assert [row["top_count"] for row in rows] == whole.top_count.tolist()
    assert smooth.predict(images, 100).shape == (COUNT,)
    decided = smooth.certify_radius(images, 0.05, max_n=300)
    assert decided.certified.dtype == torch.bool
    points = smoothed_attack(smooth, images, labels, torch.full((COUNT,), 0.1), steps=2)
    assert points.shape == images.shape
    # Sound certificates: the odds that one of three fails are below 0.003, and the seed is fixed.
    assert challenge_certificates(smooth, dataset, rows, images=3, n=50, **QUIET)[0] == 0
    assert equal(before, snapshot(model))


def test_errors_name_the_shape_that_is_taken():
    model, dataset, smooth = setting("3 x 32 x 32")
    images, labels = dataset.tensors
    for judge in (smooth.certify, smooth.predict):
        with pytest.raises(ValueError, match=r"expected \(B, C, H, W\) or \(C, H, W\)"):
            judge(images.flatten(1))
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)\."):
        pgd_attack(model, images.flatten(1), labels, 0.1)
    with pytest.raises(ValueError, match="'num_classes'"):
        SmoothClassifier(model, 0.5, 11).predict(images)


def test_an_error_of_the_model_itself_is_not_hidden():
    model, dataset, _ = setting("float64")
    with pytest.raises(RuntimeError, match="channels"):
        accuracy(model, TensorDataset(dataset.tensors[0][:, :1], dataset.tensors[1]))


class Thresholds(Mean):
    """An attribute that is called as one of ours, and is something else."""

    thresholds = (0.2, 0.7)


def test_thresholds_that_are_not_ours_are_warned_of_and_left_alone():
    images = torch.rand((4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    model = Thresholds()
    dataset = TensorDataset(images, model(images).argmax(dim=1))
    with pytest.warns(UserWarning, match="thresholds that cannot be taken away"):
        found = attack_evaluation(model, dataset, range(4), [0], steps=1, radii=[("linf", 0.5)])
    assert found["table"][-1]["accuracy"] == 0


def test_a_float64_network_is_smoothed_in_float32_images():
    _, dataset, smooth = setting("float64")
    assert smooth.eval()(dataset.tensors[0]).shape == (COUNT, 7)
