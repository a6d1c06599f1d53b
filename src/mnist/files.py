"""MNIST's raw files on disk: verified on every start, fetched when missing (no torch).

`python -m src.mnist.files [FOLDER]` does so: for `data` of the repository if no folder is given.
"""

import contextlib
import gzip
import hashlib
import math
import os
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from src.files import in_repository, take_lock, whole_file
from src.mnist.sources import FILES, SOURCES

_INCOMING = ".mnist-incoming-"


def ensure_mnist(root: str | os.PathLike | None = None) -> Path:
    """Folder of the four raw files, `<root>/MNIST/raw`, each verified by its SHA-256.

    `root` None is `data` of the repository, whatever the working directory is.
    Files in `root` under other common names are copied, missing ones are fetched. A damaged file is
    first renamed to `<name>.bad-<k>`. A complete folder may be read-only. Progress goes to stderr.

    Raises:
        FileNotFoundError: if no source has a file; the message says which file to put where.
        FileExistsError: if other data have MNIST's names; nothing is changed.
        OSError: if a file is missing and the folder cannot be written to.
    """
    root = _folder(root)
    _verified_files(root)
    return _raw_folder(root)


def read_mnist(split: str, root: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of "train" or "test", read-only uint8, verified.

    `root` as for `ensure_mnist`.

    Raises:
        ValueError: if `split` is another word.
        OSError: as `ensure_mnist`.
    """
    names = {"train": list(FILES)[:2], "test": list(FILES)[2:]}.get(split)
    if names is None:
        raise ValueError(f"'split' = {split!r} is unknown; use 'train' or 'test'.")
    files = _verified_files(_folder(root))
    images, labels = (
        np.frombuffer(files[name], np.uint8, offset=len(FILES[name].header)) for name in names
    )
    return images.reshape(FILES[names[0]].shape), labels


def _folder(root: str | os.PathLike | None) -> Path:
    return in_repository("data") if root is None else Path(root)


def _raw_folder(root: str | os.PathLike) -> Path:
    """The folder in which torchvision's MNIST looks for the raw files too."""
    return Path(root) / "MNIST" / "raw"


def _verified_files(root: Path) -> dict[str, bytes]:
    """Content of all raw files by name, from `root` or else from a source."""
    folder = _raw_folder(root)
    files = _read_matching(folder, FILES)
    if not _missing(files):
        return files
    files |= _read_other_names(root, _missing(files))
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(root / ".mnist-lock"))
        except OSError as error:
            if not _missing(files):
                return files
            raise OSError(
                f"MNIST lacks {', '.join(_missing(files))} and '{root}' cannot be written to "
                f"({error.strerror}); make it writable, or put the missing into '{folder}'."
            ) from error
        _remove_leftovers(root)
        # Another process may have fetched files while this one waited.
        present = _read_matching(folder, FILES)
        for name in _missing(present):
            _set_aside(folder / name)
        _write(folder, {name: files[name] for name in files if name not in present})
        return _fetch(folder, files | present)


def _missing(files: Iterable[str]) -> list[str]:
    return [name for name in FILES if name not in files]


def _say(sentence: str) -> None:
    # A closed stderr is None, which print would take for stdout.
    if sys.stderr is not None:
        print(f"MNIST: {sentence}", file=sys.stderr, flush=True)


