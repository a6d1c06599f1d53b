"""Result rows on disk: append, resume, verify, and what is read off them (no model code).

A file of certificates, X.csv, grows by one line an image. Its twin, X.json, holds what made it
and, once it is finished, digests of the rows and of itself. Check both with

    python -m src.records.rows verify X.csv [--redraw K --checkpoint MODEL.pt]

and put the shards of a run on several machines together with

    python -m src.records.rows merge X.csv X.shard-*-of-8.csv
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from src.certification import (
    certified_radius,
    lower_confidence_bound,
    two_sided_bounds,
    two_sided_radius,
)
from src.files import lock_file, whole_file

COLUMNS = (
    *("index", "label", "prediction", "correct", "radius", "p_lower", "top_count"),
    *("n0", "n", "alpha", "sigma", "seed"),
)
# Further columns of runs whose settings say so: the certificate from bounds on both sides.
TWO_SIDED = ("rival_count", "radius_two_sided")
NUM_CLASSES = 10  # Of MNIST: how many rivals share the failure odds of the upper bounds.


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Write rows as CSV, whole or not at all; numbers at full precision.

    Args:
        path: file to write.
        rows: dictionaries with the same keys, at least one.
    """
    columns = list(rows[0])
    with whole_file(path) as temporary:
        text = _text([columns, *([row[c] for c in columns] for row in rows)])
        temporary.write_bytes(text.encode())


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries of strings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a table in CSV.
    """
    return _rows_of(read_exactly(Path(path)), path)


def _rows_of(text: str, path: str | os.PathLike) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: it is not a table in CSV ({error}).") from None


def record_certificates(
    path: str | os.PathLike,
    indices: Sequence[int],
    certify: Callable[[Sequence[int]], Iterable[Mapping]],
    settings: Mapping,
    facts: Mapping,
    *,
    labels: Sequence[int] | None = None,
    resume: bool = False,
) -> list[dict[str, str]]:
    """Certify images one by one; each row is on disk, and signed, as soon as it is finished.

    A run that is killed at any moment can be taken up with `resume`; its finished file is then
    byte for byte that of a run that was not. Without `resume`, rows that are already there are
    set aside under another name.

    Nothing on disk is signed anew: rows that are taken over must match the digest in the twin and
    the labels, and the one with the fewest votes is drawn again and must come out the same.

    Args:
        path: the CSV file; its twin has the ending .json.
        indices: numbers of the images in the order of the rows.
        certify: indices that are left -> rows with the keys `COLUMNS`, one at a time; those of
            `TWO_SIDED` as well if the settings have "two_sided": True.
        settings: what the rows depend on (digests of model and data, sigma, n0, n, alpha, seed,
            ...), JSON values; a run is only resumed with equal ones.
        facts: what else is worth knowing of the run, JSON values; those of a run that goes on with
            unfinished rows are added to the twin under "resumed".
        labels: classes of the images, as `indices`; with them those on disk are checked.
        resume: go on with the rows that are there.

    Returns:
        All rows, as `read_rows` gives them.

    Raises:
        ValueError: if there is another run behind the rows, they were altered or are damaged, or
            `certify` gives other images than it was asked for.
        OSError: if the file cannot be written or another process is writing it.
    """
    path = checked_path(path)
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**settings, "indices": indices_digest(indices)}))
    with lock_file(path):
        taken = _taken_over(path, settings, indices, labels, certify) if resume else []
        left = indices[len(taken) :]
        # Before anything on disk changes, so that bad arguments are refused in time.
        rows = certify(left) if left else ()
        if not taken:
            set_aside(path)
            write_twin(
                twin, {"settings": settings, "facts": dict(facts), "finished": False, "rows": 0}
            )
            path.write_bytes(_text([columns_of(settings)]).encode())
        elif left:
            content = read_twin(twin)
            content["resumed"] = [*content.get("resumed", []), dict(facts)]
            write_twin(twin, content)
        if left:
            _append(path, rows, left, columns_of(settings))
            drop_equal_copies(path)
    return read_rows(path)


def checked_path(path: str | os.PathLike) -> Path:
    """`path`, whose twin must not be the file itself; ValueError for another ending than .csv."""
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path} must end in .csv; its twin gets the ending .json.")
    return path


def _append(path: Path, rows: Iterable[Mapping], left: Sequence[int], columns) -> None:
    """Write `rows` of the images `left` after those on disk, and sign all after each of them."""
    twin = path.with_suffix(".json")
    content, before = read_twin(twin), read_exactly(path)
    signed, digest = content.get("rows", 0), hashlib.sha256(before.encode())
    done = before.count("\n") - 1
    with path.open("a", newline="") as stream:
        for row, index in itertools.zip_longest(rows, left):
            if row is None or row["index"] != index:
                given = "no more rows" if row is None else f"image {row['index']}"
                wanted = "no more images" if index is None else f"image {index}"
                raise ValueError(f"'certify' gave {given} where {wanted} was asked for.")
            line = _text([[row[column] for column in columns]])
            stream.write(line)
            stream.flush()
            digest.update(line.encode())
            done += 1
            # Rows that were signed before and then cut off have to come out as they were.
            if done == signed and digest.hexdigest() != content["rows_sha256"]:
                raise ValueError(f"{path} was altered: its rows do not match the digest in {twin}.")
            if done > signed:
                content |= {"rows": done, "rows_sha256": digest.hexdigest()}
                write_twin(twin, content, durable=False)
        os.fsync(stream.fileno())
    write_twin(twin, content | {"finished": True})


def columns_of(settings: Mapping) -> tuple[str, ...]:
    """The columns of rows made with these settings."""
    return COLUMNS + (TWO_SIDED if settings.get("two_sided") else ())


def _taken_over(path: Path, settings: Mapping, indices, labels, certify) -> list[dict[str, str]]:
    """The rows that an interrupted run has left; what it had not signed is cut off."""
    twin = path.with_suffix(".json")
    if not path.exists():
        return []
    if not twin.exists():
        raise ValueError(f"{path} cannot be resumed: its twin {twin} is missing.")
    content = read_twin(twin)
    _check_same_run(path, content["settings"], settings)
    # Without the last one, which is empty, or torn.
    lines = [line + "\n" for line in read_exactly(path).split("\n")[:-1]]
    # Runs of older releases signed their rows at the end only.
    signed = content.get("rows", len(indices)) if content["finished"] else content.get("rows")
    if not content["finished"] and signed is not None:
        lines = lines[: signed + 1]
    text = "".join(lines)
    rows = _rows_of(text, path)
    problems = check_rows(rows, text, columns_of(settings), settings) if text else []
    problems += _misplaced(rows, indices, labels)
    if len(rows) > len(indices):
        problems.append("it has more rows than there are images")
    if problems:
        raise ValueError(f"{path} is damaged and cannot be resumed: {problems[0]}.")
    if rows and len(rows) == signed and content["rows_sha256"] != text_digest(text):
        raise ValueError(f"{path} was altered: its rows do not match the digest in {twin}.")
    if rows and not (content["finished"] and len(rows) == signed):
        # The closest vote: another network or other noise changes it first.
        closest = min(rows, key=lambda row: int(row["top_count"]))
        (again,) = certify([int(closest["index"])])
        if not is_same_draw(closest, again):
            number = closest["index"]
            raise ValueError(
                f"{path} cannot be resumed: image {number} drawn again is another row."
            )
    if len(text.encode()) < path.stat().st_size:
        os.truncate(path, len(text.encode()))
    return rows


def _check_same_run(path: Path, made: Mapping, settings: Mapping) -> None:
    """Raise ValueError unless the rows were made with these settings; it says which differ."""
    # Older twins do not say the number of classes.
    made, settings = ({"num_classes": NUM_CLASSES} | dict(given) for given in (made, settings))
    different = sorted(k for k in made.keys() | settings.keys() if made.get(k) != settings.get(k))
    if different:
        was = ", ".join(f"{key} was {made.get(key)}, is {settings.get(key)}" for key in different)
        raise ValueError(f"{path} cannot be resumed, since this run differs: {was}.")


def _misplaced(rows: Sequence[Mapping], indices, labels) -> list[str]:
    """Which rows are not of the image that is due, or have another label than the data set."""
    problems = []
    for number, (row, index) in enumerate(zip(rows, indices, strict=False)):
        if row.get("index") != str(index):
            problems.append(
                f"line {number + 2}: index {row.get('index')} where {index} is expected"
            )
        elif labels is not None and row.get("label") != str(int(labels[number])):
            problems.append(f"line {number + 2}: the data set has another label")
    return problems


# What a draw decides; bounds and radii follow from these, which `check_rows` checks.
_DRAWN = ("top_count", "rival_count")


def is_same_draw(row: Mapping[str, str], again: Mapping, votes: int = 0) -> bool:
    """Whether a row drawn again has the same label and, up to `votes`, the same counts.

    The prediction and whether it is right may differ only where counts may.
    """
    same = [key for key in ("index", "label") if str(again.get(key)) != str(row.get(key))]
    if votes == 0:
        keys = ("prediction", "correct", *_DRAWN)
        return not same and all(str(again.get(key)) == str(row.get(key)) for key in keys)
    counts = [(int(again[key]), int(row[key])) for key in _DRAWN if key in row]
    return not same and all(abs(one - other) <= votes for one, other in counts)


def check_rows(
    rows: Sequence[Mapping[str, str]],
    text: str,
    columns: Sequence[str] = COLUMNS,
    settings: Mapping | None = None,
) -> list[str]:
    """What is wrong with result rows that need no model to be checked; empty if nothing is.

    Every bound and radius is computed again from its count, `text` must be what the rows would be
    written as, and columns that repeat the `settings` must agree with them.
    """
    settings = settings or {}
    classes, problems = settings.get("num_classes", NUM_CLASSES), []
    for number, row in enumerate(rows, start=2):
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError):
            if _is_consistent(row, classes):
                continue
        problems.append(f"line {number} contradicts itself")
    if _text([columns, *(row.values() for row in rows)]) != text:
        problems.append("it is not a table of the expected columns as they are written")
    for key in ("n0", "n", "alpha", "sigma", "seed"):
        values = {str(row.get(key)) for row in rows}
        if key in settings and values - {str(settings[key])}:
            problems.append(f"the rows have another {key} than the twin")
    return problems


def _is_consistent(row: Mapping[str, str], classes: int) -> bool:
    """Whether bound, radius, prediction and correctness follow from the counts of a row."""
    top_count, rival_count, n = (int(row.get(k, 0)) for k in ("top_count", "rival_count", "n"))
    p_lower = lower_confidence_bound(top_count, n, float(row["alpha"]))
    radius = certified_radius(p_lower, float(row["sigma"]))
    # Releases of scipy differ in the last digits; the digest in the twin guards those.
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
        What is wrong, a sentence each; empty if nothing is. Every changed character of either
        file is found, unless somebody has changed the digests to match.

    Raises:
        OSError: if a file is missing.
        ValueError: if a file is not what it should be, or the twin was changed.
    """
    path = checked_path(path)
    text = read_exactly(path)
    content = read_twin(path.with_suffix(".json"))
    rows, settings = _rows_of(text, path), content["settings"]
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


