"""Result rows on disk and what is read off them (no model code)."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from src.files import whole_file
from src.intervals import accuracy_interval, average_certified_radius, certified_accuracy


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Write rows as CSV, whole or not at all; numbers at full precision.

    Args:
        path: file to write.
        rows: dictionaries with the same keys, at least one.
    """
    with whole_file(path) as temporary, temporary.open("w", newline="") as stream:
        # repr of a float is the shortest text that reads back to the same float.
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries of strings.

    Raises:
        OSError: if the file cannot be read.
    """
    with Path(path).open(newline="") as stream:
        return list(csv.DictReader(stream))


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
