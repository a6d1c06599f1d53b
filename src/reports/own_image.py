"""What several models read in one image of one's own: a table and a figure."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.certification.bounds import maximum_radius
from src.checks import predicted
from src.mnist.digits import read_digit
from src.mnist.pictures import open_image
from src.models import ABSTAIN, ConvNN, SmoothClassifier
from src.reports.plotting import GREEN, GREY, RED, SMALL, drawing, plain_text
from src.reports.tables import format_table, round_down
from src.robustness.closest import closest_attacked

_SYMBOLS = {"linf": "$\\ell_\\infty$", "l2": "$\\ell_2$"}


def report_image(
    models: Mapping[str, ConvNN],
    path: str | os.PathLike,
    figure: str | os.PathLike,
    *,
    sigma: float,
    precision: str,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    steps: int,
) -> None:
    """Print what was done to an image and what each model reads in it, and draw it all.

    Args:
        models: name -> network.
        path: the image file, see `src.utils.load_image`.
        figure: image file to write.
        sigma, precision, n0, n, alpha, seed: of the certificates, as for `SmoothClassifier`.
        steps: of the attacks by gradient.
    """
    digit = read_digit(path)
    print("\n".join([str(path), *(f"  {note}" for note in digit.notes or ["Taken as it is."])]))
    image = torch.from_numpy(np.divide(digit.pixels[None, None], 255, dtype=np.float32))
    found = {}
    for name, model in models.items():
        here = image.to(next(model.parameters()).device)
        found[name] = _read(model, here, steps)
        smooth = SmoothClassifier(model, sigma, precision=precision)
        certificate = smooth.certify(here, n0, n, alpha, seed=seed)
        found[name] |= {
            "vote": int(certificate.prediction),
            "radius": float(certificate.radius_tight),
        }
    print("\n" + _table(found, sigma, n))
    print(
        "\nThe smallest attacks found make the network itself read another digit than without an "
        f"attack.\nThe certificate is of its vote on {n:,} noisy copies, and for this image alone."
    )
    limit = float(maximum_radius(sigma, n, alpha))
    title = f"{plain_text(Path(path).name)}, certified at $\\sigma$ = {sigma:g}, n = {n:,}"
    _draw(path, digit.pixels, found, limit, title, figure)


@torch.no_grad()
def _judged(model: ConvNN, image: Tensor) -> tuple[int, float]:
    """The class of one image and the confidence in it."""
    logits = model(image)
    return int(predicted(logits)), float(logits.softmax(dim=1).max())


def _read(model: ConvNN, image: Tensor, steps: int) -> dict:
    """What a network reads in an image; per norm (epsilon, what it reads then, pixels)."""
    read, confidence = _judged(model, image)
    label = torch.tensor([read], device=image.device)
    attacked = closest_attacked(model, image, label, steps=steps)
    return {
        "read": read,
        "confidence": confidence,
        "attacked": {
            norm: (epsilon, _judged(model, point)[0], point[0, 0].cpu().numpy())
            for norm, (epsilon, point) in attacked.items()
        },
    }


def _table(found: Mapping[str, Mapping], sigma: float, n: int) -> str:
    def attack(of: Mapping, norm: str) -> str:
        epsilon, read, _ = of["attacked"].get(norm, (0, 0, None))
        return f"{read} at {epsilon:.3f}" if norm in of["attacked"] else "none"

    every = list(found.values())
    lines = [
        ("reads (confidence)", *(f"{of['read']} ({100 * of['confidence']:.0f} %)" for of in every)),
        *(
            (f"smallest attack found, {norm}", *(attack(of, norm) for of in every))
            for norm in _SYMBOLS
        ),
        (f"vote under noise, sigma = {sigma:g}", *(_vote(of) for of in every)),
        ("certified within l2 radius", *(_radius(of) for of in every)),
    ]
    return format_table(("model", *found), lines)


def _vote(of: Mapping) -> str:
    return "abstains" if of["vote"] == ABSTAIN else str(of["vote"])


def _radius(of: Mapping) -> str:
    return "nothing" if of["vote"] == ABSTAIN else round_down(of["radius"], 3)


def _draw(path, pixels: np.ndarray, found: Mapping, limit: float, title: str, figure) -> None:
    """The image as given and as the networks see it; a row per model: attacked, and its radius."""
    height = max(3.6, 1.5 * len(found) + 1)
    with drawing(figure, 9.5, height, **{"axes.grid": False}) as canvas:
        left, right = canvas.subfigures(1, 2, width_ratios=(1, 3.2))
        given, seen = left.subplots(2, 1)
        picture = open_image(path).convert("RGBA")
        picture.thumbnail((500, 500))
        given.imshow(picture)
        given.set_title("as given")
        seen.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        seen.set_title("as the networks see it")
        rows = right.subplots(len(found), 3, squeeze=False, width_ratios=(1, 1, 1.5))
        for (name, of), row in zip(found.items(), rows, strict=True):
            for axes, norm in zip(row, _SYMBOLS, strict=False):
                _draw_attacked(axes, of, norm)
            reads = f"{plain_text(name)}\nreads {of['read']} ({100 * of['confidence']:.0f} %)"
            row[0].set_ylabel(reads, rotation=0, ha="right", va="center", labelpad=8)
            _draw_radius(row[2], of, limit)
        for axes in (given, seen, *rows[:, :2].flat):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(axes is given)
        for axes, norm in zip(rows[0], _SYMBOLS, strict=False):
            axes.set_title(f"smallest attack\nfound, {_SYMBOLS[norm]}")
        rows[0, 2].set_title("vote under noise, and\nthe radius that is proven")
        rows[-1, 2].set_xlabel("certified radius, $\\ell_2$ in pixel units")
        canvas.suptitle(title)


def _draw_attacked(axes, of: Mapping, norm: str) -> None:
    if norm not in of["attacked"]:
        axes.text(0.5, 0.5, "none found", ha="center", transform=axes.transAxes, **SMALL)
        return
    epsilon, read, image = of["attacked"][norm]
    axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    axes.set_xlabel(f"reads {read}, $\\epsilon$ = {epsilon:.3f}", color=RED, fontsize=9)


def _draw_radius(axes, of: Mapping, limit: float) -> None:
    """A bar up to the certified radius, red if the vote differs from what the network reads.

    The dotted line is the largest radius that n copies can prove.
    """
    color = GREEN if of["vote"] == of["read"] else RED
    axes.barh([0], [of["radius"]], color=color, height=0.4)
    axes.axvline(limit, color=GREY, ls=":", lw=1)
    abstains = of["vote"] == ABSTAIN
    words = "abstains: nothing proven" if abstains else f"{of['vote']} within {_radius(of)}"
    axes.text(0.02 * limit, 0.3, words, color=color, fontsize=9)
    axes.set(xlim=(0, 1.1 * limit), ylim=(-0.6, 0.8), yticks=[])
    axes.spines["left"].set_visible(False)
