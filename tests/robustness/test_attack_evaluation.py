"""What an evaluation shows: no number that one of its own attacks refuted."""

import pytest
import torch

from src.models import ConvNN
from src.reports.plotting import WORST
from src.robustness import evaluation as module
from src.robustness.checklist import other_attacks
from src.robustness.evaluation import attack_evaluation
from src.robustness.few_pixels import few_pixels_attack
from src.robustness.fixed_radii import WORST_KNOWN, multi_step_name
from src.robustness.smallest_epsilon import CURVE_EPSILONS
from src.robustness.thresholds import thresholds_attack
from src.training_and_evaluation import correct
from src.utils import subset
from tests.helpers import halves
from tests.robustness.test_checklist import Between, Counts, hits_of, quantised

RADII = (("linf", 0.1), ("linf", 0.2), ("l2", 1.0), ("l2", 2.0))


def counts(rows, attack):
    """{(norm, epsilon): correct} of one attack."""
    return {(r["norm"], r["epsilon"]): r["correct"] for r in rows if r["attack"] == attack}


def check(found, steps):
    """What holds of any evaluation."""
    table, curve = found["table"], found["curve"]
    worst, few = counts(table, WORST_KNOWN), multi_step_name(max(steps // 2, 1))
    for attack in ("single step", multi_step_name(steps)):
        by_attack = counts(table, attack)
        assert by_attack.keys() == worst.keys()
        assert all(worst[ball] <= by_attack[ball] for ball in worst)
    on_curve, alone = counts(curve, WORST_KNOWN), counts(curve, few)
    assert on_curve.keys() == alone.keys()
    assert len(alone) == sum(map(len, CURVE_EPSILONS.values()))
    assert all(on_curve[ball] <= alone[ball] for ball in alone)
    for points in (worst, on_curve, alone):
        for (norm, epsilon), hits in points.items():
            assert all(hits <= points[b] for b in points if b[0] == norm and b[1] <= epsilon)
    return worst, on_curve


def test_the_words_are_the_same_with_and_without_torch():
    assert WORST == WORST_KNOWN


def test_table_and_curve_of_the_same_images_agree(untrained):
    model, dataset = untrained
    found = attack_evaluation(model, dataset, range(40), range(40), steps=2, radii=RADII)
    worst, on_curve = check(found, 2)
    assert all(on_curve[ball] == hits for ball, hits in worst.items())
    assert 0 < min(worst.values()) < max(worst.values()) < 40 or min(worst.values()) == 0


def test_images_of_the_curve_need_not_be_those_of_the_table(untrained):
    model, dataset = untrained
    # Not in order, and some in one of the two only.
    table, curve = [30, 2, 7, 11, 12], [12, 5, 30, 7]
    found = attack_evaluation(model, dataset, table, curve, steps=2, radii=RADII)
    check(found, 2)
    rows = [row for row in found["smallest_epsilons"] if row["attack"] == WORST_KNOWN]
    assert [row["index"] for row in rows] == 2 * curve
    assert [row["label"] for row in rows] == 2 * dataset.tensors[1][curve].tolist()
    # Each image is judged for itself: the same ones alone say the same.
    both = attack_evaluation(model, dataset, table + curve, table + curve, steps=2, radii=RADII)
    known = {
        (row["index"], row["norm"]): row["smallest_epsilon"]
        for row in both["smallest_epsilons"]
        if row["attack"] == WORST_KNOWN
    }
    for row in rows:
        at = row["smallest_epsilon"]
        assert at == pytest.approx(known[row["index"], row["norm"]], abs=0.051)


def test_few_pixels_are_counted_where_they_are_stronger():
    # As for the checklist: PGD breaks nothing within 2, 7 white pixels break the 50 black images.
    labels = torch.arange(100) % 2
    images = labels[:, None, None, None].float().expand(100, 1, 8, 8).clone()
    dataset = torch.utils.data.TensorDataset(images, labels)
    # 40 images in the table only.
    found = attack_evaluation(
        Counts(), dataset, range(100), range(60), steps=8, radii=[("l2", 2.0)]
    )
    worst, on_curve = check(found, 8)
    assert counts(found["table"], multi_step_name(8))["l2", 2.0] == 100
    assert worst["l2", 2.0] == 50
    # 14 pixels to grey, each of which counts a half, are nearer than 7 moved by 0.75 to white.
    smallest = {
        row["index"]: row["smallest_epsilon"]
        for row in found["smallest_epsilons"]
        if (row["attack"], row["norm"]) == (WORST_KNOWN, "l2")
    }
    assert smallest[0] == pytest.approx(0.5 * 14**0.5)
    assert on_curve["l2", 1.5] == 60
    assert on_curve["l2", 2.0] == 30
    assert "few pixels stronger" in {warning["check"] for warning in found["warnings"]}


def test_what_the_search_without_gradients_breaks_is_counted():
    # Rounded pixels have no gradient; the Square Attack breaks images all the same.
    model, dataset, radii = Between(before=quantised), halves(100), [*RADII, ("l2", 3.0)]
    found = attack_evaluation(model, dataset, range(100), range(0, 100, 2), steps=2, radii=radii)
    worst, on_curve = check(found, 2)
    stronger = {
        ball: counts(found["table"], multi_step_name(2))[ball] - worst[ball] for ball in worst
    }
    assert max(stronger.values()) > 20
    assert "gradient-free stronger" in {warning["check"] for warning in found["warnings"]}
    assert on_curve["l2", 3.0] < counts(found["curve"], multi_step_name(1))["l2", 3.0]


def test_a_sample_that_shows_a_stronger_attack_is_followed_by_all_images():
    def white(model, images, labels, epsilon, norm):
        tried.append(len(images))
        return 1 - images

    tried, dataset = [], halves(500)
    hits = hits_of({("PGD", "linf", 0.1): range(100), ("PGD", "linf", 0.3): range(500)}, 500)
    others = other_attacks(Between(), dataset, hits, search=white)
    sample, broken = others["gradient-free stronger", "linf", 0.1]
    assert len(sample) == 200
    assert broken.tolist() == [False] * 100 + [True] * 400
    assert tried == [200, 200]

    # A search that finds nothing is not asked again; nor is one where nothing stands.
    def nothing(model, images, labels, epsilon, norm):
        tried.append(len(images))
        return images

    tried.clear()
    others = other_attacks(Between(), dataset, hits, search=nothing)
    assert not others["gradient-free stronger", "linf", 0.1][1].any()
    assert tried == [200]


def test_the_attack_behind_the_thresholds_is_tried_on_networks_with_thresholds(
    monkeypatch, untrained
):
    torch.manual_seed(0)
    model = ConvNN((2, 3), thresholds=(0.4, 0.6)).eval()
    images = torch.rand(30, 1, 28, 28)
    with torch.no_grad():
        model.output.bias -= model(images).mean(dim=0)
        labels = model(images).argmax(dim=1)
    dataset = torch.utils.data.TensorDataset(images, labels)
    found = attack_evaluation(model, dataset, range(30), range(30), steps=2, radii=RADII)
    worst, _ = check(found, 2)
    for (norm, epsilon), hits in worst.items():
        for attack, options in (
            (thresholds_attack, module.THRESHOLDS_OPTIONS[norm]),
            (few_pixels_attack, {}),
        ):
            if attack is few_pixels_attack and norm == "linf":
                continue

            def bounded(network, x, y, attack=attack, ball=(epsilon, norm), options=options):
                return attack(network, x, y, *ball, **options)

            assert hits <= int(correct(model, dataset, attack=bounded).sum())
    plain, tried = untrained, []
    monkeypatch.setattr(module, "thresholds_attack", lambda *_, **__: tried.append(1))
    attack_evaluation(
        plain[0], subset(plain[1], range(5)), range(5), range(5), steps=2, radii=RADII
    )
    assert not tried


def test_each_norm_says_something_of_the_other():
    # Broken within 0.01 in linf is broken within 0.28 in l2, and within 0.1 in l2 also in linf.
    known = {"linf": module.np.array([0.01, 3.0]), "l2": module.np.array([5.0, 0.1])}
    module._share(known, 784)
    assert known["linf"].tolist() == [0.01, 0.1]
    assert known["l2"] == pytest.approx([0.28, 0.1])
