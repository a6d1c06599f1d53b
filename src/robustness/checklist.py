"""Ten checks that tell when an evaluation of robustness may be void.

The checklist of Carlini et al., "On Evaluating Adversarial Robustness" (arXiv:1902.06705), as far
as a program can go through it. If no check finds anything, that proves nothing. What a check finds
has to be understood before the numbers can be believed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.checks import ask, check_count, check_dataset
from src.engine.untouched import evaluation_form
from src.robustness.few_pixels import few_pixels_attack
from src.robustness.fixed_radii import CLEAN, SINGLE_STEP
from src.robustness.noise import random_noise
from src.robustness.square import square_attack
from src.training_and_evaluation import correct
from src.utils import spread_indices, subset
from src.verdicts import batches, cross_entropy, judge, with_gradients

# The checks, and what to do about what each one finds.
CHECKS = {
    "zero gradients": "use loss='margin', or attack a smooth stand-in for the step that hides it",
    "saturated loss": "use loss='margin'",
    "multi-step weaker": "use more steps, a smaller step_size or more restarts",
    "gradient-free stronger": "gradients mislead here; 'worst known' counts what the search breaks",
    "few pixels stronger": "small steps mislead here; 'worst known' counts what few pixels break",
    "accuracy rises with epsilon": "use more steps and restarts",
    "above chance": "no image can resist there, so find what stops the attack",
    "noise as strong": "find out why this model's gradients lead nowhere",
    "changing logits": "attack the mean over the randomness, or switch it off",
    "probabilities": "return logits, without the softmax",
}
# Two attacks that work may each break images that the other leaves. Up to this share of the images
# compared, or one image, is no reason for a warning.
TOLERANCE = 0.01
# From this share of images with a loss of exactly 0 in float32 on, the loss is called saturated.
SATURATED = 0.1

# The attack without gradients: a few calls are enough to find what gradients miss.
SHORT_SEARCH = partial(square_attack, queries=1000)

# (attack, norm, epsilon) -> which images stand, as `attack_hits` returns it.
Standing = Mapping[tuple[str, str, float], Tensor]


class Tried(NamedTuple):
    """What came of trying another attack in one ball."""

    sample: Tensor  # numbers of the images on which it was tried at first, int64
    broken: Tensor  # bool (N,), which of all images it broke


# (check, norm, epsilon) -> what came of the attack of this check.
Others = Mapping[tuple[str, str, float], Tried]


@with_gradients()
def evaluation_warnings(
    model: nn.Module,
    dataset: TensorDataset,
    standing: Standing,
    curve: Sequence[Mapping] = (),
    *,
    others: Others | None = None,
    **options,
) -> list[dict]:
    """Go through the checklist; at most one warning per check, for the ball where it is worst.

    Args:
        model: images -> logits (B, classes).
        dataset: the attacked images (N, C, H, W) in [0, 1], and int64 labels (N,).
        standing: what `attack_hits` found for them. All attacks in it but the single step count
            as the multi-step attack that is being checked.
        curve: rows of `epsilon_curves`, for "above chance".
        others: what `other_attacks` found; default: what it finds now, with these `options`.

    Returns:
        Dictionaries with `check`, `seen` (a clause), `norm` and `epsilon` ("" and None if no
        ball is concerned), `images` (how many it concerns) out of `of`, and `advice`.
    """
    check_dataset(dataset, empty=False)
    broken = _broken_by_multi_step(standing)
    others = other_attacks(model, dataset, standing, **options) if others is None else others
    found = [
        *_outputs(model, dataset),
        *_multi_step_weaker(standing, broken),
        *_rises_with_epsilon(broken),
        *_above_chance(curve, dataset),
        *_stronger(standing, broken, others),
        *_noise_as_strong(broken, others),
    ]
    worst = {}
    for warning in found:
        before = worst.setdefault(warning["check"], warning)
        if warning["images"] / warning["of"] > before["images"] / before["of"]:
            worst[warning["check"]] = warning
    return [worst[check] | {"advice": CHECKS[check]} for check in CHECKS if check in worst]


def other_attacks(
    model: nn.Module,
    dataset: TensorDataset,
    standing: Standing,
    *,
    images: int = 200,
    search: Callable = SHORT_SEARCH,
) -> Others:
    """What attacks of other kinds break, in each ball of `standing`.

    A short Square Attack and few pixels (l2 only) are tried on a sample of the images that the
    multi-step attack left, noise on a sample of all that are classified correctly. If one of them
    breaks an image that the multi-step attack left, it is tried on all that are left: otherwise a
    sample could refute a number that is shown.

    Args:
        model, dataset, standing: as for `evaluation_warnings`.
        images: size of each sample, at most.
        search: the attack without gradients: (model, images, labels, epsilon, norm) -> images.
    """
    check_dataset(dataset, empty=False)
    check_count("images", images)
    clean, found = standing[CLEAN], {}
    for (norm, epsilon), broken_before in _broken_by_multi_step(standing).items():
        left = clean & ~broken_before
        plan = [("gradient-free stronger", search, left), ("noise as strong", random_noise, clean)]
        if norm == "l2":
            plan.append(("few pixels stronger", few_pixels_attack, left))
        for check, attack, among in plan:
            attack = partial(attack, epsilon=epsilon, norm=norm)
            numbers, broken = among.nonzero()[:, 0], torch.zeros_like(clean)
            sample = numbers[list(spread_indices(len(numbers), images))]
            _try_on(model, dataset, attack, sample, broken)
            if (broken & left).any():
                rest = left.index_fill(0, sample, False).nonzero()[:, 0]
                _try_on(model, dataset, attack, rest, broken)
            found[check, norm, epsilon] = Tried(sample, broken)
    return found


def _try_on(model, dataset, attack: Callable, chosen: Tensor, broken: Tensor) -> None:
    """Note in `broken` which of the chosen images the attack breaks."""
    if len(chosen):
        broken[chosen] = ~correct(model, subset(dataset, chosen), attack=attack)


def warning_lines(warnings: Sequence[Mapping]) -> str:
    """The checklist for the console: a heading, then one sentence per warning."""
    count = {0: "no warnings", 1: "1 warning"}.get(len(warnings), f"{len(warnings)} warnings")
    lines = [f"  {_where(w)}: {w['seen']}; {w['advice']}" for w in warnings]
    return "\n".join([f"checklist: {len(CHECKS)} checks, {count}", *lines])


def short_warnings(warnings: Sequence[Mapping]) -> list[str]:
    """The warnings for a figure: check, ball and number of images."""
    return [f"{_where(w)}: {w['images']:,} of {w['of']:,} images" for w in warnings]


def _where(warning: Mapping) -> str:
    ball = f" at {warning['norm']} {warning['epsilon']:g}" if warning["norm"] else ""
    return warning["check"] + ball


def allowed(images: int) -> int:
    """How many of the images compared may speak against the attack without a warning."""
    return max(1, int(TOLERANCE * images))


def _warning(check: str, seen: str, images: int, of: int, norm: str = "", epsilon=None) -> dict:
    where = {"norm": norm, "epsilon": epsilon, "images": images, "of": of}
    return {"check": check, "seen": f"{images:,} of {of:,} images {seen}", **where}


def _broken_by_multi_step(standing: Standing) -> dict[tuple[str, float], Tensor]:
    """(norm, epsilon) -> images that any attack but the single step breaks, bool (N,)."""
    clean, broken = standing[CLEAN], {}
    for (attack, *ball), still in standing.items():
        if attack not in (CLEAN[0], SINGLE_STEP):
            before = broken.get(tuple(ball), torch.zeros_like(clean))
            broken[tuple(ball)] = before | (clean & ~still)
    return broken


def _outputs(model: nn.Module, dataset: TensorDataset) -> Iterator[dict]:
    """What the logits of the clean images and their gradients show, in one pass."""
    parts, images = batches(model, *dataset.tensors, batch_size=1000), len(dataset)
    with evaluation_form(model, probe=True) as network:
        signs = [_signs(network, *part) for part in parts]
    seen = {
        "zero gradients": "have a gradient of exactly zero",
        "saturated loss": "have a probability of exactly 1 in float32",
        "changing logits": "get other logits when they are classified again",
        "probabilities": "get nonnegative outputs that sum to 1",
    }
    # A gradient of zero is never sound; that a few images are beyond doubt is.
    least = {"saturated loss": SATURATED * images, "probabilities": images}
    for check, clause in seen.items():
        count = sum(int(part[check].sum()) for part in signs)
        if count >= max(least.get(check, 1), 1):
            yield _warning(check, clause, count, images)


def _signs(network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Check -> on which images of a batch its sign shows, bool (B,)."""
    logits, _, _, gradient = judge(network, images, labels, cross_entropy)
    with torch.no_grad():
        change = (ask(network, images) - logits).abs().amax(dim=1)
    # Rounding may depend on the order in which a device adds up.
    rounding = 1e-4 * (1 + logits.abs().amax(dim=1))
    return {
        "zero gradients": (gradient == 0).flatten(1).all(dim=1),
        "saturated loss": logits.softmax(dim=1).amax(dim=1) == 1,
        "changing logits": change > rounding,
        "probabilities": (logits >= 0).all(dim=1) & ((logits.sum(dim=1) - 1).abs() < 1e-4),
    }


