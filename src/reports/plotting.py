"""Figures from rows and arrays (no torch): every function takes data and a path, and writes.

The object interface of matplotlib is used throughout: no window, no global state.
"""

import contextlib
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from src.certification.intervals import accuracy_interval
from src.files import whole_file

# Files need no backend, and the name of one that is not installed (a notebook's, inherited by its
# shell) would end the import of matplotlib: that is put back afterwards.
_BACKEND = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib as mpl  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

if _BACKEND is not None:
    os.environ["MPLBACKEND"] = _BACKEND
    with contextlib.suppress(ValueError):
        mpl.rcParams["backend"] = _BACKEND

# Okabe and Ito's colours, which the colour-blind can tell apart; one for each model or attack.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
ALARM = "#C00000"
CYCLE = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def plot_training(
    history: Mapping, path: str | os.PathLike, title: str, *, held_out: str = "held out"
) -> None:
    """Loss and accuracy over the updates, with the held-out figures of every epoch.

    Args:
        history: what `train_model` returns.
        path: image file to write.
        title: of the figure.
        held_out: label of the held-out figures.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        updates = np.arange(1, len(history["step_loss"]) + 1)
        per_epoch = len(updates) / len(history["epochs"])
        for axes, key, label in ((left, "step_loss", "loss"), (right, "step_accuracy", "accuracy")):
            axes.plot(updates, history[key], color=GREY, alpha=0.4, lw=0.6, label="one update")
            axes.plot(updates, _smoothed(history[key]), color=BLUE, lw=1.6, label="running mean")
            axes.set(xlabel="update", ylabel=f"training {label}")
        left.set_yscale("log")
        epochs = history["epochs"]
        if "clean" in epochs[0]:
            at = [per_epoch * row["epoch"] for row in epochs]
            right.plot(at, [row["clean"] for row in epochs], "o-", color=RED, label=held_out)
        right.set_ylim(min(0.8, np.quantile(_smoothed(history["step_accuracy"]), 0.05)), 1.005)
        left.legend()
        right.legend(loc="lower right")
        figure.suptitle(title)
        _save(figure, path)


def plot_held_out_robustness(
    history: Mapping, path: str | os.PathLike, title: str, collapsed: Sequence[int] = ()
) -> None:
    """Held-out accuracy per epoch: clean, under the single step and under PGD.

    Epochs in `collapsed` (catastrophic overfitting) are shaded; the epoch kept is marked.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        epochs = [row["epoch"] for row in history["epochs"]]
        series = (
            ("clean", BLUE, "clean"),
            ("single_step", ORANGE, "single step"),
            ("pgd", RED, "PGD"),
        )
        for key, color, label in series:
            values = [row[key] for row in history["epochs"]]
            axes.plot(epochs, values, "o-", color=color, label=label, ms=4)
        for number, epoch in enumerate(collapsed):
            label = "catastrophic overfitting" if number == 0 else None
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=RED, alpha=0.15, lw=0, label=label)
        axes.axvline(history["best_epoch"], color="black", ls=":", lw=1, label="epoch kept")
        axes.set(xlabel="epoch", ylabel="held-out accuracy", title=title, ylim=(0, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower left")
        _save(figure, path)


def plot_accuracy_against_epsilon(
    curves: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    title: str,
    *,
    warnings: Sequence[str] = (),
) -> None:
    """Accuracy against the radius of the attack, a panel a norm, with 95 % intervals.

    Args:
        curves: name of the curve -> rows with `norm`, `epsilon`, `correct`, `images`. Names
            of the form "model, attack" share a colour by model and a line style by attack.
        path: image file to write.
        title: of the figure.
        warnings: reasons not to believe it, written in red beneath the panels.
    """
    with mpl.rc_context(_STYLE):
        text = textwrap.fill("warning: " + "; ".join(warnings), 130) if warnings else ""
        # The panels keep their height, whatever is written beneath them.
        figure = Figure(figsize=(10, 3.9 + 0.2 * len(text.splitlines())), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        groups = list(dict.fromkeys(name.split(", ")[0] for name in curves))
        dashes = list(dict.fromkeys(name.partition(", ")[2] for name in curves))
        for axes, norm in zip(panels, ("linf", "l2"), strict=True):
            for name, rows in curves.items():
                rows = [row for row in rows if row["norm"] == norm]
                style = {
                    "color": CYCLE[groups.index(name.split(", ")[0])],
                    "ls": ("-", "--", ":")[dashes.index(name.partition(", ")[2])],
                }
                _plot_proportions(axes, rows, style, name)
            axes.axhline(0.1, color=GREY, ls=":", lw=1)
            axes.annotate(
                "chance",
                (1, 0.1),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color=GREY,
            )
            label = {"linf": "$\\ell_\\infty$", "l2": "$\\ell_2$"}[norm]
            axes.set(
                xlabel=f"radius $\\epsilon$ of the attack, {label}", ylim=(0, 1.02), xlim=(0, None)
            )
        panels[0].set_ylabel("accuracy")
        handles, labels = panels[0].get_legend_handles_labels()
        # Below the panels: robust models keep their curves where a legend would stand.
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        # As the title of the legend it moves with it, and can cover nothing.
        legend.set_title(text, {"size": 8})
        legend.get_title().set(color=ALARM, multialignment="center")
        figure.suptitle(title)
        _save(figure, path)


def _plot_proportions(axes, rows, style, label) -> None:
    """A curve of accuracy with its band over the radii of `rows`."""
    epsilon = [row["epsilon"] for row in rows]
    hits = np.array([row["correct"] for row in rows])
    images = np.array([row["images"] for row in rows])
    axes.plot(epsilon, hits / images, "o", ms=3, label=label, **style | {"ls": style["ls"]})
    axes.fill_between(
        epsilon, *accuracy_interval(hits, images), alpha=0.15, lw=0, color=style["color"]
    )


def plot_certified_accuracy(
    rows_by_model: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    title: str,
    *,
    published: Mapping[str, Mapping[float, float]] | None = None,
) -> None:
    """Certified accuracy against the l2 radius, one step curve a model with its 95 % band.

    Args:
        rows_by_model: name -> result rows, of which `correct` and `radius` are read.
        path: image file to write.
        title: of the figure.
        published: method -> {radius: certified accuracy} of others, drawn as points.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.8, 4.2), layout="constrained")
        axes = figure.subplots()
        largest = max(float(row["radius"]) for rows in rows_by_model.values() for row in rows)
        at = np.linspace(0, max(largest, 1e-3) * 1.05, 500)
        for color, (name, rows) in zip(CYCLE, rows_by_model.items(), strict=False):
            # Sorted radii of the images counted; those that abstain or are wrong never count.
            radii = np.sort([float(row["radius"]) for row in rows if int(row["correct"])])
            hits = len(radii) - np.searchsorted(radii, at, side="left")
            low, high = accuracy_interval(hits, len(rows))
            axes.plot(at, hits / len(rows), color=color, label=name)
            axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
        for marker, (name, curve) in zip("osD^vP*X", (published or {}).items(), strict=False):
            points = zip(*curve.items(), strict=True)
            axes.plot(*points, marker, ms=5, mfc="none", color=GREY, label=name)
        # Points of others that all lie high would be one smear on an axis from zero.
        shares = [share for curve in (published or {}).values() for share in curve.values()]
        bottom = max(math.floor(10 * min(shares, default=0) - 0.5) / 10, 0)
        axes.set(
            xlabel="certified radius, $\\ell_2$ in pixel units",
            ylabel="certified accuracy",
            ylim=(bottom, 1 + 0.02 * (1 - bottom)),
            xlim=(0, at[-1]),
            title=title,
        )
        axes.legend()
        _save(figure, path)


def plot_p_lower(
    rows_by_model: Mapping[str, Sequence[Mapping]], path: str | os.PathLike, title: str
) -> None:
    """Distribution of the lower bound p_A: for each value, the share of images below it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.8, 4.2), layout="constrained")
        axes = figure.subplots()
        for color, (name, rows) in zip(CYCLE, rows_by_model.items(), strict=False):
            values = np.sort([float(row["p_lower"]) for row in rows])
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(values, share, where="post", color=color, label=name)
        axes.axvline(0.5, color=GREY, ls=":", lw=1)
        axes.annotate(
            " abstains below 1/2", (0.5, 0.97), color=GREY, va="top", ha="right", rotation=90
        )
        axes.set(
            xlabel="lower bound of the probability of the class, $p_A$",
            ylabel="share of images at or below",
            xlim=(0, 1.01),
            ylim=(0, 1.02),
            title=title,
        )
        axes.legend(loc="upper left")
        _save(figure, path)


def plot_gallery(
    rows: Sequence[Sequence[tuple[np.ndarray, str, str]]],
    row_labels: Sequence[str],
    path: str | os.PathLike,
    title: str,
) -> None:
    """A grid of digits, each with a caption and the colour of that caption.

    Args:
        rows: rows of (image (28, 28) in [0, 1], caption, colour).
        row_labels: what each row shows.
        path: image file to write.
        title: of the figure.
    """
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        columns = max([1, *map(len, rows)])
        figure = Figure(
            figsize=(1.25 * columns + 1.3, 1.55 * len(rows) + 0.5), layout="constrained"
        )
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, row, label in zip(grid, rows, row_labels, strict=True):
            for axes in line:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            for axes, (image, caption, color) in zip(line, row, strict=False):
                axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
                axes.set_xlabel(caption, color=color, fontsize=9)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        figure.suptitle(title)
        _save(figure, path)


def _smoothed(values: Sequence[float], window: int = 50) -> np.ndarray:
    """Running mean over at most `window` updates, as long as the input."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary)
