"""What a run says of the code that made it."""

import subprocess

import pytest

from src.command_line import code_commit


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("main.py", "src/kernel.c", "results.csv"):
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "First")
    return tmp_path


def git(root, *words):
    ended = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True)
    return ended.stdout.decode().strip()


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("main.py", "+"),
        ("src/kernel.c", "+"),
        ("src/new.py", "+"),
        ("results.csv", ""),
        ("x.pt", ""),
    ],
)
def test_changed_and_new_code_is_marked_and_results_are_not(checkout, name, mark):
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert code_commit(checkout) == head
    (checkout / name).write_text("second\n")
    assert code_commit(checkout) == head + mark


def test_outside_of_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_commit(tmp_path) == "unknown"
