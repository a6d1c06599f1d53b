"""Adversarial training: the attack, its growing ball, and the watch for its collapse."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack, random_start_attack
from src.checks import check_ball, check_count, check_dataset, checked_logits
from src.training_and_evaluation import Attack, Loss, accuracy, adversarial_loss


def training_attack(
    name: str, norm: str, *, steps: int, seed: int, stride: float = 1.25
) -> Callable[..., Tensor]:
    """The attack to train with, (model, images, labels, epsilon) -> images.

    Args:
        name: "gradient", one step from a random start, or "pgd".
        norm: "linf" or "l2".
        steps: of PGD.
        seed: of the random starts.
        stride: length of the single step, as a multiple of epsilon. From 2 on it ends, in linf,
            in a corner of the ball wherever it starts.

    Raises:
        ValueError: for another name.
    """
    generator = torch.Generator().manual_seed(seed)

    def single_step(model, images, labels, epsilon):
        options = {"step_size": stride * epsilon or None, "generator": generator}
        return random_start_attack(model, images, labels, epsilon, norm, **options)

    if name == "gradient":
        return single_step
    if name == "pgd":
        return partial(pgd_attack, norm=norm, steps=steps, generator=generator)
    raise ValueError(f"'name' is {name!r}; use 'gradient' or 'pgd'.")


def trades_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack, beta: float = 6.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy at the images plus `beta` times the divergence of the attacked predictions.

    E L(f(x), y) + beta KL(f(x) || f(x + delta)) (TRADES, Zhang et al., ICML 2019). In the paper the
    attack maximises the divergence; here any `attack` is accepted. Returns the loss (scalar) and
    the logits at the attacked images.
    """
    # One batch, so that batch normalisation uses the same statistics for both.
    both = torch.cat([images, attack(model, images, labels)])
    clean, attacked = checked_logits(model(both), len(both)).chunk(2)
    divergence = F.kl_div(
        F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True
    )
    return F.cross_entropy(clean, labels) + beta * divergence, attacked


def adversarial_loss_schedule(
    attack: Callable[..., Tensor],
    epsilon: float,
    *,
    loss: Callable[..., tuple[Tensor, Tensor]] = adversarial_loss,
    warmup: float = 0.3,
) -> Callable[[float], Loss]:
    """A `loss_schedule` for `train_model`: adversarial loss in a ball that grows at first.

    Args:
        attack: (model, images, labels, epsilon) -> images.
        epsilon: radius of the ball after the warmup.
        loss: `adversarial_loss` or `trades_loss`.
        warmup: fraction of the training over which the radius grows linearly from 0, in (0, 1].
    """

    def loss_at(progress: float) -> Loss:
        # A fresh network may not cope with the full ball. Training without warmup was not compared.
        return partial(loss, attack=partial(attack, epsilon=epsilon * min(progress / warmup, 1.0)))

    return loss_at


def held_out_watch(
    dataset: TensorDataset, epsilon: float, norm: str, *, steps: int = 20
) -> Callable[[nn.Module], dict[str, float]]:
    """A `watch` for `train_model`: accuracy `clean`, under `single_step` and under `pgd`.

    Raises:
        ValueError: for an argument out of its range, before anything is trained.
    """
    check_dataset(dataset, empty=False)
    check_ball(epsilon, norm)
    check_count("steps", steps)
    ball = {"epsilon": epsilon, "norm": norm}
    attacks = {
        "clean": None,
        "single_step": partial(gradient_attack, **ball),
        "pgd": partial(pgd_attack, **ball, steps=steps, early_stop=True),
    }
    return lambda model: {
        name: accuracy(model, dataset, attack=attack) for name, attack in attacks.items()
    }


def collapsed_epochs(epochs: Sequence[dict], *, warmup: float = 0.3) -> list[int]:
    """Numbers of the epochs that show catastrophic overfitting (Wong et al., ICLR 2020).

    The network then resists the single step only, and not the whole ball. An epoch counts if

    - accuracy under the single step is more than 20 points above that under PGD, and either PGD is
      more than 20 points below its best epoch, or the ball has its full size and accuracy under
      the single step is above 80 % (no honest network resists one so well and the other so badly);
    - or accuracy under the single step is more than 1 point above that on clean images.

    Args:
        epochs: rows with `epoch` and held-out accuracies `clean`, `single_step` and `pgd`.
        warmup: fraction of the training over which the ball grew, in [0, 1].
    """
    collapsed, best = [], 0.0
    for row in epochs:
        best = max(best, row["pgd"])
        gap = row["single_step"] - row["pgd"]
        full = row["epoch"] - 1 >= warmup * len(epochs) and row["single_step"] > 0.8
        lost = gap > 0.2 and (full or best - row["pgd"] > 0.2)
        if lost or row["single_step"] > row["clean"] + 0.01:
            collapsed.append(row["epoch"])
    return collapsed
