"""Certificates made in parts, on several machines, merged into one file."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.files import drop_equal_copies, lock_file, set_aside
from src.records.rows import checked_path, read_rows, verify, write_rows
from src.records.twins import (
    different_settings,
    indices_digest,
    read_exactly,
    read_twin,
    text_digest,
    write_twin,
)


def merge(path: str | os.PathLike, shards: Sequence[str | os.PathLike]) -> int:
    """Merge the finished shards of one run into the file that one process would have written.

    Args:
        path: the file to write, with its twin.
        shards: files of certificates of different images, made with the same settings.

    Returns:
        The number of rows.

    Raises:
        OSError: if a file is missing.
        ValueError: if a shard is damaged, missing or of another run, if an image is in two shards,
            or if `path` does not end in .csv or is one of the shards.
    """
    path = checked_path(path)
    if path.resolve() in [Path(shard).resolve() for shard in shards]:
        raise ValueError(f"{path} is one of the shards; choose another file to write.")
    twins, rows = [], []
    for shard in map(Path, shards):
        if problems := verify(shard):
            raise ValueError(f"{shard} cannot be merged: {problems[0]}.")
        twins.append(read_twin(shard.with_suffix(".json")))
        if different_settings(_shared_settings(twins[-1]), _shared_settings(twins[0])):
            raise ValueError(f"{shard} cannot be merged: it is of another run than {shards[0]}.")
        rows += read_rows(shard)
    _check_complete([twin["settings"].get("shard") for twin in twins])
    rows.sort(key=lambda row: int(row["index"]))
    indices = [int(row["index"]) for row in rows]
    if twice := [a for a, b in itertools.pairwise(indices) if a == b]:
        raise ValueError(f"The shards cannot be merged: image {twice[0]} is in two of them.")
    settings = _shared_settings(twins[0]) | {"indices": indices_digest(indices)}
    if settings.pop("all_indices", settings["indices"]) != settings["indices"]:
        raise ValueError("The shards cannot be merged: they are not of the images of one run.")
    facts = [fact for twin in twins for fact in (twin["facts"], *twin.get("resumed", []))]
    content = {"settings": settings, "facts": facts, "finished": True}
    with lock_file(path):
        set_aside(path)
        write_rows(path, rows)
        content["rows_sha256"] = text_digest(read_exactly(path))
        write_twin(path.with_suffix(".json"), content)
        drop_equal_copies(path)
    return len(rows)


def _shared_settings(twin: Mapping) -> dict:
    """The settings that all shards of one run have in common."""
    return {k: v for k, v in twin["settings"].items() if k not in ("indices", "shard")}


def _check_complete(given: Sequence[str | None]) -> None:
    """Raise ValueError unless `given` are the shards 1/n to n/n."""
    parts = (given[0] or "/").partition("/")[2]
    if not (parts.isdecimal() and int(parts)):
        raise ValueError("The shards cannot be merged: they do not say which part they are.")
    missing = sorted({f"{k + 1}/{parts}" for k in range(int(parts))} - set(given))
    if missing:
        raise ValueError(f"The shards cannot be merged: {', '.join(missing)} is missing.")
