"""The strongest attack we have: several of different kinds, each on what the others left standing.

After AutoAttack (Croce and Hein, ICML 2020), from the papers of its parts, with an attack added
that knows the ramp of our networks.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import checked
from src.checks import check_count, check_dataset, check_function, predicted
from src.engine.untouched import evaluation_form, unwrapped
from src.robustness.apgd import apgd_attack
from src.robustness.square import square_attack
from src.robustness.thresholds import behind_thresholds, thresholds_attack
from src.utils import progress_bar
from src.verdicts import Worst, logits_of, margin, right, with_gradients

__all__ = [
    "apgd_attack",
    "square_attack",
    "strongest_attack",
    "strongest_attack_stages",
    "thresholds_attack",
]


@with_gradients()
def strongest_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    **options,
) -> Tensor:
    """Per image the worst of all stages; arguments as for `strongest_attack_stages`.

    A misclassified point if one was found, else the point of highest margin (the largest other
    logit minus that of the label).
    """
    for _, points in strongest_attack_stages(model, images, labels, epsilon, norm, **options):
        worst = points
    return worst


def strongest_attack_stages(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 100,
    restarts: int = 5,
    targets: int = 9,
    queries: int = 5000,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The attacks one after the other, each on the images that are still standing.

    Auto-PGD on the cross-entropy, on the margin from several starts, and towards single classes,
    then the Square Attack, which needs no gradients. For a model with `thresholds` the margin and
    the classes also behind its ramp, in linf only there; a warning says if a ramp was found that
    cannot be taken away.

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes.
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        steps: gradient steps per start.
        restarts: starts on the margin; there are two for each target.
        targets: most likely other classes to approach.
        queries: of the Square Attack, the last stage.
        clip: range of the results.
        generator: source of everything random, on the CPU; default: one with seed 0.

    Yields:
        The name of each stage and the worst points up to it (B, 1, 28, 28); "clean" first.

    Raises:
        ValueError: for an argument out of its range, and for a model whose answer to an image
            depends on its batch or changes from call to call.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_count("targets", targets)
    check_function(model, images)
    generator = generator or torch.Generator().manual_seed(0)
    worst = Worst(None, images, labels, "margin", False)
    adaptive = _has_thresholds(model, images)
    stages = _stages(adaptive, norm, steps, restarts, targets, queries)
    for name, attack in [("clean", _unchanged), *stages]:
        chosen = worst.standing()
        if len(chosen):
            points = attack(
                model,
                images[chosen],
                labels[chosen],
                epsilon,
                norm,
                clip=clip,
                generator=generator,
            )
            _keep(worst, model, points, labels, chosen)
        yield name, worst.points.clone()


def _has_thresholds(model: nn.Module, images: Tensor) -> bool:
    """Whether the ramp of a model can be taken away; warns of one that cannot."""
    network = unwrapped(model)
    thresholds = getattr(network, "thresholds", None)
    if thresholds is not None:
        try:
            with torch.inference_mode(False), evaluation_form(network) as form:
                if len(images):
                    behind_thresholds(form, images, thresholds)
            return True
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass
    elif all(getattr(module, "thresholds", None) is None for module in model.modules()):
        return False
    warnings.warn(
        "'model' has thresholds that cannot be taken away, so the attack behind the ramp is left "
        "out; gradients may be masked (give the network itself, without hooks and wrappers).",
        stacklevel=4,
    )
    return False


@with_gradients()
def hits_by_stage(
    model: nn.Module,
    dataset: TensorDataset,
    epsilon: float,
    norm: str = "linf",
    *,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options,
) -> dict[str, torch.Tensor]:
    """Which images are still classified correctly after each stage of the strongest attack.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        epsilon, norm, options: as for `strongest_attack_stages`.
        batch_size: images a batch.
        device: where the attack runs; default: where the model is.
        progress: show a progress bar.

    Returns:
        Name of the stage -> bool (N,) on the CPU, "clean" first; none is true that was false
        before. The last one is the answer.
    """
    check_dataset(dataset, empty=False)
    check_count("batch_size", batch_size)
    device = device or next(model.parameters(), dataset.tensors[0]).device
    hits = {}
    batches = list(zip(*(t.split(batch_size) for t in dataset.tensors), strict=True))
    with evaluation_form(model, probe=True) as network:
        for images, labels in progress_bar(progress, batches, desc="attacking"):
            images, labels = images.to(device), labels.to(device)
            stages = strongest_attack_stages(model, images, labels, epsilon, norm, **options)
            standing = torch.ones(len(labels), dtype=torch.bool)
            for name, points in stages:
                # The same model and batch for every stage, so that rounding cannot decide.
                standing = standing & right(network, points, labels).cpu()
                hits.setdefault(name, []).append(standing)
    return {name: torch.cat(parts) for name, parts in hits.items()}


def _stages(adaptive, norm, steps, restarts, targets, queries) -> list[tuple[str, Callable]]:
    """Names and attacks, the one that breaks most for its time first."""
    kinds = [("", apgd_attack)]
    if adaptive:
        # In linf both search the very same set, and behind the ramp the gradient is exact.
        kinds = [("thresholds ", thresholds_attack), *(kinds if norm == "l2" else [])]
    stages = [("apgd cross-entropy", partial(apgd_attack, steps=steps, loss="cross_entropy"))]
    for kind, attack in kinds:
        attack = partial(attack, steps=steps)
        stages += [
            (f"{kind}apgd margin", partial(attack, restarts=restarts)),
            # A second start, at random: in l2 the image alone left a point too much standing.
            (f"{kind}apgd targeted", partial(attack, targets=targets, restarts=2)),
        ]
    return [*stages, ("square", partial(square_attack, queries=queries))]


def _unchanged(model, images, labels, epsilon, norm, *, clip, generator) -> Tensor:
    return images


def _keep(worst: Worst, model: nn.Module, points: Tensor, labels: Tensor, chosen: Tensor) -> None:
    """Judge the points by the model itself, whatever the attack said of them."""
    with evaluation_form(model, probe=True) as network, torch.no_grad():
        logits = logits_of(network, points, labels[chosen])
    fallen = predicted(logits) != labels[chosen]
    worst.keep(points, chosen, margin(logits, labels[chosen]), fallen)
