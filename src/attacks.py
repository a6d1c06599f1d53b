"""Attacks on classifiers: pure functions, images in, adversarial images out.

Each returns a detached tensor of the dtype and device of `images`. The model is attacked in
evaluation mode and left as it was: modes, batch-normalisation statistics, `.grad` of every
parameter. Results lie in the ball and in `clip` as stored, not only up to rounding.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.balls import direction, projection, random_in_ball
from src.checks import (
    check_ball,
    check_count,
    check_dataset,
    check_images,
    check_labels,
    check_number,
)
from src.engine.untouched import evaluation_form
from src.verdicts import LOSSES, Worst, batches, cross_entropy, judge, with_gradients


@with_gradients()
def gradient_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    targeted: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One step of size `epsilon` along the gradient of the cross-entropy.

    x_adv = clip(x + epsilon * sign(grad)) for `norm="linf"` (FGSM, Goodfellow et al., ICLR
    2015), clip(x + epsilon * grad / |grad|_2) for `"l2"`.

    Args:
        model: images -> logits (B, classes).
        images: (B, C, H, W), pixels in [0, 1].
        labels: int64 (B,), the true classes (`targeted`: the classes to reach).
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        targeted: step towards `labels` instead of away from them.
        clip: range of the result.

    Raises:
        ValueError: for an argument out of its range.
    """
    images = checked(images, labels, epsilon, norm, clip)
    if epsilon == 0 or not len(images):
        return images.clone()
    project = projection(images, epsilon, norm, clip)
    with evaluation_form(model) as network:
        gradient = judge(network, images, labels, cross_entropy).gradient
    step = -epsilon if targeted else epsilon
    return project(images + step * direction(gradient, norm))


@with_gradients()
def pgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "cross_entropy",
    targeted: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    early_stop: bool = False,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018), per image the worst point visited.

    x <- project(x + step_size * direction(grad)), `steps` times from each start. Without a
    `generator`, the first start is the image moved by one full step up `loss`, and further starts
    are random in the ball. With one, all starts are random, and that first point is visited as
    well. So per image the result is at least as strong as `gradient_attack`, if `loss` is the
    cross-entropy. A misclassified point is worse than any other; else the higher loss is worse.

    Arguments and errors as for `gradient_attack`, and:

    Args:
        steps: gradient steps per restart.
        step_size: length of a step in `norm`; default 2.5 * epsilon / steps.
        restarts: number of starts.
        loss: "cross_entropy", or "margin", the largest other logit minus that of the label:
            its gradient survives saturated probabilities.
        generator: source of the random starts, on the CPU. The default is a private one with
            seed 0, so that the same call gives the same result.
        early_stop: leave an image alone once it is misclassified. The same images are broken, in
            less time; each is returned as the first misclassified point, not as the worst.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    check_loss(loss, LOSSES)
    if epsilon == 0 or not len(images):
        return images.clone()
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    source = generator or torch.Generator().manual_seed(0)
    project = projection(images, epsilon, norm, clip)

    def step(points: Tensor, gradient: Tensor, chosen) -> Tensor:
        return project(points + step_size * direction(gradient, norm), chosen)

    with evaluation_form(model) as network:
        worst = Worst(network, images, labels, loss, targeted)
        single_step = project(images + epsilon * direction(worst.visit(images).gradient, norm))
        for restart in range(restarts):
            start = single_step
            if restart or generator:
                # Drawn for all images, so that no image's start depends on which others stand.
                start = project(images + random_in_ball(images, epsilon, norm, source))
            _ascend(worst, start, step, steps, early_stop)
        if generator:
            worst.visit(single_step, want_gradient=False)
    return worst.points


def _ascend(worst: Worst, points: Tensor, step: Callable, steps: int, early_stop: bool) -> None:
    """Visit the points of one run of PGD; with `early_stop`, only of images that still stand."""
    chosen = worst.standing.nonzero()[:, 0] if early_stop else slice(None)
    points = points[chosen]
    for _ in range(steps):
        if not len(points):
            return
        points = step(points, worst.visit(points, chosen).gradient, chosen)
        if early_stop:
            standing = worst.standing[chosen]
            chosen, points = chosen[standing], points[standing]
    if len(points):
        worst.visit(points, chosen, want_gradient=False)


@with_gradients()
def random_start_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    step_size: float | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """One gradient step from a random point of the ball: the attack of "fast" training.

    Wong, Rice and Kolter, ICLR 2020. Arguments as for `pgd_attack`; `step_size` defaults to
    1.25 * epsilon as in the paper. Costs one gradient.
    """
    images = checked(images, labels, epsilon, norm, clip)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    if epsilon == 0 or not len(images):
        return images.clone()
    step_size = 1.25 * epsilon if step_size is None else step_size
    project = projection(images, epsilon, norm, clip)
    generator = generator or torch.Generator().manual_seed(0)
    points = project(images + random_in_ball(images, epsilon, norm, generator))
    with evaluation_form(model) as network:
        gradient = judge(network, points, labels, cross_entropy).gradient
    return project(points + step_size * direction(gradient, norm))


@with_gradients()
def attack_dataset(
    model: nn.Module,
    dataset: TensorDataset,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    batch_size: int = 1000,
) -> TensorDataset:
    """The adversarial twin of a data set: its images attacked batch by batch, where the model is.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        attack: (model, images, labels) -> the attacked images of one batch.
        batch_size: images per batch.

    Returns:
        TensorDataset of the attacked images and the same labels, on the CPU.

    Raises:
        ValueError: for an argument out of its range, or an attack that returns no images.
    """
    check_count("batch_size", batch_size)
    check_dataset(dataset)
    attacked = [
        attacked_batch(attack, model, images, labels).cpu()
        for images, labels in batches(model, *dataset.tensors, batch_size=batch_size)
    ]
    return TensorDataset(torch.cat(attacked), dataset.tensors[1].clone())


def attacked_batch(attack: Callable, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What `attack` makes of copies of a batch, detached.

    Raises:
        ValueError: unless it returns images in [0, 1] of the same shape and dtype.
    """
    found = attack(model, images.clone(), labels.clone())
    if _described(found) != _described(images):
        raise ValueError(
            f"'attack' returned {_described(found)}; expected the attacked images, "
            f"{_described(images)}."
        )
    # A NaN fails both comparisons.
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("'attack' returned pixels outside [0, 1] or NaN; clamp them to [0, 1].")
    return found.detach().to(images.device)


def _described(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def check_loss(loss: str, losses: Iterable[str]) -> None:
    """Raise ValueError unless `loss` is one of the names in `losses`."""
    if loss not in losses:
        raise ValueError(f"'loss' is {loss!r}; use one of {', '.join(map(repr, losses))}.")


def checked(images, labels, epsilon, norm, clip) -> Tensor:
    """Detached images, after a check of the arguments that all attacks share."""
    check_ball(epsilon, norm)
    check_images(images)
    check_labels(labels, len(images))
    low, high = clip
    if not low < high:
        raise ValueError(f"'clip' = {tuple(clip)} must be (low, high) with low < high.")
    if not bool(((images >= low) & (images <= high)).all()):
        raise ValueError(f"'clip' = {tuple(clip)} leaves out pixels of the images themselves.")
    return images.detach()
