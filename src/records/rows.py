"""Result rows on disk: how they are written and read, and every check that needs no model.

A file of certificates, X.csv, has one line per image. Its twin, X.json, says what made it and
holds digests of the rows and of itself.
"""

import contextlib
import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from src.certification import (
    certified_radius,
    lower_confidence_bound,
    tight_radius,
    two_sided_radius,
    upper_confidence_bound,
)
from src.files import whole_file
from src.records.twins import indices_digest, read_exactly, read_twin, text_digest

_COUNTED = ("index", "label", "prediction", "correct", "radius", "p_lower", "top_count")
_SETTINGS = ("n0", "n", "alpha", "sigma", "seed")
COLUMNS = (*_COUNTED, "rival_count", "radius_tight", "test", *_SETTINGS)
# What older releases wrote, the second if they were asked to bound all other classes too.
OLDER = ((*_COUNTED, *_SETTINGS), (*_COUNTED, *_SETTINGS, "rival_count", "radius_two_sided"))
NUM_CLASSES = 10  # The classes of MNIST, for twins that do not say how many there are.


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Write rows as CSV, whole or not at all; numbers at full precision.

    Args:
        path: file to write.
        rows: dictionaries with the same keys, at least one.
    """
    columns = list(rows[0])
    with whole_file(path) as temporary:
        text = csv_text([columns, *([row[c] for c in columns] for row in rows)])
        temporary.write_bytes(text.encode())


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries of strings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a table in CSV.
    """
    return rows_of(read_exactly(Path(path)), path)


def rows_of(text: str, path: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of the text of a CSV file; `path` is for the message of its ValueError."""
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: it is not a table in CSV ({error}).") from None


def checked_path(path: str | os.PathLike) -> Path:
    """`path` if it ends in .csv, else ValueError: with .json it would be its own twin."""
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path} must end in .csv; its twin gets the ending .json.")
    return path


def shown_radius(row: Mapping) -> float:
    """The radius of a row that users are shown: the tightest, or of older rows CERTIFY's."""
    return float(row["radius_tight"] if "radius_tight" in row else row["radius"])


def older_columns(text: str) -> tuple[str, ...] | None:
    """The columns of a table of certificates by an older release, else None."""
    header = text.partition("\n")[0]
    return next((columns for columns in OLDER if ",".join(columns) == header), None)


def check_rows(
    rows: Sequence[Mapping[str, str]],
    text: str,
    columns: Sequence[str] = COLUMNS,
    settings: Mapping | None = None,
) -> list[str]:
    """The problems of result rows, as far as they show without the model; empty if there is none.

    Computes every bound and radius again from its counts. `text` must be exactly what is written
    for the rows, and columns that repeat the `settings` must agree with them.
    """
    settings = settings or {}
    problems = []
    for number, row in enumerate(rows, start=2):
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError):
            if _is_consistent(row, settings):
                continue
        problems.append(f"line {number} contradicts itself")
    if csv_text([columns, *(row.values() for row in rows)]) != text:
        problems.append("it is not a table of the expected columns as they are written")
    for key in _SETTINGS:
        values = {str(row.get(key)) for row in rows}
        if key in settings and values - {str(settings[key])}:
            problems.append(f"the rows have another {key} than the twin")
    for key in ("sampler_cost", "off_grid"):
        value = settings.get(key, 0.0)
        if not (isinstance(value, int | float) and 0 <= value < math.inf):
            problems.append(f"the {key} of the twin is no number of at least 0")
    return problems


def _is_consistent(row: Mapping[str, str], settings: Mapping) -> bool:
    """Whether a row's bound, radii, prediction and correctness follow from its counts."""
    classes, distance = settings.get("num_classes", NUM_CLASSES), settings.get("off_grid", 0.0)
    top_count, rival_count, n = (int(row.get(k, 0)) for k in ("top_count", "rival_count", "n"))
    alpha, sigma = float(row["alpha"]) - settings.get("sampler_cost", 0.0), float(row["sigma"])
    # Without the sampler's cost in the twin, which is tiny, only that the bounds are not too large.
    unknown = 1e-6 if "test" in row and "sampler_cost" not in settings else 0.0
    p_lower = lower_confidence_bound(top_count, n, alpha)
    radii = {"radius": certified_radius(p_lower, sigma)}
    if "test" in row:
        votes = (top_count, rival_count, n, alpha, sigma)
        radii["radius_tight"] = tight_radius(row["test"], *votes)
    elif "radius_two_sided" in row:
        radii["radius_two_sided"] = _older_radius(top_count, rival_count, n, alpha, sigma, classes)
    prediction, found = int(row["prediction"]), {key: float(row[key]) for key in radii}
    abstains = p_lower <= 0.5 or (distance > 0 and found["radius"] == 0)
    # Where CERTIFY abstains, nothing else is claimed either.
    radii = {key: 0.0 if p_lower <= 0.5 else radius for key, radius in radii.items()}
    return (
        _is_from(float(row["p_lower"]), p_lower, unknown)
        and all(_is_from(found[key], r, distance + unknown * sigma) for key, r in radii.items())
        and (not abstains or not any(found.values()))
        and all(repr(float(row[key])) == row[key] for key in ("p_lower", *radii))
        and int(row["correct"]) == (row["prediction"] == row["label"])
        and (prediction == -1) == abstains
        and -1 <= prediction < classes
        and 0 <= int(row["label"]) < classes
        and top_count + rival_count <= n
    )


def _is_from(found: float, expected: float, less: float) -> bool:
    """Whether `found` is the bound or radius that is expected, or smaller by at most `less`."""
    # Releases of scipy differ in the last digits, which the digest in the twin guards.
    return max(expected - less, 0.0) * (1 - 1e-10) <= found <= expected * (1 + 1e-10)


def _older_radius(top: int, rival: int, n: int, alpha: float, sigma: float, classes: int) -> float:
    """The radius of older releases, which bounded every other class at alpha / 2 / (K - 1)."""
    p_lower = lower_confidence_bound(top, n, alpha / 2)
    p_rival = upper_confidence_bound(rival, n, alpha / 2 / (classes - 1))
    return two_sided_radius(p_lower, min(p_rival, math.nextafter(1 - p_lower, 2)), sigma)


def verify(path: str | os.PathLike) -> list[str]:
    """Check a finished file of certificates against itself and its twin.

    Returns:
        One sentence per problem; empty if there is none. Finds every changed character of either
        file, unless somebody has changed the digests to match.

    Raises:
        OSError: if a file is missing.
        ValueError: if a file cannot be read as what it should be, or the twin was changed.
    """
    path = checked_path(path)
    text = read_exactly(path)
    content = read_twin(path.with_suffix(".json"))
    rows, settings = rows_of(text, path), content["settings"]
    problems = check_rows(rows, text, older_columns(text) or COLUMNS, settings)
    if not content["finished"]:
        problems.append("the run is not finished")
    elif content.get("rows_sha256") != text_digest(text):
        problems.append("the rows do not match the digest in the twin")
    elif (
        "indices" in settings
        and indices_digest(row["index"] for row in rows) != settings["indices"]
    ):
        problems.append("the rows are not those of the images that were asked for")
    return problems


def csv_text(lines: Iterable[Iterable]) -> str:
    """Lines of CSV. A float is written as the shortest text that reads back as the same float."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()
