"""Ten checks that tell when an evaluation of robustness may be void.

The checklist of Carlini et al., "On Evaluating Adversarial Robustness" (arXiv:1902.06705), as far
as a program can go through it. That nothing is found proves nothing; what is found is a reason not
to believe the numbers before it is understood.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.checks import check_count, check_dataset
from src.engine.untouched import evaluation_form
from src.robustness.few_pixels import few_pixels_attack
from src.robustness.fixed_radii import SINGLE_STEP
from src.robustness.noise import random_noise, random_search
from src.training_and_evaluation import correct
from src.utils import spread_indices, subset
from src.verdicts import gradient_of, logits_of, with_gradients

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
# Two attacks that work may each break an image that the other leaves: so many of the images
# compared, and one in any case, are no reason for a warning.
TOLERANCE = 0.01
# The share of images whose loss is exactly 0 in float32 from which on that is called saturated.
SATURATED = 0.1

Hits = Mapping[tuple[str, str, float], Tensor]
# (check, norm, epsilon) -> the numbers of the images sampled, and which of all are broken.
Others = Mapping[tuple[str, str, float], tuple[Tensor, Tensor]]


@with_gradients()
def evaluation_warnings(
    model: nn.Module,
    dataset: TensorDataset,
    hits: Hits,
    curve: Sequence[Mapping] = (),
    *,
    others: Others | None = None,
    **options,
) -> list[dict]:
    """Go through the checklist; at most one warning a check, for the ball where it is worst.

    Args:
        model: images -> logits (B, classes).
        dataset: the images that were attacked, (N, 1, 28, 28) in [0, 1], and int64 labels (N,).
        hits: what `attack_hits` found for them. All but the clean images and the single step
            counts as the multi-step attack that is being checked.
        curve: rows of `epsilon_curves`, for "above chance".
        others: what `other_attacks` found; default: what it finds now, with these `options`.

    Returns:
        Dictionaries with `check`, `seen` (a clause), `norm` and `epsilon` ("" and None if no
        ball is concerned), `images` (how many, out of) `of`, and `advice`.
    """
    check_dataset(dataset, empty=False)
    broken = _broken_by_multi_step(hits)
    others = other_attacks(model, dataset, hits, **options) if others is None else others
    found = [
        *_outputs(model, dataset),
        *_multi_step_weaker(hits, broken),
        *_rises_with_epsilon(broken),
        *_above_chance(curve, dataset),
        *_stronger(hits, broken, others),
        *_noise_as_strong(broken, others),
    ]
    worst = {}
    for warning in found:
        check = warning["check"]
        if check not in worst or _share(warning) > _share(worst[check]):
            worst[check] = warning
    return [worst[check] | {"advice": CHECKS[check]} for check in CHECKS if check in worst]


def other_attacks(
    model: nn.Module,
    dataset: TensorDataset,
    hits: Hits,
    *,
    images: int = 200,
    search: Callable = random_search,
) -> Others:
    """What attacks of other kinds break, in each ball of `hits`.

    Random search and few pixels are tried on a sample of the images that the multi-step attack
    left, noise on one of all that are right. If a sample shows that the attack left too much, all
    that it left are tried: no number shown may be refuted by a sample of it.

    Args:
        model, dataset, hits: as for `evaluation_warnings`.
        images: for how many images a ball each attack is tried at first.
        search: the attack without gradients: (model, images, labels, epsilon, norm) -> images.
    """
    check_dataset(dataset, empty=False)
    check_count("images", images)
    clean, found = hits["none", "", 0.0], {}
    for (norm, epsilon), by_many in _broken_by_multi_step(hits).items():
        standing = clean & ~by_many
        kinds = [
            ("gradient-free stronger", search, standing),
            ("noise as strong", random_noise, clean),
        ]
        if norm == "l2":
            kinds.append(("few pixels stronger", few_pixels_attack, standing))
        for check, attack, among in kinds:
            bounded = partial(attack, epsilon=epsilon, norm=norm)
            numbers, broken = among.nonzero()[:, 0], torch.zeros_like(clean)
            sample = numbers[list(spread_indices(len(numbers), images))]
            _try_on(model, dataset, bounded, sample, broken)
            if (broken & standing).any():
                standing_still = standing.index_fill(0, sample, False).nonzero()[:, 0]
                _try_on(model, dataset, bounded, standing_still, broken)
            found[check, norm, epsilon] = sample, broken
    return found


def _try_on(model, dataset, attack: Callable, chosen: Tensor, broken: Tensor) -> None:
    """Note in `broken` which of the chosen images the attack breaks."""
    if len(chosen):
        broken[chosen] = ~correct(model, subset(dataset, chosen), attack=attack)


def warning_lines(warnings: Sequence[Mapping]) -> str:
    """What the console says of the checklist: one sentence a warning."""
    count = {0: "no warnings", 1: "1 warning"}.get(len(warnings), f"{len(warnings)} warnings")
    lines = [f"checklist: {len(CHECKS)} checks, {count}"]
    for warning in warnings:
        lines.append(f"  {_where(warning)}: {warning['seen']}; {warning['advice']}")
    return "\n".join(lines)


def short_warnings(warnings: Sequence[Mapping]) -> list[str]:
    """What fits in a figure: check, ball and share of images."""
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


def _share(warning: Mapping) -> float:
    return warning["images"] / warning["of"]


def _broken_by_multi_step(hits: Hits) -> dict[tuple[str, float], Tensor]:
    """(norm, epsilon) -> images that any attack but the single step breaks, bool (N,)."""
    clean, broken = hits["none", "", 0.0], {}
    for (attack, norm, epsilon), right in hits.items():
        if attack not in ("none", SINGLE_STEP):
            before = broken.get((norm, epsilon), torch.zeros_like(clean))
            broken[norm, epsilon] = before | (clean & ~right)
    return broken


def _outputs(model: nn.Module, dataset: TensorDataset) -> list[dict]:
    """What the logits of the clean images and their gradients show, in one pass."""
    counts = {check: int(bad.sum()) for check, bad in _signs(model, dataset).items()}
    images = len(dataset)
    seen = {
        "zero gradients": "have a gradient of exactly zero",
        "saturated loss": "have a probability of exactly 1 in float32",
        "changing logits": "get other logits when they are classified again",
        "probabilities": "get nonnegative outputs that sum to 1",
    }
    # A gradient of zero is never sound; a few images that are beyond doubt are.
    least = {"saturated loss": SATURATED * images, "probabilities": images}
    return [
        _warning(check, seen[check], count, images)
        for check, count in counts.items()
        if count >= max(least.get(check, 1), 1)
    ]


def _signs(model: nn.Module, dataset: TensorDataset, batch_size: int = 1000) -> dict[str, Tensor]:
    """Check -> for which images its sign shows, bool (N,)."""
    device = next(model.parameters(), dataset.tensors[0]).device
    parts = []
    with evaluation_form(model, probe=True) as network:
        for images, labels in zip(*(t.split(batch_size) for t in dataset.tensors), strict=True):
            images = images.to(device).clone().requires_grad_()
            labels = labels.to(device).clone()
            logits = logits_of(network, images, labels)
            gradient = gradient_of(F.cross_entropy(logits, labels, reduction="sum"), images)
            with torch.no_grad():
                change = (network(images) - logits).abs().amax(dim=1)
            # Rounding may depend on the order in which a device adds up.
            rounding = 1e-4 * (1 + logits.abs().amax(dim=1))
            total = logits.sum(dim=1)
            parts.append(
                {
                    "zero gradients": (gradient == 0).flatten(1).all(dim=1),
                    "saturated loss": logits.softmax(dim=1).amax(dim=1) == 1,
                    "changing logits": change > rounding,
                    "probabilities": (logits >= 0).all(dim=1) & ((total - 1).abs() < 1e-4),
                }
            )
    return {check: torch.cat([part[check].cpu() for part in parts]) for check in parts[0]}


def _multi_step_weaker(hits: Hits, broken: Mapping) -> list[dict]:
    """Balls in which the single step breaks images that the multi-step attack does not."""
    clean, warnings = hits["none", "", 0.0], []
    for ball, by_many in broken.items():
        if (SINGLE_STEP, *ball) in hits:
            only = int((clean & ~hits[(SINGLE_STEP, *ball)] & ~by_many).sum())
            if only > allowed(len(clean)):
                seen = "are broken by the single step alone"
                warnings.append(_warning("multi-step weaker", seen, only, len(clean), *ball))
    return warnings


def _rises_with_epsilon(broken: Mapping[tuple[str, float], Tensor]) -> list[dict]:
    """Balls in which images stand that a smaller ball's attack broke."""
    warnings = []
    for (norm, epsilon), now in broken.items():
        for (other, smaller), before in broken.items():
            lost = int((before & ~now).sum())
            if other == norm and smaller < epsilon and lost > allowed(len(now)):
                seen = f"are broken within {smaller:g} but not here"
                warnings.append(
                    _warning("accuracy rises with epsilon", seen, lost, len(now), norm, epsilon)
                )
    return warnings


