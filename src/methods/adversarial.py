"""Adversarial training: the attack, its growing ball, and the watch for its collapse."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack, random_start_attack
from src.checks import check_ball, check_count, check_dataset, checked_logits
from src.training_and_evaluation import Loss, accuracy, adversarial_loss


def training_attack(
    name: str, norm: str, *, steps: int, seed: int, stride: float = 1.25
) -> Callable[..., Tensor]:
    """The attack of the inner maximum, (model, images, labels, epsilon) -> images.

    Args:
        name: "gradient", one step from a random start, or "pgd".
        norm: "linf" or "l2".
        steps: of PGD.
        seed: of the random starts.
        stride: length of the single step, as a multiple of epsilon; from 2 on it ends, in linf,
            in a corner of the ball wherever it starts.

    Raises:
        ValueError: for another name.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "gradient":

        def single_step(model, images, labels, epsilon):
            return random_start_attack(
                model,
                images,
                labels,
                epsilon,
                norm,
                step_size=stride * epsilon or None,
                generator=generator,
            )

        return single_step
    if name == "pgd":
        return partial(pgd_attack, norm=norm, steps=steps, generator=generator)
    raise ValueError(f"'name' is {name!r}; use 'gradient' or 'pgd'.")


def trades_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Callable[..., Tensor],
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy at the images plus `beta` times the divergence of the attacked predictions.

    E L(f(x), y) + beta KL(f(x) || f(x + delta)) (TRADES, Zhang et al., ICML 2019). There the
    attack maximises the divergence; any `attack` will do here. Returns the logits at the
    attacked images.
    """
    # One batch, so that batch normalisation sees both as one population.
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
    """A `loss_schedule`: adversarial loss whose ball grows linearly over the first `warmup`.

    Args:
        attack: (model, images, labels, epsilon) -> images.
        epsilon: radius from `warmup` on.
        loss: `adversarial_loss`, or another that takes an attack.
        warmup: fraction of the training, in (0, 1].
    """

    def loss_at(progress: float) -> Loss:
        # Meant to spare a fresh network the full ball; not compared here with doing without.
        radius = epsilon * min(progress / warmup, 1.0)
        return partial(
            loss,
            attack=lambda model, images, labels: attack(model, images, labels, radius),
        )

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

    def watch(model: nn.Module) -> dict[str, float]:
        return {
            "clean": accuracy(model, dataset),
            "single_step": accuracy(
                model, dataset, attack=partial(gradient_attack, epsilon=epsilon, norm=norm)
            ),
            "pgd": accuracy(
                model,
                dataset,
                attack=partial(
                    pgd_attack, epsilon=epsilon, norm=norm, steps=steps, early_stop=True
                ),
            ),
        }

    return watch


def collapsed_epochs(epochs: Sequence[dict], *, warmup: float = 0.3) -> list[int]:
    """Numbers of the epochs that show catastrophic overfitting (Wong et al., ICLR 2020).

    The network has learned to defeat the single step instead of the ball. Accuracy under it is
    20 points above accuracy under PGD, and either PGD has lost 20 points since its best epoch, or
    the ball has its full size and the single step leaves four images in five: no network learns
    that much of one attack and so little of the other unless it cheats. Or accuracy under the
    single step is above the accuracy on clean images by more than a point.

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
