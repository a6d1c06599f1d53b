"""The twin of a file of rows: what made the rows, signed with digests (JSON)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from src.files import whole_file


def indices_digest(indices: Iterable[int]) -> str:
    """SHA-256 of the image numbers, in their order."""
    return text_digest(repr([int(index) for index in indices]))


def read_exactly(path: Path) -> str:
    """The text of a file with its line ends as they are; ValueError if it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not text.") from None


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def different_settings(made: Mapping, settings: Mapping) -> list[str]:
    """The names of the settings that differ, in order; outputs of a model only beyond rounding."""
    names = sorted(made.keys() | settings.keys())
    return [name for name in names if not _equal(made.get(name), settings.get(name))]


def _equal(one, other) -> bool:
    """Whether two settings are equal, the logits among them up to rounding."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping) and "logits" in one):
        return one == other
    logits = [[line.split() for line in of.get("logits", ())] for of in (one, other)]
    if [len(line) for line in logits[0]] != [len(line) for line in logits[1]]:
        return False
    pairs = [pair for lines in zip(*logits, strict=True) for pair in zip(*lines, strict=True)]

    def close(a: float, b: float) -> bool:
        return abs(a - b) <= one["absolute"] + one["relative"] * abs(a)

    # As text, NaN equals NaN.
    return all(a == b or close(float(a), float(b)) for a, b in pairs)


def write_twin(twin: Path, content: dict, *, durable: bool = True) -> None:
    """Write the twin with a digest of its other entries; `durable` as for `whole_file`."""
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
        valid = isinstance(settings, dict) and isinstance(facts, dict | list)
        valid = valid and isinstance(finished, bool)
        optional = {"rows": int, "rows_sha256": str, "resumed": list}
        optional |= {"num_classes": int, "shard": str, "indices": str}
        valid = valid and all(
            isinstance({**settings, **content}.get(key, kind()), kind)
            for key, kind in optional.items()
        )
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"{twin} is not the twin of a file of certificates.")
    unchanged = json.dumps(content | {"sha256": digest}, indent=1, sort_keys=True) + "\n" == text
    if digest != text_digest(json.dumps(content, sort_keys=True)) or not unchanged:
        raise ValueError(f"{twin} was changed: it does not match its own digest.")
    return content