def _text(lines: Iterable[Iterable]) -> str:
    """Lines of CSV; repr of a float is the shortest text that reads back to the same float."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def indices_digest(indices: Iterable[int]) -> str:
    """SHA-256 of the numbers of the images in their order."""
    return text_digest(repr([int(index) for index in indices]))


def read_exactly(path: Path) -> str:
    """The text of a file without any translation of line ends; ValueError if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not text.") from None


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_twin(twin: Path, content: dict, *, durable: bool = True) -> None:
    """Write the twin with a digest over all of its other entries; `durable` as of `whole_file`."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    content["sha256"] = text_digest(json.dumps(content, sort_keys=True))
    with whole_file(twin, durable=durable) as temporary:
        temporary.write_bytes((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_twin(twin: Path) -> dict:
    """The content of a twin; ValueError if it was changed or lacks an entry."""
    text = read_exactly(twin)
    try:
        content = json.loads(text)
        digest = content.pop("sha256")
        settings, facts, finished = (content[key] for key in ("settings", "facts", "finished"))
        right = isinstance(settings, dict) and isinstance(facts, dict | list)
        right = right and isinstance(finished, bool)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{twin} is not the twin of a file of certificates.")
    unchanged = json.dumps(content | {"sha256": digest}, indent=1, sort_keys=True) + "\n" == text
    if digest != text_digest(json.dumps(content, sort_keys=True)) or not unchanged:
        raise ValueError(f"{twin} was changed: it does not match its own digest.")
    return content


def set_aside(path: Path) -> None:
    """Rename earlier rows, if any, and their twin to the first free X.previous-K, and say so."""
    if not path.exists() or path.read_bytes().count(b"\n") < 2:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.previous-{number}.csv")).exists():
        number += 1
    twin = path.with_suffix(".json")
    # The twin first: if the run dies here, the next one finds the rows and the same free number.
    if twin.exists():
        twin.replace(kept.with_suffix(".json"))
    path.replace(kept)
    print(f"Earlier rows are kept as {kept}")


def drop_equal_copies(path: Path) -> None:
    """Delete rows set aside that are the same as the new ones: the same command ran again."""
    for kept in path.parent.glob(f"{path.stem}.previous-*.csv"):
        if kept.read_bytes() == path.read_bytes():
            # The rows last, by which the next run finds what is left.
            kept.with_suffix(".json").unlink(missing_ok=True)
            kept.unlink()


def _whole(text: str) -> int:
    """Type of an option: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The commands `verify` and `merge`; exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m src.records.rows", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("verify", allow_abbrev=False, help="check a file of certificates")
    verb.add_argument("path", help="the file, .csv")
    verb.add_argument("--redraw", type=_whole, default=0, help="certify so many random rows again")
    verb.add_argument("--checkpoint", help="the model behind the rows, for --redraw")
    verb.add_argument("--data", default="data", help="folder of MNIST, for --redraw")
    verb = verbs.add_parser("merge", allow_abbrev=False, help="put shards together")
    verb.add_argument("path", help="the file to write, .csv")
    verb.add_argument("shards", nargs="+", help="the shards, .csv")
    args = parser.parse_args(argv)
    try:
        if args.verb == "merge":
            from src.records.merge import merge

            print(f"{args.path}: {merge(args.path, args.shards)} rows, each image once")
            return
        problems = verify(args.path)
        if args.redraw:
            # Not at the top: everything else here works without torch.
            from src.records.redraw import redraw

            problems = problems or redraw(args.path, args.redraw, args.checkpoint, args.data)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(f"error: {args.path}: {problem}" for problem in problems))
    print(f"{args.path}: {len(read_rows(args.path))} rows, nothing wrong")


if __name__ == "__main__":
    main()
