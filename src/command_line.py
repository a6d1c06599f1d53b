"""What the four scripts share on the command line."""

import argparse
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from src.distributed import process_group, processes, report_failure
from src.files import check_writable
from src.folded import FLOATS
from src.optimisation import OPTIMIZERS
from src.utils import get_device


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing: None, and that a switch is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, once the folders they name are known to take files.

    Raises:
        OSError: if one does not; better before the training than after it.
    """
    args = parser.parse_args(argv)
    if args.quick and hasattr(args, "epochs"):
        args.epochs = 1
    for folder in (args.models, args.figures, args.results):
        check_writable(folder)
    return args


def script_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script takes."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    parser.add_argument("--seed", type=count(0), default=0, help="of everything that is random")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds, tiny sizes")
    parser.add_argument("--data", default="data", help="folder of MNIST, filled if it is empty")
    parser.add_argument("--models", default="models", help="folder of the checkpoints")
    parser.add_argument("--figures", default="figures", help="folder of the plots")
    parser.add_argument("--results", default="results", help="folder of the result rows")
    return parser


def training_options(
    parser: argparse.ArgumentParser,
    *,
    name: str,
    epochs: int,
    hidden: int | None = None,
    shift: int = 1,
    warp: float = 0.0,
) -> None:
    """Add the options of the scripts that train, with the defaults given."""
    parser.add_argument("--name", default=name, help="stem of the files written")
    parser.add_argument("--epochs", type=count(), default=epochs, help="passes over the data")
    parser.add_argument("--batch-size", type=count(), default=256, help="images an update")
    parser.add_argument("--learning-rate", type=number(), default=0.01, help="at its peak")
    parser.add_argument(
        "--weight-decay",
        type=number(with_low=True),
        default=0.01,
        help="each update shrinks a weight by this fraction times the learning rate",
    )
    parser.add_argument(
        "--shift", type=count(0), default=shift, help="largest random translation, in pixels"
    )
    parser.add_argument(
        "--warp",
        type=number(with_low=True),
        default=warp,
        help="largest random distortion: 0.1 turns, shears and stretches by up to a tenth",
    )
    parser.add_argument(
        "--channels", type=count(), nargs=2, default=[16, 32], help="widths of the convolutions"
    )
    parser.add_argument(
        "--hidden",
        type=count(),
        default=hidden,
        help="width of a fully connected layer before the output",
    )
    parser.add_argument(
        "--precision",
        choices=FLOATS,
        default="float32",
        help="of training; bfloat16 is faster on processors and GPUs with units for it only",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="muon learns more from as many epochs of long training",
    )
    parser.add_argument(
        "--held-out", type=count(), default=5000, help="training images kept aside for choices"
    )


def count(minimum: int = 1) -> Callable[[str], int]:
    """Type of an option: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {minimum}")
        return value

    return parse


def number(
    low: float = 0.0, high: float = float("inf"), *, with_low: bool = False
) -> Callable[[str], float]:
    """Type of an option: a finite number above `low` (`with_low`: at least `low`), below `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high or (with_low and value == low)):
            bounds = f"{'at least' if with_low else 'above'} {low:g}"
            bounds += f" and below {high:g}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    return parse


def share(text: str) -> tuple[int, int]:
    """Type of an option: "k/n" as (k, n), 1 <= k <= n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text} is not of the form k/n with 1 <= k <= n")
    return int(part), int(parts)


def run(main: Callable[[], None], *, interrupted: str = "") -> None:
    """Call a script's `main`, alone or as one of torchrun's processes.

    An expected error becomes one sentence and exit status 1; `interrupted` is what to say after
    Ctrl-C, which gives exit status 130.
    """
    try:
        with process_group():
            main()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        report_failure(str(error))
    except KeyboardInterrupt:
        print(f"\nInterrupted. {interrupted}".rstrip(), file=sys.stderr)
        sys.exit(130)


def provenance(script: str, args: argparse.Namespace, argv: Sequence[str] | None) -> dict:
    """What made a result: command, options, commit, versions, device and threads."""
    words = sys.argv[1:] if argv is None else argv
    # What is trained depends on the number of processes: each has noise and batch statistics of
    # its own.
    several = f"torchrun --nproc-per-node={processes()} --"
    return {
        "command": " ".join([several if processes() > 1 else "python", f"{script}.py", *words]),
        "options": vars(args),
        "commit": code_commit(),
        "device": str(get_device(args.device)),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scipy")},
        },
    }


_ROOT = Path(__file__).resolve().parent.parent
# What results depend on, new files too; not the results themselves, which runs write.
_CODE = ("*.py", "*.c", "*.h", "requirements.txt")


def code_commit(root: Path = _ROOT) -> str:
    """The commit of a checkout, with a + if code differs from it; "unknown" outside of one."""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *_CODE],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)
