"""Files of certificates on the command line.

python -m src.records verify X.csv [--redraw K --checkpoint MODEL.pt]
python -m src.records merge X.csv X.shard-*-of-8.csv
"""

import argparse
import sys
from collections.abc import Sequence

from src.records.merging import merge
from src.records.rows import read_rows, verify


def _whole(text: str) -> int:
    """Type of an option: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The commands `verify` and `merge`; exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m src.records", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("verify", allow_abbrev=False, help="check a file of certificates")
    verb.add_argument("path", help="the file, .csv")
    verb.add_argument(
        "--redraw", type=_whole, default=0, help="certify this many random rows again"
    )
    verb.add_argument("--checkpoint", help="the model behind the rows, for --redraw")
    folder = "folder of MNIST, for --redraw; default: data/ of the repository"
    verb.add_argument("--data", help=folder)
    verb = verbs.add_parser("merge", allow_abbrev=False, help="merge shards into one file")
    verb.add_argument("path", help="the file to write, .csv")
    verb.add_argument("shards", nargs="+", help="the shards, .csv")
    args = parser.parse_args(argv)
    try:
        if args.verb == "merge":
            print(f"{args.path}: {merge(args.path, args.shards)} rows, each image once")
            return
        problems = verify(args.path)
        if args.redraw:
            # Not at the top: everything else here works without torch.
            from src.records.redrawing import redraw

            problems = problems or redraw(args.path, args.redraw, args.checkpoint, args.data)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(f"error: {args.path}: {problem}" for problem in problems))
    rows = len(read_rows(args.path))
    again = f"; {min(args.redraw, rows)} drawn again, the same" * bool(args.redraw)
    print(f"{args.path}: {rows} rows, nothing wrong{again}")


if __name__ == "__main__":
    main()
