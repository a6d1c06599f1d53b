"""The picture that explains both halves: one digit under attack, and under the vote of copies.

An l2 attack inside the ball that smoothing certifies makes the standard network err; the network
trained under noise reads noisy copies of the same digit, and CERTIFY bounds the vote. Seed and
digit were chosen so that one of the eight copies that are shown is read otherwise. Draws
reference/figures/how_it_works.png out of reference/models and MNIST.

Run: python -m benchmarks.teaser
"""

import argparse
from pathlib import Path

import torch

from src.attacks import pgd_attack
from src.certification import certified_radius, lower_confidence_bound
from src.checkpoints import load_checkpoint
from src.command_line import run
from src.reports.plotting import plot_how_it_works
from src.utils import load_mnist

REFERENCE = Path("reference")
IMAGE, SIGMA, N0, N, ALPHA, SEED = 3100, 0.5, 100, 10_000, 0.001, 0
EPSILON = 0.9  # Less than the radius that is certified.
SHOWN = 8


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", default="data", help="folder of MNIST")
    args = parser.parse_args(argv)
    image, label = (part[None] for part in load_mnist("test", args.data)[IMAGE])
    standard = load_checkpoint(REFERENCE / "models" / "standard.pt")
    attacked = pgd_attack(standard, image, label, EPSILON, "l2", steps=100, restarts=2)
    smoothed = load_checkpoint(REFERENCE / "models" / "smoothing_best_0.50.pt")
    copies, guesses = noisy_readings(smoothed, image)
    votes = guesses[N0:].bincount(minlength=10)
    # CERTIFY: the first copies choose the class, the others bound its share.
    chosen = guesses[:N0].bincount(minlength=10).argmax()
    bound = lower_confidence_bound(int(votes[chosen]), N, ALPHA)
    plot_how_it_works(
        REFERENCE / "figures" / "how_it_works.png",
        label=int(label),
        image=image[0, 0].numpy(),
        attacked=attacked[0, 0].numpy(),
        readings=[reading(standard, image), reading(standard, attacked)],
        copies=list(zip(copies[:SHOWN, 0].numpy(), guesses[:SHOWN].tolist(), strict=True)),
        votes=votes.tolist(),
        radius=float(certified_radius(bound, SIGMA)),
    )


@torch.no_grad()
def noisy_readings(model, image):
    """N0 + N noisy copies of the image, and the class that is read in each."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn((N0 + N, *image.shape[1:]), generator=generator)
    copies = image + SIGMA * noise
    return copies, torch.cat([model(part).argmax(dim=1) for part in copies.split(1000)])


@torch.no_grad()
def reading(model, image) -> tuple[int, float]:
    """The class that is read in one image, and its probability by the softmax."""
    probability, guess = model(image).softmax(dim=1).max(dim=1)
    return int(guess), float(probability)


if __name__ == "__main__":
    run(main)
