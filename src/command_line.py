"""The command line of the four scripts: their shared options, types of options, and errors."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from src.engine.parts import FLOATS
from src.files import (
    check_target,
    check_writable,
    drop_equal_copies,
    in_repository,
    lock_file,
    set_aside,
)
from src.optimisation.processes import is_main, process_group, report_failure
from src.optimisation.updates import OPTIMIZERS


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description. Shows defaults, unless None, False or in the help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "default: " in action.help:
            return action.help
        return super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # The null character keeps "default: auto" on one line at any width of the terminal.
        text = " ".join(text.split()).replace("default: ", "default:\0")
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        return [line.replace("\0", " ") for line in lines]


class Parser(argparse.ArgumentParser):
    """Options in groups. An error is one sentence, without the usage, and exit status 1."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        titles = ("data", "training", "attack", "certification", "output", "run")
        # The help leaves out groups without options.
        self.groups = {title: self.add_argument_group(title) for title in titles}

    def adder(self, title: str) -> Callable:
        """The method `add_argument` of a group."""
        return self.groups[title].add_argument

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; see --help")


def parse(parser: Parser, argv: Sequence[str] | None, **quick) -> argparse.Namespace:
    """Parse the options, and check that files can be written to the folders they name.

    Args:
        parser: from `script_parser`.
        argv: the words to parse; None means those of the command line.
        quick: defaults of options under --quick. What the user gives takes precedence.

    Raises:
        OSError: if a folder cannot be written to.
    """
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    for name in ("models", "figures", "results"):
        if name in args:
            check_writable(getattr(args, name))
    return args


# The endings of all rows that a script writes of one model.
_TABLES = ("attacks", "smallest_epsilons", "certificates")


@contextmanager
def reserved(args: argparse.Namespace, *tables: str, resume: bool = False) -> Iterator[None]:
    """Reserve the name of a training run, from before the training until all is written.

    Checks that the run can write its files, keeps other runs from writing them, and renames
    earlier rows, which would otherwise lie beside another model.

    Args:
        args: options with `name` and the folders `models`, `figures` and `results`.
        tables: endings of the files of rows, after the name.
        resume: keep the earlier rows, because the run continues them.

    Raises:
        OSError: if a file cannot be written or another run has reserved the name.
    """
    if not is_main():
        yield
        return
    model = Path(args.models) / f"{args.name}.pt"
    rows = [Path(args.results) / f"{args.name}_{table}.csv" for table in tables]
    longest = Path(args.figures) / f"{args.name}_accuracy_against_epsilon.png"
    for path in (model, *rows, *(path.with_suffix(".json") for path in rows), longest):
        check_target(path)
    # Those of another script too: they are of the model that this run replaces.
    every = [Path(args.results) / f"{args.name}_{table}.csv" for table in _TABLES]
    with lock_file(model), lock_file(Path(args.results) / args.name):
        for path in every:
            if not (resume and path in rows):
                set_aside(path)
        yield
        for path in rows:
            drop_equal_copies(path)


@contextmanager
def when_interrupted(advice: str) -> Iterator[None]:
    """Make `run` print this advice after Ctrl-C in the block."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None


def script_parser(description: str, example: str) -> Parser:
    """A parser with the options that every script takes; its help starts with `example`."""
    parser = Parser(usage=example, description=description)
    contents = {
        "data": "folder of MNIST, filled if empty",
        "models": "folder of the checkpoints",
        "figures": "folder of the figures",
        "results": "folder of the result rows",
    }
    for name, content in contents.items():
        add = parser.adder("data" if name == "data" else "output")
        # Not that of the working directory, which may be any.
        text = f"{content}; default: {name}/ of the repository"
        add(f"--{name}", default=str(in_repository(name)), metavar="FOLDER", help=text)
    add = parser.adder("run")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--seed", type=count(0, 2**63 - 1), default=0, help="seed of everything that is random")
    add("--quick", action="store_true", help="a test run of seconds on tiny data")
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
    """Add the options of the scripts that train, with these defaults."""
    names = "first part of the names of the files written"
    parser.adder("output")("--name", type=stem, default=name, help=names)
    kept = "training images kept aside to choose by"
    parser.adder("data")("--held-out", type=count(), default=5000, help=kept)
    add = parser.adder("training")
    add("--epochs", type=count(), default=epochs, help="passes over the data")
    add("--batch-size", type=count(), default=256, help="images per update")
    add("--learning-rate", type=number(high=10), default=0.01, help="learning rate at its peak")
    decay = "each update shrinks a weight by this fraction times the learning rate"
    add("--weight-decay", type=number(high=10, with_low=True), default=0.01, help=decay)
    add("--shift", type=count(0, 27), default=shift, help="largest random translation, in pixels")
    warps = "largest random distortion: 0.1 turns, shears and stretches by up to a tenth"
    add("--warp", type=number(high=1, with_low=True), default=warp, help=warps)
    widths = {"type": count(1, 4096), "nargs": 2, "default": [16, 32]}
    add("--channels", **widths, help="widths of the two convolutions")
    layer = "width of a fully connected layer before the output"
    layer += "; default: none" if hidden is None else ""
    add("--hidden", type=count(1, 65_536), default=hidden, help=layer)
    units = "precision of the training; bfloat16 is faster on hardware with units for it"
    add("--training-precision", choices=FLOATS, default="float32", help=units)
    muon = "muon learns more per epoch in long trainings"
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=muon)


def training_arguments(args: argparse.Namespace) -> dict:
    """The keyword arguments of `train_model` that `training_options` offers."""
    names = ("epochs", "batch_size", "learning_rate", "weight_decay", "shift", "warp")
    chosen = {name: getattr(args, name) for name in (*names, "optimizer", "seed")}
    return chosen | {"precision": args.training_precision}


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
    """Type of an option: a number between `low` and `high`.

    The bounds themselves are allowed only `with_low` and `with_high`.
    """

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
    """Type of an option: the first part of file names, without folders or a leading dot."""
    if not text or text.startswith(".") or any(not c.isprintable() or c in "/\\" for c in text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no beginning of a file name; use letters, digits, '_', '-' and '.'"
        )
    if text == "comparison":
        raise argparse.ArgumentTypeError("'comparison' is what main_compare.py calls its files")
    return text


def named_file(text: str) -> tuple[str, str]:
    """Type of an option: "NAME=FILE" as (NAME, FILE); the name can begin a file name."""
    name, _, file = text.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    if ".shard-" in name or ".previous-" in name:
        raise argparse.ArgumentTypeError(f"{name!r} would look like a part of other rows")
    return stem(name), file


def share(text: str) -> tuple[int, int]:
    """Type of an option: "k/n" as (k, n), 1 <= k <= n, 2 <= n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) >= 2):
        raise argparse.ArgumentTypeError(
            f"{text} is not of the form k/n with 1 <= k <= n and at least two parts"
        )
    return int(part), int(parts)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, alone or as one of torchrun's processes.

    An expected error becomes one sentence and exit status 1, or a traceback if the environment
    variable TRACEBACK is set. Ctrl-C prints the advice of `when_interrupted`: exit status 130.
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
