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
from src.records.rows import shown_radius

# Tables of more characters are cut into several, one below the other.
WIDEST = 132


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right.

    Columns beyond WIDEST characters go to a further table below, which has the first one too.
    """
    lines = [list(map(str, line)) for line in (header, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    ends = np.cumsum([width + 2 for width in others])
    fitting = max(1, int((first + ends <= WIDEST).sum()))
    if fitting < len(others):
        parts = (slice(1, fitting + 1), slice(fitting + 1, None))
        tables = ([[line[0], *line[part]] for line in lines] for part in parts)
        return "\n\n".join(format_table(table[0], table[1:]) for table in tables)
    text = []
    for start, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        text.append("  ".join([start.ljust(first), *padded]).rstrip())
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def percent(share: float, low: float | None = None, high: float | None = None) -> str:
    """92.1, or 92.1 [90.4, 93.6] with an interval."""
    text = f"{100 * share:.1f}"
    return text if low is None else f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def round_down(radius: float | str, digits: int) -> str:
    """A radius with `digits` decimals, rounded down so that no certificate looks too large."""
    unit = 10**digits
    return f"{math.floor(float(radius) * unit) / unit:.{digits}f}"


def attack_lines(rows: Sequence[Mapping]) -> str:
    """The table of one model under attack, from rows of `accuracy_row`: a line per row."""
    lines = []
    for row in rows:
        clean = row["attack"] == "none"
        images = "clean" if clean else f"{row['norm']} {row['epsilon']:g}"
        accuracy = percent(row["accuracy"], row["low"], row["high"])
        lines.append((images, "" if clean else row["attack"], accuracy))
    return format_table(("images", "attack", "accuracy % [95 % interval]"), lines)


def attack_comparison(tables: Mapping[str, Sequence[Mapping]]) -> str:
    """Accuracy of each model on clean images and under each attack, one column per model."""
    lines = []
    for rows in zip(*tables.values(), strict=True):
        row = rows[0]
        ball = f"{row['norm']} {row['epsilon']:g}, {row['attack']}"
        cells = (percent(r["accuracy"], r["low"], r["high"]) for r in rows)
        lines.append(("clean" if row["attack"] == "none" else ball, *cells))
    return format_table(("accuracy % [95 % interval]", *tables), lines)


def median_lines(rows_by_model: Mapping[str, Sequence[Mapping]]) -> str:
    """Median of the smallest epsilon that breaks an image, one column per model.

    Args:
        rows_by_model: name -> rows with `norm` and `smallest_epsilon`, the same norms in all. If
            rows have an `attack`, only those of the last row's attack count, the worst known.
    """
    worst = [
        [row for row in rows if row.get("attack") == rows[-1].get("attack")]
        for rows in rows_by_model.values()
    ]
    lines = []
    for norm in dict.fromkeys(row["norm"] for rows in worst for row in rows):
        columns = [
            np.array([float(row["smallest_epsilon"]) for row in rows if row["norm"] == norm])
            for rows in worst
        ]
        medians = ((np.median(values), *median_interval(values)) for values in columns)
        cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*median) for median in medians)
        lines.append((f"{norm}, median", *cells))
        unbroken = (f"{np.isinf(values).sum()} of {len(values):,}" for values in columns)
        lines.append((f"{norm}, not broken", *unbroken))
    return format_table(("smallest epsilon [95 % interval]", *rows_by_model), lines)


def summarise(rows: Sequence[Mapping], radii: Sequence[float], column: str | None = None) -> dict:
    """The numbers that a table gives of a model's certificates.

    Args:
        rows: result rows of one model.
        radii: l2 radii at which certified accuracy is given.
        column: the radii of the rows that count; default: those of `shown_radius`.

    Returns:
        `images`, and the counts `abstained` and `wrong`. `certified`: {radius: (accuracy, low,
        high)} with 95 % intervals over the sampling of test images. `acr`: the average certified
        radius. `mean_p_lower`.
    """
    radius = np.array([float(row[column]) if column else shown_radius(row) for row in rows])
    standing = np.array([int(row["correct"]) for row in rows], bool)
    abstained = np.array([int(row["prediction"]) == -1 for row in rows])
    certified = {}
    for epsilon in radii:
        share = float(certified_accuracy(radius, standing, epsilon))
        low, high = accuracy_interval(round(share * len(rows)), len(rows))
        certified[epsilon] = (share, float(low), float(high))
    return {
        "images": len(rows),
        "abstained": int(abstained.sum()),
        "wrong": int((~standing & ~abstained).sum()),
        "certified": certified,
        "acr": float(average_certified_radius(radius, standing)),
        "mean_p_lower": float(np.mean([float(row["p_lower"]) for row in rows])),
    }


def certificate_lines(
    rows_by_model: Mapping[str, Sequence[Mapping]], radii: Sequence[float]
) -> str:
    """The table of `summarise`, one column per model."""
    summaries = [summarise(rows, radii) for rows in rows_by_model.values()]
    lines = [
        ("images", *(f"{s['images']:,}" for s in summaries)),
        ("abstentions", *(str(s["abstained"]) for s in summaries)),
        ("wrong predictions", *(str(s["wrong"]) for s in summaries)),
    ]
    for epsilon in radii:
        cells = (percent(*s["certified"][epsilon]) for s in summaries)
        lines.append((f"certified % at r = {epsilon:g}", *cells))
    lines.append(("average certified radius", *(f"{s['acr']:.4f}" for s in summaries)))
    lines.append(("mean p_lower", *(f"{s['mean_p_lower']:.4f}" for s in summaries)))
    if all("radius_tight" in rows[0] for rows in rows_by_model.values()):
        plain = (summarise(rows, (), "radius")["acr"] for rows in rows_by_model.values())
        lines.insert(-1, ("the same by CERTIFY", *(f"{acr:.4f}" for acr in plain)))
    return format_table(("certificates [95 % interval]", *rows_by_model), lines)


def population_lines(rows_by_model: Mapping[str, Sequence[Mapping]], radii: Sequence[float]) -> str:
    """Intervals for the certified accuracy on the whole population, one column per model.

    Unlike those of `certificate_lines`, these 95 % intervals also allow for certificates that
    fail; see `population_certified_accuracy_interval`. They are about the radii of CERTIFY, which
    follow from one probability.
    """
    lines = []
    for epsilon in radii:
        cells = [_population_interval(rows, epsilon) for rows in rows_by_model.values()]
        lines.append((f"% of the population, r = {epsilon:g}", *cells))
    # Only where the tables beside this one show other radii.
    by = ", by CERTIFY" if any("radius_tight" in rows[0] for rows in rows_by_model.values()) else ""
    return format_table((f"95 % over images and noise{by}", *rows_by_model), lines)


def _population_interval(rows: Sequence[Mapping], epsilon: float) -> str:
    def column(name: str, kind: type) -> np.ndarray:
        return np.array([kind(row[name]) for row in rows])

    alpha, sigma = float(rows[0]["alpha"]), float(rows[0]["sigma"])
    certified = (column("correct", int) == 1) & (column("radius", float) >= epsilon)
    counts = (column(name, int) for name in ("top_count", "n", "prediction", "label"))
    possible = possibly_certified(*counts, epsilon, sigma, alpha) | certified
    low, high = population_certified_accuracy_interval(
        int(certified.sum()), len(rows), alpha, possible=int(possible.sum())
    )
    return f"[{100 * low:.1f}, {100 * high:.1f}]"
