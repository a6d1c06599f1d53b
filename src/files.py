"""Files that are written whole or not at all, locks, and earlier rows set aside (no torch)."""

import contextlib
import errno
import glob
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

# The repository, where data and results belong wherever a command is typed.
ROOT = Path(__file__).resolve().parent.parent
# A temporary file older than this process belongs to another process.
_STARTED = time.time()


def in_repository(name: str) -> Path:
    """The path of a folder of the repository: short if the working directory is above it."""
    path = ROOT / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` if the block succeeds.

    A reader sees the old file or the new one, never a part. The temporary file keeps the ending
    of `path`, by which matplotlib and numpy choose a format. It is locked while it is written; the
    next writer of `path` removes those that killed processes left.

    Args:
        path: file to write.
        durable: wait until the bytes are on disk before the rename, in case the power fails.

    Raises:
        OSError: if the folder cannot be made or written to, or is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    temporary = Path(name)
    try:
        if os.name != "nt":  # On Windows a lock would keep the writer out too.
            take_lock(handle)
        yield temporary
        if durable:
            os.fsync(handle)
        # mkstemp makes the file private; give it the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "No space left to write it", str(path)) from None
        raise
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of `path` that are older than this process and not locked."""
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}-????????{path.suffix}"):
        with contextlib.suppress(OSError), leftover.open("rb") as handle:
            if leftover.stat().st_mtime < _STARTED and take_lock(handle.fileno()):
                leftover.unlink()


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def check_writable(folder: str | os.PathLike) -> None:
    """Raise OSError unless files can be made in `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"{folder} is not a folder that can be written to; choose another.")


def check_target(path: str | os.PathLike) -> None:
    """Raise OSError unless `path` can be written by `whole_file`; makes its folder."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        ) as probe:
            # A full disk may still make files, but not fill them.
            probe.write(bytes(4096))
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); choose another.") from None


def set_aside(path: Path) -> None:
    """Rename earlier rows, if any, and their twin to X.previous-K with the first free number K."""
    if not path.exists() or path.read_bytes().count(b"\n") < 2:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.previous-{number}.csv")).exists():
        number += 1
    twin = path.with_suffix(".json")
    # The twin first: if the run dies here, the next one chooses the same number for the rows.
    if twin.exists():
        twin.replace(kept.with_suffix(".json"))
    path.replace(kept)
    print(f"Earlier rows are kept as {kept}")


def drop_equal_copies(path: Path) -> None:
    """Delete rows set aside that are the same as the new ones: the same command ran again.

    Those of another model stay, although its rows may be equal: the JSON beside them tells.
    """
    for kept in path.parent.glob(f"{glob.escape(path.stem)}.previous-*.csv"):
        if kept.read_bytes() == path.read_bytes() and _made_by(kept) == _made_by(path):
            # The rows last: if the run dies here, the next one finds them.
            kept.with_suffix(".json").unlink(missing_ok=True)
            kept.unlink()


def _made_by(path: Path) -> tuple:
    """Settings and options in the JSON beside rows, if there is one."""
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        return content.get("settings"), content.get("options")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ()


@contextlib.contextmanager
def lock_file(path: str | os.PathLike) -> Iterator[None]:
    """Hold the right to write `path`, by a lock on its neighbour ".path.lock".

    The lock ends with the process, however that ends.

    Raises:
        BlockingIOError: if another process holds it.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a") as handle:
        # A former holder may have deleted the file between our opening it and our locking it.
        held = take_lock(handle.fileno()) and lock.exists()
        if not (held and os.path.samestat(lock.stat(), os.fstat(handle.fileno()))):
            raise BlockingIOError(f"Another process is writing {path}; wait for it or stop it.")
        try:
            yield
        finally:
            # Windows cannot delete an open file; there it stays, which does no harm.
            with contextlib.suppress(PermissionError):
                lock.unlink(missing_ok=True)


def take_lock(descriptor: int) -> bool:
    """Try to lock an open file for this process; False if another one has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
