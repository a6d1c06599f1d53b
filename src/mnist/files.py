"""MNIST's raw files on disk: verified on every start, fetched when missing (no torch)."""

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from src.files import take_lock, whole_file
from src.mnist.sources import FILES, SOURCES

_INCOMING = ".mnist-incoming-"
PREFIXES = {"train": "train", "test": "t10k"}


def ensure_mnist(root: str | os.PathLike = "data") -> Path:
    """Folder of the four raw files, `<root>/MNIST/raw`, each verified against its SHA-256.

    What lies in `root` under another common name is copied, what is missing is fetched, and what
    is damaged is kept under another name first. A complete folder may be read-only, whatever the
    names in it are. Progress goes to stderr.

    Raises:
        FileNotFoundError: if no source has a file; the message says which file to put where.
        FileExistsError: if other data are there under MNIST's names; nothing is changed.
        OSError: if a file is missing and the folder cannot be written to.
    """
    _verified_files(Path(root))
    return _raw_folder(root)


def read_mnist(split: str, root: str | os.PathLike = "data") -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of "train" or "test", read-only uint8, verified.

    Raises:
        ValueError: if `split` is another word.
        OSError: as `ensure_mnist`.
    """
    if split not in PREFIXES:
        raise ValueError(f"'split' = {split!r} is unknown; use 'train' or 'test'.")
    files = _verified_files(Path(root))
    images, labels = (
        np.frombuffer(files[name], np.uint8, offset=len(raw.header)).reshape(raw.shape)
        for name, raw in FILES.items()
        if name.startswith(PREFIXES[split])
    )
    return images, labels


def _verified_files(root: Path) -> dict[str, bytes]:
    """Content of all raw files by name, from the folder or else from a source."""
    folder = _raw_folder(root)
    files = _read_matching(folder, FILES)
    if len(files) == len(FILES):
        return files
    files |= _read_elsewhere(root, _missing(files))
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(root / ".mnist-lock"))
        except OSError as error:
            if len(files) == len(FILES):
                return files
            raise OSError(
                f"MNIST lacks {_listed(_missing(files))} and '{root}' cannot be written to "
                f"({error.strerror}); make it writable, or put the missing into '{folder}'."
            ) from error
        _sweep(root)
        # Another process may have fetched files while this one waited.
        there = _read_matching(folder, FILES)
        _set_aside(folder, _missing(there))
        for name in _missing(there):
            if name in files:
                _write(folder / name, files[name])
        return _fetch(folder, files | there)


def _raw_folder(root: str | os.PathLike) -> Path:
    """Where torchvision's MNIST looks for the raw files, so that it reads them too."""
    return Path(root) / "MNIST" / "raw"


def _missing(files: Iterable[str]) -> list[str]:
    return [name for name in FILES if name not in files]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _say(sentence: str) -> None:
    # Where stderr is closed it is None, which print takes for stdout.
    if sys.stderr is not None:
        print(f"MNIST: {sentence}", file=sys.stderr, flush=True)


def _read_matching(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content by name of those files in `folder` whose SHA-256 is the published one."""
    contents = {name: _read(folder / name, FILES[name].size) for name in names}
    return {name: content for name, content in contents.items() if _matches(name, content)}


def _matches(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == FILES[name].sha256


def _read(path: Path, size: int) -> bytes:
    """Content of a file, unpacked if it ends in .gz; empty if it is none or a broken archive."""
    # A pipe in the place of a file would wait for ever.
    if not path.is_file():
        return b""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            # One byte more than it should have betrays a longer file without reading it all.
            return file.read(size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return b""


def _read_elsewhere(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content by name of the files under other common names, or in other folders of `root`.

    Raises:
        FileExistsError: if whole files of other data are all that there is.
    """
    found, other = {}, None
    for name in FILES:
        stems = (name, name.replace("-idx", ".idx"))
        folders = (_raw_folder(root), root / "raw", root / "MNIST", root)
        for path in (f / f"{stem}{end}" for f in folders for stem in stems for end in ("", ".gz")):
            content = _read(path, FILES[name].size)
            if _matches(name, content):
                found[name] = content
                break
            other = other or (path if _is_whole(content, FILES[name].size) else None)
    # Beside a file of MNIST's, one that does not match is a damaged one.
    if other and not found:
        raise FileExistsError(
            f"'{other}' is no file of MNIST's but holds other data, which stay as they are; "
            "name another folder for MNIST."
        )
    return {name: found[name] for name in names if name in found}


def _is_whole(content: bytes, size: int) -> bool:
    """Whether a file in IDX form, read up to `size` + 1 bytes, is as long as its header says."""
    width = {8: 1, 9: 1, 11: 2, 12: 4, 13: 4, 14: 8}.get(content[2] if len(content) > 3 else 0)
    if not width or content[:2] != b"\0\0" or len(content) < 4 + 4 * content[3]:
        return False
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    length = 4 + 4 * len(shape) + width * math.prod(shape)
    return len(content) == min(length, size + 1) and len(shape) > 0


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename those files that are there, but do not match, to `<name>.bad-<k>`, k yet unused."""
    for name in names:
        if os.path.lexists(folder / name):
            number = 1
            while os.path.lexists(folder / f"{name}.bad-{number}"):
                number += 1
            (folder / name).rename(folder / f"{name}.bad-{number}")
            _say(f"{name} does not match its SHA-256; it is kept as {name}.bad-{number}.")


def _sweep(root: Path) -> None:
    """Remove what processes left that were killed while they held the lock."""
    for path in root.glob(f"{_INCOMING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in FILES:
        for path in _raw_folder(root).glob(f".{name}-*"):
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _fetch(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """`files` completed from the first sources that have the missing ones, and `folder` too."""
    if _missing(files):
        _say(f"fetching {_listed(_missing(files))} into '{folder}'.")
    for description, source in SOURCES:
        if not _missing(files):
            break
        _say(f"trying {description}.")
        for name, content in _try_source(source, folder, _missing(files)).items():
            _write(folder / name, content)
            files = files | {name: content}
    if _missing(files):
        raise FileNotFoundError(
            f"No source has MNIST's {_listed(_missing(files))}; put the originals by these names "
            f"(or with .gz added) into '{folder}'."
        )
    return files


def _try_source(
    source: Callable[[Path, Path], None], folder: Path, names: list[str]
) -> dict[str, bytes]:
    """Content by name of those files that `source` brings and that match; fails with none."""
    # Under the lock of `root`, so that the next process can tell what a killed one left.
    root = folder.parent.parent
    with tempfile.TemporaryDirectory(
        prefix=_INCOMING, dir=root, ignore_cleanup_errors=True
    ) as temporary:
        incoming = _raw_folder(temporary)
        incoming.mkdir(parents=True)
        try:
            source(incoming, folder)
        except Exception as error:
            # Whatever is wrong with a source, what it brought is used and the next one is tried.
            _say(f"that failed: {error} ({type(error).__name__}).")
        found = _read_matching(incoming, names)
        rejected = [name for name in names if name not in found and (incoming / name).exists()]
        if rejected:
            _say(f"{_listed(rejected)} from there does not match its SHA-256.")
    return found


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits for the process that has it, and dies with this one."""
    with path.open("a") as handle:
        if not take_lock(handle.fileno()):
            _say("waiting for another process that is fetching it.")
            while not take_lock(handle.fileno()):
                time.sleep(0.1)
        # Closing the file gives the lock back, as the end of the process does.
        yield


if __name__ == "__main__":
    try:
        print(f"MNIST is complete and verified in {ensure_mnist('data')}")
    except OSError as failure:
        sys.exit(f"error: {failure}")
