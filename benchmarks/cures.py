"""Known cures of the collapse of single-step adversarial training, side by side.

With a single step a network can learn to defeat the step instead of the ball (catastrophic
overfitting). Each cure trains the same ConvNN (16-32, hidden layer of 100) with one gradient step
an update, l-infinity, epsilon = 0.3, and ends with its last epoch, so that a collapse shows; only
"best epoch" picks the epoch by PGD on held-out training images, as main_adv_training.py
does. The judges, on the first --images of the test images 0, 20, 40, ..., are the strongest attack
of src.robustness and then, on what that one left, AutoAttack (benchmarks/autoattack.py says
what it needs): the referee, per image the worst of both. A row is written to --rows as soon as it
is finished; rows that are there are not made again. Each of the --processes trains and judges one
network at a time with one thread; `seconds` are those that its processor spent on the training.

Run: python -m benchmarks.cures --rows results/cures.csv
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import autoattack
from src.attacks import gradient_attack
from src.command_line import count, run
from src.engine.untouched import evaluation_form
from src.methods.adversarial import collapsed_epochs, held_out_watch, training_attack
from src.models import ConvNN
from src.provenance import code_commit
from src.records.rows import read_rows, write_rows
from src.reports.tables import format_table
from src.robustness.strongest import hits_by_stage
from src.training_and_evaluation import accuracy, adversarial_loss, standard_loss, train_model
from src.utils import load_training_data, seed_everything, spread, subset

EPSILON = 0.3
REFEREE = argparse.Namespace(norm="linf", epsilon=EPSILON, seed=0, batch_size=1000, strongest=False)


def noise_augmented(model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """A step of epsilon from noise of twice the ball, without going back into the ball.

    N-FGSM (de Jorge et al., NeurIPS 2022); as in its code the noisy image is cut to [0, 1] first.
    """
    points = (images + 2 * epsilon * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    return (points + epsilon * _gradient(model, points, labels).sign()).clamp(0, 1)


def without_smallest(model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """A step from a random start along the 65 % of the gradient that are largest, per image.

    ZeroGrad (Golgooni et al., Intelligent Systems with Applications 2023), with the step of Wong
    et al. and a share like that of its experiments on colour images: neither is tuned to MNIST.
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


def attacked(attack: Callable) -> Callable:
    """(model, images, labels, epsilon) -> loss and logits at the attacked images."""
    return lambda model, images, labels, epsilon: adversarial_loss(
        model, images, labels, attack=partial(attack, epsilon=epsilon)
    )


def cures(seed: int) -> dict[str, tuple]:
    """Name -> (loss at an epsilon, further arguments of ConvNN, what `train_model` is told
    otherwise, the fraction of the training over which epsilon grows).

    The random starts are those of Wong, Rice and Kolter (ICLR 2020), with their step of 1.25
    epsilon, and of 2 epsilon, which ends in a corner of the ball wherever it starts.
    """
    wong, ours = (
        attacked(training_attack("gradient", "linf", steps=1, seed=seed, stride=stride))
        for stride in (1.25, 2.0)
    )
    plain, pixels = {"averaging": 0.0}, {"thresholds": (0.4, 0.6)}
    return {
        "none: a step from the image": (attacked(gradient_attack), {}, plain, 0.0),
        "bounded random start": (wong, {}, plain, 0.0),
        "random start, epsilon ramp": (wong, {}, plain, 0.3),
        "random start, averaged weights": (wong, {}, {}, 0.0),
        "noise-augmented start": (attacked(noise_augmented), {}, {}, 0.3),
        "smallest gradients dropped": (attacked(without_smallest), {}, {}, 0.3),
        "threshold ramp on the pixels": (ours, pixels, {}, 0.3),
        "threshold ramp, best epoch": (ours, pixels, {"select": "pgd"}, 0.3),
        # Last, because it takes four times as long.
        "gradient alignment": (aligned_loss, {}, {}, 0.3),
    }


def growing(loss: Callable, warmup: float) -> Callable:
    """A `loss_schedule` whose epsilon grows over the first `warmup`, if that is not 0."""
    return lambda progress: partial(
        loss, epsilon=EPSILON * (min(progress / warmup, 1.0) if warmup else 1.0)
    )


