"""Figures from rows and arrays, without torch: every function takes data and writes one image file.

All use matplotlib's object interface: no window opens and no global setting changes.
"""

import contextlib
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy import special

from src.certification.bounds import maximum_radius
from src.certification.intervals import accuracy_interval
from src.files import whole_file
from src.records.rows import read_rows, shown_radius

# matplotlib does not import if MPLBACKEND names a backend that is not installed, such as that of a
# notebook whose shell inherits it. Files need no backend, so the name is put back afterwards.
_BACKEND = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib as mpl  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

if _BACKEND is not None:
    os.environ["MPLBACKEND"] = _BACKEND
    with contextlib.suppress(ValueError):
        mpl.rcParams["backend"] = _BACKEND

# Okabe and Ito's colours, which the colour-blind can tell apart; one per model or attack.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
ALARM = "#C00000"
CYCLE = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black", "#8B6914")
_STYLES = ("-", "--", "-.", ":")
# Colour, dashes and marker of published curves.
_PUBLISHED = (
    (GREEN, (0, (1, 1)), "o"),
    ("#CC79A7", (0, (5, 1)), "s"),
    ("black", (0, (3, 1, 1, 1)), "D"),
    (ORANGE, (0, (5, 2)), "^"),
    ("#56B4E9", (0, (2, 1)), "v"),
)
SMALL = {"color": GREY, "fontsize": 8}
# A note on a horizontal line: its place is a share of the width and a value of the data.
_AT_HEIGHT = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
# Name of the attack in rows that hold the worst of all attacks. A copy of
# `src.robustness.fixed_radii.WORST_KNOWN`, whose module needs torch.
WORST = "worst known"
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


def plain_text(name: str) -> str:
    """A name as it should stand in a figure."""
    # Text between two dollar signs would be mathematics; legends leave out what starts with "_".
    name = re.sub(r"(?<!\\)\$", r"\$", name)
    return f" {name}" if name.startswith("_") else name


def _looks() -> Iterator[tuple[str, str]]:
    """Colour and line style of one curve after the other, all different."""
    return ((color, style) for style in itertools.cycle(_STYLES) for color in CYCLE)


@contextlib.contextmanager
def drawing(
    path: str | os.PathLike,
    width: float,
    height: float,
    layout: str | None = "constrained",
    **style,
) -> Iterator[Figure]:
    """Yield a figure of this size in inches, written to `path` at the end of the block.

    `style` overrides settings of matplotlib, such as "figure.dpi".
    """
    with mpl.rc_context(_STYLE | style):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        _save(figure, path)


def plot_training(
    history: Mapping, path: str | os.PathLike, title: str, *, held_out: str = "held out"
) -> None:
    """Loss and accuracy over the updates, and held-out accuracy per epoch.

    Args:
        history: what `train_model` returns.
        path: image file to write.
        title: title of the figure.
        held_out: label of the held-out accuracy.
    """
    with drawing(path, 9, 3.4) as figure:
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
        right.legend()
        figure.suptitle(title)


def plot_held_out_robustness(
    history: Mapping, path: str | os.PathLike, title: str, collapsed: Sequence[int] = ()
) -> None:
    """Held-out accuracy per epoch: clean, under the single step and under PGD.

    The epochs `collapsed` are shaded: there the training overfitted catastrophically, as
    `collapsed_epochs` finds. A dotted line marks the epoch whose weights were kept.
    """
    with drawing(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        epochs = [row["epoch"] for row in history["epochs"]]
        labels = {"clean": "clean", "single_step": "single step", "pgd": "PGD"}
        for color, (key, label) in zip((BLUE, ORANGE, RED), labels.items(), strict=True):
            values = [row[key] for row in history["epochs"]]
            axes.plot(epochs, values, "o-", color=color, label=label, ms=4)
        for number, epoch in enumerate(collapsed):
            label = "catastrophic overfitting" if number == 0 else None
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=RED, alpha=0.15, lw=0, label=label)
        axes.axvline(history["best_epoch"], color="black", ls=":", lw=1, label="epoch kept")
        axes.set(xlabel="epoch", ylabel="held-out accuracy", title=title, ylim=(0, 1.02))
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower left")