def _read_matching(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content by name of those files in `folder` whose SHA-256 is the published one."""
    contents = {name: _read(folder / name, FILES[name].size) for name in names}
    return {name: content for name, content in contents.items() if _matches(name, content)}


def _matches(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == FILES[name].sha256


def _read(path: Path, size: int) -> bytes:
    """At most `size` + 1 bytes of a file, unpacked if it ends in .gz; empty if that fails."""
    # Opening a pipe would wait for ever.
    if not path.is_file():
        return b""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            # One byte too many reveals a longer file without reading it all.
            return file.read(size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return b""


def _read_other_names(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content by name of those files that `root` has in other folders or by other common names.

    Raises:
        FileExistsError: if other data stand in the way: where the file has to be, or in any of
            these places if MNIST's file is in none.
    """
    found = {}
    folders = (_raw_folder(root), root / "raw", root / "MNIST", root)
    for name in names:
        stems = (name, name.replace("-idx", ".idx"))
        paths = [f / f"{stem}{end}" for f in folders for stem in stems for end in ("", ".gz")]
        contents = {path: _read(path, FILES[name].size) for path in paths}
        for content in contents.values():
            if _matches(name, content):
                found[name] = content
        others = [path for path in paths if _is_idx(contents[path], FILES[name].size)]
        if others and (name not in found or others[0] == paths[0]):
            raise FileExistsError(
                f"'{others[0]}' is not MNIST's file but holds other data, which stay as they are; "
                "move it, or use another folder for MNIST."
            )
    return found


def _is_idx(content: bytes, size: int) -> bool:
    """Whether a file in IDX form, read up to `size` + 1 bytes, is as long as its header says."""
    item_bytes = {8: 1, 9: 1, 11: 2, 12: 4, 13: 4, 14: 8}.get(content[2] if len(content) > 3 else 0)
    if not item_bytes or content[:2] != b"\0\0" or len(content) < 4 + 4 * content[3]:
        return False
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    length = 4 + 4 * len(shape) + item_bytes * math.prod(shape)
    return len(content) == min(length, size + 1) and len(shape) > 0


def _set_aside(path: Path) -> None:
    """Rename a damaged file, if there is one, to the first free `<name>.bad-<k>`."""
    if os.path.lexists(path):
        number = 1
        while os.path.lexists(f"{path}.bad-{number}"):
            number += 1
        path.rename(f"{path}.bad-{number}")
        _say(f"{path.name} does not match its SHA-256; it is kept as {path.name}.bad-{number}.")


def _remove_leftovers(root: Path) -> None:
    """Remove what processes left that were killed while they held the lock."""
    for path in root.glob(f"{_INCOMING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in FILES:
        for path in _raw_folder(root).glob(f".{name}-*"):
            path.unlink(missing_ok=True)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)


def _fetch(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """`files` and `folder`, completed from the first sources that have the missing files."""
    if _missing(files):
        _say(f"fetching {', '.join(_missing(files))} into '{folder}'.")
    for description, source in SOURCES:
        if not _missing(files):
            break
        _say(f"trying {description}.")
        # In `root`, whose lock is held: what a killed process leaves, the next one removes.
        with tempfile.TemporaryDirectory(
            prefix=_INCOMING, dir=folder.parent.parent, ignore_cleanup_errors=True
        ) as temporary:
            incoming = _raw_folder(temporary)
            incoming.mkdir(parents=True)
            try:
                source(incoming, folder)
            except Exception as error:
                # After any failure, what the source did bring is used and the next one is tried.
                _say(f"that failed: {error} ({type(error).__name__}).")
            found = _read_matching(incoming, _missing(files))
            rejected = [n for n in _missing(files | found) if (incoming / n).exists()]
        if rejected:
            _say(f"{', '.join(rejected)} from there does not match its SHA-256.")
        _write(folder, found)
        files = files | found
    if _missing(files):
        raise FileNotFoundError(
            f"No source has MNIST's {', '.join(_missing(files))}; put the originals by these names "
            f"(or with .gz added) into '{folder}'."
        )
    return files


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for the process that has it."""
    with path.open("a") as handle:
        if not take_lock(handle.fileno()):
            _say("waiting for another process that is fetching it.")
            while not take_lock(handle.fileno()):
                time.sleep(0.1)
        # Closing the file releases the lock, also when the process ends.
        yield


if __name__ == "__main__":
    try:
        print(f"MNIST is complete and verified in {ensure_mnist(*sys.argv[1:2])}")
    except OSError as failure:
        sys.exit(f"error: {failure}")
