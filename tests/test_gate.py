"""What every judge of a model refuses, and what it does with NaN and with missing gradients."""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

from src.attacks import attack_dataset, gradient_attack, pgd_attack, random_start_attack
from src.checks import predicted
from src.methods.adversarial import held_out_watch, trades_loss
from src.methods.smoothing import smoothing_loss
from src.models import ConvNN, SmoothClassifier
from src.robustness.apgd import apgd_attack
from src.robustness.challenge import challenge_certificates, smoothed_attack
from src.robustness.checklist import evaluation_warnings
from src.robustness.few_pixels import few_pixels_attack
from src.robustness.fixed_radii import attack_hits
from src.robustness.noise import random_noise
from src.robustness.smallest_epsilon import smallest_epsilons
from src.robustness.square import square_attack
from src.robustness.strongest import hits_by_stage, strongest_attack
from src.training_and_evaluation import (
    accuracy,
    correct,
    evaluate_robustness,
    standard_loss,
    train_model,
)
from src.verdicts import Worst
from tests.attack_helpers import equal, random_batch, snapshot
from tests.helpers import halves, linear

COUNT = 6
STAND = {("none", "", 0.0): torch.ones(COUNT, dtype=torch.bool)}
STAND |= {("2x PGD-2", *ball): torch.ones(COUNT, dtype=torch.bool) for ball in [("l2", 1.0)]}


def data(classes=10):
    return TensorDataset(*random_batch(COUNT, classes))


def rows(labels):
    radii = {"radius": 0.3, "prediction": 1}
    return [{"index": index, **radii} for index in range(len(labels))]


def smooth(model):
    return SmoothClassifier(model, 0.5)


# Everything that passes a verdict on a data set: (model, dataset) -> result.
JUDGES = {
    "accuracy": accuracy,
    "correct": correct,
    "under attack": partial(accuracy, attack=partial(gradient_attack, epsilon=0.1)),
    "train_model": lambda m, d: train_model(m, d, epochs=1, batch_size=2, progress=False),
    "evaluate_robustness": lambda m, d: [
        *evaluate_robustness(smooth(m), d, n0=5, n=100, progress=False)
    ],
    "hits_by_stage": lambda m, d: hits_by_stage(m, d, 0.1, steps=2, queries=5, progress=False),
    "attack_hits": lambda m, d: attack_hits(m, d, steps=2, progress=False),
    "smallest_epsilons": lambda m, d: smallest_epsilons(m, d, "linf", steps=2, progress=False),
    "evaluation_warnings": lambda m, d: evaluation_warnings(m, d, STAND, images=10),
    "challenge": lambda m, d: challenge_certificates(
        smooth(m), d, rows(d.tensors[1]), images=3, n=50, progress=False
    ),
    "attack_dataset": lambda m, d: attack_dataset(m, d, partial(pgd_attack, epsilon=0.1, steps=2)),
    "held_out_watch": lambda m, d: held_out_watch(d, 0.1, "linf", steps=2)(m),
}
ATTACKS = {
    "gradient": partial(gradient_attack, epsilon=0.3),
    "pgd": partial(pgd_attack, epsilon=0.3, steps=3, restarts=2),
    "random start": partial(random_start_attack, epsilon=0.3),
    "apgd": partial(apgd_attack, epsilon=0.3, steps=5),
    "few pixels": partial(few_pixels_attack, epsilon=2.0),
    "square": partial(square_attack, epsilon=0.3, queries=10),
    "noise": partial(random_noise, epsilon=0.3),
    "strongest": partial(strongest_attack, epsilon=0.3, steps=3, queries=10),
    "smoothed": lambda m, x, y: smoothed_attack(smooth(m), x, y, torch.ones(len(x)), steps=2),
}
BAD_LABELS = {
    "column": lambda labels: labels[:, None],
    "int32": lambda labels: labels.int(),
    "float": lambda labels: labels.float(),
    "negative": lambda labels: labels - 10,
    "beyond": lambda labels: labels + 10,
}
BAD_IMAGES = {
    "0..255": lambda images: images * 255,
    "bytes": lambda images: (images * 255).byte(),
    "NaN": lambda images: images.masked_fill(images > 0.5, torch.nan),
    "flat": lambda images: images.flatten(1),
}