def _multi_step_weaker(standing: Standing, broken: Mapping) -> Iterator[dict]:
    """Balls in which the single step breaks images that the multi-step attack does not."""
    clean = standing[CLEAN]
    for ball, by_many in broken.items():
        after_one = standing.get((SINGLE_STEP, *ball), clean)
        only = int((clean & ~after_one & ~by_many).sum())
        if only > allowed(len(clean)):
            seen = "are broken by the single step alone"
            yield _warning("multi-step weaker", seen, only, len(clean), *ball)


def _rises_with_epsilon(broken: Mapping[tuple[str, float], Tensor]) -> Iterator[dict]:
    """Balls in which images stand that the attack broke in a smaller ball."""
    check = "accuracy rises with epsilon"
    for (norm, epsilon), now in broken.items():
        for (other, smaller), before in broken.items():
            lost = int((before & ~now).sum())
            if other == norm and smaller < epsilon and lost > allowed(len(now)):
                seen = f"are broken within {smaller:g} but not here"
                yield _warning(check, seen, lost, len(now), norm, epsilon)


def _above_chance(curve: Sequence[Mapping], dataset: TensorDataset) -> Iterator[dict]:
    """Radii of at least 1/2 in linf at which accuracy is above chance.

    Every image can be made grey there, and of equal images a model can only get those of one
    class right. So chance is the share of the most frequent class, on MNIST 11 %.
    """
    chance = dataset.tensors[1].bincount().max() / len(dataset)
    for row in curve:
        # Even the lower end of the 95 % interval.
        if row["norm"] == "linf" and row["epsilon"] >= 0.5 and row["low"] > chance:
            where = (row["correct"], row["images"], "linf", row["epsilon"])
            yield _warning("above chance", "stand", *where)


