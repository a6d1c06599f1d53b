"""The checklist: each check on a model made to trigger it, none on models that are sound."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from src.models import ConvNN, SmoothClassifier
from src.robustness.checklist import (
    CHECKS,
    SATURATED,
    allowed,
    evaluation_warnings,
    short_warnings,
    warning_lines,
)
from src.robustness.evaluation import attack_evaluation
from src.robustness.fixed_radii import attack_hits
from src.robustness.smallest_epsilon import epsilon_curves
from src.training_and_evaluation import train_model
from tests.helpers import halves, linear

RADII = (("linf", 0.1), ("linf", 0.3), ("l2", 2.0))
SOUND = halves(100)


class Between(nn.Module):
    """A trained linear model with a function before it and one behind it."""

    def __init__(self, before=lambda x: x, behind=lambda x: x):
        super().__init__()
        self.before, self.inner, self.behind = before, linear(), behind
        train_model(self.inner, halves(seed=1), epochs=3, batch_size=32, shift=0, progress=False)

    def forward(self, images):
        return self.behind(self.inner(self.before(images)))


def quantised(images):
    """Steps of one fifth: the gradient of rounding is zero."""
    return (5 * images).round() / 5


def warnings_of(model, dataset=SOUND, hits=None, **options):
    """{check: warning} of a model after a short attack, or of hits made by hand."""
    if hits is None:
        hits = attack_hits(model, dataset, steps=5, radii=RADII, progress=False)
    found = evaluation_warnings(model, dataset, hits, **options)
    assert [w["check"] for w in found] == [c for c in CHECKS if c in {w["check"] for w in found}]
    return {warning["check"]: warning for warning in found}


def hits_of(broken, images=100):
    """`attack_hits` made by hand: {(attack, norm, epsilon): numbers of the broken images}."""
    hits = {("none", "", 0.0): torch.ones(images, dtype=torch.bool)}
    for key, numbers in broken.items():
        hits[key] = torch.ones(images, dtype=torch.bool)
        hits[key][list(numbers)] = False
    return hits


def test_sound_linear_model_triggers_nothing():
    model = Between()
    found = attack_evaluation(model, SOUND, range(100), range(0, 100, 5), steps=10)
    assert found["warnings"] == []
    # It is attacked with success, and not everywhere, so the checks had something to see.
    accuracies = [row["accuracy"] for row in found["table"]]
    assert accuracies[0] == 1
    assert min(accuracies) < 0.1
    assert sum(accuracy > 0.5 for accuracy in accuracies) > 3
    assert warning_lines(found["warnings"]) == f"checklist: {len(CHECKS)} checks, no warnings"


def test_sound_network_triggers_nothing():
    torch.manual_seed(0)
    model = ConvNN((2, 3))
    train_model(model, halves(side=28), epochs=3, batch_size=32, progress=False)
    dataset = halves(60, side=28, seed=2)
    assert attack_evaluation(model, dataset, range(60), range(20), steps=10)["warnings"] == []


def test_quantised_input_hides_the_gradient():
    model = Between(before=quantised)
    found = warnings_of(model)
    assert found["zero gradients"]["images"] == found["zero gradients"]["of"] == 100
    assert "gradient-free stronger" in found
    warning = found["gradient-free stronger"]
    assert (warning["norm"], warning["epsilon"]) in RADII
    assert allowed(warning["of"]) < warning["images"] <= warning["of"]
    assert "saturated loss" not in found


def test_large_logits_saturate_the_loss():
    found = warnings_of(Between(behind=lambda logits: 3000 * logits))
    assert found["saturated loss"]["images"] >= SATURATED * 100
    assert "margin" in found["saturated loss"]["advice"]
    assert "zero gradients" in found
    # The gradient of float32's cross-entropy is zero only where the probability is 1.
    assert found["zero gradients"]["images"] <= found["saturated loss"]["images"]


def test_a_few_saturated_images_are_sound():
    # 9 of 100 images, beyond doubt because they are brighter than the others.
    few = torch.arange(100) < 9
    dataset = halves(100)
    dataset.tensors[0][few, :, 0, 0] = 1
    scale = Between(behind=lambda logits: logits)
    inner = scale.forward
    scale.forward = lambda x: inner(x) * (1 + 2000 * (x[:, :, 0, 0] > 0.99))
    hits = attack_hits(scale, dataset, steps=1, radii=RADII[:1], progress=False)
    assert "saturated loss" not in warnings_of(scale, dataset, hits)


@pytest.mark.parametrize(("only", "warned"), [(1, False), (2, True), (40, True)])
def test_single_step_that_breaks_more(only, warned):
    hits = hits_of(
        {
            ("single step", "linf", 0.1): range(50),
            ("2x PGD-5", "linf", 0.1): range(only, 100),
            ("single step", "l2", 0.5): range(10),
            ("2x PGD-5", "l2", 0.5): range(10),
        }
    )
    found = warnings_of(Between(), hits=hits)
    assert ("multi-step weaker" in found) == warned
    if warned:
        warning = found["multi-step weaker"]
        where = ("norm", "epsilon", "images", "of")
        assert [warning[key] for key in where] == ["linf", 0.1, only, 100]


@pytest.mark.parametrize(("lost", "warned"), [(0, False), (1, False), (2, True)])
def test_accuracy_that_rises_with_epsilon(lost, warned):
    hits = hits_of(
        {
            ("2x PGD-5", "linf", 0.1): range(60),
            ("2x PGD-5", "linf", 0.2): range(lost, 90),
            # Another norm's radii are not compared.
            ("2x PGD-5", "l2", 0.5): range(90, 100),
        }
    )
    found = warnings_of(Between(), hits=hits)
    assert ("accuracy rises with epsilon" in found) == warned
    if warned:
        assert found["accuracy rises with epsilon"]["epsilon"] == 0.2


@pytest.mark.parametrize(("standing", "warned"), [(50, False), (60, False), (61, True)])
def test_accuracy_above_chance_at_one_half(standing, warned):
    # Chance is one half. Clopper-Pearson's interval of 60 of 100 begins at 0.497, of 61 at 0.507.
    rows = [
        {"norm": "linf", "attack": "2x PGD-5", "smallest_epsilon": 0.6 if k < standing else 0.1}
        for k in range(100)
    ]
    found = warnings_of(Between(), curve=epsilon_curves(rows))
    assert ("above chance" in found) == warned
    if warned:
        assert found["above chance"]["epsilon"] == 0.5


def test_attack_that_hidden_gradients_stop_does_not_reach_chance():
    found = attack_evaluation(Between(before=quantised), SOUND, range(100), range(40), steps=2)
    checks = {warning["check"]: warning for warning in found["warnings"]}
    assert {"zero gradients", "above chance", "gradient-free stronger"} <= set(checks)
    assert checks["above chance"]["of"] == 40


@pytest.mark.parametrize(("stands", "warned"), [(range(60, 100), True), ((), False)])
def test_noise_as_strong_as_the_attack(stands, warned):
    # A model that loses its way one step aside: noise breaks it, the attack of these hits not.
    fragile = Between()
    inner = fragile.forward
    clean = SOUND.tensors[0]

    def forward(images):
        aside = (images[:, None] - clean).abs().flatten(2).amax(dim=2).amin(dim=1) > 0.01
        return torch.where(aside[:, None], -inner(images), inner(images))

    fragile.forward = forward
    broken = set(range(100)) - set(stands)
    found = warnings_of(fragile, hits=hits_of({("2x PGD-5", "linf", 0.1): broken}))
    assert ("noise as strong" in found) == warned
    if warned:
        assert found["noise as strong"]["images"] == 100
        assert "60 by the attack" in found["noise as strong"]["seen"]


@pytest.mark.parametrize("smoothing", [False, True])
def test_logits_that_change_from_call_to_call(smoothing):
    torch.manual_seed(0)
    model = Between(before=lambda x: F.dropout(x, 0.3, training=True))
    if smoothing:
        model = SmoothClassifier(Between(), 0.25, num_classes=2)
    # Deterministic hits: the other checks are not the matter here.
    found = warnings_of(model, hits=hits_of({}))
    assert set(found) == {"changing logits"}
    assert found["changing logits"]["images"] > 90


def test_probabilities_in_place_of_logits():
    found = warnings_of(Between(behind=lambda logits: logits.softmax(dim=1)))
    assert found["probabilities"]["images"] == 100
    # Two outputs that happen to lie in [0, 1] are none.
    found = warnings_of(Between(behind=lambda logits: logits.softmax(dim=1) + 0.01))
    assert "probabilities" not in found


def test_another_search_can_take_the_place_of_the_random_one():
    def white(model, images, labels, epsilon, norm):
        return torch.where((labels == 0)[:, None, None, None], 1 - images, images)

    found = warnings_of(Between(), hits=hits_of({("2x PGD-5", "l2", 0.5): []}), search=white)
    # Turned upside down in brightness, the halves change places.
    assert found["gradient-free stronger"]["images"] == 50


@pytest.mark.parametrize(("standing", "warned"), [(5, False), (6, True)])
def test_images_that_others_break_are_counted_among_all_that_were_attacked(standing, warned):
    # PGD breaks all but a few of 500 images, the search the rest of them too: 1 % is allowed.
    def white(model, images, labels, epsilon, norm):
        return 1 - images

    dataset = halves(500)
    hits = hits_of({("2x PGD-5", "linf", 0.1): range(standing, 500)}, images=500)
    hits |= {("2x PGD-5", "l2", 2.0): torch.arange(500) < 0}
    found = warnings_of(Between(), dataset, hits, search=white)
    assert ("gradient-free stronger" in found) == warned
    if warned:
        warning = found["gradient-free stronger"]
        assert [warning[key] for key in ("epsilon", "images", "of")] == [0.1, 6, 6]


def test_the_ball_with_the_most_images_is_named_not_that_with_the_largest_share():
    def white(model, images, labels, epsilon, norm):
        return torch.where(
            (torch.arange(len(images)) < 20)[:, None, None, None], 1 - images, images
        )

    dataset = halves(500)
    hits = hits_of({("2x PGD-5", "linf", 0.1): [], ("2x PGD-5", "linf", 0.3): range(10, 500)}, 500)
    warning = warnings_of(Between(), dataset, hits, search=white)["gradient-free stronger"]
    assert [warning[key] for key in ("epsilon", "images", "of")] == [0.1, 20, 200]


class Counts(nn.Module):
    """Class 1 where more than `least` pixels are white, behind thresholds with gradient one."""

    least = 6.5

    def forward(self, images):
        behind = ((images - 0.4) / 0.2).clamp(0, 1)
        seen = images + (behind - images).detach()
        lead = seen.flatten(1).sum(dim=1) - self.least
        return torch.stack([-lead, lead], dim=1)


def test_many_small_steps_miss_what_a_few_pixels_break():
    # A black image becomes one of class 1 with 7 white pixels or 14 grey ones, within 2 in l2;
    # PGD's steps move all 64 alike, by a quarter. The white images are far from anything.
    labels = torch.arange(100) % 2
    dataset = TensorDataset(labels[:, None, None, None].float().expand(100, 1, 8, 8), labels)
    hits = attack_hits(Counts(), dataset, steps=20, radii=[("l2", 2.0)], progress=False)
    assert all(right.all() for right in hits.values())
    warning = warnings_of(Counts(), dataset, hits)["few pixels stronger"]
    assert [warning[key] for key in ("norm", "epsilon", "images", "of")] == ["l2", 2.0, 50, 100]
    assert "a few pixels far" in warning["seen"]


def test_few_pixels_are_tried_in_l2_only():
    dataset = TensorDataset(torch.zeros(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64))
    hits = hits_of({("2x PGD-5", "linf", 0.55): []}, images=10)
    assert "few pixels stronger" not in warnings_of(Counts(), dataset, hits)


def test_warnings_are_one_sentence_each_and_go_to_json():
    warnings = list(warnings_of(Between(before=quantised)).values())
    lines = warning_lines(warnings).split("\n")
    assert lines[0] == f"checklist: {len(CHECKS)} checks, {len(warnings)} warnings"
    assert len(lines) == 1 + len(warnings)
    for line, short, warning in zip(lines[1:], short_warnings(warnings), warnings, strict=True):
        assert warning["check"] in line
        assert warning["advice"] in line
        assert f"{warning['images']} of {warning['of']} images" in line
        assert short.startswith(warning["check"])
        assert warning["norm"] in short
    assert json.loads(json.dumps(warnings)) == warnings


def test_tolerance_is_one_percent_and_one_image():
    assert [allowed(images) for images in (1, 50, 100, 199, 200, 1000)] == [1, 1, 1, 1, 2, 10]
