"""Known cures of the collapse of single-step adversarial training, side by side.

With a single step a network can learn to defeat the step instead of the ball (catastrophic
overfitting). Each cure trains the same ConvNN (16-32, hidden layer of 100) with one gradient step
an update, l-infinity, epsilon = 0.3, and ends with its last epoch, so that a collapse shows; only
"best epoch" picks the epoch by PGD on held-out training images, as main_adv_training.py
does. The judge is the strongest attack of src/strong_attacks.py, on the first --images of the test
images 0, 20, 40, ... A row is written to --rows as soon as it is finished; rows that are there are
not made again.

Run: python -m benchmarks.cures --rows results/cures.csv
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from src.adversarial import collapsed_epochs, held_out_watch
from src.attacks import gradient_attack, random_start_attack
from src.certificates import read_rows, write_rows
from src.convnn import ConvNN, evaluation_form
from src.robustness import hits_by_stage
from src.tables import format_table
from src.training_and_evaluation import accuracy, standard_loss, train_model
from src.utils import load_training_data, seed_everything, spread, subset

EPSILON = 0.3


def attacked_loss(attack: Callable) -> Callable:
    """(model, images, labels, epsilon) -> loss and logits at the attacked images."""

    def loss(model, images, labels, epsilon):
        return standard_loss(model, attack(model, images, labels, epsilon), labels)

    return loss


def from_random_start(stride: float) -> Callable:
    """A step of `stride` * epsilon from a random point of the ball, back into the ball.

    Wong, Rice and Kolter (ICLR 2020), where the stride is 1.25.
    """
    generator = torch.Generator().manual_seed(0)

    def attack(model, images, labels, epsilon):
        step = stride * epsilon or None
        return random_start_attack(
            model, images, labels, epsilon, step_size=step, generator=generator
        )

    return attack


def noise_augmented(model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """A step of epsilon from noise of twice the ball, without going back into the ball.

    N-FGSM (de Jorge et al., NeurIPS 2022).
    """
    points = images + 2 * epsilon * (2 * torch.rand_like(images) - 1)
    return (points + epsilon * _gradient(model, points, labels).sign()).clamp(0, 1)


def without_smallest(model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """A step from a random start along the 65 % of the gradient that are largest, per image.

    ZeroGrad (Golgooni et al., Intelligent Systems with Applications 2023).
    """
    noise = epsilon * (2 * torch.rand_like(images) - 1)
    gradient = _gradient(model, images + noise, labels).flatten(1)
    least = gradient.abs().quantile(0.35, dim=1, keepdim=True)
    sign = (gradient.sign() * (gradient.abs() > least)).view_as(images)
    return (images + (noise + 1.25 * epsilon * sign).clamp(-epsilon, epsilon)).clamp(0, 1)


def _gradient(model, points: Tensor, labels: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    with evaluation_form(model) as network:
        loss = F.cross_entropy(network(points), labels, reduction="sum")
    return torch.autograd.grad(loss, points)[0]


def aligned_loss(model, images: Tensor, labels: Tensor, epsilon: float, weight: float = 0.2):
    """The single-step loss plus how far gradients at the image and at a random point disagree.

    GradAlign (Andriushchenko and Flammarion, NeurIPS 2020): weight * (1 - cosine).
    """
    loss, logits = standard_loss(
        model, gradient_attack(model, images, labels, epsilon).detach(), labels
    )
    gradients = []
    for moved in (images, images + epsilon * (2 * torch.rand_like(images) - 1)):
        points = moved.detach().requires_grad_()
        value = F.cross_entropy(model(points), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(value, points, create_graph=True)
        gradients.append(gradient.flatten(1))
    cosine = F.cosine_similarity(*gradients, dim=1, eps=1e-12)
    return loss + weight * (1 - cosine).mean(), logits


# name: (loss at an epsilon, further arguments of ConvNN, what `train_model` is told otherwise,
# whether epsilon grows over the first 30 % of the training).
WONG = attacked_loss(from_random_start(1.25))
OURS = attacked_loss(from_random_start(2.0))
RAMP = {"thresholds": (0.4, 0.6)}
CURES = {
    "none: a step from the image": (attacked_loss(gradient_attack), {}, {"averaging": 0.0}, False),
    "bounded random start": (WONG, {}, {"averaging": 0.0}, False),
    "random start, epsilon ramp": (WONG, {}, {"averaging": 0.0}, True),
    "random start, averaged weights": (WONG, {}, {}, False),
    "noise-augmented start": (attacked_loss(noise_augmented), {}, {}, True),
    "smallest gradients dropped": (attacked_loss(without_smallest), {}, {}, True),
    "gradient alignment": (aligned_loss, {}, {}, True),
    "threshold ramp on the pixels": (OURS, RAMP, {}, True),
    "threshold ramp, best epoch": (OURS, RAMP, {"select": "pgd"}, True),
}


def growing(loss: Callable, ramped: bool) -> Callable:
    """A `loss_schedule` whose epsilon grows over the first 30 %, or is there from the start."""

    def loss_at(progress: float):
        return partial(loss, epsilon=EPSILON * (min(progress / 0.3, 1.0) if ramped else 1.0))

    return loss_at


def train_and_judge(cure: str, seed: int, epochs: int, data, judged) -> dict:
    """One row: how a network trained with `cure` ends."""
    train, held_out, test = data
    loss, architecture, options, ramped = CURES[cure]
    seed_everything(seed)
    model = ConvNN(hidden=100, **architecture)
    history = train_model(
        model,
        train,
        epochs=epochs,
        seed=seed,
        loss_schedule=growing(loss, ramped),
        watch=held_out_watch(spread(held_out, 500), EPSILON, "linf"),
        **options,
    )
    hits = hits_by_stage(model, judged, EPSILON)
    return {
        "cure": cure,
        "seed": seed,
        "epochs": epochs,
        "seconds": round(history["epochs"][-1]["seconds"], 1),
        "clean": accuracy(model, test),
        "single_step": accuracy(model, judged, attack=partial(gradient_attack, epsilon=EPSILON)),
        "images": len(judged),
        "standing": int(list(hits.values())[-1].sum()),
        "collapsed_epochs": " ".join(map(str, collapsed_epochs(history["epochs"]))),
    }


def cure_lines(rows) -> str:
    """The table: mean and spread over seeds of each cure."""
    lines = []
    for cure in dict.fromkeys(row["cure"] for row in rows):
        own = [row for row in rows if row["cure"] == cure]
        robust = [100 * int(row["standing"]) / int(row["images"]) for row in own]
        clean = statistics.mean(100 * float(row["clean"]) for row in own)
        step = statistics.mean(100 * float(row["single_step"]) for row in own)
        lines.append(
            (
                cure,
                f"{clean:.2f}",
                f"{step:.1f}",
                " ".join(f"{value:.1f}" for value in robust),
                f"{sum(bool(row['collapsed_epochs']) for row in own)} of {len(own)}",
                f"{statistics.median(float(row['seconds']) for row in own) / 60:.1f}",
            )
        )
    header = ("cure", "clean %", "single step %", "all attacks %, by seed", "collapsed", "minutes")
    return format_table(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True, help="file of the rows, .csv")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    args = parser.parse_args()
    data = load_training_data("data", 5000)
    judged = subset(data[2], range(0, 20 * args.images, 20))
    rows = read_rows(args.rows) if args.rows.exists() else []
    done = {(row["cure"], int(row["seed"])) for row in rows}
    for seed in range(args.seeds):
        for cure in CURES:
            if (cure, seed) not in done:
                rows.append(train_and_judge(cure, seed, args.epochs, data, judged))
                write_rows(args.rows, rows)
                print(cure_lines(rows), flush=True)
    print(cure_lines(rows))


if __name__ == "__main__":
    main()