# Check -> what its attack is called in a sentence.
_OTHERS = {
    "gradient-free stronger": "a random search",
    "few pixels stronger": "moving a few pixels far",
}


def _stronger(standing: Standing, broken: Mapping, others: Others) -> list[dict]:
    """Per check, the ball in which its attack breaks most images that the multi-step one left."""
    clean, worst, most = standing[CLEAN], {}, {}
    for (check, *ball), (sample, fallen) in others.items():
        if check not in _OTHERS or not len(sample):
            continue
        count, left = int(fallen[sample].sum()), int((clean & ~broken[tuple(ball)]).sum())
        # Of all images, not of those that are left: two out of two may be two out of a thousand.
        estimate = count * left / len(sample)
        if estimate > most.get(check, allowed(len(clean))):
            most[check] = estimate
            seen = f"that withstand the gradient are broken by {_OTHERS[check]}"
            worst[check] = _warning(check, seen, count, len(sample), *ball)
    return list(worst.values())


def _noise_as_strong(broken: Mapping, others: Others) -> Iterator[dict]:
    """Balls in which the multi-step attack breaks hardly more images than random noise does."""
    for (check, *ball), (sample, fallen) in others.items():
        few = allowed(len(sample))
        by_noise, by_attack = (int(f[sample].sum()) for f in (fallen, broken[tuple(ball)]))
        # Nothing is wrong if the attack breaks everything, or if noise breaks next to nothing:
        # a handful of images each are too few to tell the two apart.
        everything = by_attack >= len(sample) - few
        close = by_noise > 3 * few and by_attack <= by_noise + few
        if check == "noise as strong" and close and not everything:
            seen = f"are broken by noise, {by_attack:,} by the attack"
            yield _warning(check, seen, by_noise, len(sample), *ball)
