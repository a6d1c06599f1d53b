"""PGD side by side: a plain loop in float32 against `pgd_attack`, as the tables call it.

The plain loop takes the unchanged network through a batch of 1,000 images: random start, forward,
cross-entropy, gradient by the images, signed step, clamp to the ball and to [0, 1]; a point that
is misclassified on the way counts, as it does for ours. Ours takes steps of the same size from the
same start, at most as many, since it leaves an image once it has fallen. Both alternate in one
run, each time from another start; medians are printed, and the mean accuracy that each leaves.
The networks are trained for an epoch against the single step first (half a minute each).

Run: python -m benchmarks.attacks
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

from src.attacks import pgd_attack
from src.methods.adversarial import adversarial_loss_schedule, training_attack
from src.models import ConvNN
from src.training_and_evaluation import accuracy, train_model
from src.utils import load_mnist, seed_everything, spread

EPSILON = 0.3
NETWORKS = {
    "16-32, default": {"channels": (16, 32)},
    "16-32, thresholds, hidden 100": {
        "channels": (16, 32),
        "hidden": 100,
        "thresholds": (0.4, 0.6),
    },
}


def plain_pgd(model, images, labels, steps, generator):
    """Projected gradient ascent from a random start: a misclassified point, else the last."""
    step_size = 2.5 * EPSILON / steps
    noise = 2 * torch.rand(images.shape, generator=generator) - 1
    points = (images + EPSILON * noise).clamp(0, 1)
    found = images.clone()
    broken = torch.zeros(len(images), dtype=torch.bool)
    for _ in range(steps):
        points.requires_grad_()
        logits = model(points)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), points)
        points = points.detach()
        fallen = logits.argmax(dim=1) != labels
        found[fallen], broken = points[fallen], broken | fallen
        points = points + step_size * gradient.sign()
        points = (images + (points - images).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return torch.where(broken[:, None, None, None], found, points)


def timed(model, dataset, attack, steps, seed):
    """(seconds, accuracy) of the evaluation under an attack."""
    attack = partial(attack, steps=steps, generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    hits = accuracy(model, dataset, attack=attack)
    return time.perf_counter() - start, hits


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=5, help="alternations")
    args = parser.parse_args()
    train = load_mnist("train")
    test = spread(load_mnist("test"), args.images)
    for name, options in NETWORKS.items():
        seed_everything(0)
        model = ConvNN(**options)
        attack = training_attack("gradient", "linf", steps=1, seed=0)
        schedule = adversarial_loss_schedule(attack, EPSILON)
        train_model(model, train, epochs=1, loss_schedule=schedule, progress=False)
        ours = partial(pgd_attack, epsilon=EPSILON, early_stop=True)
        pairs = [
            [timed(model, test, call, args.steps, seed) for call in (plain_pgd, ours)]
            for seed in range(args.repeat + 1)
        ][1:]
        slow, fast = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(plain[0] / here[0] for plain, here in pairs)
        left = [statistics.mean(pair[side][1] for pair in pairs) for side in (0, 1)]
        print(
            f"{name:24s} plain {slow:6.2f} s, {left[0]:.2%} left; here {fast:6.2f} s, "
            f"{left[1]:.2%} left; ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