def _above_chance(curve: Sequence[Mapping], dataset: TensorDataset) -> list[dict]:
    """Radii of at least 1/2 in linf at which accuracy is above chance.

    Every image can be made grey there, and of equal images no model gets more right than those
    of one class: chance is the share of the most frequent one, on MNIST 11 %.
    """
    chance = dataset.tensors[1].bincount().max() / len(dataset)
    return [
        _warning("above chance", "stand", row["correct"], row["images"], "linf", row["epsilon"])
        for row in curve
        # Even the lower end of the 95 % interval.
        if row["norm"] == "linf" and row["epsilon"] >= 0.5 and row["low"] > chance
    ]


# Check -> how its attack is called in a sentence.
_OTHERS = {
    "gradient-free stronger": "random search",
    "few pixels stronger": "moving a few pixels far",
}


def _stronger(hits: Hits, broken: Mapping, others: Others) -> list[dict]:
    """Per check, the ball in which its attack breaks most images that the multi-step one left."""
    clean, worst, most = hits["none", "", 0.0], {}, {}
    for (check, *ball), (sample, fallen) in others.items():
        if check not in _OTHERS or not len(sample):
            continue
        count, standing = int(fallen[sample].sum()), int((clean & ~broken[tuple(ball)]).sum())
        # Of all images, not of those that stand: two out of two may be two out of a thousand.
        estimate = count * standing / len(sample)
        if estimate > most.get(check, allowed(len(clean))):
            most[check] = estimate
            seen = f"that withstand the gradient are broken by {_OTHERS[check]}"
            worst[check] = _warning(check, seen, count, len(sample), *ball)
    return list(worst.values())


def _noise_as_strong(broken: Mapping, others: Others) -> list[dict]:
    """Balls in which the multi-step attack breaks hardly more images than random noise does."""
    warnings = []
    for (check, *ball), (sample, fallen) in others.items():
        margin = allowed(len(sample))
        by_noise, by_attack = (int(f[sample].sum()) for f in (fallen, broken[tuple(ball)]))
        # Nothing is wrong with an attack that breaks everything, or where noise breaks next to
        # nothing: of a handful of images each, the two numbers cannot be told apart.
        everything = by_attack >= len(sample) - margin
        close = by_noise > 3 * margin and by_attack <= by_noise + margin
        if check == "noise as strong" and close and not everything:
            seen = f"are broken by noise, {by_attack:,} by the attack"
            warnings.append(_warning(check, seen, by_noise, len(sample), *ball))
    return warnings
