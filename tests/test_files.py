"""Files that appear whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from src.files import check_target, take_lock, whole_file

ROOT = Path(__file__).resolve().parent.parent


def write(path, error=None):
    with whole_file(path) as temporary:
        temporary.write_text("x")
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [b"old", None])
def test_failing_block_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "rows.csv"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error):
        write(path, error)
    # KeyboardInterrupt and SystemExit too: Ctrl-C is how most runs end early.
    assert os.listdir(tmp_path) == ([] if old is None else ["rows.csv"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("old", [b"an older and longer text", None])
def test_block_that_succeeds_replaces_the_file_at_its_end(tmp_path, old):
    path = tmp_path / "rows.csv"
    if old is not None:
        path.write_bytes(old)
    with whole_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.exists() == (old is not None)
        assert old is None or path.read_bytes() == old
        # In the same folder: a rename across file systems is not atomic.
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["rows.csv"]


@pytest.mark.parametrize(
    "name", ["figure.png", "rows.tar.gz", "Makefile", "two words.csv", "é.json"]
)
def test_temporary_file_keeps_the_ending_and_folders_are_made(tmp_path, name):
    path = tmp_path / "new" / "folder" / name
    with whole_file(str(path)) as temporary:
        assert temporary.suffix == path.suffix
        # Hidden, so that a glob for results never meets it.
        assert temporary.name.startswith(".")
        temporary.write_text("x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "whole") as temporary:
            temporary.write_text("x")
        (tmp_path / "plain").write_text("x")
        after = os.umask(umask)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("whole", "plain")]
    assert modes == [0o666 & ~umask] * 2
    assert after == umask


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "rows.csv"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["rows.csv"]


@pytest.mark.parametrize("kind", ["a folder at the path", "a file for a folder"])
def test_impossible_paths_raise_and_leave_nothing(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    path = tmp_path / ("folder" if kind.startswith("a folder") else "file/rows.csv")
    with pytest.raises(OSError, match=path.parts[-1] if path.is_dir() else "file"):
        write(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert not os.listdir(tmp_path / "folder")


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    code = (
        "import os, signal; from src.files import whole_file\n"
        f"with whole_file({str(tmp_path / 'rows.csv')!r}) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    # Another file's, and one that a process still holds, stay.
    other = tmp_path / ".more-rows-12345678.csv"
    held = tmp_path / ".rows-12345678.csv"
    for path in (other, held):
        path.write_text("x")
    for path in (left, other, held):
        os.utime(path, (1, 1))
    with held.open() as handle:
        assert take_lock(handle.fileno())
        write(tmp_path / "rows.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["rows.csv", other.name, held.name])


def test_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(OSError, match=r"No space left.*model\.pt"):
        write(path, OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 300, "folder", "file/rows.csv"])
def test_targets_that_cannot_be_written_are_known_before(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        check_target(tmp_path / name)
    check_target(tmp_path / "new" / "rows.csv")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "new"]
