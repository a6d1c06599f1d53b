"""Losses for training the base classifier of a smoothed classifier."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.balls import direction
from src.checks import ask, checked_logits
from src.engine.untouched import evaluation_form
from src.models import SmoothClassifier
from src.training_and_evaluation import Loss
from src.verdicts import gradient_of, with_gradients

# The methods that --method offers: arguments of `smoothing_loss`. The weights of consistency and
# entropy are those of its paper for MNIST, or close to them. Epsilon is in pixel units.
METHODS = {
    "gaussian": {"draws": 1},
    "consistency": {"draws": 2, "consistency": 5.0, "entropy": 0.5},
    "smoothadv": {"draws": 2, "attack_draws": 2, "epsilon": 1.0},
}
METHODS["smoothadv-consistency"] = METHODS["smoothadv"] | {"consistency": 3.0, "entropy": 0.5}
# The same, with images weighted by confidence; see docs/recipes.md.
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

    - Cohen et al. (ICML 2019): cross-entropy at x + eta, eta ~ N(0, sigma^2 I).
    - SmoothAdv (Salman et al., NeurIPS 2019) first moves x by `epsilon` up the loss of the mean
      prediction under the same noise, here in one step.
    - Consistency (Jeong and Shin, NeurIPS 2020) adds consistency * mean_i KL(mean p || p_i)
      + entropy * H(mean p), where p_i is the prediction at draw i.
    - Confidence multiplies each image's loss by (mean_i p_i(label))^confidence. Images that noise
      has made hopeless then count less; their radius is zero anyway. CAT-RS (Jeong et al., AAAI
      2023) does so by other means. With one draw and no further term, the gradient is that of the
      generalised cross-entropy (1 - p^q) / q (Zhang and Sabuncu, NeurIPS 2018).

    Args:
        smooth: the SmoothClassifier in training.
        images: (B, C, H, W), pixels in [0, 1].
        labels: int64 (B,).
        draws: noisy copies per image.
        attack_draws: how many of the copies the SmoothAdv step uses; default: all.
        epsilon: l2 length of the SmoothAdv step, in pixel units; 0 for none.
        consistency, entropy: weights of the two further terms, which need at least two draws.
        confidence: the power q of the mean probability of the label; 0 weights all images equally.
        strength: factor in [0, 1] of `epsilon`, `consistency`, `entropy` and `confidence`; a
            number, or a tensor without dimensions on the device of the images.

    Returns:
        Scalar loss, and the logits (B, num_classes) of the first draw.
    """
    noise = smooth.sigma * torch.randn((draws, *images.shape), device=images.device)
    base = smooth.base_classifier
    # No `if` on `strength`: a recorded loss must do the same work at any value of it.
    if epsilon:
        images = _ascend(base, images, labels, noise[:attack_draws], strength * epsilon)
    logits = _noisy_logits(base, images, noise)
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
    return checked_logits(ask(base, copies), len(copies)).unflatten(0, noise.shape[:2])


def mean_log_softmax(base: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Log of the softmax summed over the draws of noise, (B, num_classes), for SmoothAdv."""
    return F.log_softmax(_noisy_logits(base, images, noise), dim=2).logsumexp(dim=0)


@with_gradients()
def _ascend(base, images, labels, noise, epsilon) -> Tensor:
    """Images moved by `epsilon` up the loss of the mean prediction, then clamped to [0, 1]."""
    points = images.clone().requires_grad_()
    # Evaluation mode: with the statistics of the batch, each image would also attack the others.
    with evaluation_form(base) as network:
        mean_log = mean_log_softmax(network, points, noise)
        # A copy: autograd refuses labels that were made in inference mode.
        gradient = gradient_of(F.nll_loss(mean_log, labels.clone(), reduction="sum"), points)
    return (images + epsilon * direction(gradient, "l2")).clamp(0, 1)


def smoothing_loss_schedule(
    method: str, *, warmup: float = 0.3, attack_draws: int | None = None, **weights: float | None
) -> Callable[[float | Tensor], Loss]:
    """A `loss_schedule` for `train_model`: the loss of a method, whose added terms grow at first.

    Args:
        method: one of METHODS.
        warmup: fraction of the training over which the terms grow linearly from 0, in (0, 1].
        attack_draws: of `smoothing_loss`; default: the method's.
        weights: `epsilon`, `consistency`, `entropy` or `confidence` of `smoothing_loss`; default
            (also for None): the method's.

    Raises:
        ValueError: for another method, for a weight that the method does not have, and for more
            draws in the attack than the method makes.
    """
    if method not in METHODS:
        raise ValueError(f"'method' is {method!r}; use one of {', '.join(map(repr, METHODS))}.")
    given = {"attack_draws": attack_draws} | weights
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - METHODS[method].keys():
        raise ValueError(f"The method {method!r} has no {name!r}; choose another method.")
    terms = METHODS[method] | given
    draws, used = terms["draws"], terms.get("attack_draws", 1)
    if not 1 <= used <= draws:
        raise ValueError(
            f"'attack_draws' is {used!r}; use one from 1 to the {draws} draws of {method!r}."
        )

    def loss_at(progress: float | Tensor) -> Loss:
        part = progress / warmup
        # clamp does not wait for a tensor on a GPU, as min would.
        strength = part.clamp(max=1) if isinstance(part, Tensor) else min(part, 1.0)
        return partial(smoothing_loss, **terms, strength=strength)

    return loss_at