def train_and_judge(cure: str, seed: int, epochs: int, images: int) -> dict:
    """One row: how a network trained with `cure` ends, judged on that many images."""
    torch.set_num_threads(1)
    train, held_out, test = load_training_data(None, 5000)
    judged = subset(test, range(0, 20 * images, 20))
    loss, architecture, options, warmup = cures(seed)[cure]
    seed_everything(seed)
    model = ConvNN(hidden=100, **architecture)
    start = time.process_time()
    history = train_model(
        model,
        train,
        epochs=epochs,
        seed=seed,
        loss_schedule=growing(loss, warmup),
        watch=held_out_watch(spread(held_out, 500), EPSILON, "linf"),
        progress=False,
        **options,
    )
    seconds = time.process_time() - start
    stages = hits_by_stage(model, judged, EPSILON, thorough=True, progress=False)
    ours = list(stages.values())[-1]
    left = subset(judged, ours.nonzero()[:, 0])
    hits = autoattack.attacked(model, left, REFEREE, autoattack.AUTOATTACK)
    collapsed = collapsed_epochs(history["epochs"], warmup=warmup)
    return {
        "cure": cure,
        "seed": seed,
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "clean": accuracy(model, test),
        "single_step": accuracy(model, judged, attack=partial(gradient_attack, epsilon=EPSILON)),
        "images": len(judged),
        "standing": int(ours.sum()),
        "referee": int(hits["robust"].sum()),
        "collapsed_epochs": " ".join(map(str, collapsed)),
        "commit": code_commit(),
    }


def cure_lines(rows) -> str:
    """The table: mean and spread over seeds of each cure."""
    lines = []
    for cure in dict.fromkeys(row["cure"] for row in rows):
        own = [row for row in rows if row["cure"] == cure]
        ours, referee = (
            " ".join(f"{100 * int(row[judge]) / int(row['images']):.1f}" for row in own)
            for judge in ("standing", "referee")
        )
        clean = statistics.mean(100 * float(row["clean"]) for row in own)
        step = statistics.mean(100 * float(row["single_step"]) for row in own)
        # Rows call two things "ramp": the warmup of the ball, and the thresholds of the pixels.
        shown = cure.replace("epsilon ramp", "warmup").replace("threshold ramp", "thresholds")
        lines.append(
            (
                shown,
                f"{clean:.2f}",
                f"{step:.1f}",
                ours,
                referee,
                f"{sum(bool(row['collapsed_epochs']) for row in own)} of {len(own)}",
                f"{statistics.median(float(row['seconds']) for row in own) / 60:.1f}",
            )
        )
    judges = ("ours %, by seed", "referee %, by seed")
    return format_table(
        ("cure", "clean %", "single step %", *judges, "collapsed", "minutes"), lines
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True, help="file of the rows, .csv")
    parser.add_argument("--epochs", type=count(), default=12)
    parser.add_argument("--seeds", type=count(), default=3)
    parser.add_argument("--images", type=count(), default=200, help="test images that are attacked")
    parser.add_argument("--processes", type=count(), default=2, help="networks at once")
    args = parser.parse_args()
    autoattack.torchattacks()  # Says now that it is missing, not after the first training.
    rows = read_rows(args.rows) if args.rows.exists() else []
    done = {(row["cure"], int(row["seed"])) for row in rows}
    names = list(cures(0))
    wanted = [(cure, seed) for cure in names for seed in range(args.seeds)]
    # Fresh interpreters: a forked one inherits the locks of threads that it lacks.
    pool = ProcessPoolExecutor(args.processes, get_context("spawn"))
    try:
        jobs = [
            pool.submit(train_and_judge, *one, args.epochs, args.images)
            for one in wanted
            if one not in done
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            rows.sort(key=lambda row: (names.index(row["cure"]), int(row["seed"])))
            write_rows(args.rows, rows)
            print(cure_lines(rows), flush=True)
    finally:
        # After a failure or Ctrl-C only the networks in hand are still trained; they are lost.
        pool.shutdown(cancel_futures=True)
    print(cure_lines(rows))


if __name__ == "__main__":
    run(main)
