"""Certificates made in parts, on several machines, put together."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.files import drop_equal_copies, lock_file, set_aside
from src.records.rows import checked_path, read_rows, verify, write_rows
from src.records.twins import indices_digest, read_exactly, read_twin, text_digest, write_twin


def merge(path: str | os.PathLike, shards: Sequence[str | os.PathLike]) -> int:
    """Put finished shards of one run together, as one process would have written them.

    Args:
        path: the file to write, with its twin.
        shards: files of certificates of different images, all else the same.

    Returns:
        The number of rows.

    Raises:
        OSError: if a file is missing.
        ValueError: if a shard is damaged, of another run or missing, an index appears twice, or
            `path` is not a new file that ends in .csv.
    """
    path = checked_path(path)
    if path.resolve() in [Path(shard).resolve() for shard in shards]:
        raise ValueError(f"{path} is one of the shards; choose another file to write.")
    twins, rows = [], []
    for shard in map(Path, shards):
        if problems := verify(shard):
            raise ValueError(f"{shard} cannot be merged: {problems[0]}.")
        twins.append(read_twin(shard.with_suffix(".json")))
        if _shared(twins[-1]) != _shared(twins[0]):
            raise ValueError(f"{shard} cannot be merged: it is of another run than {shards[0]}.")
        rows += read_rows(shard)
    _check_complete([twin["settings"].get("shard") for twin in twins])
    rows.sort(key=lambda row: int(row["index"]))
    indices = [int(row["index"]) for row in rows]
    twice = sorted({a for a, b in itertools.pairwise(indices) if a == b})
    if twice:
        raise ValueError(f"The shards cannot be merged: image {twice[0]} is in two of them.")
    with lock_file(path):
        set_aside(path)
        write_rows(path, rows)
        content = {"settings": _shared(twins[0]) | {"indices": indices_digest(indices)}}
        facts = [fact for twin in twins for fact in (twin["facts"], *twin.get("resumed", []))]
        content |= {"facts": facts, "finished": True}
        write_twin(
            path.with_suffix(".json"), content | {"rows_sha256": text_digest(read_exactly(path))}
        )
        drop_equal_copies(path)
    return len(rows)


def _shared(twin: Mapping) -> dict:
    """The settings that the shards of one run have in common."""
    return {k: v for k, v in twin["settings"].items() if k not in ("indices", "shard")}


def _check_complete(given: Sequence[str | None]) -> None:
    """Raise ValueError unless these are the shards 1/n to n/n."""
    parts = (given[0] or "/").partition("/")[2]
    if not parts:
        raise ValueError("The shards cannot be merged: they do not say which part they are.")
    missing = sorted({f"{k + 1}/{parts}" for k in range(int(parts))} - set(given))
    if missing:
        raise ValueError(f"The shards cannot be merged: {', '.join(missing)} is missing.")
