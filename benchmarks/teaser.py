"""The picture that explains both halves: one digit under attack, and under the vote of copies.

An l2 attack inside the ball that smoothing certifies makes the standard network err; the network
trained under noise reads noisy copies of the same digit, and CERTIFY bounds the vote. Seed and
digit were chosen so that one of the eight copies that are shown is read otherwise. Draws
reference/figures/how_it_works.png out of reference/models and MNIST.

Run: python -m benchmarks.teaser
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from src.attacks import pgd_attack
from src.certification import certified_radius, lower_confidence_bound
from src.checkpoints import load_checkpoint
from src.command_line import run
from src.reports.plotting import ALARM, GREEN, SMALL, drawing
from src.reports.tables import round_down
from src.utils import load_mnist

REFERENCE = Path("reference")
IMAGE, SIGMA, N0, N, ALPHA, SEED = 3100, 0.5, 100, 10_000, 0.001, 0
EPSILON = 0.9  # Less than the radius that is certified.
SHOWN = 8


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", help="folder of MNIST; default: data/ of the repository")
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


def plot_how_it_works(
    path: str | os.PathLike,
    *,
    label: int,
    image: np.ndarray,
    attacked: np.ndarray,
    readings: Sequence[tuple[int, float]],
    copies: Sequence[tuple[np.ndarray, int]],
    votes: Sequence[int],
    radius: float,
) -> None:
    """One digit under attack, and the same digit under the vote of noisy copies.

    Args:
        path: image file to write.
        label: the digit's class.
        image: (28, 28) in [0, 1].
        attacked: the same image, changed until a network errs.
        readings: class and confidence of that network for `image` and for `attacked`.
        copies: noisy copies (28, 28), each with the class that a second network reads in it.
        votes: votes of the second network for each class.
        radius: certified l2 radius of the vote, in pixel units.
    """
    style = {"axes.grid": False, "figure.dpi": 200}
    with drawing(path, 9, 4.1, layout=None, **style) as figure:
        above, below = figure.subfigures(2, 1)
        _draw_attack(above, image, attacked, readings, label)
        _draw_vote(below, image, copies, votes, radius, label)


def _digit(figure, place, image, caption: str = "", color: str = "black", **options) -> None:
    """Draw an image and its caption at `place`: left, bottom and width as shares of the figure."""
    left, bottom, width = place
    height = width * figure.bbox.width / figure.bbox.height
    axes = figure.add_axes((left, bottom, width, height))
    axes.imshow(image, **{"cmap": "gray_r", "vmin": 0, "vmax": 1} | options)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#D0D0D0")
    axes.set_xlabel(caption, color=color, labelpad=3)


def _verdict_color(guess: int, label: int) -> str:
    return GREEN if guess == label else ALARM


def _words(figure, heading: str, text: str, signs: Mapping[float, str], result: str) -> None:
    """Write the words of one half: left of it, signs between its parts, the result at its right."""
    figure.text(0.01, 0.74, heading, fontsize=13, weight="bold", va="bottom")
    figure.text(0.01, 0.68, text, va="top", linespacing=1.4)
    for x, sign in signs.items():
        figure.text(x, 0.56, sign, fontsize=18, ha="center", va="center")
    figure.text(0.832, 0.56, result, va="center", linespacing=1.4)


def _draw_attack(figure, image, attacked, readings, label: int) -> None:
    change = attacked - image
    limit, length = np.abs(change).max(), np.linalg.norm(change)
    (before, sure), (after, fooled) = readings
    _words(
        figure,
        "Attack",
        "A small change,\nmade for a network,\nmisleads it.",
        {0.395: "+", 0.605: "="},
        f"a change of\n$\\ell_2$ length {length:.2f}\nis enough",
    )
    color, caption = _verdict_color(before, label), f"reads {before}, {sure:.1%} sure"
    _digit(figure, (0.215, 0.2, 0.155), image, caption, color)
    signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    _digit(
        figure, (0.42, 0.2, 0.155), change, f"change (red: more ink), x {1 / limit:.0f}", **signed
    )
    color, caption = _verdict_color(after, label), f"reads {after}, {fooled:.1%} sure"
    _digit(figure, (0.635, 0.2, 0.155), attacked, caption, color)


def _draw_vote(figure, image, copies, votes, radius: float, label: int) -> None:
    _words(
        figure,
        "Smoothing",
        f"{sum(votes):,} noisy copies\nvote, and the vote\nproves a radius.",
        {0.395: r"$\rightarrow$", 0.8: r"$\rightarrow$"},
        f"every image within\n$\\ell_2$ distance {round_down(radius, 2)}\n"
        f"is voted a {label} too,\nwhatever the attack",
    )
    norm = "$\\ell_2$: root of the summed squares of the changes; full ink is 1. "
    norm += "The proof is wrong with a chance of at most 0.1 %."
    figure.text(0.01, 0.03, norm, **SMALL)
    _digit(figure, (0.215, 0.2, 0.155), image, "the same digit")
    for position, (copy, guess) in enumerate(copies):
        row, column = divmod(position, 4)
        place = (0.42 + 0.0635 * column, 0.62 - 0.44 * row, 0.059)
        _digit(figure, place, copy, str(guess), _verdict_color(guess, label))
    axes = figure.add_axes((0.7, 0.2, 0.07, 0.7))
    classes = [guess for guess in np.argsort(votes)[:-5:-1] if votes[guess]]
    colors = [_verdict_color(guess, label) for guess in classes]
    bars = axes.bar(range(len(classes)), [votes[guess] for guess in classes])
    for bar, color in zip(bars, colors, strict=True):
        bar.set_color(color)
    axes.bar_label(bars, [f"{votes[guess]:,}" for guess in classes], fontsize=8)
    axes.set_xticks(range(len(classes)), [str(guess) for guess in classes])
    axes.set(yticks=[], xlabel="votes", xlim=(-0.7, len(classes) - 0.3))
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


if __name__ == "__main__":
    run(main)
