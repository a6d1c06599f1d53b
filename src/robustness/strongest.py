"""The strongest attack we have: several of different kinds, each on the images that still stand.

After AutoAttack (Croce and Hein, ICML 2020), written from the papers of its parts, with an added
attack that knows the thresholds of our networks.
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
from src.verdicts import Worst, batches, judge, logits_of, margin, stands, with_gradients

# A later stage goes through the images in this many parts, the most fragile first.
PARTS = 8
# Of at least so many images: a part of few says little of the rest.
FEWEST = 32
# Wider balls on the way from outside, each with a tenth of the steps.
SHRINKS = 19
# A search leaves a part after so many starts or classes in a row that broke nothing.
PATIENCE = 3


@with_gradients()
def strongest_attack(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = "linf", **options
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
    thorough: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The attacks one after the other, each on the images that are still standing.

    First Auto-PGD on the cross-entropy. In l2, then towards single classes through shrinking balls
    from outside. Then on the margin from several starts, and towards single classes from two. Last
    the Square Attack, which needs no gradients. If the model has `thresholds`, the margin and the
    classes are attacked behind these as well (in linf only there). A warning says if thresholds
    were found that cannot be taken away.

    The first stage attacks all images. A later one begins with the most fragile eighth of those
    that stand (at least 32), by the margin at their worst points so far, and goes on to the next
    only while it breaks images. Within a part it gives up after three starts or classes in a row
    that break nothing. Most of the time would else go into images that nothing breaks.

    Arguments as for `pgd_attack` (all that is random comes from `generator`), and:

    Args:
        steps: gradient steps per start; from outside a tenth, in each of 20 balls.
        restarts: starts on the margin.
        targets: how many of the most likely other classes to approach.
        queries: of the Square Attack, the last stage.
        thorough: give every stage all images that stand, and all its starts and classes.

    Yields:
        The name of each stage and the worst points up to it (B, C, H, W); "clean" first.

    Raises:
        ValueError: for an argument out of its range, and for a model whose answer to an image
            depends on its batch or changes from call to call.
    """
    images = checked(images, labels, epsilon, norm, clip)
    counts = {"steps": steps, "restarts": restarts, "targets": targets, "queries": queries}
    for name, value in counts.items():
        check_count(name, value)
    check_function(model, images)
    generator = generator or torch.Generator().manual_seed(0)
    worst = Worst(None, images, labels, "margin", False)
    adaptive = removable_thresholds(model, images)
    searches = {"steps": steps, "patience": None if thorough else PATIENCE}
    stages = _stages(adaptive, norm, restarts, targets, queries, searches)
    for number, (name, attack) in enumerate([("clean", _unchanged), *stages]):
        for chosen in _parts(worst, whole=thorough or number < 2):
            own, ball = labels[chosen], {"clip": clip, "generator": generator}
            points = attack(model, images[chosen], own, epsilon, norm, **ball)
            # The model itself judges the points, whatever the attack said of them.
            with evaluation_form(model, probe=True) as network:
                verdict = judge(network, points, own, margin, want_gradient=False)
            worst.keep(points, chosen, verdict.loss, verdict.broken)
            if not verdict.broken.any():
                break
        yield name, worst.points.clone()


