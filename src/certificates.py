"""Result rows on disk: append, resume, verify, and what is read off them (no model code).

A file of certificates, X.csv, grows by one line an image. Its twin, X.json, holds what made it
and, once it is finished, digests of the rows and of itself. Check both with

    python -m src.certificates verify X.csv [--redraw K --checkpoint MODEL.pt]

and put the shards of a run on several machines together with

    python -m src.certificates merge X.csv X.shard-*-of-8.csv
"""

import argparse
import contextlib
import csv
import hashlib
import io
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
    """
    with Path(path).open(newline="") as stream:
        return list(csv.DictReader(stream))


def record_certificates(
    path: str | os.PathLike,
    indices: Sequence[int],
    certify: Callable[[Sequence[int]], Iterable[Mapping]],
    settings: Mapping,
    facts: Mapping,
    *,
    resume: bool = False,
) -> list[dict[str, str]]:
    """Certify images one by one, each row on disk as soon as it is finished.

    A run that is killed at any moment can be taken up with `resume`; its finished file is then
    byte for byte that of a run that was not. Without `resume`, rows that are already there are
    set aside under another name.

    Args:
        path: the CSV file; its twin has the ending .json.
        indices: numbers of the images in the order of the rows.
        certify: indices that are left -> rows with the keys `COLUMNS`, one at a time; those of
            `TWO_SIDED` as well if the settings have "two_sided": True.
        settings: what the rows depend on (digests of model and data, sigma, n0, n, alpha, seed,
            ...), JSON values; a run is only resumed with equal ones.
        facts: what else is worth knowing of the run, JSON values; those of a run that goes on with
            unfinished rows are added to the twin under "resumed".
        resume: go on with the rows that are there.

    Returns:
        All rows, as `read_rows` gives them.

    Raises:
        ValueError: if there is another run behind the rows, or they are damaged.
        OSError: if the file cannot be written or another process is writing it.
    """
    path = Path(path)
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**settings, "indices": indices_digest(indices)}))
    columns = columns_of(settings)
    with lock_file(path):
        done = _finished_rows(path, twin, indices, settings) if resume else 0
        # Before anything on disk changes, so that bad arguments are refused in time.
        rows = certify(indices[done:]) if done < len(indices) else ()
        if not done:
            set_aside(path)
            write_twin(twin, {"settings": settings, "facts": dict(facts), "finished": False})
            path.write_bytes(_text([columns]).encode())
        elif done < len(indices):
            content = read_twin(twin)
            content["resumed"] = [*content.get("resumed", []), dict(facts)]
            write_twin(twin, content)
        with path.open("a", newline="") as stream:
            for row in rows:
                stream.write(_text([[row[column] for column in columns]]))
                stream.flush()
            os.fsync(stream.fileno())
        content = read_twin(twin) | {
            "finished": True,
            "rows_sha256": text_digest(read_exactly(path)),
        }
        write_twin(twin, content)
        drop_equal_copies(path)
    return read_rows(path)


def columns_of(settings: Mapping) -> tuple[str, ...]:
    """The columns of rows made with these settings."""
    return COLUMNS + (TWO_SIDED if settings.get("two_sided") else ())


def _finished_rows(path: Path, twin: Path, indices: Sequence[int], settings: Mapping) -> int:
    """How many rows an interrupted run has left; a torn last line is cut off."""
    if not path.exists():
        return 0
    if not twin.exists():
        raise ValueError(f"{path} cannot be resumed: its twin {twin} is missing.")
    made = read_twin(twin)["settings"]
    different = sorted(k for k in made.keys() | settings.keys() if made.get(k) != settings.get(k))
    if different:
        was = ", ".join(f"{key} was {made.get(key)}, is {settings.get(key)}" for key in different)
        raise ValueError(f"{path} cannot be resumed, since this run differs: {was}.")
    text = read_exactly(path)
    whole, torn = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    rows = list(csv.DictReader(io.StringIO(whole, newline="")))
    problems = check_rows(rows, whole, columns_of(settings))
    problems += [
        f"line {number + 2}: index {row['index']} where {index} is expected"
        for number, (row, index) in enumerate(zip(rows, indices, strict=False))
        if row["index"] != str(index)
    ]
    if not whole:
        return 0
    if problems or len(rows) > len(indices):
        raise ValueError(f"{path} is damaged and cannot be resumed: {(problems or ['rows'])[0]}.")
    if torn:
        os.truncate(path, len(whole.encode()))
    return len(rows)


def check_rows(
    rows: Sequence[Mapping[str, str]], text: str, columns: Sequence[str] = COLUMNS
) -> list[str]:
    """What is wrong with result rows that need no model to be checked; empty if nothing is.

    Every bound and radius is computed again from its count, and `text` must be what the rows
    would be written as.
    """
    problems = []
    for number, row in enumerate(rows, start=2):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if _is_consistent(row):
                continue
        problems.append(f"line {number} contradicts itself")
    if _text([columns, *(row.values() for row in rows)]) != text:
        problems.append("it is not a table of the expected columns as they are written")
    return problems


def _is_consistent(row: Mapping[str, str]) -> bool:
    """Whether bound, radius, prediction and correctness follow from the counts of a row."""
    p_lower = lower_confidence_bound(int(row["top_count"]), int(row["n"]), float(row["alpha"]))
    radius = certified_radius(p_lower, float(row["sigma"]))
    # Releases of scipy differ in the last digits; the digest in the twin guards those.
    expected = {"p_lower": p_lower, "radius": radius}
    if "rival_count" in row:
        counts = int(row["top_count"]), int(row["rival_count"])
        bounds = two_sided_bounds(*counts, int(row["n"]), float(row["alpha"]), NUM_CLASSES)
        tight = two_sided_radius(*bounds, float(row["sigma"])) if p_lower > 0.5 else 0.0
        expected["radius_two_sided"] = tight
    return (
        all(math.isclose(float(row[key]), x, rel_tol=1e-10) for key, x in expected.items())
        and all(repr(float(row[key])) == row[key] for key in expected)
        and int(row["correct"]) == (row["prediction"] == row["label"])
        and (int(row["prediction"]) == -1) == (p_lower <= 0.5)
    )


def verify(path: str | os.PathLike) -> list[str]:
    """Check a finished file of certificates against itself and its twin.

    Returns:
        What is wrong, a sentence each; empty if nothing is. Every changed character of either
        file is found, unless somebody has changed the digests to match.

    Raises:
        OSError: if a file is missing.
        ValueError: if the twin is not JSON or was changed.
    """
    path = Path(path)
    content = read_twin(path.with_suffix(".json"))
    text = read_exactly(path)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    problems = check_rows(rows, text, columns_of(content["settings"]))
    if not content["finished"]:
        problems.append("the run is not finished")
    elif content["rows_sha256"] != text_digest(text):
        problems.append("the rows do not match the digest in the twin")
    for key in ("n0", "n", "alpha", "sigma", "seed"):
        values = {row.get(key) for row in rows}
        if values - {str(content["settings"].get(key))}:
            problems.append(f"the rows have another {key} than the twin")
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
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not text.") from None


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_twin(twin: Path, content: dict) -> None:
    """Write the twin with a digest over all of its other entries."""
    content.pop("sha256", None)
    content["sha256"] = text_digest(json.dumps(content, sort_keys=True))
    with whole_file(twin) as temporary:
        temporary.write_bytes((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_twin(twin: Path) -> dict:
    """The content of a twin; ValueError if it was changed."""
    text = read_exactly(twin)
    try:
        content = json.loads(text)
        digest = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{twin} is not the twin of a file of certificates.") from None
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
    path.replace(kept)
    twin = path.with_suffix(".json")
    if twin.exists():
        twin.replace(kept.with_suffix(".json"))
    print(f"Earlier rows are kept as {kept}")


def drop_equal_copies(path: Path) -> None:
    """Delete rows set aside that are the same as the new ones: the same command ran again."""
    for kept in path.parent.glob(f"{path.stem}.previous-*.csv"):
        if kept.read_bytes() == path.read_bytes():
            kept.unlink()
            kept.with_suffix(".json").unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The commands `verify` and `merge`; exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m src.certificates", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("verify", allow_abbrev=False, help="check a file of certificates")
    verb.add_argument("path", help="the file, .csv")
    verb.add_argument("--redraw", type=int, default=0, help="certify so many random rows again")
    verb.add_argument("--checkpoint", help="the model behind the rows, for --redraw")
    verb.add_argument("--data", default="data", help="folder of MNIST, for --redraw")
    verb = verbs.add_parser("merge", allow_abbrev=False, help="put shards together")
    verb.add_argument("path", help="the file to write, .csv")
    verb.add_argument("shards", nargs="+", help="the shards, .csv")
    args = parser.parse_args(argv)
    try:
        if args.verb == "merge":
            from src.shards import merge

            print(f"{args.path}: {merge(args.path, args.shards)} rows, each image once")
            return
        problems = verify(args.path)
        if args.redraw:
            # Not at the top: everything else here works without torch.
            from src.redraw import redraw

            problems += redraw(args.path, args.redraw, args.checkpoint, args.data)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(f"error: {args.path}: {problem}" for problem in problems))
    print(f"{args.path}: {len(read_rows(args.path))} rows, nothing wrong")


if __name__ == "__main__":
    main()
