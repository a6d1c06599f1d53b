"""What the four scripts share on the command line."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from src.engine.parts import FLOATS
from src.files import check_target, check_writable, drop_equal_copies, lock_file, set_aside
from src.optimisation.processes import is_main, process_group, report_failure
from src.optimisation.updates import OPTIMIZERS


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description; shows defaults, but not None or that a switch is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Options in groups. Its errors are one sentence, without lines of usage, and exit status 1."""

    TITLES = ("data", "training", "attack", "certification", "output", "run")

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        self.groups = {title: self.add_argument_group(title) for title in self.TITLES}

    def about(self, title: str) -> Callable:
        """The `add_argument` of one of the groups; those without options are not shown."""
        return self.groups[title].add_argument

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; see --help")


def parse(parser: Parser, argv: Sequence[str] | None, **quick) -> argparse.Namespace:
    """The options, once the folders they name are known to take files.

    Args:
        parser: of `script_parser`.
        argv: the words; None for those of the command line.
        quick: the defaults under --quick; what the user gives goes before them.

    Raises:
        OSError: if a folder does not take files; better before the training than after it.
    """
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    for folder in (args.models, args.figures, args.results):
        check_writable(folder)
    return args


@contextmanager
def reserved(args: argparse.Namespace, *tables: str, resume: bool = False) -> Iterator[None]:
    """Hold the name of a training run, from before the training until all is written.

    What the run will write can be written, no other run writes it, and earlier rows of that name,
    which would lie beside another model, are out of the way.

    Args:
        args: options with `name` and the folders `models`, `figures` and `results`.
        tables: endings of the files of rows, after the name.
        resume: leave the rows: the run goes on with them.

    Raises:
        OSError: if a file cannot be written or another run holds the name.
    """
    if not is_main():
        yield
        return
    model = Path(args.models) / f"{args.name}.pt"
    rows = [Path(args.results) / f"{args.name}_{table}.csv" for table in tables]
    longest = Path(args.figures) / f"{args.name}_accuracy_against_epsilon.png"
    for path in (model, *rows, longest):
        check_target(path)
    with lock_file(model), lock_file(Path(args.results) / args.name):
        for path in () if resume else rows:
            set_aside(path)
        yield
        for path in rows:
            drop_equal_copies(path)


@contextmanager
def when_interrupted(advice: str) -> Iterator[None]:
    """What `run` says after Ctrl-C in this block."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None


def script_parser(description: str, example: str) -> Parser:
    """A parser with the options that every script takes; its help begins with `example`."""
    parser = Parser(usage=example, description=description)
    parser.about("data")("--data", default="data", help="folder of MNIST, filled if it is empty")
    add = parser.about("output")
    add("--models", default="models", help="folder of the checkpoints")
    add("--figures", default="figures", help="folder of the plots")
    add("--results", default="results", help="folder of the result rows")
    add = parser.about("run")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--seed", type=count(0, 2**63 - 1), default=0, help="of everything that is random")
    add("--quick", action="store_true", help="a smoke run of seconds, tiny sizes")
    return parser


def training_options(
    parser: Parser,
    *,
    name: str,
    epochs: int,
    hidden: int | None = None,
    shift: int = 1,
    warp: float = 0.0,
) -> None:
    """Add the options of the scripts that train, with the defaults given."""
    add = parser.about("output")
    add("--name", type=stem, default=name, help="beginning of the names of the files written")
    add = parser.about("data")
    add("--held-out", type=count(), default=5000, help="training images kept aside for choices")
    add = parser.about("training")
    add("--epochs", type=count(), default=epochs, help="passes over the data")
    add("--batch-size", type=count(), default=256, help="images per update")
    add("--learning-rate", type=number(high=10), default=0.01, help="at its peak")
    add(
        "--weight-decay",
        type=number(high=10, with_low=True),
        default=0.01,
        help="each update shrinks a weight by this fraction times the learning rate",
    )
    add("--shift", type=count(0, 27), default=shift, help="largest random translation, in pixels")
    add(
        "--warp",
        type=number(high=1, with_low=True),
        default=warp,
        help="largest random distortion: 0.1 turns, shears and stretches by up to a tenth",
    )
    widths = {"type": count(1, 4096), "nargs": 2, "default": [16, 32]}
    add("--channels", **widths, help="widths of the two convolutions")
    layer = "width of a fully connected layer before the output; default: none"
    layer = layer if hidden is None else layer.partition(";")[0]
    add("--hidden", type=count(1, 65_536), default=hidden, help=layer)
    add(
        "--training-precision",
        choices=FLOATS,
        default="float32",
        help="of the network in training; bfloat16 is faster where there are units for it",
    )
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="muon learns more from as many epochs of long training",
    )


def count(minimum: int = 1, maximum: int = 10**9) -> Callable[[str], int]:
    """Type of an option: an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            bounds = f"of at least {minimum}" if value < minimum else f"of at most {maximum:,}"
            raise argparse.ArgumentTypeError(f"{text} is not an integer {bounds}")
        return value

    return parse


def number(
    low: float = 0.0, high: float = 1000.0, *, with_low: bool = False, with_high: bool = False
) -> Callable[[str], float]:
    """Type of an option: a number between `low` and `high`, or also one of those themselves."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high or (with_low and value == low) or (with_high and value == high)):
            bounds = f"{'at least' if with_low else 'above'} {low:g}"
            bounds += f" and {'at most' if with_high else 'below'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    return parse


def stem(text: str) -> str:
    """Type of an option: the beginning of file names, in the folders given and visible."""
    if not text or text.startswith(".") or any(not c.isprintable() or c in "/\\" for c in text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no beginning of a file name; use letters, digits, '_', '-' and '.'"
        )
    return text


def share(text: str) -> tuple[int, int]:
    """Type of an option: "k/n" as (k, n), 1 <= k <= n, 2 <= n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) >= 2):
        raise argparse.ArgumentTypeError(f"{text} is not of the form k/n with 1 <= k <= n, 2 <= n")
    return int(part), int(parts)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, alone or as one of torchrun's processes.

    An expected error becomes one sentence and exit status 1; Ctrl-C gives exit status 130, with
    the advice of `when_interrupted`.
    """
    try:
        with process_group():
            main()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        report_failure(str(error))
    except KeyboardInterrupt as error:
        print(f"\nInterrupted. {error}".rstrip(), file=sys.stderr)
        sys.exit(130)
