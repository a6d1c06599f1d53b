"""Files that appear whole or not at all (no torch)."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` only if the block succeeds.

    The temporary file lies in the same folder and keeps the ending of `path`, so that writers
    which choose a format by it (matplotlib, numpy) work. A reader sees the old file or the new
    one, never a part: the rename is atomic, and the bytes are on disk before it.

    Raises:
        OSError: if the folder cannot be made or written to; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        # mkstemp makes the file private; a result should be as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def check_writable(folder: str | os.PathLike) -> None:
    """Raise OSError unless files can be made in `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"{folder} is not a folder that can be written to; choose another.")


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
        # The holder deletes the file when it is done, so the one that was opened may be gone.
        held = take_lock(handle.fileno()) and _is_same_file(lock, handle.fileno())
        if not held:
            raise BlockingIOError(f"Another process is writing {path}; wait for it or stop it.")
        try:
            yield
        finally:
            # Windows keeps open files; there it stays, which does no harm.
            with contextlib.suppress(PermissionError):
                lock.unlink(missing_ok=True)


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether `path` still is the open file."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


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