def plot_accuracy_against_epsilon(
    curves: Mapping[str, Sequence[Mapping]],
    path: str | os.PathLike,
    title: str,
    *,
    warnings: Sequence[str] = (),
    chance: float = 0.1,
) -> None:
    """Accuracy against the radius of the attack, one panel per norm, with 95 % intervals.

    If the rows are of several attacks, the solid curve is the worst known result. The curve of
    another attack is dashed, and drawn only if it differs.

    Args:
        curves: name of the model -> rows with `norm`, `epsilon`, `correct` and `images`, and with
            `attack` if they are of several attacks.
        path: image file to write.
        title: title of the figure.
        warnings: reasons to doubt the curves, written in red below the panels.
        chance: share of the most frequent class, a dotted line.
    """
    text = textwrap.fill("warning: " + "; ".join(warnings), 130) if warnings else ""
    # The figure grows with the text, so the panels keep their height.
    with drawing(path, 10, 3.9 + 0.2 * len(text.splitlines())) as figure:
        panels, handles = figure.subplots(1, 2, sharey=True), {}
        symbols = {"linf": "$\\ell_\\infty$", "l2": "$\\ell_2$"}
        for axes, (norm, symbol) in zip(panels, symbols.items(), strict=True):
            for (color, _), (name, rows) in zip(_looks(), curves.items(), strict=False):
                worst, others = _by_attack([row for row in rows if row["norm"] == norm])
                handles |= {name: _plot_accuracy(axes, worst, color, name, len(curves))}
                for attack, rows_of_attack in others.items():
                    _plot_accuracy(axes, rows_of_attack, color)
                    dashed = Line2D([], [], color="black", ls="--", lw=1)
                    handles |= {WORST: Line2D([], [], color="black"), attack: dashed}
            axes.axhline(chance, color=GREY, ls=":", lw=1)
            axes.annotate("chance", (1, chance), **_AT_HEIGHT, **SMALL)
            axes.set(xlabel=f"radius $\\epsilon$ of the attack, {symbol}")
            axes.set(ylim=(0, 1.02), xlim=(0, None))
        panels[0].set_ylabel("accuracy")
        # Models first. Below the panels: robust models keep their curves where a legend would be.
        labels = sorted(handles, key=lambda name: name not in curves)
        lines, labels = [handles[name] for name in labels], list(map(plain_text, labels))
        legend = figure.legend(lines, labels, loc="outside lower center", ncols=min(len(labels), 6))
        # As the title of the legend, the text moves with it and can cover nothing.
        legend.set_title(text, {"size": 8})
        legend.get_title().set(color=ALARM, multialignment="center")
        figure.suptitle(title)


def _by_attack(rows: Sequence[Mapping]) -> tuple[list[Mapping], dict[str, list[Mapping]]]:
    """Rows of the worst known result, or of the only attack; rows of the attacks that differ."""
    attacks: dict[str, list[Mapping]] = {}
    for row in rows:
        attacks.setdefault(row.get("attack", ""), []).append(row)
    worst = attacks.pop(WORST) if WORST in attacks else attacks.popitem()[1] if attacks else []

    def counts(found: Sequence[Mapping]) -> list:
        return [row["correct"] for row in found]

    return worst, {name: found for name, found in attacks.items() if counts(found) != counts(worst)}


def _plot_accuracy(
    axes, rows: Sequence[Mapping], color: str, name: str = "", curves: int = 1
) -> Line2D:
    """A curve of accuracy over the radii, one of so many: solid with its interval if it has a name.

    Else it is dashed.
    """
    # Rows that were read from a file hold text.
    epsilon, standing, images = (
        np.array([float(row[name]) for row in rows]) for name in ("epsilon", "correct", "images")
    )
    if not name:
        return axes.plot(epsilon, standing / images, "--", lw=1, color=color, zorder=1.5)[0]
    (line,) = axes.plot(epsilon, standing / images, "o-", ms=3, color=color, label=name)
    interval = accuracy_interval(standing, images)
    axes.fill_between(epsilon, *interval, color=color, **_band(curves))
    return line