def _parts(worst: Worst, *, whole: bool) -> list[Tensor]:
    """Positions of the images that stand, in parts; in the first those with the largest margin."""
    standing = worst.standing.nonzero()[:, 0]
    if whole or not len(standing):
        return [standing] if len(standing) else []
    order = worst.value[standing].argsort(descending=True, stable=True)
    return list(standing[order].split(max(FEWEST, -(-len(standing) // PARTS))))


def _unchanged(model, images, *_, **__) -> Tensor:
    return images


def _stages(adaptive, norm, restarts, targets, queries, searches) -> list[tuple[str, Callable]]:
    """Names and attacks, the one that breaks most for its time first."""
    kinds = [("", apgd_attack)]
    if adaptive:
        # In linf both search the very same set, and behind the thresholds the gradient is exact.
        kinds = [("thresholds ", thresholds_attack), *(kinds if norm == "l2" else [])]
    stages = [("apgd cross-entropy", partial(apgd_attack, **searches, loss="cross_entropy"))]
    if norm == "l2":
        few = max(1, searches["steps"] // 10)
        outside = {"steps": few, "shrinks": SHRINKS, "targets": targets}
        stages.append(("apgd from outside", partial(apgd_attack, **searches | outside)))
    for kind, attack in kinds:
        attack = partial(attack, **searches)
        stages += [
            (f"{kind}apgd margin", partial(attack, restarts=restarts)),
            # A second start, at random: in l2, from the image alone, too many images stood.
            (f"{kind}apgd targeted", partial(attack, targets=targets, restarts=2)),
        ]
    return [*stages, ("square", partial(square_attack, queries=queries))]


def removable_thresholds(model: nn.Module, images: Tensor) -> bool:
    """Whether a model has thresholds that can be taken away; warns of those that cannot."""
    network = unwrapped(model)
    thresholds = getattr(network, "thresholds", None)
    if thresholds is not None:
        try:
            with torch.inference_mode(False), evaluation_form(network) as form:
                behind_thresholds(form, images, thresholds)
            return True
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass
    elif all(getattr(module, "thresholds", None) is None for module in model.modules()):
        return False
    warnings.warn(
        "'model' has thresholds that cannot be taken away, so the attack behind them is left out; "
        "gradients may be masked (give the network itself, without hooks and wrappers; members of "
        "an Ensemble need the same thresholds).",
        stacklevel=4,
    )
    return False


def hits_by_stage(
    model: nn.Module,
    dataset: TensorDataset,
    epsilon: float,
    norm: str = "linf",
    *,
    batch_size: int = 1000,
    progress: bool = True,
    **options,
) -> dict[str, Tensor]:
    """Which images are still classified correctly after each stage of the strongest attack.

    Args:
        model: images -> logits (B, classes); it is attacked where it is.
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        epsilon, norm, options: as for `strongest_attack_stages`.
        batch_size: images per batch.
        progress: show a progress bar.

    Returns:
        Name of the stage -> bool (N,) on the CPU, "clean" first. From one stage to the next,
        images only ever fall. The last one is the answer.
    """
    options |= {"batch_size": batch_size, "progress": progress}
    return attack_by_stage(model, dataset, epsilon, norm, **options)[0]


@with_gradients()
def attack_by_stage(
    model: nn.Module,
    dataset: TensorDataset,
    epsilon: float,
    norm: str = "linf",
    *,
    batch_size: int = 1000,
    progress: bool = True,
    **options,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What `hits_by_stage` returns, and the images at the end, with the classes they are given.

    Arguments as for `hits_by_stage`. The images (N, C, H, W) and classes int64 (N,) are on the
    CPU; a class is -1 where a logit is NaN.
    """
    check_dataset(dataset, empty=False)
    check_count("batch_size", batch_size)
    attacked, classes = [], []
    by_stage, total = {}, -(-len(dataset) // batch_size)
    parts = batches(model, *dataset.tensors, batch_size=batch_size)
    with evaluation_form(model, probe=True) as network:
        for images, labels in progress_bar(progress, parts, desc="attacking", total=total):
            standing = torch.ones(len(labels), dtype=torch.bool, device="cpu")
            stages = strongest_attack_stages(model, images, labels, epsilon, norm, **options)
            for name, points in stages:
                # The same network and batch for every stage, so that rounding cannot decide.
                standing = standing & stands(network, points, labels).cpu()
                by_stage.setdefault(name, []).append(standing)
            attacked.append(points.cpu())
            with torch.no_grad():
                classes.append(predicted(logits_of(network, points, labels)).cpu())
    hits = {name: torch.cat(parts) for name, parts in by_stage.items()}
    return hits, torch.cat(attacked), torch.cat(classes)
