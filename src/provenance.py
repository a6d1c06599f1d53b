"""What made a result: command, options, commit, versions, device and threads."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from src.files import ROOT, in_repository
from src.optimisation.processes import process_count
from src.utils import get_device

# The options that name folders of the repository if the user names none.
FOLDERS = ("data", "models", "figures", "results")


def provenance(script: str, args: argparse.Namespace, argv: Sequence[str] | None) -> dict:
    """What made a result, as JSON values; the command can be pasted.

    `script` is the name of a script in the repository, or "-m" and a module.
    """
    words = sys.argv[1:] if argv is None else argv
    # Each process draws its own noise and has its own batch statistics, so their number matters.
    several = f"torchrun --nproc-per-node={process_count()} --"
    start = several if process_count() > 1 else "python"
    program = script if script.startswith("-m ") else f"{script}.py"
    # By their names: results do not say where on a machine the repository lies.
    folders = {
        name: name for name in FOLDERS if getattr(args, name, None) == str(in_repository(name))
    }
    return {
        "command": f"{start} {program} {shlex.join(words)}",
        "options": vars(args) | folders,
        "commit": code_commit(),
        "device": str(get_device(args.device)),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scipy")},
        },
    }


def from_repository(path: str | os.PathLike) -> str:
    """A path as results record it: from the top of the repository if it lies in there."""
    full = Path(path).absolute()
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(path)


# Results depend on these files, new ones included.
_CODE = ("*.py", "*.c", "*.h", "requirements.txt")


def code_commit(root: Path = ROOT) -> str:
    """The commit of a checkout, with a + if its code was changed; "unknown" outside a checkout."""
    # A git hook sets GIT_DIR to its own repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    try:
        # A copy of the code may lie inside another repository.
        if not Path(git("rev-parse", "--show-toplevel")).samefile(root):
            return "unknown"
        commit = git("rev-parse", "--short", "HEAD")
        return commit + "+" * bool(git("status", "--porcelain", "--", *_CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
