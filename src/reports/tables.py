"""Short tables for the console."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from src.certification.intervals import (
    accuracy_interval,
    average_certified_radius,
    certified_accuracy,
    median_interval,
    population_certified_accuracy_interval,
    possibly_certified,
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, the first flush left and the others flush right."""
    lines = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def percent(share: float, low: float | None = None, high: float | None = None) -> str:
    """92.1, or 92.1 [90.4, 93.6] with an interval."""
    text = f"{100 * share:.1f}"
    return text if low is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def round_down(radius: float | str, digits: int) -> str:
    """A radius with so many digits, rounded down: a certificate must not look larger than it is."""
    unit = 10**digits
    return f"{math.floor(float(radius) * unit) / unit:.{digits}f}"


def attack_lines(rows: Sequence[Mapping]) -> str:
    """The table of an evaluation's rows: clean, then each attack in each ball."""
    lines = [
        (
            "clean" if row["attack"] == "none" else f"{row['norm']} {row['epsilon']:g}",
            "" if row["attack"] == "none" else row["attack"],
            percent(row["accuracy"], row["low"], row["high"]),
        )
        for row in rows
    ]
    return format_table(("images", "attack", "accuracy % [95 % interval]"), lines)


def attack_comparison(tables: Mapping[str, Sequence[Mapping]]) -> str:
    """Accuracy of each model on clean images and under each attack, side by side."""
    lines = []
    for rows in zip(*tables.values(), strict=True):
        row = rows[0]
        ball = f"{row['norm']} {row['epsilon']:g}, {row['attack']}"
        cells = (percent(r["accuracy"], r["low"], r["high"]) for r in rows)
        lines.append(("clean" if row["attack"] == "none" else ball, *cells))
    return format_table(("accuracy % [95 % interval]", *tables), lines)


def median_lines(rows_by_model: Mapping[str, Sequence[Mapping]]) -> str:
    """The smallest epsilons that break half of the images, a column a model.

    Args:
        rows_by_model: name -> rows with `norm` and `smallest_epsilon`, the same norms in all; of
            rows of several attacks (`attack`) the last one's, which are the worst known.
    """
    rows_by_model = {name: last_attack(rows) for name, rows in rows_by_model.items()}
    norms = dict.fromkeys(row["norm"] for rows in rows_by_model.values() for row in rows)
    lines = []
    for norm in norms:
        columns = [
            np.array([float(row["smallest_epsilon"]) for row in rows if row["norm"] == norm])
            for rows in rows_by_model.values()
        ]
        medians = ((np.median(values), *median_interval(values)) for values in columns)
        cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*median) for median in medians)
        lines.append((f"{norm}, median", *cells))
        unbroken = (f"{np.isinf(values).sum()} of {len(values):,}" for values in columns)
        lines.append((f"{norm}, not broken", *unbroken))
    return format_table(("smallest epsilon [95 % interval]", *rows_by_model), lines)


def last_attack(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows of the attack that the last row is of; all where they name none."""
    return [row for row in rows if row.get("attack") == rows[-1].get("attack")]


def summarise(rows: Sequence[Mapping], radii: Sequence[float]) -> dict:
    """What a table says of a model's certificates.

    Args:
        rows: result rows of one model.
        radii: l2 radii at which certified accuracy is given.

    Returns:
        `images`, counts `abstained` and `wrong`; `certified`: {radius: (accuracy, low, high)}
        with 95 % intervals of test sampling; `acr`, the average certified radius, and
        `mean_p_lower`.
    """
    radius = np.array([float(row["radius"]) for row in rows])
    right = np.array([int(row["correct"]) for row in rows], bool)
    abstained = np.array([int(row["prediction"]) == -1 for row in rows])
    shares = [float(certified_accuracy(radius, right, at)) for at in radii]
    hits = [round(share * len(rows)) for share in shares]
    intervals = [accuracy_interval(count, len(rows)) for count in hits]
    return {
        "images": len(rows),
        "abstained": int(abstained.sum()),
        "wrong": int((~right & ~abstained).sum()),
        "certified": {
            at: (share, float(low), float(high))
            for at, share, (low, high) in zip(radii, shares, intervals, strict=True)
        },
        "acr": float(average_certified_radius(radius, right)),
        "mean_p_lower": float(np.mean([float(row["p_lower"]) for row in rows])),
    }


def certificate_lines(
    rows_by_model: Mapping[str, Sequence[Mapping]], radii: Sequence[float]
) -> str:
    """The table of `summarise`, a column a model."""
    summaries = [summarise(rows, radii) for rows in rows_by_model.values()]
    lines = [
        ("images", *(f"{s['images']:,}" for s in summaries)),
        ("abstentions", *(str(s["abstained"]) for s in summaries)),
        ("wrong predictions", *(str(s["wrong"]) for s in summaries)),
    ]
    lines += [
        (f"certified % at r = {at:g}", *(percent(*s["certified"][at]) for s in summaries))
        for at in radii
    ]
    lines += [
        ("average certified radius", *(f"{s['acr']:.4f}" for s in summaries)),
        ("mean p_lower", *(f"{s['mean_p_lower']:.4f}" for s in summaries)),
    ]
    if all("radius_two_sided" in rows[0] for rows in rows_by_model.values()):
        # With bounds on the rivals too, each certificate at the same odds as a plain one.
        swapped = [
            [{**row, "radius": row["radius_two_sided"]} for row in rows]
            for rows in rows_by_model.values()
        ]
        tight = [summarise(rows, ())["acr"] for rows in swapped]
        lines.append(("average radius, two-sided", *(f"{acr:.4f}" for acr in tight)))
    return format_table(("certificates [95 % interval]", *rows_by_model), lines)


def population_lines(rows_by_model: Mapping[str, Sequence[Mapping]], radii: Sequence[float]) -> str:
    """Intervals for the population's certified accuracy, a column a model.

    Unlike those of `certificate_lines` they cover, at 95 %, the failure of certificates as well
    as the sampling of images; see `population_certified_accuracy_interval`.
    """
    lines = []
    for at in radii:
        cells = [_population_interval(rows, at) for rows in rows_by_model.values()]
        lines.append((f"% of the population, r = {at:g}", *cells))
    return format_table(("95 % over images and noise", *rows_by_model), lines)


def _population_interval(rows: Sequence[Mapping], at: float) -> str:
    def column(name: str, kind: type) -> np.ndarray:
        return np.array([kind(row[name]) for row in rows])

    alpha, sigma = float(rows[0]["alpha"]), float(rows[0]["sigma"])
    hits = (column("correct", int) == 1) & (column("radius", float) >= at)
    possible = possibly_certified(
        column("top_count", int),
        column("n", int),
        column("prediction", int),
        column("label", int),
        at,
        sigma,
        alpha,
    )
    low, high = population_certified_accuracy_interval(
        int(hits.sum()), len(rows), alpha, possible=int((possible | hits).sum())
    )
    return f"[{100 * low:.1f}, {100 * high:.1f}]"
