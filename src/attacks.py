"""Attacks on classifiers: pure functions, images in, adversarial images out.

Each returns a detached tensor of the dtype and device of `images`, and leaves the model as it
was: modes, batch-normalisation statistics, `.grad` of every parameter. The model is attacked in
evaluation mode. Results lie in the ball and in `clip` as stored, not only up to rounding.
"""

from collections.abc import Callable

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
from src.verdicts import Worst, value_and_gradient, with_gradients

LOSSES = ("cross_entropy", "margin")


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
        images: (B, 1, 28, 28), pixels in [0, 1].
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
    with evaluation_form(model) as network:
        _, _, gradient = value_and_gradient(network, images, labels, "cross_entropy", targeted)
    project = projection(images, epsilon, norm, clip)
    return project(images + epsilon * direction(gradient, norm))


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

    The first start is the image moved by one full step up `loss` (`gradient_attack`, if that is
    the cross-entropy), so the result is at least as strong, image by image; further starts, and
    the first as well when a `generator` is given, are random in the ball. A point beats another
    if it is misclassified and the other is not, or else if its loss is higher.

    Args:
        model: images -> logits (B, classes).
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,), the true classes (`targeted`: the classes to reach).
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        steps: gradient steps per restart.
        step_size: length of a step in `norm`; default 2.5 * epsilon / steps.
        restarts: number of starts.
        loss: "cross_entropy", or "margin", the largest other logit minus that of the label:
            its gradient survives saturated probabilities.
        targeted: approach `labels` instead of leaving them.
        clip: range of the result.
        generator: source of the random starts, on the CPU; without it a private one with
            seed 0, so that the same call gives the same result.
        early_stop: leave an image alone once it is misclassified. The same images fall, sooner;
            the points returned for them are the first that were found, not the worst.

    Raises:
        ValueError: for an argument out of its range.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if step_size is not None:
        check_number("step_size", step_size, positive=True)
    if loss not in LOSSES:
        raise ValueError(f"'loss' is {loss!r}; use one of {', '.join(map(repr, LOSSES))}.")
    if epsilon == 0 or not len(images):
        return images.clone()
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    starts = generator or torch.Generator().manual_seed(0)
    project = projection(images, epsilon, norm, clip)
    with evaluation_form(model) as network:
        worst = Worst(network, images, labels, loss, targeted)
        gradient = worst.visit(images)
        single_step = project(images + epsilon * direction(gradient, norm))
        for restart in range(restarts):
            if restart == 0 and generator is None:
                points = single_step
            else:
                # Drawn for all images, so that no image's start depends on which others stand.
                points = project(images + random_in_ball(images, epsilon, norm, starts))
            chosen = worst.standing() if early_stop else slice(None)
            points = points[chosen]
            for _ in range(steps):
                gradient = worst.visit(points, chosen)
                points = project(points + step_size * direction(gradient, norm), chosen)
                if early_stop:
                    left = worst.standing(chosen)
                    chosen, points = chosen[left], points[left]
            worst.visit(points, chosen, want_gradient=False)
        if generator is not None:
            worst.visit(single_step, want_gradient=False)
    return worst.points


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
        _, _, gradient = value_and_gradient(network, points, labels, "cross_entropy", False)
    return project(points + step_size * direction(gradient, norm))


@with_gradients()
def attack_dataset(
    model: nn.Module,
    dataset: TensorDataset,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
) -> TensorDataset:
    """The adversarial twin of a data set: `attack(model, images, labels)` batch by batch.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        attack: returns the attacked images of one batch.
        batch_size: images a batch.
        device: where the attack runs; default: where the model is.

    Returns:
        TensorDataset of the attacked images and the same labels, on the CPU.
    """
    check_count("batch_size", batch_size)
    check_dataset(dataset)
    device = device or next(model.parameters(), dataset.tensors[0]).device
    batches = [
        attacked_batch(attack, model, images.to(device), labels.to(device)).cpu()
        for images, labels in zip(*(t.split(batch_size) for t in dataset.tensors), strict=True)
    ]
    return TensorDataset(torch.cat(batches), dataset.tensors[1].clone())


def attacked_batch(attack: Callable, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What `attack` makes of copies of a batch, detached.

    Raises:
        ValueError: unless it returns images in [0, 1] of the same shape and dtype.
    """
    found = attack(model, images.clone(), labels.clone())
    given, wanted = (
        f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        for x in (found, images)
    )
    if given != wanted:
        raise ValueError(f"'attack' returned {given}; expected the attacked images, {wanted}.")
    # A NaN fails both comparisons.
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("'attack' returned pixels outside [0, 1] or NaN; clamp them to [0, 1].")
    return found.detach().to(images.device)


def checked(images, labels, epsilon, norm, clip) -> Tensor:
    """Detached images, after every argument that the attacks share has been checked."""
    check_ball(epsilon, norm)
    check_images(images)
    check_labels(labels, len(images))
    low, high = clip
    if not low < high:
        raise ValueError(f"'clip' = {tuple(clip)} must be (low, high) with low < high.")
    if not bool(((images >= low) & (images <= high)).all()):
        raise ValueError(f"'clip' = {tuple(clip)} leaves out pixels of the images themselves.")
    return images.detach()
