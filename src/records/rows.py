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

from src.certification.bounds import (
    certified_radius,
    lower_confidence_bound,
    two_sided_bounds,
    two_sided_radius,
)
from src.files import whole_file
from src.records.twins import indices_digest, read_exactly, read_twin, text_digest

COLUMNS = (
    *("index", "label", "prediction", "correct", "radius", "p_lower", "top_count"),
    *("n0", "n", "alpha", "sigma", "seed"),
)
# Further columns of runs with the setting "two_sided": the certificate from bounds on both sides.
TWO_SIDED = ("rival_count", "radius_two_sided")
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


def columns_of(settings: Mapping) -> tuple[str, ...]:
    """The columns of rows made with these settings."""
    return COLUMNS + (TWO_SIDED if settings.get("two_sided") else ())


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
    classes, problems = settings.get("num_classes", NUM_CLASSES), []
    for number, row in enumerate(rows, start=2):
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError):
            if _is_consistent(row, classes):
                continue
        problems.append(f"line {number} contradicts itself")
    if csv_text([columns, *(row.values() for row in rows)]) != text:
        problems.append("it is not a table of the expected columns as they are written")
    for key in ("n0", "n", "alpha", "sigma", "seed"):
        values = {str(row.get(key)) for row in rows}
        if key in settings and values - {str(settings[key])}:
            problems.append(f"the rows have another {key} than the twin")
    return problems


def _is_consistent(row: Mapping[str, str], classes: int) -> bool:
    """Whether a row's bound, radius, prediction and correctness follow from its counts."""
    top_count, rival_count, n = (int(row.get(k, 0)) for k in ("top_count", "rival_count", "n"))
    p_lower = lower_confidence_bound(top_count, n, float(row["alpha"]))
    radius = certified_radius(p_lower, float(row["sigma"]))
    # Releases of scipy differ in the last digits, which the digest in the twin guards.
    expected = {"p_lower": p_lower, "radius": radius}
    if "rival_count" in row:
        bounds = two_sided_bounds(top_count, rival_count, n, float(row["alpha"]), classes)
        tight = two_sided_radius(*bounds, float(row["sigma"])) if p_lower > 0.5 else 0.0
        expected["radius_two_sided"] = tight
    return (
        all(math.isclose(float(row[key]), x, rel_tol=1e-10) for key, x in expected.items())
        and all(repr(float(row[key])) == row[key] for key in expected)
        and int(row["correct"]) == (row["prediction"] == row["label"])
        and (int(row["prediction"]) == -1) == (p_lower <= 0.5)
        and -1 <= int(row["prediction"]) < classes
        and 0 <= int(row["label"]) < classes
        and top_count + rival_count <= n
    )


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
    problems = check_rows(rows, text, columns_of(settings), settings)
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