@pytest.mark.parametrize("bad", BAD_LABELS)
@pytest.mark.parametrize("judge", JUDGES)
def test_labels_that_the_attacks_refuse_are_refused_everywhere(judge, bad):
    images, labels = data().tensors
    with pytest.raises(ValueError, match="'labels'"):
        JUDGES[judge](linear(side=28, classes=10), TensorDataset(images, BAD_LABELS[bad](labels)))


@pytest.mark.parametrize("bad", BAD_IMAGES)
@pytest.mark.parametrize("judge", JUDGES)
def test_images_that_the_attacks_refuse_are_refused_everywhere(judge, bad):
    images, labels = data().tensors
    with pytest.raises(ValueError, match="'images'"):
        JUDGES[judge](linear(side=28, classes=10), TensorDataset(BAD_IMAGES[bad](images), labels))


@pytest.mark.parametrize("judge", sorted(JUDGES.keys() - {"challenge"}))
def test_anything_but_two_tensors_is_refused_in_one_sentence(judge):
    images, labels = data().tensors
    for dataset in (TensorDataset(images, labels, labels), Subset(data(), range(3))):
        with pytest.raises(ValueError, match="'dataset' must be a TensorDataset"):
            JUDGES[judge](linear(side=28, classes=10), dataset)


class Changed(nn.Module):
    """A linear model of ten classes whose logits pass through `change` on their way out."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = linear(side=28, classes=10), change

    def forward(self, images):
        return self.change(self.inner(images))


BAD_OUTPUTS = {
    "one logit": lambda logits: logits[:, :1],
    "tuple": lambda logits: (logits, 1),
    "dictionary": lambda logits: {"logits": logits},
    "nothing": lambda logits: None,
    "vector": lambda logits: logits[:, 0],
    "spare dimension": lambda logits: logits[:, :, None],
    "too few": lambda logits: logits[1:],
    "integers": lambda logits: logits.long(),
}


@pytest.mark.parametrize("bad", BAD_OUTPUTS)
@pytest.mark.parametrize("judge", [*JUDGES, *ATTACKS, "standard loss", "trades", "smoothing"])
def test_outputs_that_are_no_logits_are_refused_in_one_sentence(judge, bad):
    images, labels = data(1).tensors
    model = Changed(BAD_OUTPUTS[bad])
    losses = {
        "standard loss": standard_loss,
        "trades": partial(trades_loss, attack=lambda model, images, labels: images),
        "smoothing": lambda m, x, y: smoothing_loss(smooth(m), x, y, epsilon=1.0),
    }
    call = (ATTACKS | losses).get(judge) or (lambda m, x, y: JUDGES[judge](m, TensorDataset(x, y)))
    with pytest.raises(ValueError, match=r"'(model|base_classifier)' returned"):
        call(model, images, labels)


def test_rows_and_watch_are_refused_before_any_work_and_other_images_do_not_matter():
    images, labels = data().tensors
    images[4:] *= 255
    dataset, model = TensorDataset(images, labels), smooth(linear(side=28, classes=10))
    with pytest.raises(ValueError, match="'images'"):
        evaluate_robustness(model, dataset, n=100, progress=False)
    with pytest.raises(ValueError, match="'images'"):
        held_out_watch(dataset, 0.1, "linf")
    found = evaluate_robustness(model, dataset, n=100, indices=[3, 0], progress=False)
    assert [row["index"] for row in found] == [3, 0]


def test_training_is_refused_before_it_starts_and_draws_nothing_for_the_check():
    model = Changed(lambda logits: logits + torch.randn_like(logits))
    images, labels = random_batch(4)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'labels'"):
        train_model(model, TensorDataset(images, labels + 10), epochs=1, progress=False)
    assert equal(before, snapshot(model))
    cut = Changed(lambda logits: logits.detach())
    with pytest.raises(ValueError, match="'loss' has no gradient"):
        train_model(cut, TensorDataset(images, labels), epochs=1, progress=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no weights"):
        train_model(model, TensorDataset(images, labels), epochs=1, progress=False)


def test_a_challenge_that_would_try_nothing_is_refused():
    model, (images, labels) = smooth(linear(side=28, classes=10)), data().tensors
    for radii in (torch.ones(5), -torch.ones(6), torch.full((6,), torch.nan), [1.0] * 6):
        with pytest.raises(ValueError, match="'radii'"):
            smoothed_attack(model, images, labels, radii)
    with pytest.raises(ValueError, match="'classes'"):
        smoothed_attack(model, images, labels - 10, torch.ones(6))
    with pytest.raises(ValueError, match="'restarts'"):
        challenge_certificates(model, data(), rows(labels), images=2, restarts=0)


def test_nan_is_no_class_and_infinity_a_number():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[nan, nan], [0, nan], [nan, 0], [inf, 0], [inf, inf], [-inf, 1]])
    assert predicted(logits).tolist() == [-1, -1, -1, 0, 0, 1]


@pytest.mark.parametrize("judge", ["accuracy", "under attack", "attack_hits", "hits_by_stage"])
def test_nan_is_never_right(judge):
    model = Changed(lambda logits: logits * torch.nan)
    found = JUDGES[judge](model, data(1))
    values = found.values() if isinstance(found, dict) else [found]
    assert all(float(value.sum() if hasattr(value, "sum") else value) == 0 for value in values)


def test_nan_is_never_right_in_training_and_the_message_says_what_may_be_at_fault():
    def loss(model, images, labels):
        value, logits = standard_loss(model, images, labels)
        return value, logits * torch.nan

    history = train_model(linear(), halves(8), loss=loss, epochs=1, progress=False)
    assert history["step_accuracy"] == [0.0]
    with pytest.raises(RuntimeError, match="learning rate, 'warp', or the sigma"):
        train_model(linear(), halves(8), warp=1e308, epochs=1, progress=False)


class Holed(nn.Module):
    """Class 0 on black, NaN wherever a pixel is above one tenth."""

    def forward(self, images):
        level = images.flatten(1).amax(dim=1, keepdim=True)
        logits = torch.cat([1 - level, level - 1], dim=1)
        return torch.where(level > 0.1, torch.nan, logits)


@pytest.mark.parametrize("attack", ["square", "noise", "strongest"])
def test_an_attack_that_reaches_nan_has_broken_the_image(attack):
    black = TensorDataset(torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64))
    assert accuracy(Holed(), black) == 1
    assert accuracy(Holed(), black, attack=ATTACKS[attack]) == 0


def test_a_nan_value_gives_way_to_a_better_point():
    images, labels = random_batch(2)
    worst, stands = Worst(None, images, labels, "margin", False), torch.zeros(2, dtype=torch.bool)
    for value in ([torch.nan, 1.0], [-3.0, torch.nan], [-4.0, 0.5]):
        worst.keep(images + value[0], slice(None), torch.tensor(value), stands)
    # The second call for the first image, the first one for the other.
    assert worst.value.tolist() == [-3.0, 1.0]
    assert torch.equal(worst.points[0], images[0] - 3)


@pytest.mark.parametrize("attack", ["square", "noise"])
def test_infinite_logits_do_not_end_a_search(attack):
    def forward(images):
        # Right by a tie of infinities, wrong where the upper half is brighter.
        gap = images[:, :, :14].mean(dim=(1, 2, 3)) - images[:, :, 14:].mean(dim=(1, 2, 3))
        own = torch.full_like(gap, torch.inf)
        return torch.stack([torch.where(gap > 0, 0, own), own], dim=1)

    model = nn.Module()
    model.forward = forward
    images = torch.full((8, 1, 28, 28), 0.5)
    dataset = TensorDataset(images, torch.zeros(8, dtype=torch.int64))
    assert accuracy(model, dataset) == 1
    # One try in two or so is brighter above; seeded.
    assert accuracy(model, dataset, attack=ATTACKS[attack]) < 1


class Cut(nn.Module):
    """Class 1 where more than half of the pixels are bright, by `cut`, which has no gradient."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, images):
        share = self.cut(images).flatten(1).mean(dim=1) - 0.5
        return torch.stack([-share, share], dim=1)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(_, images):
        return (images > 0.5).float()


