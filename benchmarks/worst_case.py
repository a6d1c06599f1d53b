"""The worst of all our attacks on a model, image by image, as rows.

Writes a row an image, with a column for every stage of `strongest_attack_stages` (1: still
classified correctly after it and all before), and a twin that names model, ball, command and
commit. Prints the accuracy after each stage.

Run: python -m benchmarks.worst_case models/adversarial_training.pt --every 20 \\
         --rows reference/results/worst_case_linf.csv
     python -m benchmarks.worst_case models/adversarial_training.pt --norm l2 --epsilon 2 \\
         --every 100 --rows reference/results/worst_case_l2.csv
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.certification.intervals import accuracy_interval
from src.checkpoints import load_checkpoint, weights_digest
from src.command_line import count, number, run
from src.files import write_json
from src.provenance import code_commit
from src.records.rows import write_rows
from src.reports.tables import format_table, percent
from src.robustness.strongest import hits_by_stage
from src.utils import get_device, load_mnist, subset

NOT_STAGES = ("index", "label")


def main(argv=None):
    args = options(argv)
    model = load_checkpoint(args.checkpoint, get_device(args.device))
    test = load_mnist("test", args.data)
    indices = range(0, len(test), args.every)
    images = subset(test, indices)
    hits = hits_by_stage(model, images, args.epsilon, args.norm, thorough=True)
    stages = {name: standing.int().tolist() for name, standing in hits.items()}
    rows = [
        dict(zip((*NOT_STAGES, *stages), values, strict=True))
        for values in zip(indices, images.tensors[1].tolist(), *stages.values(), strict=True)
    ]
    words = sys.argv[1:] if argv is None else argv
    facts = {
        "command": " ".join(["python -m benchmarks.worst_case", *words]),
        "commit": code_commit(),
        "model_digest": weights_digest(model.state_dict()),
        "model_commit": model.facts.get("commit"),
        "norm": args.norm,
        "epsilon": args.epsilon,
    }
    write_rows(args.rows, rows)
    write_json(Path(args.rows).with_suffix(".json"), facts)
    print(stage_lines(rows))


def stage_lines(rows: Sequence[Mapping]) -> str:
    """The table of what stands after each stage."""
    lines = []
    for stage in [name for name in rows[0] if name not in NOT_STAGES]:
        right = sum(int(row[stage]) for row in rows)
        # Committed rows name the attack that knows the thresholds of the pixels by its older word.
        shown = stage.replace("ramp ", "thresholds ").replace(
            "thresholds ", "behind the thresholds, "
        )
        lines.append((shown, f"{right} of {len(rows)}", standing(rows, stage)))
    return format_table(("after", "images", "accuracy % [95 % interval]"), lines)


def standing(rows: Sequence[Mapping], stage: str | None = None) -> str:
    """Accuracy in % after a stage, the last by default, with its interval of test sampling."""
    right = [int(row[stage or list(row)[-1]]) for row in rows]
    share = sum(right) / len(right)
    return percent(share, *map(float, accuracy_interval(sum(right), len(right))))


def options(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="the model, .pt")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--epsilon", type=number(), default=0.3, help="radius, pixel units")
    parser.add_argument("--every", type=count(), default=20, help="of the test images")
    parser.add_argument("--rows", required=True, help="the file of rows, .csv")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    parser.add_argument("--data", help="folder of MNIST; default: data/ of the repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
