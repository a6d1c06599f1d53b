"""MNIST's raw files on disk: verified on every start, fetched when missing (no torch)."""

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from src.files import take_lock, whole_file
from src.mnist_sources import FILES, SOURCES

PREFIXES = {"train": "train", "test": "t10k"}


def ensure_mnist(root: str | os.PathLike = "data") -> Path:
    """Folder of the four raw files, `<root>/MNIST/raw`, each verified against its SHA-256.

    What is missing is fetched; what does not match is kept under another name and fetched
    again. Nothing is written unless a file is fetched, so a complete folder may be read-only.
    Progress goes to stderr.

    Raises:
        FileNotFoundError: if no source has a file; the message says which file to put where.
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
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(root / ".mnist-lock"))
        except OSError as error:
            raise OSError(
                f"MNIST lacks {_listed(_missing(files))} and '{root}' cannot be written to "
                f"({error.strerror}); make it writable, or put the missing into '{folder}'."
            ) from error
        # Another process may have fetched files while this one waited.
        files = _read_matching(folder, FILES)
        _set_aside(folder, _missing(files))
        return _fetch(folder, files)


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
    matching = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            # One byte more than it should have betrays a longer file without reading it all.
            with (folder / name).open("rb") as file:
                content = file.read(FILES[name].size + 1)
            if hashlib.sha256(content).hexdigest() == FILES[name].sha256:
                matching[name] = content
    return matching


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename those files that are there, but do not match, to `<name>.bad-<k>`, k yet unused."""
    for name in names:
        if os.path.lexists(folder / name):
            number = 1
            while os.path.lexists(folder / f"{name}.bad-{number}"):
                number += 1
            (folder / name).rename(folder / f"{name}.bad-{number}")
            _say(f"{name} does not match its SHA-256; it is kept as {name}.bad-{number}.")


def _fetch(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """`files` completed from the first sources that have the missing ones, and `folder` too."""
    if _missing(files):
        _say(f"fetching {_listed(_missing(files))} into '{folder}'.")
    for description, source in SOURCES:
        if not _missing(files):
            break
        _say(f"trying {description}.")
        for name, content in _try_source(source, folder, _missing(files)).items():
            with whole_file(folder / name) as temporary:
                temporary.write_bytes(content)
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
    with tempfile.TemporaryDirectory(prefix="mnist-", ignore_cleanup_errors=True) as temporary:
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
    print(f"MNIST is complete and verified in {ensure_mnist('data')}")