@torch.inference_mode()
def in_inference_mode(images):
    return images.round()


CUTS = {
    "comparison": lambda images: (images > 0.5).float(),
    "detach": lambda images: images.detach(),
    "no_grad": torch.no_grad()(lambda images: images * 1),
    "inference_mode": in_inference_mode,
    "no backward": Step.apply,
    "no derivative": lambda images: torch.heaviside(images - 0.5, torch.zeros(())),
}
WITH_GRADIENTS = sorted(ATTACKS.keys() - {"square", "noise", "smoothed"})


def greys():
    levels = torch.tensor([0.45, 0.4, 0.35, 0.55, 0.6, 0.65])
    images = levels[:, None, None, None].expand(-1, 1, 28, 28).contiguous()
    return TensorDataset(images, (levels > 0.5).long())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("attack", WITH_GRADIENTS)
def test_a_missing_gradient_is_zero_and_warned_of_once(attack, cut):
    model = Cut(CUTS[cut])
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attacked = ATTACKS[attack](model, *greys().tensors)
    assert [str(one.message)[:27] for one in caught] == ["'model' has no gradient by "]
    assert attacked.shape == (6, 1, 28, 28)
    assert equal(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:'model' has no gradient")
@pytest.mark.parametrize("cut", CUTS)
def test_attacks_without_gradients_go_on_where_there_are_none(cut):
    model, dataset = Cut(CUTS[cut]), greys()
    hits = hits_by_stage(model, dataset, 0.2, steps=2, queries=300, progress=False)
    assert [*hits] == [
        "clean",
        "apgd cross-entropy",
        "apgd margin",
        "apgd targeted",
        "square",
    ]
    assert hits["clean"].all()
    # A square at a time, the whole image can be brightened or darkened past the middle.
    assert not hits["square"].any()
    assert (smallest_epsilons(model, dataset, "linf", steps=2, progress=False) > 0).all()
    found = evaluation_warnings(model, dataset, attack_hits(model, dataset, progress=False))
    assert "zero gradients" in {warning["check"] for warning in found}
    smoothed_attack(SmoothClassifier(model, 0.5, 2), *dataset.tensors, torch.ones(6), steps=2)


@pytest.mark.parametrize(
    "attack",
    [
        lambda model, images, labels: images[1:],
        lambda model, images, labels: images.flatten(1),
        lambda model, images, labels: images.double(),
        lambda model, images, labels: images.numpy(),
        lambda model, images, labels: (images, labels),
        lambda model, images, labels: images * torch.nan,
        lambda model, images, labels: images + 0.5,
        lambda model, images, labels: None,
    ],
)
def test_attacks_that_do_not_return_images_are_refused(attack):
    model = linear(side=28, classes=10)
    for judge in (partial(accuracy, attack=attack), partial(attack_dataset, attack=attack)):
        with pytest.raises(ValueError, match="'attack' returned"):
            judge(model, data())


def test_an_attack_that_writes_to_its_arguments_leaves_the_data_as_they_were():
    def attack(model, images, labels):
        labels.zero_()
        gradient = torch.autograd.grad(model(images.requires_grad_()).sum(), images)[0]
        return images.data.add_(gradient.sign()).clamp_(0, 1)

    dataset, model = data(), linear(side=28, classes=10)
    before = [tensor.clone() for tensor in dataset.tensors]
    accuracy(model, dataset, attack=attack)
    twin = attack_dataset(model, dataset, attack)
    assert equal(before, [*dataset.tensors])
    assert not dataset.tensors[0].requires_grad
    assert torch.equal(twin.tensors[1], before[1])


JUDGED = JUDGES | {name: lambda m, d, a=a: a(m, *d.tensors) for name, a in ATTACKS.items()}
JUDGED["smoothing loss"] = lambda m, d: smoothing_loss(smooth(m), *d.tensors, epsilon=1.0)[0].item()
JUDGED["own attack"] = partial(
    accuracy,
    attack=lambda m, x, y: (
        x + torch.autograd.grad(F.cross_entropy(m(x.requires_grad_()), y), x)[0].sign()
    ).clamp(0, 1),
)


@pytest.mark.parametrize("network", [ConvNN, partial(linear, side=28, classes=10)])
@pytest.mark.parametrize("judge", JUDGED)
def test_settings_of_autograd_change_nothing_and_stay(judge, network):
    results = []
    for setting in (nullcontext, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        model = network().eval()
        with setting():
            # Made here: tensors of inference mode must not trouble autograd.
            dataset = data()
            inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            found = JUDGED[judge](model, dataset)
            assert inside == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if judge == "train_model":
            found = found["step_loss"]
        if isinstance(found, TensorDataset):
            found = found.tensors[0]
        results.append(found)
    assert repr(results[0]) == repr(results[1]) == repr(results[2])