def plot_certified_accuracy(
    rows_by_model: Mapping[str, Sequence[Mapping] | str | os.PathLike],
    path: str | os.PathLike,
    title: str = "",
    *,
    clean: Mapping[str, float] | None = None,
    published: Mapping[str, Mapping[float, float]] | None = None,
) -> None:
    """Certified accuracy against the l2 radius: one step curve per model, with its 95 % interval.

    A dotted vertical line marks the largest radius that the number of noisy copies allows, for
    rows that record `sigma`, `n` and `alpha`.

    Args:
        rows_by_model: name -> result rows with `correct` and radii, or the CSV file of them. The
            radii are those of `shown_radius`, but beside `published` ones those of CERTIFY.
        path: image file to write.
        title: title of the figure.
        clean: name -> accuracy of the base classifier without noise, a dotted line.
        published: method -> {radius: certified accuracy} as others published it.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there are no rows, or rows of something else.
    """
    rows_by_model = {name: _certificates(name, rows) for name, rows in rows_by_model.items()}
    with drawing(path, 6.8, 4.2) as figure:
        axes, limits = figure.subplots(), largest_radii(rows_by_model.values())
        of = (lambda row: float(row["radius"])) if published else shown_radius
        radii = [of(row) for rows in rows_by_model.values() for row in rows]
        grid = np.linspace(0, max(*radii, *limits, 1e-3) * 1.05, 500)
        looks = zip(_looks(), rows_by_model.items(), strict=False)
        for (color, style), (name, rows) in looks:
            # Only correct predictions count; abstentions and wrong ones never do.
            radii = np.sort([of(row) for row in rows if int(row["correct"])])
            certified = len(radii) - np.searchsorted(radii, grid, side="left")
            share = certified / len(rows)
            axes.plot(grid, share, color=color, ls=style, label=plain_text(name))
            interval = accuracy_interval(certified, len(rows))
            axes.fill_between(grid, *interval, color=color, **_band(len(rows_by_model)))
            if name in (clean or {}):
                axes.axhline(clean[name], color=color, ls=":", lw=1)
        if clean:
            place = _AT_HEIGHT | {"xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate("clean, no noise", (0.9, max(clean.values())), **place, **SMALL)
        _mark_limits(axes, limits, "largest possible")
        curves = zip(_PUBLISHED, (published or {}).items(), strict=False)
        for (color, dashes, marker), (name, curve) in curves:
            look = {"color": color, "ls": dashes, "marker": marker, "ms": 3, "lw": 1}
            axes.plot(*zip(*curve.items(), strict=True), label=name, **look)
        # Published curves that all lie high would be one smear on an axis from zero.
        shares = [share for curve in (published or {}).values() for share in curve.values()]
        bottom = max(math.floor(10 * min(shares, default=0) - 0.5) / 10, 0)
        top = 1 + (0.06 if clean else 0.02) * (1 - bottom)
        axes.set(xlabel="certified radius, $\\ell_2$ in pixel units", ylabel="certified accuracy")
        axes.set(xlim=(0, grid[-1]), ylim=(bottom, top), title=title)
        _legend(figure, axes, "best")


def _certificates(name: str, rows: Sequence[Mapping] | str | os.PathLike) -> Sequence[Mapping]:
    """The rows, read from their file if it is one; ValueError if they are no certificates."""
    source = repr(name)
    if isinstance(rows, str | os.PathLike):
        rows, source = read_rows(rows), os.fspath(rows)
    if not rows or not {"correct", "radius"} <= rows[0].keys():
        raise ValueError(f"{source} has no certificates: rows need the columns correct, radius.")
    return rows


def _legend(figure: Figure, axes, place: str) -> None:
    """The legend at a place in the axes, or below them if it would cover half of them."""
    lines, labels = axes.get_legend_handles_labels()
    if len(labels) <= 6:
        axes.legend(loc=place)
    else:
        figure.legend(lines, labels, loc="outside lower center", ncols=4)


def _band(curves: int) -> dict:
    """The look of an interval: the more curves, the fainter."""
    return {"alpha": min(0.15, 0.5 / curves), "lw": 0}


def largest_radii(
    rows_of_models: Iterable[Sequence[Mapping]], *, in_sigmas: bool = False
) -> list[float]:
    """The largest radii that `n` copies can certify, in ascending order, each once.

    Rows without `sigma`, `n` or `alpha` are ignored. `in_sigmas` gives radii in units of sigma.
    """
    made = {
        (1.0 if in_sigmas else float(rows[0]["sigma"]), int(rows[0]["n"]), float(rows[0]["alpha"]))
        for rows in rows_of_models
        if rows and {"sigma", "n", "alpha"} <= rows[0].keys()
    }
    return sorted({float(maximum_radius(*settings)) for settings in made})


def _mark_limits(axes, limits: Sequence[float], label: str) -> None:
    """A dotted vertical line with a label at each limit."""
    for x in limits:
        axes.axvline(x, color=GREY, ls=":", lw=1)
        # To the right, where no curve can be.
        place = {"xycoords": ("data", "axes fraction"), "ha": "left", "rotation": 90}
        axes.annotate(f" {label}", (x, 0.5), va="center", **place, **SMALL)


def plot_p_lower(
    rows_by_model: Mapping[str, Sequence[Mapping]], path: str | os.PathLike, title: str
) -> None:
    """Distribution of the lower bound p_A: for each value, the share of images at or below it.

    The axis is Phi^-1(p_A), the radius in units of sigma, because most values of p_A lie between
    0.99 and 1. Images with p_A of at most 1/2 abstain and are counted at radius 0.
    """
    with drawing(path, 6.8, 4.2) as figure:
        axes, limits = figure.subplots(), largest_radii(rows_by_model.values(), in_sigmas=True)
        looks = zip(_looks(), rows_by_model.items(), strict=False)
        for (color, style), (name, rows) in looks:
            values = np.sort([float(row["p_lower"]) for row in rows])
            radii = np.maximum(special.ndtri(values), 0)
            share = np.arange(1, len(radii) + 1) / len(radii)
            axes.step(radii, share, where="post", color=color, ls=style, label=plain_text(name))
            axes.plot([0], [np.mean(values <= 0.5)], "o", ms=6, color=color, clip_on=False)
        _mark_limits(axes, limits, "largest possible")
        axes.plot([], [], "o", ms=6, color=GREY, label="abstain")
        bounds = [float(row["p_lower"]) for rows in rows_by_model.values() for row in rows]
        end = max([0.5, *limits, *special.ndtri(bounds)])
        axes.set(xlim=(0, 1.05 * end), ylim=(0, 1.02), title=title)
        axes.set(xlabel="certified radius in units of $\\sigma$, $\\Phi^{-1}(p_A)$")
        axes.set(ylabel="share of images at or below")
        above = axes.secondary_xaxis("top", functions=(special.ndtr, special.ndtri))
        ticks = [p for p in (0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 0.9999) if special.ndtri(p) <= end]
        above.set_xticks(ticks, [f"{p:g}" for p in ticks])
        above.set_xlabel("lower bound of the probability of the class, $p_A$")
        _legend(figure, axes, "upper left")


def plot_gallery(
    rows: Sequence[Sequence[tuple[np.ndarray, str, str]]],
    row_labels: Sequence[str],
    path: str | os.PathLike,
    title: str,
) -> None:
    """A grid of digits with captions.

    Args:
        rows: rows of (image (28, 28) in [0, 1], caption, colour of the caption).
        row_labels: what each row shows.
        path: image file to write.
        title: title of the figure.
    """
    columns = max([1, *map(len, rows)])
    size = (1.25 * columns + 1.3, 1.55 * len(rows) + 0.5)
    with drawing(path, *size, **{"axes.grid": False}) as figure:
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


def _smoothed(values: Sequence[float], window: int = 50) -> np.ndarray:
    """Running mean over at most `window` updates, as long as the input."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary)
