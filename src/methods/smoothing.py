"""Losses for training the base classifier of a smoothed classifier."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.balls import direction
from src.checks import checked_logits
from src.engine.untouched import evaluation_form
from src.models import SmoothClassifier
from src.training_and_evaluation import Loss
from src.verdicts import gradient_of, with_gradients

# What --method stands for: the arguments of `smoothing_loss`. The weights of consistency and
# entropy are those of its paper for MNIST or near them; epsilon is in pixel units.
METHODS = {
    "gaussian": {"draws": 1},
    "consistency": {"draws": 2, "consistency": 5.0, "entropy": 0.5},
    "smoothadv": {"draws": 2, "attack_draws": 2, "epsilon": 1.0},
}
METHODS["smoothadv-consistency"] = METHODS["smoothadv"] | {"consistency": 3.0, "entropy": 0.5}
# The last one, its images weighted by confidence; see docs/recipes.md.
METHODS["confidence"] = METHODS["smoothadv-consistency"] | {"consistency": 2.0, "confidence": 0.2}


def smoothing_loss(
    smooth: SmoothClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int = 1,
    attack_draws: int | None = None,
    epsilon: float = 0.0,
    consistency: float = 0.0,
    entropy: float = 0.0,
    confidence: float = 0.0,
    strength: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy under noise, with the terms that the methods add to it.

    Cohen et al. (ICML 2019): cross-entropy at x + eta, eta ~ N(0, sigma^2 I). SmoothAdv (Salman
    et al., NeurIPS 2019) first moves x by `epsilon` up the loss of the mean prediction under the
    same noise, here in one step. Consistency (Jeong and Shin, NeurIPS 2020) adds
    consistency * mean_i KL(mean p || p_i) + entropy * H(mean p), p_i being the prediction at
    draw i. Last, each image's loss may be weighted by (mean_i p_i(label))^confidence: less is spent
    on images that noise has made hopeless, whose radius is zero anyhow, as CAT-RS does by other
    means (Jeong et al., AAAI 2023). With one draw and no further term that is the gradient of the
    generalised cross-entropy (1 - p^q) / q (Zhang and Sabuncu, NeurIPS 2018).

    Args:
        smooth: the classifier in training.
        images: (B, 1, 28, 28), pixels in [0, 1].
        labels: int64 (B,).
        draws: noisy copies of each image.
        attack_draws: how many of them, the first, the SmoothAdv step sees; None for all.
        epsilon: l2 length of the SmoothAdv step, in pixel units; 0 for none.
        consistency, entropy: weights of the two further terms; they need two draws or more.
        confidence: the power q of the mean probability of the label; 0 weights all images alike.
        strength: factor in [0, 1] of `epsilon`, `consistency`, `entropy` and `confidence`; a
            number, or a tensor without dimensions on the device of the images.

    Returns:
        Scalar loss, and the logits (B, num_classes) of the first draw.
    """
    noise = smooth.sigma * torch.randn((draws, *images.shape), device=images.device)
    # No `if` about `strength`: what is recorded on a GPU must do the same work at any.
    if epsilon:
        images = _ascend(
            smooth.base_classifier, images, labels, noise[:attack_draws], strength * epsilon
        )
    logits = _noisy_logits(smooth.base_classifier, images, noise)
    log_p = F.log_softmax(logits, dim=2)
    own = log_p.gather(2, labels.expand(draws, -1)[:, :, None])[:, :, 0]
    loss = -own.mean(dim=0)
    if consistency or entropy:
        mean = log_p.exp().mean(dim=0).clamp(min=1e-20)
        cross = -(mean * log_p).sum(dim=2).mean(dim=0)
        spread = -(mean * mean.log()).sum(dim=1)
        loss = loss + strength * consistency * (cross - spread) + strength * entropy * spread
    if confidence:
        loss = loss * own.detach().exp().mean(dim=0) ** (strength * confidence)
    return loss.mean(), logits[0]


def _noisy_logits(base: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Logits (draws, B, num_classes) at every noisy copy, all in one batch."""
    copies = (images + noise).flatten(0, 1)
    return checked_logits(base(copies), len(copies)).unflatten(0, noise.shape[:2])


def mean_log_softmax(base: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Log of the sum of the softmax over draws of noise, (B, num_classes): SmoothAdv climbs it."""
    return F.log_softmax(_noisy_logits(base, images, noise), dim=2).logsumexp(dim=0)


@with_gradients()
def _ascend(base, images, labels, noise, epsilon) -> Tensor:
    """Images moved by `epsilon` up the loss of the mean prediction, and back into [0, 1]."""
    points = images.clone().requires_grad_()
    # Evaluation mode: with the statistics of the batch, images would attack one another.
    with evaluation_form(base) as network:
        mean_log = mean_log_softmax(network, points, noise)
        # A copy: autograd refuses labels that were made in inference mode.
        gradient = gradient_of(F.nll_loss(mean_log, labels.clone(), reduction="sum"), points)
    return (images + epsilon * direction(gradient, "l2")).clamp(0, 1)


def smoothing_loss_schedule(
    method: str, *, warmup: float = 0.3, attack_draws: int | None = None, **weights: float | None
) -> Callable[[float | Tensor], Loss]:
    """A `loss_schedule`: the loss of a method, its added terms growing over the first `warmup`.

    Args:
        method: one of METHODS.
        warmup: fraction of the training, in (0, 1].
        attack_draws: of `smoothing_loss`, in place of what the method has; None for that.
        weights: `epsilon`, `consistency`, `entropy` or `confidence` of `smoothing_loss` in place of
            what the method has; None for that.

    Raises:
        ValueError: for another method, for a weight of a term that the method does not have, and
            for more draws of the attack than of the method.
    """
    if method not in METHODS:
        raise ValueError(f"'method' is {method!r}; use one of {', '.join(map(repr, METHODS))}.")
    given = {"attack_draws": attack_draws} | weights
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - METHODS[method].keys():
        raise ValueError(f"The method {method!r} has no {name!r}; choose another method.")
    terms = METHODS[method] | given
    draws, seen = terms.pop("draws"), terms.pop("attack_draws", None)
    if seen is not None and not 1 <= seen <= draws:
        raise ValueError(
            f"'attack_draws' is {seen!r}; use one from 1 to the {draws} draws of {method!r}."
        )

    def loss_at(progress: float | Tensor) -> Loss:
        grown = progress / warmup
        # A tensor on a GPU, which must not be waited for to compare it.
        strength = grown.clamp(max=1) if isinstance(grown, Tensor) else min(grown, 1.0)
        return partial(smoothing_loss, draws=draws, attack_draws=seen, **terms, strength=strength)

    return loss_at
