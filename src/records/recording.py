"""Certificates recorded row by row: each is signed at once, and an interrupted run can go on."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from src.files import drop_equal_copies, lock_file, set_aside
from src.records.rows import (
    COLUMNS,
    NUM_CLASSES,
    check_rows,
    checked_path,
    csv_text,
    older_columns,
    read_rows,
    rows_of,
)
from src.records.twins import (
    different_settings,
    indices_digest,
    read_exactly,
    read_twin,
    text_digest,
    write_twin,
)


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
    """Certify images one by one; each row is written and signed as soon as it is finished.

    A run that was killed can go on with `resume`. Its finished file is then the same, byte for
    byte, as that of an uninterrupted run. Without `resume`, earlier rows are renamed and kept.

    Rows on disk are never signed anew. With `resume` they must match the digest in the twin and
    the labels. The row with the fewest votes is drawn again and must come out the same.

    Args:
        path: the CSV file; its twin is the same name with the ending .json.
        indices: numbers of the images, in the order of the rows.
        certify: indices -> an iterator of rows with the keys `COLUMNS`.
        settings: what the rows depend on (digests of model and data, sigma, n0, n, alpha, seed,
            ...), JSON values. A run is resumed only with equal settings. Rows of a SmoothClassifier
            need its `sampler_cost`, and `off_grid` for images off its grid.
        facts: what else is worth knowing of the run, JSON values. A resumed run adds its facts to
            the twin under "resumed".
        labels: classes of the images, in the order of `indices`, to check resumed rows.
        resume: keep the rows of an interrupted run and certify the rest.

    Returns:
        All rows, as `read_rows` gives them.

    Raises:
        ValueError: if the rows are of another run, altered or damaged, or if `certify` gives other
            images than it was asked for.
        OSError: if the file cannot be written or another process is writing it.
    """
    path = checked_path(path)
    twin = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**settings, "indices": indices_digest(indices)}))
    with lock_file(path):
        kept = _resumable_rows(path, settings, indices, labels, certify) if resume else []
        left = indices[len(kept) :]
        facts = json.loads(json.dumps(dict(facts)))
        # Before anything on disk changes: it refuses bad arguments.
        rows = certify(left) if left else ()
        if not kept:
            set_aside(path)
            content = {"settings": settings, "facts": facts, "finished": False, "rows": 0}
            write_twin(twin, content)
            path.write_bytes(csv_text([COLUMNS]).encode())
        elif left:
            content = read_twin(twin)
            write_twin(twin, content | {"resumed": [*content.get("resumed", []), facts]})
        # A kill may have come between the last row and the end.
        if left or not read_twin(twin)["finished"]:
            _append(path, rows, left)
            drop_equal_copies(path)
    return read_rows(path)


def _append(path: Path, rows: Iterable[Mapping], left: Sequence[int]) -> None:
    """Append the rows of the images `left`, and sign the whole file after each row."""
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
            line = csv_text([[row[column] for column in COLUMNS]])
            stream.write(line)
            stream.flush()
            digest.update(line.encode())
            done += 1
            # Rows that were signed and then lost must come out the same again.
            if done == signed and digest.hexdigest() != content["rows_sha256"]:
                raise ValueError(f"{path} was altered: its rows do not match the digest in {twin}.")
            if done > signed:
                content |= {"rows": done, "rows_sha256": digest.hexdigest()}
                write_twin(twin, content, durable=False)
        os.fsync(stream.fileno())
    # Older releases signed their rows only here.
    signature = {"rows": done, "rows_sha256": digest.hexdigest()}
    write_twin(twin, content | signature | {"finished": True})


def _resumable_rows(
    path: Path, settings: Mapping, indices, labels, certify
) -> list[dict[str, str]]:
    """The rows of an interrupted run, checked. Rows that were not signed yet are cut off."""
    twin = path.with_suffix(".json")
    if not path.exists():
        return []
    if not twin.exists():
        raise ValueError(f"{path} cannot be resumed: its twin {twin} is missing.")
    content = read_twin(twin)
    _check_same_run(path, content["settings"], settings)
    # The part after the last line end is empty or torn.
    lines = [line + "\n" for line in read_exactly(path).split("\n")[:-1]]
    # Older releases signed their rows at the end only.
    signed = content.get("rows", len(indices)) if content["finished"] else content.get("rows")
    if not content["finished"] and signed is not None:
        lines = lines[: signed + 1]
    text = "".join(lines)
    if older_columns(text):
        raise ValueError(
            f"{path} is of an older release and cannot be resumed; leave out --resume."
        )
    rows = rows_of(text, path)
    problems = check_rows(rows, text, settings=settings) if text else []
    problems += _misplaced(rows, indices, labels)
    if len(rows) > len(indices):
        problems.append("it has more rows than there are images")
    if problems:
        raise ValueError(f"{path} is damaged and cannot be resumed: {problems[0]}.")
    if rows and len(rows) == signed and content["rows_sha256"] != text_digest(text):
        raise ValueError(f"{path} was altered: its rows do not match the digest in {twin}.")
    if rows and not (content["finished"] and len(rows) == signed):
        # Another network or other noise changes the closest vote first.
        closest = min(rows, key=lambda row: int(row["top_count"]))
        (again,) = certify([int(closest["index"])])
        if not is_same_draw(closest, again):
            image = f"image {closest['index']} drawn again is another row"
            raise ValueError(f"{path} cannot be resumed: {image}.")
    if len(text.encode()) < path.stat().st_size:
        os.truncate(path, len(text.encode()))
    return rows


def _check_same_run(path: Path, made: Mapping, settings: Mapping) -> None:
    """Raise ValueError unless the rows were made with these settings; it says which differ."""
    # Older twins do not say the number of classes.
    made, settings = ({"num_classes": NUM_CLASSES} | dict(given) for given in (made, settings))
    if different := different_settings(made, settings):
        was = (_difference(key, made.get(key), settings.get(key)) for key in different)
        raise ValueError(
            f"{path} cannot be resumed, since this run differs: {', '.join(was)}; "
            "choose another folder, or leave out --resume."
        )


def _difference(name: str, was, now) -> str:
    """What differs in a setting, in a few words."""
    if name == "outputs" and was and now:
        return "the model's outputs on fixed images differ"
    # Of a digest the beginning says enough.
    length = 12 if name.endswith(("digest", "indices")) else 60
    return f"{name} was {str(was)[:length]}, is {str(now)[:length]}"


def _misplaced(rows: Sequence[Mapping], indices, labels) -> list[str]:
    """Problems of rows that are of another image than expected, or have a wrong label."""
    problems = []
    for number, (row, index) in enumerate(zip(rows, indices, strict=False)):
        line, found = f"line {number + 2}", row.get("index")
        if found != str(index):
            problems.append(f"{line}: index {found} where {index} is expected")
        elif labels is not None and row.get("label") != str(int(labels[number])):
            problems.append(f"{line}: the data set has another label")
    return problems


# Which of the columns follow from the others, as `check_rows` checks.
_COMPUTED = ("radius", "p_lower", "radius_tight")


def is_same_draw(row: Mapping[str, str], again: Mapping, votes: int = 0) -> bool:
    """Whether a row drawn again has the same label, and counts that differ by at most `votes`.

    If `votes` is 0, all else must be equal too, but for the last digits of bounds and radii, in
    which releases of scipy differ.
    """
    if votes == 0:
        drawn = [key for key in COLUMNS if key not in _COMPUTED]
        return all(str(again.get(key)) == str(row.get(key)) for key in drawn) and all(
            math.isclose(float(again[key]), float(row[key]), rel_tol=1e-10) for key in _COMPUTED
        )
    same = all(str(again.get(key)) == str(row.get(key)) for key in ("index", "label"))
    counts = [(int(again[key]), int(row[key])) for key in ("top_count", "rival_count")]
    return same and all(abs(one - other) <= votes for one, other in counts)
